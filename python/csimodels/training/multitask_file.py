"""Networks of the physical-layer tasks on disk: the multi-task one or a baseline, with all that rebuilds it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from csimodels.models.low_rank import add_lora, quantize_backbone
from csimodels.models.multitask_baselines import build_network, config_from_dict
from csimodels.training.network_file import read_network, write_network

_FORMAT = "csimodels.multitask"
_KINDS = ("lora", "loftq", "qlora")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How the backbone is fine-tuned: its weights stay, low-rank matrices, norms and positions are trained.

    Attributes:
        kind: ``"lora"`` keeps the weights in full precision; ``"loftq"`` stores them in NF4 and starts the low-rank
            matrices by Algorithm 1; ``"qlora"`` stores them in NF4 and starts by eq. 29.
        rank: of the matrices (16 in section V-A).
        iterations: of Algorithm 1 (5 in section V-E).
    """

    kind: str = "loftq"
    rank: int = 16
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")

    def apply(self, network: nn.Module, *, weights_follow: bool = False) -> nn.Module:
        """Adapt the backbone in place; ``weights_follow`` saves the search for a start that a checkpoint replaces."""
        if self.kind == "lora":
            return add_lora(network, self.rank)
        if self.kind == "qlora" or weights_follow:
            return quantize_backbone(network, self.rank, start="lora")
        return quantize_backbone(network, self.rank, self.iterations)


def save_multitask(
    path: str | os.PathLike,
    network: nn.Module,
    model: str,
    config: Any,
    adaptation: Adaptation | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network atomically.

    Args:
        path: safetensors file.
        network: built by :func:`csimodels.models.multitask_baselines.build_network` from ``model`` and ``config``, and
            adapted by ``adaptation``.
        extra: JSON-serialisable entries of the metadata.
    """
    entries = {
        "model": model,
        "config": dataclasses.asdict(getattr(network, "config", config)),
        "adaptation": None if adaptation is None else dataclasses.asdict(adaptation),
    }
    write_network(path, network, _FORMAT, entries, extra)


def load_multitask(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Read what :func:`save_multitask` wrote.

    Returns:
        The network in eval mode, and the metadata: ``model``, ``config``, ``adaptation`` and the extra entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a network, or one that is not whole.
        ImportError: the backbone needs the extra ``llm``.
    """
    return read_network(path, _FORMAT, "a network of the physical-layer tasks", _build)


def _build(metadata: Mapping[str, Any]) -> nn.Module:
    config = config_from_dict(metadata["model"], metadata["config"])
    network = build_network(metadata["model"], config, pretrained=False)
    if metadata["adaptation"] is None:
        return network
    return Adaptation(**metadata["adaptation"]).apply(network, weights_follow=True)
