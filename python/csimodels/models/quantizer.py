"""The Lloyd-Max quantiser of the codeword's values (section V-C of LLMCsiNet; Lloyd 1982, Max 1960)."""

from __future__ import annotations

import math

import torch
from torch import nn


class LloydMax(nn.Module):
    """Scalar quantiser of least mean squared error for the distribution that it was fitted to.

    The levels are a buffer, so that they are stored and loaded with the model they belong to.

    Args:
        levels: how many, 2 to 32,768.
    """

    def __init__(self, levels: int):
        super().__init__()
        if not 2 <= levels <= 1 << 15:
            raise ValueError(f"levels: expected 2 to {1 << 15}, got {levels}")
        self.levels: torch.Tensor
        self.register_buffer("levels", torch.full((levels,), math.nan))

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` ran or fitted levels were loaded."""
        return not bool(self.levels.isnan().any())

    @property
    def thresholds(self) -> torch.Tensor:
        """float32 ``[levels - 1]``: midway between neighbouring levels; a value on one belongs to the level below."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    def fit(self, samples: torch.Tensor, iterations: int = 100) -> float:
        """Lloyd's algorithm: thresholds midway between levels, levels at the means between thresholds, and so on.

        It starts from the samples' quantiles and ends early when nothing changes. A cell that holds no sample keeps its
        level.

        Args:
            samples: float, of any shape; at least one.
            iterations: at most so many.

        Returns:
            The mean squared error on the samples.

        Raises:
            ValueError: no samples, samples that are not finite, or fewer than one iteration.
        """
        if iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {iterations}")
        x = samples.detach().flatten().double().cpu()
        if not x.numel() or not bool(x.isfinite().all()):
            found = "none" if not x.numel() else "NaN or infinite ones"
            raise ValueError(f"samples: expected at least one, all finite, got {found}")
        x = x.sort().values
        sums = torch.cat([x.new_zeros(1), x.cumsum(0)])
        count = len(self.levels)
        levels = x[((torch.arange(count) + 0.5) * len(x) / count).long()]
        for _ in range(iterations):
            edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2, right=True)
            edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
            inside = edges.diff()
            means = sums[edges].diff() / inside.clamp(min=1)
            before, levels = levels, torch.where(inside > 0, means, levels)
            if torch.equal(levels, before):
                break
        self.levels.copy_(levels)
        return float((self.decode(self.encode(x)).cpu().double() - x).square().mean())

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """float of any shape -> codes 0 to levels - 1 of that shape, uint8 for up to 256 levels and int16 above.

        Raises:
            RuntimeError: the quantiser has not been fitted.
            ValueError: a value is NaN.
        """
        self._check_fitted()
        if bool(values.isnan().any()):
            raise ValueError(f"values: expected numbers, got NaN at {values.isnan().nonzero()[0].tolist()}")
        codes = torch.bucketize(values.detach().float().contiguous(), self.thresholds)
        return codes.to(torch.uint8 if len(self.levels) <= 256 else torch.int16)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes of any shape -> float32 levels of that shape.

        Raises:
            RuntimeError: the quantiser has not been fitted.
            ValueError: a code is no level's.
        """
        self._check_fitted()
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.levels):
            raise ValueError(
                f"codes: expected 0 to {len(self.levels) - 1}, got {int(codes.min())} to {int(codes.max())}"
            )
        return self.levels[codes]

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError("LloydMax: expected fitted levels; call fit, or load a model that was stored with them")
