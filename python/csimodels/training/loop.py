"""The training loop shared by every model: accelerate for devices and processes, exact resume after a kill.

The run is a pure function of its configuration and data: batch order comes from ``(seed, epoch)``, the learning rate
from the step. The state is written every ``save_every`` steps under a temporary name and renamed, so a killed run
starts again from the last whole state and ends with the weights that an unbroken run would have had.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn

from csimodels.training.run_state import load_run_state, save_run_state
from csimodels.training.schedule import warmup_cosine

Batch = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to optimise.

    Attributes:
        epochs, batch_size: the batch is the global one, whatever the number of processes.
        learning_rate, final_learning_rate, warmup_fraction: of the cosine schedule; ``schedule="constant"`` keeps
            ``learning_rate`` throughout.
        weight_decay: of AdamW.
        patience: stop after this many epochs without a better validation value; None never stops.
        initial_candidate: whether the untrained weights count as epoch 0 when the best are chosen.
        seed: of the batch order.
        save_every: steps between state files.
        mixed_precision: "bf16", "no", or "auto" (bf16 where the device multiplies it natively).
    """

    epochs: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_fraction: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    patience: int | None = None
    initial_candidate: bool = False
    seed: int = 0
    save_every: int = 500
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule: expected 'cosine' or 'constant', got {self.schedule!r}")
        if self.mixed_precision not in ("auto", "bf16", "no"):
            raise ValueError(f"mixed_precision: expected 'auto', 'bf16' or 'no', got {self.mixed_precision!r}")
        for name in ("epochs", "batch_size", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number from 0, got {value}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction: expected 0 to 1, got {self.warmup_fraction}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a 0-based step of ``total``."""
        if self.schedule == "constant":
            return self.learning_rate
        return warmup_cosine(
            step,
            total,
            warmup_fraction=self.warmup_fraction,
            peak=self.learning_rate,
            final=self.final_learning_rate,
        )


def batch_order(config: TrainConfig, epoch: int, size: int) -> torch.Tensor:
    """The order in which an epoch walks through ``size`` samples, int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))


@dataclasses.dataclass
class TrainResult:
    """What a run did.

    ``history`` has one entry per epoch: ``epoch``, ``loss``, ``validation``, ``seconds``, and what ``validate`` tells.
    """

    best_validation: float
    best_epoch: int
    epochs: int
    steps: int
    history: list[dict[str, float]]
    seconds: float

    def log(self) -> dict[str, Any]:
        """All fields, JSON-serialisable, with seconds to a tenth."""
        return {**dataclasses.asdict(self), "seconds": round(self.seconds, 1)}


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are native on ``device`` (elsewhere they are emulated and slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def make_accelerator(config: TrainConfig, *, cpu: bool = False) -> Accelerator:
    """An ``Accelerator`` for ``config``; under ``accelerate launch`` or ``torchrun`` it joins the process group.

    Raises:
        RuntimeError: the launcher started several processes, but they could not be joined.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without this, accelerate leaves each of several processes on a machine without accelerators to itself.
    cpu = cpu or (launched > 1 and not torch.accelerator.is_available())
    precision = config.mixed_precision
    if precision == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        precision = "bf16" if supports_bf16(device) else "no"
    # accelerate keeps one precision per process, but an adaptation may follow a pre-training of another.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if accelerator.num_processes < launched:
        raise RuntimeError(
            f"WORLD_SIZE is {launched}, but {accelerator.num_processes} joined: create the accelerator before anything "
            "else uses accelerate, and on a CPU-only machine start the processes with torchrun"
        )
    return accelerator


@dataclasses.dataclass
class _State:
    epoch: int = 0  # the epoch under way
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_validation: float = float("inf")
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Trainer:
    """Fits ``model`` with AdamW.

    Args:
        model: the module; its ``state_dict`` is what is kept and restored.
        config: how to optimise.
        data: epoch -> tensors with a common first dimension (the same ones each time, or a fresh draw).
        loss: ``loss(model, batch)`` -> scalar mean over the batch. It must call ``model`` itself, not its parts, so
            that gradients are averaged over processes. Random draws in it are not repeated when a run resumes.
        validate: ``validate(model)`` -> finite float, smaller is better; called on every process after each epoch, and
            the main process's value decides. It may instead return that value and a dictionary of further floats for
            the history.
        run_dir: where the state lies, a folder that all processes see; None keeps nothing and cannot resume.
        fingerprint: JSON-serialisable description of the run. A state of another fingerprint is refused.
        groups: AdamW parameter groups, each with an optional ``lr_scale``; default: all parameters that are not frozen.
        on_step: called as ``on_step(step, total_steps, loss)`` on the main process.

    Raises:
        ValueError: a state in ``run_dir`` that is not whole or belongs to another run; a batch smaller than the number
            of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        data: Callable[[int], Batch],
        loss: Callable[[nn.Module, Batch], torch.Tensor],
        validate: Callable[[nn.Module], float | tuple[float, dict[str, float]]],
        *,
        accelerator: Accelerator,
        run_dir: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
        groups: list[dict[str, Any]] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ):
        self.config, self.data, self.loss, self.validate = config, data, loss, validate
        self.accelerator, self.run_dir, self.on_step = accelerator, run_dir, on_step
        if config.batch_size < accelerator.num_processes:
            raise ValueError(
                f"batch_size: expected at least one sample for each of {accelerator.num_processes} processes, "
                f"got {config.batch_size}"
            )
        # Through JSON, as in the state file, where tuples become lists.
        self.fingerprint = json.loads(json.dumps({"train": dataclasses.asdict(config), **(fingerprint or {})}))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [dict(group) for group in groups or [{"params": trainable}]]
        self._scales = [group.pop("lr_scale", 1.0) for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._module = accelerator.unwrap_model(self.model)
        self._best = {name: tensor.clone() for name, tensor in self._module.state_dict().items()}
        self._state = _State()
        self._resumed = self._restore()
        self._check_same_start()

    def fit(self) -> TrainResult:
        """Run to the end (or on from the last state) and leave the best weights in the model.

        Raises:
            ValueError: the data does not fill a batch, or its tensors differ in length.
            FloatingPointError: the training loss or the validation value became infinite or NaN.
            OSError: the state could not be written; the last one stays.
        """
        config, state = self.config, self._state
        if not self._resumed and config.initial_candidate:
            self._consider(epoch=0)
        while state.epoch < config.epochs and not self._out_of_patience():
            self._run_epoch()
        self._module.load_state_dict(self._best)
        self.model.eval()
        self.accelerator.free_memory()  # it keeps every model and optimiser that it prepared
        return TrainResult(
            state.best_validation, state.best_epoch, state.epoch, state.step, state.history, state.seconds
        )

    def _out_of_patience(self) -> bool:
        state, patience = self._state, self.config.patience
        return patience is not None and state.epoch - max(state.best_epoch, 0) >= patience

    def _run_epoch(self) -> None:
        state, config = self._state, self.config
        tensors = self.data(state.epoch)
        size = len(tensors[0])
        if any(len(tensor) != size for tensor in tensors):
            raise ValueError(f"data: expected tensors of one length, got {[len(tensor) for tensor in tensors]}")
        steps = size // config.batch_size
        if steps == 0:
            raise ValueError(f"data: expected at least one batch of {config.batch_size} samples, got {size}")
        order = batch_order(config, state.epoch, size)
        self.model.train()
        started = time.monotonic()
        while state.step_in_epoch < steps:
            begin = state.step_in_epoch * config.batch_size
            index = order[begin : begin + config.batch_size]
            state.loss_sum += self._step(tensors, index, total=steps * config.epochs)
            if state.step % config.save_every == 0:
                state.seconds += time.monotonic() - started
                started = time.monotonic()
                self._save()
        state.seconds += time.monotonic() - started
        state.epoch += 1
        validation, more = self._consider(epoch=state.epoch)
        state.history.append(
            {
                "epoch": state.epoch,
                "loss": state.loss_sum / steps,
                "validation": validation,
                "seconds": round(state.seconds, 3),
                **more,
            }
        )
        state.step_in_epoch, state.loss_sum = 0, 0.0
        self._save()

    def _step(self, tensors: Batch, index: torch.Tensor, total: int) -> float:
        state, accelerator = self._state, self.accelerator
        # Every process takes its share of the global batch; the mean of their gradients is the one-process gradient.
        share = index[accelerator.process_index :: accelerator.num_processes]
        batch = [tensor[share].to(accelerator.device) for tensor in tensors]
        rate = self.config.rate(state.step, total)
        for group, scale in zip(self.optimizer.param_groups, self._scales, strict=True):
            group["lr"] = rate * scale
        # accelerate autocasts the prepared model's forward; the loss around it stays in full precision.
        loss = self.loss(self.model, batch)
        if len(share) * accelerator.num_processes != len(index):
            # Shares of unequal size: the plain mean over processes would favour the samples of the smaller ones.
            loss = loss * (len(share) * accelerator.num_processes / len(index))
        accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(value):
            raise FloatingPointError(f"training loss became {value} at step {state.step}; lower the learning rate")
        state.step += 1
        state.step_in_epoch += 1
        if self.on_step is not None and accelerator.is_main_process:
            self.on_step(state.step, total, value)
        return value

    def _consider(self, epoch: int) -> tuple[float, dict[str, float]]:
        """Validate; keep the weights if they are the best so far."""
        self.model.eval()
        with torch.inference_mode():
            told = self.validate(self._module)
        value, more = told if isinstance(told, tuple) else (told, {})
        # One value for all: processes that rounded differently could part over when to stop and wait for ever.
        (value,) = broadcast_object_list([float(value)])
        if not math.isfinite(value):
            raise FloatingPointError(f"validation became {value} after epoch {epoch}; lower the learning rate")
        if value < self._state.best_validation:
            self._state.best_validation, self._state.best_epoch = value, epoch
            self._best = {name: tensor.clone() for name, tensor in self._module.state_dict().items()}
        return value, more

    def _save(self) -> None:
        if self.run_dir is None or not self.accelerator.is_main_process:
            return
        state = dataclasses.asdict(self._state)
        if state["best_epoch"] < 0:
            state["best_validation"] = None  # infinity is not JSON
        save_run_state(self.run_dir, self._module.state_dict(), self._best, self.optimizer, state, self.fingerprint)

    def _check_same_start(self) -> None:
        steps = self.accelerator.gather(torch.tensor([self._state.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"run_dir: expected a folder that all processes see, but the states that they found in {self.run_dir} "
                f"are of steps {steps}"
            )

    def _restore(self) -> bool:
        run = load_run_state(self.run_dir, self.fingerprint)
        if run is None:
            return False
        values = run.counters
        if values["best_validation"] is None:
            values["best_validation"] = float("inf")
        self._state = _State(**values)
        self._module.load_state_dict(run.model)
        self._best = run.best
        run.restore_optimizer(self.optimizer)
        return True
