"""A tiny LLMCsiNet and CSI for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from csimodels.models.llmcsinet import BackboneConfig, LlmCsiNet, LlmCsiNetConfig

BACKBONE = BackboneConfig(layers=1, width=16, heads=2, feedforward=32)
CONFIG = LlmCsiNetConfig(
    delays=8, antennas=12, codeword_values=20, radius=2, patch=4, features=6, keep_fraction=0.25, backbone=BACKBONE
)


def build(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LlmCsiNet:
    """In evaluation, with every parameter and statistic random, those that start at 0 or 1 too."""
    torch.manual_seed(seed)
    model = LlmCsiNet(dataclasses.replace(CONFIG, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def csi(batch: int, config: LlmCsiNetConfig = CONFIG, *, seed: int = 7, dtype: torch.dtype = torch.float32):
    """A few strong elements in weak noise, ``[batch, 2, delays, antennas]``."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.rand(batch, *config.shape, generator=generator) ** 8
    return (strong * torch.randn(batch, *config.shape, generator=generator)).to(dtype)
