"""Built-in channel generator: clustered multipath with the statistics of 3GPP TR 38.901.

An *environment* is a disc in a cell. Its large-scale parameters and rays are drawn once (38.901, section 7.5, steps 4
to 10, :mod:`csimodels.channels.clusters`); :mod:`csimodels.channels.disc` says what a UE position inside makes of them.
The tables are release 16's, those of the scenarios in :mod:`csimodels.channels.scenarios`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from csimodels.channels.clusters import (
    RAYS,
    draw_azimuths,
    draw_clusters,
    draw_spreads,
    draw_zeniths,
    split_delays,
)
from csimodels.channels.disc import CellConfig, DiscEnvironment, RaySet, unit_vectors
from csimodels.channels.scenarios import Statistics, check_scenario, rma_statistics, uma_statistics, umi_statistics

__all__ = [
    "CellConfig",
    "Environment",
    "Statistics",
    "rma_statistics",
    "uma_statistics",
    "umi_statistics",
]


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
        spreads = draw_spreads(self._rng, self._statistics, self._zenith_departure.spread)
        self.spreads = {name: float(value) for name, value in spreads.items()}
        self.ray_sets = [self._draw_rays(self._rng) for _ in range(config.patches)]
        self.patch_centres = self._draw_disc(self._rng, config.patches)

    @property
    def _distance(self) -> float:
        """Of the disc's centre from the BS, horizontal."""
        return float(np.hypot(*self.centre[:2]))

    def _draw_rays(self, rng: np.random.Generator) -> RaySet:
        """Angles, delays and phases of the rays of all clusters (steps 7, 8, 10, and sub-clusters of step 11)."""
        s, spread = self._statistics, {name: np.asarray(value) for name, value in self.spreads.items()}
        delay, ranking, power = draw_clusters(rng, s, spread)
        k = spread.get("rician_db")
        azimuth_departure = draw_azimuths(rng, ranking, spread["azimuth_departure"], s.cluster_azimuth_departure, k)
        azimuth_arrival = draw_azimuths(rng, ranking, spread["azimuth_arrival"], s.cluster_azimuth_arrival, k)
        zenith_departure = draw_zeniths(
            rng, ranking, spread["zenith_departure"], 0.375 * spread["zenith_departure_mean"], k
        )
        zenith_arrival = draw_zeniths(rng, ranking, spread["zenith_arrival"], s.cluster_zenith_arrival, k)
        azimuth, zenith = self._direct_angles()
        zenith_departure += self._zenith_departure.offset
        departure = unit_vectors(azimuth + np.deg2rad(azimuth_departure), zenith + np.deg2rad(zenith_departure))
        # Seen from the UE the BS lies in the opposite direction.
        arrival = unit_vectors(
            azimuth + math.pi + np.deg2rad(azimuth_arrival), math.pi - zenith + np.deg2rad(zenith_arrival)
        )
        ray_delay = split_delays(delay, ranking, s.cluster_delay)
        phase = rng.uniform(-math.pi, math.pi, (len(power), RAYS))
        gain = np.sqrt(power / RAYS)[:, None] * np.exp(1j * phase)
        linear = 10 ** (spread["rician_db"] / 10) if self.los else 0.0
        kept = np.repeat((power > 0)[:, None], RAYS, axis=1)
        if self._scattered_paths is not None:
            kept = self._thinned(rng, power, self._scattered_paths)
            gain *= np.sqrt(RAYS / np.maximum(kept.sum(axis=1, keepdims=True), 1))
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
        strongest = np.argsort(-power)[: np.count_nonzero(power)]
        order = rng.permuted(np.tile(np.arange(RAYS), (len(strongest), 1)), axis=1)
        turns = np.stack([np.tile(strongest[:, None], (1, RAYS)), order], axis=2).transpose(1, 0, 2).reshape(-1, 2)
        kept = np.zeros((len(power), RAYS), dtype=bool)
        kept[tuple(turns[:paths].T)] = True
        return kept
