"""UEs that move in a straight line, each with large-scale parameters and rays of its own, out of sight.

Unlike a disc's (:mod:`csimodels.channels.disc`), these UEs share nothing: every link is an independent draw of 38.901,
section 7.5. Within the milliseconds of a few slots a UE moves by some centimetres, so that its angles and delays stay
and every ray turns by its Doppler shift alone, as in the baseline model of 38.901 (eq. 7.5-22).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import torch

from csimodels.channels.clusters import RAYS, draw_azimuths, draw_clusters, draw_spreads, draw_zeniths, split_delays
from csimodels.channels.disc import unit_vectors
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, Rays, SubcarrierGrid, phasor
from csimodels.channels.scenarios import Statistics, check_scenario

_BLOCK_ELEMENTS = 2**22  # complex64 gains at a time: 32 MiB


class Area(Protocol):
    """Where UEs are: a carrier, a sector of a ring around the BS, the heights, and how the links are drawn."""

    @property
    def scenario(self) -> str:
        """Of :data:`csimodels.channels.scenarios.SCENARIOS`."""

    @property
    def carrier(self) -> float:
        """Hz."""

    @property
    def sector(self) -> tuple[float, float]:
        """Azimuths of the UEs, radians."""

    @property
    def distance(self) -> tuple[float, float]:
        """Horizontal distances of the UEs, metres."""

    @property
    def bs_height(self) -> float:
        """Metres."""

    @property
    def ue_height(self) -> float:
        """Metres."""

    @property
    def generator(self) -> str:
        """``"builtin"`` or ``"sionna"``."""

    @property
    def statistics(self) -> Statistics:
        """Of the links that the built-in generator draws."""


@dataclasses.dataclass(frozen=True, eq=False)
class MovingUsers:
    """The links of some UEs; all of a UE's rays are there, those of dropped clusters with a gain of 0.

    Attributes:
        position: float64 ``[UE, 3]``, metres from the foot of the BS at time 0.
        heading: float64 ``[UE]``, azimuth of the movement, radians.
        gain: complex128 ``[UE, path]``, at the array's origin, the carrier and time 0.
        delay: float64 ``[UE, path]``, seconds after the first ray.
        departure: float64 ``[UE, path, 3]``, unit vectors from the BS along the ray.
        arrival: float64 ``[UE, path, 3]``, unit vectors from the UE to where the ray comes from.
    """

    position: torch.Tensor
    heading: torch.Tensor
    gain: torch.Tensor
    delay: torch.Tensor
    departure: torch.Tensor
    arrival: torch.Tensor

    def __len__(self) -> int:
        return len(self.gain)

    def __getitem__(self, items: slice) -> MovingUsers:
        """Some of the UEs."""
        return MovingUsers(*(getattr(self, field.name)[items] for field in dataclasses.fields(self)))

    def rays(self, speed: torch.Tensor, carrier: float) -> Rays:
        """With the Doppler shifts of ``speed``, float64 ``[UE]`` in m/s."""
        direction = torch.stack([self.heading.cos(), self.heading.sin(), torch.zeros_like(self.heading)], dim=1)
        along = (self.arrival @ direction[:, :, None])[..., 0]
        return Rays(self.gain, self.delay, self.departure, speed[:, None] * along * (carrier / SPEED_OF_LIGHT))

    def carrier_channels(self, rows: int, columns: int, spacing: float) -> torch.Tensor:
        """Channels at the carrier and time 0 of a planar array: complex64 ``[UE, rows * columns]``, row-major.

        The phases of a planar array are products of one per row and one per column, which for 8 x 16 elements is a
        fifth of the phases that :func:`csimodels.channels.rays.synthesize` evaluates.
        """
        lines = [torch.arange(count, dtype=torch.float64) * (2 * math.pi * spacing) for count in (rows, columns)]
        h = torch.empty(len(self), rows * columns, dtype=torch.complex64)
        step = max(1, _BLOCK_ELEMENTS // (self.gain.shape[1] * max(rows, columns)))
        for start in range(0, len(self), step):
            part = self[start : start + step]
            z, y = (
                phasor(part.departure[..., axis, None] * line, torch.complex64)
                for axis, line in zip((2, 1), lines, strict=True)
            )
            planes = (z * part.gain.to(torch.complex64)[..., None]).mT @ y
            h[start : start + step] = planes.flatten(1)
        return h


def slot_channels(
    rays: Rays,
    positions: torch.Tensor,
    grid: SubcarrierGrid,
    times: torch.Tensor,
    *,
    dtype: torch.dtype = torch.complex64,
) -> torch.Tensor:
    """Channels of moving UEs, each at antennas of its own.

    Args:
        rays: attributes ``[UE, path]`` and ``[UE, path, 3]``, with Doppler shifts.
        positions: of the antennas, wavelengths, float64 ``[antenna, 3]`` or ``[UE, antenna, 3]``.
        grid: of the subcarriers. times: seconds, float64 ``[slot]``.
        dtype: ``torch.complex64`` or ``torch.complex128``; phases are reduced in float64.

    Returns:
        complex ``[UE, antenna, slot, subcarrier]``.

    Raises:
        ValueError: rays without Doppler shifts.
    """
    if rays.doppler is None:
        raise ValueError("rays: expected Doppler shifts, got None")
    (users, paths), antennas = rays.gain.shape, positions.shape[-2]
    h = torch.empty(users, antennas, len(times), grid.subcarriers, dtype=dtype)
    step = max(1, _BLOCK_ELEMENTS // (paths * antennas * len(times)))
    for start in range(0, users, step):
        part = slice(start, start + step)
        at = positions if positions.ndim == 2 else positions[part]
        steering = phasor(2 * math.pi * (rays.direction[part] @ at.mT), dtype)  # [UE, path, antenna]
        turn = phasor(2 * math.pi * rays.doppler[part][..., None] * times, dtype)  # [UE, path, slot]
        turn *= rays.gain[part].to(dtype)[..., None]
        weighted = (steering[..., None] * turn[:, :, None, :]).flatten(2).mT  # [UE, antenna * slot, path]
        response = grid.response(rays.delay[part], dtype)
        h[part] = (weighted @ response).unflatten(1, (antennas, len(times)))
    return h


def draw_users(area: Area, count: int, key: tuple[int, ...]) -> MovingUsers:
    """``count`` UEs, fully determined by the arguments.

    Args:
        area: where they are.
        count: of UEs.
        key: numbers of at least 0 that name the draw.

    Raises:
        ModuleNotFoundError: Sionna draws the links and is not installed; names the extra.
    """
    rng = np.random.default_rng([*key, 0])
    azimuth = rng.uniform(*area.sector, count)
    distance = rng.uniform(*area.distance, count)
    heading = rng.uniform(-math.pi, math.pi, count)
    position = np.stack(
        [distance * np.cos(azimuth), distance * np.sin(azimuth), np.full(count, area.ue_height)], axis=1
    )
    draw = _sionna if area.generator == "sionna" else _builtin
    power, delay, departure, arrival = draw(area, position, key)
    # Step 10; on a generator of its own, so that the two ways to draw links share the places and the phases.
    phase = np.random.default_rng([*key, 1]).uniform(-math.pi, math.pi, delay.shape)
    gain = np.sqrt(power / RAYS)[..., None] * np.exp(1j * phase)
    return MovingUsers(
        position=torch.from_numpy(position),
        heading=torch.from_numpy(heading),
        gain=torch.from_numpy(gain.reshape(count, -1)),
        delay=torch.from_numpy(delay.reshape(count, -1)),
        departure=torch.from_numpy(departure.reshape(count, -1, 3)),
        arrival=torch.from_numpy(arrival.reshape(count, -1, 3)),
    )


Links = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _builtin(area: Area, position: np.ndarray, key: tuple[int, ...]) -> Links:
    """Cluster powers ``[UE, cluster]``, delays ``[UE, cluster, ray]`` and unit vectors ``[UE, cluster, ray, 3]``."""
    rng, s = np.random.default_rng([*key, 2]), area.statistics
    tables, count = check_scenario(area.scenario), len(position)
    zenith_departure = [
        tables.zenith_departure(area.carrier, False, float(distance), area.bs_height, area.ue_height)
        for distance in np.hypot(position[:, 0], position[:, 1])
    ]
    moments = np.array([entry.spread for entry in zenith_departure]).T
    offset = np.array([entry.offset for entry in zenith_departure])[:, None, None]
    spread = draw_spreads(rng, s, (moments[0], moments[1]), (count,))
    delay, ranking, power = draw_clusters(rng, s, spread)
    azimuth_departure = draw_azimuths(rng, ranking, spread["azimuth_departure"], s.cluster_azimuth_departure)
    azimuth_arrival = draw_azimuths(rng, ranking, spread["azimuth_arrival"], s.cluster_azimuth_arrival)
    within = 0.375 * spread["zenith_departure_mean"]
    zenith_departure = draw_zeniths(rng, ranking, spread["zenith_departure"], within) + offset
    zenith_arrival = draw_zeniths(rng, ranking, spread["zenith_arrival"], s.cluster_zenith_arrival)
    direct = position - [0.0, 0.0, area.bs_height]
    azimuth = np.arctan2(direct[:, 1], direct[:, 0])[:, None, None]
    zenith = np.arccos(direct[:, 2] / np.linalg.norm(direct, axis=1))[:, None, None]
    departure = unit_vectors(azimuth + np.deg2rad(azimuth_departure), zenith + np.deg2rad(zenith_departure))
    # Seen from the UE the BS lies in the opposite direction.
    arrival = unit_vectors(
        azimuth + math.pi + np.deg2rad(azimuth_arrival), math.pi - zenith + np.deg2rad(zenith_arrival)
    )
    return power, split_delays(delay, ranking, s.cluster_delay), departure, arrival


def _sionna(area: Area, position: np.ndarray, key: tuple[int, ...]) -> Links:
    """As :func:`_builtin`; every UE is a batch entry of its own, which makes Sionna draw it independently."""
    from csimodels.channels.sionna import seeded, system_level_links

    number = np.random.SeedSequence([*key, 2]).generate_state(1, np.uint64)[0]
    with seeded(int(number)) as tr38901:
        power, delay, angles, _ = system_level_links(
            tr38901,
            area.scenario,
            area.carrier,
            bs=np.array([0.0, 0.0, area.bs_height]),
            ues=position[:, None],
            los=False,
        )
    return power, delay, unit_vectors(angles[0], angles[1]), unit_vectors(angles[2], angles[3])


def chosen_antennas(array: AntennaArray, antennas: int | None, users: int, rng: np.random.Generator) -> torch.Tensor:
    """Positions of ``antennas`` elements drawn without repetition for every UE, in their order in the array.

    Returns:
        float64 ``[UE, antennas, 3]``; all of the array ``[antenna, 3]`` for None.
    """
    if antennas is None:
        return array.positions
    order = rng.random((users, len(array))).argsort(axis=1)[:, :antennas]
    return array.positions[torch.from_numpy(np.sort(order, axis=1))]
