"""Adaptation runs for the LASCO experiments: one task per environment, spread over processes, finished rows kept.

A task adapts several methods in one environment with shared inputs and base outputs. Its rows are appended to
``rows.jsonl`` as soon as it ends, so an experiment that is killed goes on with the tasks that are missing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.files import digest, write_text
from csimodels.models.lasco import ADAPTED_METHODS
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData, MethodResult
from csimodels.training.adapt_together import Adaptation, adapt_together, can_adapt_together
from csimodels.training.checkpoint import freeze, load_checkpoint
from csimodels.training.loop import make_accelerator

Row = dict[str, Any]


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


def _worker_setup() -> None:
    # The models are small: one thread each and one process per core beats all cores on one model.
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group: the parent reports it, workers go without a traceback each.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker waits on a pipe whose other end it holds as well, so it would outlive a parent that is killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_tasks(
    tasks: Sequence[AdaptTask],
    out: Path,
    *,
    workers: int | None = None,
    on_done: Callable[[int, int, AdaptTask], None] | None = None,
) -> list[Row]:
    """Run all tasks, those already in ``out/rows.jsonl`` excepted, and return all rows in the tasks' order.

    Args:
        tasks: what to run.
        out: folder of the row file.
        workers: processes; default one per core.
        on_done: progress callback ``(finished, total, task)``.

    Raises:
        ValueError: ``rows.jsonl`` is damaged, or what a task raises; the rows of finished tasks are kept.
    """
    path = out / "rows.jsonl"
    finished = _read_rows(path)
    keys = [task.key() for task in tasks]
    missing = [(key, task) for key, task in zip(keys, tasks, strict=True) if key not in finished]
    count = len(tasks) - len(missing)
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(missing)))
    # Spawned, not forked: a fork would inherit the OpenMP pool's locks without its threads.
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_worker_setup
    ) as pool:
        futures = {pool.submit(run_task, task): (key, task) for key, task in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                key, task = futures[future]
                finished[key] = future.result()
                _write_rows(path, finished)
                count += 1
                if on_done is not None:
                    on_done(count, len(tasks), task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the error need not wait for tasks that nobody reads
            raise
    return [row for key in keys for row in finished[key]]


def _write_rows(path: Path, finished: dict[str, list[Row]]) -> None:
    # What another experiment in this folder has finished meanwhile stays.
    kept = _read_rows(path) | finished
    write_text(path, "".join(json.dumps({"key": key, "rows": rows}) + "\n" for key, rows in kept.items()))


def _read_rows(path: Path) -> dict[str, list[Row]]:
    if not path.exists():
        return {}
    finished = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            finished[record["key"]] = record["rows"]
        except (ValueError, KeyError, TypeError) as error:  # ValueError: neither JSON nor text
            raise ValueError(f"{path}, line {number}: not a row record ({error}); remove it to start anew") from None
    return finished


def select(rows: Iterable[Row], **match: Any) -> list[Row]:
    """The rows whose fields equal ``match``.

    Raises:
        ValueError: no row matches.
    """
    chosen = [row for row in rows if all(row[name] == wanted for name, wanted in match.items())]
    if not chosen:
        raise ValueError(f"rows: expected at least one with {match}, got none")
    return chosen


def mean(rows: Iterable[Row], value: str, **match: Any) -> float:
    """Mean of ``value`` over the rows that :func:`select` picks (dB values are averaged in dB)."""
    chosen = select(rows, **match)
    return sum(row[value] for row in chosen) / len(chosen)


def pooled_nmse_db(rows: Iterable[Row]) -> float:
    """NMSE in dB of all rows' test samples together: mean of ratios, whereas :func:`mean` averages dB values.

    The rows must have equally many test samples. Hard environments weigh more here, easy ones more in the mean of dB.
    """
    ratios = [10 ** (row["nmse_db"] / 10) for row in rows]
    return 10 * math.log10(sum(ratios) / len(ratios))
