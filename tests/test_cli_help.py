"""The command line's help, what it says of the installation, and the installed console script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run, succeed
from tiny_training import environment

import csikernels

COMMANDS = ("info", "generate", "pretrain", "adapt", "evaluate", "train", "encode", "decode", "experiment", "demo")


GROUPS = {"codebook": ("make", "show"), "feedback": ("encode", "decode")}


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{group} {name}" for group in GROUPS for name in GROUPS[group])])
def test_every_command_has_help_that_explains_every_option(command):
    out = succeed(*command.split(), "--help")
    assert f"Usage: csimodels {command}" in out
    assert f"Example: csimodels {command}" in out
    parameters = re.findall(r"^│ [* ]? *(--[\w-]+|\w+) (.*)│$", out, re.MULTILINE)
    for name, rest in parameters:
        text = re.sub(r"(--[\w-]+|<\w+>|INTEGER|TEXT|PATH|FLOAT|FILE|DIRECTORY|RANGE|\[.*?\]|-\w\b)", "", rest)
        assert len(text.split()) >= 2 or name == "--help", f"{name}: {rest}"


def test_help_lists_the_commands_and_where_to_start():
    out = succeed("--help")
    assert all(re.search(rf"^│ {command} +\w", out, re.MULTILINE) for command in (*COMMANDS, *GROUPS))
    assert "csimodels demo" in out


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_lists_its_commands(group):
    out = succeed(group, "--help")
    assert all(re.search(rf"^│ {command} +\w", out, re.MULTILINE) for command in GROUPS[group])


@pytest.mark.parametrize("group", [(), *((group,) for group in GROUPS)], ids=str)
def test_without_a_command_the_help_is_shown(group):
    code, out, err = run(*group)
    assert code == 2
    assert "Usage:" in out + err
    assert "error:" not in out + err


def test_info_shows_builds_backends_and_extras():
    out = succeed("info")
    assert re.search(rf"version +│ {re.escape(csikernels.build_info()['version'])} ", out)
    assert re.search(rf"torch +│ {re.escape(torch.__version__)} ", out)
    for op, devices in csikernels.backends().items():
        assert re.search(rf" {op} +│ {', '.join(devices['cpu'])} ", out)
    for extra in ("sionna", "raytracing", "llm", "cuda"):
        assert re.search(rf" {extra} +│ (yes|no: pip install 'csikernels\[{extra}\]') ", out)


# The installed command ------------------------------------------------------------------------------------------------


def console_script(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    script = Path(sys.executable).with_name("csimodels")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "csimodels.cli"]
    return subprocess.run(
        [*command, *map(str, arguments)], env={**environment(), **variables}, capture_output=True, text=True
    )


def test_the_console_script_reports_through_its_exit_code(tmp_path):
    bad = console_script("evaluate", "--data", tmp_path / "no.h5")
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", f"error: {tmp_path}/no.h5: no such file\n")
    good = console_script("generate", tmp_path / "a.h5", "--environments", 1301, "--samples", 2)
    assert good.returncode == 0, good.stderr
    assert good.stdout == f"wrote 2 samples of 1 environment to {tmp_path}/a.h5\n"


def test_a_missing_dependency_is_named(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    paths = environment()["PYTHONPATH"]
    result = console_script("info", PYTHONPATH=f"{tmp_path}:{paths}")
    expected = "error: csimodels needs the package 'typer': pip install 'csikernels[models]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)
