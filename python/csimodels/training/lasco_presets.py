"""The two sizes at which LASCO is pre-trained: ``paper`` (section IV) and ``laptop`` (an hour on two CPU cores)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.source import EnvironmentSource, FixedSource
from csimodels.models.channel_transformer import TransformerConfig
from csimodels.models.projection import CodecConfig
from csimodels.training.loop import Batch, TrainConfig
from csimodels.training.pretrain import PretrainTask

PRESETS = ("laptop", "paper")
MODELS = ("base", "reference")
CELL_SEED = 0
LAPTOP_CODEWORD_LENGTH = 256
_WARM_START_EPOCHS = 3
_WARM_START_LEARNING_RATE = 3e-4


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """Training source (epoch -> channels), validation channels and a description for the log."""

    source: Callable[[int], Batch]
    validation: torch.Tensor
    description: dict[str, Any]


def check_preset(preset: str) -> None:
    """Raise ``ValueError`` unless ``preset`` exists."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")


def pretrain_data(preset: str) -> PretrainData:
    """Pre-training channels of the built-in generator.

    ``laptop``: 1,000 environments, 100 new positions in each per epoch; validation on 40 environments never trained on.
    ``paper``: environments 1 to 100 with 10,000 positions each, pooled and split 8:1:1 (8 GB of memory).
    """
    check_preset(preset)
    cell = CellConfig()
    if preset == "laptop":
        validation = torch.cat([Environment(cell, index, CELL_SEED).sample(50) for index in range(1001, 1041)])
        description = {
            "generator": "builtin",
            "cell_seed": CELL_SEED,
            "environments": "1-1000",
            "positions_per_environment_and_epoch": 100,
            "validation_environments": "1001-1040",
            "validation_positions": 50,
        }
        return PretrainData(EnvironmentSource(cell, CELL_SEED, range(1, 1001), 100), validation, description)
    h = torch.cat([Environment(cell, index, CELL_SEED).sample(10_000) for index in range(1, 101)])
    return split_data(h, {"generator": "builtin", "cell_seed": CELL_SEED, "environments": "1-100", "positions": 10_000})


def split_data(h: torch.Tensor, description: dict[str, Any]) -> PretrainData:
    """Pool, permute and split 8:1:1 (section IV-A); the last tenth, the test split, is left alone."""
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    train, validation = order[: len(h) * 8 // 10], order[len(h) * 8 // 10 : len(h) * 9 // 10]
    if len(validation) == 0:
        raise ValueError(f"h: expected at least 10 samples to split 8:1:1, got {len(h)}")
    return PretrainData(FixedSource(h[train]), h[validation], {**description, "split": "8:1:1"})


def pretrain_task(
    model: str,
    preset: str,
    codeword_length: int,
    *,
    sam_layers: int = 2,
    sam_width: int = 64,
    initial_checkpoint: str | None = None,
    **train: Any,
) -> PretrainTask:
    """The pre-training of one model.

    Args:
        model: ``"base"`` (the LAM) or ``"reference"`` (the SAM).
        preset: ``"laptop"`` or ``"paper"``.
        codeword_length: M.
        sam_layers, sam_width: size of the reference SAM (Fig. 10).
        initial_checkpoint: continue from a model of another codeword length: 3 epochs at a lower learning rate.
        train: changes to the preset's :class:`TrainConfig`, None meaning unchanged.
    """
    check_preset(preset)
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    if model == "reference":
        architecture = TransformerConfig.sam(sam_layers, sam_width)
    else:
        architecture = TransformerConfig.lam_paper() if preset == "paper" else TransformerConfig.lam_laptop()
    if preset == "paper":
        config = TrainConfig(epochs=500, batch_size=256, mixed_precision="auto")
    else:
        config = TrainConfig(epochs=16, batch_size=128, mixed_precision="auto")
    if initial_checkpoint is not None:
        config = dataclasses.replace(config, epochs=_WARM_START_EPOCHS, learning_rate=_WARM_START_LEARNING_RATE)
    config = dataclasses.replace(config, **{name: value for name, value in train.items() if value is not None})
    return PretrainTask(architecture, CodecConfig(codeword_length=codeword_length), config, initial_checkpoint)
