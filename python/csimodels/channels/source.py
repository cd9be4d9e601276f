"""Training data as a function of the epoch: fixed samples, or fresh positions in a set of environments."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.rays import normalize_power


class EnvironmentSource:
    """``per_environment`` positions in each environment, pooled; every epoch draws new positions.

    Args:
        config, seed: the cell and its seed.
        environments: their indices, from 1.
        per_environment: positions per epoch in each.
    """

    def __init__(self, config: CellConfig, seed: int, environments: Iterable[int], per_environment: int):
        if per_environment < 1:
            raise ValueError(f"per_environment: expected at least 1, got {per_environment}")
        self.config, self.per_environment = config, per_environment
        self._environments = [Environment(config, index, seed) for index in environments]

    def __call__(self, epoch: int) -> tuple[torch.Tensor]:
        """Complex64 ``[environments * per_environment, antenna, subcarrier]`` of power ``antennas * subcarriers``."""
        shape = (len(self.config.array), self.config.grid.subcarriers)
        pooled = torch.empty(len(self._environments), self.per_environment, *shape, dtype=torch.complex64)
        for environment, samples in zip(self._environments, pooled, strict=True):
            # An environment's draw 0 is what datasets and tests are made of; training draws come after it.
            samples.copy_(normalize_power(environment.sample(self.per_environment, seed=epoch + 1)))
        return (pooled.flatten(0, 1),)


class FixedSource:
    """The same samples every epoch; ``h`` complex ``[samples, antenna, subcarrier]``, normalised here."""

    def __init__(self, h: torch.Tensor):
        self.h = normalize_power(h)

    def __call__(self, epoch: int) -> tuple[torch.Tensor]:
        """The samples, whatever the epoch."""
        return (self.h,)
