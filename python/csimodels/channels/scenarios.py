"""Scenarios of 3GPP TR 38.901 (release 16) for the built-in generator: Table 7.5-6, and 7.5-7 to 7.5-9 on zeniths.

UMi street canyon, UMa and RMa, with and without line of sight. Lengths are metres, angles degrees, carriers Hz.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

__all__ = [
    "SCENARIOS",
    "Scenario",
    "Statistics",
    "ZenithDeparture",
    "check_scenario",
    "rma_statistics",
    "uma_statistics",
    "umi_statistics",
]


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
    cross_polarisation_db: tuple[float, float]  # XPR, mean and standard deviation
    cluster_zenith_arrival: float = 7.0
    cluster_shadowing_db: float = 3.0


@dataclasses.dataclass(frozen=True)
class ZenithDeparture:
    """What the zeniths of departure are drawn by: (mean, standard deviation) of the log10 spread, and the offset."""

    spread: tuple[float, float]
    offset: float  # degrees, added to all of them


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
            cross_polarisation_db=(9.0, 3.0),
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
        cross_polarisation_db=(8.0, 3.0),
    )


def uma_statistics(carrier: float, los: bool) -> Statistics:
    """UMa at ``carrier`` Hz (38.901, Table 7.5-6; below 6 GHz the table's 6 GHz values hold)."""
    x = _uma_frequency(carrier)
    cluster_delay = max(0.25, 6.5622 - 3.4084 * x) * 1e-9
    if los:
        return Statistics(
            clusters=12,
            delay_spread=(-0.0963 * x - 6.955, 0.66),
            azimuth_departure=(0.1114 * x + 1.06, 0.28),
            azimuth_arrival=(1.81, 0.20),
            zenith_arrival=(0.95, 0.16),
            rician_db=(9.0, 3.5),
            delay_scaling=2.5,
            cluster_delay=cluster_delay,
            cluster_azimuth_departure=5.0,
            cluster_azimuth_arrival=11.0,
            correlation=(0.4, 0.8, 0.0, -0.4, 0.0, -0.2),
            cross_polarisation_db=(8.0, 4.0),
        )
    return Statistics(
        clusters=20,
        delay_spread=(-0.204 * x - 6.28, 0.39),
        azimuth_departure=(-0.1144 * x + 1.5, 0.28),
        azimuth_arrival=(-0.27 * x + 2.08, 0.11),
        zenith_arrival=(-0.3236 * x + 1.512, 0.16),
        rician_db=None,
        delay_scaling=2.3,
        cluster_delay=cluster_delay,
        cluster_azimuth_departure=2.0,
        cluster_azimuth_arrival=15.0,
        correlation=(0.4, 0.6, 0.4, 0.0, 0.0, 0.0),
        cross_polarisation_db=(7.0, 3.0),
    )


def rma_statistics(carrier: float, los: bool) -> Statistics:
    """RMa (38.901, Table 7.5-6), which is the same at every ``carrier``."""
    if los:
        return Statistics(
            clusters=11,
            delay_spread=(-7.49, 0.55),
            azimuth_departure=(0.90, 0.38),
            azimuth_arrival=(1.52, 0.24),
            zenith_arrival=(0.47, 0.40),
            rician_db=(7.0, 4.0),
            delay_scaling=3.8,
            cluster_delay=_DEFAULT_CLUSTER_DELAY,
            cluster_azimuth_departure=2.0,
            cluster_azimuth_arrival=3.0,
            correlation=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            cross_polarisation_db=(12.0, 4.0),
            cluster_zenith_arrival=3.0,
        )
    return Statistics(
        clusters=10,
        delay_spread=(-7.43, 0.48),
        azimuth_departure=(0.95, 0.45),
        azimuth_arrival=(1.52, 0.13),
        zenith_arrival=(0.58, 0.37),
        rician_db=None,
        delay_scaling=1.7,
        cluster_delay=_DEFAULT_CLUSTER_DELAY,
        cluster_azimuth_departure=2.0,
        cluster_azimuth_arrival=3.0,
        correlation=(-0.4, 0.0, 0.0, 0.0, 0.0, 0.0),
        cross_polarisation_db=(7.0, 3.0),
        cluster_zenith_arrival=3.0,
    )


_DEFAULT_CLUSTER_DELAY = 3.91e-9  # seconds, where Table 7.5-6 says N/A (step 11)


def _uma_frequency(carrier: float) -> float:
    """log10 of GHz."""
    return math.log10(max(carrier / 1e9, 6.0))


def _umi_zenith(carrier: float, los: bool, distance: float, bs_height: float, ue_height: float) -> ZenithDeparture:
    """38.901, Table 7.5-8."""
    above = ue_height - bs_height
    if los:
        return ZenithDeparture((max(-0.21, -14.8 * distance / 1000 + 0.01 * abs(above) + 0.83), 0.35), 0.0)
    mean = max(-0.5, -3.1 * distance / 1000 + 0.01 * max(above, 0.0) + 0.2)
    return ZenithDeparture((mean, 0.35), -(10 ** (-1.5 * math.log10(max(10.0, distance)) + 3.3)))


def _uma_zenith(carrier: float, los: bool, distance: float, bs_height: float, ue_height: float) -> ZenithDeparture:
    """38.901, Table 7.5-7."""
    mean = -2.1 * distance / 1000 - 0.01 * (ue_height - 1.5)
    if los:
        return ZenithDeparture((max(-0.5, mean + 0.75), 0.40), 0.0)
    x = _uma_frequency(carrier)
    exponent = (0.208 * x - 0.782) * math.log10(max(25.0, distance)) - 0.13 * x + 2.03 - 0.07 * (ue_height - 1.5)
    return ZenithDeparture((max(-0.5, mean + 0.9), 0.49), 7.66 * x - 5.96 - 10**exponent)


def _rma_zenith(carrier: float, los: bool, distance: float, bs_height: float, ue_height: float) -> ZenithDeparture:
    """38.901, Table 7.5-9, whose offset is that of a BS of 35 m and a UE of 1.5 m."""
    height = -0.01 * (ue_height - 1.5)
    if los:
        return ZenithDeparture((max(-1.0, -0.17 * distance / 1000 + height + 0.22), 0.34), 0.0)
    offset = math.degrees(math.atan((35 - 3.5) / distance) - math.atan((35 - 1.5) / distance))
    return ZenithDeparture((max(-1.0, -0.19 * distance / 1000 + height + 0.28), 0.30), offset)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A scenario's tables.

    Attributes:
        statistics: ``(carrier, los)`` -> what does not depend on the place.
        zenith_departure: ``(carrier, los, distance, bs_height, ue_height)`` -> what does; the distance is horizontal.
    """

    statistics: Callable[[float, bool], Statistics]
    zenith_departure: Callable[[float, bool, float, float, float], ZenithDeparture]


SCENARIOS = {
    "umi": Scenario(umi_statistics, _umi_zenith),
    "uma": Scenario(uma_statistics, _uma_zenith),
    "rma": Scenario(rma_statistics, _rma_zenith),
}


def check_scenario(name: str) -> Scenario:
    """The scenario of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {name!r}")
    return SCENARIOS[name]
