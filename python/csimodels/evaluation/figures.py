"""Figures of the experiments (PNG, no display needed). One function per kind of figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from csimodels.files import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curve = tuple[Sequence[float], Sequence[float]]
# Eight colours that stay apart for colour-blind readers (Okabe and Ito), with a marker each for print.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#000000", "#999999")
_MARKERS = "osv^DPX*"


def _save(figure: plt.Figure, path: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def line_figure(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    x_label: str,
    title: str,
    *,
    steps: bool = False,
    unscaled: str | None = None,
    ticks: Sequence[str] | None = None,
) -> None:
    """One panel per quantity, one line per label: ``panels[y_label][label] = (x, y)``.

    ``steps`` draws a CDF. The curve labelled ``unscaled`` does not stretch the axis; its values are noted if they lie
    beyond. ``ticks`` names the places 0, 1, ... on the x axis. Panels with the same labels share a legend.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels) + 0.6, 4.6), squeeze=False)
    for axis, (y_label, curves) in zip(axes[0], panels.items(), strict=True):
        for index, (label, (x, y)) in enumerate(curves.items()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            style = "-" if index < len(_COLOURS) else "--"  # the ninth line has the first one's colour and marker
            if steps:
                axis.step(x, y, style, where="post", color=colour, label=label)
                continue
            axis.plot(x, y, style, color=colour, marker=marker, markersize=5, label=label)
            rest = [value for name, (_, values) in curves.items() if name != unscaled for value in values]
            if label == unscaled and rest:
                low, high = _limits(rest)
                axis.set_ylim(low, high)
                if not all(low <= value <= high for value in y):
                    values = ", ".join(f"{value:.3g}" for value in y)
                    axis.text(0.02, 0.02, f"off scale: {label} {values}", transform=axis.transAxes, fontsize=7)
        if ticks is not None:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    drawn = [axis.get_legend_handles_labels() for axis in axes[0]]
    if all(labels == drawn[0][1] for _, labels in drawn):
        columns = min(2 + len(panels), len(drawn[0][1]))
        rows = -(-len(drawn[0][1]) // columns)
        figure.legend(*drawn[0], loc="lower center", ncols=columns, fontsize=7)
        _save(figure, path, bottom=0.02 + 0.055 * rows)
    else:
        for axis in axes[0]:
            axis.legend(fontsize=8)
        _save(figure, path)


def line_drawing(
    name: str, panels: Mapping[str, Mapping[str, Curve]], x_label: str, title: str, **more: Any
) -> Callable[[Path], Path]:
    """``draw`` of an :class:`csimodels.evaluation.outcome.Outcome`: :func:`line_figure` as ``name``.png in a folder."""

    def draw(folder: Path) -> Path:
        path = folder / f"{name}.png"
        line_figure(path, panels, x_label, title, **more)
        return path

    return draw


def _limits(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.12 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def bar_figure(
    path: Path, groups: Mapping[str, Mapping[str, float]], y_label: str, title: str, *, unscaled: str | None = None
) -> None:
    """Grouped bars from 0 down: ``groups[label][group] = value``, one colour per label.

    The bars labelled ``unscaled`` do not stretch the axis; those that are cut off carry their value.
    """
    names = list(next(iter(groups.values())))
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(names), 4.4))
    width = 0.85 / len(groups)
    floor = 1.15 * min(value for label, values in groups.items() if label != unscaled for value in values.values())
    axis.set_ylim(floor, 0)
    for index, (label, values) in enumerate(groups.items()):
        positions = [place - 0.425 + width * (index + 0.5) for place in range(len(names))]
        heights = [values[name] for name in names]
        axis.bar(positions, heights, width, label=label, color=_COLOURS[index % len(_COLOURS)])
        if label == unscaled:
            for position, height in zip(positions, heights, strict=True):
                if height < floor:
                    place = (position - width / 2, floor)
                    axis.annotate(f"{height:.0f}", place, ha="right", va="bottom", rotation=90, fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel(y_label)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title(title)
    _save(figure, path)


def heat_maps(path: Path, images: Mapping[str, torch.Tensor], title: str) -> None:
    """``|H|`` side by side on one colour scale; each image complex ``[antenna, subcarrier]``."""
    magnitudes = {label: image.abs().cpu().numpy() for label, image in images.items()}
    top = max(float(magnitude.max()) for magnitude in magnitudes.values())
    figure, axes = plt.subplots(
        1, len(images), figsize=(3.1 * len(images) + 0.8, 3.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (label, magnitude) in zip(axes[0], magnitudes.items(), strict=True):
        drawn = axis.imshow(magnitude, aspect="auto", origin="lower", vmin=0, vmax=top, cmap="viridis")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("subcarrier")
    axes[0][0].set_ylabel("antenna")
    figure.suptitle(title)
    figure.colorbar(drawn, ax=axes[0].tolist(), label="|H|")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
