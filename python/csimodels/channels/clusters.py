"""Clusters and rays of 3GPP TR 38.901 (section 7.5, steps 4 to 8): of one link, or of a batch of independent links.

All draws take a ``shape``, ``()`` for one link; links are leading axes. Zenith spreads are drawn independently of the
other parameters.
"""

from __future__ import annotations

import numpy as np

from csimodels.channels.scenarios import Statistics

# 38.901, Table 7.5-3: ray offsets within a cluster of 1 degree rms, used with both signs.
RAY_OFFSETS = np.array([0.0447, 0.1413, 0.2492, 0.3715, 0.5129, 0.6797, 0.8844, 1.1481, 1.5195, 2.1551])
RAY_OFFSETS = np.stack([RAY_OFFSETS, -RAY_OFFSETS], axis=1).reshape(-1)
RAYS = len(RAY_OFFSETS)
# 38.901, Table 7.5-5: rays of the two strongest clusters split over three sub-clusters (1-based rays in the table).
_SUB_CLUSTER = np.zeros(20, dtype=int)
_SUB_CLUSTER[[8, 9, 10, 11, 16, 17]] = 1
_SUB_CLUSTER[[12, 13, 14, 15]] = 2
_SUB_CLUSTER_DELAY = np.array([0.0, 1.28, 2.56])  # in cluster delay spreads
_AZIMUTH_SCALING = {10: 1.090, 11: 1.123, 12: 1.146, 19: 1.273, 20: 1.289}  # Table 7.5-2
_ZENITH_SCALING = {10: 0.957, 11: 1.031, 12: 1.104, 19: 1.184, 20: 1.178}  # Table 7.5-4
CLUSTERS = tuple(_AZIMUTH_SCALING)  # the numbers of clusters that these tables know


def sub_cluster_delays(cluster_delay: float) -> np.ndarray:
    """What the 20 rays of a strong cluster arrive after its first, seconds ``[20]`` (38.901, eq. 7.5-26)."""
    return _SUB_CLUSTER_DELAY[_SUB_CLUSTER] * cluster_delay


def draw_spreads(
    rng: np.random.Generator,
    statistics: Statistics,
    zenith_departure: tuple[float | np.ndarray, float | np.ndarray],
    shape: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """Large-scale parameters (step 4).

    Args:
        rng: is advanced. statistics: of the scenario.
        zenith_departure: mean and standard deviation of the log10 zenith spread of departure in degrees, of all links
            or each, ``[*shape]``.
        shape: of the batch of links.

    Returns:
        each ``[*shape]``: ``delay`` in seconds; ``azimuth_departure``, ``azimuth_arrival``, ``zenith_departure``,
        ``zenith_departure_mean`` (the scenario's median) and ``zenith_arrival`` in degrees; in line of sight
        ``rician_db``.
    """
    s, c = statistics, statistics.correlation
    correlation = np.array([[1, c[0], c[1], c[3]], [c[0], 1, c[2], c[4]], [c[1], c[2], 1, c[5]], [c[3], c[4], c[5], 1]])
    normal = np.linalg.cholesky(correlation) @ rng.standard_normal((4, *shape))
    zenith_mean, zenith_deviation = zenith_departure
    departure = zenith_mean + zenith_deviation * rng.standard_normal(shape)
    spread = {
        "delay": 10 ** (s.delay_spread[0] + s.delay_spread[1] * normal[0]),
        "azimuth_departure": np.minimum(104.0, 10 ** (s.azimuth_departure[0] + s.azimuth_departure[1] * normal[1])),
        "azimuth_arrival": np.minimum(104.0, 10 ** (s.azimuth_arrival[0] + s.azimuth_arrival[1] * normal[2])),
        "zenith_departure": np.minimum(52.0, 10**departure),
        "zenith_departure_mean": 10**zenith_mean + np.zeros(shape),
        "zenith_arrival": np.minimum(
            52.0, 10 ** (s.zenith_arrival[0] + s.zenith_arrival[1] * rng.standard_normal(shape))
        ),
    }
    if s.rician_db is not None:
        spread["rician_db"] = s.rician_db[0] + s.rician_db[1] * normal[3]
    return spread


def draw_clusters(
    rng: np.random.Generator, statistics: Statistics, spread: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters by delay (steps 5 and 6), each ``[..., cluster]``; in line of sight where there is a ``rician_db``.

    Returns:
        delays in seconds; the powers that the angles are drawn by, which count the direct ray in the first cluster;
        the scattered powers, 0 where the cluster is dropped.
    """
    s, delay_spread = statistics, np.asarray(spread["delay"])[..., None]
    shape = (*delay_spread.shape[:-1], s.clusters)
    delay = -s.delay_scaling * delay_spread * np.log(rng.random(shape))
    delay = np.sort(delay - delay.min(axis=-1, keepdims=True), axis=-1)
    power = np.exp(-delay * (s.delay_scaling - 1) / (s.delay_scaling * delay_spread))
    power *= 10 ** (-s.cluster_shadowing_db * rng.standard_normal(shape) / 10)
    power /= power.sum(axis=-1, keepdims=True)
    ranking = power.copy()
    if "rician_db" in spread:
        k = np.asarray(spread["rician_db"])
        delay /= np.asarray(0.7705 - 0.0433 * k + 0.0002 * k**2 + 0.000017 * k**3)[..., None]
        linear = np.asarray(10 ** (k / 10))[..., None]
        ranking /= linear + 1
        ranking[..., :1] += linear / (linear + 1)
        power /= linear + 1
    # Step 6 does not say whether "25 dB below the strongest cluster" counts the direct ray. Here it does, which in
    # line of sight keeps 7 of 12 clusters (median), where without it 11 would stay.
    power[ranking < ranking.max(axis=-1, keepdims=True) * 10**-2.5] = 0.0
    return delay, ranking, power


def draw_azimuths(
    rng: np.random.Generator,
    power: np.ndarray,
    spread: np.ndarray,
    within: float,
    rician_db: np.ndarray | None = None,
) -> np.ndarray:
    """Ray azimuths relative to the direct ray, degrees ``[..., cluster, ray]`` (eqs. 7.5-9 to 7.5-13).

    Args:
        rng: is advanced. power: of the clusters, ``[..., cluster]``, that of the direct ray included.
        spread: of the link, degrees ``[...]``. within: of a cluster, degrees.
        rician_db: of the link in line of sight.
    """
    scale = np.asarray(_AZIMUTH_SCALING[power.shape[-1]])
    if rician_db is not None:
        k = np.asarray(rician_db)
        scale = scale * (1.1035 - 0.028 * k - 0.002 * k**2 + 0.0001 * k**3)
    spread = np.asarray(spread)[..., None]
    centre = 2 * (spread / 1.4) * np.sqrt(-np.log(power / power.max(axis=-1, keepdims=True))) / scale[..., None]
    return _with_rays(rng, centre, spread, np.asarray(within), rician_db is not None)


def draw_zeniths(
    rng: np.random.Generator,
    power: np.ndarray,
    spread: np.ndarray,
    within: float | np.ndarray,
    rician_db: np.ndarray | None = None,
) -> np.ndarray:
    """Ray zeniths relative to the direct ray, degrees ``[..., cluster, ray]`` (eqs. 7.5-14 to 7.5-20).

    Arguments as for :func:`draw_azimuths`; ``within`` may be of each link, ``[...]``.
    """
    scale = np.asarray(_ZENITH_SCALING[power.shape[-1]])
    if rician_db is not None:
        k = np.asarray(rician_db)
        scale = scale * (1.3086 + 0.0339 * k - 0.0077 * k**2 + 0.0002 * k**3)
    spread = np.asarray(spread)[..., None]
    centre = -spread * np.log(power / power.max(axis=-1, keepdims=True)) / scale[..., None]
    return _with_rays(rng, centre, spread, np.asarray(within), rician_db is not None)


def _with_rays(
    rng: np.random.Generator, centre: np.ndarray, spread: np.ndarray, within: np.ndarray, los: bool
) -> np.ndarray:
    """Signs and scatter of the clusters' angles, and the rays around them with a random coupling (step 8)."""
    centre = rng.choice([-1.0, 1.0], centre.shape) * centre + rng.standard_normal(centre.shape) * spread / 7
    if los:
        centre = centre - centre[..., :1]
    offsets = rng.permuted(np.broadcast_to(RAY_OFFSETS, (*centre.shape, RAYS)), axis=-1)
    return centre[..., None] + within[..., None, None] * offsets


def split_delays(delay: np.ndarray, ranking: np.ndarray, cluster_delay: float) -> np.ndarray:
    """Delays of all rays, seconds ``[..., cluster, ray]``: the two strongest clusters are split (step 11).

    Args:
        delay, ranking: as :func:`draw_clusters` gives them, ``[..., cluster]``.
        cluster_delay: delay spread within a cluster, seconds.
    """
    strongest = np.argsort(ranking, axis=-1)[..., -2:]
    split = np.zeros_like(delay, dtype=bool)
    np.put_along_axis(split, strongest, True, axis=-1)
    return delay[..., None] + np.where(split[..., None], sub_cluster_delays(cluster_delay), 0.0)
