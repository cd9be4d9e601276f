"""Entry point of the ``csimodels`` command: everything that can fail on import is imported inside."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 bad input or usage."""
    try:
        from csimodels.commands import app
    except ModuleNotFoundError as error:
        print(f"error: csimodels needs the package {error.name!r}: pip install 'csikernels[models]'", file=sys.stderr)
        raise SystemExit(1) from None
    app()


if __name__ == "__main__":
    main()
