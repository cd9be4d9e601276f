"""Tables II to VI of LLMCsiNet, and Fig. 6: sizes, costs and quantised codewords."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from csimodels.evaluation import llmcsinet_costs as costs
from csimodels.evaluation.figures import Curve
from csimodels.evaluation.llmcsinet_runs import FeedbackTask
from csimodels.evaluation.llmcsinet_settings import NMSE, Settings, by_channels, drawing, labels, main_rows, ratio
from csimodels.evaluation.outcome import Outcome
from csimodels.evaluation.tables import markdown_table
from csimodels.evaluation.task_rows import select
from csimodels.models.baselines import codeword_length
from csimodels.models.llmcsinet import codeword_bits, compression_ratio
from csimodels.models.payload import PayloadFormat
from csimodels.models.quantizer import LloydMax
from csimodels.training.llmcsinet_presets import VALUE_BITS, codeword_values, feedback_preset


def table2(s: Settings) -> Outcome:
    """Bits of a codeword by the paper's count, and bytes of a real report."""
    rows = []
    quantizer = LloydMax(2**VALUE_BITS)
    for compression in feedback_preset("paper").compressions:
        m, length = codeword_values(compression), codeword_length(1 / compression)
        form = PayloadFormat(2048, bytes(8))
        rows.append(
            {
                "compression": compression,
                "crnet_values": length,
                "crnet_bits": 64 * length,
                "llmcsinet_values": m,
                "llmcsinet_bits": codeword_bits(m),
                "sigma": compression_ratio(m),
                "report_bytes": form.report_bytes(m),
                "report_bytes_codes": dataclasses.replace(form, quantizer=quantizer).report_bytes(m),
                "crnet_bytes": 4 * length,
            }
        )
    report = "64 bits a value and 10 an index, as the paper counts:\n\n"
    report += markdown_table(
        ["1/sigma", "CRNet values", "CRNet bits", "LLMCsiNet M", "LLMCsiNet bits", "1/sigma of eq. 17"],
        [
            [
                row["compression"],
                row["crnet_values"],
                row["crnet_bits"],
                row["llmcsinet_values"],
                row["llmcsinet_bits"],
                1 / row["sigma"],
            ]
            for row in rows
        ],
    )
    report += (
        "\nReal bytes of one report: 32 bits a value, 11 an index (10 tell half of 2,048 positions apart), with its\n"
    )
    report += f"header and checksum; with {VALUE_BITS}-bit Lloyd-Max codes; and CRNet's float32 values alone:\n\n"
    report += markdown_table(
        ["1/sigma", "LLMCsiNet, float32", "LLMCsiNet, codes", "CRNet, float32"],
        [[row["compression"], row["report_bytes"], row["report_bytes_codes"], row["crnet_bytes"]] for row in rows],
    )
    return Outcome(rows, report, None)


def table3(s: Settings) -> Outcome:
    """SGCS of the networks of Fig. 5."""
    rows = main_rows(s)
    return Outcome(rows, f"SGCS:\n\n{by_channels(s, rows, 'sgcs')}", None)


def _cost_table(s: Settings, cost: Callable[[Any], dict[str, int]], what: str) -> Outcome:
    rows = [
        {"label": label, "compression": compression, **cost(network)}
        for compression in s.costs.compressions
        for label, network in costs.networks(s.costs, s.baselines, compression)
    ]
    table = [
        [label, *(f"{row['ue']:,} / {row['bs']:,}" for row in select(rows, label=label))] for label in labels(rows)
    ]
    report = f"{what} at the UE / at the BS, the paper's sizes:\n\n"
    report += markdown_table(["method", *(ratio(compression) for compression in s.costs.compressions)], table)
    return Outcome(rows, report, None)


def table4(s: Settings) -> Outcome:
    """Parameters at the UE and at the BS."""
    return _cost_table(s, costs.parameters, "Parameters")


def table5(s: Settings) -> Outcome:
    """Floating-point operations at the UE and at the BS, counted in one run of each part."""
    outcome = _cost_table(s, costs.operations, "FLOPs of convolutions and matrix products for one sample")
    note = "\nThe paper gives orders of growth. Selecting the codeword takes no matrix product: it is not counted.\n"
    return dataclasses.replace(outcome, report=outcome.report + note)


def _coded(s: Settings, channels: str, compression: int) -> list[FeedbackTask]:
    """The methods of Table VI, and the classical ones."""
    tasks = [s.baseline(name, channels, compression, codes=True) for name in (*s.classical, *s.few)]
    return tasks + [s.variant(name, channels, compression, codes=True) for name in s.sizes.variants]


def table6(s: Settings) -> Outcome:
    """NMSE with the codeword's values quantised by the Lloyd-Max algorithm."""
    rows = s.run(
        [
            task
            for channels in s.sizes.channels
            for compression in s.sizes.compressions
            for task in _coded(s, channels, compression)
        ]
    )
    report = f"{NMSE} with {VALUE_BITS}-bit codes, not trained again:\n\n"
    report += by_channels(s, rows, "nmse_db", condition="codes")
    report += f"\n{NMSE} of the same networks with float32 values:\n\n"
    report += by_channels(s, rows, "nmse_db", condition="clean")
    report += "\nBytes of one report, float32 values and codes:\n\n"
    report += markdown_table(
        ["method", *(ratio(compression) for compression in s.sizes.compressions)],
        [
            [
                label,
                *(
                    " / ".join(
                        str(select(rows, label=label, compression=compression, condition=condition)[0]["report_bytes"])
                        for condition in ("clean", "codes")
                    )
                    for compression in s.sizes.compressions
                ),
            ]
            for label in labels(rows)
        ],
    )
    return Outcome(rows, report, None)


def real_bytes(s: Settings) -> Outcome:
    """NMSE against the bytes of a real report (not in the paper, whose ratios count 64 bits a value and 10 a position).

    Values are float32 or Lloyd-Max codes. With codes a position costs more than its value, so methods that send
    positions get fewer elements for the same bytes than the paper's ratios give them.
    """
    others = sorted(set(feedback_preset("paper").compressions) - set(s.sizes.compressions))
    tasks = []
    for channels in s.sizes.channels:
        for compression in s.sizes.compressions:
            tasks += _coded(s, channels, compression)
        for compression in others:  # classical methods cost no training
            tasks += [s.baseline(name, channels, compression, codes=True) for name in s.classical]
    rows = s.run(tasks)
    panels: dict[str, dict[str, Curve]] = {}
    report = ""
    for channels in s.sizes.channels:
        for condition, values in (("clean", "float32"), ("codes", f"{VALUE_BITS}-bit codes")):
            curves: dict[str, Curve] = {}
            table: list[list[object]] = []
            for label in labels(rows):
                chosen = select(rows, label=label, channels=channels, condition=condition)
                points = sorted((row["report_bytes"], row["nmse_db"]) for row in chosen)
                curves[label] = ([size for size, _ in points], [nmse for _, nmse in points])
                table.append([label, ", ".join(f"{size}: {nmse:.2f}" for size, nmse in points)])
            panels[f"{NMSE}, {channels}, {values}"] = curves
            report += f"{channels}, values as {values}:\n\n"
            report += markdown_table(["method", f"bytes of a report: {NMSE}"], table) + "\n"
    return Outcome(rows, report, drawing(s, "llmcsinet-bytes", panels, "bytes of a report", "NMSE against real bytes"))


def fig6(s: Settings) -> Outcome:
    """Time of the UE's and the BS's part for one sample on this machine, the paper's sizes."""
    rows = [costs.latency(label, network, s.repeats) for label, network in costs.networks(s.costs, s.baselines)]
    names = labels(rows)
    panels: dict[str, dict[str, Curve]] = {
        f"{side} (ms)": {"median": (range(len(names)), [row[f"{side.lower()}_ms"] for row in rows])}
        for side in ("UE", "BS")
    }
    report = f"Milliseconds for one sample on {rows[0]['device']}, median (20% to 80%) of {s.repeats}:\n\n"
    report += markdown_table(
        ["method", "UE", "BS"], [[row["label"], *(costs.spread(row, side) for side in ("ue", "bs"))] for row in rows]
    )
    draw = drawing(
        s, "llmcsinet-fig6", panels, "", "Fig. 6", ticks=[label.replace("LLMCsiNet", "LLM") for label in names]
    )
    return Outcome(rows, report, draw)
