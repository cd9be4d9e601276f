"""CSI in the angle-delay domain, as networks see it: transform and truncation (LLMCsiNet, eq. 2), and data sets.

``h`` is float32 ``[sample, 2, delay, antenna]``: real and imaginary parts, rows of delay, columns of angle. Both DFTs
are unitary, so energies are those of the frequency domain.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from csimodels.channels.disc import CellConfig, DiscEnvironment
from csimodels.channels.presets import make_environment
from csimodels.channels.rays import AntennaArray, DelayTaps, SubcarrierGrid, normalize_power

DELAYS = 32
SHIFT = 2
SPLITS = ("train", "validation", "test")
_BLOCK = 256  # samples of all subcarriers at a time: 64 MiB at 1,024 x 32


def angle_delay(
    h_frequency: torch.Tensor, delays: int = DELAYS, shift: int = SHIFT
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of the angle-delay domain, and what share of the energy lies in them.

    The transform is the inverse DFT along both dimensions of ``H``, the complex conjugate of eq. 2, whose rows are
    ``h^H``: a ray of delay ``tau`` lies at row ``tau * bandwidth``. Delays between two rows leak to both sides, round
    to the last rows; ``shift`` moves all rows down before the cut, so that the early side of a short delay is kept.

    Args:
        h_frequency: complex ``[sample, antenna, subcarrier]``.
        delays: rows kept, Nc.
        shift: rows, 0 or more.

    Returns:
        ``h``, float32 ``[sample, 2, delays, antenna]``, in the unit of ``h_frequency``; and the kept share of every
        sample's energy, float64 ``[sample]`` on the same device.

    Raises:
        ValueError: another array, ``delays`` or ``shift`` out of range, or samples that are not finite or have no
            energy (how many, and the first one's index).
    """
    if not h_frequency.is_complex() or h_frequency.ndim != 3 or 0 in h_frequency.shape:
        raise ValueError(
            "h_frequency: expected complex [sample, antenna, subcarrier], not empty, got "
            f"{h_frequency.dtype} {tuple(h_frequency.shape)}"
        )
    _check_cut(h_frequency.shape[2], delays, shift)
    rows = torch.arange(-shift, delays - shift, device=h_frequency.device)
    total = h_frequency.abs().square().sum(dim=(1, 2), dtype=torch.float64)
    bad = (~((total > 0) & torch.isfinite(total))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"h_frequency: expected finite samples with energy, got {len(bad)} others, the first at index {int(bad[0])}"
        )
    kept = torch.cat([torch.fft.ifft(part, norm="ortho")[..., rows] for part in h_frequency.split(_BLOCK)])
    energy = kept.abs().square().sum(dim=(1, 2), dtype=torch.float64)
    return _to_image(kept), energy / total


def to_frequency(h: torch.Tensor, subcarriers: int, shift: int = SHIFT) -> torch.Tensor:
    """The inverse of :func:`angle_delay`, with zeros for the rows that were cut.

    Args:
        h: float ``[sample, 2, delay, antenna]``.
        subcarriers: of the frequency domain, at least as many as rows.
        shift: the one that ``h`` was made with.

    Returns:
        complex ``[sample, antenna, subcarrier]`` of ``h``'s precision.

    Raises:
        ValueError: another array, or numbers out of range.
    """
    _check_image(h)
    delays = h.shape[2]
    _check_cut(subcarriers, delays, shift)
    cut = torch.fft.fft(torch.complex(h[:, 0], h[:, 1]).mT, dim=1, norm="ortho")
    whole = cut.new_zeros(*cut.shape[:2], subcarriers)
    whole[..., torch.arange(-shift, delays - shift, device=h.device)] = cut
    return torch.fft.fft(whole, norm="ortho")


def noisy(h: torch.Tensor, snr_db: float | torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """``h`` with white Gaussian noise: what a UE estimates (LLMCsiNet, section V-D).

    Args:
        h: float ``[sample, 2, delay, antenna]``.
        snr_db: each sample's energy over the noise's mean energy, both within the rows kept; a number or ``[sample]``.
        generator: of the noise, on ``h``'s device.

    Returns:
        as ``h``; a sample of no energy stays as it is.

    Raises:
        ValueError: another array, or an SNR that is NaN.
    """
    _check_image(h)
    ratio = torch.as_tensor(snr_db, dtype=h.dtype, device=h.device)
    if ratio.ndim > 1 or (ratio.ndim == 1 and len(ratio) != len(h)) or bool(ratio.isnan().any()):
        raise ValueError(f"snr_db: expected a number of dB or one per sample ({len(h)}), got {snr_db}")
    power = h.square().mean(dim=(1, 2, 3)) / 10 ** (ratio / 10)
    noise = torch.randn(h.shape, dtype=h.dtype, device=h.device, generator=generator)
    return h + power.sqrt()[:, None, None, None] * noise


def _to_image(rows: torch.Tensor) -> torch.Tensor:
    """Complex ``[sample, antenna, delay]`` to float32 ``[sample, 2, delay, angle]``."""
    angles = torch.fft.ifft(rows, dim=1, norm="ortho").mT
    return torch.stack([angles.real, angles.imag], dim=1).float()


def _check_image(h: torch.Tensor) -> None:
    if not h.is_floating_point() or h.ndim != 4 or h.shape[1] != 2 or 0 in h.shape:
        raise ValueError(f"h: expected float [sample, 2, delay, antenna], not empty, got {h.dtype} {tuple(h.shape)}")


def _check_cut(subcarriers: int, delays: int, shift: int) -> None:
    if not 1 <= delays <= subcarriers:
        raise ValueError(f"delays: expected 1 to {subcarriers} (subcarriers), got {delays}")
    if not 0 <= shift < delays:
        raise ValueError(f"shift: expected 0 to {delays - 1} rows, got {shift}")


@dataclasses.dataclass(frozen=True)
class AngleDelayPreset:
    """A set of angle-delay channels whose training, validation and test samples come from different environments.

    Attributes:
        name: of the set.
        los: whether all environments are in line of sight.
        cell: where they are; its grid is that of the frequency domain.
        train, validation, test: indices of their environments.
        generator, options: of :func:`csimodels.channels.presets.make_environment`.
        seed: of the cell.
        delays, shift: the truncation.
        speed_kmh: of every UE; it has moved this fast for ``elapsed`` seconds, in a direction of its own, since it was
            where a UE of speed 0 is: each ray's phase has turned by its Doppler shift times that long. Decided: 20 ms,
            a usual period of CSI reference signals (the paper gives 30 km/h and no time).
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
        for name in ("speed_kmh", "elapsed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        _check_cut(self.cell.grid.subcarriers, self.delays, self.shift)

    def sample(self, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
        """Samples spread evenly over the split's environments, in their order; a function of the arguments alone.

        The rows come straight from the rays (:class:`csimodels.channels.rays.DelayTaps`), without the subcarriers.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            count: of samples; with fewer than there are environments, the first ones give one each.
            draw: another number, other positions in the same environments.

        Returns:
            float32 ``[count, 2, delays, antennas]``, each sample scaled to the energy ``delays * antennas``.

        Raises:
            ValueError: no such split, a count below 1, or a negative draw.
            ModuleNotFoundError: the generator is not installed.
        """
        taps = DelayTaps(self.cell.grid, self.delays, self.shift)
        h = torch.empty(count, 2, self.delays, len(self.cell.array))
        done = 0
        for index, positions in self._shares(split, count):
            rows = self._environment(index).sample(positions, seed=draw, grid=taps, travel=self._travel)
            h[done : done + positions] = _to_image(normalize_power(rows))
            done += positions
        return h

    def frequency(self, split: str, count: int, *, draw: int = 0) -> torch.Tensor:
        """What :meth:`sample` truncates and scales: complex64 ``[count, antenna, subcarrier]``."""
        parts = [
            self._environment(index).sample(positions, seed=draw, travel=self._travel)
            for index, positions in self._shares(split, count)
        ]
        return torch.cat(parts)

    def kept_energy(self, split: str = "test", count: int = 512, *, draw: int = 0) -> torch.Tensor:
        """Share of the energy that the truncation keeps, float64 ``[count]``, from all subcarriers of these samples."""
        parts = []
        for index, positions in self._shares(split, count):
            h = self._environment(index).sample(positions, seed=draw, travel=self._travel)
            parts.append(angle_delay(h, self.delays, self.shift)[1])
        return torch.cat(parts)

    @property
    def _travel(self) -> float:
        return self.speed_kmh / 3.6 * self.elapsed

    def _shares(self, split: str, count: int) -> list[tuple[int, int]]:
        """Environments and their numbers of samples, which sum to ``count``."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        indices = getattr(self, split)
        each, more = divmod(count, len(indices))
        shares = [(index, each + (place < more)) for place, index in enumerate(indices)]
        return [share for share in shares if share[1]]

    def _environment(self, index: int) -> DiscEnvironment:
        # Keyed by what the rays depend on: the speed, the truncation and the splits share their environments.
        return _environment(self.generator, self.cell, index, self.seed, self.los, self.options)


@functools.lru_cache(maxsize=8192)
def _environment(
    generator: str, cell: CellConfig, index: int, seed: int, los: bool, options: tuple[tuple[str, Any], ...]
) -> DiscEnvironment:
    return make_environment(generator, cell, index, seed, los=los, **dict(options))


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
ANGLE_DELAY_PRESETS = {preset.name: preset for preset in (INDOOR_LOS, OUTDOOR_NLOS, UMA_28GHZ)}


def angle_delay_preset(name: str, **changes: Any) -> AngleDelayPreset:
    """The set ``"indoor_los"``, ``"outdoor_nlos"`` or ``"uma_28ghz"`` (needs the extra ``sionna``), with ``changes``.

    Raises:
        ValueError: there is no such set, or a change it refuses.
    """
    if name not in ANGLE_DELAY_PRESETS:
        raise ValueError(f"name: expected one of {', '.join(ANGLE_DELAY_PRESETS)}, got {name!r}")
    return dataclasses.replace(ANGLE_DELAY_PRESETS[name], **changes)
