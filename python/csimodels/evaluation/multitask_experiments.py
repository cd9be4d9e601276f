"""The experiments of the multi-task network, section V: Figs. 5 to 13, Tables I to III, and what it costs.

Each experiment is a function of a :class:`Settings` that returns an :class:`Outcome`. All share one row file and one
folder of checkpoints, so a network that several figures show is trained once. Besides the paper's methods the figures
of each task have those that need no network: the last slot and the linear MMSE predictor (told the SNR), MMSE and WMMSE
precoding, LMMSE detection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from csimodels.evaluation.figures import Curve
from csimodels.evaluation.multitask_costs import cost_rows
from csimodels.evaluation.multitask_runs import pooled_db
from csimodels.evaluation.multitask_settings import (
    SCORE_HEADER,
    SINGLE,
    Settings,
    curve_table,
    curves,
    drawing,
    labels,
    score_cells,
    scores,
    sizes_line,
)
from csimodels.evaluation.outcome import Outcome
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, select
from csimodels.training.multitask_file import Adaptation

_FIG5_SNR_DB = 20
_NMSE_DB, _RATE = "NMSE (dB)", "sum rate (bit/s/Hz)"


def _rate(rows: list[Row]) -> float:
    (row,) = rows
    return row["rate"]


def _prediction(s: Settings, name: str, x: str, number: str, title: str, **match: object) -> Outcome:
    rows = s.run(s.methods("predict"))
    found = curves(rows, x, pooled_db, condition="predict", **match)
    unit = {"speed_kmh": "km/h", "snr_db": "dB"}[x]
    report = f"NMSE of prediction in dB, {title}:\n\n" + curve_table(found, lambda place: f"{place:g} {unit}", ".2f")
    report += sizes_line(rows)
    x_label = {"speed_kmh": "speed of the UE (km/h)", "snr_db": "SNR of the history (dB)"}[x]
    return Outcome(rows, report, drawing(s, name, {_NMSE_DB: found}, x_label, number))


def fig5(s: Settings) -> Outcome:
    """NMSE of prediction against the speed."""
    title = f"histories of {_FIG5_SNR_DB} dB"
    here = s.sizes.samples.name
    return _prediction(s, "multitask-fig5", "speed_kmh", "Fig. 5", title, set=here, snr_db=_FIG5_SNR_DB)


def fig6(s: Settings) -> Outcome:
    """NMSE of prediction against the histories' SNR, all speeds together."""
    return _prediction(s, "multitask-fig6", "snr_db", "Fig. 6", "all speeds together", set=s.sizes.samples.name)


def fig13(s: Settings) -> Outcome:
    """NMSE of prediction in another environment, without training there."""
    other = s.conditions.other_set
    return _prediction(
        s, "multitask-fig13", "snr_db", "Fig. 13", f"{other}, trained on {s.sizes.samples.name}", set=other
    )


def _precoding(s: Settings, name: str, x: str, number: str, title: str, x_label: str, **match: object) -> Outcome:
    rows = s.run(s.methods("precode"))
    chosen = [row for row in rows if row[x] is not None] if x == "channel_snr_db" else rows
    found = curves(chosen, x, _rate, condition="precode", **match)
    unit = {"power_dbw": " dBW", "users": " users", "channel_snr_db": " dB"}[x]
    report = f"S{_RATE[1:]}, {title}:\n\n" + curve_table(found, lambda place: f"{place:g}{unit}", ".2f")
    report += sizes_line(rows)
    return Outcome(rows, report, drawing(s, name, {_RATE: found}, x_label, number))


def fig7(s: Settings) -> Outcome:
    """Sum rate against the BS's power."""
    users = s.conditions.few_users
    title, x_label = f"{users} users, noise -10 dBW", "transmit power (dBW)"
    match = {"users": users, "channel_snr_db": None}
    return _precoding(s, "multitask-fig7", "power_dbw", "Fig. 7", title, x_label, **match)


def fig8(s: Settings) -> Outcome:
    """Sum rate against the number of users."""
    match = {"power_dbw": 0, "channel_snr_db": None}
    return _precoding(s, "multitask-fig8", "users", "Fig. 8", "0 dBW, noise -10 dBW", "users", **match)


def fig12(s: Settings) -> Outcome:
    """Sum rate against the SNR of the channels that precoders are made from."""
    title = f"{s.conditions.few_users} users at 0 dBW, precoders from noisy channels"
    x_label = "SNR of the channel (dB)"
    return _precoding(s, "multitask-fig12", "channel_snr_db", "Fig. 12", title, x_label, power_dbw=0)


def _detection(s: Settings, name: str, value: str, number: str, y_label: str) -> Outcome:
    rows = s.run(s.methods("detect"))
    found = curves(rows, "snr_db", lambda own: own[0][value], condition="detect")
    users = s.conditions.users
    report = f"{y_label} of detection, {min(users)} to {max(users)} users, {s.sizes.drawing.order}-QAM:\n\n"
    report += curve_table(found, lambda place: f"{place:g} dB", ".5f") + sizes_line(rows)
    return Outcome(rows, report, drawing(s, name, {y_label: found}, "SNR (dB)", number))


def fig9(s: Settings) -> Outcome:
    """NMSE of detection against the SNR."""
    return _detection(s, "multitask-fig9", "nmse", "Fig. 9", "NMSE")


def fig10(s: Settings) -> Outcome:
    """Symbol error ratio against the SNR."""
    return _detection(s, "multitask-fig10", "ser", "Fig. 10", "SER")


def fig11(s: Settings) -> Outcome:
    """The loss of detection over the epochs, with and without prompts."""
    runs = [
        s.multi(),
        s.multi("multi-task, identifiers alone", prompt="identifier"),
        s.multi(SINGLE, tasks=("detect",)),
        s.multi("single-task, no prompt", tasks=("detect",), prompt="none"),
    ]
    rows = s.run(runs)
    epochs = [row for row in rows if row["condition"] == "epoch"]
    found = curves(epochs, "epoch", lambda own: own[0]["losses"]["detect"])
    few = _few(len(next(iter(found.values()))[0]))
    shown: dict[str, Curve] = {label: ([x[i] for i in few], [y[i] for i in few]) for label, (x, y) in found.items()}
    report = "Validation loss of detection (eq. 39) after so many epochs:\n\n"
    report += curve_table(shown, lambda epoch: f"{epoch:g}", ".4f") + "\nScores of the best weights:\n\n"
    report += _score_table(s, rows)
    draw = drawing(s, "multitask-fig11", {"validation MSE of detection": found}, "epoch", "Fig. 11")
    return Outcome(rows, report, draw)


def _few(count: int, wanted: int = 6) -> list[int]:
    """About ``wanted`` indices from 0 to ``count - 1``, both included."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _score_table(s: Settings, rows: Sequence[Row]) -> str:
    cells = [[label, *score_cells(s, rows, label)] for label in labels(rows)]
    return markdown_table(["model", *SCORE_HEADER], cells)


def table1(s: Settings) -> Outcome:
    """Low-rank matrices beside full-precision weights, beside NF4 with LoftQ's start, and with the plain start."""
    names = {
        "full precision": "lora",
        "NF4, LoftQ's start": "loftq",
        "NF4, plain start (QLoRA)": "qlora",
    }
    backbones: dict[str, dict[str, Any]] = {"": {}}
    backbones |= {
        f"{name}: ": {"backbone": backbone, "prompt": "identifier"} for name, backbone in s.sizes.pretrained.items()
    }
    rows = s.run(
        [
            s.multi(prefix + label, adaptation=Adaptation(kind, s.sizes.rank), **chosen)
            for prefix, chosen in backbones.items()
            for label, kind in names.items()
        ]
    )
    return Outcome(rows, _score_table(s, rows), None)


def table2(s: Settings) -> Outcome:
    """Backbones."""
    runs = [s.multi(label, backbone=backbone) for label, backbone in s.sizes.backbones.items()]
    rows = s.run(runs)
    cells = []
    for label in labels(rows):
        row = select(rows, label=label)[0]
        share = f"{row['trainable'] / 1e6:.2f} / {row['total'] / 1e6:.2f} M"
        cells.append([label, *score_cells(s, rows, label), share, f"{row['seconds']:.0f}"])
    header = ["backbone", *SCORE_HEADER, "trainable / total parameters", "seconds of training"]
    return Outcome(rows, markdown_table(header, cells), None)


def table3(s: Settings) -> Outcome:
    """Prediction learnt from all and from a tenth of the samples."""
    rows: list[Row] = []
    cells: dict[str, list[str]] = {}
    for share in (1.0, 0.1):
        found = s.run(s.methods("predict", share))
        rows += found
        for label in labels(found):
            cells.setdefault(label, [label]).append(f"{scores(s, found, label)['predict']:.2f}")
    counts = [s.sizes.samples.fraction(share).train for share in (1.0, 0.1)]
    header = ["NMSE of prediction (dB)", *(f"{count:,} samples" for count in counts)]
    return Outcome(rows, markdown_table(header, list(cells.values())), None)


def costs(s: Settings) -> Outcome:
    """Memory and time of a step: float32, bfloat16, and 4-bit weights with low-rank matrices."""
    rows = cost_rows(s)
    columns = {
        "weights_mb": "weights (MB)",
        "trainable_m": "trainable (M)",
        "optimizer_mb": "gradient and AdamW (MB)",
        "activations_mb": "kept for backward (MB)",
        "inference_ms": "inference (ms)",
        "step_ms": "training step (ms)",
    }
    cells = [[row["label"], *(f"{row[name]:.1f}" for name in columns)] for row in rows]
    report = f"{rows[0]['device']}; prediction, {rows[0]['batch']} samples a batch, median of {s.repeats}.\n\n"
    return Outcome(rows, report + markdown_table(["backbone", *columns.values()], cells), None)


EXPERIMENTS: dict[str, tuple[str, Callable[[Settings], Outcome]]] = {
    "multitask-fig5": ("Multi-task PHY Fig. 5: NMSE of channel prediction against the UE's speed", fig5),
    "multitask-fig6": ("Multi-task PHY Fig. 6: NMSE of channel prediction against the SNR", fig6),
    "multitask-fig7": ("Multi-task PHY Fig. 7: sum rate against the transmit power", fig7),
    "multitask-fig8": ("Multi-task PHY Fig. 8: sum rate against the number of users", fig8),
    "multitask-fig9": ("Multi-task PHY Fig. 9: NMSE of signal detection against the SNR", fig9),
    "multitask-fig10": ("Multi-task PHY Fig. 10: symbol error ratio against the SNR", fig10),
    "multitask-fig11": ("Multi-task PHY Fig. 11: loss over the epochs with and without prompts", fig11),
    "multitask-fig12": ("Multi-task PHY Fig. 12: sum rate with imperfect channels", fig12),
    "multitask-fig13": ("Multi-task PHY Fig. 13: channel prediction in UMi, trained in UMa", fig13),
    "multitask-table1": ("Multi-task PHY Table I: full precision, LoftQ and QLoRA", table1),
    "multitask-table2": ("Multi-task PHY Table II: backbones", table2),
    "multitask-table3": ("Multi-task PHY Table III: a tenth of the samples", table3),
    "multitask-costs": ("Multi-task PHY section V-E: memory and time of float32, bfloat16 and NF4 with LoRA", costs),
}
