"""The pre-trained models that the LASCO experiments need: shipped, found in a folder, or trained there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from csimodels.assets import shipped_checkpoint
from csimodels.files import digest
from csimodels.training.lasco_presets import LAPTOP_CODEWORD_LENGTH, SECOND_STAGE, pretrain_data, pretrain_task
from csimodels.training.loop import make_accelerator
from csimodels.training.pretrain import pretrain

STANDARD_SAM = (2, 64)


class CheckpointStore:
    """Resolves ``(model, codeword_length, sam_layers, sam_width)`` to a checkpoint file.

    At the laptop preset the shipped pair serves M = 256, and models for other codeword lengths start from it (a few
    epochs instead of all). Whatever is missing is pre-trained into ``folder``; a run that is killed goes on from its
    last state.

    Args:
        folder: of the checkpoints trained here.
        preset: ``laptop`` or ``paper``.
        on_start: called with a description before a model is pre-trained.
        on_step: progress of pre-training, ``(step, total_steps, loss)``.
    """

    def __init__(
        self,
        folder: Path,
        preset: str,
        *,
        on_start: Callable[[str], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ):
        self.folder, self.preset, self.on_start, self.on_step = folder, preset, on_start, on_step

    def __call__(self, model: str, codeword_length: int, sam_layers: int = 2, sam_width: int = 64) -> str:
        """The checkpoint's path, pre-training it first if need be."""
        sized = model == "reference" and (sam_layers, sam_width) != STANDARD_SAM
        shipped = self.preset == "laptop" and not sized
        if shipped and codeword_length == LAPTOP_CODEWORD_LENGTH:
            return str(shipped_checkpoint(model))
        detail = f"-{sam_layers}x{sam_width}" if sized else ""
        if shipped:
            # Models that start from the shipped one are stale when that is trained anew.
            detail = f"-from-{digest(shipped_checkpoint(model))[:8]}"
        run_dir = self.folder / f"{self.preset}-{model}-m{codeword_length}{detail}"
        path = run_dir / "model.safetensors"
        if not path.exists():
            changes: dict[str, Any] = {"sam_layers": sam_layers, "sam_width": sam_width}
            if shipped:
                changes["initial_checkpoint"] = str(shipped_checkpoint(model))
            elif self.preset == "laptop":
                # In two stages, as the shipped models were, so that they can be compared.
                first = self._pretrain(run_dir / "first", model, codeword_length, changes)
                changes |= {"initial_checkpoint": str(first), **SECOND_STAGE}
            self._pretrain(run_dir, model, codeword_length, changes)
        return str(path)

    def _pretrain(self, run_dir: Path, model: str, codeword_length: int, changes: dict[str, Any]) -> Path:
        path = run_dir / "model.safetensors"
        if path.exists():
            return path
        if self.on_start is not None:
            self.on_start(f"pre-training {run_dir.relative_to(self.folder)} ({self.preset} preset)")
        task = pretrain_task(model, self.preset, codeword_length, **changes)
        data = pretrain_data(self.preset, continued=task.initial_checkpoint is not None)
        pretrain(
            task,
            data.source,
            data.validation,
            run_dir,
            accelerator=make_accelerator(task.train),
            data_description=data.description,
            on_step=self.on_step,
        )
        return path
