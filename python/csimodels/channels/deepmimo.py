"""Reader of the scenario folders of DeepMIMO 4 (ray tracing by Wireless InSite, Sionna RT and others).

A folder has ``params.json`` and one file per matrix and pair of a transmitter and a set of receivers, such as
``power_t001_tx000_r000.npz`` (or ``.mat``), which holds the matrix under its name. One row is a receiver, one column a
path; what a receiver has fewer paths is NaN. Powers are in dBW of 0 dBW sent, phases and angles in degrees, delays in
seconds; ``el`` angles are counted from the vertical. The files are read directly: nothing of the DeepMIMO package.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from csimodels.channels.disc import unit_vectors
from csimodels.channels.matfile import read_variable
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, Rays, Spectrum, synthesize

_PATHS = ("power", "phase", "delay", "aod_az", "aod_el", "aoa_az", "aoa_el")
PAIR = re.compile(r"t\d+_tx\d+_r\d+")
_POWER = re.compile(rf"power_({PAIR.pattern})\.(?:npz|mat)")
_BLOCK = 256  # users at a time: 64 MiB at 32 x 1,024


@dataclasses.dataclass(frozen=True)
class DeepMimoScenario:
    """The users of one transmitter that any path reaches.

    Attributes:
        carrier: Hz.
        users: int64 ``[user]``, their rows in the files.
        positions: float64 ``[user, 3]``, metres.
        rays: gains of amplitudes that the files give, at the carrier; a path that a user lacks has gain 0. ``doppler``
            is None without a speed.
    """

    carrier: float
    users: torch.Tensor
    positions: torch.Tensor
    rays: Rays

    def __getitem__(self, users: slice | torch.Tensor) -> DeepMimoScenario:
        """Some of the users, by their places here."""
        return DeepMimoScenario(self.carrier, self.users[users], self.positions[users], self.rays[users])

    def channels(self, array: AntennaArray, grid: Spectrum, *, elapsed: float = 0.0) -> torch.Tensor:
        """Complex64 ``[user, antenna, subcarrier]``, not normalised.

        Args:
            array: of the BS, in the y-z plane of the scenario.
            grid: subcarriers, or :class:`csimodels.channels.rays.DelayTaps`.
            elapsed: seconds for which the users have moved at the speed that the scenario was read with.

        Raises:
            ValueError: time has passed, and the scenario was read without a speed.
        """
        rays = self.rays
        if elapsed:
            rays = dataclasses.replace(rays, gain=rays.at(torch.tensor([elapsed], dtype=torch.float64)).gain[:, 0])
        h = torch.empty(len(self.users), len(array), grid.subcarriers, dtype=torch.complex64)
        for start in range(0, len(h), _BLOCK):
            part = slice(start, start + _BLOCK)
            h[part] = synthesize(rays[part], array, grid)
        return h


def read_scenario(
    folder: str | os.PathLike,
    pair: str | None = None,
    *,
    max_paths: int = 10,
    align: bool = True,
    speed_kmh: float = 0.0,
    seed: int = 0,
) -> DeepMimoScenario:
    """The rays from one transmitter to a set of receivers.

    Args:
        folder: of the scenario, or of one scene of a dynamic one, whose ``params.json`` is then one folder above.
        pair: ``"t001_tx000_r000"`` and so on; needed where the folder has several.
        max_paths: the strongest paths of every user that are kept; LLMCsiNet's Table I takes 10.
        align: count delays from every user's first path, to which a UE synchronises, instead of from the transmission.
        speed_kmh: of every user, in a horizontal direction of its own: gives each path the Doppler shift
            ``speed / wavelength * cos(angle between the path's arrival and the direction)``.
        seed: of these directions.

    Raises:
        FileNotFoundError: there is no such folder, or it has no ``params.json`` or lacks a matrix.
        ValueError: several pairs to choose from, none or not the one asked for (names those there are); a file is
            damaged or has another shape than ``power``; a path has a power but not all else; no user has a path.
    """
    folder = Path(folder)
    if max_paths < 1:
        raise ValueError(f"max_paths: expected at least 1, got {max_paths}")
    if not 0 <= speed_kmh < math.inf:
        raise ValueError(f"speed_kmh: expected a number of at least 0, got {speed_kmh}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    carrier = _carrier(folder)
    pair = choose_pair(folder, pair)
    positions = _matrix(folder, "rx_pos", pair)
    paths = {name: _matrix(folder, name, pair).astype(np.float64) for name in _PATHS}
    shape = paths["power"].shape
    if len(shape) != 2 or positions.shape != (shape[0], 3):
        raise ValueError(
            f"{folder}: power, rx_pos: expected [user, path] and [user, 3], got {shape} and {positions.shape}"
        )
    for name, values in paths.items():
        if values.shape != shape:
            raise ValueError(f"{folder}: {name}: expected {shape} as power, got {values.shape}")
        bad = np.argwhere(np.isfinite(paths["power"]) & ~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{folder}: {name}: not finite at user {bad[0][0]}, path {bad[0][1]}, which has a power")
    users = np.flatnonzero(np.isfinite(paths["power"]).any(axis=1))
    if not len(users):
        raise ValueError(f"{folder}: {pair}: expected users with paths, got none of {shape[0]}")
    there = np.isfinite(paths["power"][users])
    known = {name: np.where(there, values[users], 0.0) for name, values in paths.items()}
    rays = _rays(known, there, speed_kmh / 3.6 * carrier / SPEED_OF_LIGHT, np.random.default_rng(seed))
    rays = rays.strongest(max_paths)
    return DeepMimoScenario(
        carrier=carrier,
        users=torch.from_numpy(users),
        positions=torch.from_numpy(positions[users].astype(np.float64)),
        rays=rays.aligned() if align else rays,
    )


def _rays(paths: dict[str, np.ndarray], there: np.ndarray, max_doppler: float, rng: np.random.Generator) -> Rays:
    """Of matrices ``[user, path]``, 0 where ``there`` is False."""
    amplitude = np.where(there, 10 ** (paths["power"] / 20), 0.0)
    doppler = None
    if max_doppler:
        heading = rng.uniform(-math.pi, math.pi, (len(there), 1))
        arrival = _directions(paths, "aoa")
        doppler = torch.from_numpy(max_doppler * (arrival * unit_vectors(heading, np.array(math.pi / 2))).sum(-1))
    return Rays(
        gain=torch.from_numpy(amplitude * np.exp(1j * np.deg2rad(paths["phase"]))),
        delay=torch.from_numpy(paths["delay"]),
        direction=torch.from_numpy(_directions(paths, "aod")),
        doppler=doppler,
    )


def _directions(paths: dict[str, np.ndarray], name: str) -> np.ndarray:
    return unit_vectors(np.deg2rad(paths[f"{name}_az"]), np.deg2rad(paths[f"{name}_el"]))


def pair_files(folder: Path, pair: str) -> list[Path]:
    """The files that :func:`read_scenario` reads, in a fixed order.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    return [_parameters(folder), *(_matrix_file(folder, name, pair) for name in ("rx_pos", *_PATHS))]


def _parameters(folder: Path) -> Path:
    path = next((p for p in (folder / "params.json", folder.parent / "params.json") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / 'params.json'}: no such file; expected a scenario folder of DeepMIMO 4")
    return path


def _carrier(folder: Path) -> float:
    path = _parameters(folder)
    try:
        carrier = float(json.loads(path.read_text(encoding="utf-8"))["rt_params"]["frequency"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected rt_params.frequency ({type(error).__name__}: {error})") from None
    if not 0 < carrier < math.inf:
        raise ValueError(f"{path}: rt_params.frequency: expected a positive number of Hz, got {carrier}")
    return carrier


def choose_pair(folder: Path, pair: str | None) -> str:
    """``pair``, or the only one that the folder has.

    Raises:
        ValueError: several pairs to choose from, none or not the one asked for (names those there are).
    """
    pairs = sorted({match[1] for path in folder.iterdir() if (match := _POWER.fullmatch(path.name))})
    if not pairs:
        raise ValueError(f"{folder}: expected files like power_t001_tx000_r000.npz, got none")
    if pair is None and len(pairs) > 1:
        raise ValueError(f"pair: expected one of {', '.join(pairs)}, got none")
    if pair is not None and pair not in pairs:
        raise ValueError(f"pair: expected one of {', '.join(pairs)}, got {pair!r}")
    return pair or pairs[0]


def _matrix_file(folder: Path, name: str, pair: str) -> Path:
    path = folder / f"{name}_{pair}.npz"
    if path.is_file():
        return path
    if not path.with_suffix(".mat").is_file():
        raise FileNotFoundError(f"{path}: no such file, and no .mat")
    return path.with_suffix(".mat")


def _matrix(folder: Path, name: str, pair: str) -> np.ndarray:
    path = _matrix_file(folder, name, pair)
    if path.suffix == ".mat":
        return read_variable(path, name)
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = stored[name]
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an array {name} ({type(error).__name__}: {error})") from None
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name}: expected real numbers, got {values.dtype}")
    return values
