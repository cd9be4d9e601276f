"""A user's channels as angle-delay images and back: the project's HDF5 files, and COST 2100 ``.mat`` files (``HT``)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch

from csimodels.channels import cost2100
from csimodels.channels.angle_delay import SHIFT, angle_delay, to_frequency
from csimodels.channels.hdf5 import ChannelReader, write_channels
from csimodels.files import atomic_path

KINDS = ("hdf5", "cost2100")
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class CsiLayout:
    """How images relate to what the file holds.

    Attributes:
        kind: ``"hdf5"`` (frequency domain) or ``"cost2100"`` (angle-delay domain, ``HT``).
        antennas, subcarriers: of the file; for COST 2100 the delays take the place of subcarriers.
        delays: rows of the image, Nc. shift: rows before delay 0.
    """

    kind: str
    antennas: int
    subcarriers: int
    delays: int
    shift: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


class CsiFile:
    """Channels of a file, read as images in blocks.

    Args:
        path: a file ending in ``.mat`` is read by :mod:`csimodels.channels.cost2100`, every other one by
            :class:`csimodels.channels.hdf5.ChannelReader`.
        delays: rows of an image. antennas: that the file must have. shift: as for :func:`angle_delay`.

    Raises:
        FileNotFoundError, ValueError: as the readers, or channels of another size.
    """

    def __init__(self, path: str | os.PathLike, *, delays: int, antennas: int, shift: int = SHIFT):
        self.path = Path(path)
        self._images: torch.Tensor | None = None
        if self.path.suffix == ".mat":
            # [N, angle, delay] -> rows of delay.
            h = cost2100.to_complex(cost2100.read_angle_delay(self.path)).mT
            self._images = torch.stack([h.real, h.imag], dim=1).contiguous()
            found = (h.shape[2], h.shape[1])
            self.layout = CsiLayout("cost2100", *found, delays, 0)
            fits = found == (antennas, delays)
        else:
            self._reader = ChannelReader(self.path)
            found = (self._reader.antennas, self._reader.subcarriers)
            self.layout = CsiLayout("hdf5", *found, delays, shift)
            fits = found[0] == antennas and found[1] >= delays
        if not fits:
            raise ValueError(
                f"{self.path}: expected {antennas} antennas and at least {delays} subcarriers (or {delays} delays), as "
                f"the model, got {found[0]} and {found[1]}"
            )

    def __len__(self) -> int:
        return len(self._reader) if self._images is None else len(self._images)

    def images(self) -> Iterator[torch.Tensor]:
        """All samples, float32 ``[block, 2, delays, antennas]`` in the file's unit; one of no energy stays zero."""
        if self._images is not None:
            yield from self._images.split(_BLOCK)
            return
        for block in self._reader.blocks(_BLOCK):
            image = torch.zeros(len(block), 2, self.layout.delays, self.layout.antennas)
            powered = block.abs().amax((1, 2)) > 0
            if powered.any():
                image[powered] = angle_delay(block[powered], self.layout.delays, self.layout.shift)[0]
            yield image

    def channels(self) -> Iterator[torch.Tensor]:
        """All samples as they are in the file, complex64 ``[block, antenna, subcarrier]``; delays for COST 2100."""
        if self._images is not None:
            for block in self._images.split(_BLOCK):
                yield torch.complex(*block.unbind(1)).mT
        else:
            yield from self._reader.blocks(_BLOCK)

    def environments(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the environment and whether it is in line of sight, for each sample; zeros if the file has none."""
        if self._images is not None:
            return np.zeros(len(self), np.int64), np.zeros(len(self), bool)
        return self._reader.environment, self._reader.los


def reconstructed_channels(image: torch.Tensor, layout: CsiLayout) -> torch.Tensor:
    """Images ``[block, 2, delays, antennas]`` -> complex ``[block, antenna, subcarrier]`` of the layout's domain."""
    if layout.kind == "cost2100":
        return torch.complex(*image.unbind(1)).mT
    return to_frequency(image, layout.subcarriers, layout.shift)


def write_reconstruction(
    path: str | os.PathLike,
    layout: CsiLayout,
    blocks: Iterable[torch.Tensor],
    *,
    environment: np.ndarray,
    los: np.ndarray,
    parameters: dict[str, Any],
) -> None:
    """Write channels ``[block, antenna, subcarrier]`` as a file of the kind that they came from.

    A ``.mat`` file holds ``HT``, float32 ``[N, 2048]``; parts of a reconstruction beyond its range [0, 1] are clipped.
    ``environment`` and ``los`` (one per sample) and ``parameters`` (how they were made) go to an HDF5 file.

    Raises:
        OSError: the file could not be written; an old one stays.
    """
    if layout.kind == "cost2100":
        channels = torch.cat(list(blocks))
        parts = torch.stack([channels.real, channels.imag], dim=1) + 0.5
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            scipy.io.savemat(file, {"HT": parts.clamp(0, 1).flatten(1).numpy()})
        return
    described: dict[str, Any] = {"generator": "reconstruction", "parameters": parameters, "seed": 0}
    with write_channels(path, antennas=layout.antennas, subcarriers=layout.subcarriers, **described) as writer:
        for block in blocks:
            span = slice(len(writer), len(writer) + len(block))
            writer.append(block.to(torch.complex64), environment=environment[span], los=los[span])
