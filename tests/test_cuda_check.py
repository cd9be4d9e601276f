"""When make cuda-check, a part of CI, does its work and when it says that it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "cuda-check"


@pytest.fixture
def check(tmp_path):
    """``check(free_gb)``: the script in an empty folder with so much disk; its commands are those in ``bin``."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    (tmp_path / "bin").mkdir()

    def command(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(free_gb: int, *, nvcc: bool = True) -> subprocess.CompletedProcess:
        for name in ("dirname", "tail", "tr", "env", "bash"):
            found = shutil.which(name)
            assert found is not None
            command(name, f'exec {found} "$@"')
        command("df", f"echo Avail; echo ' {free_gb}G'")
        command("python3", 'echo "python3 $*"; exit 7')
        if nvcc:
            command("nvcc", "exit 0")
        environment = {**os.environ, "PATH": str(tmp_path / "bin"), "PYTHON": "python3"}
        return subprocess.run([str(tmp_path / ".ci" / "cuda-check")], env=environment, capture_output=True, text=True)

    return run


def test_without_a_compiler_it_is_skipped(check):
    done = check(100, nvcc=False)
    assert (done.returncode, done.stdout) == (0, "cuda-check: skipped: nvcc was not found\n"), done.stderr


def test_without_room_for_torch_it_is_skipped(check):
    done = check(14)
    assert done.stdout == "cuda-check: skipped: 14 GB of disk are free, 15 GB are needed\n", done.stderr
    assert done.returncode == 0


def test_with_room_it_starts_and_a_failure_fails(check):
    done = check(15)
    assert (done.returncode, done.stdout) == (7, "python3 -m venv .venv-cuda\n"), done.stderr


def test_an_environment_that_is_there_needs_no_room(check, tmp_path):
    python = tmp_path / ".venv-cuda" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho $*; exit 9\n")
    python.chmod(0o755)
    done = check(1)
    assert done.returncode == 9 and done.stdout.startswith("-m pip install --quiet torch=="), done.stdout


def test_ci_runs_it():
    commands = (SCRIPT.parent / "run").read_text().splitlines()
    assert "cuda-check" in commands[-1].split()
