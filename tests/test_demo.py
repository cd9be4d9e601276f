"""The demonstration with tiny models: killed in the middle, continued, and what it then writes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training
from matplotlib import image
from tiny_lasco import SAMPLES, adapt_config
from typer.testing import CliRunner

from csimodels.commands import app
from csimodels.evaluation import demo
from csimodels.evaluation.demo import ALPHAS, ENVIRONMENTS, run_demo
from csimodels.models.lasco import ADAPTED_METHODS, LABELS, METHODS

PAIR = (1201, 1202)
TASKS = 3 * len(PAIR)  # all methods, the LMMSE start, the sweep of alpha
# Stops with one finished task on the row file, and stays so until it is killed.
KILLED = f"""
import sys
from pathlib import Path
from tiny_lasco import SAMPLES, adapt_config
from csimodels.evaluation import demo

def hold(done, total, task):
    print("done", done, flush=True)
    sys.stdin.read()

demo.shipped_checkpoint = dict(zip(("base", "reference"), map(Path, sys.argv[2:4]))).__getitem__
demo.run_demo(
    Path(sys.argv[1]), environments={PAIR}, samples=SAMPLES, config=adapt_config(), workers=1, on_done=hold
)
"""

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def killed(lasco_checkpoints, tmp_path_factory) -> Path:
    """The folder of a demonstration that was killed after its first task; its worker is gone as well."""
    out = tmp_path_factory.mktemp("demo")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), *(str(lasco_checkpoints[name]) for name in ("base", "reference"))],
        env=tiny_training.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "done 1\n"
        workers = children(process.pid)
        assert workers
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    deadline = time.monotonic() + 120
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)
    return out


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class InProcess(concurrent.futures.ThreadPoolExecutor):
    """Tasks run in a thread of this process instead of processes that take seconds to start."""

    def __init__(self, workers, mp_context, initializer):
        super().__init__(1)


@dataclasses.dataclass
class Continued:
    """A demonstration that was killed and continued.

    ``before``: names and rows in its folder at the kill; ``calls``: of the progress callback since; ``report``.
    """

    before: tuple[list[str], list[dict]]
    calls: list[tuple[int, int]]
    report: dict


@pytest.fixture(scope="module")
def continued(killed, lasco_checkpoints) -> Continued:
    before = sorted(path.name for path in killed.iterdir()), row_file(killed)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", InProcess)
        patch.setattr(demo, "shipped_checkpoint", lasco_checkpoints.__getitem__)
        report = run_tiny(killed, calls)
    return Continued(before, calls, report)


@pytest.fixture
def report(continued) -> dict:
    return continued.report


def run_tiny(out: Path, calls: list[tuple[int, int]]) -> dict:
    return run_demo(
        out,
        environments=PAIR,
        samples=SAMPLES,
        config=adapt_config(),
        on_done=lambda count, total, task: calls.append((count, total)),
    )


def row_file(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_killed_demonstration_goes_on_with_what_is_missing(killed, continued):
    names, (kept,) = continued.before
    assert names == ["rows.jsonl"]
    assert continued.calls == [(count, TASKS) for count in range(2, TASKS + 1)]
    rows = row_file(killed)
    assert len(rows) == TASKS
    assert kept in rows  # to the second that it took


def test_a_finished_demonstration_runs_nothing_again(killed, continued, shipped):
    calls = []
    assert run_tiny(killed, calls) == continued.report
    assert calls == []


def test_report_has_the_documented_keys(killed, report):
    written = json.loads((killed / "report.json").read_text())
    assert written == report
    required = {"preset", "codeword_length", "environments", "methods"}
    assert set(written) == required | {"initial_lmmse", "alpha_sweep", "samples"}
    assert (written["preset"], written["codeword_length"]) == ("custom", 256)
    assert written["environments"] == [{"index": 1201, "los": False}, {"index": 1202, "los": True}]
    assert written["samples"] == {"train": 32, "validation": 8, "test": 16}
    frozen, adapted = {"pretrained_lam", "pretrained_sam", "lmmse"}, {"finetuned_sam", "baseline_a", "lasco", "e_lasco"}
    assert set(written["methods"]) == frozen | adapted | {"lasco_no_reference"}
    for name, entry in written["methods"].items():
        keys = {"nmse_db", "nmse_db_pooled", "gcs", "per_environment"}
        keys |= {"epochs", "best_epoch", "seconds"} if name in ADAPTED_METHODS else set()
        keys |= {"alpha"} if name in ("lasco", "e_lasco") else set()
        assert set(entry) == keys, name
        assert set(entry["per_environment"]) == {"1201", "1202"}
        assert all(
            set(value) == keys - {"per_environment", "nmse_db_pooled"} for value in entry["per_environment"].values()
        )


def test_means_are_those_of_the_environments(report):
    for entry in report["methods"].values():
        per = list(entry["per_environment"].values())
        for name in per[0]:
            assert entry[name] == pytest.approx(sum(value[name] for value in per) / 2)
        assert 0 < entry["gcs"] <= 1
        ratio = sum(10 ** (value["nmse_db"] / 10) for value in per) / 2
        assert entry["nmse_db_pooled"] == pytest.approx(10 * math.log10(ratio))


def test_alpha_sweep_holds_the_standard_alpha_too(report):
    for index in PAIR:
        sweep = report["alpha_sweep"][str(index)]
        assert sorted(map(float, sweep)) == sorted(ALPHAS)
        assert sweep["0.7"] == report["methods"]["lasco"]["per_environment"][str(index)]["nmse_db"]
        assert len(set(sweep.values())) == len(ALPHAS)


def test_lmmse_start_is_reported_beside_the_methods_not_among_them(report):
    assert set(report["initial_lmmse"]) == {"pretrained_lam", "finetuned_sam", "e_lasco"}
    for name, entry in report["initial_lmmse"].items():
        assert entry["nmse_db"] != report["methods"][name]["nmse_db"]


def test_report_for_readers_names_every_method_and_environment(killed, report):
    text = (killed / "report.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert "env 1201 NLOS" in header
    assert "env 1202 LOS" in header
    assert "16 test samples after adaptation with 32 samples" in text
    for name in METHODS:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {LABELS[name]} |"))
        entry = report["methods"][name]
        value = entry["per_environment"]["1202"]
        assert f"| {entry['nmse_db']:.2f} |" in row
        assert f"| {value['nmse_db']:.2f} / {value['gcs']:.3f} |" in row
    assert all(f"| {LABELS[name]}, LMMSE start |" in text for name in report["initial_lmmse"])
    assert all(f"({name}.png)" in text for name in ("methods", "alpha", "channels"))


def test_figures_are_drawn(killed, report):
    for name in ("methods", "alpha", "channels"):
        pixels = image.imread(killed / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.02, name


def test_command_prints_one_table_of_all_methods(killed, monkeypatch, report):
    seen = {}

    def stored(out, *, workers, on_done):
        seen.update(out=out, workers=workers)
        return report

    monkeypatch.setattr(demo, "run_demo", stored)
    result = CliRunner().invoke(app, ["demo", "--out", str(killed), "--workers", "3"])
    assert result.exit_code == 0, result.output
    assert seen == {"out": killed, "workers": 3}
    for name in METHODS:
        label = re.escape(LABELS[name])
        (line,) = (line for line in result.stdout.splitlines() if re.match(rf"\W {label} +\W ", line))
        assert f"{report['methods'][name]['nmse_db']:.2f}" in line
    assert f"wrote {killed}/report.json, report.md, methods.png, alpha.png and channels.png" in result.stdout


def test_environments_are_fresh_and_of_both_kinds():
    assert len(ENVIRONMENTS) >= 4
    assert {index % 2 for index in ENVIRONMENTS} == {0, 1}
    assert min(ENVIRONMENTS) > 1110
    assert max(ENVIRONMENTS) < 5001
