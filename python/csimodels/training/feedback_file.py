"""Trained feedback networks on disk: LLMCsiNet or a baseline, with all that rebuilds it, and its quantisers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from csimodels import __version__
from csimodels.files import fitting, known, load_format, save_tensors
from csimodels.models.baselines import BASELINES
from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig

_FORMAT = "csimodels.feedback"
FINGERPRINT = "fingerprint"


def save_feedback(
    path: str | os.PathLike,
    network: nn.Module,
    model: str,
    compression: int | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network atomically.

    Args:
        path: safetensors file.
        network: :class:`LlmCsiNet`, or a baseline.
        model: its name. compression: 1/sigma of a baseline.
        extra: JSON-serialisable entries of the metadata.
    """
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "model": model,
        "config": dataclasses.asdict(network.config) if isinstance(network, LlmCsiNet) else None,
        "compression": compression,
        **(extra or {}),
    }
    save_tensors(path, network.state_dict(), metadata)


def load_feedback(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Read what :func:`save_feedback` wrote.

    Returns:
        The network in eval mode, and the metadata: ``model``, ``config``, ``compression`` and the extra entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a feedback network, or one that is not whole.
        ImportError: LLMCsiNet's backbone needs the extra ``llm``.
    """
    tensors, metadata = load_format(path, _FORMAT, "a feedback network")
    with known(path, metadata):
        network = _build(metadata)
    with fitting(path):
        network.load_state_dict(tensors)
    return network.eval(), metadata


def _build(metadata: Mapping[str, Any]) -> nn.Module:
    # The weights follow; the generator of whoever loads a file is none of its business.
    with torch.random.fork_rng(devices=[]):
        if metadata["model"] == "llmcsinet":
            return LlmCsiNet(LlmCsiNetConfig.from_dict(metadata["config"]), pretrained=False)
        return BASELINES[metadata["model"]](1 / metadata["compression"])
