"""Channels of the multi-task PHY network (Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer
Network", section V-A): UEs that move through UMa or UMi out of sight, seen by 16 x 8 antennas at 2.4 GHz.

The paper takes its channels from QuaDRiGa. Decided here, where it is silent:

- A slot is 0.5 ms, as in the public data generator of LLM4CP [13], whose carrier, subcarriers, speeds and numbers of
  slots the paper has; there too angles and delays stay while the UE moves (``use_3GPP_baseline``).
- The 21 clusters of 20 paths are QuaDRiGa's number for UMa out of sight, which counts the direct path, and there its
  power is 0 (K = -100 dB). The others are the 20 of 38.901, Table 7.5-6, which are drawn here.
- The BS is 25 m high in UMa and 10 m in UMi, UEs are at 1.5 m: 38.901's heights. Distances are horizontal; distances
  and azimuths are uniform each, headings over the full circle.
- Elements are isotropic and of one polarisation. In prediction every UE's channels are scaled to unit power per entry.
  UEs that are served together keep their path loss relative to each other, by 38.901's distance law (Table 7.4.1-1),
  without shadowing, and a sample has unit power per entry. With 4 UEs, 0 dBW and -10 dBW of noise zero forcing then
  reaches 29.3 bit/s/Hz, which is also the paper's sum rate (29.3 for its network, Table I); with UEs of equal gain it
  reaches 32.9, and no precoder differs from another by more than 0.01.
- Histories are noise-free; whoever uses them adds the noise.

UEs are drawn in blocks of 256, so that those of a smaller count are the first of a larger one, and a set of any size
needs the memory of a block and of its result. A UE stands at the same place, with the same rays, whatever its speed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from csimodels.channels.clusters import CLUSTERS
from csimodels.channels.disc import plain_fields
from csimodels.channels.moving_users import MovingUsers, chosen_antennas, draw_users, slot_channels
from csimodels.channels.presets import check_generator, unavailable_generator
from csimodels.channels.rays import AntennaArray, SubcarrierGrid
from csimodels.channels.raytracing import SPLITS
from csimodels.channels.scenarios import Statistics, check_scenario

_BLOCK = 256  # UEs; another number would be other channels
_PREDICTION, _MULTIUSER = 0, 1  # so that the two kinds of samples share no UE


@dataclasses.dataclass(frozen=True)
class MultiTaskSet:
    """Where the UEs are and how they are seen.

    Attributes:
        name: of the set.
        scenario: ``"uma"``, ``"umi"`` or ``"rma"``, out of sight.
        bs_height, ue_height: metres.
        carrier: Hz.
        rows, columns: vertical and horizontal elements, numbered row by row. spacing: wavelengths.
        grid: of the subcarriers.
        history, future: T1 and T2, slots. slot: seconds.
        sector: azimuths of the UEs, radians. distance: metres. speed_kmh: uniform, km/h.
        path_loss_slope: dB per decade of the distance between BS and UE antennas, out of sight.
        clusters: None for those of 38.901, or another number that its tables of angles know.
        seed: of the set. generator: ``"builtin"`` or ``"sionna"`` (extra ``sionna``), which draws the rays.

    Raises:
        ValueError: a field that is none of these, named.
    """

    name: str
    scenario: str
    bs_height: float
    path_loss_slope: float
    ue_height: float = 1.5
    carrier: float = 2.4e9
    rows: int = 8
    columns: int = 16
    spacing: float = 0.5
    grid: SubcarrierGrid = dataclasses.field(default_factory=lambda: SubcarrierGrid(48, 8.64e6))
    history: int = 16
    future: int = 4
    slot: float = 0.5e-3
    sector: tuple[float, float] = (-math.pi / 2, math.pi / 2)
    distance: tuple[float, float] = (20.0, 100.0)
    speed_kmh: tuple[float, float] = (10.0, 100.0)
    clusters: int | None = None
    seed: int = 0
    generator: str = "builtin"

    def __post_init__(self) -> None:
        check_scenario(self.scenario)
        for name in ("bs_height", "path_loss_slope", "ue_height", "carrier", "spacing", "slot"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("rows", "columns", "history", "future"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, least in (("sector", -math.inf), ("distance", 1.0), ("speed_kmh", 0.0)):
            low, high = getattr(self, name)
            if not least <= low <= high < math.inf:
                raise ValueError(f"{name}: expected two numbers in order, of at least {least}, got {low} and {high}")
        if self.clusters is not None and self.clusters not in CLUSTERS:
            known = ", ".join(map(str, CLUSTERS))
            raise ValueError(f"clusters: expected None or one of {known}, got {self.clusters}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        check_generator(self.generator)
        if self.generator == "sionna" and self.clusters is not None:
            raise ValueError(f"clusters: expected None, since Sionna has 38.901's, got {self.clusters}")

    @property
    def array(self) -> AntennaArray:
        """All antennas, in the order of the channels."""
        return AntennaArray.upa(self.rows, self.columns, self.spacing)

    @property
    def statistics(self) -> Statistics:
        """Of the built-in generator's links."""
        statistics = check_scenario(self.scenario).statistics(self.carrier, False)
        return statistics if self.clusters is None else dataclasses.replace(statistics, clusters=self.clusters)

    def unavailable(self) -> str | None:
        """Why the set cannot be drawn here, in one line; None if it can."""
        return unavailable_generator(self.generator)

    def describe(self) -> dict[str, Any]:
        """What determines the channels, JSON-serialisable: the fields, and the built-in generator's statistics."""
        statistics = dataclasses.asdict(self.statistics) if self.generator == "builtin" else None
        return plain_fields(self) | {"block": _BLOCK, "statistics": statistics}

    def prediction(
        self, split: str, count: int, *, speed_kmh: float | None = None, antennas: int | None = 4
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels of ``count`` UEs over T1 + T2 slots, and their speeds; a function of the arguments alone.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``, which share no UE.
            count: of UEs.
            speed_kmh: of all UEs, km/h; None draws one for each.
            antennas: so many, drawn for each UE, in the array's order; None for all of them.

        Returns:
            complex64 ``[count, antennas, T1 + T2, subcarrier]``, for each UE of mean power 1 per entry, and float32
            ``[count]`` km/h.

        Raises:
            ValueError: no such split, a count below 1, a negative speed, or antennas that the array does not have.
            ModuleNotFoundError: what draws the rays is not installed.
        """
        array = self.array
        if antennas is not None and not 1 <= antennas <= len(array):
            raise ValueError(f"antennas: expected None or 1 to {len(array)}, got {antennas}")
        if speed_kmh is not None and not 0 <= speed_kmh < math.inf:
            raise ValueError(f"speed_kmh: expected None or a number of at least 0, got {speed_kmh}")
        _check(split, count)
        times = torch.arange(self.history + self.future, dtype=torch.float64) * self.slot
        shape = (len(array) if antennas is None else antennas, len(times), self.grid.subcarriers)
        h, speed = torch.empty(count, *shape, dtype=torch.complex64), torch.empty(count)
        for number, (users, key) in enumerate(self._blocks(split, count, _PREDICTION)):
            part = slice(number * _BLOCK, number * _BLOCK + len(users))
            drawn = np.random.default_rng([*key, 3]).uniform(*self.speed_kmh, _BLOCK)[: len(users)]
            kmh = torch.from_numpy(drawn if speed_kmh is None else np.full(len(users), float(speed_kmh)))
            positions = chosen_antennas(array, antennas, len(users), np.random.default_rng([*key, 4]))
            channels = slot_channels(users.rays(kmh / 3.6, self.carrier), positions, self.grid, times)
            h[part], speed[part] = _unit_power(channels), kmh.to(torch.float32)
        return h, speed

    def multiuser(self, split: str, count: int, *, users: int = 8) -> torch.Tensor:
        """Channels at the carrier (section II-A) of ``users`` UEs at a time; a function of the arguments alone.

        Sample i has the UEs ``users * i`` to ``users * (i + 1) - 1`` of the split.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``, which share no UE.
            count: of samples. users: in each.

        Returns:
            complex64 ``[count, antenna, users]``, of mean power 1 per entry over all users of a sample.

        Raises:
            ValueError: no such split, or a count or users below 1.
            ModuleNotFoundError: what draws the rays is not installed.
        """
        if users < 1:
            raise ValueError(f"users: expected at least 1, got {users}")
        _check(split, count)
        h = torch.empty(count * users, self.rows * self.columns, dtype=torch.complex64)
        for number, (block, _) in enumerate(self._blocks(split, len(h), _MULTIUSER)):
            part = slice(number * _BLOCK, number * _BLOCK + len(block))
            alike = _unit_power(block.carrier_channels(self.rows, self.columns, self.spacing))
            distance = torch.linalg.vector_norm(
                block.position - block.position.new_tensor([0, 0, self.bs_height]), dim=1
            )
            h[part] = alike * (distance ** (-self.path_loss_slope / 20)).to(torch.float32)[:, None]
        return _unit_power(h.unflatten(0, (count, users))).mT.contiguous()

    def users(self, split: str, count: int) -> Iterator[MovingUsers]:
        """The UEs of :meth:`prediction`, in blocks of at most 256; raises what that raises."""
        _check(split, count)
        for block, _ in self._blocks(split, count, _PREDICTION):
            yield block

    def _blocks(self, split: str, count: int, kind: int) -> Iterator[tuple[MovingUsers, tuple[int, ...]]]:
        for start in range(0, count, _BLOCK):
            key = (self.seed, SPLITS.index(split), kind, start // _BLOCK)
            yield draw_users(self, _BLOCK, key)[: count - start], key


def _check(split: str, count: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")


def _unit_power(h: torch.Tensor) -> torch.Tensor:
    """Each item of the first axis scaled to a mean of ``|h|^2`` of 1."""
    power = torch.view_as_real(h).flatten(1).square().mean(1) * 2
    return h * power.rsqrt().view(-1, *(1,) * (h.ndim - 1))


MULTITASK_SETS = {
    one.name: one
    for one in (
        MultiTaskSet("uma_nlos", "uma", bs_height=25.0, path_loss_slope=39.08),
        MultiTaskSet("umi_nlos", "umi", bs_height=10.0, path_loss_slope=35.3),
    )
}


def multitask_set(name: str, **changes: Any) -> MultiTaskSet:
    """The named set, ``"uma_nlos"`` (section V-A) or ``"umi_nlos"`` (Fig. 13), with ``changes``.

    Raises:
        ValueError: there is no such set, or a change it refuses.
    """
    if name not in MULTITASK_SETS:
        raise ValueError(f"name: expected one of {', '.join(MULTITASK_SETS)}, got {name!r}")
    return dataclasses.replace(MULTITASK_SETS[name], **changes)


def prediction_channels(
    name: str,
    split: str,
    count: int,
    *,
    speed_kmh: float | None = None,
    antennas: int | None = 4,
    generator: str = "builtin",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of a named set over T1 + T2 slots: complex64 ``[count, antennas, T1 + T2, subcarrier]`` and km/h.

    Arguments and errors are those of :func:`multitask_set` and :meth:`MultiTaskSet.prediction`.
    """
    return multitask_set(name, generator=generator).prediction(split, count, speed_kmh=speed_kmh, antennas=antennas)


def multiuser_channels(
    name: str, split: str, count: int, *, users: int = 8, generator: str = "builtin"
) -> torch.Tensor:
    """Channels of a named set at the carrier: complex64 ``[count, antenna, users]``.

    Arguments and errors are those of :func:`multitask_set` and :meth:`MultiTaskSet.multiuser`.
    """
    return multitask_set(name, generator=generator).multiuser(split, count, users=users)
