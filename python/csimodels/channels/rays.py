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
from typing import Protocol

import torch

SPEED_OF_LIGHT = 299_792_458.0
_BLOCK = 4096  # items at a time, which bounds the intermediates to some tens of megabytes


@dataclasses.dataclass(frozen=True, eq=False)
class AntennaArray:
    """Element positions in wavelengths, float64 ``[antenna, 3]``. Arrays of equal positions are equal."""

    positions: torch.Tensor

    def __post_init__(self) -> None:
        if self.positions.ndim != 2 or self.positions.shape[1] != 3 or self.positions.dtype != torch.float64:
            raise ValueError(
                f"positions: expected float64 [antenna, 3], got {self.positions.dtype} {tuple(self.positions.shape)}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AntennaArray) and torch.equal(self.positions, other.positions)

    def __hash__(self) -> int:
        return hash(tuple(self.positions.flatten().tolist()))

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


class Spectrum(Protocol):
    """What a ray's delay makes of the columns of ``H``: subcarriers, or another domain that they transform to."""

    @property
    def subcarriers(self) -> int:
        """Number of columns."""

    def response(self, delay: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Columns of a unit ray: float64 ``[...]`` seconds -> complex ``dtype`` ``[..., column]``."""


@dataclasses.dataclass(frozen=True)
class SubcarrierGrid:
    """``subcarriers`` equally spaced over ``bandwidth`` Hz, centred on the carrier."""

    subcarriers: int
    bandwidth: float

    def __post_init__(self) -> None:
        if self.subcarriers < 1:
            raise ValueError(f"subcarriers: expected at least 1, got {self.subcarriers}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth: expected a positive number of Hz, got {self.bandwidth}")

    @property
    def frequencies(self) -> torch.Tensor:
        """Baseband frequencies in Hz, float64 ``[subcarrier]``."""
        index = torch.arange(self.subcarriers, dtype=torch.float64)
        return (index - (self.subcarriers - 1) / 2) * (self.bandwidth / self.subcarriers)

    def response(self, delay: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``exp(-j 2 pi f tau)`` of ``delay`` ``[...]`` in seconds, complex ``[..., subcarrier]``."""
        return phasor(-2 * math.pi * delay.to(torch.float64)[..., None] * self.frequencies, dtype)


@dataclasses.dataclass(frozen=True)
class DelayTaps:
    """The first rows of the delay domain of a grid: its unitary inverse DFT over the subcarriers, truncated.

    A ray has a closed form here, so that channels of a thousand subcarriers need never be made to see a few taps.

    Attributes:
        grid: the subcarriers.
        delays: rows kept; they are ``1 / bandwidth`` seconds apart.
        shift: rows before delay 0, which catch what a delay between two taps leaks to earlier ones.

    Raises:
        ValueError: more rows than subcarriers, fewer than one, or a negative shift.
    """

    grid: SubcarrierGrid
    delays: int = 32
    shift: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.delays <= self.grid.subcarriers:
            raise ValueError(f"delays: expected 1 to {self.grid.subcarriers} (subcarriers), got {self.delays}")
        if self.shift < 0:
            raise ValueError(f"shift: expected at least 0, got {self.shift}")

    @property
    def subcarriers(self) -> int:
        """The rows kept: they take the place of subcarriers in ``H``."""
        return self.delays

    def response(self, delay: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dirichlet kernel ``sin(pi y) / (sqrt(N) sin(pi y / N))``, ``y`` taps from the ray, complex ``[..., row]``."""
        n = self.grid.subcarriers
        tap = torch.arange(self.delays, dtype=torch.float64) - self.shift
        distance = tap - delay.to(torch.float64)[..., None] * self.grid.bandwidth
        # Within half a period of n taps sinc(y / n) has no zero; every period crossed is a factor (-1)^(n-1).
        periods = (distance / n).round()
        distance -= n * periods
        kernel = math.sqrt(n) * distance.sinc() / (distance / n).sinc()
        if n % 2 == 0:
            kernel *= 1 - 2 * periods.remainder(2)
        # Frequencies are centred on the carrier, which turns every row by a phase of its own.
        turn = phasor(math.pi * (n - 1) / n * tap, dtype)
        return kernel.to(turn.real.dtype) * turn


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
        # A geometry without batch dimensions broadcasts as it is, and synthesize() knows it as one geometry.
        delay = self.delay if self.delay.ndim == 1 else self.delay[..., None, :]
        direction = self.direction if self.direction.ndim == 2 else self.direction[..., None, :, :]
        return Rays(gain, delay, direction, None)

    def __getitem__(self, items: slice | torch.Tensor) -> Rays:
        """Some items of the first batch dimension, which all attributes must have."""
        doppler = None if self.doppler is None else self.doppler[items]
        return Rays(self.gain[items], self.delay[items], self.direction[items], doppler)

    def strongest(self, paths: int) -> Rays:
        """The ``paths`` strongest of each item, strongest first; of equal ones the first. No dimension is broadcast."""
        order = self.gain.abs().argsort(dim=-1, descending=True, stable=True)[..., :paths]
        return Rays(
            self.gain.gather(-1, order),
            self.delay.gather(-1, order),
            self.direction.gather(-2, order[..., None].expand(*order.shape, 3)),
            None if self.doppler is None else self.doppler.gather(-1, order),
        )

    def aligned(self) -> Rays:
        """Delays counted from each item's first path with a gain, to which a UE synchronises; 0 for those without."""
        there = self.gain != 0
        first = self.delay.where(there, math.inf).amin(-1, keepdim=True)
        delay = (self.delay - first).where(there, 0.0)
        return dataclasses.replace(self, delay=delay)


def phasor(phase: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``exp(j phase)`` of float64 ``phase`` in radians, as complex ``dtype``."""
    # Reduced to one turn in float64 first: 2 pi f tau reaches thousands of radians, where float32 has no digits left.
    turns = phase / (2 * math.pi)
    turns -= turns.round()
    angle = turns.mul_(2 * math.pi).to(torch.empty(0, dtype=dtype).real.dtype)
    # Not torch.polar, which evaluates its sine and cosine one at a time: these two are vectorised, three times as fast.
    return torch.complex(angle.cos(), angle.sin())


def synthesize(
    rays: Rays, array: AntennaArray, grid: Spectrum, *, dtype: torch.dtype = torch.complex64
) -> torch.Tensor:
    """Channel matrices of the given rays (LASCO, eq. 6).

    Args:
        rays: paths with gains ``[..., path]``. Where delay and direction have no batch dimensions (one geometry seen
            from many positions) the whole batch is one product with the geometry's response, and rays of equal delay
            (those of one cluster) share their delay phases; otherwise each item is a product of ``[antenna, path]``
            and ``[path, subcarrier]``.
        array: antenna positions.
        grid: subcarrier frequencies, or :class:`DelayTaps` of them for the delay domain.
        dtype: ``torch.complex64`` or ``torch.complex128``; phases are always reduced in float64.

    Returns:
        complex ``[..., antenna, subcarrier]``.

    Raises:
        ValueError: a shape that does not fit, or another dtype, named.
    """
    paths = rays.gain.shape[-1] if rays.gain.ndim else 0
    if rays.delay.shape[-1:] != (paths,) or rays.direction.shape[-2:] != (paths, 3) or paths == 0:
        raise ValueError(
            "rays: expected gain [..., path], delay [..., path] and direction [..., path, 3] with at least one path, "
            f"got {tuple(rays.gain.shape)}, {tuple(rays.delay.shape)} and {tuple(rays.direction.shape)}"
        )
    if dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"dtype: expected torch.complex64 or torch.complex128, got {dtype}")
    steering = phasor(
        2 * math.pi * (rays.direction.to(torch.float64) @ array.positions.T), dtype
    )  # [..., path, antenna]
    gain = rays.gain.to(dtype)
    if rays.delay.ndim == 1 and rays.direction.ndim == 2:
        h = _fixed_geometry(gain.reshape(-1, paths), rays.delay, steering, grid)
        return h.reshape(*gain.shape[:-1], len(array), grid.subcarriers)
    weighted, response = (steering * gain[..., None]).mT, grid.response(rays.delay, dtype)
    # A batch of outer products is memory-bound, and far quicker as one than as many tiny matrix products.
    return weighted * response if paths == 1 else weighted @ response


def _fixed_geometry(gain: torch.Tensor, delay: torch.Tensor, steering: torch.Tensor, grid: Spectrum) -> torch.Tensor:
    """Gains ``[item, path]``, delay ``[path]``, steering ``[path, antenna]`` -> ``[item, antenna, subcarrier]``."""
    items, (paths, antennas), dtype = gain.shape[0], steering.shape, gain.dtype
    delays, group = torch.unique(delay, return_inverse=True)
    sizes = group.bincount()
    groups, largest = len(delays), int(sizes.max())
    response = grid.response(delays, dtype)  # [group, subcarrier]
    # Multiply-adds per item and antenna: one product over all paths against sums within groups, then one over groups.
    if paths * grid.subcarriers <= groups * (largest + grid.subcarriers):
        geometry = steering[:, :, None] * response[group][:, None, :]
        return (gain @ geometry.reshape(paths, -1)).reshape(items, antennas, grid.subcarriers)
    # Every group is padded to the largest with an extra path of zero gain, number `paths`.
    order = group.argsort(stable=True)
    rank = torch.arange(paths) - (sizes.cumsum(0) - sizes)[group[order]]
    member = torch.full((groups, largest), paths)
    member[group[order], rank] = order
    grouped = torch.cat([steering, steering.new_zeros(1, antennas)])[member]  # [group, rank, antenna]
    padding = gain.new_zeros(1, 1)
    h = torch.empty(items, antennas, grid.subcarriers, dtype=dtype)
    for part, out in zip(gain.split(_BLOCK), h.split(_BLOCK), strict=True):
        columns = torch.cat([part, padding.expand(len(part), 1)], dim=1)[:, member.flatten()]
        per_antenna = columns.reshape(-1, groups, largest).transpose(0, 1) @ grouped  # [group, item, antenna]
        torch.mm(per_antenna.reshape(groups, -1).T, response, out=out.view(-1, grid.subcarriers))
    return h


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
