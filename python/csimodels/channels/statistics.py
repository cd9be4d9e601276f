"""Statistics of a channel measured from ``H`` itself, so that every generator is measured alike.

``H`` is complex ``[..., sample, antenna, subcarrier]``: leading dimensions are environments, and each result has one
value per environment. Spreads come from power spectra that are averaged over an environment's samples; a Hann taper
keeps the side lobes of a strong ray from counting as spread, and what the taper itself adds is subtracted (variances of
independent parts add up).
"""

from __future__ import annotations

import math

import torch

from csimodels.channels.rays import SubcarrierGrid


def rms_delay_spread(h: torch.Tensor, grid: SubcarrierGrid) -> torch.Tensor:
    """Root-mean-square delay spread (38.901, annex A.2) of the power delay profile.

    Args:
        h: complex ``[..., sample, antenna, subcarrier]``.
        grid: its subcarriers. Delays are known modulo ``subcarriers / bandwidth``: the profile is cut open a quarter of
            that period before its mean, since profiles rise at once and decay slowly, and spreads near a quarter of the
            period or above come out too small.

    Returns:
        seconds, float64 ``[...]``.

    Raises:
        ValueError: ``h`` is no such array, has other subcarriers than ``grid``, fewer than 3 of them, or no power.
    """
    _check(h)
    if h.shape[-1] != grid.subcarriers or grid.subcarriers < 3:
        raise ValueError(
            f"h: expected {max(grid.subcarriers, 3)} subcarriers in the last dimension, got {tuple(h.shape)}"
        )
    return _spectral_spread(h, 0.25) * (grid.subcarriers / grid.bandwidth)


def direction_spread(h: torch.Tensor, spacing: float = 0.5) -> torch.Tensor:
    """Root-mean-square spread of the direction cosine along a uniform linear array.

    A small azimuth spread of ``s`` radians around azimuth ``phi`` from broadside is ``s cos(phi)`` here: the part of it
    that the array can see, without the ambiguity between front and back.

    Args:
        h: complex ``[..., sample, antenna, subcarrier]`` of a uniform linear array, at least 3 antennas.
        spacing: of its antennas, in wavelengths. Direction cosines are known modulo ``1 / spacing``.

    Returns:
        dimensionless, float64 ``[...]``.

    Raises:
        ValueError: ``h`` is no such array, or has no power.
    """
    _check(h)
    if h.shape[-2] < 3:
        raise ValueError(f"h: expected at least 3 antennas in the last dimension but one, got {tuple(h.shape)}")
    # The steering phase runs the other way than that of a delay, which a symmetric cut does not see.
    return _spectral_spread(h.mT, 0.5) / spacing


def energy_compaction(h: torch.Tensor, beams: int = 16) -> torch.Tensor:
    """Share of a sample's energy in its strongest angular-delay beams, averaged over samples.

    Args:
        h: complex ``[..., sample, antenna, subcarrier]``; its two-dimensional DFT has one coefficient per pair of beam
            and delay tap.
        beams: number of coefficients, 1 to ``antenna * subcarrier``; the strongest of each sample are taken.

    Returns:
        between 0 and 1, float64 ``[...]``.

    Raises:
        ValueError: ``h`` is no such array, has no power, or ``beams`` is out of range.
    """
    _check(h)
    if not 1 <= beams <= h.shape[-2] * h.shape[-1]:
        raise ValueError(f"beams: expected 1 to {h.shape[-2] * h.shape[-1]}, got {beams}")
    energy = torch.fft.fft2(h.to(torch.complex128)).abs().square().flatten(-2)
    return (energy.topk(beams, dim=-1).values.sum(-1) / energy.sum(-1)).mean(-1)


def subspace_dimension(h: torch.Tensor, energy: float = 0.99) -> torch.Tensor:
    """Dimensions of the smallest subspace that holds a share of an environment's energy.

    Args:
        h: complex ``[..., sample, antenna, subcarrier]``; the result is at most the number of samples.
        energy: share between 0 and 1.

    Returns:
        int64 ``[...]``.

    Raises:
        ValueError: ``h`` is no such array, has no power, or ``energy`` is out of range.
    """
    _check(h)
    if not 0 < energy < 1:
        raise ValueError(f"energy: expected a share between 0 and 1, got {energy}")
    variance = torch.linalg.svdvals(h.to(torch.complex128).flatten(-2)).square()
    share = variance.cumsum(-1) / variance.sum(-1, keepdim=True)
    return (share < energy).sum(-1) + 1


def _check(h: torch.Tensor) -> None:
    if not h.is_complex() or h.ndim < 3 or 0 in h.shape:
        raise ValueError(
            f"h: expected complex [..., sample, antenna, subcarrier], not empty, got {h.dtype} {tuple(h.shape)}"
        )
    power = h.abs().square().sum(dim=(-2, -1))
    if not bool((torch.isfinite(power) & (power > 0)).all()):
        raise ValueError("h: expected finite samples with power, got some without")


def _spectral_spread(h: torch.Tensor, before: float) -> torch.Tensor:
    """Rms width of the power spectrum over the last dimension, in periods, averaged over the two dimensions before it.

    ``before`` is the part of the period that counts as earlier than the mean.
    """
    length = h.shape[-1]
    taper = torch.hann_window(length + 2, periodic=False, dtype=torch.float64, device=h.device)[1:-1]
    # The power spectrum has twice the bandwidth of the spectrum, hence twice the bins.
    bins = 2 * length
    spectrum = torch.fft.ifft(h.to(torch.complex128) * taper, n=bins).abs().square().sum(dim=(-3, -2))
    own = torch.fft.ifft(taper, n=bins).abs().square()
    variance = _circular_variance(spectrum, before) - _circular_variance(own, before)
    return variance.clamp(min=0).sqrt()


def _circular_variance(power: torch.Tensor, before: float) -> torch.Tensor:
    """Variance of a profile ``[..., bin]`` of period 1, cut open at ``before`` before its circular mean."""
    position = torch.arange(power.shape[-1], dtype=torch.float64, device=power.device) / power.shape[-1]
    weight = power / power.sum(-1, keepdim=True)
    mean = (weight * torch.exp(2j * math.pi * position)).sum(-1).angle() / (2 * math.pi)
    unrolled = torch.remainder(position - mean[..., None] + before, 1.0)
    return (weight * (unrolled - (weight * unrolled).sum(-1, keepdim=True)).square()).sum(-1)
