"""Turn the JSON of the benches into one table.

Usage: ``python benches/table.py JSON [--output FOLDER]``. Prints the table; with ``--output`` also writes it as
Markdown, beside the medians as JSON, into files named after the CPU and the commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
from pathlib import Path

import torch

import csikernels

ROOT = Path(__file__).resolve().parent.parent
HEAD = ["case", "implementation", "us", "IQR us", "rate", "of peak", "faster than the peers"]


def bench_rows(results: dict) -> list[list[str]]:
    """pytest-benchmark's JSON -> the rows of the table, in the order in which the benches ran."""
    return [row for bench in results["benchmarks"] if "case" in bench["extra_info"] for row in rows_of(bench)]


def rows_of(bench: dict) -> list[list[str]]:
    """One line per implementation of ours; the last column has every peer."""
    info = bench["extra_info"]
    rows = []
    for name in info["ours"]:
        own = info["seconds"][name]
        peers = {
            peer: times["median"] / own["median"] for peer, times in info["seconds"].items() if peer not in info["ours"]
        }
        rate, fraction = _rate(info, name, own["median"])
        against = "; ".join(f"{ratio:.2f}x {peer}" for peer, ratio in sorted(peers.items(), key=lambda item: item[1]))
        rows.append(
            [info["case"], name, _microseconds(own["median"]), _microseconds(own["iqr"]), rate, fraction, against]
        )
    return rows


def _rate(info: dict, name: str, seconds: float) -> tuple[str, str]:
    """GFLOP/s or GB/s, and the fraction of the measured peak."""
    kind, peak = info["peaks"][name]
    done, unit = (info["bytes"], "GB/s") if kind == "dram" else (info["flops"], "GFLOP/s")
    if not done:
        return "", ""
    rate = done / seconds
    return f"{rate / 1e9:.1f} {unit}", f"{rate / peak:.0%} of {kind}" if peak else ""


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def markdown(rows: list[list[str]]) -> str:
    """A GitHub table, its numbers to the right."""
    rule = ["---:" if title in ("us", "IQR us", "rate", "of peak") else "---" for title in HEAD]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, rule, *rows))


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    info = csikernels.build_info()
    return {
        "CPU": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "capability": info["cpu_capability"] or "no extension",
        "torch": torch.__version__,
        "compiler": str(info.get("compiler")),
        "csikernels": f"{info['version']} at {commit()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    """The model, with family and number: hypervisors shorten the name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    if "model name" not in fields:
        return "unknown CPU"
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def commit() -> str:
    """The short commit, with a mark when tracked files differ from it."""
    name = output_of(["git", "rev-parse", "--short", "HEAD"]).strip() or "an unknown commit"
    return name + (" with local changes" if output_of(["git", "status", "--porcelain", "--untracked-files=no"]) else "")


def output_of(command: list[str]) -> str:
    """What a command prints; nothing where it does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--output", type=Path, help="folder for the table and the medians")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text())
    rows = bench_rows(results)
    _print(rows)
    if arguments.output:
        about = machine()
        name = "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (about["CPU"], commit()))
        lines = "\n".join(f"- {key}: {value}" for key, value in about.items())
        _write(arguments.output / f"{name}.md", f"# Benches\n\n{lines}\n\n{markdown(rows)}\n")
        medians = {"machine": about, "benches": [bench["extra_info"] for bench in results["benchmarks"]]}
        _write(arguments.output / f"{name}.json", json.dumps(medians, indent=1) + "\n")


def _print(rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD)
    for row in rows:
        table.add_row(*row)
    Console(width=200 if not Console().is_terminal else None).print(table)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    main()
