"""Built-in channel generator: clustered multipath with the statistics of 3GPP TR 38.901.

An *environment* is a disc in a cell. Its large-scale parameters and rays are drawn once (38.901, section 7.5, steps 4
to 10); :mod:`csimodels.channels.disc` says what a UE position inside makes of them. The tables are release 16's, those
of the scenarios in :mod:`csimodels.channels.scenarios`. Zenith spreads are drawn independently of the other parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from csimodels.channels.disc import CellConfig, DiscEnvironment, RaySet, unit_vectors
from csimodels.channels.scenarios import Statistics, check_scenario, rma_statistics, uma_statistics, umi_statistics

__all__ = [
    "CellConfig",
    "Environment",
    "Statistics",
    "rma_statistics",
    "sub_cluster_delays",
    "uma_statistics",
    "umi_statistics",
]

# 38.901, Table 7.5-3: ray offsets within a cluster of 1 degree rms, used with both signs.
_RAY_OFFSETS = np.array([0.0447, 0.1413, 0.2492, 0.3715, 0.5129, 0.6797, 0.8844, 1.1481, 1.5195, 2.1551])
_RAY_OFFSETS = np.stack([_RAY_OFFSETS, -_RAY_OFFSETS], axis=1).reshape(-1)
# 38.901, Table 7.5-5: rays of the two strongest clusters split over three sub-clusters (1-based rays in the table).
_SUB_CLUSTER = np.zeros(20, dtype=int)
_SUB_CLUSTER[[8, 9, 10, 11, 16, 17]] = 1
_SUB_CLUSTER[[12, 13, 14, 15]] = 2
_SUB_CLUSTER_DELAY = np.array([0.0, 1.28, 2.56])  # in cluster delay spreads
_AZIMUTH_SCALING = {10: 1.090, 11: 1.123, 12: 1.146, 19: 1.273, 20: 1.289}  # Table 7.5-2
_ZENITH_SCALING = {10: 0.957, 11: 1.031, 12: 1.104, 19: 1.184, 20: 1.178}  # Table 7.5-4


def sub_cluster_delays(cluster_delay: float) -> np.ndarray:
    """What the 20 rays of a strong cluster arrive after its first, seconds ``[20]`` (38.901, eq. 7.5-26)."""
    return _SUB_CLUSTER_DELAY[_SUB_CLUSTER] * cluster_delay


class Environment(DiscEnvironment):
    """One environment of the built-in generator; see :class:`csimodels.channels.disc.DiscEnvironment`.

    Args:
        config, index, seed, los: as there.
        paths: how many paths reach the UE at most, the direct one included; None keeps all 20 rays of every cluster.
            Fewer are what measured and ray-traced channels have. They are taken in turn from all clusters, strongest
            cluster first, and carry their cluster's power; the clusters that get none are dropped. (38.901 has no such
            choice.)
        scenario: ``"umi"``, ``"uma"`` or ``"rma"``. Heights are the cell's, whatever the scenario.

    Attributes:
        spreads: the large-scale parameters drawn for it (step 4): ``delay`` in seconds, ``azimuth_departure``,
            ``azimuth_arrival``, ``zenith_departure`` and ``zenith_arrival`` in degrees, the scenario's median
            ``zenith_departure_mean``, and in line of sight ``rician_db``.
    """

    def __init__(
        self,
        config: CellConfig,
        index: int,
        seed: int,
        *,
        los: bool | None = None,
        paths: int | None = None,
        scenario: str = "umi",
    ):
        super().__init__(config, index, seed, los=los)
        tables = check_scenario(scenario)
        least = 2 if self.los else 1  # one of them scattered
        if paths is not None and paths < least:
            raise ValueError(f"paths: expected at least {least}, got {paths}")
        self._scattered_paths = None if paths is None else paths - self.los
        self._statistics = tables.statistics(config.carrier, self.los)
        self._zenith_departure = tables.zenith_departure(
            config.carrier, self.los, self._distance, config.bs_height, config.ue_height
        )
        self.spreads = self._draw_spreads(self._rng)
        self.ray_sets = [self._draw_rays(self._rng) for _ in range(config.patches)]
        self.patch_centres = self._draw_disc(self._rng, config.patches)

    def _draw_spreads(self, rng: np.random.Generator) -> dict[str, float]:
        """Large-scale parameters (step 4): spreads in seconds and degrees, the Rician factor in dB."""
        s = self._statistics
        c = s.correlation
        correlation = np.array(
            [[1, c[0], c[1], c[3]], [c[0], 1, c[2], c[4]], [c[1], c[2], 1, c[5]], [c[3], c[4], c[5], 1]]
        )
        normal = np.linalg.cholesky(correlation) @ rng.standard_normal(4)
        zenith_mean, zenith_deviation = self._zenith_departure.spread
        spread = {
            "delay": 10 ** (s.delay_spread[0] + s.delay_spread[1] * normal[0]),
            "azimuth_departure": min(104.0, 10 ** (s.azimuth_departure[0] + s.azimuth_departure[1] * normal[1])),
            "azimuth_arrival": min(104.0, 10 ** (s.azimuth_arrival[0] + s.azimuth_arrival[1] * normal[2])),
            "zenith_departure": min(52.0, 10 ** (zenith_mean + zenith_deviation * rng.standard_normal())),
            "zenith_departure_mean": 10**zenith_mean,
            "zenith_arrival": min(52.0, 10 ** (s.zenith_arrival[0] + s.zenith_arrival[1] * rng.standard_normal())),
        }
        if s.rician_db is not None:
            spread["rician_db"] = s.rician_db[0] + s.rician_db[1] * normal[3]
        return spread

    @property
    def _distance(self) -> float:
        """Of the disc's centre from the BS, horizontal."""
        return float(np.hypot(*self.centre[:2]))

    def _draw_clusters(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Clusters by delay (steps 5 and 6), each ``[cluster]``.

        Returns:
            delays in seconds; the powers that the angles are drawn by, which count the direct ray in the first cluster;
            the scattered powers, 0 where the cluster is dropped.
        """
        s, spread, n = self._statistics, self.spreads["delay"], self._statistics.clusters
        delay = -s.delay_scaling * spread * np.log(rng.random(n))
        delay = np.sort(delay - delay.min())
        power = np.exp(-delay * (s.delay_scaling - 1) / (s.delay_scaling * spread))
        power *= 10 ** (-s.cluster_shadowing_db * rng.standard_normal(n) / 10)
        power /= power.sum()
        ranking = power.copy()
        if self.los:
            k = self.spreads["rician_db"]
            delay /= 0.7705 - 0.0433 * k + 0.0002 * k**2 + 0.000017 * k**3
            linear = 10 ** (k / 10)
            ranking /= linear + 1
            ranking[0] += linear / (linear + 1)
            power /= linear + 1
        # Step 6 does not say whether "25 dB below the strongest cluster" counts the direct ray. Here it does, which in
        # line of sight keeps 7 of 12 clusters (median), where without it 11 would stay.
        power[ranking < ranking.max() * 10**-2.5] = 0.0
        return delay, ranking, power

    def _draw_rays(self, rng: np.random.Generator) -> RaySet:
        """Angles, delays and phases of the rays of all clusters (steps 7, 8, 10, and sub-clusters of step 11)."""
        s, spread = self._statistics, self.spreads
        delay, ranking, power = self._draw_clusters(rng)
        azimuth_departure = self._azimuths(rng, ranking, spread["azimuth_departure"], s.cluster_azimuth_departure)
        azimuth_arrival = self._azimuths(rng, ranking, spread["azimuth_arrival"], s.cluster_azimuth_arrival)
        zenith_departure = self._zeniths(
            rng, ranking, spread["zenith_departure"], 0.375 * spread["zenith_departure_mean"]
        )
        zenith_arrival = self._zeniths(rng, ranking, spread["zenith_arrival"], s.cluster_zenith_arrival)
        azimuth, zenith = self._direct_angles()
        zenith_departure += self._zenith_departure.offset
        departure = unit_vectors(azimuth + np.deg2rad(azimuth_departure), zenith + np.deg2rad(zenith_departure))
        # Seen from the UE the BS lies in the opposite direction.
        arrival = unit_vectors(
            azimuth + math.pi + np.deg2rad(azimuth_arrival), math.pi - zenith + np.deg2rad(zenith_arrival)
        )
        rays = len(_RAY_OFFSETS)
        ray_delay = np.repeat(delay[:, None], rays, axis=1)
        for strongest in np.argsort(ranking)[-2:]:
            ray_delay[strongest] += sub_cluster_delays(s.cluster_delay)
        phase = rng.uniform(-math.pi, math.pi, (len(power), rays))
        gain = np.sqrt(power / rays)[:, None] * np.exp(1j * phase)
        linear = 10 ** (spread["rician_db"] / 10) if self.los else 0.0
        kept = np.repeat((power > 0)[:, None], rays, axis=1)
        if self._scattered_paths is not None:
            kept = self._thinned(rng, power, self._scattered_paths)
            gain *= np.sqrt(rays / np.maximum(kept.sum(axis=1, keepdims=True), 1))
        return RaySet(
            gain=torch.from_numpy(gain[kept]),
            delay=torch.from_numpy(ray_delay[kept]),
            departure=torch.from_numpy(departure[kept]),
            arrival=torch.from_numpy(arrival[kept]),
            direct=math.sqrt(linear / (linear + 1)),
        )

    @staticmethod
    def _thinned(rng: np.random.Generator, power: np.ndarray, paths: int) -> np.ndarray:
        """Which rays remain when ``paths`` are taken in turn from the clusters, bool ``[cluster, ray]``."""
        rays = len(_RAY_OFFSETS)
        strongest = np.argsort(-power)[: np.count_nonzero(power)]
        order = rng.permuted(np.tile(np.arange(rays), (len(strongest), 1)), axis=1)
        turns = np.stack([np.tile(strongest[:, None], (1, rays)), order], axis=2).transpose(1, 0, 2).reshape(-1, 2)
        kept = np.zeros((len(power), rays), dtype=bool)
        kept[tuple(turns[:paths].T)] = True
        return kept

    def _azimuths(self, rng: np.random.Generator, power: np.ndarray, spread: float, within: float) -> np.ndarray:
        """Ray azimuths relative to the direct ray, degrees ``[cluster, ray]`` (eqs. 7.5-9 to 7.5-13)."""
        n = len(power)
        scale = _AZIMUTH_SCALING[n]
        if self.los:
            k = self.spreads["rician_db"]
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
            k = self.spreads["rician_db"]
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
