"""Built-in channel generator: clustered multipath with the statistics of 3GPP TR 38.901.

An *environment* is a disc in a cell. Its large-scale parameters and rays are drawn once (38.901, section 7.5, steps 4 to
8); every UE position inside turns each ray's phase by the plane wave over the displacement and, in line of sight, sees
the exact direct ray. Only small-scale structure that a single-polarised BS array sees is modelled: cross-polarisation
and path loss are left out, since every CSI sample is normalised to unit power per entry.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, Rays, SubcarrierGrid, phasor, synthesize

# 38.901, Table 7.5-3: ray offsets within a cluster of 1 degree rms, used with both signs.
_RAY_OFFSETS = np.array([0.0447, 0.1413, 0.2492, 0.3715, 0.5129, 0.6797, 0.8844, 1.1481, 1.5195, 2.1551])
_RAY_OFFSETS = np.stack([_RAY_OFFSETS, -_RAY_OFFSETS], axis=1).reshape(-1)
# 38.901, Table 7.5-5: rays of the two strongest clusters split over three sub-clusters (1-based rays in the table).
_SUB_CLUSTER = np.zeros(20, dtype=int)
_SUB_CLUSTER[[8, 9, 10, 11, 16, 17]] = 1
_SUB_CLUSTER[[12, 13, 14, 15]] = 2
_SUB_CLUSTER_DELAY = np.array([0.0, 1.28, 2.56])
_AZIMUTH_SCALING = {12: 1.146, 19: 1.273}  # Table 7.5-2
_ZENITH_SCALING = {12: 1.104, 19: 1.184}  # Table 7.5-4


@dataclasses.dataclass(frozen=True)
class Statistics:
    """One scenario's rows of 38.901, Table 7.5-6: spreads as (mean, standard deviation) of log10 seconds or degrees."""

    clusters: int
    delay_spread: tuple[float, float]
    azimuth_departure: tuple[float, float]
    azimuth_arrival: tuple[float, float]
    zenith_arrival: tuple[float, float]
    rician_db: tuple[float, float] | None
    delay_scaling: float
    cluster_delay: float  # seconds
    cluster_azimuth_departure: float  # degrees
    cluster_azimuth_arrival: float
    # Lower-triangular entries of the correlation of (DS, ASD, ASA, K), in that order.
    correlation: tuple[float, float, float, float, float, float]
    cluster_zenith_arrival: float = 7.0
    cluster_shadowing_db: float = 3.0


def umi_statistics(carrier: float, los: bool) -> Statistics:
    """UMi street canyon at ``carrier`` Hz (38.901, Table 7.5-6; below 2 GHz the table's 2 GHz values hold)."""
    x = math.log10(1 + max(carrier / 1e9, 2.0))
    if los:
        return Statistics(
            clusters=12,
            delay_spread=(-0.24 * x - 7.14, 0.38),
            azimuth_departure=(-0.05 * x + 1.21, 0.41),
            azimuth_arrival=(-0.08 * x + 1.73, 0.014 * x + 0.28),
            zenith_arrival=(-0.1 * x + 0.73, -0.04 * x + 0.34),
            rician_db=(9.0, 5.0),
            delay_scaling=3.0,
            cluster_delay=5e-9,
            cluster_azimuth_departure=3.0,
            cluster_azimuth_arrival=17.0,
            correlation=(0.5, 0.8, 0.4, -0.7, -0.2, -0.3),
        )
    return Statistics(
        clusters=19,
        delay_spread=(-0.24 * x - 6.83, 0.16 * x + 0.28),
        azimuth_departure=(-0.23 * x + 1.53, 0.11 * x + 0.33),
        azimuth_arrival=(-0.08 * x + 1.81, 0.05 * x + 0.3),
        zenith_arrival=(-0.04 * x + 0.92, -0.07 * x + 0.41),
        rician_db=None,
        delay_scaling=2.1,
        cluster_delay=11e-9,
        cluster_azimuth_departure=10.0,
        cluster_azimuth_arrival=22.0,
        correlation=(0.0, 0.4, 0.0, 0.0, 0.0, 0.0),
    )


@dataclasses.dataclass(frozen=True)
class CellConfig:
    """A cell and the environments in it (LASCO, section IV-A).

    Attributes:
        carrier: Hz. radius, disc_radius, min_distance, bs_height, ue_height: metres.
        patches: independent ray sets per disc. With 1, the rays are frozen over the whole disc; with more, the disc is
            cut into as many cells (nearest of random centres), each with its own rays, so that an environment spans
            more dimensions.
        array, grid: what is measured.
    """

    carrier: float = 2.655e9
    radius: float = 200.0
    disc_radius: float = 5.0
    min_distance: float = 10.0
    bs_height: float = 10.0
    ue_height: float = 1.5
    patches: int = 1
    array: AntennaArray = dataclasses.field(default_factory=lambda: AntennaArray.ula(32))
    grid: SubcarrierGrid = SubcarrierGrid(32, 70e6)

    @property
    def wavelength(self) -> float:
        """Metres."""
        return SPEED_OF_LIGHT / self.carrier


def _direction(azimuth: np.ndarray, zenith: np.ndarray) -> np.ndarray:
    """Unit vectors from azimuth and zenith in radians."""
    return np.stack(
        [np.sin(zenith) * np.cos(azimuth), np.sin(zenith) * np.sin(azimuth), np.cos(zenith) * np.ones_like(azimuth)], -1
    )


@dataclasses.dataclass(frozen=True)
class _Patch:
    """One frozen ray set: amplitudes, delays relative to the first ray, departure and arrival directions."""

    gain: torch.Tensor  # complex128 [path]
    delay: torch.Tensor  # float64 [path], seconds
    departure: torch.Tensor  # float64 [path, 3]
    arrival: torch.Tensor  # float64 [path, 3]


class Environment:
    """One environment of a cell, fully determined by ``(seed, index)``.

    Args:
        config: the cell.
        index: the environment's number, from 1; LASCO draws even ones in line of sight, odd ones not.
        seed: the cell's seed.
        los: overrides the rule by index.
    """

    def __init__(self, config: CellConfig, index: int, seed: int, *, los: bool | None = None):
        if index < 1:
            raise ValueError(f"index: expected at least 1, got {index}")
        if config.patches < 1:
            raise ValueError(f"patches: expected at least 1, got {config.patches}")
        self.config, self.index, self.seed = config, index, seed
        self.los = index % 2 == 0 if los is None else los
        rng = np.random.default_rng([seed, index])
        self.centre = self._draw_centre(rng)
        self._statistics = umi_statistics(config.carrier, self.los)
        self._spreads = self._draw_spreads(rng)
        self._patches = [self._draw_patch(rng) for _ in range(config.patches)]
        self._patch_centres = self._draw_disc(rng, config.patches)

    def _draw_centre(self, rng: np.random.Generator) -> np.ndarray:
        inner, outer = self.config.min_distance + self.config.disc_radius, self.config.radius - self.config.disc_radius
        distance = math.sqrt(rng.uniform(inner**2, outer**2))
        azimuth = rng.uniform(-math.pi, math.pi)
        return np.array([distance * math.cos(azimuth), distance * math.sin(azimuth), self.config.ue_height])

    def _draw_disc(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Displacements from the centre, uniform over the disc, metres ``[count, 3]``."""
        radius = self.config.disc_radius * np.sqrt(rng.random(count))
        azimuth = rng.uniform(-math.pi, math.pi, count)
        return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.zeros(count)], axis=1)

    def _draw_spreads(self, rng: np.random.Generator) -> dict[str, float]:
        """Large-scale parameters (step 4): spreads in seconds and degrees, the Rician factor in dB."""
        s = self._statistics
        c = s.correlation
        correlation = np.array([[1, c[0], c[1], c[3]], [c[0], 1, c[2], c[4]], [c[1], c[2], 1, c[5]], [c[3], c[4], c[5], 1]])
        normal = np.linalg.cholesky(correlation) @ rng.standard_normal(4)
        distance = float(np.hypot(*self.centre[:2]))
        if self.los:
            zenith_departure = max(-0.21, -14.8 * distance / 1000 + 0.01 * abs(self._drop) + 0.83)
        else:
            zenith_departure = max(-0.5, -3.1 * distance / 1000 + 0.01 * max(self._drop, 0.0) + 0.2)
        spread = {
            "delay": 10 ** (s.delay_spread[0] + s.delay_spread[1] * normal[0]),
            "azimuth_departure": min(104.0, 10 ** (s.azimuth_departure[0] + s.azimuth_departure[1] * normal[1])),
            "azimuth_arrival": min(104.0, 10 ** (s.azimuth_arrival[0] + s.azimuth_arrival[1] * normal[2])),
            "zenith_departure": min(52.0, 10 ** (zenith_departure + 0.35 * rng.standard_normal())),
            "zenith_departure_mean": 10**zenith_departure,
            "zenith_arrival": min(52.0, 10 ** (s.zenith_arrival[0] + s.zenith_arrival[1] * rng.standard_normal())),
        }
        if s.rician_db is not None:
            spread["rician_db"] = s.rician_db[0] + s.rician_db[1] * normal[3]
        return spread

    @property
    def _drop(self) -> float:
        return self.config.ue_height - self.config.bs_height

    def _draw_patch(self, rng: np.random.Generator) -> _Patch:
        """Clusters, powers, angles and ray phases (38.901, section 7.5, steps 5 to 10)."""
        s, spread, n = self._statistics, self._spreads, self._statistics.clusters
        rician_db = spread.get("rician_db")
        delay = -s.delay_scaling * spread["delay"] * np.log(rng.random(n))
        delay = np.sort(delay - delay.min())
        power = np.exp(-delay * (s.delay_scaling - 1) / (s.delay_scaling * spread["delay"]))
        power *= 10 ** (-s.cluster_shadowing_db * rng.standard_normal(n) / 10)
        power /= power.sum()
        ranking = power.copy()  # the angles' powers include the direct ray, the scattered gains do not
        if rician_db is not None:
            k = rician_db
            delay /= 0.7705 - 0.0433 * k + 0.0002 * k**2 + 0.000017 * k**3
            linear = 10 ** (k / 10)
            ranking /= linear + 1
            ranking[0] += linear / (linear + 1)
            power /= linear + 1
        # Without a strong direct ray, clusters 25 dB below the strongest carry nothing; as in step 6 they are dropped.
        power[ranking < ranking.max() * 10**-2.5] = 0.0
        azimuth_departure = self._azimuths(rng, ranking, spread["azimuth_departure"], s.cluster_azimuth_departure)
        azimuth_arrival = self._azimuths(rng, ranking, spread["azimuth_arrival"], s.cluster_azimuth_arrival)
        zenith_departure = self._zeniths(rng, ranking, spread["zenith_departure"], 0.375 * spread["zenith_departure_mean"])
        zenith_arrival = self._zeniths(rng, ranking, spread["zenith_arrival"], s.cluster_zenith_arrival)
        los_azimuth, los_zenith = self._los_angles()
        if not self.los:
            offset = -(10 ** (-1.5 * math.log10(max(10.0, float(np.hypot(*self.centre[:2])))) + 3.3))
            zenith_departure = zenith_departure + offset
        departure = _direction(los_azimuth + np.deg2rad(azimuth_departure), los_zenith + np.deg2rad(zenith_departure))
        # Seen from the UE the BS lies in the opposite direction.
        arrival = _direction(
            los_azimuth + math.pi + np.deg2rad(azimuth_arrival), math.pi - los_zenith + np.deg2rad(zenith_arrival)
        )
        rays = len(_RAY_OFFSETS)
        ray_delay = np.repeat(delay[:, None], rays, axis=1)
        for strongest in np.argsort(ranking)[-2:]:
            ray_delay[strongest] += _SUB_CLUSTER_DELAY[_SUB_CLUSTER] * s.cluster_delay
        phase = rng.uniform(-math.pi, math.pi, (n, rays))
        gain = np.sqrt(power / rays)[:, None] * np.exp(1j * phase)
        kept = power > 0
        return _Patch(
            *(torch.from_numpy(value[kept].reshape(-1)) for value in (gain, ray_delay)),
            *(torch.from_numpy(value[kept].reshape(-1, 3)) for value in (departure, arrival)),
        )

    def _azimuths(self, rng: np.random.Generator, power: np.ndarray, spread: float, within: float) -> np.ndarray:
        """Ray azimuths relative to the direct ray, degrees ``[cluster, ray]`` (eqs. 7.5-9 to 7.5-13)."""
        n = len(power)
        scale = _AZIMUTH_SCALING[n]
        if self.los:
            k = self._spreads["rician_db"]
            scale *= 1.1035 - 0.028 * k - 0.002 * k**2 + 0.0001 * k**3
        centre = 2 * (spread / 1.4) * np.sqrt(-np.log(power / power.max())) / scale
        centre = rng.choice([-1.0, 1.0], n) * centre + rng.standard_normal(n) * spread / 7
        if self.los:
            centre = centre - centre[0]
        return centre[:, None] + within * self._shuffled_offsets(rng, n)

    def _zeniths(self, rng: np.random.Generator, power: np.ndarray, spread: float, within: float) -> np.ndarray:
        """Ray zeniths relative to the direct ray, degrees ``[cluster, ray]`` (eqs. 7.5-14 to 7.5-20)."""
        n = len(power)
        scale = _ZENITH_SCALING[n]
        if self.los:
            k = self._spreads["rician_db"]
            scale *= 1.3086 + 0.0339 * k - 0.0077 * k**2 + 0.0002 * k**3
        centre = -spread * np.log(power / power.max()) / scale
        centre = rng.choice([-1.0, 1.0], n) * centre + rng.standard_normal(n) * spread / 7
        if self.los:
            centre = centre - centre[0]
        return centre[:, None] + within * self._shuffled_offsets(rng, n)

    @staticmethod
    def _shuffled_offsets(rng: np.random.Generator, clusters: int) -> np.ndarray:
        """Random coupling of departure and arrival rays within a cluster (step 8)."""
        return rng.permuted(np.tile(_RAY_OFFSETS, (clusters, 1)), axis=1)

    def _los_angles(self) -> tuple[float, float]:
        offset = self.centre - np.array([0.0, 0.0, self.config.bs_height])
        return math.atan2(offset[1], offset[0]), math.acos(offset[2] / np.linalg.norm(offset))

    def sample(self, count: int, *, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
        """Channels at ``count`` UE positions uniform over the disc.

        Args:
            count: number of samples; 0 gives an empty batch.
            seed: numbers the draw; the same environment and seed give the same samples.
            dtype: ``torch.complex64`` or ``torch.complex128``.

        Returns:
            complex ``[count, antenna, subcarrier]`` with mean power 1 per entry before per-sample normalisation.
        """
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        rng = np.random.default_rng([self.seed, self.index, 1, seed])
        displacement = self._draw_disc(rng, count)
        array, grid = self.config.array, self.config.grid
        nearest = np.linalg.norm(displacement[:, None] - self._patch_centres[None], axis=2).argmin(axis=1)
        h = torch.empty(count, len(array), grid.subcarriers, dtype=dtype)
        for index, patch in enumerate(self._patches):
            members = torch.from_numpy(np.flatnonzero(nearest == index))
            turn = 2 * math.pi / self.config.wavelength * (torch.from_numpy(displacement)[members] @ patch.arrival.T)
            rays = Rays(patch.gain.to(dtype) * phasor(turn, dtype), patch.delay, patch.departure)
            h[members] = synthesize(rays, array, grid, dtype=dtype)
        if self.los:
            h += synthesize(self._direct_rays(displacement), array, grid, dtype=dtype)
        return h

    def _direct_rays(self, displacement: np.ndarray) -> Rays:
        """The exact line-of-sight ray to every position; delays are relative to the disc's centre."""
        bs = np.array([0.0, 0.0, self.config.bs_height])
        offset = self.centre + displacement - bs
        distance = np.linalg.norm(offset, axis=1)
        reference = np.linalg.norm(self.centre - bs)
        linear = 10 ** (self._spreads["rician_db"] / 10)
        phase = -2 * math.pi * (distance - reference) / self.config.wavelength
        gain = math.sqrt(linear / (linear + 1)) * np.exp(1j * phase)
        return Rays(
            gain=torch.from_numpy(gain[:, None]),
            delay=torch.from_numpy((distance - reference)[:, None] / SPEED_OF_LIGHT),
            direction=torch.from_numpy((offset / distance[:, None])[:, None, :]),
        )
