"""Adapt many small models at once: every environment and method is a slot of one bank, one step trains them all.

The slots do not interact. Each walks through its own samples, epochs and patience exactly as :meth:`Adapter.adapt`
would walk alone, and its losses are those of that run up to float32 rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import csikernels
from csikernels import SamBank, lasco_forward, lasco_squared_error
from csimodels.evaluation.metrics import nmse_db
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.lasco import Proxy, shift
from csimodels.training.adapt import AdaptConfig, Adapter, CachedSplit, MethodResult
from csimodels.training.loop import batch_order
from csimodels.training.run_state import load_run_state, save_run_state

_WITH_ALPHA = ("lasco", "e_lasco")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """One method in one environment; ``alpha`` as for :meth:`Adapter.score`."""

    adapter: Adapter
    method: str
    alpha: float | None = None


@dataclasses.dataclass
class _Progress:
    """Where one slot stands; ``epoch`` is the one under way."""

    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    best_validation: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)  # mean of each epoch


def can_adapt_together(adapter: Adapter) -> bool:
    """Whether :func:`adapt_together` is the faster way: on the CPU, in one process, with the compiled kernels.

    They compute in float32 in 0.4 to 0.6 of the time that bfloat16 autocast takes, one module after the other, on a CPU
    that multiplies bfloat16 natively; so ``mixed_precision="auto"`` means float32 here. ``"bf16"`` is not overruled.
    """
    accelerator = adapter.accelerator
    return (
        adapter.config.train.mixed_precision != "bf16"
        and accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and "cpp" in csikernels.backends()["lasco_training_forward"]["cpu"]
    )


def adapt_together(
    adaptations: Sequence[Adaptation],
    *,
    run_dir: Path | None = None,
    description: dict[str, Any] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[tuple[MethodResult, Proxy]]:
    """Train all proxies in one bank and score each on its test split.

    Environments may have different sample counts: each slot starts its next epoch when its own samples are used up,
    and leaves the batch when its patience or epochs end. A slot outside the batch has zero gradients, on which AdamW
    still moves its weights; its best ones are kept apart by then.

    Args:
        adaptations: what to adapt; all adapters with one configuration and reference SAM.
        run_dir: folder for the training state; a killed run goes on from it and ends with the same bits.
        description: with ``run_dir``, what identifies the data and the models (JSON-serialisable).
        on_step: progress callback ``(step, most steps possible, mean loss of the slots)``.

    Returns:
        The scores and the proxy with its best weights, in eval mode, for each adaptation. ``seconds`` is the slot's
        equal share of each step that it took part in.

    Raises:
        ValueError: nothing to adapt, adapters that differ in configuration or reference, an unknown method, ``run_dir``
            without ``description``, fewer training samples than a batch, or a state in ``run_dir`` that is not whole or
            belongs to another run.
        FloatingPointError: a training loss or a validation value became infinite or NaN.
    """
    if not adaptations:
        raise ValueError("adaptations: expected at least one, got none")
    if run_dir is not None and description is None:
        raise ValueError("description: expected one with run_dir, got None")
    trainer = _BankTrainer(adaptations, run_dir, description, on_step)
    trainer.fit()
    return [trainer.result(slot) for slot in range(len(adaptations))]


class _BankTrainer:
    """The counterpart of :class:`csimodels.training.loop.Trainer` for a bank."""

    def __init__(
        self,
        adaptations: Sequence[Adaptation],
        run_dir: Path | None,
        description: dict[str, Any] | None,
        on_step: Callable[[int, int, float], None] | None,
    ):
        self.adaptations, self.run_dir, self.on_step = adaptations, run_dir, on_step
        self.config = _common_config(adaptations)
        train = self.config.train
        self.proxies = [_new_proxy(item) for item in adaptations]
        self.splits = [_prepared(item) for item in adaptations]
        self.steps = [_steps(item) for item in adaptations]
        if train.schedule != "constant" and len(set(self.steps)) > 1:
            raise ValueError(
                f"schedule: expected 'constant' for environments of different sample counts, got {train.schedule!r}"
            )
        reference = adaptations[0].adapter.reference
        # Without a coefficient of its own a method is eq. 18 with alpha 1 and zeros for what it leaves out.
        alphas = [
            proxy.alpha.item() if item.method in _WITH_ALPHA else 1.0
            for item, proxy in zip(adaptations, self.proxies, strict=True)
        ]
        self.bank = SamBank.from_modules(reference, [proxy.sam for proxy in self.proxies], alphas, trainable=True)
        self.learns_alpha = torch.tensor([item.method == "e_lasco" for item in adaptations])
        self.bank.alpha.requires_grad_(bool(self.learns_alpha.any()))
        groups: list[dict[str, Any]] = [{"params": list(self.bank.proxies.parameters())}]
        if self.bank.alpha.requires_grad:
            groups.append({"params": [self.bank.alpha], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
        self.step = 0
        self.progress = [_Progress() for _ in adaptations]
        self.best = {name: tensor.clone() for name, tensor in self._trained().items()}
        self.fingerprint = json.loads(
            json.dumps(
                {
                    "adapt": dataclasses.asdict(self.config),
                    "slots": [[dataclasses.asdict(proxy.config)] for proxy in self.proxies],
                    "data": description,
                }
            )
        )
        self.resumed = self._restore()

    def fit(self) -> None:
        """Run to the end, or on from the last state, and leave the best weights in the bank."""
        if not self.resumed and self.config.train.initial_candidate:
            self._validate(range(len(self.adaptations)))
        orders: dict[int, tuple[int, torch.Tensor]] = {}  # slot -> epoch, its order of samples
        while active := [slot for slot, steps in enumerate(self.steps) if self._goes_on(slot)]:
            started = time.monotonic()
            for slot in active:
                epoch = self.progress[slot].epoch
                if orders.get(slot, (None,))[0] != epoch:
                    size = len(self.splits[slot]["train"].h_in)
                    orders[slot] = epoch, batch_order(self.config.train, epoch, size)
            self._train_step(active, orders)
            ended = [slot for slot in active if self.progress[slot].step_in_epoch == self.steps[slot]]
            for slot in ended:
                own = self.progress[slot]
                own.losses.append(own.loss_sum / self.steps[slot])
                own.epoch, own.step_in_epoch, own.loss_sum = own.epoch + 1, 0, 0.0
            self._validate(ended)
            for slot in active:
                self.progress[slot].seconds += (time.monotonic() - started) / len(active)
            # The slots of one size end their epochs together; saving at the end of every epoch would write a bank of
            # many sizes far too often.
            if self.step % self.config.train.save_every == 0 or self.step % max(self.steps) == 0:
                self._save()
        self._save()
        with torch.no_grad():
            for name, tensor in self._trained().items():
                tensor.copy_(self.best[name])

    def result(self, slot: int) -> tuple[MethodResult, Proxy]:
        """Scores and proxy of a slot, after :meth:`fit`."""
        adaptation, proxy, own = self.adaptations[slot], self.proxies[slot], self.progress[slot]
        self.bank.export(slot, proxy.sam)
        if adaptation.method in _WITH_ALPHA:
            with torch.no_grad():
                proxy.alpha.copy_(self.bank.alpha[slot])
        estimate = torch.cat([part for _, part in self._predict([slot], "test")])
        scores = adaptation.adapter.score_estimate(estimate)
        scores.epochs, scores.best_epoch, scores.seconds = own.epoch, own.best_epoch, own.seconds
        if adaptation.method in _WITH_ALPHA:
            scores.alpha = proxy.alpha.item()
        return scores, proxy.eval()

    def _goes_on(self, slot: int) -> bool:
        own, train = self.progress[slot], self.config.train
        patient = train.patience is None or own.epoch - max(own.best_epoch, 0) < train.patience
        return own.epoch < train.epochs and patient

    def _train_step(self, active: list[int], orders: dict[int, tuple[int, torch.Tensor]]) -> None:
        train, parts = self.config.train, []
        for slot in active:
            begin = self.progress[slot].step_in_epoch * train.batch_size
            index = orders[slot][1][begin : begin + train.batch_size]
            parts.append([tensor[index] for tensor in self.splits[slot]["train"].tensors()])
        h_in, target, base, reference = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        slots = torch.tensor(active).repeat_interleave(train.batch_size)
        self.optimizer.zero_grad()
        losses = self._squared_errors(h_in, base, reference, slots, target)[active] / (target.numel() // len(active))
        losses.sum().backward()
        if self.bank.alpha.grad is not None:
            self.bank.alpha.grad.mul_(self.learns_alpha)  # no gradient, no decay: AdamW leaves these as they are
        # Slots of different length take a constant rate, so any slot tells the schedule.
        rate = train.rate(self.step, self.steps[active[0]] * train.epochs)
        scales = (1.0, self.config.alpha_learning_rate / train.learning_rate)
        for group, scale in zip(self.optimizer.param_groups, scales, strict=False):
            group["lr"] = rate * scale
        self.optimizer.step()
        values = losses.tolist()
        for slot, value in zip(active, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"training loss of adaptation {slot} ({self.adaptations[slot].method}) became {value} at step "
                    f"{self.step}; lower the learning rate"
                )
            self.progress[slot].loss_sum += value
            self.progress[slot].step_in_epoch += 1
        self.step += 1
        if self.on_step is not None:
            self.on_step(self.step, max(self.steps) * train.epochs, sum(values) / len(values))

    def _estimate(
        self, h_in: torch.Tensor, base: torch.Tensor, reference: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        if self.config.form == "collaborate":
            return lasco_forward(h_in, base, self.bank, slots, reference_output=reference)
        # The bank gives proxy + alpha * 0, and eq. 17 is formed around it. Methods without a reference have alpha 1.
        nothing = torch.zeros_like(h_in)
        proxy = lasco_forward(h_in, nothing, self.bank, slots, reference_output=nothing)
        return shift(base, proxy, reference, self.bank.alpha[slots].view(-1, 1, 1))

    def _squared_errors(
        self, h_in: torch.Tensor, base: torch.Tensor, reference: torch.Tensor, slots: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Of every slot in the bank, summed over its samples."""
        if self.config.form == "collaborate":
            return lasco_squared_error(h_in, base, self.bank, slots, target, reference_output=reference)
        # A norm per sample takes fewer passes over the batch than its squares would.
        norms = torch.linalg.vector_norm((self._estimate(h_in, base, reference, slots) - target).flatten(1), dim=1)
        return norms.new_zeros(self.bank.slots).index_add(0, slots, norms.square())

    def _predict(self, slots: Sequence[int], split: str, samples: int = 1024) -> Iterator[tuple[int, torch.Tensor]]:
        """Estimates of the samples of each slot, piece by piece."""
        for slot in slots:
            own = self.splits[slot][split]
            for h_in, base, reference in zip(
                own.h_in.split(samples), own.base.split(samples), own.reference.split(samples), strict=True
            ):
                with torch.no_grad():
                    yield slot, self._estimate(h_in, base, reference, torch.full((len(h_in),), slot))

    def _validate(self, slots: Sequence[int]) -> None:
        """Validate; keep the weights of the slots that are the best so far."""
        for slot in slots:
            own, adapter = self.progress[slot], self.adaptations[slot].adapter
            estimate = torch.cat([part for _, part in self._predict([slot], "validation")])
            target = self.splits[slot]["validation"].target
            value = nmse_db(adapter.codec.to_channel(target), adapter.codec.to_channel(estimate)).item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"validation of adaptation {slot} ({self.adaptations[slot].method}) became {value} after epoch "
                    f"{own.epoch}; lower the learning rate"
                )
            if value < own.best_validation:
                own.best_validation, own.best_epoch = value, own.epoch
                for name, tensor in self._trained().items():
                    self.best[name][slot] = tensor[slot]

    def _trained(self) -> dict[str, torch.Tensor]:
        """What the optimiser moves, by name, without gradients."""
        named = {"alpha": self.bank.alpha, **dict(self.bank.proxies.named_parameters())}
        return {name: tensor.detach() for name, tensor in named.items()}

    def _save(self) -> None:
        if self.run_dir is None:
            return
        progress = [dataclasses.asdict(own) for own in self.progress]
        for own in progress:
            own["best_validation"] = own["best_validation"] if own["best_epoch"] >= 0 else None  # JSON has no infinity
        counters = {"step": self.step, "slots": progress}
        save_run_state(self.run_dir, self._trained(), self.best, self.optimizer, counters, self.fingerprint)

    def _restore(self) -> bool:
        run = load_run_state(self.run_dir, self.fingerprint)
        if run is None:
            return False
        state = run.counters
        self.step = state["step"]
        for own in state["slots"]:
            own["best_validation"] = math.inf if own["best_validation"] is None else own["best_validation"]
        self.progress = [_Progress(**own) for own in state["slots"]]
        with torch.no_grad():
            for name, tensor in self._trained().items():
                tensor.copy_(run.model[name])
                self.best[name].copy_(run.best[name])
        run.restore_optimizer(self.optimizer)
        return True


def _common_config(adaptations: Sequence[Adaptation]) -> AdaptConfig:
    first = adaptations[0].adapter
    for item in adaptations:
        if item.adapter.config != first.config:
            raise ValueError(f"adaptations: expected one configuration, got {first.config} and {item.adapter.config}")
        if item.adapter.reference is not first.reference:
            raise ValueError("adaptations: expected adapters with the same reference SAM")
    return first.config


def _new_proxy(item: Adaptation) -> Proxy:
    adapter = item.adapter
    return Proxy(adapter.proxy_config(item.method, item.alpha), adapter.reference, seed=adapter.config.train.seed)


def _prepared(item: Adaptation) -> dict[str, CachedSplit]:
    """The splits with base and reference as the form wants them: zeros where the method leaves one out."""
    return {name: _without_unused(item, item.adapter.cached(name)) for name in ("train", "validation", "test")}


def _without_unused(item: Adaptation, split: CachedSplit) -> CachedSplit:
    nothing = torch.zeros_like(split.base)
    if item.method == "finetuned_sam":
        return dataclasses.replace(split, base=nothing, reference=nothing)
    if item.method not in _WITH_ALPHA:
        return dataclasses.replace(split, reference=nothing)
    if item.adapter.config.form == "shift":
        return dataclasses.replace(split, reference=_through_bank(item.adapter.reference, split.h_in))
    return split


@torch.no_grad()
def _through_bank(reference: ChannelTransformer, h_in: torch.Tensor) -> torch.Tensor:
    """The reference's output as a slot of the bank computes it.

    Eq. 17 starts with a proxy equal to the reference, so alpha's first gradient is 0. AdamW would make a full step of
    any rounding error in it.
    """
    bank, parts = SamBank.from_modules(reference, [reference], 0.0), []
    for part in h_in.split(1024):
        nothing, slot = torch.zeros_like(part), torch.zeros(len(part), dtype=torch.int64)
        parts.append(lasco_forward(part, nothing, bank, slot, reference_output=nothing))
    return torch.cat(parts)


def _steps(item: Adaptation) -> int:
    size, batch = len(item.adapter.data.train), item.adapter.config.train.batch_size
    if size < batch:
        raise ValueError(f"train: expected at least one batch of {batch} samples, got {size}")
    return size // batch
