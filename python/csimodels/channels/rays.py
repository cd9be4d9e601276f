"""Rays to channel matrices: the one place where propagation paths become CSI.

Every generator (built-in, Sionna) describes a channel by rays; :func:`synthesize` turns them into ``H`` for any antenna
array and subcarrier grid with one batched matrix product. Conventions used everywhere in the package:

- ``H`` is complex ``[..., antenna, subcarrier]``.
- The steering vector has phase ``+2 pi (position . direction)`` with positions in wavelengths (LASCO, eq. 7), and a
  delay ``tau`` turns subcarrier ``f`` by ``-2 pi f tau``.
- Directions are unit vectors pointing from the BS along the departing ray; the array lies in the y-z plane.
"""

from __future__ import annotations

import dataclasses
import math

import torch

SPEED_OF_LIGHT = 299_792_458.0


@dataclasses.dataclass(frozen=True)
class AntennaArray:
    """Element positions in wavelengths, float64 ``[antenna, 3]``."""

    positions: torch.Tensor

    @classmethod
    def ula(cls, antennas: int, spacing: float = 0.5) -> AntennaArray:
        """Uniform linear array along y: ``sin(azimuth)`` is its direction cosine (LASCO, eq. 7)."""
        return cls.upa(1, antennas, spacing)

    @classmethod
    def upa(cls, rows: int, columns: int, spacing: float = 0.5) -> AntennaArray:
        """Uniform planar array, ``rows`` along z and ``columns`` along y, row-major."""
        if rows < 1 or columns < 1:
            raise ValueError(f"rows, columns: expected at least 1 each, got {rows} and {columns}")
        z, y = torch.meshgrid(
            torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
        )
        return cls(torch.stack([torch.zeros_like(y), y, z], dim=-1).reshape(-1, 3) * spacing)

    def __len__(self) -> int:
        return self.positions.shape[0]


@dataclasses.dataclass(frozen=True)
class SubcarrierGrid:
    """``subcarriers`` equally spaced over ``bandwidth`` Hz, centred on the carrier."""

    subcarriers: int
    bandwidth: float

    @property
    def frequencies(self) -> torch.Tensor:
        """Baseband frequencies in Hz, float64 ``[subcarrier]``."""
        index = torch.arange(self.subcarriers, dtype=torch.float64)
        return (index - (self.subcarriers - 1) / 2) * (self.bandwidth / self.subcarriers)


@dataclasses.dataclass(frozen=True)
class Rays:
    """Propagation paths, batched over leading dimensions that broadcast against each other.

    Attributes:
        gain: complex ``[..., path]``, amplitude and phase at the array's origin and the carrier.
        delay: float64 ``[..., path]`` in seconds.
        direction: float64 ``[..., path, 3]``, unit vectors of departure.
        doppler: float64 ``[..., path]`` in Hz, or None for a static channel.
    """

    gain: torch.Tensor
    delay: torch.Tensor
    direction: torch.Tensor
    doppler: torch.Tensor | None = None

    def at(self, times: torch.Tensor) -> Rays:
        """The same rays at ``times`` (seconds, ``[time]``): gains become ``[..., time, path]``."""
        if self.doppler is None:
            raise ValueError("doppler: these rays have none, so they do not change with time")
        phase = 2 * math.pi * times.to(torch.float64)[:, None] * self.doppler[..., None, :]
        gain = self.gain[..., None, :] * torch.polar(torch.ones_like(phase), phase).to(self.gain.dtype)
        return Rays(gain, self.delay[..., None, :], self.direction[..., None, :, :], None)


def phasor(phase: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``exp(j phase)`` of float64 ``phase`` in radians, as complex ``dtype``."""
    # Reduced to one turn in float64 first: 2 pi f tau reaches thousands of radians, which float32 would round to nothing.
    turn = 2 * math.pi
    phase = (phase - turn * torch.round(phase / turn)).to(torch.empty(0, dtype=dtype).real.dtype)
    return torch.polar(torch.ones_like(phase), phase)


def synthesize(
    rays: Rays, array: AntennaArray, grid: SubcarrierGrid, *, dtype: torch.dtype = torch.complex64
) -> torch.Tensor:
    """Channel matrices of the given rays (LASCO, eq. 6).

    Args:
        rays: paths with gains ``[..., path]``. Where delay and direction have no batch dimensions (one geometry seen from
            many positions) the whole batch is one product with the ``[path, antenna * subcarrier]`` response matrix;
            otherwise each item is a product of ``[antenna, path]`` and ``[path, subcarrier]``.
        array: antenna positions.
        grid: subcarrier frequencies.
        dtype: ``torch.complex64`` or ``torch.complex128``; phases are always reduced in float64.

    Returns:
        complex ``[..., antenna, subcarrier]``.

    Raises:
        ValueError: a shape that does not fit, named.
    """
    paths = rays.gain.shape[-1]
    if rays.delay.shape[-1] != paths or rays.direction.shape[-2:] != (paths, 3):
        raise ValueError(
            f"rays: expected delay [..., {paths}] and direction [..., {paths}, 3] to match gain "
            f"{tuple(rays.gain.shape)}, got {tuple(rays.delay.shape)} and {tuple(rays.direction.shape)}"
        )
    turn = 2 * math.pi
    steering = phasor(turn * (rays.direction.to(torch.float64) @ array.positions.T), dtype)  # [..., path, antenna]
    response = phasor(-turn * rays.delay.to(torch.float64)[..., None] * grid.frequencies, dtype)  # [..., path, subcarrier]
    gain = rays.gain.to(dtype)
    if rays.delay.ndim == 1 and rays.direction.ndim == 2:
        geometry = (steering[:, :, None] * response[:, None, :]).reshape(paths, -1)
        return (gain @ geometry).reshape(*gain.shape[:-1], len(array), grid.subcarriers)
    return (steering * gain[..., None]).mT @ response


def normalize_power(h: torch.Tensor) -> torch.Tensor:
    """Scale every sample to ``|H|_F^2 = antennas * subcarriers``; ``h`` complex ``[..., antenna, subcarrier]``.

    Raises:
        ValueError: a sample has no power or is not finite; the message names the first one's index.
    """
    power = h.abs().square().sum(dim=(-2, -1), keepdim=True)
    bad = ~((power > 0) & torch.isfinite(power)).flatten()
    if bad.any():
        raise ValueError(
            f"h: expected finite samples with power, got {int(bad.sum())} others, the first at index "
            f"{int(bad.nonzero()[0])}"
        )
    return h * (h.shape[-2] * h.shape[-1] / power).sqrt()
