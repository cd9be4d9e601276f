"""What the commands share on the terminal: one-line errors with exit codes, progress bars, score tables."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from csimodels.models.lasco import LABELS

console = Console()
errors = Console(stderr=True)
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores")]

# typer brings its own click or uses the installed one, depending on its version; this finds the right base class.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class OneLineErrors(TyperGroup):
    """A command group whose usage errors take one line on stderr, like every other error; exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As the base class's; returns to the caller only without ``standalone_mode``."""
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except _ClickException as error:
            message = error.format_message()
            if message:  # empty after the help that a bare command prints
                context = getattr(error, "ctx", None)
                command = "csimodels" if context is None else context.command_path
                _print_error(f"{message.rstrip('.')} (see {command} --help)")
            sys.exit(error.exit_code)
        except typer.Abort:
            _print_error("aborted")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn expected failures into one line on stderr and an exit code: 2 for bad input, 1 for the rest."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        ImportError,
    ) as error:
        _print_error(_message(error))
        raise typer.Exit(2) from None
    except (RuntimeError, OSError, FloatingPointError) as error:
        _print_error(_message(error))
        raise typer.Exit(1) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _print_error(message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields ``update(done, total, detail="")``. Silent in all but the first process."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, disable=os.environ.get("RANK", "0") != "0") as bars:
        bar = bars.add_task(description, total=None)

        def update(done: int, total: int, detail: str = "") -> None:
            bars.update(bar, completed=done, total=total, description=f"{description} {detail}".rstrip())

        yield update


@contextlib.contextmanager
def training_progress(
    description: str, told: Callable[[float], str] = "loss {:.4f}".format
) -> Iterator[Callable[[int, int, float], None]]:
    """:func:`progress` of a training; yields its ``on_step(step, total_steps, loss)``. ``told`` says what a loss is."""
    with progress(description) as update:
        yield lambda step, total, loss: update(step, total, told(loss))


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """A table of methods with ``nmse_db`` and ``gcs``, and ``epochs`` and ``alpha`` where they have them."""
    table = Table("method", "NMSE (dB)", "GCS", "epochs", "alpha")
    for name, score in scores.items():
        epochs, alpha = score.get("epochs"), score.get("alpha")
        table.add_row(
            LABELS[name],
            f"{score['nmse_db']:.2f}",
            f"{score['gcs']:.3f}",
            "-" if epochs is None else str(epochs),
            "-" if alpha is None else f"{alpha:.2f}",
        )
    console.print(table)
