"""What the LLMCsiNet experiments run at, and what their reports share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csimodels.channels.angle_delay_sets import angle_delay_preset
from csimodels.evaluation.figures import Curve, line_drawing
from csimodels.evaluation.llmcsinet_runs import FeedbackTask, run_task
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean, run_tasks
from csimodels.models.baselines import LABELS
from csimodels.training.llmcsinet import FeedbackTraining
from csimodels.training.llmcsinet_presets import Channels, FeedbackPreset, feedback_preset

NMSE = "NMSE (dB)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an experiment runs at.

    Attributes:
        sizes: of networks, trainings and channels.
        baselines: names, those of Fig. 5. few: those of the other figures.
        classical: names of methods without training that are shown beside both.
        folder: of checkpoints and channels.
        run: tasks -> rows; see :func:`csimodels.evaluation.task_rows.run_tasks`.
        snrs_db: of noisy CSI (Fig. 7). rate_snrs_db: of the downlink (Fig. 12).
        costs: the networks whose parameters, operations and latency are told: the paper's sizes at either preset.
        repeats: of each latency measurement.
    """

    sizes: FeedbackPreset
    baselines: tuple[str, ...]
    few: tuple[str, ...]
    classical: tuple[str, ...]
    folder: Path
    run: Callable[[Sequence[FeedbackTask]], list[Row]]
    snrs_db: tuple[float, ...]
    rate_snrs_db: tuple[float, ...]
    costs: FeedbackPreset
    repeats: int = 20

    @property
    def outdoor(self) -> str:
        """The set of most figures."""
        return self.sizes.channels[0]

    @property
    def largest(self) -> str:
        """The variant of most figures."""
        return self.sizes.variants[-1]

    @property
    def easiest(self) -> int:
        """1/sigma of the figures that use one only."""
        return self.sizes.compressions[0]

    def task(
        self, label: str, training: FeedbackTraining, channels: str | Channels, compression: int, **more: Any
    ) -> FeedbackTask:
        """One task; ``more`` are fields of :class:`FeedbackTask`."""
        chosen = self.sizes.channel_set(channels) if isinstance(channels, str) else channels
        return FeedbackTask(label, training, chosen, compression, str(self.folder), **more)

    def variant(
        self, name: str, channels: str | Channels, compression: int, *, label: str = "", **more: Any
    ) -> FeedbackTask:
        """LLMCsiNet-S, -M or -L; ``changes`` (in ``more``) go to its configuration."""
        channel_name = channels if isinstance(channels, str) else channels.name
        training = self.sizes.llmcsinet(name, compression, channel_name, **more.pop("changes", {}))
        return self.task(label or f"LLMCsiNet-{name}", training, channels, compression, **more)

    def baseline(self, name: str, channels: str | Channels, compression: int, **more: Any) -> FeedbackTask:
        """A network to compare with."""
        return self.task(LABELS[name], self.sizes.baseline(name, compression), channels, compression, **more)

    def all_methods(self, channels: str | Channels, compression: int, **more: Any) -> list[FeedbackTask]:
        """The classical methods, and every network of Fig. 5."""
        tasks = [self.baseline(name, channels, compression, **more) for name in (*self.classical, *self.baselines)]
        tasks += [self.variant(name, channels, compression, **more) for name in self.sizes.variants]
        return [*tasks, self.by_image(channels, compression, **more)] if self.sizes.variants else tasks

    def by_image(self, channels: str | Channels, compression: int, **more: Any) -> FeedbackTask:
        """The largest LLMCsiNet, feeding back the largest elements of its image as IdasNet does.

        The paper's text can be read so too; its name for the elements is those of highest self-information.
        """
        label = f"LLMCsiNet-{self.largest}, largest of image"
        return self.variant(self.largest, channels, compression, label=label, changes={"selection": "image"}, **more)

    def few_methods(self, channels: str | Channels, compression: int, **more: Any) -> list[FeedbackTask]:
        """The classical methods, the two baselines of the later figures, and the largest LLMCsiNet."""
        tasks = [self.baseline(name, channels, compression, **more) for name in (*self.classical, *self.few)]
        return [*tasks, self.variant(self.largest, channels, compression, **more)]


def settings(context: Context) -> Settings:
    """The preset's settings; rows, checkpoints and channels are kept in ``context.out``.

    Without channels in ``context``, they are the preset's; those whose extra is not installed are left out.
    """
    sizes = feedback_preset(context.preset)
    sizes = sizes.with_channels(
        context.channels or [name for name in sizes.channels if angle_delay_preset(name).unavailable() is None]
    )
    folder = context.out / "checkpoints"

    def run(tasks: Sequence[FeedbackTask]) -> list[Row]:
        for channels in {channel for task in tasks for channel in (task.channels, *task.tests)}:
            channels.load(folder / "channels")  # here, so that processes do not draw them side by side
        return run_tasks(run_task, tasks, context.out, workers=context.workers, on_done=context.on_done)

    paper = context.preset == "paper"
    return Settings(
        sizes,
        baselines=("crnet", "idasnet", "transindecnet", "gcrnet"),
        few=("crnet", "idasnet"),
        classical=("largest", "pca"),
        folder=folder,
        run=run,
        snrs_db=(0, 5, 10, 15, 20, 25, 30) if paper else (0, 10, 20, 30),
        rate_snrs_db=(0, 5, 10, 15, 20, 25, 30) if paper else (0, 10, 20, 30),
        costs=feedback_preset("paper"),
    )


def ratio(compression: int) -> str:
    return f"1/{compression}"


def drawing(s: Settings, name: str, panels: dict[str, dict[str, Curve]], x_label: str, title: str, **more: Any) -> Any:
    return line_drawing(name, panels, x_label, f"LLMCsiNet, {title} ({s.sizes.name} preset)", **more)


def labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in rows))


def by_channels(s: Settings, rows: Sequence[Row], name: str, **match: Any) -> str:
    """A table of methods against sets and compressions."""
    columns = [(channels, compression) for channels in s.sizes.channels for compression in s.sizes.compressions]
    table = [
        [
            label,
            *(
                f"{mean(rows, name, label=label, channels=channels, compression=compression, **match):.3f}"
                for channels, compression in columns
            ),
        ]
        for label in labels(rows)
    ]
    header = ["method", *(f"{channels}, {ratio(compression)}" for channels, compression in columns)]
    return markdown_table(header, table)


def main_rows(s: Settings) -> list[Row]:
    return s.run(
        [
            task
            for channels in s.sizes.channels
            for compression in s.sizes.compressions
            for task in s.all_methods(channels, compression)
        ]
    )
