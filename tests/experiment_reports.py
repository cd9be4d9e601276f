"""``csimodels experiment NAME`` in this process, and the tables of the reports that it writes."""

from __future__ import annotations

import json
import re

from command_line import succeed
from matplotlib import image

from csimodels.evaluation.experiments import EXPERIMENTS


def run_experiment(name, out, *, figure=True):
    """Rows and report that the command writes; its record and its figure are checked here."""
    output = succeed("experiment", name, "--out", out)
    record = json.loads((out / f"{name}.json").read_text())
    assert (record["experiment"], record["preset"]) == (name, "laptop")
    report = (out / f"{name}.md").read_text()
    assert report.startswith(f"# {EXPERIMENTS[name].description}\n\nPreset: laptop.\n")
    assert re.sub(r"\s", "", report) in re.sub(r"\s", "", output)
    assert (out / f"{name}.png").exists() == figure
    if figure:
        assert f"wrote {out}/{name}.json, {out}/{name}.md and {out}/{name}.png" in output
        check_figure(out / f"{name}.png")
    else:
        assert f"wrote {out}/{name}.json and {out}/{name}.md" in output
    return record["rows"], report


def check_figure(path):
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02  # not an empty page


def table(report, number=0, start=""):
    """The table of that number after the text ``start``: first cell -> other cells, the header's first."""
    blocks = [block for block in report[report.index(start) :].split("\n\n") if block.startswith("|")]
    lines = [line for line in blocks[number].splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rule)) <= set("-:")
    return {row[0]: row[1:] for row in (header, *rows)}


def table_of(report, start=""):
    """Header of the first table after ``start``, and its other lines: first cell -> other cells."""
    (name, header), *rows = table(report, start=start).items()
    return [name, *header], dict(rows)
