"""Networks that refine codewords, on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from csimodels import __version__
from csimodels.files import fitting, known, load_format, save_tensors
from csimodels.models.codeword_baselines import build_network, config_of, describe
from csimodels.models.codeword_network import CodewordNetwork

_FORMAT = "csimodels.codeword_network"
FINGERPRINT = "fingerprint"


def save_network(path: str | os.PathLike, network: CodewordNetwork, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a network and all that rebuilds it, atomically; ``extra`` are JSON-serialisable entries of the metadata."""
    metadata = {"format": _FORMAT, "version": __version__, "config": describe(network.config), **(extra or {})}
    save_tensors(path, network.state_dict(), metadata)


def load_network(path: str | os.PathLike) -> tuple[CodewordNetwork, dict[str, Any]]:
    """Read what :func:`save_network` wrote: the network in eval mode, and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a codeword network, or one that is not whole.
        ImportError: LVM4CF's backbone needs the extra ``llm``.
    """
    tensors, metadata = load_format(path, _FORMAT, "a codeword network")
    # The weights follow; the generator of whoever loads a file is none of its business.
    with known(path, metadata), torch.random.fork_rng(devices=[]):
        network = build_network(config_of(metadata["config"]), pretrained=False)
    with fitting(path):
        network.load_state_dict(tensors)
    return network.eval(), metadata
