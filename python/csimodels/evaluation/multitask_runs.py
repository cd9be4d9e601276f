"""Runs for the experiments of the multi-task network: one task per network or classical method, and its test rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from csikernels import NF4LoRALinear
from csimodels.channels.transmission import add_noise, draw_uplink
from csimodels.evaluation.detection import lmmse
from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.multitask_scores import detection_scores
from csimodels.evaluation.precoding import mmse, structured_precoder, wmmse, zf
from csimodels.evaluation.task_rows import Row
from csimodels.files import json_digest
from csimodels.models.linear_predictor import HoldConfig, HoldPredictor, LinearConfig, LinearPredictor
from csimodels.models.multitask import TASKS
from csimodels.models.multitask_baselines import run_batched
from csimodels.training.loop import make_accelerator
from csimodels.training.multitask import LOG, MultiTaskTraining, train_multitask
from csimodels.training.multitask_data import NOISE_POWER, Drawing, TaskSamples, served

# Methods without a network -> their task.
CLASSICAL = {
    "hold": "predict",
    "linear": "predict",
    "zf": "precode",
    "mmse": "precode",
    "wmmse": "precode",
    "lmmse": "detect",
}
_SEED = 7  # of the test noise, the same for all methods
_UNSET = dict.fromkeys(
    ("set", "speed_kmh", "snr_db", "users", "power_dbw", "channel_snr_db", "nmse", "ser", "rate", "power", "error")
)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What all methods are scored at.

    Attributes:
        speeds_kmh, snrs_db: of prediction (Figs. 5 and 6); every pair of them.
        other_set: further set of prediction, without training on it (Fig. 13).
        detection_snrs_db: Figs. 9 and 10; each number of users has its share of the test channels.
        powers_dbw: P_max of Fig. 7 with ``few_users``. users: K of Fig. 8 at 0 dBW. few_users: K elsewhere.
        channel_snrs_db: of the channels that precoders are made from (Fig. 12), with ``few_users`` at 0 dBW.
    """

    speeds_kmh: tuple[float, ...]
    snrs_db: tuple[float, ...]
    other_set: str
    detection_snrs_db: tuple[float, ...]
    powers_dbw: tuple[float, ...]
    users: tuple[int, ...]
    channel_snrs_db: tuple[float, ...]
    few_users: int = 4


@dataclasses.dataclass(frozen=True)
class MultiTaskRun:
    """A network, trained unless its checkpoint is there, or a classical method; and what it is scored at.

    Attributes:
        label: of the method. training: of a network, else None. method: a name in :data:`CLASSICAL`, else None.
        samples: of training (also what classical predictors are fitted to) and test. drawing: of noise and symbols.
        conditions: of the test.
        folder: of checkpoints and channels.
    """

    label: str
    samples: TaskSamples
    drawing: Drawing
    conditions: Conditions
    folder: str
    training: MultiTaskTraining | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if (self.training is None) == (self.method is None):
            raise ValueError(f"training, method: expected one of them, got {self.training} and {self.method!r}")
        if self.method is not None and self.method not in CLASSICAL:
            raise ValueError(f"method: expected one of {', '.join(CLASSICAL)}, got {self.method!r}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it does."""
        return (CLASSICAL[self.method],) if self.training is None else self.training.tasks  # type: ignore[index]

    def run_dir(self) -> Path:
        """Folder of the checkpoint; the same for every run that trains the same network on the same channels."""
        if self.training is None:
            raise ValueError(f"run_dir: expected a network, {self.method} has no checkpoint")
        name = self.training.model if len(self.tasks) > 1 else f"{self.training.model}-{self.tasks[0]}"
        return Path(self.folder) / "multitask" / f"{name}-{json_digest(self.training.described())[:12]}"

    def key(self) -> str:
        """Identifies the outcome: everything that determines it but the folder."""
        made_of = self.method if self.training is None else self.training.described()
        other = dataclasses.replace(self.samples, name=self.conditions.other_set)
        samples = [self.samples.described(), other.described()]
        return json_digest([self.label, made_of, samples, self.drawing, self.conditions, NOISE_POWER, _SEED])[:16]


def run_task(run: MultiTaskRun) -> list[Row]:
    """Train and score: one row per condition, and one per epoch with the validation losses."""
    channels = Path(run.folder) / "channels"
    network: nn.Module | None = None
    common: Row = {"label": run.label, "tasks": list(run.tasks), "train_samples": run.samples.train}
    rows: list[Row] = []
    if run.training is not None:
        accelerator = make_accelerator(run.training.train, cpu=not torch.cuda.is_available())
        network = train_multitask(run.training, run.run_dir(), channels, accelerator=accelerator)
        log = json.loads((run.run_dir() / LOG).read_text())
        common |= {"seconds": log["seconds"], **parameters(network)}
        for entry in log["history"]:
            losses = {task: entry[task] for task in run.tasks}
            rows.append({**common, **_UNSET, "condition": "epoch", "epoch": entry["epoch"], "losses": losses})
    else:
        common |= {"seconds": None, "trainable": 0, "total": 0}
    for task in run.tasks:
        for condition in _SCORE[task](run, network, channels):
            rows.append({**common, **_UNSET, "condition": task, **condition})
    return rows


def parameters(network: nn.Module) -> dict[str, int]:
    """``trainable`` and ``total`` numbers of parameters as Table II counts them: 4-bit weights as one each."""
    counts = [parameter.numel() for parameter in network.parameters()]
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    packed = sum(
        module.in_features * module.out_features for module in network.modules() if isinstance(module, NF4LoRALinear)
    )
    return {"trainable": trainable, "total": sum(counts) + packed}


@torch.inference_mode()
def _predict(run: MultiTaskRun, network: nn.Module | None, folder: Path) -> Iterator[Row]:
    """Errors and powers are kept apart, so that conditions can be pooled as eq. 11 does."""
    predictor = _predictor(run, folder) if network is None else network
    here, other = run.samples, dataclasses.replace(run.samples, name=run.conditions.other_set)
    for samples in (here, other):
        for speed in run.conditions.speeds_kmh:
            h = samples.prediction("test", folder, speed_kmh=speed)
            history, future = h[:, : run.drawing.history], h[:, run.drawing.history :]
            for snr in run.conditions.snrs_db:
                heard = add_noise(history, snr, _generator())
                if isinstance(predictor, LinearPredictor):
                    estimate = predictor(heard, 10 ** (-snr / 10))
                elif run.training is None:
                    estimate = predictor(heard)
                else:
                    estimate = run_batched(predictor, run.training.model, "predict", heard)
                error = (estimate - future).abs().double().square().sum().item()
                power = future.abs().double().square().sum().item()
                yield {
                    "set": samples.name,
                    "speed_kmh": speed,
                    "snr_db": snr,
                    "error": error,
                    "power": power,
                    "nmse": error / power,
                }


def _predictor(run: MultiTaskRun, folder: Path) -> nn.Module:
    h = run.samples.prediction("train", folder)
    histories, futures = h[:, : run.drawing.history], h[:, run.drawing.history :]
    sizes = histories.shape[1], futures.shape[1], h.shape[2]
    if run.method == "hold":
        return HoldPredictor(HoldConfig(*sizes))
    return LinearPredictor(LinearConfig(*sizes)).fit(histories, futures)


@torch.inference_mode()
def _detect(run: MultiTaskRun, network: nn.Module | None, folder: Path) -> Iterator[Row]:
    channels, order = run.samples.multiuser("test", folder), run.drawing.order
    group = torch.arange(len(channels)) % len(run.conditions.users)
    for snr in run.conditions.detection_snrs_db:
        generator = _generator()
        totals = {"nmse": 0.0, "ser": 0.0}
        for number, k in enumerate(run.conditions.users):
            h = served(channels[group == number], k)
            y, symbols, noise_power = draw_uplink(h, run.drawing.slots, order, snr, generator)
            if network is None or run.training is None:
                shared = h.unsqueeze(1), y, noise_power[:, None]
                scores = detection_scores(lmmse(*shared), symbols, order)
                # Decisions want the estimate without its shrinkage.
                scores["ser"] = detection_scores(lmmse(*shared, unbiased=True), symbols, order)["ser"]
            else:
                estimate = run_batched(network, run.training.model, "detect", h, y, noise_power)
                scores = detection_scores(estimate, symbols, order)
            for name, value in scores.items():
                totals[name] += value / len(run.conditions.users)
        yield {"snr_db": snr, **totals}


@torch.inference_mode()
def _precode(run: MultiTaskRun, network: nn.Module | None, folder: Path) -> Iterator[Row]:
    channels, conditions = run.samples.multiuser("test", folder), run.conditions
    cases: list[tuple[float, int, float | None]] = [
        (power, conditions.few_users, None) for power in conditions.powers_dbw
    ]
    cases += [(0.0, k, None) for k in conditions.users if (0.0, k, None) not in cases]
    cases += [(0.0, conditions.few_users, snr) for snr in conditions.channel_snrs_db]
    for power_dbw, k, channel_snr in cases:
        h, power = served(channels, k), 10 ** (power_dbw / 10)
        known = h if channel_snr is None else add_noise(h, channel_snr, _generator())
        rate = sum_rate(h, _precoder(run, network, known, power), NOISE_POWER).mean().item()
        yield {"power_dbw": power_dbw, "users": k, "channel_snr_db": channel_snr, "rate": rate}


def _precoder(run: MultiTaskRun, network: nn.Module | None, h: Tensor, power: float) -> Tensor:
    if run.method == "zf":
        return zf(h, power)
    if run.method == "mmse":
        return mmse(h, power, NOISE_POWER)
    if network is None or run.training is None:
        return wmmse(h, power, NOISE_POWER)
    lambdas, p = run_batched(network, run.training.model, "precode", h, torch.full((len(h),), power), NOISE_POWER)
    return structured_precoder(h, lambdas, p, NOISE_POWER)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


_SCORE = dict(zip(TASKS, (_predict, _detect, _precode), strict=True))


def pooled_db(rows: list[Row]) -> float:
    """NMSE in dB over several conditions together: the sum of their errors over the sum of their powers (eq. 11)."""
    return 10 * math.log10(sum(row["error"] for row in rows) / sum(row["power"] for row in rows))
