"""The two sizes at which LASCO is pre-trained: ``paper`` (section IV) and ``laptop`` (over an hour on two cores)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from csimodels.channels.environment import Environment
from csimodels.channels.presets import data_preset, split_811
from csimodels.channels.source import EnvironmentSource, FixedSource
from csimodels.models.channel_transformer import TransformerConfig
from csimodels.models.projection import CodecConfig
from csimodels.options import replace_given
from csimodels.training.loop import Batch, TrainConfig
from csimodels.training.pretrain import PretrainTask

PRESETS = ("laptop", "paper")
MODELS = ("base", "reference")
CELL_SEED = 0
LAPTOP_CODEWORD_LENGTH = 256
# Second half of a laptop pre-training, from the weights of the first: `make demo-checkpoints`.
SECOND_STAGE: dict[str, Any] = {"epochs": 8, "learning_rate": 5e-4}
# Disjoint from every environment that the presets, the experiments or the demonstration use.
_CONTINUED_ENVIRONMENTS, _CONTINUED_SAMPLES = range(5001, 9001), 25
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


def pretrain_data(preset: str, *, continued: bool = False) -> PretrainData:
    """Pre-training channels of the built-in generator, as :mod:`csimodels.channels.presets` describes them.

    ``laptop``: fresh positions in each epoch, validated on environments never trained on. ``continued`` takes 4,000
    other environments, so that longer training also means more variety. ``paper``: all samples pooled and split 8:1:1
    (8 GB of memory).
    """
    check_preset(preset)
    chosen = data_preset(preset)
    description: dict[str, Any] = {"generator": "builtin", "cell_seed": CELL_SEED}

    def draw(environments: range, samples: int) -> torch.Tensor:
        return torch.cat([Environment(chosen.cell, index, CELL_SEED).sample(samples) for index in environments])

    if not chosen.fresh_positions:
        pooled = draw(chosen.pretraining, chosen.pretraining_samples)
        span = {"environments": _span(chosen.pretraining), "positions": chosen.pretraining_samples}
        return split_data(pooled, description | span)
    environments, samples = chosen.pretraining, chosen.pretraining_samples
    if continued:
        environments, samples = _CONTINUED_ENVIRONMENTS, _CONTINUED_SAMPLES
    description |= {
        "environments": _span(environments),
        "positions_per_environment_and_epoch": samples,
        "validation_environments": _span(chosen.validation),
        "validation_positions": chosen.validation_samples,
    }
    source = EnvironmentSource(chosen.cell, CELL_SEED, environments, samples)
    return PretrainData(source, draw(chosen.validation, chosen.validation_samples), description)


def _span(indices: range) -> str:
    return f"{indices[0]}-{indices[-1]}"


def split_data(h: torch.Tensor, description: dict[str, Any]) -> PretrainData:
    """Pool, permute and split 8:1:1 (section IV-A); the last tenth, the test split, is left alone."""
    train, validation, _ = split_811(len(h), seed=0)
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
    config = replace_given(config, **train)
    return PretrainTask(architecture, CodecConfig(codeword_length=codeword_length), config, initial_checkpoint)
