"""Adaptation runs for the LASCO experiments: one task per environment.

A task adapts several methods in one environment with shared inputs and base outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from csimodels.channels.environment import CellConfig, Environment
from csimodels.evaluation import task_rows
from csimodels.evaluation.task_rows import Row
from csimodels.files import digest
from csimodels.models.lasco import ADAPTED_METHODS
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData, MethodResult
from csimodels.training.adapt_together import Adaptation, adapt_together, can_adapt_together
from csimodels.training.checkpoint import freeze, load_checkpoint
from csimodels.training.loop import make_accelerator


@dataclasses.dataclass(frozen=True)
class AdaptTask:
    """All runs in one environment with one pair of checkpoints.

    Attributes:
        base, reference: checkpoint files.
        environment: index in the cell of ``cell_seed``.
        patches: of the cell's configuration.
        train, validation, test: sample counts.
        adapt: how to adapt.
        runs: ``(method, alpha)`` pairs; alpha None takes the configured one.
        tag: copied into every row (a SAM's size, say).
    """

    base: str
    reference: str
    environment: int
    adapt: AdaptConfig
    runs: tuple[tuple[str, float | None], ...]
    train: int = 1000
    validation: int = 125
    test: int = 1000
    cell_seed: int = 0
    patches: int = 1
    tag: str = ""

    def key(self) -> str:
        """Identifies the task's outcome: everything that determines it, the checkpoints by content."""
        fields = dataclasses.asdict(self)
        for name in ("base", "reference"):
            fields[name] = digest(fields[name])
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def run_task(task: AdaptTask) -> list[Row]:
    """Adapt and score every run of ``task``; one row each, with the environment's and the codec's description."""
    base, codec_config, _ = load_checkpoint(task.base)
    reference, _, _ = load_checkpoint(task.reference, codec=codec_config)
    cell = CellConfig(patches=task.patches)
    environment = Environment(cell, task.environment, task.cell_seed)
    h = environment.sample(task.train + task.validation + task.test)
    adapter = Adapter(
        freeze(base),
        freeze(reference),
        RandomProjectionCodec(codec_config),
        EnvironmentData.split(h, task.train, task.validation, task.test),
        task.adapt,
        accelerator=make_accelerator(task.adapt.train),
    )
    results = _results(adapter, task.runs)
    rows = []
    for (method, alpha), result in zip(task.runs, results, strict=True):
        rows.append(
            {
                "method": method,
                "initial": task.adapt.initial,
                "environment": task.environment,
                "los": environment.los,
                "patches": task.patches,
                "codeword_length": codec_config.codeword_length,
                "train_samples": task.train,
                "tag": task.tag,
                "set_alpha": alpha,
                "cache_seconds": adapter.cache_seconds,
                **dataclasses.asdict(result),
            }
        )
    return rows


def _results(adapter: Adapter, runs: Sequence[tuple[str, float | None]]) -> list[MethodResult]:
    """Scores of the runs, those that train adapted together where that is faster."""
    trained = [(method, alpha) for method, alpha in runs if method in ADAPTED_METHODS]
    together: dict[tuple[str, float | None], MethodResult] = {}
    if trained and can_adapt_together(adapter):
        adapted = adapt_together([Adaptation(adapter, method, alpha) for method, alpha in trained])
        together = {run: result for run, (result, _) in zip(trained, adapted, strict=True)}
    return [together.get(run) or adapter.score(run[0], alpha=run[1]) for run in runs]


def run_tasks(
    tasks: Sequence[AdaptTask],
    out: Path,
    *,
    workers: int | None = None,
    on_done: Callable[[int, int, AdaptTask], None] | None = None,
) -> list[Row]:
    """:func:`csimodels.evaluation.task_rows.run_tasks` of :func:`run_task`."""
    return task_rows.run_tasks(run_task, tasks, out, workers=workers, on_done=on_done)


def pooled_nmse_db(rows: Iterable[Row]) -> float:
    """NMSE in dB of all rows' test samples together: mean of ratios, whereas :func:`mean` averages dB values.

    The rows must have equally many test samples. Hard environments weigh more here, easy ones more in the mean of dB.
    """
    ratios = [10 ** (row["nmse_db"] / 10) for row in rows]
    return 10 * math.log10(sum(ratios) / len(ratios))
