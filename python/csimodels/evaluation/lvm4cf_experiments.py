"""The experiments of LVM4CF, section V: Figs. 5 to 9.

Each experiment is a function of a :class:`Settings` that returns an :class:`Outcome`. All share one row file and one
folder of codebooks, so a codebook that several figures show is trained once. Besides the paper's methods every figure
has those that need no network: codebooks shaped by the channels' covariance, k-lines, and for SS the dominant
eigenvector of each cell.
"""

from __future__ import annotations

from collections.abc import Callable

from csimodels.evaluation.lvm4cf_runs import USERS, deploy
from csimodels.evaluation.lvm4cf_settings import (
    COSINE,
    Settings,
    against_bits,
    against_snr,
    bits_table,
    drawing,
    name_of,
    names,
    of_name,
)
from csimodels.evaluation.outcome import Outcome
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import Row, mean, select
from csimodels.evaluation.timing import device, seconds
from csimodels.models.codeword_baselines import count_parameters
from csimodels.training.lvm4cf_presets import LABELS

RATE = "sum rate (bit/s/Hz)"
_REPORT_SNR_DB = 20.0  # Fig. 8(c)


def fig5(s: Settings) -> Outcome:
    """MF-DS: cosine against B in every environment type."""
    rows, panels, report = [], {}, ""
    for environment in s.sizes.environments:
        channels = s.environment(environment)
        tasks = [task for bits in s.sizes.bits for task in s.methods("dual_side", bits, channels)]
        found = s.run(tasks)
        curves = against_bits(found)
        panels[f"{COSINE}, {environment}"] = curves
        report += f"{COSINE.capitalize()}, {environment}, dual-side codebook of many sites:\n\n"
        report += bits_table(s, curves) + "\n"
        rows += found
    return Outcome(rows, report, drawing(s, "lvm4cf-fig5", panels, "feedback bits B", "Fig. 5 (MF-DS)"))


def fig6(s: Settings) -> Outcome:
    """SF-SS and SF-DS: cosine against B at one site."""
    rows, panels, report = [], {}, ""
    for deployment, title in (("single_side", "SF-SS"), ("dual_side", "SF-DS")):
        found = s.run([task for bits in s.sizes.bits for task in s.methods(deployment, bits, s.site())])
        curves = against_bits(found)
        panels[f"{COSINE}, {title}"] = curves
        report += f"{COSINE.capitalize()} at one site ({s.sizes.site}), {title}:\n\n{bits_table(s, curves)}\n"
        rows += found
    report += "Seconds of training and bytes to the UE, per method (largest B):\n\n"
    largest = select(rows, bits=s.sizes.bits[-1])
    table = [
        [name_of(row), None if row["seconds"] is None else f"{row['seconds']:.0f}", row["codebook_bytes"]]
        for row in {name_of(row): row for row in largest}.values()
    ]
    report += markdown_table(["method", "seconds", "bytes"], table)
    return Outcome(rows, report, drawing(s, "lvm4cf-fig6", panels, "feedback bits B", "Fig. 6"))


def fig7(s: Settings) -> Outcome:
    """SF-DS against MF-DS: codebooks of the site and of its environment type, both tested at the site."""
    frameworks = {"SF-DS": s.site(), "MF-DS": s.environment(s.sizes.environments[0])}
    rows, panels, report = [], {}, ""
    for title, channels in frameworks.items():
        tasks = [task for bits in s.sizes.bits for task in s.methods("dual_side", bits, channels, test=s.site())]
        found = s.run(tasks)
        curves = against_bits(found)
        panels[f"{COSINE}, {title}"] = curves
        report += f"{COSINE.capitalize()} at {s.sizes.site}, codebooks made for {channels.name} ({title}):\n\n"
        report += bits_table(s, curves) + "\n"
        rows += found
    draw = drawing(s, "lvm4cf-fig7", panels, "feedback bits B", "Fig. 7")
    return Outcome(rows, report, draw)


def fig8(s: Settings) -> Outcome:
    """Parameters, time of one report at the UE and one look-up at the BS, and sum rate."""
    bits = s.sizes.few_bits[0]
    tasks = s.methods("dual_side", bits, s.site(), snrs_db=(_REPORT_SNR_DB,))
    rows = s.run(tasks)
    h = s.site().load(s.folder / "channels")["test"][:1]
    times = {}
    for task in tasks:
        deployment, _ = deploy(task, s.folder / "channels")
        index, _ = deployment.report_index(h)
        at_ue = seconds(lambda d=deployment: d.report_index(h), s.repeats)  # type: ignore[misc]
        at_bs = seconds(lambda d=deployment, i=index: d.reconstruct(i), s.repeats)  # type: ignore[misc]
        times[task.label] = [1e6 * measured.median().item() for measured in (at_ue, at_bs)]
    labels = {LABELS[name]: name for name in s.sizes.networks}
    table = []
    for name in names(rows):
        row = of_name(rows, name)[0]
        label = row["label"]
        paper = count_parameters(s.costs.networks[labels[label]]) if label in labels else 0
        rate = mean(of_name(rows, name), "rate", condition="rate")
        table.append([name, row["parameters"], paper, *(f"{value:.0f}" for value in times[label]), rate])
    report = f"B = {bits}, one report on {device()}, median of {s.repeats}; no network runs online. "
    report += f"S{RATE[1:]} of {USERS} users at {_REPORT_SNR_DB:g} dB:\n\n"
    header = ["method", "parameters", "of the paper's sizes", "UE, µs", "BS, µs", RATE]
    return Outcome(rows, report + markdown_table(header, table), None)


def fig9(s: Settings) -> Outcome:
    """Sum rate of zero forcing for four users of one site against the SNR, SS and DS, at two numbers of bits."""
    frameworks = (
        ("SF-SS", "single_side", s.site(), s.sizes.few_bits),
        ("SF-DS", "dual_side", s.site(), s.sizes.few_bits),
        ("MF-DS", "dual_side", s.environment(s.sizes.environments[0]), s.sizes.pooled_few_bits),
    )
    rows: list[Row] = []
    panels, report = {}, ""
    for title, deployment, channels, few_bits in frameworks:
        for bits in few_bits:
            found = s.run(s.methods(deployment, bits, channels, test=s.site(), snrs_db=s.snrs_db))
            curves = against_snr(s, found)
            if channels == s.site():  # six panels would not fit beside each other
                panels[f"{RATE}, {title}, B = {bits}"] = curves
            report += f"S{RATE[1:]} at one site, {USERS} users, zero forcing, {title}, B = {bits}:\n\n"
            header = ["codebook", *(f"{snr:g} dB" for snr in s.snrs_db)]
            report += markdown_table(header, [[name, *values] for name, (_, values) in curves.items()]) + "\n"
            rows += found
    return Outcome(rows, report, drawing(s, "lvm4cf-fig9", panels, "SNR (dB)", "Fig. 9"))


EXPERIMENTS: dict[str, tuple[str, Callable[[Settings], Outcome]]] = {
    "lvm4cf-fig5": ("LVM4CF Fig. 5: cosine against feedback bits, one codebook per environment type", fig5),
    "lvm4cf-fig6": ("LVM4CF Fig. 6: cosine against feedback bits, single-side and dual-side", fig6),
    "lvm4cf-fig7": ("LVM4CF Fig. 7: codebooks of a site against those of its environment type", fig7),
    "lvm4cf-fig8": ("LVM4CF Fig. 8: parameters, time of a report, sum rate", fig8),
    "lvm4cf-fig9": ("LVM4CF Fig. 9: sum rate of four users against the SNR", fig9),
}
