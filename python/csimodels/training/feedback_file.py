"""Trained feedback networks on disk: LLMCsiNet or a baseline, with all that rebuilds it, and its quantisers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from csimodels.models.baselines import BASELINES
from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig
from csimodels.training.network_file import read_network, write_network

_FORMAT = "csimodels.feedback"


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
    config = dataclasses.asdict(network.config) if isinstance(network, LlmCsiNet) else None
    write_network(path, network, _FORMAT, {"model": model, "config": config, "compression": compression}, extra)


def load_feedback(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Read what :func:`save_feedback` wrote.

    Returns:
        The network in eval mode, and the metadata: ``model``, ``config``, ``compression`` and the extra entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a feedback network, or one that is not whole.
        ImportError: LLMCsiNet's backbone needs the extra ``llm``.
    """
    return read_network(path, _FORMAT, "a feedback network", _build)


def _build(metadata: Mapping[str, Any]) -> nn.Module:
    if metadata["model"] == "llmcsinet":
        return LlmCsiNet(LlmCsiNetConfig.from_dict(metadata["config"]), pretrained=False)
    return BASELINES[metadata["model"]](1 / metadata["compression"])
