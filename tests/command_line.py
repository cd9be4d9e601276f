"""``csimodels`` in this process, for tests."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from csimodels.commands import app


def run(*arguments: object):
    """Exit code, stdout and stderr of ``csimodels ARGUMENTS``, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeed(*arguments: object) -> str:
    code, out, err = run(*arguments)
    assert code == 0, err
    return out


def refuse(*arguments: object, code: int = 2) -> str:
    """The one line on stderr with which the command ends, without its ``error:``."""
    found, out, err = run(*arguments)
    assert found == code, (out, err)
    lines = [line for line in err.splitlines() if not re.match(r"\w.* ━+", line)]  # but a progress bar
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
