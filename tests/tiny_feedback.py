"""LLMCsiNet at a size that trains in a moment: 8 x 8 channels, one narrow Transformer layer, few samples."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_llmcsinet import BACKBONE
from tiny_training import channels

from csimodels.channels.angle_delay import angle_delay
from csimodels.channels.hdf5 import write_channels
from csimodels.models.llmcsinet import LlmCsiNetConfig
from csimodels.training.llmcsinet import FeedbackData, FeedbackTraining, Stage, normalize_energy
from csimodels.training.loop import TrainConfig

CONFIG = LlmCsiNetConfig(
    delays=8,
    antennas=8,
    codeword_values=32,
    features=8,
    backbone=BACKBONE,
    quantizer_levels=64,
)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """float32 ``[count, 2, 8, 8]``, normalised, of one built-in environment."""
    return normalize_energy(angle_delay(channels(count, seed=seed), delays=8)[0])


def data(train: int = 64) -> FeedbackData:
    """Training samples and 32 for validation."""
    return FeedbackData(images(train), images(32, seed=1), {"samples": train})


def stage(part: str = "whole", *, epochs: int = 2, frozen: bool = False, **changes) -> Stage:
    """Four steps an epoch."""
    settings = {"batch_size": 16, "learning_rate": 3e-3, "weight_decay": 0.0, "save_every": 3, **changes}
    return Stage(TrainConfig(epochs=epochs, **settings), part, frozen)


def training(*stages: Stage, **changes) -> FeedbackTraining:
    """Algorithm 1 at this size, unless told otherwise."""
    fields = {"model": "llmcsinet", "config": CONFIG, **changes}
    return FeedbackTraining(stages=stages or (stage("preliminary"), stage()), **fields)


def write_site(path: Path, h: torch.Tensor) -> Path:
    """An HDF5 file of complex ``h`` ``[samples, antenna, subcarrier]``."""
    described = {"generator": "test", "parameters": {}, "seed": 0}
    with write_channels(path, antennas=h.shape[1], subcarriers=h.shape[2], **described) as writer:
        writer.append(h, environment=7, los=True)
    return path
