"""Load the compiled extension, or remember why it is not there.

Importing :mod:`csikernels` must work without a compiler, so a missing extension is not an error. A *broken* one (built
against another torch, say) is not hidden either: the reason is kept and shown by ``build_info()`` and by
``use_backend("cpp")``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

# torch first: the extension links against its libraries and shares its OpenMP pool.
import torch

_BUILD_RECORD = Path(__file__).with_name("_build.json")


def build_record() -> dict:
    """What ``setup.py`` wrote down at build time (``{}`` in a source tree that was never built)."""
    try:
        return json.loads(_BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("csikernels._C")
    except ModuleNotFoundError as error:
        if error.name != "csikernels._C":
            raise
        return None, build_record().get("reason") or "the extension csikernels._C was not built"
    except ImportError as error:
        versions = f"built with torch {build_record().get('torch', 'unknown')}, running {torch.__version__}"
        return None, f"csikernels._C failed to load ({versions}): {error}"
    module.cpu_capability()  # a wrong CSIKERNELS_CPU_CAPABILITY is said now, not by the first op
    return module, None


extension, missing_reason = _load()
