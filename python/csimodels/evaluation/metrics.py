"""Metrics of CSI feedback, precoding and detection, each convention under its own name.

Several conventions share a name in the literature and differ by decibels; none is implied here. Channels are complex
``[..., antenna, subcarrier]`` unless a function says otherwise; the true channel comes first, the estimate second.

All functions compute in float64 or complex128 whatever the inputs' precision (an NMSE of -60 dB is a difference of two
float32 numbers in their last digits), return float64, and are differentiable.

Shared rules:

- NaN or infinity in any input raises ``ValueError`` with the count and the first index.
- A true channel (vector) of zero power raises ``ValueError`` with its index: no ratio to it exists.
- An *estimate* of zero power is a legal, bad estimate: its similarity is 0, with gradient 0.
- Shapes must match exactly; real and complex must not be mixed (``TypeError``), precisions may.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from csimodels.evaluation._checks import (
    COMPLEX_DTYPES,
    INTEGER_DTYPES,
    REAL_DTYPES,
    as_double,
    as_positive,
    check_finite,
    check_none,
    check_same_shape,
    check_tensor,
)

NmseReduction = Literal["mean_of_ratios", "ratio_of_sums", "mean_of_batch_db"]
Reduction = Literal["mean", "none"]


def nmse(h: Tensor, h_hat: Tensor) -> Tensor:
    """Normalised squared error of each sample, ``|h - h_hat|^2 / |h|^2`` (LASCO (Cui et al.), eq. 13).

    Args:
        h: True channel, real or complex ``[N, ...]``; the first axis counts samples, all others are summed.
        h_hat: Estimate, same shape and kind.

    Returns:
        float64 ``[N]``, linear. 0 for a perfect estimate.

    Raises:
        TypeError: not tensors, not floating point, or one real and one complex.
        ValueError: shapes or devices differ, fewer than two axes, non-finite values, or a sample of zero power.
    """
    error, power = _error_and_power(h, h_hat)
    check_none("h", power.detach() == 0, "sample(s) of zero power")
    return error / power


def nmse_db(
    h: Tensor, h_hat: Tensor, reduction: NmseReduction = "mean_of_ratios", batch_size: int | None = None
) -> Tensor:
    """Normalised mean squared error in dB, under one of the three conventions in use.

    - ``"mean_of_ratios"``: 10 log10 of the mean over samples of :func:`nmse` (LLMCsiNet (Wu et al.), eq. 14). Weak
      samples weigh as much as strong ones.
    - ``"ratio_of_sums"``: 10 log10 of total error over total power (Zheng and Dai, eq. 11, and LLM4CP).
      Strong samples dominate; only a set of zero total power is refused.
    - ``"mean_of_batch_db"``: the mean over batches of each batch's mean-of-ratios in dB, as the test loops of CRNet,
      CLNet and TransNet print it. Consecutive batches of ``batch_size``, the last one possibly smaller and weighing as
      much as the others, so the figure depends on ``batch_size``. It never exceeds ``"mean_of_ratios"`` when the
      batches are equally large (Jensen). For comparison with published logs only.

    Args:
        h, h_hat: As for :func:`nmse`, with at least one sample.
        reduction: The convention.
        batch_size: Samples per batch; given exactly when ``reduction="mean_of_batch_db"``.

    Returns:
        float64 scalar in dB; ``-inf`` for a perfect estimate (where the gradient is undefined).

    Raises:
        TypeError, ValueError: as :func:`nmse`; no samples; unknown reduction; ``batch_size`` missing, below 1, or given
            where it has no meaning.
    """
    if reduction not in ("mean_of_ratios", "ratio_of_sums", "mean_of_batch_db"):
        raise ValueError(
            f"reduction: expected 'mean_of_ratios', 'ratio_of_sums' or 'mean_of_batch_db', got {reduction!r}"
        )
    _check_batch_size(reduction, batch_size)
    if reduction == "ratio_of_sums":
        error, power = _error_and_power(h, h_hat)
        _check_samples(error)
        if float(power.detach().sum()) == 0:
            raise ValueError("h: expected at least one sample of positive power, got zero total power")
        return _db(error.sum() / power.sum())
    ratios = nmse(h, h_hat)
    _check_samples(ratios)
    if batch_size is None:
        return _db(ratios.mean())
    return torch.stack([_db(batch.mean()) for batch in ratios.split(batch_size)]).mean()


def gcs(h: Tensor, h_hat: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Generalised cosine similarity (LASCO (Cui et al.), eq. 14): mean over subcarriers of |cos|, *not* squared.

    Each subcarrier's antenna vectors are compared, so any phase or positive gain per subcarrier leaves it unchanged.

    Args:
        h, h_hat: complex ``[..., antenna, subcarrier]``.
        reduction: ``"mean"`` over all leading axes, or ``"none"`` for one value per sample.

    Returns:
        float64 in [0, 1]: a scalar, or ``[...]``.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes or devices differ, an empty mean, non-finite values, or a subcarrier on which ``h`` is zero
            (its index, subcarrier last, is named).
    """
    _check_complex_pair(h, h_hat, "[..., antenna, subcarrier]", 2)
    per_subcarrier = _cosine(as_double(h), as_double(h_hat), -2, "subcarrier(s) of zero power")
    return _reduce(per_subcarrier.mean(-1), reduction)


def sgcs(h: Tensor, h_hat: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared generalised cosine similarity of whole matrices (LLMCsiNet (Wu et al.), eq. 15).

    ``|Tr(H^H H_hat)|^2 / (|H|_F^2 |H_hat|_F^2)``: one common phase or gain leaves it unchanged, a phase per subcarrier
    does not (unlike :func:`gcs`). It does not depend on which axis is which, nor on unitary transforms of either.

    Args:
        h, h_hat: complex ``[..., antenna, subcarrier]`` (or angle-delay).
        reduction: ``"mean"`` over all leading axes, or ``"none"`` for one value per sample.

    Returns:
        float64 in [0, 1]: a scalar, or ``[...]``.

    Raises:
        TypeError, ValueError: as :func:`gcs`, for samples of zero power.
    """
    _check_complex_pair(h, h_hat, "[..., antenna, subcarrier]", 2)
    cosine = _cosine(as_double(h).flatten(-2), as_double(h_hat).flatten(-2), -1, "sample(s) of zero power")
    return _reduce(cosine.square(), reduction)


def codeword_cosine(h: Tensor, g: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Cosine similarity ``|g^H h| / (|g| |h|)`` of channel and codeword (LVM4CF (Zhuang et al.), eq. 25, unsigned).

    Args:
        h: True channel, complex ``[..., antenna]``.
        g: Codeword chosen for it, same shape.
        reduction: ``"mean"`` over all leading axes, or ``"none"`` for one value per vector.

    Returns:
        float64 in [0, 1]: a scalar, or ``[...]``.

    Raises:
        TypeError, ValueError: as :func:`gcs`, for vectors of zero power.
    """
    _check_complex_pair(h, g, "[..., antenna]", 1, "g")
    return _reduce(_cosine(as_double(h), as_double(g), -1, "vector(s) of zero power"), reduction)


def delay_to_frequency(h_delay: Tensor, num_delays: int = 257, num_subcarriers: int = 125) -> Tensor:
    """The frequency response that CsiNet's evaluation forms: zero-pad the delay axis, FFT, keep the first bins.

    Args:
        h_delay: complex ``[..., antenna, delay]``, the first (strongest) delay taps, centred on 0 (subtract the 0.5 of
            files scaled to [0, 1] first).
        num_delays: Length after zero-padding; 257 for the COST2100 files.
        num_subcarriers: Bins kept, from 0; 125 for the COST2100 files.

    Returns:
        complex128 ``[..., antenna, num_subcarriers]``.

    Raises:
        TypeError: not a complex tensor.
        ValueError: more taps than ``num_delays``, or ``num_subcarriers`` outside 1..``num_delays``.
    """
    check_tensor("h_delay", h_delay, "[..., antenna, delay]", min_dim=2, dtypes=COMPLEX_DTYPES)
    if h_delay.shape[-1] > num_delays:
        raise ValueError(f"h_delay: expected at most num_delays={num_delays} taps, got {h_delay.shape[-1]}")
    if not 1 <= num_subcarriers <= num_delays:
        raise ValueError(f"num_subcarriers: expected 1..{num_delays}, got {num_subcarriers}")
    # fft(n=...) zero-pads at the end.
    return torch.fft.fft(as_double(h_delay), n=num_delays, dim=-1)[..., :num_subcarriers].contiguous()


def rho_csinet(
    h_frequency: Tensor, h_hat_delay: Tensor, reduction: Reduction = "mean", num_delays: int = 257
) -> Tensor:
    """The correlation "rho" of the public CsiNet evaluation, which CRNet, CLNet and others follow.

    The estimate's delay taps go through :func:`delay_to_frequency`; rho is then :func:`gcs` against the *untruncated*
    true frequency response (``HF_all`` of the COST2100 files), so perfect taps score below 1 where the true channel has
    energy beyond them. Antenna axes of both must be in the same domain.

    Args:
        h_frequency: True response, complex ``[..., antenna, subcarrier]``; bins 0..subcarrier-1 are compared.
        h_hat_delay: Estimated taps, complex ``[..., antenna, delay]``, centred on 0.
        reduction: ``"mean"`` over all leading axes, or ``"none"`` for one value per sample.
        num_delays: Length after zero-padding.

    Returns:
        float64 in [0, 1]: a scalar, or ``[...]``.

    Raises:
        TypeError, ValueError: as :func:`delay_to_frequency` and :func:`gcs`; leading axes or antennas differ.
    """
    check_tensor("h_frequency", h_frequency, "[..., antenna, subcarrier]", min_dim=2, dtypes=COMPLEX_DTYPES)
    check_tensor("h_hat_delay", h_hat_delay, "[..., antenna, delay]", min_dim=2, dtypes=COMPLEX_DTYPES)
    if h_frequency.shape[:-1] != h_hat_delay.shape[:-1]:
        raise ValueError(
            f"h_hat_delay: expected leading axes and antennas {tuple(h_frequency.shape[:-1])}, "
            f"got {tuple(h_hat_delay.shape[:-1])}"
        )
    check_finite("h_hat_delay", h_hat_delay)
    return gcs(h_frequency, delay_to_frequency(h_hat_delay, num_delays, h_frequency.shape[-1]), reduction)


def user_rates(h: Tensor, w: Tensor, noise_power: float | Tensor) -> Tensor:
    """Spectral efficiency of each user, ``log2(1 + SINR_k)`` (Zheng and Dai, eqs. 1-3).

    User k receives ``h_k^H sum_j w_j x_j + n`` with unit-power symbols. To rate precoding on imperfect CSI (LVM4CF,
    Fig. 9; LLMCsiNet, Fig. 12), design ``w`` on the reconstructed channels and pass the true ones here. Subcarriers are
    a leading axis.

    Args:
        h: True channels, complex ``[..., antenna, user]``. A zero column is legal: that user's rate is 0.
        w: Precoders, complex ``[..., antenna, user]``, column k for user k.
        noise_power: Noise variance at each user, positive; scalar or broadcasting to ``[...]``; units of ``|h^H w|^2``.

    Returns:
        float64 ``[..., user]`` in bit/s/Hz.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes or devices differ, non-finite values, or ``noise_power`` not positive.
    """
    _check_complex_pair(h, w, "[..., antenna, user]", 2, "w")
    noise = as_positive("noise_power", noise_power, h.shape[:-2], h)
    gains = as_double(h).mH @ as_double(w)
    power = gains.real.square() + gains.imag.square()
    signal = power.diagonal(dim1=-2, dim2=-1)
    # Summing the off-diagonal, not total minus signal: at high SINR the difference cancels.
    other_users = 1 - torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
    interference = (power * other_users).sum(-1)
    return torch.log1p(signal / (interference + noise.unsqueeze(-1))) / torch.log(power.new_tensor(2.0))


def sum_rate(h: Tensor, w: Tensor, noise_power: float | Tensor) -> Tensor:
    """Sum over users of :func:`user_rates` (the objective of Zheng and Dai, eq. 2).

    Args, Raises: as :func:`user_rates`.

    Returns:
        float64 ``[...]`` in bit/s/Hz, one per channel realisation; average over them for a curve.
    """
    return user_rates(h, w, noise_power).sum(-1)


def ser(transmitted: Tensor, detected: Tensor) -> Tensor:
    """Symbol error ratio: the fraction of symbols detected wrongly.

    Args:
        transmitted: Symbol indices, an integer tensor of any shape with at least one element.
        detected: Symbol indices of the same shape; decide soft estimates with
            :func:`csimodels.evaluation.detection.qam_demodulate` first.

    Returns:
        float64 scalar in [0, 1]. Not differentiable.

    Raises:
        TypeError: not integer tensors.
        ValueError: shapes or devices differ, or no symbols.
    """
    check_tensor("transmitted", transmitted, "[...]", min_dim=0, dtypes=INTEGER_DTYPES)
    check_tensor("detected", detected, "[...]", min_dim=0, dtypes=INTEGER_DTYPES)
    check_same_shape("detected", detected, "transmitted", transmitted)
    if transmitted.numel() == 0:
        raise ValueError("transmitted: expected at least one symbol, got none")
    return (transmitted != detected).to(torch.float64).mean()


def _error_and_power(h: Tensor, h_hat: Tensor) -> tuple[Tensor, Tensor]:
    dtypes = REAL_DTYPES + COMPLEX_DTYPES
    check_tensor("h", h, "[N, ...]", min_dim=2, dtypes=dtypes)
    check_tensor("h_hat", h_hat, "[N, ...]", min_dim=2, dtypes=dtypes)
    if h.is_complex() != h_hat.is_complex():
        kinds = ["complex" if value.is_complex() else "real" for value in (h, h_hat)]
        raise TypeError(f"h_hat: expected a {kinds[0]} tensor like h, got a {kinds[1]} one")
    check_same_shape("h_hat", h_hat, "h", h)
    check_finite("h", h)
    check_finite("h_hat", h_hat)
    h, h_hat = as_double(h), as_double(h_hat)
    return _power(h - h_hat), _power(h)


def _power(x: Tensor) -> Tensor:
    """Squared norm over all axes but the first; no square root on the way, so the gradient exists at 0."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.square().sum(dim=tuple(range(1, x.dim())))


def _check_complex_pair(h: Tensor, other: Tensor, layout: str, min_dim: int, other_name: str = "h_hat") -> None:
    check_tensor("h", h, layout, min_dim=min_dim, dtypes=COMPLEX_DTYPES)
    check_tensor(other_name, other, layout, min_dim=min_dim, dtypes=COMPLEX_DTYPES)
    check_same_shape(other_name, other, "h", h)
    if any(size == 0 for size in h.shape[h.dim() - min_dim :]):
        raise ValueError(f"h: expected shape {layout} without an empty axis, got {tuple(h.shape)}")
    check_finite("h", h)
    check_finite(other_name, other)


def _cosine(h: Tensor, h_hat: Tensor, dim: int, zero: str) -> Tensor:
    norm = _norm(h, dim)
    check_none("h", norm.detach() == 0, zero)
    norm_hat = _norm(h_hat, dim)
    is_zero = norm_hat.detach() == 0
    # Divide by 1 where the estimate is zero: the numerator is 0 there, and 0/0 would poison the gradient.
    product = (h_hat.conj() * h).sum(dim).abs()
    cosine = product / (norm * torch.where(is_zero, torch.ones_like(norm_hat), norm_hat))
    # Cauchy-Schwarz holds up to rounding; clamp lets the gradient through at exactly 1.
    return torch.where(is_zero, torch.zeros_like(cosine), cosine).clamp(max=1.0)


def _norm(x: Tensor, dim: int) -> Tensor:
    """Norm of a complex tensor over a negative ``dim``, on its real view: complex norms take a hypot per entry."""
    return torch.linalg.vector_norm(torch.view_as_real(x), dim=(dim - 1, -1))


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction != "mean":
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    _check_samples(values)
    return values.mean()


def _check_samples(values: Tensor) -> None:
    if values.numel() == 0:
        raise ValueError("h: expected at least one sample to average over, got none")


def _check_batch_size(reduction: str, batch_size: int | None) -> None:
    if reduction != "mean_of_batch_db":
        if batch_size is not None:
            raise ValueError(f"batch_size: expected only with reduction='mean_of_batch_db', got it with {reduction!r}")
    elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive int with 'mean_of_batch_db', got {batch_size!r}")


def _db(ratio: Tensor) -> Tensor:
    return 10 * torch.log10(ratio)
