"""The demonstration: the shipped large model adapts to environments that it has never seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csimodels.assets import shipped_checkpoint
from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.presets import data_preset
from csimodels.evaluation.figures import bar_figure, heat_maps, line_figure
from csimodels.evaluation.lasco_runs import AdaptTask, pooled_nmse_db, run_tasks
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean
from csimodels.files import write_json, write_text
from csimodels.models.lasco import LABELS, METHODS
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData
from csimodels.training.checkpoint import freeze, load_checkpoint
from csimodels.training.loop import make_accelerator

# Fresh: neither pre-training (1 to 1000), validation (1001 to 1040) nor the experiments (1101 on) use them.
ENVIRONMENTS = (1201, 1202, 1203, 1204)
SAMPLES = data_preset("laptop").adaptation_samples
ALPHAS = (0.1, 0.4, 0.7, 1.0, 1.5)
_LMMSE_START = (("pretrained_lam", None), ("finetuned_sam", None), ("e_lasco", None))


def run_demo(
    out: Path,
    *,
    environments: Sequence[int] = ENVIRONMENTS,
    samples: tuple[int, int, int] = SAMPLES,
    config: AdaptConfig | None = None,
    workers: int | None = None,
    on_done: Callable[[int, int, AdaptTask], None] | None = None,
) -> dict[str, Any]:
    """Adapt every method in ``environments`` with the shipped checkpoints.

    Writes ``report.json``, ``report.md``, ``methods.png``, ``alpha.png`` and ``channels.png`` to ``out``, and the
    finished rows as it goes, so that a killed demo continues.

    Args:
        out: folder.
        environments: indices in the built-in cell.
        samples: per environment for training, validation and test.
        config: how to adapt; default: the laptop preset.
        workers: processes; default one per core.
        on_done: progress callback ``(finished, total, task)``.

    Returns:
        The report, as in ``report.json``: ``preset``, ``codeword_length``, ``environments`` (``index`` and ``los``
        each), ``methods`` (name -> ``nmse_db``, ``nmse_db_pooled`` and ``gcs``, for those that train ``epochs``,
        ``best_epoch`` and ``seconds``, with a coefficient ``alpha``, each a mean; and ``per_environment``, by index),
        ``initial_lmmse`` (likewise, for methods that start from the LMMSE estimate), ``alpha_sweep`` (index -> alpha ->
        NMSE in dB of LASCO) and ``samples`` (``train``, ``validation``, ``test``).
    """
    base, reference = shipped_checkpoint("base"), shipped_checkpoint("reference")
    preset = "laptop" if config is None else "custom"
    config = config or AdaptConfig.laptop()
    linear = dataclasses.replace(config, initial="lmmse")
    sweep = tuple(("lasco", alpha) for alpha in ALPHAS if alpha != config.alpha)
    tasks = []
    for runs, adapt in ((tuple((m, None) for m in METHODS), config), (_LMMSE_START, linear), (sweep, config)):
        tasks += [AdaptTask(str(base), str(reference), index, adapt, runs, *samples) for index in environments]
    rows = run_tasks(tasks, out, workers=workers, on_done=on_done)
    main = [row for row in rows if row["initial"] == "pinv" and row["set_alpha"] is None]
    lmmse_start = [row for row in rows if row["initial"] == "lmmse"]
    report = {
        "preset": preset,
        "codeword_length": main[0]["codeword_length"],
        "environments": [
            {"index": index, "los": next(row["los"] for row in main if row["environment"] == index)}
            for index in environments
        ],
        "methods": {method: _summary(main, method, environments) for method in METHODS},
        "initial_lmmse": {method: _summary(lmmse_start, method, environments) for method, _ in _LMMSE_START},
        "alpha_sweep": _alpha_sweep(rows, config.alpha, environments),
        "samples": dict(zip(("train", "validation", "test"), samples, strict=True)),
    }
    write_json(out / "report.json", report)
    write_text(out / "report.md", report_markdown(report))
    _figures(out, report, config)
    return report


def _summary(rows: Sequence[Row], method: str, environments: Sequence[int]) -> dict[str, Any]:
    chosen = {row["environment"]: row for row in rows if row["method"] == method}
    fields = ("nmse_db", "gcs", "epochs", "best_epoch", "seconds", "alpha")
    first = chosen[environments[0]]
    return {
        **{name: mean(chosen.values(), name) for name in fields if first[name] is not None},
        "nmse_db_pooled": pooled_nmse_db(chosen.values()),
        "per_environment": {
            str(index): {name: chosen[index][name] for name in fields if first[name] is not None}
            for index in environments
        },
    }


def _alpha_sweep(rows: Sequence[Row], fixed: float, environments: Sequence[int]) -> dict[str, dict[str, float]]:
    sweep: dict[str, dict[str, float]] = {}
    for index in environments:
        values = {
            (fixed if row["set_alpha"] is None else row["set_alpha"]): row["nmse_db"]
            for row in rows
            if row["method"] == "lasco" and row["environment"] == index
        }
        sweep[str(index)] = {f"{alpha:g}": values[alpha] for alpha in sorted(values)}
    return sweep


def environment_label(environment: dict[str, Any]) -> str:
    """``"1201 NLOS"``."""
    return f"{environment['index']} {'LOS' if environment['los'] else 'NLOS'}"


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the demo's one table: mean and per-environment NMSE, GCS, epochs, seconds, learned alpha."""
    environments = report["environments"]
    header = ["method", "NMSE (dB)", "pooled", "GCS", *(f"env {environment_label(e)}" for e in environments)]
    header += ["epochs", "seconds", "alpha"]
    rows: list[list[object]] = []
    labelled = [(LABELS[name], entry) for name, entry in report["methods"].items()]
    labelled += [(f"{LABELS[name]}, LMMSE start", entry) for name, entry in report["initial_lmmse"].items()]
    for label, entry in labelled:
        per = [
            f"{value['nmse_db']:.2f} / {value['gcs']:.3f}"
            for value in (entry["per_environment"][str(e["index"])] for e in environments)
        ]
        epochs = f"{entry['epochs']:.0f}" if "epochs" in entry else None
        seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else None
        means = (entry["nmse_db"], entry["nmse_db_pooled"], f"{entry['gcs']:.3f}")
        rows.append([label, *means, *per, epochs, seconds, entry.get("alpha")])
    return header, rows


def report_markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    header, rows = table_rows(report)
    methods, samples, preset = report["methods"], report["samples"], report["preset"].capitalize()
    best = min(("lasco", "e_lasco"), key=lambda name: methods[name]["nmse_db"])
    gain = {name: methods[name]["nmse_db"] - methods[best]["nmse_db"] for name in ("pretrained_lam", "finetuned_sam")}
    lines = [
        "# LASCO demonstration",
        "",
        f"{preset} preset, M = {report['codeword_length']} of 2048 reals; per-environment columns",
        f"are NMSE (dB) / GCS on {samples['test']:,} test samples after adaptation with {samples['train']:,} samples.",
        "NMSE is the mean of the environments' dB values, pooled the mean error ratio of all samples in dB. Epochs",
        "and seconds are means per environment.",
        "",
        markdown_table(header, rows),
        f"{LABELS[best]} gains {gain['pretrained_lam']:.2f} dB on the pre-trained LAM and "
        f"{gain['finetuned_sam']:.2f} dB on the fine-tuned SAM.",
        "The linear MMSE estimate, which needs no training, reaches "
        f"{methods['lmmse']['nmse_db_pooled']:.2f} dB pooled: rays that stay frozen over",
        "a 5 m disc span few dimensions. docs/results/lasco.md has environments that are richer.",
        "",
        "![methods](methods.png)",
        "![alpha](alpha.png)",
        "![channels](channels.png)",
        "",
    ]
    return "\n".join(lines)


def _figures(out: Path, report: dict[str, Any], config: AdaptConfig) -> None:
    labels = {str(e["index"]): environment_label(e) for e in report["environments"]}
    groups = {
        LABELS[name]: {
            "mean": entry["nmse_db"],
            **{labels[index]: value["nmse_db"] for index, value in entry["per_environment"].items()},
        }
        for name, entry in report["methods"].items()
    }
    title = f"CSI reconstruction, M = {report['codeword_length']}"
    bar_figure(out / "methods.png", groups, "NMSE (dB)", title, unscaled=LABELS["lmmse"])
    curves = {
        labels[index]: ([float(alpha) for alpha in values], list(values.values()))
        for index, values in report["alpha_sweep"].items()
    }
    line_figure(out / "alpha.png", {"NMSE (dB)": curves}, "alpha", "LASCO with a fixed alpha")
    _draw_channels(out / "channels.png", report, config)


def _draw_channels(path: Path, report: dict[str, Any], config: AdaptConfig) -> None:
    """One test sample of the first environment: truth, input, LAM, E-LASCO.

    E-LASCO is adapted again for it: the demo's processes return scores, not weights.
    """
    base, codec_config, _ = load_checkpoint(shipped_checkpoint("base"))
    reference, _, _ = load_checkpoint(shipped_checkpoint("reference"))
    codec = RandomProjectionCodec(codec_config)
    index, counts = report["environments"][0]["index"], report["samples"].values()
    data = EnvironmentData.split(Environment(CellConfig(), index, 0).sample(sum(counts)), *counts)
    accelerator = make_accelerator(config.train)
    adapter = Adapter(freeze(base), freeze(reference), codec, data, config, accelerator=accelerator)
    _, proxy = adapter.adapt("e_lasco")
    outputs = adapter.outputs(proxy, 1)
    labels = {"truth": "truth", "input": "input", "base": "LAM", "estimate": "E-LASCO"}
    heat_maps(path, {label: outputs[name][0] for name, label in labels.items()}, f"|CSI| in environment {index}")
