"""Runs of an experiment: tasks spread over processes, finished rows kept.

A task's rows are appended to ``rows.jsonl`` as soon as it ends, so an experiment that is killed goes on with the tasks
that are missing, and experiments that have tasks in common run them once.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from csimodels.files import write_text

Row = dict[str, Any]


class Task(Protocol):
    """What can be run: anything that tells all that determines its outcome."""

    def key(self) -> str:
        """Identifies the task's outcome."""


AnyTask = TypeVar("AnyTask", bound=Task)


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
    run: Callable[[AnyTask], list[Row]],
    tasks: Sequence[AnyTask],
    out: Path,
    *,
    workers: int | None = None,
    on_done: Callable[[int, int, AnyTask], None] | None = None,
) -> list[Row]:
    """Run all tasks, those already in ``out/rows.jsonl`` excepted, and return all rows in the tasks' order.

    Args:
        run: task -> its rows; importable from a module, since it runs in processes of its own.
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
        futures = {pool.submit(run, task): (key, task) for key, task in missing}
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
