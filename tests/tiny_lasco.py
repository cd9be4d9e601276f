"""LASCO at a size that adapts in a moment: small checkpoints for 32 x 32 channels, few samples and epochs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.source import FixedSource
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig
from csimodels.models.projection import CodecConfig
from csimodels.training.adapt import AdaptConfig
from csimodels.training.checkpoint import save_checkpoint
from csimodels.training.loop import TrainConfig, make_accelerator
from csimodels.training.pretrain import PretrainTask, pretrain

LENGTH = 256  # what a file for the default codeword length has, so that the command line's defaults fit
BASE = TransformerConfig(layers=1, width=32, heads=2, feedforward=64, norm_first=True)
SAM = TransformerConfig(layers=1, width=16, heads=2, feedforward=32)
SAMPLES = (32, 8, 16)  # training, validation, test


def adapt_config(epochs: int = 1, **changes) -> AdaptConfig:
    """Two batches an epoch; ``changes`` to :class:`AdaptConfig`."""
    train = TrainConfig(epochs=epochs, batch_size=16, schedule="constant", patience=5, initial_candidate=True)
    return AdaptConfig(train, **changes)


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """``"base"`` and ``"reference"``, pre-trained for a few steps on two environments."""
    h = torch.cat([Environment(CellConfig(), index, 0).sample(64) for index in (1, 2)])
    config = TrainConfig(epochs=3, batch_size=32, learning_rate=3e-3)
    paths, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for name, architecture in (("base", BASE), ("reference", SAM)):
        pretrain(
            PretrainTask(architecture, CodecConfig(codeword_length=LENGTH), config),
            FixedSource(h[::2]),
            h[1::4],
            folder / name,
            accelerator=make_accelerator(config, cpu=True),
            data_description={},
        )
        paths[name] = folder / name / "model.safetensors"
    torch.set_num_threads(threads)
    return paths


def save_random(
    path: Path, architecture: TransformerConfig = SAM, codeword_length: int = LENGTH, seed: int = 0, **codec
) -> Path:
    """A checkpoint that was never trained."""
    torch.manual_seed(seed)
    config = CodecConfig(codeword_length=codeword_length, **codec)
    tokens, features = config.subcarriers, 2 * config.antennas
    model = ChannelTransformer(dataclasses.replace(architecture, tokens=tokens, features=features))
    save_checkpoint(path, model, config)
    return path
