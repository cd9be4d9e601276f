"""What every experiment takes and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csimodels.evaluation.task_rows import Row


def _nothing(*arguments: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how an experiment runs.

    Attributes:
        preset: ``laptop`` or ``paper``.
        out: folder of rows, checkpoints and figures, shared by all experiments.
        workers: processes; default one per core.
        channels: sets in place of the preset's, each ``NAME`` or ``NAME=PATH``; for the experiments that take some.
        on_start: called with a description before something long begins.
        on_step: progress of one training, ``(step, total_steps, loss)``.
        on_done: progress over tasks, ``(finished, total, task)``.
    """

    preset: str
    out: Path
    workers: int | None = None
    channels: tuple[str, ...] = ()
    on_start: Callable[[str], None] = _nothing
    on_step: Callable[[int, int, float], None] = _nothing
    on_done: Callable[[int, int, Any], None] = _nothing


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``rows``, the ``report`` (Markdown) and ``draw(folder)``, which writes the figure and returns its path.

    A table has no figure: ``draw`` is None.
    """

    rows: list[Row]
    report: str
    draw: Callable[[Path], Path] | None
