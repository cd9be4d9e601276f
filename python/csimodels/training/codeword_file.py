"""Networks that refine codewords, on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from csimodels.models.codeword_baselines import build_network, config_of, describe
from csimodels.models.codeword_network import CodewordNetwork
from csimodels.training.network_file import read_network, write_network

_FORMAT = "csimodels.codeword_network"


def save_network(path: str | os.PathLike, network: CodewordNetwork, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a network and all that rebuilds it, atomically; ``extra`` are JSON-serialisable entries of the metadata."""
    write_network(path, network, _FORMAT, {"config": describe(network.config)}, extra)


def load_network(path: str | os.PathLike) -> tuple[CodewordNetwork, dict[str, Any]]:
    """Read what :func:`save_network` wrote: the network in eval mode, and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a codeword network, or one that is not whole.
        ImportError: LVM4CF's backbone needs the extra ``llm``.
    """
    return read_network(path, _FORMAT, "a codeword network", _build)


def _build(metadata: Mapping[str, Any]) -> CodewordNetwork:
    return build_network(config_of(metadata["config"]), pretrained=False)
