"""What the files of trained networks have in common: the format, all that rebuilds the network, and which training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from csimodels import __version__
from csimodels.files import fitting, known, load_format, save_tensors

FINGERPRINT = "fingerprint"
Network = TypeVar("Network", bound=nn.Module)


def write_network(
    path: str | os.PathLike,
    network: nn.Module,
    form: str,
    entries: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network atomically.

    Args:
        path: safetensors file.
        network: whose state is written.
        form: the file's ``format``.
        entries: JSON-serialisable, from which the network is rebuilt. extra: further ones.
    """
    metadata = {"format": form, "version": __version__, **entries, **(extra or {})}
    save_tensors(path, network.state_dict(), metadata)


def read_network(
    path: str | os.PathLike, form: str, what: str, build: Callable[[dict[str, Any]], Network]
) -> tuple[Network, dict[str, Any]]:
    """Read what :func:`write_network` wrote.

    Args:
        path: the file.
        form: the ``format`` that it must have, that of ``what`` ("a codeword network").
        build: the metadata -> the network, which may draw weights: those of the file take their place.

    Returns:
        The network in eval mode, and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: of another format, or not whole.
    """
    tensors, metadata = load_format(path, form, what)
    # The generator of whoever loads a file is none of its business.
    with known(path, metadata), torch.random.fork_rng(devices=[]):
        network = build(metadata)
    with fitting(path):
        network.load_state_dict(tensors)
    return network.eval(), metadata


def check_fingerprint(path: Path, entries: Mapping[str, Any], fingerprint: Any) -> None:
    """Refuse a finished file, whose metadata are ``entries``, of another training with a ``ValueError``."""
    if entries.get(FINGERPRINT) != fingerprint:
        raise ValueError(f"{path}: belongs to another training; choose another output folder or remove the file")
