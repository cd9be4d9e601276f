"""Linear MMSE reconstruction of a channel from a linear codeword: the classical baseline of codeword-based feedback.

Given samples of an environment and the projection ``A`` that makes codewords ``s = A h`` (LASCO (Cui et al.), eq. 9),
the best linear estimate of ``h`` needs only the samples' mean and covariance; nothing is trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csimodels.evaluation._checks import REAL_DTYPES, check_finite, check_same_device, check_tensor


class LinearMmse:
    """``h_hat = mu + C A^T (A C A^T + noise I)^-1 (s - A mu)`` with sample mean ``mu`` and sample covariance ``C``.

    Fitting works in the span of the samples and never forms ``C``: with centred samples as the columns of
    ``F = X^T / sqrt(N - 1)``, ``C = F F^T``, and the gain ``F B^T (B B^T + noise I)^-1`` with ``B = A F`` comes from
    one singular value decomposition of ``B``, ``[M, N]``. Fewer samples than dimensions (the usual case: 1,000 of
    2,048) are therefore as stable as many; directions that no sample shows are estimated by the mean. Arithmetic is
    float64.

    Attributes:
        mean: float64 ``[D]``.
        gain: float64 ``[D, M]``.
        codeword_mean: float64 ``[M]``, ``A mu``.
        rank: Number of codeword directions in use, at most ``min(M, N - 1)`` without ridge.
    """

    def __init__(self, mean: Tensor, gain: Tensor, codeword_mean: Tensor, rank: int):
        self.mean = mean
        self.gain = gain
        self.codeword_mean = codeword_mean
        self.rank = rank

    @classmethod
    def fit(cls, samples: Tensor, projection: Tensor, *, ridge: float = 0.0, noise: float = 0.0) -> LinearMmse:
        """Fit to samples of one environment.

        Args:
            samples: Channels as real vectors ``[N, D]``, at least 2; the vectorisation that ``projection`` expects.
            projection: ``A``, real ``[M, D]``.
            ridge: Loading of the covariance as a fraction of its mean variance: ``C + ridge tr(C) / D I``. Above 0 the
                estimate also follows the codeword, by the pseudo-inverse of ``A``, in directions that no sample shows.
            noise: Variance of white noise on each entry of the codeword, in the samples' units squared.

        Returns:
            A fitted estimator.

        Raises:
            TypeError: not real floating-point tensors, or ``ridge``, ``noise`` not numbers.
            ValueError: shapes or devices that do not fit, fewer than 2 samples, non-finite values (first index named),
                or negative ``ridge`` or ``noise``.
        """
        _check_fit(samples, projection)
        _check_non_negative("ridge", ridge)
        _check_non_negative("noise", noise)
        x, a = samples.detach().to(torch.float64), projection.detach().to(torch.float64)
        mean = x.mean(0)
        factor = (x - mean).T / math.sqrt(len(x) - 1)
        if ridge > 0:
            # C + v I = [F, sqrt(v) I] [F, sqrt(v) I]^T, so the same formulas hold.
            loading = math.sqrt(ridge * float(factor.square().sum()) / len(factor))
            factor = torch.cat([factor, loading * torch.eye(len(factor), dtype=x.dtype, device=x.device)], dim=1)
        codeword_mean = a @ mean
        gain, rank = _gain(factor, a @ factor, noise, float(torch.linalg.vector_norm(codeword_mean)))
        return cls(mean, gain, codeword_mean, rank)

    def estimate(self, s: Tensor) -> Tensor:
        """Reconstruct channels from codewords.

        Args:
            s: Codewords, real ``[B, M]``.

        Returns:
            ``[B, D]``, dtype of ``s``; computed in float64. Differentiable with respect to ``s``.

        Raises:
            TypeError: not a real floating-point tensor.
            ValueError: another shape or device, or non-finite values (first index named).
        """
        m = self.gain.shape[1]
        check_tensor("s", s, f"[B, {m}]", min_dim=2, dtypes=REAL_DTYPES)
        if s.dim() != 2 or s.shape[1] != m:
            raise ValueError(f"s: expected shape [B, {m}], got {tuple(s.shape)}")
        check_same_device("s", s, "the samples", self.gain)
        check_finite("s", s)
        return (self.mean + (s.to(torch.float64) - self.codeword_mean) @ self.gain.T).to(s.dtype)


def _gain(factor: Tensor, projected: Tensor, noise: float, mean_norm: float) -> tuple[Tensor, int]:
    """``F B^T (B B^T + noise I)^-1`` and the number of singular values used."""
    left, singular, right = torch.linalg.svd(projected, full_matrices=False)
    # Singular values below the rounding of the product, or of subtracting the mean, carry no information; without noise
    # their inverse would be arbitrary.
    scale = max(float(singular.amax()), mean_norm)
    floor = scale * max(projected.shape) * torch.finfo(singular.dtype).eps
    is_used = singular > floor
    inverse = torch.where(is_used, singular / (singular.square() + noise).where(is_used, 1.0), 0.0)
    return (factor @ right.T * inverse) @ left.T, int(is_used.sum())


def _check_fit(samples: Tensor, projection: Tensor) -> None:
    for name, value, layout in (("samples", samples, "[N, D]"), ("projection", projection, "[M, D]")):
        check_tensor(name, value, layout, min_dim=2, dtypes=REAL_DTYPES)
        if value.dim() != 2 or 0 in value.shape:
            raise ValueError(f"{name}: expected shape {layout} without an empty axis, got {tuple(value.shape)}")
    if len(samples) < 2:
        raise ValueError("samples: expected at least 2 for a covariance, got 1")
    if projection.shape[1] != samples.shape[1]:
        raise ValueError(
            f"projection: expected shape [M, {samples.shape[1]}] to match samples {tuple(samples.shape)}, "
            f"got {tuple(projection.shape)}"
        )
    check_same_device("projection", projection, "samples", samples)
    check_finite("samples", samples)
    check_finite("projection", projection)


def _check_non_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a non-negative finite number, got {value}")
