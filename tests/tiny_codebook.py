"""Codebook training at a size of seconds: 2 x 8 antennas, 16 codewords, one narrow layer, few channels."""

from __future__ import annotations

import dataclasses
import math

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.rays import AntennaArray, SubcarrierGrid
from csimodels.models.backbone import BackboneConfig
from csimodels.models.codebook_file import FeedbackCodebook
from csimodels.models.codebooks import PortLayout, rvq_codebook
from csimodels.models.codeword_baselines import FcConfig
from csimodels.models.lvm4cf import Lvm4CfConfig
from csimodels.training.codebook_training import CodebookData, CodebookTraining
from csimodels.training.loop import TrainConfig

FC = FcConfig(16, hidden=(32,))
LLAMA = Lvm4CfConfig(16, backbone=BackboneConfig("llama", None, 1, width=16, heads=2, feedforward=32))


def site(count: int, array: AntennaArray | None = None, *, index: int = 3, seed: int = 0) -> torch.Tensor:
    """Complex64 ``[count, 2 * antennas]``, unit norm: a built-in environment seen by two polarisations, whose rays
    have phases of their own."""
    cell = CellConfig(array=array or AntennaArray.upa(2, 4), grid=SubcarrierGrid(1, 1e6))
    environment = Environment(cell, index, seed=1, los=False)
    parts = [environment.sample(count, seed=seed)[..., 0]]
    generator = torch.Generator().manual_seed(index)
    environment.ray_sets = [
        dataclasses.replace(
            rays,
            gain=rays.gain
            * torch.exp(2j * math.pi * torch.rand(len(rays.gain), generator=generator, dtype=torch.float64)),
        )
        for rays in environment.ray_sets
    ]
    parts.append(environment.sample(count, seed=seed)[..., 0])
    h = torch.cat(parts, dim=1)
    return h / torch.linalg.vector_norm(h, dim=1, keepdim=True)


def codebook(bits: int = 4, seed: int = 0) -> FeedbackCodebook:
    """Random, 2^bits codewords for two polarisations of 2 x 4 antennas."""
    return FeedbackCodebook(rvq_codebook(bits, 16, seed=seed), "rvq", PortLayout(2, 2, 4))


def data(index: int = 3) -> CodebookData:
    """64 channels to train on, 32 for validation."""
    return CodebookData(site(64, index=index), site(32, index=index, seed=1), {"index": index})


def four_discs() -> CodebookData:
    """A site where users stand in four places: 256 channels to train on, 128 for validation."""
    parts = [[site(64 - 32 * seed, index=index, seed=seed) for index in (3, 5, 7, 9)] for seed in (0, 1)]
    return CodebookData(torch.cat(parts[0]), torch.cat(parts[1]), {"discs": 4})


def train_config(**changes) -> TrainConfig:
    """Four steps an epoch."""
    fields = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.0, "save_every": 3, **changes}
    return TrainConfig(**fields)


def training(**changes) -> CodebookTraining:
    """SS with a small FC network unless told otherwise; unknown names go to the optimisation."""
    names = {field.name for field in dataclasses.fields(CodebookTraining)} - {"train"}
    own = {name: changes.pop(name) for name in list(changes) if name in names}
    return CodebookTraining(train=train_config(**changes), **{"network": FC, **own})
