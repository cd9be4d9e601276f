"""The report of make gpu-report, as far as it can be checked without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benches" / "gpu_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    output = tmp_path / "report.md"
    shown = subprocess.run([sys.executable, SCRIPT, "--output", output], capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.startswith("gpu-report: nothing was run: ")
    assert len(shown.stderr.splitlines()) == 1
    assert not output.exists()


def test_test_summary_counts_and_names(report, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): raise RuntimeError('first line\\nsecond line')\n"
        "def test_left_out(): pytest.skip('no reason')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('disk')\n"
        "def test_error(broken): pass\n"
    )
    xml = tmp_path / "out.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert run.returncode == 1
    line, notes = report.summarise_tests(xml)
    assert line == "1 passed, 1 failed, 1 error, 1 skipped"
    assert len(notes) == 3
    assert "failed: `test_it::test_bad`: RuntimeError: first line" in notes
    assert "skipped: `test_it::test_left_out`: no reason" in notes


def test_the_machine_is_described(report, monkeypatch):
    card = SimpleNamespace(name="NVIDIA X", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = report.machine_table()
    assert "| GPU | 2 x NVIDIA X, 80 GiB |" in text
    assert "| compute capability | 9.0, 132 SMs |" in text
    assert f"| torch | {torch.__version__} " in text


def test_the_report_has_every_part(report):
    text = report.render(
        "| GPU | X |",
        [("Tests", "3 passed", []), ("Benches", "1 failed", ["failed: `a`: b"])],
        {"Timings": "FIRST", "Timings in Triton": "SECOND"},
    )
    assert text.startswith(
        "# GPU report\n\n| GPU | X |\n\n## Tests\n\n3 passed\n\n## Benches\n\n1 failed\n\n- failed: `a`: b"
    )
    assert text.endswith(
        "## Timings\n\nMedians of interleaved rounds.\n\nFIRST\n\n"
        "## Timings in Triton\n\nMedians of interleaved rounds.\n\nSECOND\n"
    )


@pytest.mark.parametrize("has_cuda", [True, False])
def test_it_runs_all_tests_and_the_benches_on_every_backend(report, monkeypatch, tmp_path, has_cuda):
    runs = []

    def run_pytest(arguments, junit, **environment):
        runs.append((arguments[0], environment))
        junit.write_text("<testsuite><testcase classname='c' name='n'/></testsuite>")
        return len(runs) == 2

    output = tmp_path / "report.md"
    monkeypatch.setattr(report, "run_pytest", run_pytest)
    monkeypatch.setattr(report, "machine_table", lambda: "| GPU | X |")
    monkeypatch.setattr(report.csikernels, "build_info", lambda: {"cuda": "13.0" if has_cuda else None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--output", str(output)])
    assert report.main() == 1, "a bench failed"
    again = [("benches", {"CSIKERNELS_BACKEND": "triton"})] if has_cuda else []
    assert runs == [("tests", {}), ("benches", {}), *again]
    assert output.read_text().count("No bench ran.") == len(runs) - 1
