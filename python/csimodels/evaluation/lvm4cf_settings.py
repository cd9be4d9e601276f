"""What the LVM4CF experiments run at, and what their reports share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from csimodels.evaluation.figures import Curve, line_drawing
from csimodels.evaluation.lvm4cf_runs import ChannelSet, CodebookTask, run_task
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean, run_tasks, select
from csimodels.training.lvm4cf_presets import LABELS, CodebookPreset, codebook_preset

COSINE = "cosine similarity"
SHORT = {"conventional": "", "single_side": ", SS", "dual_side": ", DS"}
_CLASSICAL_LABELS = {
    "rvq": "RVQ (conventional)",
    "dft": "DFT",
    "type1": "Type I",
    "shaped": "covariance-shaped RVQ",
    "k_lines": "k-lines",
    "cells": "cell eigenvectors",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an experiment runs at.

    Attributes:
        sizes: of networks, trainings and channels. costs: whose parameters are told: the paper's at either preset.
        folder: of codebooks and channels.
        run: tasks -> rows; see :func:`csimodels.evaluation.task_rows.run_tasks`.
        snrs_db: of the downlink (Fig. 9).
        repeats: of each timing.
    """

    sizes: CodebookPreset
    costs: CodebookPreset
    folder: Path
    run: Callable[[Sequence[CodebookTask]], list[Row]]
    snrs_db: tuple[float, ...]
    repeats: int = 20

    def site(self) -> ChannelSet:
        """SSLCF's channels: one BS."""
        return ChannelSet(self.sizes.site, *self.sizes.samples)

    def environment(self, name: str) -> ChannelSet:
        """MSLCF's channels: many BSs of one type."""
        return ChannelSet(name, *self.sizes.pooled_samples)

    def classical(self, method: str, bits: int, channels: ChannelSet, **more: Any) -> CodebookTask:
        """A codebook without a network; ``more`` are fields of :class:`CodebookTask`."""
        return self._task(_CLASSICAL_LABELS[method], method, bits, channels, **more)

    def network(self, name: str, deployment: str, bits: int, channels: ChannelSet, **more: Any) -> CodebookTask:
        """A codebook that a network enhances."""
        training = self.sizes.training(name, deployment)
        return self._task(LABELS[name], "network", bits, channels, training=training, **more)

    def methods(self, deployment: str, bits: int, channels: ChannelSet, **more: Any) -> list[CodebookTask]:
        """All methods of one deployment, the conventional codebooks first."""
        conventional = ["rvq", *(["dft"] if self._has_dft(bits) else []), *(["type1"] if self._is_type1(bits) else [])]
        fitted = ["cells"] if deployment == "single_side" else ["shaped"]
        if deployment == "dual_side" and 2**bits <= channels.train:  # k-lines starts from as many channels
            fitted.append("k_lines")
        tasks = [self.classical(method, bits, channels, **more) for method in (*conventional, *fitted)]
        return tasks + [self.network(name, deployment, bits, channels, **more) for name in self.sizes.networks]

    def _task(self, label: str, method: str, bits: int, channels: ChannelSet, **more: Any) -> CodebookTask:
        fields = {"test": channels, **more}
        return CodebookTask(label, method, bits, self.sizes.ports, channels, folder=str(self.folder), **fields)

    def _has_dft(self, bits: int) -> bool:
        return 2**bits >= 4 * self.sizes.ports.rows * self.sizes.ports.columns

    def _is_type1(self, bits: int) -> bool:
        """Type I has one size per array: 4 x 4 beams per port and polarisation, and 4 co-phases."""
        return 2**bits == 4 * 16 * self.sizes.ports.rows * self.sizes.ports.columns


def settings(context: Context) -> Settings:
    """The preset's settings; rows, codebooks and channels are kept in ``context.out``."""
    folder = context.out / "checkpoints"

    def run(tasks: Sequence[CodebookTask]) -> list[Row]:
        for channels in {channel for task in tasks for channel in (task.channels, task.test)}:
            channels.load(folder / "channels")  # here, so that processes do not draw them side by side
        return run_tasks(run_task, tasks, context.out, workers=context.workers, on_done=context.on_done)

    paper = context.preset == "paper"
    return Settings(
        codebook_preset(context.preset),
        costs=codebook_preset("paper"),
        folder=folder,
        run=run,
        snrs_db=(0, 5, 10, 15, 20, 25, 30) if paper else (0, 10, 20, 30),
    )


def names(rows: Iterable[Row]) -> list[str]:
    """Method and deployment of each row, in order, once."""
    return list(dict.fromkeys(name_of(row) for row in rows))


def name_of(row: Row) -> str:
    return row["label"] + SHORT[row["deployment"]]


def of_name(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of one method and deployment."""
    return [row for row in rows if name_of(row) == name]


def against_bits(rows: Sequence[Row]) -> dict[str, Curve]:
    """Cosine over B of each method, for those B that it has."""
    curves: dict[str, Curve] = {}
    for name in names(sorted(rows, key=lambda row: -row["bits"])):  # all methods have the largest B, in their order
        own = of_name(rows, name)
        bits = sorted({row["bits"] for row in own})
        curves[name] = (bits, [mean(own, "cosine", bits=value, condition="cosine") for value in bits])
    return curves


def bits_table(s: Settings, curves: dict[str, Curve]) -> str:
    """A table of methods against B; a dash where a method has no codebook of that size."""
    rows = []
    for name, (bits, values) in curves.items():
        found = dict(zip(bits, values, strict=True))
        rows.append([name, *(f"{found[value]:.3f}" if value in found else None for value in s.sizes.bits)])
    return markdown_table(["method", *(f"B = {value}" for value in s.sizes.bits)], rows)


def against_snr(s: Settings, rows: Sequence[Row]) -> dict[str, Curve]:
    """Sum rate over the SNR of each method."""
    return {
        name: (s.snrs_db, [mean(of_name(rows, name), "rate", condition="rate", snr_db=snr) for snr in s.snrs_db])
        for name in names(select(rows, condition="rate"))
    }


def drawing(s: Settings, name: str, panels: dict[str, dict[str, Curve]], x_label: str, title: str) -> Any:
    return line_drawing(name, panels, x_label, f"LVM4CF, {title} ({s.sizes.name} preset)")
