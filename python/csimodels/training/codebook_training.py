"""Training that enhances a codebook: Algorithms 1 and 2 of LVM4CF, for any codeword network.

Source: "Extract the Best, Discard the Rest: CSI Feedback with Offline Large AI Models" (Zhuang et al.), section IV-C.
Both algorithms pair every channel with its best codeword and train the network to turn the codeword towards the
channel. With single-side (SS) deployment this happens once, since the UE keeps the conventional codebook. With
dual-side (DS) deployment the refined codebook takes the old one's place wherever that is better, and all starts anew.

Every interval is a run of the common :class:`csimodels.training.loop.Trainer`; between two of them the file
``progress.safetensors`` says where the training stands.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

import csikernels
from csimodels.files import load_metadata, write_json
from csimodels.models.codebook_file import FeedbackCodebook, load_codebook, save_codebook
from csimodels.models.codeword_baselines import build_network, describe
from csimodels.models.codeword_network import CodewordConfig, CodewordNetwork, refine_codebook
from csimodels.training.codeword_file import load_network, save_network
from csimodels.training.loop import Batch, TrainConfig, Trainer
from csimodels.training.network_file import FINGERPRINT, check_fingerprint
from csimodels.training.run_state import STATE

DEPLOYMENTS = ("single_side", "dual_side")
CODEBOOK, NETWORK, LOG = "codebook.safetensors", "model.safetensors", "log.json"
_PROGRESS = "progress.safetensors"


@dataclasses.dataclass(frozen=True)
class CodebookTraining:
    """How to enhance a codebook.

    Attributes:
        network: which network refines the codewords.
        train: how to optimise; ``epochs`` counts all of them. No weight decay makes the common AdamW the paper's Adam.
        deployment: ``"single_side"`` (Algorithm 1) or ``"dual_side"`` (Algorithm 2).
        update_interval: epochs between two updates of the codebook (DS). Decided: ``epochs`` is a multiple of it, so
            that the last update uses a whole interval too; the learning rate starts anew with the model.
        initial: checkpoint of the same network to start from, here and whenever the model is re-initialised: SSLCF's
            network that was pre-trained on other sites. None draws the weights (a pre-trained backbone is read again).
        seed: of the weights; interval n has weights and a batch order of its own.
    """

    network: CodewordConfig
    train: TrainConfig
    deployment: str = "single_side"
    update_interval: int = 40
    initial: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.deployment not in DEPLOYMENTS:
            raise ValueError(f"deployment: expected one of {', '.join(DEPLOYMENTS)}, got {self.deployment!r}")
        if self.update_interval < 1:
            raise ValueError(f"update_interval: expected at least 1, got {self.update_interval}")
        if self.deployment == "dual_side" and self.train.epochs % self.update_interval:
            raise ValueError(
                f"update_interval: expected a divisor of the {self.train.epochs} epochs, got {self.update_interval}"
            )

    @property
    def intervals(self) -> int:
        """Trainings from fresh weights: 1 for SS."""
        return 1 if self.deployment == "single_side" else self.train.epochs // self.update_interval

    def stage(self, interval: int) -> TrainConfig:
        """How interval 1, 2, ... is optimised."""
        epochs = self.train.epochs // self.intervals
        return dataclasses.replace(self.train, epochs=epochs, seed=self.train.seed + interval - 1)

    def described(self) -> dict[str, Any]:
        """All fields, JSON-serialisable; the initial checkpoint by how it was trained, not by where it lies."""
        fields = {**dataclasses.asdict(self), "network": describe(self.network)}
        if self.initial is not None:
            fields["initial"] = load_metadata(self.initial).get(FINGERPRINT)
        return fields

    def build(self, interval: int = 1) -> CodewordNetwork:
        """The network as an interval starts with it; its drawn weights are a function of ``seed`` and ``interval``.

        Raises:
            ValueError: the initial checkpoint holds another network.
        """
        torch.manual_seed(self.seed * 1_000_003 + interval)
        if self.initial is None:
            return build_network(self.network)
        network, _ = load_network(self.initial)
        expected, given = _architecture(self.network), _architecture(network.config)
        if given != expected:
            raise ValueError(f"{self.initial}: expected a network of {expected}, got {given}")
        return network.train()


def _architecture(config: CodewordConfig) -> dict[str, Any]:
    """What a checkpoint must agree on: all but where the backbone came from and what its source states besides."""
    entries = describe(config)
    for name in ("source", "settings"):
        entries.get("backbone", {}).pop(name, None)
    return entries


@dataclasses.dataclass(frozen=True)
class CodebookData:
    """Channels, complex64 ``[samples, D]``, not zero. ``description`` (JSON-serialisable) identifies them."""

    train: torch.Tensor
    validation: torch.Tensor
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EnhancedCodebook:
    """The outcome of a training.

    Attributes:
        book: the codebook, for deployment SS or DS; its ``kind`` is the network's name.
        validation: mean cosine similarity on the validation channels in that deployment.
        history: one entry per interval: ``interval``, ``validation`` of its codebook, whether it was ``kept``, and
            what the training did; the first, ``interval`` 0, is the conventional codebook's at both ends.
    """

    book: FeedbackCodebook
    validation: float
    history: list[dict[str, Any]]


def pair(
    h: torch.Tensor, codebook: torch.Tensor, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's best codeword (eq. 9), in bounded memory: index int64 and cosine float32, each ``[N]``.

    Args:
        h: complex ``[N, D]``. codebook: complex ``[K, D]``. device: where to search; the results come to the CPU.

    Raises:
        ValueError: a channel is zero or not finite; what :func:`csikernels.codebook_argmax` refuses.
    """
    index, similarity = csikernels.codebook_argmax(h.to(device), codebook.to(device))
    bad = (index < 0).nonzero()
    if len(bad):
        raise ValueError(f"h: expected finite, non-zero channels, {len(bad)} of {len(h)} are not, first {int(bad[0])}")
    return index.cpu(), similarity.cpu()


def cosine_loss(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Eq. 25: the negative mean of ``|g^H h| / (|g| |h|)`` over complex ``[N, D]``; differentiable, in g's precision.

    (:func:`csimodels.evaluation.metrics.codeword_cosine` is the metric, in float64.)
    """
    norms = torch.linalg.vector_norm(g, dim=1) * torch.linalg.vector_norm(h, dim=1)
    return -((g.conj() * h).sum(1).abs() / norms).mean()


class _Pairs:
    """Channels with their codewords, as the training sees them. Each codeword is refined once however often it occurs:
    with 2^6 codewords a batch of 512 channels costs 64 forwards."""

    def __init__(self, h: torch.Tensor, codebook: torch.Tensor, device: torch.device):
        self.h, self.codebook = h, codebook.to(device)
        self.index, similarity = pair(h, codebook, device)
        self.cosine = similarity.double().mean().item()

    def refined(self, network: nn.Module, index: torch.Tensor) -> torch.Tensor:
        words, position = index.unique(return_inverse=True)
        return network(self.codebook[words])[position]

    def refined_cosine(self, network: CodewordNetwork, batch: int = 4096) -> float:
        """Mean cosine of the refined codewords with the channels that they are paired with."""
        words, position = self.index.unique(return_inverse=True)
        refined = refine_codebook(network, self.codebook[words.to(self.codebook.device)], batch)
        total = sum(
            -cosine_loss(refined[at], h).item() * len(h)
            for at, h in zip(position.split(batch), self.h.split(batch), strict=True)
        )
        return total / len(self.h)


def enhance_codebook(
    training: CodebookTraining,
    conventional: FeedbackCodebook,
    data: CodebookData,
    run_dir: Path,
    *,
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> EnhancedCodebook:
    """Enhance a conventional codebook; writes ``codebook.safetensors`` and ``log.json`` to ``run_dir``, and for SS the
    network (``model.safetensors``), from which other trainings can start.

    Within an interval the weights with the best validation cosine are kept; the validation channels stay with the
    codewords that they are paired with, which is what SS is judged by and a lower bound for DS. A DS candidate is
    judged by pairing the validation channels with it, and kept if their cosine rises (Algorithm 2, line 7).

    A run that was killed continues from its last state when called again with the same arguments, and ends with the
    codebook that an unbroken one would have had; a finished one is read from its file.

    Args:
        training: which network, and how.
        conventional: the codebook that both ends have, ``[K, D]``. It is not changed: with SS the UE keeps it.
        data: of the site; for MSLCF of all sites of one environment type.
        run_dir: output folder.
        accelerator: see :func:`csimodels.training.loop.make_accelerator`.
        on_step: progress callback ``(step, total_steps, loss)``, per interval.

    Raises:
        ValueError: codebook, channels or initial checkpoint that do not fit; a file or state in ``run_dir`` of another
            run; what :class:`Trainer` refuses.
        FloatingPointError: a loss, a validation value or a codeword became infinite or NaN.
    """
    _check(training, conventional, data)
    fingerprint = json.loads(
        json.dumps({"training": training.described(), "data": data.description, "codebook": conventional.digest()})
    )
    done = _read(run_dir / CODEBOOK, fingerprint)
    if done is not None:
        return done
    device, single = accelerator.device, training.deployment == "single_side"
    state = _read(run_dir / _PROGRESS, fingerprint)
    current = (conventional if state is None else state.book).words
    train, validation = _Pairs(data.train, current, device), _Pairs(data.validation, current, device)
    best = validation.cosine if state is None else state.validation
    history = [{"interval": 0, "validation": best, "kept": True}] if state is None else state.history
    for interval in range(len(history), training.intervals + 1):
        stage_dir = run_dir / f"interval{interval}"
        stage_print = {**fingerprint, "interval": interval}
        network, log = _fit(training, interval, train, validation, stage_dir, stage_print, accelerator, on_step)
        candidate = refine_codebook(network, current)
        if single:
            value, kept = validation.refined_cosine(network), True
        else:
            repaired = _Pairs(data.validation, candidate, device)
            (value,) = broadcast_object_list([repaired.cosine])  # processes that rounded differently could part over it
            kept = value > best
        history = [*history, {"interval": interval, "validation": value, "kept": kept, **log}]
        if kept:
            current, best = candidate, value
        if accelerator.is_main_process:
            if single:
                save_network(run_dir / NETWORK, network, extra={FINGERPRINT: fingerprint})
            save_codebook(run_dir / _PROGRESS, _book(training, conventional, current, best, history, fingerprint))
            (stage_dir / STATE).unlink(missing_ok=True)  # several times the weights, and of no more use
        accelerator.wait_for_everyone()
        if kept and interval < training.intervals:
            train, validation = _Pairs(data.train, candidate, device), repaired
    book = _book(training, conventional, current, best, history, fingerprint)
    if accelerator.is_main_process:
        write_json(run_dir / LOG, {**fingerprint, "validation": best, "history": history})
        save_codebook(run_dir / CODEBOOK, book)
        (run_dir / _PROGRESS).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return EnhancedCodebook(book, best, history)


def enhance_environments(
    training: CodebookTraining,
    conventional: FeedbackCodebook,
    environments: Mapping[str, CodebookData],
    run_dir: Path,
    *,
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> FeedbackCodebook:
    """MSLCF's codebooks (eqs. 12 and 13), ``[E, K, D]`` in the order of ``environments``.

    Args:
        training: of every environment type; MSLCF is for dual-side deployment.
        environments: name (a folder in ``run_dir``) -> channels of many sites of that type.
        conventional, run_dir, accelerator, on_step: as :func:`enhance_codebook`, which each type's codebook comes from.

    Raises:
        ValueError: single-side deployment, or no environment; what :func:`enhance_codebook` raises.
    """
    if training.deployment != "dual_side":
        raise ValueError(f"training: expected the deployment 'dual_side', got {training.deployment!r}")
    if not environments:
        raise ValueError("environments: expected at least one, got none")
    books = [
        enhance_codebook(training, conventional, data, run_dir / name, accelerator=accelerator, on_step=on_step).book
        for name, data in environments.items()
    ]
    return stack_books(dict(zip(environments, books, strict=True)))


def stack_books(books: Mapping[str, FeedbackCodebook]) -> FeedbackCodebook:
    """Codebooks ``[K, D]`` of environment types by name as one ``[E, K, D]``.

    Raises:
        ValueError: no codebook, or some that differ in kind, shape or ports.
    """
    if not books:
        raise ValueError("books: expected at least one, got none")
    first, *others = books.values()
    for other in others:
        if (other.kind, other.ports, other.words.shape) != (first.kind, first.ports, first.words.shape):
            raise ValueError(
                f"books: expected {first.kind} for {first.ports}, {tuple(first.words.shape)}, as the first is, got "
                f"{other.kind} for {other.ports}, {tuple(other.words.shape)}"
            )
    words = torch.stack([book.words for book in books.values()])
    source = {name: dict(book.source) for name, book in books.items()}
    return FeedbackCodebook(words, first.kind, first.ports, environments=tuple(books), source=source)


def _fit(
    training: CodebookTraining,
    interval: int,
    train: _Pairs,
    validation: _Pairs,
    run_dir: Path,
    fingerprint: dict[str, Any],
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[CodewordNetwork, dict[str, Any]]:
    """The network with the interval's best weights, in eval mode, and what the interval did."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        index, h = batch
        return cosine_loss(train.refined(model, index), h)

    trainer = Trainer(
        training.build(interval),
        training.stage(interval),
        lambda epoch: (train.index, train.h),
        loss,
        lambda model: -validation.refined_cosine(cast(CodewordNetwork, model)),
        accelerator=accelerator,
        run_dir=run_dir,
        fingerprint=fingerprint,
        on_step=on_step,
    )
    result = trainer.fit()
    log = {
        "train_cosine": train.cosine,
        "paired_validation": -result.best_validation,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
    }
    return cast(CodewordNetwork, accelerator.unwrap_model(trainer.model)), log


def _book(
    training: CodebookTraining,
    conventional: FeedbackCodebook,
    words: torch.Tensor,
    validation: float,
    history: list[dict[str, Any]],
    fingerprint: dict[str, Any],
) -> FeedbackCodebook:
    single = training.deployment == "single_side"
    return FeedbackCodebook(
        words,
        describe(training.network)["network"],
        conventional.ports,
        deployment="SS" if single else "DS",
        ue_digest=conventional.digest() if single else None,
        source={"validation": validation, "history": history, FINGERPRINT: fingerprint},
    )


def _read(path: Path, fingerprint: dict[str, Any]) -> EnhancedCodebook | None:
    if not path.exists():
        return None
    book = load_codebook(path)
    check_fingerprint(path, book.source, fingerprint)
    return EnhancedCodebook(book, book.source["validation"], book.source["history"])


def _check(training: CodebookTraining, conventional: FeedbackCodebook, data: CodebookData) -> None:
    network, ports = training.network, conventional.ports
    if conventional.deployment != "DS" or conventional.words.ndim != 2:
        raise ValueError(
            f"conventional: expected a codebook [K, D] of both ends, got {tuple(conventional.words.shape)} of "
            f"deployment {conventional.deployment}"
        )
    if (network.dimension, network.polarisations) != (len(ports), ports.polarisations):
        raise ValueError(
            f"conventional: expected a codebook for {network.dimension} ports of {network.polarisations} "
            f"polarisation(s), as the network is, got {ports}"
        )
    for name in ("train", "validation"):
        h = getattr(data, name)
        if h.dtype != torch.complex64 or h.ndim != 2 or h.shape[1] != network.dimension or not len(h):
            raise ValueError(
                f"{name}: expected complex64 [n, {network.dimension}], not empty, got {h.dtype} {tuple(h.shape)}"
            )
