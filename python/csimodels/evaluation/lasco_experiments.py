"""The experiments of LASCO, section IV: Figs. 6 to 10, and one beyond the paper on how rich an environment is.

Each experiment is a function of a :class:`Settings` that returns an :class:`Outcome`: rows, a Markdown report and
figures. All share one row file, so runs that two figures have in common happen once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csimodels.channels.presets import data_preset
from csimodels.evaluation.figures import Curve, line_figure
from csimodels.evaluation.lasco_runs import AdaptTask, pooled_nmse_db, run_tasks
from csimodels.evaluation.outcome import Outcome
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean, select
from csimodels.models.lasco import ADAPTED_METHODS, LABELS, METHODS
from csimodels.training.adapt import AdaptConfig

SAM_SIZES = ((1, 32), (2, 64), (4, 64))
_ALPHAS_PAPER = tuple(round(0.1 * step, 1) for step in range(1, 21))
_LMMSE_START = (("pretrained_lam", None), ("finetuned_sam", None), ("e_lasco", None))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an experiment runs at.

    Attributes:
        preset: ``laptop`` or ``paper``.
        environments: indices in the cell, disjoint from those of pre-training and validation.
        codeword_lengths: ascending. train, validation, test: samples per environment.
        sample_counts: of Fig. 8. alphas: of Fig. 7. adapt: how to adapt.
        checkpoint: ``(model, codeword_length, sam_layers, sam_width)`` -> checkpoint file.
        run: tasks -> rows; see :func:`csimodels.evaluation.lasco_runs.run_tasks`.
    """

    preset: str
    environments: Sequence[int]
    codeword_lengths: Sequence[int]
    train: int
    validation: int
    test: int
    sample_counts: Sequence[int]
    alphas: Sequence[float]
    adapt: AdaptConfig
    checkpoint: Callable[[str, int, int, int], str]
    run: Callable[[Sequence[AdaptTask]], list[Row]]

    @property
    def longest(self) -> int:
        """The codeword length of the figures that use one only."""
        return self.codeword_lengths[-1]

    def tasks(self, codeword_length: int, runs: Sequence[tuple[str, float | None]], **changes: Any) -> list[AdaptTask]:
        """One task per environment; ``changes`` to :class:`AdaptTask`, with ``sam`` = (layers, width) for the SAM."""
        layers, width = changes.pop("sam", (2, 64))
        task = AdaptTask(
            base=self.checkpoint("base", codeword_length, 2, 64),
            reference=self.checkpoint("reference", codeword_length, layers, width),
            environment=0,
            adapt=self.adapt,
            runs=tuple(runs),
            train=self.train,
            validation=self.validation,
            test=self.test,
        )
        return [dataclasses.replace(task, environment=index, **changes) for index in self.environments]


def settings(
    preset: str,
    checkpoint: Callable[[str, int, int, int], str],
    out: Path,
    *,
    workers: int | None = None,
    on_done: Callable[[int, int, AdaptTask], None] | None = None,
) -> Settings:
    """The preset's settings; rows are kept in ``out``."""

    def run(tasks: Sequence[AdaptTask]) -> list[Row]:
        return run_tasks(tasks, out, workers=workers, on_done=on_done)

    data = data_preset(preset)
    train, validation, test = data.adaptation_samples
    paper = preset == "paper"
    return Settings(
        preset,
        environments=data.adaptation,
        codeword_lengths=(100, 110, 120, 130, 140, 150) if paper else (128, 192, 256),
        train=train,
        validation=validation,
        test=test,
        sample_counts=(1000, 2000, 4000, 6000, 8000) if paper else (250, 500, 1000, 2000),
        alphas=_ALPHAS_PAPER if paper else (0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 1.6, 2.0),
        adapt=AdaptConfig.paper() if paper else AdaptConfig.laptop(),
        checkpoint=checkpoint,
        run=run,
    )


def _all_methods() -> tuple[tuple[str, float | None], ...]:
    return tuple((method, None) for method in METHODS)


def _method_rows(s: Settings) -> list[Row]:
    """Every method at every codeword length: what Figs. 6 and 9 are drawn from."""
    return s.run([task for m in s.codeword_lengths for task in s.tasks(m, _all_methods())])


def fig6(s: Settings) -> Outcome:
    """NMSE and GCS of all methods against the codeword length."""
    rows = _method_rows(s)
    start = s.run(s.tasks(s.longest, _LMMSE_START, adapt=dataclasses.replace(s.adapt, initial="lmmse")))
    panels: dict[str, dict[str, Curve]] = {"NMSE (dB)": {}, "GCS": {}}
    table = []
    for method in METHODS:
        for y_label, name in (("NMSE (dB)", "nmse_db"), ("GCS", "gcs")):
            values = [mean(rows, name, method=method, codeword_length=m) for m in s.codeword_lengths]
            panels[y_label][LABELS[method]] = (s.codeword_lengths, values)
        table.append([LABELS[method], *(_scores(rows, method=method, codeword_length=m) for m in s.codeword_lengths)])
    for method, _ in _LMMSE_START:
        dashes = ["-"] * (len(s.codeword_lengths) - 1)
        table.append([f"{LABELS[method]}, LMMSE start", *dashes, _scores(start, method=method)])
    report = "NMSE (dB), mean over environments (pooled over all samples) / GCS:\n\n"
    report += markdown_table(["method", *(f"M = {m}" for m in s.codeword_lengths)], table)
    report += f"\nPer environment at M = {s.longest}, NMSE (dB):\n\n" + _per_environment(s, rows)

    def draw(folder: Path) -> Path:
        title = f"LASCO, Fig. 6 ({s.preset} preset)"
        line_figure(folder / "lasco-fig6.png", panels, "codeword length M", title, unscaled=LABELS["lmmse"])
        return folder / "lasco-fig6.png"

    return Outcome(rows + start, report, draw)


def _scores(rows: Sequence[Row], **match: Any) -> str:
    chosen = select(rows, **match)
    return f"{mean(chosen, 'nmse_db'):.2f} ({pooled_nmse_db(chosen):.2f}) / {mean(chosen, 'gcs'):.3f}"


def _per_environment(s: Settings, rows: Sequence[Row]) -> str:
    header = ["method"]
    for index in s.environments:
        los = next(row["los"] for row in rows if row["environment"] == index)
        header.append(f"{index} ({'LOS' if los else 'NLOS'})")
    table = [
        [
            LABELS[method],
            *(
                mean(rows, "nmse_db", method=method, environment=index, codeword_length=s.longest)
                for index in s.environments
            ),
        ]
        for method in METHODS
    ]
    alphas = [
        mean(rows, "alpha", method="e_lasco", environment=index, codeword_length=s.longest) for index in s.environments
    ]
    return markdown_table(header, [*table, ["alpha learned by E-LASCO", *alphas]])


def fig7(s: Settings) -> Outcome:
    """LASCO's NMSE against its fixed alpha, on average and per environment."""
    rows = s.run(s.tasks(s.longest, tuple(("lasco", alpha) for alpha in s.alphas)))
    per = {
        f"environment {index}": [mean(rows, "nmse_db", environment=index, set_alpha=alpha) for alpha in s.alphas]
        for index in s.environments
    }
    average = [mean(rows, "nmse_db", set_alpha=alpha) for alpha in s.alphas]
    table = [["mean", *average, s.alphas[average.index(min(average))]]]
    table += [[name, *values, s.alphas[values.index(min(values))]] for name, values in per.items()]
    report = "NMSE (dB) of LASCO per fixed alpha, and the best alpha:\n\n"
    report += markdown_table(["", *(f"{alpha:g}" for alpha in s.alphas), "best"], table)
    panels: dict[str, dict[str, Curve]] = {
        "mean NMSE (dB)": {"LASCO": (s.alphas, average)},
        "NMSE (dB)": {name: (s.alphas, values) for name, values in per.items()},
    }

    def draw(folder: Path) -> Path:
        line_figure(folder / "lasco-fig7.png", panels, "alpha", f"LASCO, Fig. 7 ({s.preset} preset, M = {s.longest})")
        return folder / "lasco-fig7.png"

    return Outcome(rows, report, draw)


def fig8(s: Settings) -> Outcome:
    """NMSE against the number of adaptation samples."""
    rows = s.run(
        [
            task
            for count in s.sample_counts
            for task in s.tasks(s.longest, _all_methods(), train=count, validation=max(1, count // 8))
        ]
    )
    curves: dict[str, Curve] = {}
    table = []
    for method in METHODS:
        values = [mean(rows, "nmse_db", method=method, train_samples=count) for count in s.sample_counts]
        curves[LABELS[method]] = (s.sample_counts, values)
        table.append([LABELS[method], *values])
    report = "NMSE (dB), mean over environments, per number of training samples:\n\n"
    report += markdown_table(["method", *(str(count) for count in s.sample_counts)], table)

    def draw(folder: Path) -> Path:
        line_figure(
            folder / "lasco-fig8.png",
            {"NMSE (dB)": curves},
            "training samples",
            f"LASCO, Fig. 8 ({s.preset} preset, M = {s.longest})",
            unscaled=LABELS["lmmse"],
        )
        return folder / "lasco-fig8.png"

    return Outcome(rows, report, draw)


def fig9(s: Settings) -> Outcome:
    """LASCO against its variant without a reference SAM, and the distribution of epochs to convergence."""
    rows = _method_rows(s)
    bars = ("lasco_no_reference", "lasco", "e_lasco")
    curves: dict[str, Curve] = {
        LABELS[method]: (
            s.codeword_lengths,
            [mean(rows, "nmse_db", method=method, codeword_length=m) for m in s.codeword_lengths],
        )
        for method in bars
    }
    epochs = {name: sorted(row["best_epoch"] for row in rows if row["method"] == name) for name in ADAPTED_METHODS}
    cdf: dict[str, Curve] = {
        LABELS[method]: ([0, *values], [index / len(values) for index in range(len(values) + 1)])
        for method, values in epochs.items()
    }
    report = "NMSE (dB), mean over environments:\n\n"
    report += markdown_table(
        ["method", *(f"M = {m}" for m in s.codeword_lengths)],
        [[label, *values] for label, (_, values) in curves.items()],
    )
    report += "\nEpoch of the best validation NMSE over environments and codeword lengths:\n\n"
    report += markdown_table(
        ["method", "lower quartile", "median", "upper quartile"],
        [
            [LABELS[method], *(values[min(len(values) - 1, len(values) * q // 4)] for q in (1, 2, 3))]
            for method, values in epochs.items()
        ],
    )

    def draw(folder: Path) -> Path:
        line_figure(
            folder / "lasco-fig9a.png",
            {"NMSE (dB)": curves},
            "codeword length M",
            f"LASCO, Fig. 9a ({s.preset} preset)",
        )
        line_figure(
            folder / "lasco-fig9.png",
            {"CDF": cdf},
            "epochs to the best validation NMSE",
            f"LASCO, Fig. 9b ({s.preset} preset)",
            steps=True,
        )
        return folder / "lasco-fig9.png"

    return Outcome(rows, report, draw)


def fig10(s: Settings) -> Outcome:
    """E-LASCO with reference and proxy SAMs of several sizes beside the same base LAM."""
    rows: list[Row] = []
    runs = (("pretrained_sam", None), ("finetuned_sam", None), ("e_lasco", None))
    for m in s.codeword_lengths if s.preset == "paper" else (s.longest,):
        for layers, width in SAM_SIZES:
            tag = f"{layers} x {width}"
            rows += s.run(s.tasks(m, runs, sam=(layers, width), tag=tag))
    lengths = sorted({row["codeword_length"] for row in rows})
    tags = [f"{layers} x {width}" for layers, width in SAM_SIZES]
    table, curves = [], {}
    for m in lengths:
        for method, _ in runs:
            values = [mean(rows, "nmse_db", method=method, tag=tag, codeword_length=m) for tag in tags]
            curves[f"{LABELS[method]}, M = {m}"] = (range(len(tags)), values)
            table.append([f"{LABELS[method]}, M = {m}", *values])
    report = "NMSE (dB), mean over environments, per SAM size (blocks x width):\n\n"
    report += markdown_table(["method", *tags], table)

    def draw(folder: Path) -> Path:
        line_figure(
            folder / "lasco-fig10.png",
            {"NMSE (dB)": curves},
            "SAM size (blocks x width)",
            f"LASCO, Fig. 10 ({s.preset} preset)",
            ticks=tags,
        )
        return folder / "lasco-fig10.png"

    return Outcome(rows, report, draw)


def richness(s: Settings) -> Outcome:
    """All methods in environments of 1, 4 and 16 independent ray patches (not in the paper).

    Rays that stay frozen over a disc make an environment low-dimensional, which favours the linear MMSE estimate.
    """
    patches = (1, 4, 16)
    rows = s.run([task for k in patches for task in s.tasks(s.longest, _all_methods(), patches=k)])
    table, curves = [], {}
    for method in METHODS:
        values = [mean(rows, "nmse_db", method=method, patches=k) for k in patches]
        table.append([LABELS[method], *values])
        curves[LABELS[method]] = (patches, values)
    report = "NMSE (dB), mean over environments, per number of independent ray patches in a disc:\n\n"
    report += markdown_table(["method", *(f"K = {k}" for k in patches)], table)

    def draw(folder: Path) -> Path:
        line_figure(
            folder / "lasco-richness.png",
            {"NMSE (dB)": curves},
            "ray patches per environment",
            f"LASCO: richness of the environment ({s.preset} preset, M = {s.longest})",
            unscaled=LABELS["lmmse"],
        )
        return folder / "lasco-richness.png"

    return Outcome(rows, report, draw)


EXPERIMENTS: dict[str, tuple[str, Callable[[Settings], Outcome]]] = {
    "lasco-fig6": ("LASCO Fig. 6: NMSE and GCS against the codeword length, all methods", fig6),
    "lasco-fig7": ("LASCO Fig. 7: influence of the collaboration coefficient alpha", fig7),
    "lasco-fig8": ("LASCO Fig. 8: number of adaptation samples", fig8),
    "lasco-fig9": ("LASCO Fig. 9: without the reference SAM; epochs to converge", fig9),
    "lasco-fig10": ("LASCO Fig. 10: size of the small models", fig10),
    "lasco-richness": ("beyond the paper: how low-dimensional the environment is", richness),
}
