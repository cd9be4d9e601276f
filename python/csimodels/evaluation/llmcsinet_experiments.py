"""The experiments of LLMCsiNet, section V: Figs. 5 to 12 and Tables II to VI.

Each experiment is a function of a :class:`Settings` that returns an :class:`Outcome`. All share one row file and one
folder of checkpoints, so a network that several figures show is trained once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from csimodels.evaluation import llmcsinet_costs as costs
from csimodels.evaluation import llmcsinet_tables as tables
from csimodels.evaluation.figures import Curve
from csimodels.evaluation.llmcsinet_runs import USERS
from csimodels.evaluation.llmcsinet_settings import NMSE, Settings, by_channels, drawing, labels, main_rows, ratio
from csimodels.evaluation.outcome import Outcome
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean, select
from csimodels.models.backbone import MINILM, BackboneConfig, offline_sources
from csimodels.training.llmcsinet_presets import codeword_values

SPEED_KMH = 30.0


def _kept_energy(s: Settings, samples: int = 128) -> str:
    """What the truncation to Nc rows leaves."""
    kept = []
    for name in s.sizes.channels:
        shares = s.sizes.channel_set(name).kept_energy(samples)
        kept.append(f"{name} {'not known' if shares is None else f'{shares.mean():.1%}'}")
    return f"Energy that the delay rows keep: {', '.join(kept)}.\n"


def _against_ratio(
    s: Settings, rows: Sequence[Row], names: Iterable[str], **match: Any
) -> tuple[list[str], dict[str, Curve]]:
    """The compression ratios as an axis' ticks, and each network's NMSE over them."""
    compressions = s.sizes.compressions
    curves: dict[str, Curve] = {
        label: (
            range(len(compressions)),
            [mean(rows, "nmse_db", label=label, compression=compression, **match) for compression in compressions],
        )
        for label in names
    }
    return [ratio(compression) for compression in compressions], curves


def fig5(s: Settings) -> Outcome:
    """NMSE of all methods against the compression ratio."""
    rows = main_rows(s)
    ticks = [ratio(compression) for compression in s.sizes.compressions]
    panels: dict[str, dict[str, Curve]] = {
        f"{NMSE}, {channels}": _against_ratio(s, rows, labels(rows), channels=channels)[1]
        for channels in s.sizes.channels
    }
    report = f"{NMSE}, mean of ratios:\n\n{by_channels(s, rows, 'nmse_db')}\n{_kept_energy(s)}\n"
    report += "Bytes of one report (float32 values; positions where the method sends them) and training:\n\n"
    table = []
    for label in labels(rows):
        first = select(rows, label=label)[0]
        sizes = [select(rows, label=label, compression=value)[0]["report_bytes"] for value in s.sizes.compressions]
        parameters = [first["ue_parameters"], first["bs_parameters"]]
        table.append([label, *sizes, *parameters, f"{mean(rows, 'seconds', label=label):.0f}"])
    header = ["method", *(f"bytes, {tick}" for tick in ticks), "parameters UE", "parameters BS", "seconds"]
    report += markdown_table(header, table)
    return Outcome(rows, report, drawing(s, "llmcsinet-fig5", panels, "compression ratio", "Fig. 5", ticks=ticks))


def fig7(s: Settings) -> Outcome:
    """NMSE with noise in the encoder's CSI, against the noiseless channel; networks trained without noise."""
    rows = s.run(s.few_methods(s.outdoor, s.easiest, snrs_db=s.snrs_db))
    curves: dict[str, Curve] = {
        label: (s.snrs_db, [mean(rows, "nmse_db", label=label, condition="noisy", snr_db=snr) for snr in s.snrs_db])
        for label in labels(rows)
    }
    report = f"{NMSE} on {s.outdoor} at {ratio(s.easiest)} per SNR of the CSI at the encoder:\n\n"
    report += markdown_table(
        ["method", *(f"{snr:g} dB" for snr in s.snrs_db), "no noise"],
        [
            [label, *values, mean(rows, "nmse_db", label=label, condition="clean")]
            for label, (_, values) in curves.items()
        ],
    )
    return Outcome(rows, report, drawing(s, "llmcsinet-fig7", {NMSE: curves}, "SNR of the CSI (dB)", "Fig. 7"))


def fig8(s: Settings) -> Outcome:
    """One network for all compression ratios against networks of their own."""
    lengths = tuple((compression, codeword_values(compression)) for compression in s.sizes.compressions)
    training = s.sizes.llmcsinet(s.largest, s.easiest, s.outdoor, mixed_ratios=True)
    tasks = [s.task(f"LLMCsiNet-{s.largest}-MC", training, s.outdoor, s.easiest, lengths=lengths)]
    for compression in s.sizes.compressions:
        tasks += s.few_methods(s.outdoor, compression)
    rows = s.run(tasks)
    ticks, curves = _against_ratio(s, rows, labels(rows))
    report = f"{NMSE} on {s.outdoor}; MC is one network, every other number a network of its own:\n\n"
    report += markdown_table(["method", *ticks], [[label, *values] for label, (_, values) in curves.items()])
    draw = drawing(s, "llmcsinet-fig8", {NMSE: curves}, "compression ratio", "Fig. 8", ticks=ticks)
    return Outcome(rows, report, draw)


def fig9(s: Settings) -> Outcome:
    """Networks trained on still and moving UEs together, tested on each (with the outdoor set, not DeepMIMO)."""
    moving = s.sizes.channel_set(s.outdoor, speed_kmh=SPEED_KMH, mixed=True)
    still = s.sizes.channel_set(s.outdoor)
    rows = s.run(
        [task for compression in s.sizes.compressions for task in s.few_methods(moving, compression, tests=(still,))]
    )
    ticks = [ratio(compression) for compression in s.sizes.compressions]
    table: list[list[object]] = []
    curves: dict[str, Curve] = {}
    for label in labels(rows):
        for condition, text in (("other", "still"), ("clean", f"{SPEED_KMH:g} km/h")):
            values = [
                mean(rows, "nmse_db", label=label, condition=condition, compression=compression)
                for compression in s.sizes.compressions
            ]
            table.append([f"{label}, {text}", *values])
            curves[f"{label}, {text}"] = (range(len(ticks)), values)
    report = f"{NMSE} on {s.outdoor}, trained on still and moving UEs together:\n\n"
    report += markdown_table(["method and test", *ticks], table)
    draw = drawing(s, "llmcsinet-fig9", {NMSE: curves}, "compression ratio", "Fig. 9", ticks=ticks)
    return Outcome(rows, report, draw)


def _ablations(s: Settings) -> dict[str, dict[str, Any]]:
    return {
        f"LLMCsiNet-{s.largest}": {},
        "without f_EN (random mask)": {"mask": "random"},
        "without f_EN (mask by magnitude)": {"mask": "magnitude"},
        "without f_PD": {"preliminary": False},
        "without f_TP": {"prediction": False},
    }


def fig10(s: Settings) -> Outcome:
    """What f_EN, f_PD and f_TP contribute; and pre-trained against random Transformer layers."""
    tasks = [
        s.variant(s.largest, s.outdoor, compression, label=label, changes=changes)
        for compression in s.sizes.compressions
        for label, changes in _ablations(s).items()
    ]
    smallest, backbones = s.sizes.variants[0], {}
    if MINILM in offline_sources():
        pretrained = BackboneConfig.minilm(1)
        backbones = {
            f"{smallest}, {MINILM}, pre-trained": pretrained,
            f"{smallest}, the same layers, random": dataclasses.replace(pretrained, source=None),
        }
    tasks += [
        s.variant(smallest, s.outdoor, s.easiest, label=label, changes={"backbone": backbone})
        for label, backbone in backbones.items()
    ]
    rows = s.run(tasks)
    ticks, curves = _against_ratio(s, rows, _ablations(s))
    report = f"{NMSE} on {s.outdoor}:\n\n"
    report += markdown_table(["network", *ticks], [[label, *values] for label, (_, values) in curves.items()])
    if backbones:
        report += f"\nOne Transformer layer at {ratio(s.easiest)} (not in the paper):\n\n"
        report += markdown_table(
            ["backbone", NMSE, "SGCS"],
            [
                [label, mean(rows, "nmse_db", label=label), f"{mean(rows, 'sgcs', label=label):.3f}"]
                for label in backbones
            ],
        )
    draw = drawing(s, "llmcsinet-fig10", {NMSE: curves}, "compression ratio", "Fig. 10", ticks=ticks)
    return Outcome(rows, report, draw)


def fig11(s: Settings) -> Outcome:
    """Few-shot transfer between the first two sets: NMSE and time against the number of fine-tuning samples."""
    if len(s.sizes.channels) < 2:
        raise ValueError(f"channels: expected two sets to transfer between, got {', '.join(s.sizes.channels)}")
    first, second = s.sizes.channels[:2]
    rows: list[Row] = []
    for source, target in ((first, second), (second, first)):
        starts = [task for task in s.few_methods(source, s.easiest) if task.training.stages]
        s.run(starts)
        tasks = []
        for start in starts:
            for count in s.sizes.transfer:
                training = s.sizes.fine_tuning(start.training, str(start.checkpoint()), count)
                channels = s.sizes.channel_set(target, train=count)
                tasks.append(s.task(start.label, training, channels, s.easiest, start=source))
        rows += s.run(tasks)
    panels: dict[str, dict[str, Curve]] = {}
    report = ""
    for source, target in ((first, second), (second, first)):
        chosen = select(rows, start=source, channels=target)
        for name, y_label in (("nmse_db", NMSE), ("seconds", "seconds")):
            curves: dict[str, Curve] = {
                label: (
                    s.sizes.transfer,
                    [mean(chosen, name, label=label, train_samples=count) for count in s.sizes.transfer],
                )
                for label in labels(chosen)
            }
            panels[f"{y_label}, {source} to {target}"] = curves
            report += f"{y_label}, {source} to {target} at {ratio(s.easiest)}, per number of samples:\n\n"
            header = ["method", *map(str, s.sizes.transfer)]
            report += markdown_table(header, [[label, *values] for label, (_, values) in curves.items()]) + "\n"
    return Outcome(rows, report, drawing(s, "llmcsinet-fig11", panels, "fine-tuning samples", "Fig. 11"))


def fig12(s: Settings) -> Outcome:
    """Average rate per user of zero forcing for four users on the reconstructed channels."""
    rows = s.run(s.few_methods(s.outdoor, s.easiest, rate_snrs_db=s.rate_snrs_db))
    perfect = costs.perfect_rates(s.sizes.channel_set(s.outdoor), s.folder / "channels", s.rate_snrs_db)
    curves: dict[str, Curve] = {"perfect CSI": (s.rate_snrs_db, perfect)}
    for label in labels(rows):
        values = [mean(rows, "rate", label=label, condition="rate", snr_db=snr) for snr in s.rate_snrs_db]
        curves[label] = (s.rate_snrs_db, values)
    report = f"Average rate per user (bit/s/Hz), {USERS} users, zero forcing, {s.outdoor}, {ratio(s.easiest)}:\n\n"
    report += markdown_table(
        ["CSI at the BS", *(f"{snr:g} dB" for snr in s.rate_snrs_db)],
        [[label, *values] for label, (_, values) in curves.items()],
    )
    draw = drawing(s, "llmcsinet-fig12", {"rate per user (bit/s/Hz)": curves}, "SNR (dB)", "Fig. 12")
    return Outcome(rows, report, draw)


EXPERIMENTS: dict[str, tuple[str, Callable[[Settings], Outcome]]] = {
    "llmcsinet-fig5": ("LLMCsiNet Fig. 5: NMSE against the compression ratio, all methods", fig5),
    "llmcsinet-fig6": ("LLMCsiNet Fig. 6: latency at UE and BS", tables.fig6),
    "llmcsinet-fig7": ("LLMCsiNet Fig. 7: noisy CSI at the encoder", fig7),
    "llmcsinet-fig8": ("LLMCsiNet Fig. 8: one network for all compression ratios", fig8),
    "llmcsinet-fig9": ("LLMCsiNet Fig. 9: moving users", fig9),
    "llmcsinet-fig10": ("LLMCsiNet Fig. 10: without f_EN, f_PD or f_TP; pre-trained or random layers", fig10),
    "llmcsinet-fig11": ("LLMCsiNet Fig. 11: few-shot transfer to other channels", fig11),
    "llmcsinet-fig12": ("LLMCsiNet Fig. 12: rate with zero forcing for four users", fig12),
    "llmcsinet-table2": ("LLMCsiNet Table II: bits and bytes of a report", tables.table2),
    "llmcsinet-table3": ("LLMCsiNet Table III: SGCS, all methods", tables.table3),
    "llmcsinet-table4": ("LLMCsiNet Table IV: parameters", tables.table4),
    "llmcsinet-table5": ("LLMCsiNet Table V: operations", tables.table5),
    "llmcsinet-table6": ("LLMCsiNet Table VI: quantised codewords", tables.table6),
    "llmcsinet-bytes": ("LLMCsiNet: NMSE against the bytes of a real report (not in the paper)", tables.real_bytes),
}
