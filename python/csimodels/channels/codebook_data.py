"""Channels of LVM4CF (Zhuang et al., Table I and section V): a dual-polarised 8 x 8 array and many sites.

Narrowband channels at the carrier, out of sight, as vectors of 128 ports in the order of the paper's eq. 16: all ports
of one polarisation, then all of the other, each row-major over (vertical rows, horizontal columns); that is
``csimodels.models.codebooks.PortLayout(2, 8, 8)``.

The paper takes its channels from QuaDRiGa and says little about the places. Decided here:

- A *site* is a BS with one sector of 120 degrees, in which UEs stand in 20 discs of 5 m: the paper's Fig. 1 has them
  "clustered", and in "specific hotspots". The rays of each disc are drawn once (:mod:`csimodels.channels.disc`), so
  what a site's channels have in common can be learnt from some of them. The discs of a site are drawn independently of
  each other. Another site is another seed. The more discs, the more alike all sites are: 256 k-lines words of one UMa
  site at 28 GHz reached a mean cosine on its test channels of 0.741, 0.724, 0.702 and 0.689 with 10, 20, 40 and 100
  discs; words of 100 other sites 0.692, 0.694, 0.680 and 0.680.
- Discs lie anywhere around the BS and are turned into the sector, rays and all, by a multiple of 120 degrees.
- Training, validation and test UEs stand in the same discs, at positions of their own: the paper's sets share a
  "consistent site-specific propagation environment".
- An antenna element is that of 38.901, Table 7.3-1 (65 degrees, 30 dB; the paper's "3GPP-3D"), without downtilt. Its
  two polarisations are slanted by +45 and -45 degrees with the same pattern (section 7.3.2, model 2).
- The UE has a vertical omnidirectional antenna, which of the four initial phases of a ray (section 7.5, step 10) sees
  two: that of vertical to vertical, and that of horizontal to vertical with ``kappa = 10^(X / 10)`` times less power,
  X normal with the scenario's mean and deviation (step 9). A ray of power p so has the gains
  ``sqrt(p / 2) (e^{j Phi_vv} +- e^{j Phi_vh} / sqrt(kappa))`` at the two polarisations (eq. 7.5-22).
- Cells reach half of the usual distance between sites (UMa 500 m, RMa 1,732 m), from 35 m (Tables 7.2-1 and 7.2-3). The
  BS is 25 m high in RMa too, as in the paper's Table I (38.901 has 35 m).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import numpy as np
import torch

from csimodels.channels.disc import CellConfig, DiscEnvironment, RaySet, plain_fields
from csimodels.channels.hdf5 import write_channels
from csimodels.channels.presets import check_generator, make_environment, unavailable_generator
from csimodels.channels.rays import AntennaArray, Rays, SubcarrierGrid, phasor, synthesize
from csimodels.channels.raytracing import SPLITS
from csimodels.channels.scenarios import check_scenario

SITES = 100  # MSLCF: "100 distinct BS deployment scenarios"
_BEAMWIDTH, _ATTENUATION = 65.0, 30.0  # degrees and dB, 38.901, Table 7.3-1
_SECTOR = math.radians(120)


@dataclasses.dataclass(frozen=True)
class CodebookSet:
    """Channels of one site, or of several together.

    Samples are spread evenly over the places: all sites' first discs, then all sites' second discs, and so on; with
    fewer samples than places, the first ones give one each. The order of the samples is random.

    Attributes:
        name: of the set.
        scenario: ``"uma"`` or ``"rma"`` (or ``"umi"``), of :class:`csimodels.channels.environment.Environment`.
        cell: of every site; its array is that of one polarisation.
        sites: their seeds. discs: of each site.
        generator: of :func:`csimodels.channels.presets.make_environment`. The polarisations are drawn here.
    """

    name: str
    scenario: str
    cell: CellConfig
    sites: range
    discs: int = 20
    generator: str = "builtin"

    def __post_init__(self) -> None:
        check_scenario(self.scenario)
        if not self.sites or self.sites[0] < 0 or self.sites[-1] < 0:
            raise ValueError(f"sites: expected seeds of at least 0, got {self.sites}")
        if self.discs < 1:
            raise ValueError(f"discs: expected at least 1, got {self.discs}")
        check_generator(self.generator)
        if self.cell.patches != 1 or self.cell.grid.subcarriers != 1:
            raise ValueError(
                f"cell: expected one patch and one subcarrier, got {self.cell.patches} and {self.cell.grid.subcarriers}"
            )

    def unavailable(self) -> str | None:
        """Why the set cannot be drawn here, in one line; None if it can."""
        return unavailable_generator(self.generator)

    def describe(self) -> dict[str, Any]:
        """What determines the channels, JSON-serialisable: the fields, and the built-in generator's statistics."""
        statistics = dataclasses.asdict(self._statistics) if self.generator == "builtin" else None
        return plain_fields(self) | {"statistics": statistics}

    def sample(self, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
        """Channels of one split; a function of the arguments alone, on one version of torch.

        The samples of a smaller count are no part of those of a larger one.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            count: of samples.
            draw: another number, other positions in the same discs.

        Returns:
            complex64 ``[count, 2 * antennas]``, each of unit norm.

        Raises:
            ValueError: no such split, a count below 1, or a negative draw.
            ModuleNotFoundError: what draws the rays is not installed.
        """
        seed = _position_seed(split, count, draw)
        h = torch.empty(count, 2 * len(self.cell.array), dtype=torch.complex64)
        # Where each sample goes, so that neighbours in the result do not stand in one disc.
        order = torch.from_numpy(np.random.default_rng([count, seed]).permutation(count))
        done = 0
        for place, positions in enumerate(self._positions_per_place(count)):
            disc, site = divmod(place, len(self.sites))
            channels = self.place(site, disc).sample(positions, seed=seed)
            h[order[done : done + positions]] = channels
            done += positions
        return h

    def write(self, path: str | os.PathLike, split: str, count: int, *, draw: int = 0) -> None:
        """Write :meth:`sample` to a channel file of the project (:mod:`csimodels.channels.hdf5`), one subcarrier each.

        Args:
            path: of the file, which appears when it is complete.
            split, count, draw: as for :meth:`sample`.

        Raises:
            ValueError, ModuleNotFoundError: as :meth:`sample`. OSError: the file could not be written; an old one
                stays.
        """
        h = self.sample(split, count, draw=draw)  # what is refused is refused before a file is begun
        parameters = {"split": split, "count": count, **self.describe()}
        described: dict[str, Any] = {"generator": "codebook set", "parameters": parameters, "seed": draw}
        with write_channels(path, antennas=h.shape[1], subcarriers=1, **described) as writer:
            writer.append(h[:, :, None], environment=0, los=False)

    def place(self, site: int, disc: int) -> DualPolarisedDisc:
        """Disc number ``disc`` of site number ``site``, both from 0."""
        return _place(self.generator, self.scenario, self.cell, self.sites[site], disc + 1)

    def _positions_per_place(self, count: int) -> list[int]:
        places = len(self.sites) * self.discs
        each, more = divmod(count, places)
        return [each + (place < more) for place in range(min(places, count))]

    @property
    def _statistics(self) -> Any:
        return check_scenario(self.scenario).statistics(self.cell.carrier, False)


def _position_seed(split: str, count: int, draw: int) -> int:
    """Seed of the positions, another one for every split and draw."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if draw < 0:
        raise ValueError(f"draw: expected at least 0, got {draw}")
    return draw * len(SPLITS) + SPLITS.index(split)


class DualPolarisedDisc:
    """A disc out of sight, seen by both polarisations of the BS in whose sector it is turned.

    Args:
        environment: of one patch, without a direct ray; its array is that of one polarisation.
        cross_polarisation_db: XPR in dB, mean and standard deviation.

    Attributes:
        environment: as given.
        gain: complex128 ``[polarisation, path]``, at the disc's centre, the element's pattern included.
        departure: float64 ``[path, 3]``, unit vectors; the sector's centre is the x axis.
    """

    def __init__(self, environment: DiscEnvironment, cross_polarisation_db: tuple[float, float]):
        (rays,) = environment.ray_sets
        if rays.direct:
            raise ValueError("environment: expected one out of sight, got a direct ray")
        self.environment = environment
        # Numbers 1 and 2 in this place are the positions and Sionna's rays.
        rng = np.random.default_rng([environment.seed, environment.index, 3])
        self.departure = rays.departure @ _turn(environment.centre).T
        self.gain = _polarised(rays, cross_polarisation_db, rng) * element_amplitude(self.departure)

    def channels(self, count: int, *, seed: int) -> torch.Tensor:
        """Channels at ``count`` positions of draw ``seed``, with their fading: complex64 ``[count, 2 * antennas]``."""
        cell, (rays,) = self.environment.config, self.environment.ray_sets
        displacement = torch.from_numpy(self.environment.displacements(count, seed=seed))
        phase = 2 * math.pi / cell.wavelength * (displacement @ rays.arrival.T)
        moved = Rays(
            self.gain.to(torch.complex64) * phasor(phase, torch.complex64)[:, None], rays.delay, self.departure
        )
        return synthesize(moved, cell.array, cell.grid).flatten(1)

    def sample(self, count: int, *, seed: int) -> torch.Tensor:
        """:meth:`channels`, each of unit norm."""
        h = self.channels(count, seed=seed)
        return h / torch.linalg.vector_norm(h, dim=1, keepdim=True)


def _polarised(rays: RaySet, xpr_db: tuple[float, float], rng: np.random.Generator) -> torch.Tensor:
    """Gains at elements slanted by +45 and -45 degrees, complex128 ``[2, path]``; the rays' own phases are Phi_vv."""
    paths = len(rays.gain)
    weaker = 10 ** (-(xpr_db[0] + xpr_db[1] * rng.standard_normal(paths)) / 20)
    cross = torch.from_numpy(weaker * np.exp(1j * rng.uniform(-math.pi, math.pi, paths))) * rays.gain.abs()
    return torch.stack([rays.gain + cross, rays.gain - cross]) / math.sqrt(2)


def _turn(centre: np.ndarray) -> torch.Tensor:
    """The rotation about the vertical by a multiple of 120 degrees that brings ``centre`` closest to the x axis."""
    angle = -_SECTOR * round(math.atan2(centre[1], centre[0]) / _SECTOR)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def element_amplitude(direction: torch.Tensor) -> torch.Tensor:
    """Amplitude of an antenna element relative to its maximum along the x axis (38.901, Table 7.3-1).

    Args:
        direction: float64 ``[..., 3]``, unit vectors.

    Returns:
        float64 ``[...]``, from 1 to ``10^(-30 / 20)``.
    """
    below_horizon = torch.rad2deg(torch.asin(direction[..., 2].clamp(-1, 1)))  # zenith minus 90, of either sign
    azimuth = torch.rad2deg(torch.atan2(direction[..., 1], direction[..., 0]))
    vertical, horizontal = (
        (12 * (angle / _BEAMWIDTH) ** 2).clamp(max=_ATTENUATION) for angle in (below_horizon, azimuth)
    )
    return 10 ** (-(vertical + horizontal).clamp(max=_ATTENUATION) / 20)


@functools.lru_cache(maxsize=256)  # those of a site; a pooled set's would take a hundred megabytes
def _place(generator: str, scenario: str, cell: CellConfig, seed: int, index: int) -> DualPolarisedDisc:
    environment = make_environment(generator, cell, index, seed, los=False, scenario=scenario)
    xpr = check_scenario(scenario).statistics(cell.carrier, False).cross_polarisation_db
    return DualPolarisedDisc(environment, xpr)


def _cell(carrier: float, radius: float) -> CellConfig:
    # The bandwidth of the only subcarrier, at the carrier, has no effect.
    return CellConfig(
        carrier,
        radius=radius,
        min_distance=35.0,
        bs_height=25.0,
        array=AntennaArray.upa(8, 8),
        grid=SubcarrierGrid(1, 1.0),
    )


def _sets() -> dict[str, CodebookSet]:
    pooled, radius = range(1, SITES + 1), {"uma": 250.0, "rma": 866.0}
    carriers = {"28ghz": 28e9, "3.5ghz": 3.5e9}
    sets = [CodebookSet("uma_28ghz_site", "uma", _cell(28e9, radius["uma"]), range(1))]
    sets += [
        CodebookSet(f"{scenario}_{label}", scenario, _cell(carrier, radius[scenario]), pooled)
        for label, carrier in carriers.items()
        for scenario in radius
    ]
    return {one.name: one for one in sets}


# The single site is of the kind of the 100 pooled ones and not among them: its codebook meets a site it was not made
# for where the pooled one is scored on it.
CODEBOOK_SETS = _sets()


def codebook_set(name: str, **changes: Any) -> CodebookSet:
    """The named set, with ``changes``, for instance ``generator="sionna"`` (needs the extra ``sionna``).

    ``"uma_28ghz_site"`` is one site, for SSLCF; ``"uma_28ghz"``, ``"rma_28ghz"``, ``"uma_3.5ghz"`` and ``"rma_3.5ghz"``
    are 100 other sites each, for MSLCF.

    Raises:
        ValueError: there is no such set, or a change it refuses.
    """
    if name not in CODEBOOK_SETS:
        raise ValueError(f"name: expected one of {', '.join(CODEBOOK_SETS)}, got {name!r}")
    return dataclasses.replace(CODEBOOK_SETS[name], **changes)


def codebook_channels(name: str, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
    """Channels of a named set: complex64 ``[count, 128]``, unit norm; see :meth:`CodebookSet.sample`.

    Raises:
        ValueError: there is no such set or split, a count below 1, or a negative draw.
    """
    return codebook_set(name).sample(split, count, draw=draw)
