"""A user's channels as vectors over the antenna ports, for codebook feedback: HDF5, ``.mat``, ``.npz``, safetensors.

HDF5 files are the project's own (:mod:`csimodels.channels.hdf5`). The others hold one variable, complex ``[N, D]`` or
``[N, D, S]`` (S subcarriers), in one of the formats of :mod:`csimodels.channels.array_file`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csimodels.channels.array_file import ENDINGS, as_complex, read_array, write_arrays
from csimodels.channels.hdf5 import ChannelReader, write_channels

VARIABLE = "h"  # the name that these files get here


class VectorFile:
    """Channels of a file, read in blocks.

    Args:
        path: read by its ending, ``.mat``, ``.npz`` or ``.safetensors``; every other file is HDF5.
        dimension: D that the channels must have.
        variable: name of the channels in the file; HDF5 files have one of their own.

    Attributes:
        subcarriers: S. environment: int64 ``[N]``, los: bool ``[N]``; zeros where the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged or of another kind, has no such variable (what it has is named), or one
            that is not complex or of another size.
    """

    def __init__(self, path: str | os.PathLike, dimension: int, variable: str = VARIABLE):
        self.path = Path(path)
        self._h: Tensor | None = None
        if self.path.suffix in ENDINGS:
            h = as_complex(read_array(self.path, variable), (2, 3))
            shape, name = tuple(h.shape), f"{self.path}: {variable}"
            if h.ndim not in (2, 3) or not h.is_complex():
                raise ValueError(f"{name}: expected complex [N, D] or [N, D, S], got {_dtype(h)} {shape}")
            self._h = (h if h.ndim == 3 else h[:, :, None]).to(torch.complex64)
            found, self.subcarriers = self._h.shape[1:]
            self.environment, self.los = np.zeros(len(h), np.int64), np.zeros(len(h), bool)
        else:
            self._reader = ChannelReader(self.path)
            shape, name = (len(self._reader), self._reader.antennas, self._reader.subcarriers), str(self.path)
            found, self.subcarriers = shape[1:]
            self.environment, self.los = self._reader.environment, self._reader.los
        if found != dimension or 0 in shape:
            raise ValueError(f"{name}: expected channels of D = {dimension} ports, got shape {shape}")

    def __len__(self) -> int:
        return len(self.environment)

    def blocks(self, size: int = 4096) -> Iterator[Tensor]:
        """All channels in order, complex64 ``[block, D, S]``; raises what :meth:`ChannelReader.read` raises."""
        if self._h is None:
            yield from self._reader.blocks(size)
        else:
            yield from self._h.split(size)

    def read(self) -> Tensor:
        """All channels, complex64 ``[N, D, S]``."""
        return torch.cat(list(self.blocks()))


def write_vectors(
    path: str | os.PathLike, h: Tensor, *, environment: np.ndarray, los: np.ndarray, parameters: dict[str, Any]
) -> None:
    """Write channels as a file that :class:`VectorFile` reads, of the kind that its ending says.

    Args:
        path: of the file. h: complex64 ``[N, D, S]``; without its last axis in all but HDF5 where S is 1.
        environment, los: of each sample, and ``parameters``, how they were made: for HDF5.

    Raises:
        ValueError: no channels. OSError: the file could not be written; an old one stays.
    """
    path = Path(path)
    flat = h[:, :, 0] if h.shape[2] == 1 else h
    if path.suffix in ENDINGS:
        write_arrays(path, {VARIABLE: flat}, {"parameters": parameters})
    else:
        described: dict[str, Any] = {"generator": "reconstruction", "parameters": parameters, "seed": 0}
        with write_channels(path, antennas=h.shape[1], subcarriers=h.shape[2], **described) as writer:
            for start in range(0, len(h), 4096):
                part = slice(start, start + 4096)
                writer.append(h[part], environment=environment[part], los=los[part])


def _dtype(h: Tensor) -> str:
    return str(h.dtype).removeprefix("torch.")
