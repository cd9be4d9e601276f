"""A disc of UE positions in a cell, seen through rays that were drawn once: what every environment generator shares.

A generator draws where the disc lies and the rays that reach it; :class:`DiscEnvironment` turns positions in the disc
into channels. Each position turns the phase of every scattered ray by the plane wave over its displacement from the
disc's centre and, in line of sight, sees the exact direct ray. Only what a single-polarised array at the BS sees is
modelled: path loss and shadowing are left out, since every CSI sample is normalised to unit power per entry.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, Rays, Spectrum, SubcarrierGrid, phasor, synthesize


@dataclasses.dataclass(frozen=True)
class CellConfig:
    """A cell and the environments in it (LASCO, section IV-A).

    Attributes:
        carrier: Hz. radius, disc_radius, min_distance, bs_height, ue_height: metres.
        patches: independent ray sets per disc. With 1, the rays are frozen over the whole disc; with more, the disc is
            cut into as many cells (nearest of random centres), each with its own rays, so that an environment spans
            more dimensions.
        array, grid: what is measured.

    Raises:
        ValueError: a length that is not positive, a disc that does not fit in the cell, or fewer than one patch.
    """

    carrier: float = 2.655e9
    radius: float = 200.0
    disc_radius: float = 5.0
    min_distance: float = 10.0
    bs_height: float = 10.0
    ue_height: float = 1.5
    patches: int = 1
    array: AntennaArray = dataclasses.field(default_factory=lambda: AntennaArray.ula(32))
    grid: SubcarrierGrid = dataclasses.field(default_factory=lambda: SubcarrierGrid(32, 70e6))

    def __post_init__(self) -> None:
        for name in ("carrier", "radius", "disc_radius", "min_distance", "bs_height", "ue_height"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.min_distance + 2 * self.disc_radius > self.radius:
            raise ValueError(
                f"radius: expected room for a disc of radius {self.disc_radius} at least {self.min_distance} from the "
                f"BS, got {self.radius}"
            )
        if self.patches < 1:
            raise ValueError(f"patches: expected at least 1, got {self.patches}")

    @property
    def wavelength(self) -> float:
        """Metres."""
        return SPEED_OF_LIGHT / self.carrier

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-serialisable values; :meth:`from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"array": self.array.positions.tolist(), "grid": dataclasses.asdict(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CellConfig:
        """The inverse of :meth:`to_dict`."""
        array = AntennaArray(torch.tensor(values["array"], dtype=torch.float64))
        return cls(**(values | {"array": array, "grid": SubcarrierGrid(**values["grid"])}))


def plain_fields(instance: Any) -> dict[str, Any]:
    """The fields of a set of channels, a dataclass, JSON-serialisable: what its name stands for."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _plain(value: Any) -> Any:
    if isinstance(value, CellConfig):
        return value.to_dict()
    if isinstance(value, AntennaArray):
        return value.positions.tolist()
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def unit_vectors(azimuth: np.ndarray, zenith: np.ndarray) -> np.ndarray:
    """Unit vectors ``[..., 3]`` from azimuth and zenith in radians."""
    return np.stack(
        [np.sin(zenith) * np.cos(azimuth), np.sin(zenith) * np.sin(azimuth), np.cos(zenith) * np.ones_like(azimuth)], -1
    )


@dataclasses.dataclass(frozen=True)
class RaySet:
    """The scattered rays of one patch, and the amplitude of the direct one.

    Attributes:
        gain: complex128 ``[path]``, amplitude and phase at the disc's centre.
        delay: float64 ``[path]``, seconds after the direct (in its absence, the first) ray.
        departure: float64 ``[path, 3]``, unit vectors from the BS along the ray.
        arrival: float64 ``[path, 3]``, unit vectors from the UE to where the ray comes from.
        direct: amplitude of the line-of-sight ray, 0 without line of sight.
    """

    gain: torch.Tensor
    delay: torch.Tensor
    departure: torch.Tensor
    arrival: torch.Tensor
    direct: float = 0.0


class DiscEnvironment:
    """One environment of a cell, fully determined by its generator and ``(seed, index)``.

    A generator fills :attr:`ray_sets` and :attr:`patch_centres` (displacements from the disc's centre, metres
    ``[patch, 3]``); everything else is here.

    Args:
        config: the cell.
        index: the environment's number, from 1; LASCO draws even ones in line of sight, odd ones not.
        seed: the cell's seed, not negative.
        los: overrides the rule by index.
    """

    ray_sets: list[RaySet]
    patch_centres: np.ndarray

    def __init__(self, config: CellConfig, index: int, seed: int, *, los: bool | None = None):
        if index < 1:
            raise ValueError(f"index: expected at least 1, got {index}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.config, self.index, self.seed = config, index, seed
        self.los = index % 2 == 0 if los is None else los
        # The first draws place the disc, so that an environment lies in the same place whatever the generator.
        self._rng = np.random.default_rng([seed, index])
        self.centre = self._draw_centre()

    def _draw_centre(self) -> np.ndarray:
        """Uniform over the ring in which the disc is inside the cell and far enough from the BS, metres ``[3]``."""
        inner, outer = self.config.min_distance + self.config.disc_radius, self.config.radius - self.config.disc_radius
        distance = math.sqrt(self._rng.uniform(inner**2, outer**2))
        azimuth = self._rng.uniform(-math.pi, math.pi)
        return np.array([distance * math.cos(azimuth), distance * math.sin(azimuth), self.config.ue_height])

    def _draw_disc(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Displacements from the centre, uniform over the disc, metres ``[count, 3]``."""
        radius = self.config.disc_radius * np.sqrt(rng.random(count))
        azimuth = rng.uniform(-math.pi, math.pi, count)
        return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.zeros(count)], axis=1)

    @property
    def _bs(self) -> np.ndarray:
        return np.array([0.0, 0.0, self.config.bs_height])

    def _direct_angles(self) -> tuple[float, float]:
        """Azimuth and zenith of the disc's centre seen from the BS, radians."""
        offset = self.centre - self._bs
        return math.atan2(offset[1], offset[0]), math.acos(offset[2] / np.linalg.norm(offset))

    def _position_rng(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, 1, seed])

    def displacements(self, count: int, *, seed: int = 0) -> np.ndarray:
        """Where the UEs of :meth:`sample` stand, relative to the disc's centre, metres ``[count, 3]``."""
        return self._draw_disc(self._position_rng(seed), count)

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.complex64,
        grid: Spectrum | None = None,
        travel: float = 0.0,
    ) -> torch.Tensor:
        """Channels at ``count`` UE positions uniform over the disc.

        Args:
            count: number of samples; 0 gives an empty batch.
            seed: numbers the draw, not negative; the same environment and seed give the same samples.
            dtype: ``torch.complex64`` or ``torch.complex128``.
            grid: what the columns are, if not the cell's subcarriers.
            travel: metres that every UE has moved on from its position, in a horizontal direction of its own. Speed
                times time turns the phase of each ray by its Doppler shift; the positions stay those of ``travel=0``.

        Returns:
            complex ``[count, antenna, subcarrier]``, of mean power near 1 per entry (38.901 drops the clusters 25 dB
            below the strongest without renormalising); see :func:`csimodels.channels.rays.normalize_power`.

        Raises:
            ValueError: a negative count, seed or travel, or another dtype.
        """
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if dtype not in (torch.complex64, torch.complex128):
            raise ValueError(f"dtype: expected torch.complex64 or torch.complex128, got {dtype}")
        if not 0 <= travel < math.inf:
            raise ValueError(f"travel: expected at least 0 metres, got {travel}")
        rng = self._position_rng(seed)
        displacement = self._draw_disc(rng, count)
        nearest = np.linalg.norm(displacement[:, None] - self.patch_centres[None], axis=2).argmin(axis=1)
        heading = rng.uniform(-math.pi, math.pi, count)
        displacement += travel * np.stack([np.cos(heading), np.sin(heading), np.zeros(count)], axis=1)
        array, grid = self.config.array, grid or self.config.grid
        if len(self.ray_sets) == 1:
            h = self._scattered(self.ray_sets[0], displacement, grid, dtype)
        else:
            h = torch.empty(count, len(array), grid.subcarriers, dtype=dtype)
            for patch, rays in enumerate(self.ray_sets):
                members = np.flatnonzero(nearest == patch)
                h[torch.from_numpy(members)] = self._scattered(rays, displacement[members], grid, dtype)
        if self.los:
            amplitude = np.array([rays.direct for rays in self.ray_sets])[nearest]
            h += synthesize(self._direct(displacement, amplitude), array, grid, dtype=dtype)
        return h

    def _scattered(self, rays: RaySet, displacement: np.ndarray, grid: Spectrum, dtype: torch.dtype) -> torch.Tensor:
        phase = 2 * math.pi / self.config.wavelength * (torch.from_numpy(displacement) @ rays.arrival.T)
        moved = Rays(rays.gain.to(dtype) * phasor(phase, dtype), rays.delay, rays.departure)
        return synthesize(moved, self.config.array, grid, dtype=dtype)

    def _direct(self, displacement: np.ndarray, amplitude: np.ndarray) -> Rays:
        """The exact line-of-sight ray to every position; delays are relative to the disc's centre."""
        offset = self.centre + displacement - self._bs
        distance = np.linalg.norm(offset, axis=1)
        excess = distance - np.linalg.norm(self.centre - self._bs)
        gain = amplitude * np.exp(-2j * math.pi * excess / self.config.wavelength)
        return Rays(
            gain=torch.from_numpy(gain[:, None]),
            delay=torch.from_numpy(excess[:, None] / SPEED_OF_LIGHT),
            direction=torch.from_numpy((offset / distance[:, None])[:, None, :]),
        )
