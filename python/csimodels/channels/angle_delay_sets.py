"""Named sets of angle-delay channels (:mod:`csimodels.channels.angle_delay`), drawn by a generator or ray-traced.

Training, validation and test samples are of different environments, or of different positions in one traced scene.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from csimodels.channels import raytracing
from csimodels.channels.angle_delay import DELAYS, SHIFT, angle_delay, check_cut, to_image
from csimodels.channels.disc import CellConfig, DiscEnvironment, plain_fields
from csimodels.channels.hdf5 import write_channels
from csimodels.channels.presets import make_environment, unavailable_generator
from csimodels.channels.rays import (
    AntennaArray,
    DelayTaps,
    Spectrum,
    SubcarrierGrid,
    normalize_power,
    synthesize,
)
from csimodels.channels.raytracing import SPLITS, RayTracedSite, TracedUsers

_BLOCK = 256  # samples of all subcarriers at a time: 64 MiB at 1,024 x 32


class AngleDelaySet(abc.ABC):
    """What all sets have in common; a subclass says where its channels come from.

    Attributes:
        name: of the set.
        delays, shift: the truncation.
        speed_kmh: of every UE; it has moved this fast for ``elapsed`` seconds, in a direction of its own, since it was
            where a UE of speed 0 is: each ray's phase has turned by its Doppler shift times that long. Decided: 20 ms,
            a usual period of CSI reference signals (the paper gives 30 km/h and no time).
    """

    name: str
    delays: int
    shift: int
    speed_kmh: float
    elapsed: float

    @abc.abstractmethod
    def _spectrum(self) -> SubcarrierGrid:
        """All subcarriers."""

    @abc.abstractmethod
    def _blocks(self, split: str, count: int, draw: int, spectrum: Spectrum) -> Iterator[tuple[int, torch.Tensor]]:
        """``count`` samples in all: an environment's number, and complex64 ``[block, antenna, column]``."""

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why the set cannot be drawn here, in one line; None if it can."""

    @abc.abstractmethod
    def describe(self, split: str, count: int, draw: int = 0) -> dict[str, Any]:
        """What determines the samples, JSON-serialisable, and what is known of those left out."""

    def definition(self) -> dict[str, Any]:
        """All fields, JSON-serialisable: with a split, a count and a draw, they determine the samples."""
        return plain_fields(self)

    def sample(self, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
        """Samples of one split; a function of the arguments alone.

        The rows come straight from the rays (:class:`csimodels.channels.rays.DelayTaps`), without the subcarriers.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            count: of samples.
            draw: another number, other positions.

        Returns:
            float32 ``[count, 2, delays, antennas]``, each sample scaled to the energy ``delays * antennas``.

        Raises:
            ValueError: no such split, a count below 1 or more than there are, or a negative draw.
            ImportError: what draws the rays is not installed.
        """
        taps = DelayTaps(self._spectrum(), self.delays, self.shift)
        return torch.cat([to_image(normalize_power(rows)) for _, rows in self._checked(split, count, draw, taps)])

    def frequency(self, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
        """What :meth:`sample` truncates and scales: complex64 ``[count, antenna, subcarrier]``."""
        return torch.cat([h for _, h in self._checked(split, count, draw, self._spectrum())])

    def kept_energy(self, split: str = "test", count: int = 512, *, draw: int = 0) -> torch.Tensor:
        """Share of the energy that the truncation keeps, float64 ``[count]``, from all subcarriers of these samples."""
        blocks = self._checked(split, count, draw, self._spectrum())
        return torch.cat([angle_delay(h, self.delays, self.shift)[1] for _, h in blocks])

    def write(
        self,
        path: str | os.PathLike,
        split: str,
        count: int,
        *,
        draw: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write :meth:`frequency` to a channel file of the project (:mod:`csimodels.channels.hdf5`).

        Args:
            path: of the file, which appears when it is complete.
            split, count, draw: as for :meth:`sample`.
            progress: called with the number of samples that are done, and of all.

        Raises:
            ValueError, ImportError: as :meth:`sample`. OSError: the file could not be written; an old one stays.
        """
        blocks = self._checked(split, count, draw, self._spectrum())
        first = next(blocks)  # what is refused is refused before a file is begun
        parameters = {"name": self.name, "split": split, "count": count, **self.describe(split, count, draw)}
        described: dict[str, Any] = {"generator": "set", "parameters": parameters, "seed": draw}
        with write_channels(path, antennas=first[1].shape[1], subcarriers=first[1].shape[2], **described) as writer:
            for number, h in itertools.chain([first], blocks):
                writer.append(h, environment=number, los=self.line_of_sight)
                if progress is not None:
                    progress(len(writer), count)

    @property
    @abc.abstractmethod
    def line_of_sight(self) -> bool:
        """Whether all UEs are in line of sight."""

    def _checked(self, split: str, count: int, draw: int, spectrum: Spectrum) -> Iterator[tuple[int, torch.Tensor]]:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        return self._blocks(split, count, draw, spectrum)

    def _check(self) -> None:
        for name in ("speed_kmh", "elapsed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        check_cut(self._spectrum().subcarriers, self.delays, self.shift)

    @property
    def _travel(self) -> float:
        return self.speed_kmh / 3.6 * self.elapsed


@dataclasses.dataclass(frozen=True)
class AngleDelayPreset(AngleDelaySet):
    """A set whose training, validation and test samples come from different environments.

    Samples are spread evenly over the split's environments, in their order; with fewer than there are environments, the
    first ones give one each.

    Attributes:
        name, delays, shift, speed_kmh, elapsed: see :class:`AngleDelaySet`.
        los: whether all environments are in line of sight.
        cell: where they are; its grid is that of the frequency domain.
        train, validation, test: indices of their environments.
        generator, options: of :func:`csimodels.channels.presets.make_environment`.
        seed: of the cell.
    """

    name: str
    los: bool
    cell: CellConfig
    train: range = range(1, 2001)
    validation: range = range(2001, 3001)
    test: range = range(3001, 4001)
    generator: str = "builtin"
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    delays: int = DELAYS
    shift: int = SHIFT
    speed_kmh: float = 0.0
    elapsed: float = 0.02

    def __post_init__(self) -> None:
        spans = [set(self.train), set(self.validation), set(self.test)]
        if not all(spans) or len(set().union(*spans)) != sum(map(len, spans)):
            raise ValueError("train, validation, test: expected environments in each, none in two of them")
        self._check()

    def _spectrum(self) -> SubcarrierGrid:
        return self.cell.grid

    def unavailable(self) -> str | None:
        """Sionna may be missing."""
        return unavailable_generator(self.generator)

    def describe(self, split: str, count: int, draw: int = 0) -> dict[str, Any]:
        """The cell, the environments and the generator."""
        cell, indices = self.cell.to_dict(), getattr(self, split)
        environments = [indices.start, indices.stop, indices.step]
        options, motion = dict(self.options), {"speed_kmh": self.speed_kmh, "elapsed": self.elapsed}
        return {"cell": cell, "environments": environments, "generator": self.generator, "options": options, **motion}

    @property
    def line_of_sight(self) -> bool:
        """As given."""
        return self.los

    def _blocks(self, split: str, count: int, draw: int, spectrum: Spectrum) -> Iterator[tuple[int, torch.Tensor]]:
        indices = getattr(self, split)
        each, more = divmod(count, len(indices))
        for place, index in enumerate(indices):
            if positions := each + (place < more):
                # Keyed by what the rays depend on: the speed, the truncation and the splits share their environments.
                environment = _environment(self.generator, self.cell, index, self.seed, self.los, self.options)
                yield index, environment.sample(positions, seed=draw, grid=spectrum, travel=self._travel)


@functools.lru_cache(maxsize=8192)
def _environment(
    generator: str, cell: CellConfig, index: int, seed: int, los: bool, options: tuple[tuple[str, Any], ...]
) -> DiscEnvironment:
    return make_environment(generator, cell, index, seed, los=los, **dict(options))


@dataclasses.dataclass(frozen=True)
class RayTracedPreset(AngleDelaySet):
    """A set of UEs in one traced scene, their training, validation and test positions disjoint.

    Attributes:
        name, delays, shift, speed_kmh, elapsed: see :class:`AngleDelaySet`.
        site: where they are. array: of its BS. grid: of the frequency domain.
    """

    name: str
    site: RayTracedSite
    array: AntennaArray
    grid: SubcarrierGrid
    delays: int = DELAYS
    shift: int = SHIFT
    speed_kmh: float = 0.0
    elapsed: float = 0.02

    def __post_init__(self) -> None:
        self._check()

    def _spectrum(self) -> SubcarrierGrid:
        return self.grid

    def unavailable(self) -> str | None:
        """Sionna RT may be missing, or its LLVM."""
        return raytracing.missing()

    def describe(self, split: str, count: int, draw: int = 0) -> dict[str, Any]:
        """The site, and how many points were left out."""
        grid, motion = dataclasses.asdict(self.grid), {"speed_kmh": self.speed_kmh, "elapsed": self.elapsed}
        left_out = self.users(split, count, draw=draw).left_out
        return {"site": dataclasses.asdict(self.site), "grid": grid, "left_out": left_out, **motion}

    @property
    def line_of_sight(self) -> bool:
        """Those of a site with both states are not all in line of sight."""
        return self.site.los is True

    def _blocks(self, split: str, count: int, draw: int, spectrum: Spectrum) -> Iterator[tuple[int, torch.Tensor]]:
        rays = self.users(split, count, draw=draw).rays
        if self._travel:  # the rays' Doppler shifts are those of 1 m/s
            gain = rays.at(torch.tensor([self._travel], dtype=torch.float64)).gain[:, 0]
            rays = dataclasses.replace(rays, gain=gain)
        for start in range(0, count, _BLOCK):
            yield 1, synthesize(rays[start : start + _BLOCK], self.array, spectrum)

    def users(self, split: str, count: int, *, draw: int = 0) -> TracedUsers:
        """The UEs of :meth:`sample`, and how many others were left out on the way."""
        return _users(self.site, split, count, draw)


@functools.lru_cache(maxsize=8)
def _users(site: RayTracedSite, split: str, count: int, draw: int) -> TracedUsers:
    return site.users(split, count, draw=draw)


def _cell(carrier: float, bandwidth: float, **lengths: Any) -> CellConfig:
    return CellConfig(carrier, array=AntennaArray.ula(32), grid=SubcarrierGrid(1024, bandwidth), **lengths)


# LLMCsiNet, Table I: carriers, bandwidths, states and numbers of paths. The built-in generator knows the statistics of
# UMi street canyons only: "indoor" is a small cell of them in line of sight, and at 300 MHz they are those of 2 GHz.
# Shares of the energy kept: 0.998 indoors, 0.98 outdoors, 0.70 at 28 GHz, whose 32 rows are 320 ns of a median rms
# delay spread of 270 ns.
# csimodels.channels.cost2100 reads the files of the paper's own model.
INDOOR_LOS = AngleDelayPreset(
    "indoor_los",
    los=True,
    cell=_cell(5.3e9, 20e6, radius=20.0, disc_radius=1.0, min_distance=2.0, bs_height=3.0),
    options=(("paths", 3),),
)
OUTDOOR_NLOS = AngleDelayPreset("outdoor_nlos", los=False, cell=_cell(300e6, 20e6), options=(("paths", 48),))
UMA_28GHZ = AngleDelayPreset(
    "uma_28ghz",
    los=False,
    cell=_cell(28e9, 100e6, bs_height=25.0, min_distance=35.0, radius=250.0),
    generator="sionna",
    options=(("scenario", "uma"),),
)
# In place of DeepMIMO's O1, whose files csimodels.channels.deepmimo reads: carrier, bandwidth, 10 paths and UEs out of
# sight as there, in Sionna RT's model of Munich. Of 400 UEs: 7.7 paths, median rms delay spread 40 ns, longest excess
# delay 1.7 us, 0.992 of the energy kept; of points outdoors and out of sight a third is reached.
RAYTRACED = RayTracedPreset("raytraced", RayTracedSite(), AntennaArray.ula(32), SubcarrierGrid(1024, 10e6))
ANGLE_DELAY_SETS: dict[str, AngleDelaySet] = {
    preset.name: preset for preset in (INDOOR_LOS, OUTDOOR_NLOS, UMA_28GHZ, RAYTRACED)
}


def angle_delay_preset(name: str, **changes: Any) -> AngleDelaySet:
    """The named set, with ``changes``.

    ``"indoor_los"``, ``"outdoor_nlos"``, ``"uma_28ghz"`` (needs the extra ``sionna``) or ``"raytraced"`` (needs the
    extra ``raytracing``).

    Raises:
        ValueError: there is no such set, or a change it refuses.
    """
    if name not in ANGLE_DELAY_SETS:
        raise ValueError(f"name: expected one of {', '.join(ANGLE_DELAY_SETS)}, got {name!r}")
    return dataclasses.replace(ANGLE_DELAY_SETS[name], **changes)  # type: ignore[type-var]
