"""Run all tests and benches on this machine's GPU and write one Markdown file under benches/results/.

The benches run once on each op's default backend and, where that is CUDA, once more in Triton: which one should be the
default is for these numbers to say.

Usage: ``python benches/gpu_report.py [--output FILE]``. Exits with 1 and a message where there is no GPU, and with 1
after writing the report when a test or a bench failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from table import bench_rows, commit, markdown, output_of

import csikernels

ROOT = Path(__file__).resolve().parent.parent


def run_pytest(arguments: list[str], report: Path, **environment: str) -> int:
    """Run pytest in the source tree, its output shown as it comes, and leave a JUnit file at ``report``."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def run_benches(folder: Path, backend: str) -> tuple[int, tuple[str, list[str]], str]:
    """The exit status, the summary of the run, and the table of its timings; an empty name is each op's default."""
    report, timings = folder / f"benches{backend}.xml", folder / f"timings{backend}.json"
    chosen = {"CSIKERNELS_BACKEND": backend} if backend else {}
    failed = run_pytest(["benches", "--benchmark-only", f"--benchmark-json={timings}"], report, **chosen)
    results = json.loads(timings.read_text()) if timings.exists() and timings.stat().st_size else {"benchmarks": []}
    rows = bench_rows(results)
    return failed, summarise_tests(report), markdown(rows) if rows else "No bench ran."


def summarise_tests(report: Path) -> tuple[str, list[str]]:
    """A JUnit file -> one line of counts, and a line for each test that failed or was skipped."""
    counts: dict[str, int] = defaultdict(int)
    notes = []
    for case in ET.parse(report).getroot().iter("testcase"):
        outcome, detail = "passed", None
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"failure": "failed"}.get(child.tag, child.tag)
                detail = (child.get("message") or "").strip().splitlines()
        counts[outcome] += 1
        if detail is not None:
            notes.append(f"{outcome}: `{case.get('classname')}::{case.get('name')}`: {detail[0] if detail else ''}")
    line = ", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "error", "skipped") if counts[key])
    return line or "no test ran", sorted(notes)


def machine_table() -> str:
    """What the numbers depend on: GPU, driver, versions, commit."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    info = csikernels.build_info()
    rows = {
        "GPU": f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}, {properties.multi_processor_count} SMs",
        "driver": next(iter(output_of(query).splitlines()), "unknown"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "csikernels": f"{info['version']} at {commit()}",
        "extension": f"CUDA {info['cuda']}: {', '.join(info['cuda_archs'])}"
        if info["cuda"]
        else f"{info['cuda_reason']}",
        "triton": info["triton"] or "not installed",
        "CPU capability": info["cpu_capability"] or "no extension",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def render(machine: str, sections: Iterable[tuple[str, str, list[str]]], timings: dict[str, str]) -> str:
    """The report; ``sections`` are (title, line of counts, notes), ``timings`` tables by their title."""
    parts = ["# GPU report", machine]
    for title, line, notes in sections:
        parts.append("\n".join([f"## {title}", "", line, *(["", *(f"- {note}" for note in notes)] if notes else [])]))
    parts += [f"## {title}\n\nMedians of interleaved rounds.\n\n{table}" for title, table in timings.items()]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="the Markdown file (default: named after the GPU and the commit)")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        print(f"gpu-report: nothing was run: {why} (torch {torch.__version__})", file=sys.stderr)
        return 1
    titles = {"": ""} | ({"triton": " in Triton"} if csikernels.build_info()["cuda"] else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failed = run_pytest(["tests"], folder / "tests.xml")
        sections, tables = [("Tests", *summarise_tests(folder / "tests.xml"))], {}
        for backend, title in titles.items():
            status, summary, tables[f"Timings{title}"] = run_benches(folder, backend)
            sections.append((f"Benches{title}", *summary))
            failed |= status
    if output is None:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
        output = ROOT / "benches" / "results" / f"{gpu}-{commit().split()[0]}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(machine_table(), sections, tables))
    print(f"gpu-report: wrote {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
