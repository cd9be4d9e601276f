"""What the experiments of the multi-task network run at, and what their reports share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from csimodels.evaluation.figures import Curve, line_drawing
from csimodels.evaluation.multitask_runs import CLASSICAL, Conditions, MultiTaskRun, pooled_db, run_task
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, run_tasks, select
from csimodels.models.multitask import TASKS
from csimodels.models.multitask_baselines import LABELS, TASK_OF
from csimodels.training.multitask import MultiTaskTraining
from csimodels.training.multitask_presets import MultiTaskPreset, multitask_preset

MULTI, SINGLE = "multi-task LLM", "single-task LLM"
_CLASSICAL_LABELS = {
    "hold": "last slot",
    "linear": "linear MMSE predictor",
    "zf": "ZF",
    "mmse": "MMSE",
    "wmmse": "WMMSE",
    "lmmse": "LMMSE",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an experiment runs at.

    Attributes:
        sizes: of networks, trainings and channels.
        costs: whose parameters and memory are told: the paper's at either preset.
        conditions: of the tests.
        folder: of checkpoints and channels.
        run: runs -> rows; see :func:`csimodels.evaluation.task_rows.run_tasks`.
        repeats: of each timing.
    """

    sizes: MultiTaskPreset
    costs: MultiTaskPreset
    conditions: Conditions
    folder: Path
    run: Callable[[Sequence[MultiTaskRun]], list[Row]]
    repeats: int = 10

    def trained(self, label: str, training: MultiTaskTraining) -> MultiTaskRun:
        """A network's run."""
        return self._of(label, training.samples, training=training)

    def classical(self, method: str, share: float = 1.0) -> MultiTaskRun:
        """A method without a network; predictors are fitted to ``share`` of the training channels."""
        samples = self.sizes.samples.fraction(share)
        return self._of(_CLASSICAL_LABELS[method], samples, method=method)

    def multi(self, label: str = MULTI, **changes: Any) -> MultiTaskRun:
        """The network of all tasks; ``changes`` as in :meth:`MultiTaskPreset.multitask`."""
        return self.trained(label, self.sizes.multitask(**changes))

    def methods(self, task: str, share: float = 1.0) -> list[MultiTaskRun]:
        """All methods of one task: without a network, baselines, single-task and multi-task network."""
        classical = [self.classical(name, share) for name, of in CLASSICAL.items() if of == task]
        baselines = [name for name, of in TASK_OF.items() if of == task]
        networks = [self.trained(LABELS[name], self.sizes.baseline(name, share=share)) for name in baselines]
        single = self.multi(SINGLE, tasks=(task,), share=share)
        return [*classical, *networks, single, self.multi(share=share)]

    def _of(self, label: str, samples: Any, **more: Any) -> MultiTaskRun:
        return MultiTaskRun(label, samples, self.sizes.drawing, self.conditions, str(self.folder), **more)


def settings(context: Context) -> Settings:
    """The preset's settings; rows, checkpoints and channels are kept in ``context.out``.

    Raises:
        ValueError: ``context`` names channels, which these experiments do not take.
    """
    if context.channels:
        raise ValueError("channels: expected none for the multi-task experiments, whose channels are the preset's")
    folder, sizes = context.out / "checkpoints", multitask_preset(context.preset)
    conditions = _conditions(context.preset == "paper")

    def run(tasks: Sequence[MultiTaskRun]) -> list[Row]:
        # Drawn here, lest processes draw them side by side.
        kept, needed = folder / "channels", {name for task in tasks for name in task.tasks}
        for samples in dict.fromkeys(task.samples for task in tasks):
            for split in ("train", "validation"):
                if "predict" in needed:
                    samples.prediction(split, kept)
                if needed != {"predict"}:
                    samples.multiuser(split, kept)
        if needed != {"predict"}:
            sizes.samples.multiuser("test", kept)
        for name in (sizes.samples.name, conditions.other_set) if "predict" in needed else ():
            test = dataclasses.replace(sizes.samples, name=name)
            for speed in conditions.speeds_kmh:
                test.prediction("test", kept, speed_kmh=speed)
        return run_tasks(run_task, tasks, context.out, workers=context.workers, on_done=context.on_done)

    return Settings(sizes, multitask_preset("paper"), conditions, folder, run)


def _conditions(paper: bool) -> Conditions:
    """Those of the figures; at ``laptop`` every other or third one."""
    return Conditions(
        speeds_kmh=tuple(range(10, 101, 10)) if paper else (10, 40, 70, 100),
        snrs_db=tuple(range(0, 31, 5)) if paper else (0, 10, 20, 30),
        other_set="umi_nlos",
        detection_snrs_db=tuple(range(0, 21, 2)) if paper else (0, 4, 8, 12, 16, 20),
        powers_dbw=(-10, -5, 0, 5, 10),
        users=(4, 5, 6, 7, 8),
        channel_snrs_db=tuple(range(0, 31, 5)) if paper else (0, 10, 20, 30),
    )


def labels(rows: Iterable[Row]) -> list[str]:
    """Labels in order, once each."""
    return list(dict.fromkeys(row["label"] for row in rows))


def curves(rows: Sequence[Row], x: str, value: Callable[[list[Row]], float], **match: Any) -> dict[str, Curve]:
    """``value`` of the rows of each label at each ``x``, among those that ``match``."""
    chosen = select(rows, **match)
    places = sorted({row[x] for row in chosen})
    return {
        label: (places, [value(select(chosen, label=label, **{x: place})) for place in places])
        for label in labels(chosen)
    }


def curve_table(found: dict[str, Curve], header: Callable[[float], str], form: str) -> str:
    """One line per label, one column per place."""
    places = next(iter(found.values()))[0]
    rows = [[label, *(format(value, form) for value in values)] for label, (_, values) in found.items()]
    return markdown_table(["method", *map(header, places)], rows)


def sizes_line(rows: Iterable[Row]) -> str:
    """What the networks' trainable parameters are, for below a table."""
    found = {row["label"]: row["trainable"] for row in rows}
    told = ", ".join(f"{label} {count / 1e6:.2f} M" for label, count in found.items() if count)
    return f"\nTrainable parameters: {told}.\n"


def scores(s: Settings, rows: Sequence[Row], label: str) -> dict[str, float | None]:
    """What Tables I and II say of a method: NMSE of prediction in dB over all speeds and SNRs, NMSE of detection over
    all SNRs, sum rate of few users at 0 dBW. None for a task that it does not do."""
    own = [row for row in rows if row["label"] == label]
    predicted = [row for row in own if row["condition"] == "predict" and row["set"] == s.sizes.samples.name]
    detected = [row for row in own if row["condition"] == "detect"]
    rate = [row["rate"] for row in own if _is_table_rate(s, row)]
    return {
        "predict": pooled_db(predicted) if predicted else None,
        "detect": sum(row["nmse"] for row in detected) / len(detected) if detected else None,
        "precode": rate[0] if rate else None,
    }


def _is_table_rate(s: Settings, row: Row) -> bool:
    wanted = (0, s.conditions.few_users, None)
    return row["condition"] == "precode" and (row["power_dbw"], row["users"], row["channel_snr_db"]) == wanted


SCORE_HEADER = ("NMSE of prediction (dB)", "NMSE of detection", "sum rate (bit/s/Hz)")


def score_cells(s: Settings, rows: Sequence[Row], label: str) -> list[str | None]:
    """:func:`scores` as cells."""
    found = scores(s, rows, label)
    forms = dict(zip(TASKS, (".2f", ".4f", ".2f"), strict=True))
    return [None if found[task] is None else format(found[task], forms[task]) for task in TASKS]


def drawing(s: Settings, name: str, panels: dict[str, dict[str, Curve]], x_label: str, title: str) -> Any:
    return line_drawing(name, panels, x_label, f"Multi-task PHY, {title} ({s.sizes.name} preset)")
