"""Noise and uplink transmissions over given channels, for training and tests.

All draws come from the caller's ``torch.Generator``, on its device, and are then moved to that of the channel: with a
CPU generator the same numbers arrive on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csimodels.evaluation._checks import (
    COMPLEX_DTYPES,
    as_double,
    as_positive,
    check_finite,
    check_none,
    check_tensor,
)
from csimodels.evaluation.detection import QAM_ORDERS, qam_modulate


def draw_uplink(
    h: Tensor, slots: int, order: int, snr_db: float | Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random QAM symbols of all users, received in ``slots`` that share a channel (Zheng and Dai, eq. 7).

    The SNR is that at one antenna, ``E|H x|^2 / E|n|^2``, for channels of unit mean square per element: the noise power
    is ``K / snr`` whatever the sample's own channel (decided; the paper does not define it).

    Args:
        h: Channels, complex ``[batch, antenna, user]``.
        slots: L, at least 1.
        order: 4, 16, 64 or 256.
        snr_db: In dB; scalar or ``[batch]``.
        generator: Of all draws.

    Returns:
        Received signals, complex ``[batch, slot, antenna]`` in the dtype of ``h``; symbol indices, int64
        ``[batch, slot, user]``; and the noise power, ``[batch]`` in the precision of ``h``.

    Raises:
        TypeError: ``h`` not complex, or ``snr_db`` not a number or real tensor.
        ValueError: shapes that do not fit, another order, fewer than 1 slot, or non-finite values.
    """
    check_tensor("h", h, "[batch, antenna, user]", min_dim=3, dtypes=COMPLEX_DTYPES)
    if h.dim() != 3 or 0 in h.shape[1:]:
        raise ValueError(f"h: expected shape [batch, antenna, user] without an empty axis, got {tuple(h.shape)}")
    check_finite("h", h)
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ValueError(f"slots: expected an int of at least 1, got {slots!r}")
    if not isinstance(order, int) or order not in QAM_ORDERS:
        raise ValueError(f"order: expected one of {', '.join(map(str, QAM_ORDERS))}, got {order!r}")
    batch, antennas, users = h.shape
    noise_power = (users / _snr(snr_db, h)).expand(batch)
    drawn = torch.randint(order, (batch, slots, users), generator=generator, device=generator.device)
    symbols = drawn.to(h.device)
    noise = _noise((batch, slots, antennas), h, generator) * noise_power.sqrt()[:, None, None].to(h.real.dtype)
    y = qam_modulate(symbols, order, dtype=h.dtype) @ h.mT + noise
    return y, symbols, noise_power.to(h.real.dtype)


def add_noise(x: Tensor, snr_db: float | Tensor, generator: torch.Generator) -> Tensor:
    """White complex Gaussian noise at the given SNR over each sample's own power.

    Args:
        x: Complex ``[batch, ...]``; power is the mean of ``|x|^2`` over all axes but the first.
        snr_db: In dB; scalar or ``[batch]``.
        generator: Of the noise.

    Returns:
        ``x`` plus noise, shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` not complex, or ``snr_db`` not a number or real tensor.
        ValueError: shapes that do not fit, non-finite values, or a sample of zero power.
    """
    check_tensor("x", x, "[batch, ...]", min_dim=2, dtypes=COMPLEX_DTYPES)
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape [batch, ...] without an empty axis, got {tuple(x.shape)}")
    check_finite("x", x)
    snr = _snr(snr_db, x)
    power = torch.view_as_real(as_double(x)).square().flatten(1).sum(1) / math.prod(x.shape[1:])
    check_none("x", power.detach() == 0, "sample(s) of zero power")
    amplitude = (power / snr).sqrt().to(x.real.dtype)
    return x + _noise(x.shape, x, generator) * amplitude.reshape(-1, *[1] * (x.dim() - 1))


def _snr(snr_db: float | Tensor, like: Tensor) -> Tensor:
    """Linear, float64, a scalar or ``[batch]``."""
    if isinstance(snr_db, bool) or not isinstance(snr_db, (int, float, Tensor)):
        raise TypeError(f"snr_db: expected a number or a real tensor, got {type(snr_db).__name__}")
    if isinstance(snr_db, Tensor) and snr_db.is_complex():
        raise TypeError(f"snr_db: expected a real dtype, got {str(snr_db.dtype).removeprefix('torch.')}")
    decibels = torch.as_tensor(snr_db, dtype=torch.float64, device=like.device)
    check_finite("snr_db", decibels)
    return as_positive("snr_db", 10 ** (decibels / 10), like.shape[:1], like)


def _noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Complex Gaussian noise of unit power."""
    return torch.randn(shape, dtype=like.dtype, generator=generator, device=generator.device).to(like.device)
