"""Checkpoints shipped in the package: a small base LAM and reference SAM for M = 256 (``make demo-checkpoints``)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from csimodels.training.lasco_presets import MODELS


def shipped_folder() -> Path:
    """Where the shipped checkpoints and their training logs lie."""
    return Path(str(resources.files("csimodels"))) / "assets" / "lasco"


def shipped_checkpoint(model: str) -> Path:
    """The shipped ``"base"`` LAM or ``"reference"`` SAM.

    Raises:
        ValueError: another name.
        FileNotFoundError: the installation lacks the file.
    """
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    path = shipped_folder() / f"{model}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the shipped checkpoint is missing; `make demo-checkpoints` trains it again")
    return path
