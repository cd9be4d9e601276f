"""Training of LLMCsiNet by Algorithm 1, and of the feedback networks that it is compared with.

A training is a sequence of stages, each a run of the common :class:`csimodels.training.loop.Trainer`: f_EN and f_PD
against L1, then the whole network against eq. 13; baselines and few-shot transfer have the second kind only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from csimodels.channels.rays import normalize_power
from csimodels.evaluation.metrics import nmse_db
from csimodels.files import load_metadata, write_json
from csimodels.models.baselines import BASELINES, CLASSICAL
from csimodels.models.channel_transformer import device_of
from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig
from csimodels.models.payload import relative_values
from csimodels.models.principal_components import PrincipalComponents
from csimodels.training.feedback_file import load_feedback, save_feedback
from csimodels.training.loop import Batch, TrainConfig, Trainer
from csimodels.training.network_file import FINGERPRINT, check_fingerprint
from csimodels.training.run_state import STATE

PARTS = ("preliminary", "whole")
WEIGHTS, LOG = "model.safetensors", "log.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        train: how to optimise; no weight decay makes the common AdamW the paper's Adam.
        part: ``"preliminary"`` trains f_EN and f_PD so that f_PD's output is close to the channel (Algorithm 1, stage
            1), ``"whole"`` the network (stage 2).
        frozen: whether f_EN and f_PD keep their weights. The paper freezes them indoors and for ray-traced channels,
            and not outdoors and in UMa (section V-B).
    """

    train: TrainConfig
    part: str = "whole"
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {self.part!r}")
        if self.frozen and self.part == "preliminary":
            raise ValueError("frozen: expected False for the part 'preliminary', which trains nothing else, got True")


@dataclasses.dataclass(frozen=True)
class FeedbackTraining:
    """One network to train.

    Attributes:
        model: ``"llmcsinet"`` or a name in :data:`csimodels.models.baselines.BASELINES`.
        stages: run in this order, each from the best weights of the one before; none for a classical method.
        config: of LLMCsiNet; None for a baseline.
        compression: 1/sigma of a baseline; None for LLMCsiNet, whose configuration says M.
        lengths: codeword lengths M, one of which is drawn for each sample in each epoch (LLMCsiNet-MC, section V-E);
            empty: the configured one always.
        initial: checkpoint of the same network to start from (few-shot transfer, section V-H).
        identity_start: whether f_EN and f_PD, of LLMCsiNet or IdasNet, start as
            :meth:`csimodels.models.llmcsinet.LlmCsiNet.start_as_identity` sets them.
        seed: of the weights.
    """

    model: str
    stages: tuple[Stage, ...]
    config: LlmCsiNetConfig | None = None
    compression: int | None = None
    lengths: tuple[int, ...] = ()
    initial: str | None = None
    identity_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model == "llmcsinet":
            if self.config is None or self.compression is not None:
                raise ValueError("config, compression: expected a configuration alone for the model 'llmcsinet'")
        elif self.model not in BASELINES:
            raise ValueError(f"model: expected one of llmcsinet, {', '.join(BASELINES)}, got {self.model!r}")
        elif self.config is not None or self.compression is None:
            raise ValueError(f"config, compression: expected a compression alone for the model {self.model!r}")
        elif self.lengths or any(stage.frozen or stage.part != "whole" for stage in self.stages):
            raise ValueError(f"lengths, stages: expected one length and whole stages for the model {self.model!r}")
        if self.identity_start and self.model not in ("llmcsinet", "idasnet"):
            raise ValueError(f"identity_start: expected False for the model {self.model!r}, got True")
        if bool(self.stages) == (self.model in CLASSICAL):
            expected = "none" if self.model in CLASSICAL else "at least one"
            raise ValueError(f"stages: expected {expected} for the model {self.model!r}, got {len(self.stages)}")

    def seeded(self, seed: int) -> FeedbackTraining:
        """The same training with other weights and another batch order."""
        stages = tuple(
            dataclasses.replace(stage, train=dataclasses.replace(stage.train, seed=seed)) for stage in self.stages
        )
        return dataclasses.replace(self, stages=stages, seed=seed)

    def last_train(self) -> TrainConfig:
        """How the last stage optimises, which decides the precision; any for a classical method."""
        return self.stages[-1].train if self.stages else TrainConfig(epochs=1)

    def described(self) -> dict[str, Any]:
        """All fields, JSON-serialisable; the initial checkpoint by how it was trained, not by where it lies."""
        fields = dataclasses.asdict(self)
        if self.initial is not None:
            fields["initial"] = load_metadata(self.initial).get(FINGERPRINT)
        return fields

    def build(self) -> nn.Module:
        """The untrained network; its weights are a function of ``seed``."""
        torch.manual_seed(self.seed)
        if self.config is not None:
            network: nn.Module = LlmCsiNet(self.config)
        else:
            network = BASELINES[self.model](1 / cast(int, self.compression))
        if self.identity_start:
            cast(LlmCsiNet, network).start_as_identity()
        return network


@dataclasses.dataclass(frozen=True)
class FeedbackData:
    """Angle-delay channels, float32 ``[samples, 2, delays, antennas]``, each sample of energy ``delays * antennas``.

    ``description`` (JSON-serialisable) identifies them.
    """

    train: torch.Tensor
    validation: torch.Tensor
    description: dict[str, Any]


def normalize_energy(h: torch.Tensor) -> torch.Tensor:
    """Scale every sample of float ``[samples, 2, delays, antennas]`` to the energy ``delays * antennas``.

    Raises:
        ValueError: a sample has no energy or is not finite; the message names the first one's index.
    """
    scaled = normalize_power(torch.complex(*h.float().unbind(1)))
    return torch.stack([scaled.real, scaled.imag], dim=1)


def to_complex(h: torch.Tensor) -> torch.Tensor:
    """float ``[samples, 2, delays, antennas]`` -> complex ``[samples, delays, antennas]``."""
    return torch.complex(*h.unbind(1))


class _Reconstruction(nn.Module):
    """What a stage trains, as one module."""

    def __init__(self, network: nn.Module, part: str):
        super().__init__()
        self.network, self.part = network, part

    def forward(self, h: torch.Tensor, m: torch.Tensor | None = None) -> torch.Tensor:
        """``h`` ``[B, 2, Nc, Nt]``; ``m`` int64 ``[B]``, elements fed back, None for the configured number."""
        if self.part == "preliminary":
            network = cast(LlmCsiNet, self.network)
            return network.preliminary(network.encode(h, m))
        return self.network(h) if m is None else self.network(h, m)


def train_feedback(
    training: FeedbackTraining,
    data: FeedbackData,
    run_dir: Path,
    *,
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> tuple[nn.Module, float]:
    """Train one network; writes ``model.safetensors`` (best weights) and ``log.json`` to ``run_dir``.

    A run that was killed continues from its last state when called again with the same arguments; a finished one is
    read from its file.

    Args:
        training: which network, and how.
        data: channels of unit mean power (:func:`normalize_energy`).
        run_dir: output folder.
        accelerator: see :func:`csimodels.training.loop.make_accelerator`.
        on_step: progress callback ``(step, total_steps, loss)``, per stage.

    Returns:
        The network with its best weights, in eval mode, and its validation NMSE in dB.

    Raises:
        ValueError: a file or state in ``run_dir`` of another run, an initial checkpoint of another network, channels
            that do not fit, or what :class:`Trainer` refuses.
        FloatingPointError: a loss or a validation NMSE became infinite or NaN.
    """
    _check(data)
    fingerprint = json.loads(json.dumps({"training": training.described(), "data": data.description}))
    path = run_dir / WEIGHTS
    if path.exists():
        network, metadata = load_feedback(path)
        check_fingerprint(path, metadata, fingerprint)
        return network, metadata["validation_nmse_db"]
    network = _start(training)
    results = []
    for number, stage in enumerate(training.stages, start=1):
        trainer = _trainer(
            training, stage, network, data, run_dir / f"stage{number}", fingerprint, accelerator, on_step
        )
        results.append(trainer.fit())
        network = cast(_Reconstruction, accelerator.unwrap_model(trainer.model)).network
    network = network.cpu().eval()
    if training.model in CLASSICAL:
        if isinstance(network, PrincipalComponents):
            network.fit(data.train)
        best = validation_nmse_db(network, data.validation)
    else:
        network.requires_grad_(True)
        best = results[-1].best_validation
    _fit_quantizer(network, data.train)
    if accelerator.is_main_process:
        extra = {"validation_nmse_db": best, FINGERPRINT: fingerprint}
        save_feedback(path, network, training.model, training.compression, extra=extra)
        write_json(run_dir / LOG, {**fingerprint, "stages": [result.log() for result in results]})
        for number in range(1, len(results) + 1):  # several times the weights each, and of no more use
            (run_dir / f"stage{number}" / STATE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return network, best


@torch.inference_mode()
def _fit_quantizer(network: nn.Module, h: torch.Tensor, batch: int = 256) -> None:
    """Fit the quantiser that travels with the model, if it has one, to the codewords of ``h``."""
    if isinstance(network, LlmCsiNet) and network.quantizer is not None:
        network.quantizer.fit(torch.cat([relative_values(network.encode(part))[0] for part in h.split(batch)]))


def _check(data: FeedbackData) -> None:
    for name in ("train", "validation"):
        h = getattr(data, name)
        if h.ndim != 4 or h.shape[1] != 2 or len(h) == 0 or h.dtype != torch.float32:
            raise ValueError(
                f"{name}: expected float32 [samples, 2, delays, antennas], not empty, got {h.dtype} {tuple(h.shape)}"
            )
        bad = (~torch.isfinite(h.flatten(1)).all(1)).nonzero()
        if len(bad):
            raise ValueError(f"{name}: {len(bad)} of {len(h)} samples are not finite, the first is {int(bad[0])}")


def _start(training: FeedbackTraining) -> nn.Module:
    network = training.build()
    if training.initial is not None:
        start, _ = load_feedback(training.initial)
        try:
            network.load_state_dict(start.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{training.initial}: holds another network than the training is for: {error}") from None
    return network


def _trainer(
    training: FeedbackTraining,
    stage: Stage,
    network: nn.Module,
    data: FeedbackData,
    run_dir: Path,
    fingerprint: dict[str, Any],
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None,
) -> Trainer:
    _set_trainable(network, stage)
    module = _Reconstruction(network, stage.part)
    lengths = torch.tensor(training.lengths)

    def epoch_data(epoch: int) -> Batch:
        if not training.lengths:
            return (data.train,)
        generator = torch.Generator().manual_seed(stage.train.seed * 1_000_003 + epoch)
        return data.train, lengths[torch.randint(len(lengths), (len(data.train),), generator=generator)]

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        # Samples have equal energy, so this is eq. 13 in a unit in which an estimate of zero has loss 1.
        h = batch[0]
        return (model(*batch).float() - h).square().sum() / h.square().sum()

    def validate(model: nn.Module) -> float:
        return validation_nmse_db(model, data.validation, training.lengths)

    return Trainer(
        module,
        stage.train,
        epoch_data,
        loss,
        validate,
        accelerator=accelerator,
        run_dir=run_dir,
        fingerprint=fingerprint,
        on_step=on_step,
    )


def _set_trainable(network: nn.Module, stage: Stage) -> None:
    network.requires_grad_(True)
    if not isinstance(network, LlmCsiNet):
        return
    network.freeze_stage1(stage.frozen)
    if stage.part == "preliminary" and network.prediction is not None:
        network.prediction.requires_grad_(False)


@torch.inference_mode()
def validation_nmse_db(model: nn.Module, h: torch.Tensor, lengths: Sequence[int] = (), batch: int = 256) -> float:
    """NMSE in dB, mean of ratios (eq. 14); with several codeword lengths the mean of their dB values.

    Args:
        model: ``model(h)``, or ``model(h, m)`` with int64 ``m`` ``[batch]``, gives the reconstruction.
        h: float32 ``[samples, 2, delays, antennas]``.
        lengths: the values of ``m``.
    """
    device = device_of(model)
    values = []
    for length in lengths or (None,):
        parts = []
        for part in h.split(batch):
            arguments = () if length is None else (torch.full((len(part),), length, device=device),)
            parts.append(model(part.to(device), *arguments).float().cpu())
        values.append(nmse_db(h, torch.cat(parts)).item())
    return sum(values) / len(values)
