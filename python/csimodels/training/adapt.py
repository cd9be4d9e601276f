"""Step 2 of LASCO: adapt small models to one environment, the large model and the reference frozen (section III-C)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from csimodels.channels.rays import normalize_power
from csimodels.evaluation.lmmse import LinearMmse
from csimodels.evaluation.metrics import gcs, nmse_db
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.lasco import METHODS, Proxy, ProxyConfig, squared_error
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.loop import Batch, TrainConfig, Trainer

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """How to adapt to one environment.

    Attributes:
        train: optimisation of the proxy; LASCO uses a constant 1e-3, batch 256, at most 100 epochs, patience 20.
            With ``mixed_precision="auto"`` the compiled kernels train in float32 on a CPU
            (:func:`csimodels.training.adapt_together.adapt_together`), which is faster there than bfloat16 autocast.
        alpha: of LASCO (fixed). initial_alpha: where E-LASCO starts. alpha_learning_rate: of E-LASCO's coefficient,
            which is not decayed; the paper does not give it.
        initial: what the networks start from: ``"pinv"`` (the pseudo-inverse of the projection, eq. 11) or ``"lmmse"``
            (the linear MMSE estimate from the adaptation samples' covariance; not in the paper).
        form: see :class:`csimodels.models.lasco.ProxyConfig`.
    """

    train: TrainConfig
    alpha: float = 0.7
    initial_alpha: float = 1.0
    alpha_learning_rate: float = 0.02
    initial: str = "pinv"
    form: str = "collaborate"

    def __post_init__(self) -> None:
        if self.initial not in ("pinv", "lmmse"):
            raise ValueError(f"initial: expected 'pinv' or 'lmmse', got {self.initial!r}")
        if self.train.learning_rate == 0:
            raise ValueError("train: expected a positive learning rate, got 0")
        for name in ("alpha", "initial_alpha", "alpha_learning_rate"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")

    @classmethod
    def paper(cls, **changes: Any) -> AdaptConfig:
        """Section IV-B."""
        train = TrainConfig(
            epochs=100, batch_size=256, schedule="constant", patience=20, mixed_precision="auto", initial_candidate=True
        )
        return cls(train, **changes)

    @classmethod
    def laptop(cls, **changes: Any) -> AdaptConfig:
        """Seconds per environment on a CPU core: batch 64, at most 40 epochs, patience 10."""
        train = TrainConfig(
            epochs=40, batch_size=64, schedule="constant", patience=10, mixed_precision="auto", initial_candidate=True
        )
        return cls(train, **changes)


@dataclasses.dataclass(frozen=True)
class EnvironmentData:
    """Normalised channels of one environment, complex ``[samples, antenna, subcarrier]`` each."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor

    @classmethod
    def split(cls, h: torch.Tensor, train: int, validation: int, test: int) -> EnvironmentData:
        """Cut ``h`` into three disjoint parts of the given sizes, normalising each sample's power."""
        if min(train, validation, test) < 1 or train + validation + test > len(h):
            raise ValueError(
                f"train, validation, test: expected sizes from 1 that sum to at most {len(h)}, got "
                f"{train}, {validation} and {test}"
            )
        h = normalize_power(h[: train + validation + test])
        return cls(*h.split([train, validation, test]))


def linear_estimate(lmmse: LinearMmse, codec: RandomProjectionCodec, h: torch.Tensor) -> torch.Tensor:
    """The linear MMSE estimate of ``h`` from its codeword, network units ``[batch, tokens, features]``.

    ``lmmse`` is fitted to targets in network units, so the codeword is brought to the same scale.
    """
    return lmmse.estimate(codec.encode(h) * codec.token_scale).float().unflatten(1, codec.token_shape)


@dataclasses.dataclass(frozen=True)
class CachedSplit:
    """Inputs, targets and the frozen models' outputs on one split, network units."""

    h_in: torch.Tensor
    target: torch.Tensor
    base: torch.Tensor
    reference: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.h_in, self.target, self.base, self.reference


@dataclasses.dataclass
class MethodResult:
    """One method in one environment.

    ``nmse_db`` (mean of ratios) and ``gcs`` on the test split; ``epochs`` run, the epoch whose weights were kept,
    training ``seconds`` and the learned ``alpha`` for methods that have them.
    """

    nmse_db: float
    gcs: float
    epochs: int | None = None
    best_epoch: int | None = None
    seconds: float | None = None
    alpha: float | None = None


def _checked_output(output: Any, h_in: torch.Tensor) -> torch.Tensor:
    """What a black box returned for ``h_in``, float32 on the CPU."""
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"base: expected outputs of type torch.Tensor, got {type(output).__name__}")
    if output.shape != h_in.shape:
        raise ValueError(f"base: expected outputs of shape {tuple(h_in.shape)}, got {tuple(output.shape)}")
    output = output.detach().float().cpu()
    bad = int((~torch.isfinite(output)).sum())
    if bad:
        raise ValueError(f"base: expected finite outputs, got {bad} that are NaN or infinite")
    return output


class Adapter:
    """Adapts and scores every method of Fig. 6 in one environment.

    The base LAM's and the reference SAM's outputs are computed once per split and kept: adaptation never runs them
    again. ``cache_seconds`` is the time that took, ``lmmse`` the linear estimator of the environment.

    Args:
        base: the LAM: any callable from ``H_in`` to ``H`` in network units (a black box; only its outputs are used).
        reference: the reference SAM.
        codec: what the models were trained for.
        data: the environment's samples.
        config: see :class:`AdaptConfig`.

    Raises:
        TypeError: ``base`` returns something that is not a tensor.
        ValueError: samples that do not fit ``codec``, or outputs of ``base`` of another shape than its input or that
            are not finite.
    """

    def __init__(
        self,
        base: Network,
        reference: ChannelTransformer,
        codec: RandomProjectionCodec,
        data: EnvironmentData,
        config: AdaptConfig,
        *,
        accelerator: Accelerator,
    ):
        self.reference, self.codec, self.data, self.config = reference, codec, data, config
        self.accelerator = accelerator
        self.lmmse = LinearMmse.fit(codec.target(data.train).flatten(1), codec.projection)
        started = time.monotonic()
        self._splits = {name: self._cache(base, getattr(data, name)) for name in ("train", "validation", "test")}
        self.cache_seconds = time.monotonic() - started

    # Not inference mode: training saves these tensors for backward.
    @torch.no_grad()
    def _cache(self, base: Network, h: torch.Tensor, batch: int = 512) -> CachedSplit:
        linear = self.config.initial == "lmmse"
        h_in = linear_estimate(self.lmmse, self.codec, h) if linear else self.codec.initial(self.codec.encode(h))
        outputs = []
        for part in h_in.split(batch):
            outputs.append(_checked_output(base(part), part))
        device = next(self.reference.parameters()).device
        reference = torch.cat([self.reference(part.to(device)).float().cpu() for part in h_in.split(batch)])
        return CachedSplit(h_in, self.codec.target(h), torch.cat(outputs), reference)

    def cached(self, split: str) -> CachedSplit:
        """Inputs, targets and frozen outputs of ``"train"``, ``"validation"`` or ``"test"``."""
        return self._splits[split]

    def proxy_config(self, method: str, alpha: float | None = None) -> ProxyConfig:
        """How ``method``'s proxy starts; ``alpha`` overrides the configured coefficient of ``lasco``."""
        start = self.config.initial_alpha if method == "e_lasco" else self.config.alpha if alpha is None else alpha
        return ProxyConfig(method, start, self.config.form)

    def score(self, method: str, *, alpha: float | None = None) -> MethodResult:
        """NMSE and GCS of ``method`` on the test split, adapting it first where it trains.

        Args:
            method: one of :data:`csimodels.models.lasco.METHODS`.
            alpha: overrides the configured coefficient of ``lasco`` (Fig. 7).
        """
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        test = self._splits["test"]
        if method == "pretrained_lam":
            return self.score_estimate(test.base)
        if method == "pretrained_sam":
            return self.score_estimate(test.reference)
        if method == "lmmse":
            return self.score_estimate(linear_estimate(self.lmmse, self.codec, self.data.test))
        return self.adapt(method, alpha=alpha)[0]

    def adapt(
        self,
        method: str,
        *,
        run_dir: Path | None = None,
        description: dict[str, Any] | None = None,
        alpha: float | None = None,
    ) -> tuple[MethodResult, Proxy]:
        """Train ``method``'s proxy and score it on the test split.

        Args:
            method: one of :data:`csimodels.models.lasco.ADAPTED_METHODS`.
            run_dir: folder for the training state, so that a killed adaptation resumes.
            description: with ``run_dir``, what identifies the data and the models (JSON-serialisable): a state of
                another environment or base must not be taken for this one's.
            alpha: as for :meth:`score`.

        Returns:
            The scores and the proxy with its best weights, in eval mode.

        Raises:
            ValueError: an unknown method, ``run_dir`` without ``description``, fewer training samples than a batch, or
                a state in ``run_dir`` that is not whole or belongs to another run.
        """
        if run_dir is not None and description is None:
            raise ValueError("description: expected one with run_dir, got None")
        proxy = Proxy(self.proxy_config(method, alpha), self.reference, seed=self.config.train.seed)
        trained = self._trainer(proxy, run_dir, description).fit()
        proxy.eval()
        result = self.score_estimate(self._predict(proxy, self._splits["test"]))
        result.epochs, result.best_epoch, result.seconds = trained.epochs, trained.best_epoch, trained.seconds
        if method in ("lasco", "e_lasco"):
            result.alpha = proxy.alpha.item()
        return result, proxy

    def _trainer(self, proxy: Proxy, run_dir: Path | None, description: dict[str, Any] | None) -> Trainer:
        config = self.config
        if len(self.data.train) < config.train.batch_size:
            raise ValueError(
                f"train: expected at least one batch of {config.train.batch_size} samples, got {len(self.data.train)}"
            )
        groups: list[dict[str, Any]] = [{"params": list(proxy.sam.parameters())}]
        if proxy.alpha.requires_grad:
            scale = config.alpha_learning_rate / config.train.learning_rate
            groups.append({"params": [proxy.alpha], "weight_decay": 0.0, "lr_scale": scale})
        train = self._splits["train"].tensors()

        def loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
            h_in, target, base, reference = batch
            return squared_error(target, network(h_in, base, reference))

        return Trainer(
            proxy,
            config.train,
            lambda epoch: train,
            loss,
            lambda network: self._nmse_db(network, self._splits["validation"]),
            accelerator=self.accelerator,
            run_dir=run_dir,
            fingerprint={
                "adapt": dataclasses.asdict(config),
                "proxy": dataclasses.asdict(proxy.config),
                "data": description,
            },
            groups=groups,
        )

    def _predict(self, network: torch.nn.Module, split: CachedSplit, batch: int = 1024) -> torch.Tensor:
        device = next(network.parameters()).device
        parts = zip(split.h_in.split(batch), split.base.split(batch), split.reference.split(batch), strict=True)
        with torch.inference_mode():
            return torch.cat([network(*(x.to(device) for x in part)).float().cpu() for part in parts])

    def _nmse_db(self, network: torch.nn.Module, split: CachedSplit) -> float:
        return nmse_db(self.codec.to_channel(split.target), self.codec.to_channel(self._predict(network, split))).item()

    @torch.inference_mode()
    def outputs(self, proxy: Proxy, count: int) -> dict[str, torch.Tensor]:
        """Channels of the first ``count`` test samples, complex64 ``[count, antenna, subcarrier]`` each.

        Keys: ``truth``, ``input`` (what the networks start from, at the power that the codeword tells), ``base`` and
        ``estimate`` (the adapted ``proxy``'s).
        """
        test = self._splits["test"]
        h_in, base, reference = (x[:count] for x in (test.h_in, test.base, test.reference))
        device = next(proxy.parameters()).device
        estimate = proxy(h_in.to(device), base.to(device), reference.to(device)).cpu()
        # Undo the gain that networks get on the pseudo-inverse's output: this is A^+ s itself.
        gain = self.codec.input_scale / self.codec.token_scale if self.config.initial == "pinv" else 1.0
        named = {"truth": test.target[:count], "input": h_in / gain, "base": base, "estimate": estimate}
        return {name: self.codec.to_channel(tokens) for name, tokens in named.items()}

    def score_estimate(self, estimate: torch.Tensor) -> MethodResult:
        """NMSE and GCS of ``estimate``, network units, on the test split."""
        truth, estimated = self.data.test, self.codec.to_channel(estimate)
        return MethodResult(nmse_db(truth, estimated).item(), gcs(truth, estimated).item())
