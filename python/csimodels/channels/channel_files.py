"""A user's files as sets of angle-delay channels, with their training, validation and test samples.

What a set can be made of:

- a folder with ``DATA_HtrainX.mat``, ``DATA_HvalX.mat`` and ``DATA_HtestX.mat``, ``X`` being ``in`` or ``out``: the
  COST 2100 files of CsiNet (:mod:`csimodels.channels.cost2100`). Where a folder has both, the set's name tells them
  apart: it ends in ``in`` or ``out``;
- a folder with ``train.h5``, ``validation.h5`` and ``test.h5``, the project's own files;
- one ``.mat`` file with ``HT``, or one file of the project;
- a DeepMIMO scenario (:mod:`csimodels.channels.deepmimo`): its folder, or ``FOLDER/t001_tx000_r000`` where that has
  several pairs of a transmitter and receivers.

Files without splits are permuted (with a fixed seed) and cut 2:1:1, the ratio of LLMCsiNet's section V-A.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from csimodels.channels import cost2100
from csimodels.channels.angle_delay import DELAYS, SHIFT, angle_delay, to_image
from csimodels.channels.deepmimo import PAIR, DeepMimoScenario, choose_pair, pair_files, read_scenario
from csimodels.channels.hdf5 import ChannelReader
from csimodels.channels.rays import AntennaArray, DelayTaps, SubcarrierGrid, normalize_power
from csimodels.channels.raytracing import SPLITS
from csimodels.files import digest

ANTENNAS = 32
# LLMCsiNet, Table I.
_ARRAY, _GRID = AntennaArray.ula(ANTENNAS), SubcarrierGrid(1024, 10e6)
_COST2100 = {"train": "DATA_Htrain{}.mat", "validation": "DATA_Hval{}.mat", "test": "DATA_Htest{}.mat"}
_HDF5 = {split: f"{split}.h5" for split in SPLITS}
_FEWEST = 4  # samples of a split: the users that zero forcing serves together
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class ChannelFiles:
    """A set of channels in files.

    Attributes:
        name: of the set.
        kind: ``"cost2100"``, ``"hdf5"`` or ``"deepmimo"``.
        paths: one file per split, or one for all; of DeepMIMO the folder.
        available: samples for training, validation and test.
        frozen: whether f_EN and f_PD keep their weights in stage 2, as the paper has it for such channels (section
            V-B): those of a ray tracer and indoors, not outdoors; of other files nothing is known, and they do not.
        digest: of the content: names and places of the files are not in it.
        pair: of DeepMIMO.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    available: tuple[int, int, int]
    frozen: bool
    digest: str
    pair: str = ""

    def described(self) -> dict[str, Any]:
        """What determines the samples, JSON-serialisable."""
        return {"kind": self.kind, "digest": self.digest, "pair": self.pair}

    @property
    def moves(self) -> bool:
        """Whether the files tell what a speed does to the channels."""
        return self.kind == "deepmimo"

    def sample(self, split: str, count: int, *, speed_kmh: float = 0.0, elapsed: float = 0.02) -> torch.Tensor:
        """The first ``count`` samples of a split.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            count: of samples. speed_kmh, elapsed: as for :class:`csimodels.channels.angle_delay_sets.AngleDelaySet`.

        Returns:
            float32 ``[count, 2, 32, 32]``, each sample scaled to the energy 1,024.

        Raises:
            ValueError: no such split, more samples than there are, a speed where the files know of none, or a file that
                is damaged; the message names it.
        """
        path, index = self._locate(split, count)
        if speed_kmh and not self.moves:
            raise ValueError(f"speed_kmh: expected 0 for {self.name}, whose files hold still channels, got {speed_kmh}")
        try:
            if self.kind == "deepmimo":
                scenario = self._scenario(path, speed_kmh)[index]
                rows = scenario.channels(_ARRAY, DelayTaps(_GRID, DELAYS, SHIFT), elapsed=elapsed if speed_kmh else 0.0)
                return to_image(normalize_power(rows))
            images = self._cost2100(path, index) if self.kind == "cost2100" else self._hdf5(path, index)[0]
            scaled = normalize_power(torch.complex(*images.unbind(1)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if path not in str(error) else str(error)) from None
        return torch.stack([scaled.real, scaled.imag], dim=1)

    def kept_energy(self, split: str = "test", count: int = 512) -> torch.Tensor | None:
        """Share of the energy that the truncation keeps, float64 ``[count]``; None where the files hold no more."""
        path, index = self._locate(split, count)
        if self.kind == "cost2100":
            return None
        if self.kind == "hdf5":
            return self._hdf5(path, index)[1]
        scenario = self._scenario(path, 0.0)
        parts = [angle_delay(scenario[part].channels(_ARRAY, _GRID))[1] for part in index.split(_BLOCK)]
        return torch.cat(parts)

    def _locate(self, split: str, count: int) -> tuple[str, torch.Tensor]:
        """The file, and the samples' places in it."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        place = SPLITS.index(split)
        if not 1 <= count <= self.available[place]:
            raise ValueError(f"{split}: expected 1 to {self.available[place]} samples of {self.name}, got {count}")
        if len(self.paths) > 1:
            return self.paths[place], torch.arange(count)
        order = torch.randperm(sum(self.available), generator=torch.Generator().manual_seed(0))
        return self.paths[0], order.split(self.available)[place][:count]

    def _scenario(self, path: str, speed_kmh: float) -> DeepMimoScenario:
        return read_scenario(path, self.pair, speed_kmh=speed_kmh)

    @staticmethod
    def _cost2100(path: str, index: torch.Tensor) -> torch.Tensor:
        # [N, angle, delay] -> rows of delay.
        h = cost2100.to_complex(cost2100.read_angle_delay(path)[index]).mT
        return torch.stack([h.real, h.imag], dim=1)

    @staticmethod
    def _hdf5(path: str, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with ChannelReader(path) as reader:
            parts = [angle_delay(reader.read(part)) for part in index.split(_BLOCK)]
        images, kept = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(kept)


def find_files(name: str, path: Path) -> ChannelFiles:
    """The set ``name`` of a file or folder; see the module.

    Raises:
        FileNotFoundError: there is no such file or folder, or files that belong to it are missing (names them).
        ValueError: the folder has nothing that is known here or needs a choice, a file has other channels than the
            networks take, or there are too few samples.
    """
    if PAIR.fullmatch(path.name) and not path.exists():
        return _deepmimo(name, path.parent, path.name)
    if path.is_file():
        return _one_file(name, path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if any(path.glob("power_*")):
        return _deepmimo(name, path, None)
    if any(path.glob("DATA_H*.mat")):
        ending = _cost2100_ending(name, path)
        files = {split: path / pattern.format(ending) for split, pattern in _COST2100.items()}
        return _split_files(name, "cost2100", files, frozen=ending == "in")
    if any((path / file).exists() for file in _HDF5.values()):
        return _split_files(name, "hdf5", {split: path / file for split, file in _HDF5.items()}, frozen=False)
    raise FileNotFoundError(
        f"{path}: expected DATA_Htrainin.mat, DATA_Hvalin.mat and DATA_Htestin.mat (or ...out.mat), "
        f"{', '.join(_HDF5.values())}, or a DeepMIMO scenario, got none of them"
    )


def _cost2100_ending(name: str, folder: Path) -> str:
    endings = [ending for ending in ("in", "out") if any(folder.glob(f"DATA_H*[a-z]{ending}.mat"))]
    if len(endings) < 2:
        return endings[0] if endings else "in"
    wanted = [ending for ending in ("out", "in") if name.endswith(ending)]
    if not wanted:
        raise ValueError(f"{name}: expected a name that ends in in or out, since {folder} has files of both")
    return wanted[0]


def _split_files(name: str, kind: str, files: dict[str, Path], *, frozen: bool) -> ChannelFiles:
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        folder = next(iter(files.values())).parent
        raise FileNotFoundError(
            f"{folder}: expected {', '.join(file.name for file in files.values())}, {', '.join(missing)} missing"
        )
    counts = [_count(kind, file) for file in files.values()]
    for (split, file), count in zip(files.items(), counts, strict=True):
        if count < _FEWEST:
            raise ValueError(f"{file}: expected at least {_FEWEST} samples ({split}), got {count}")
    content = _content([kind, *(digest(file) for file in files.values())])
    available = (counts[0], counts[1], counts[2])
    return ChannelFiles(name, kind, tuple(map(str, files.values())), available, frozen, content)


def _one_file(name: str, path: Path) -> ChannelFiles:
    kind = "cost2100" if path.suffix == ".mat" else "hdf5"
    frozen = kind == "cost2100" and re.fullmatch(r"DATA_H\w+in", path.stem) is not None
    available = _cut(path, _count(kind, path))
    return ChannelFiles(name, kind, (str(path),), available, frozen, _content([kind, digest(path)]))


def _deepmimo(name: str, folder: Path, pair: str | None) -> ChannelFiles:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    pair = choose_pair(folder, pair)
    available = _cut(folder, len(read_scenario(folder, pair).users))
    content = _content(["deepmimo", *(digest(file) for file in pair_files(folder, pair))])
    return ChannelFiles(name, "deepmimo", (str(folder),), available, True, content, pair)


def _count(kind: str, path: Path) -> int:
    """Samples of one file, whose channels have the networks' size."""
    if kind == "cost2100":
        return len(cost2100.read_angle_delay(path))
    with ChannelReader(path) as reader:
        if reader.antennas != ANTENNAS or reader.subcarriers < DELAYS:
            raise ValueError(
                f"{path}: expected {ANTENNAS} antennas and at least {DELAYS} subcarriers, got {reader.antennas} and "
                f"{reader.subcarriers}"
            )
        return len(reader)


def _cut(path: Path, count: int) -> tuple[int, int, int]:
    """2:1:1."""
    quarter = count // 4
    if quarter < _FEWEST:
        raise ValueError(f"{path}: expected at least {4 * _FEWEST} samples to cut 2:1:1, got {count}")
    return count - 2 * quarter, quarter, quarter


def _content(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
