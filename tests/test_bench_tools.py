"""The interleaved comparison that all benches use, and the table made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import table
import torch
from compare import compare, measured_peak

from csikernels import _load

BENCHES = Path(table.__file__).parent


class Recorder:
    """Stands in for pytest-benchmark's fixture: rounds as `pedantic` runs them."""

    def __init__(self):
        self.extra_info, self.group = {}, None

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()


def test_every_round_runs_every_implementation_once_warm():
    calls = []
    benchmark = Recorder()
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    compare(benchmark, "op, size", {"a": functions["a"]}, {name: functions[name] for name in "bc"},
            check=lambda name, result: None, calls=2, rounds=4)  # fmt: skip
    assert calls[:3] == ["a", "b", "c"]  # the check
    rounds = ["".join(calls[3 + 12 * i : 15 + 12 * i]) for i in range(4)]
    assert rounds == ["bbbbccccaaaa", "ccccbbbbaaaa"] * 2  # two calls to warm, two timed
    assert benchmark.group == "op"
    assert benchmark.extra_info["ours"] == ["a"]
    assert set(benchmark.extra_info["seconds"]) == {"a", "b", "c"}
    assert all(times["median"] > 0 for times in benchmark.extra_info["seconds"].values())


def test_a_wrong_result_is_not_timed():
    benchmark = Recorder()

    def check(name, result):
        assert result == 1, name

    with pytest.raises(AssertionError, match="wrong"):
        compare(benchmark, "op", {"right": lambda: 1}, {"wrong": lambda: 2}, check=check)
    assert not benchmark.extra_info


def test_names_of_ours_and_peers_differ():
    with pytest.raises(ValueError, match="the name of a peer"):
        compare(Recorder(), "op", {"x": int}, {"x": int}, check=lambda name, result: None)


@pytest.mark.skipif(_load.extension is None, reason=f"no extension: {_load.missing_reason}")
def test_peaks_are_measured_or_none():
    assert measured_peak("float32") > 1e9
    assert measured_peak("float99") is None


INFO = {
    "case": "op, N=3",
    "ours": ["fast", "slow"],
    "flops": 2e6,
    "bytes": 1e6,
    "peaks": {"fast": ["float32", 4e9], "slow": ["dram", None]},
    "seconds": {name: {"median": t, "iqr": t / 10} for name, t in
                {"fast": 1e-3, "slow": 2e-3, "eager": 8e-3, "compiled": 3e-3}.items()},
}  # fmt: skip


def test_rows_have_rates_fractions_and_ratios():
    rows = table.bench_rows({"benchmarks": [{"extra_info": {}}, {"extra_info": INFO}]})
    assert rows == [
        ["op, N=3", "fast", "1,000.0", "100.0", "2.0 GFLOP/s", "50% of float32", "3.00x compiled; 8.00x eager"],
        ["op, N=3", "slow", "2,000.0", "200.0", "0.5 GB/s", "", "1.50x compiled; 4.00x eager"],
    ]
    head, rule, *lines = table.markdown(rows).splitlines()
    assert head.count("|") == rule.count("|") == lines[0].count("|") == 8


def test_the_script_prints_and_writes(tmp_path):
    source = tmp_path / "bench.json"
    source.write_text(json.dumps({"benchmarks": [{"extra_info": INFO}]}))
    shown = subprocess.run(
        [sys.executable, BENCHES / "table.py", source, "--output", tmp_path / "results"], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "3.00x compiled; 8.00x eager" in shown.stdout
    written, medians = sorted((tmp_path / "results").iterdir(), reverse=True)
    assert written.suffix == ".md"
    assert f"- torch: {torch.__version__}" in written.read_text()
    assert "| fast |" in written.read_text()
    assert json.loads(medians.read_text())["benches"] == [INFO]
