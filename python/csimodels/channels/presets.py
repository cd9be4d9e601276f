"""The data of LASCO's experiments (section IV-A): which environments, how many samples, and files of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from csimodels.channels.disc import CellConfig, DiscEnvironment
from csimodels.channels.environment import Environment
from csimodels.channels.hdf5 import write_channels
from csimodels.channels.sionna import MISSING, SionnaEnvironment

GENERATORS: dict[str, type[DiscEnvironment]] = {"builtin": Environment, "sionna": SionnaEnvironment}


@dataclasses.dataclass(frozen=True)
class DataPreset:
    """Environments are numbered within one cell; odd ones are not in line of sight, even ones are.

    Attributes:
        name: of the preset.
        pretraining: environments that are pooled to pre-train the base model and the reference.
        pretraining_samples: of each, per epoch if the positions are fresh, else once.
        fresh_positions: whether every epoch of pre-training draws new positions. If not, the pooled samples are
            permuted and split 8:1:1 (:func:`split_811`) into training, validation and test samples.
        validation: environments outside the pool that choose the weights of a pre-training with fresh positions.
        validation_samples: of each.
        adaptation: environments that no model has seen, to adapt to.
        adaptation_samples: of each: for training, validation and test.
        cell: where the environments are.
    """

    name: str
    pretraining: range
    pretraining_samples: int
    fresh_positions: bool
    validation: range
    validation_samples: int
    adaptation: range
    adaptation_samples: tuple[int, int, int]
    cell: CellConfig = dataclasses.field(default_factory=CellConfig)


PAPER = DataPreset(
    name="paper",
    pretraining=range(1, 101),
    pretraining_samples=10_000,
    fresh_positions=False,
    validation=range(0),
    validation_samples=0,
    adaptation=range(101, 111),
    adaptation_samples=(8_000, 1_000, 1_000),
)

# Many environments, few positions in each: a base model then does as well in unseen environments as in its own.
LAPTOP = DataPreset(
    name="laptop",
    pretraining=range(1, 1001),
    pretraining_samples=100,
    fresh_positions=True,
    validation=range(1001, 1041),
    validation_samples=50,
    adaptation=range(1101, 1107),
    adaptation_samples=(1_000, 125, 1_000),
)

PRESETS = {preset.name: preset for preset in (PAPER, LAPTOP)}


def data_preset(name: str) -> DataPreset:
    """The preset of that name, ``"paper"`` or ``"laptop"``; another is a ``ValueError``."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected {' or '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def split_811(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random split of ``count`` samples into training, validation and test samples, 8:1:1.

    Args:
        count: of samples, at least 10. seed: of the permutation.

    Returns:
        int64 indices, of ``count - 2 * (count // 10)``, ``count // 10`` and ``count // 10`` samples.

    Raises:
        ValueError: fewer than 10 samples.
    """
    if count < 10:
        raise ValueError(f"count: expected at least 10 samples to split 8:1:1, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tenth = count // 10
    training, validation, test = order.split([count - 2 * tenth, tenth, tenth])
    return training, validation, test


def check_generator(generator: str) -> None:
    """A ``ValueError`` for a name that is not in :data:`GENERATORS`."""
    if generator not in GENERATORS:
        raise ValueError(f"generator: expected {' or '.join(GENERATORS)}, got {generator!r}")


def unavailable_generator(generator: str) -> str | None:
    """Why a generator cannot draw here, in one line; None if it can."""
    missing = generator == "sionna" and importlib.util.find_spec("sionna") is None
    return MISSING if missing else None


def make_environment(generator: str, cell: CellConfig, index: int, seed: int, **options: Any) -> DiscEnvironment:
    """One environment of a generator by name: ``"builtin"`` or ``"sionna"``; ``options`` are the generator's own.

    Raises:
        ValueError: there is no such generator, or it refuses its arguments.
    """
    check_generator(generator)
    return GENERATORS[generator](cell, index, seed, **options)


def generate_dataset(
    path: str | os.PathLike,
    cell: CellConfig,
    seed: int,
    indices: Iterable[int],
    per_environment: int,
    *,
    generator: str = "builtin",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write samples of some environments to one channel file, environment by environment.

    The samples are draw 0 of each environment, which no pre-training with fresh positions draws, and are not
    normalised. They are a function of the arguments alone, and the file appears when it is complete: after an
    interruption the same call starts again and ends with the same file. The arguments are in the file's attributes
    (:meth:`csimodels.channels.disc.CellConfig.from_dict` reads the cell).

    Args:
        path: of the HDF5 file (:mod:`csimodels.channels.hdf5`).
        cell, seed: the cell and its seed.
        indices: of the environments, each once. per_environment: samples of each.
        generator: ``"builtin"`` or ``"sionna"``. options: its keyword arguments, such as ``{"scenario": "uma"}``.
        progress: called with the number of environments that are done, and of all.

    Returns:
        the number of samples.

    Raises:
        ValueError: no or repeated indices, fewer than one sample of each, or what the generator refuses.
        OSError: the file could not be written; an old one stays.
    """
    indices, options = list(indices), dict(options or {})
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"indices: expected at least one, each once, got {len(indices)} of {len(set(indices))}")
    if per_environment < 1:
        raise ValueError(f"per_environment: expected at least 1, got {per_environment}")
    parameters = {"cell": cell.to_dict(), "indices": indices, "per_environment": per_environment, "options": options}
    # Refused arguments are reported before a file is begun.
    make_environment(generator, cell, indices[0], seed, **options)
    described: dict[str, Any] = {"generator": generator, "parameters": parameters, "seed": seed}
    with write_channels(path, antennas=len(cell.array), subcarriers=cell.grid.subcarriers, **described) as writer:
        for done, index in enumerate(indices, start=1):
            environment = make_environment(generator, cell, index, seed, **options)
            writer.append(environment.sample(per_environment), environment=index, los=environment.los)
            if progress is not None:
                progress(done, len(indices))
    return len(indices) * per_environment
