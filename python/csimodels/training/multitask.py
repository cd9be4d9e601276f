"""Training of the multi-task network (eqs. 36 to 40), and of the networks that do one of its tasks.

Source: Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section IV-C. A training is one
run of the common :class:`csimodels.training.loop.Trainer`, with one schedule; in its first epochs precoding is
supervised by WMMSE (eq. 38), then unsupervised (eq. 37).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from csimodels.channels.transmission import add_noise, draw_uplink
from csimodels.evaluation.detection import qam_modulate
from csimodels.evaluation.multitask_scores import precoding_rate
from csimodels.evaluation.precoding import wmmse_parameters
from csimodels.files import write_json
from csimodels.models.detnet import layer_loss
from csimodels.models.multitask import LOSS_WEIGHTS, TASKS
from csimodels.models.multitask_baselines import (
    MULTITASK,
    NAMES,
    TASK_OF,
    build_network,
    run_network,
    training_estimates,
)
from csimodels.options import replace_given
from csimodels.training.loop import Batch, TrainConfig, Trainer
from csimodels.training.multitask_data import DRAW, NOISE_POWER, Drawing, TaskSamples, seeded, served
from csimodels.training.multitask_file import Adaptation, load_multitask, save_multitask
from csimodels.training.network_file import FINGERPRINT, check_fingerprint
from csimodels.training.run_state import STATE

WEIGHTS, LOG = "model.safetensors", "log.json"
_TENSORS = dict(zip(TASKS, (3, 4, 4), strict=True))  # that DRAW gives for each task
_VALIDATION_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class MultiTaskTraining:
    """One network to train.

    Attributes:
        model: ``"multitask"`` or a name in :data:`csimodels.models.multitask_baselines.NAMES`.
        config: of that model.
        tasks: that it is trained for; those of the configuration.
        train: how to optimise, ``epochs`` in all. No weight decay makes the common AdamW Adam; the paper names neither.
        samples: of channels.
        drawing: of noise, symbols and users.
        adaptation: of the backbone of the multi-task network; None trains all of its weights.
        supervised_epochs: of ``train.epochs``, those in which precoding follows WMMSE. The paper does not say how many.
        seed: of the weights.
    """

    model: str
    config: Any
    tasks: tuple[str, ...]
    train: TrainConfig
    samples: TaskSamples
    drawing: Drawing
    adaptation: Adaptation | None = None
    supervised_epochs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model != MULTITASK and self.model not in NAMES:
            raise ValueError(f"model: expected one of {MULTITASK}, {', '.join(NAMES)}, got {self.model!r}")
        able = self.config.tasks if self.model == MULTITASK else (TASK_OF[self.model],)
        if not self.tasks or any(task not in able for task in self.tasks):
            raise ValueError(f"tasks: expected some of {', '.join(able)} for {self.model}, got {self.tasks}")
        if self.adaptation is not None and self.model != MULTITASK:
            raise ValueError(f"adaptation: expected None for {self.model}, got {self.adaptation}")
        if not 0 <= self.supervised_epochs < self.train.epochs:
            raise ValueError(
                f"supervised_epochs: expected 0 to below the {self.train.epochs} epochs, got {self.supervised_epochs}"
            )
        if self.model == MULTITASK:
            for name in ("history", "slots", "min_users", "max_users", "order"):
                if getattr(self.config, name) != getattr(self.drawing, name):
                    raise ValueError(
                        f"drawing: expected {name} {getattr(self.config, name)}, as the configuration has, got "
                        f"{getattr(self.drawing, name)}"
                    )
        if self.supervised_epochs and "precode" not in self.tasks:
            raise ValueError(f"supervised_epochs: expected 0 without precoding, got {self.supervised_epochs}")

    def optimised(self, **changes: Any) -> MultiTaskTraining:
        """With other fields of :class:`TrainConfig`, those that are not None; precoding keeps its supervised share."""
        train = replace_given(self.train, **changes)
        supervised = min(round(self.supervised_epochs * train.epochs / self.train.epochs), train.epochs - 1)
        return dataclasses.replace(self, train=train, supervised_epochs=supervised)

    def described(self) -> dict[str, Any]:
        """All fields and constants that a training depends on, JSON-serialisable."""
        constants = {"loss_weights": LOSS_WEIGHTS, "noise_power": NOISE_POWER}
        return {**dataclasses.asdict(self), "samples": self.samples.described(), **constants}

    def build(self) -> nn.Module:
        """The untrained network, adapted; its drawn weights are a function of ``seed``."""
        torch.manual_seed(self.seed)
        network = build_network(self.model, self.config)
        return network if self.adaptation is None else self.adaptation.apply(network)


def train_multitask(
    training: MultiTaskTraining,
    run_dir: Path,
    channels: Path,
    *,
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train one network; writes ``model.safetensors`` (best weights) and ``log.json`` to ``run_dir``.

    The best weights are those with the smallest weighted loss (eq. 36, precoding unsupervised) on validation channels
    with noise that is the same in every epoch. A run that was killed continues from its last state when called again
    with the same arguments; a finished one is read from its file.

    Args:
        training: which network, and how.
        run_dir: output folder.
        channels: folder in which channels are kept.
        accelerator: see :func:`csimodels.training.loop.make_accelerator`.
        on_step: progress callback ``(step, total_steps, loss)``.

    Returns:
        The network in eval mode.

    Raises:
        ValueError: a file or state in ``run_dir`` of another run; what :class:`Trainer` or the network refuses.
        FloatingPointError: a loss or a validation value became infinite or NaN.
    """
    fingerprint = json.loads(json.dumps({"training": training.described()}))
    path = run_dir / WEIGHTS
    if path.exists():
        network, metadata = load_multitask(path)
        check_fingerprint(path, metadata, fingerprint)
        return network
    trainer = _trainer(training, channels, run_dir / "run", fingerprint, accelerator, on_step)
    result = trainer.fit()
    network = cast(_Joint, accelerator.unwrap_model(trainer.model)).network.cpu().eval()
    if accelerator.is_main_process:
        # The model comes last: where it is, all is.
        write_json(run_dir / LOG, {**fingerprint, **result.log()})
        extra = {"tasks": training.tasks, "order": training.drawing.order, FINGERPRINT: fingerprint}
        save_multitask(path, network, training.model, training.config, training.adaptation, extra=extra)
        (run_dir / "run" / STATE).unlink(missing_ok=True)  # several times the weights, and of no more use
    accelerator.wait_for_everyone()
    return network


class _Joint(nn.Module):
    """All tasks in one forward, so that several processes average their gradients once."""

    def __init__(self, network: nn.Module, model: str):
        super().__init__()
        self.network, self.model = network, model

    def forward(self, inputs: Mapping[str, tuple]) -> dict[str, Any]:
        run = training_estimates if self.training else run_network
        return {task: run(self.network, self.model, task, *given) for task, given in inputs.items()}


def _load(training: MultiTaskTraining, split: str, folder: Path) -> dict[str, Tensor]:
    """Channels of each task; detection and precoding share theirs."""
    channels: dict[str, Tensor] = {}
    if "predict" in training.tasks:
        channels["predict"] = training.samples.prediction(split, folder)
    together = [task for task in training.tasks if task != "predict"]
    if together:
        channels |= dict.fromkeys(together, training.samples.multiuser(split, folder))
    return channels


def _trainer(
    training: MultiTaskTraining,
    folder: Path,
    run_dir: Path,
    fingerprint: dict[str, Any],
    accelerator: Accelerator,
    on_step: Callable[[int, int, float], None] | None,
) -> Trainer:
    drawing, tasks, train = training.drawing, training.tasks, training.train
    channels, held_out = (_load(training, split, folder) for split in ("train", "validation"))

    def epoch_data(epoch: int) -> Batch:
        seed = train.seed * 1_000_003 + epoch
        drawn = {task: DRAW[task](channels[task], drawing, _generator(seed, task)) for task in tasks}
        if epoch < training.supervised_epochs:
            *others, supervised = drawn["precode"]
            drawn["precode"] = (*others, torch.ones_like(supervised))
        return [tensor for task in tasks for tensor in drawn[task]]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        remaining = iter(batch)
        drawn = {task: tuple(next(remaining) for _ in range(_TENSORS[task])) for task in tasks}
        losses = task_losses(model, drawn, drawing)
        return sum((LOSS_WEIGHTS[task] * value for task, value in losses.items()), start=torch.zeros(()))

    validation = {task: DRAW[task](held_out[task], drawing, _generator(_VALIDATION_SEED, task)) for task in tasks}

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        values = validation_losses(model, validation, drawing, accelerator.device)
        return sum(LOSS_WEIGHTS[task] * value for task, value in values.items()), values

    return Trainer(
        _Joint(training.build(), training.model),
        train,
        epoch_data,
        loss,
        validate,
        accelerator=accelerator,
        run_dir=run_dir,
        fingerprint=fingerprint,
        on_step=on_step,
    )


def _generator(seed: int, task: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * len(TASKS) + TASKS.index(task))


def task_losses(model: nn.Module, drawn: Mapping[str, tuple[Tensor, ...]], drawing: Drawing) -> dict[str, Tensor]:
    """Each task's loss, not weighted: eq. 40, eq. 39, and eq. 37 or, where WMMSE supervises, eq. 38.

    In eq. 38 powers are taken relative to P_max (decided: P_max differs between samples).

    Args:
        model: maps ``{task: inputs}`` to ``{task: estimate}``; an estimate with a leading axis of layers is trained by
            :func:`csimodels.models.detnet.layer_loss`.
        drawn: of :data:`csimodels.training.multitask_data.DRAW`, per task.
        drawing: that it was drawn with.
    """
    inputs: dict[str, tuple] = {}
    truth: dict[str, Any] = {}
    if "predict" in drawn:
        h, snr_db, seeds = drawn["predict"]
        inputs["predict"] = (add_noise(h[:, : drawing.history], snr_db, seeded(seeds)),)
        truth["predict"] = h[:, drawing.history :]
    if "detect" in drawn:
        h, snr_db, users, seeds = drawn["detect"]
        h = served(h, int(users[0]))
        y, symbols, noise_power = draw_uplink(h, drawing.slots, drawing.order, snr_db, seeded(seeds))
        inputs["detect"], truth["detect"] = (h, y, noise_power), qam_modulate(symbols, drawing.order)
    if "precode" in drawn:
        h, power, users, supervised = drawn["precode"]
        h = served(h, int(users[0]))
        inputs["precode"], truth["precode"] = (h, power, NOISE_POWER), (h, power, bool(supervised[0]))
    outputs = model(inputs)
    losses = {task: _squared_error(outputs[task], truth[task]) for task in ("predict", "detect") if task in drawn}
    if "precode" in drawn:
        lambdas, p = outputs["precode"]
        h, power, by_wmmse = truth["precode"]
        losses["precode"] = _precoding_loss(lambdas, p, h, power, supervised=by_wmmse)
    return losses


def _squared_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Mean over real and imaginary parts."""
    if estimate.dim() > truth.dim():
        return layer_loss(estimate, truth)
    return torch.view_as_real(estimate - truth).square().mean()


def _precoding_loss(lambdas: Tensor, p: Tensor, h: Tensor, power: Tensor, *, supervised: bool) -> Tensor:
    if not supervised:
        return -precoding_rate(h, lambdas, p, NOISE_POWER)
    with torch.no_grad():
        wanted_lambdas, wanted_p = wmmse_parameters(h, power, NOISE_POWER)
    errors = torch.cat([lambdas - wanted_lambdas, p - wanted_p], dim=1) / power[:, None]
    return errors.square().mean()


@torch.no_grad()
def validation_losses(
    model: nn.Module, drawn: Mapping[str, tuple[Tensor, ...]], drawing: Drawing, device: torch.device, batch: int = 256
) -> dict[str, float]:
    """:func:`task_losses` of all samples, unsupervised. Each sample has its own number of users."""
    values = {}
    for task, tensors in drawn.items():
        total = 0.0
        size = len(tensors[0])
        groups = [torch.arange(size)]
        if task != "predict":
            groups = [(tensors[2] == users).nonzero()[:, 0] for users in tensors[2].unique()]
        for index in (part for group in groups for part in group.split(batch)):
            given = {task: tuple(tensor[index].to(device) for tensor in tensors)}
            total += task_losses(model, given, drawing)[task].item() * len(index)
        values[task] = total / size
    return values
