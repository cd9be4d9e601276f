"""QAM and uplink detectors: linear MMSE, and maximum likelihood as an oracle for small systems.

The model is ``y = H x + n`` (Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", eq. 7):
``H`` complex ``[..., antenna, user]``, ``y`` complex ``[..., antenna]``, ``x`` complex ``[..., user]``, one QAM symbol
of unit average power per user. Leading axes of ``H`` and ``y`` broadcast, so slots that share a channel are
``lmmse(h.unsqueeze(-3), y, noise_power)`` with ``y`` ``[..., slot, antenna]``.

Symbols are named by their index, the integer whose bits, most significant first, are b0 b1 b2 ... of 3GPP TS 38.211
section 5.1; that mapping is Gray: neighbours differ in one bit. Arithmetic is complex128; soft estimates return in the
dtype of ``y``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csimodels.evaluation._checks import (
    COMPLEX_DTYPES,
    INTEGER_DTYPES,
    as_double,
    as_positive,
    check_finite,
    check_none,
    check_same_device,
    check_tensor,
)

QAM_ORDERS = (4, 16, 64, 256)
ML_MAX_CANDIDATES = 2**16
_ML_BLOCK_ELEMENTS = 2**22  # complex128 entries per block of the exhaustive search: 64 MiB


def qam_constellation(
    order: int, *, dtype: torch.dtype = torch.complex64, device: torch.device | str | None = None
) -> Tensor:
    """Gray-mapped square QAM of unit average power (3GPP TS 38.211, sections 5.1.3 to 5.1.6).

    Args:
        order: 4 (QPSK), 16, 64 or 256.
        dtype: complex64 or complex128.
        device: Where to put it.

    Returns:
        Points ``[order]``; entry i is the symbol with index i.

    Raises:
        TypeError: ``dtype`` not complex.
        ValueError: another order.
    """
    bits = _bits_per_symbol(order)
    if dtype not in COMPLEX_DTYPES:
        raise TypeError(f"dtype: expected torch.complex64 or torch.complex128, got {dtype}")
    index = torch.arange(order)
    signs = 1 - 2 * symbols_to_bits(index, order).to(torch.float64)
    # Even bits set the real part, odd ones the imaginary: s0 (2^j - s2 (2^(j-1) - ...)), unrolled from the inside.
    in_phase, quadrature = signs[:, bits - 2], signs[:, bits - 1]
    for level in range(1, bits // 2):
        in_phase = signs[:, bits - 2 - 2 * level] * (2**level - in_phase)
        quadrature = signs[:, bits - 1 - 2 * level] * (2**level - quadrature)
    return (torch.complex(in_phase, quadrature) / _amplitude(order)).to(dtype=dtype, device=device)


def symbols_to_bits(symbols: Tensor, order: int) -> Tensor:
    """Bits b0 b1 ... of each symbol index.

    Args:
        symbols: Indices, an integer tensor ``[...]`` with values in 0..order-1.
        order: 4, 16, 64 or 256.

    Returns:
        int64 ``[..., log2(order)]`` of 0 and 1, b0 first.

    Raises:
        TypeError: not an integer tensor.
        ValueError: another order, or an index out of range (its place is named).
    """
    bits = _bits_per_symbol(order)
    _check_symbols(symbols, order)
    shifts = torch.arange(bits - 1, -1, -1, device=symbols.device)
    return (symbols.long().unsqueeze(-1) >> shifts) & 1


def bits_to_symbols(bits: Tensor, order: int) -> Tensor:
    """Symbol indices from bits; the inverse of :func:`symbols_to_bits`.

    Args:
        bits: Integer or bool ``[..., log2(order)]`` of 0 and 1, b0 first.
        order: 4, 16, 64 or 256.

    Returns:
        int64 ``[...]``.

    Raises:
        TypeError: neither integer nor bool.
        ValueError: another order, a last axis of another length, or values other than 0 and 1.
    """
    count = _bits_per_symbol(order)
    check_tensor("bits", bits, f"[..., {count}]", min_dim=1, dtypes=(*INTEGER_DTYPES, torch.bool))
    if bits.shape[-1] != count:
        raise ValueError(f"bits: expected shape [..., {count}] for {order}-QAM, got {tuple(bits.shape)}")
    bits = bits.long()
    check_none("bits", (bits != 0) & (bits != 1), "value(s) other than 0 and 1")
    shifts = torch.arange(count - 1, -1, -1, device=bits.device)
    return (bits << shifts).sum(-1)


def qam_modulate(symbols: Tensor, order: int, *, dtype: torch.dtype = torch.complex64) -> Tensor:
    """Constellation points of symbol indices.

    Args:
        symbols: Indices, an integer tensor ``[...]`` with values in 0..order-1.
        order: 4, 16, 64 or 256.
        dtype: complex64 or complex128.

    Returns:
        Complex ``[...]``.

    Raises:
        TypeError, ValueError: as :func:`symbols_to_bits` and :func:`qam_constellation`.
    """
    points = qam_constellation(order, dtype=dtype)
    _check_symbols(symbols, order)
    return points.to(symbols.device)[symbols.long()]


def qam_demodulate(x: Tensor, order: int) -> Tensor:
    """Hard decision: the index of the constellation point nearest to each value.

    Real and imaginary part are decided apart, in float64, without forming distances. A value exactly half-way goes to
    the point with the larger coordinate.

    Args:
        x: Complex ``[...]``, scaled to unit average symbol power.
        order: 4, 16, 64 or 256.

    Returns:
        int64 ``[...]``. Not differentiable.

    Raises:
        TypeError: not a complex tensor.
        ValueError: another order, or non-finite values.
    """
    _bits_per_symbol(order)
    check_tensor("x", x, "[...]", min_dim=0, dtypes=COMPLEX_DTYPES)
    check_finite("x", x)
    levels = math.isqrt(order)
    x = as_double(x.detach())

    def level(part: Tensor) -> Tensor:
        # Amplitudes are -(L-1), ..., -1, 1, ..., L-1 over the normalisation.
        return torch.floor((part * _amplitude(order) + levels) / 2).clamp(0, levels - 1).long()

    index_of = _index_by_level(order).to(x.device)
    return index_of[level(x.real), level(x.imag)]


def lmmse(h: Tensor, y: Tensor, noise_power: float | Tensor, *, unbiased: bool = False) -> Tensor:
    """Linear MMSE detector ``(H^H H + noise_power I)^-1 H^H y`` for unit-power symbols.

    It minimises the mean squared error of eq. 8 among linear detectors, at the price of shrinking the symbols. With
    ``unbiased`` each user's estimate is divided by its gain, which is what a minimum-distance decision of 16-QAM and
    above wants.

    Args:
        h: Channels, complex ``[..., antenna, user]``.
        y: Received signal, complex ``[..., antenna]``; leading axes broadcast with those of ``h``.
        noise_power: Noise variance at each antenna, positive; scalar or broadcasting to the common leading axes.
        unbiased: Undo the shrinkage.

    Returns:
        Soft symbols ``[..., user]``, dtype of ``y``. Differentiable.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes or devices that do not fit, non-finite values, ``noise_power`` not positive, or lost in
            rounding beside linearly dependent users, or ``unbiased`` with a user of zero channel (its index is named).
    """
    batch = _check_received(h, y)
    noise = as_positive("noise_power", noise_power, batch, h)
    channel, received = as_double(h), as_double(y)
    gram = channel.mH @ channel
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    matched = channel.mH @ received.unsqueeze(-1)
    if unbiased:
        zero = torch.linalg.vector_norm(channel.detach(), dim=-2) == 0
        check_none("h", zero, "user(s) of zero channel, which have no unbiased estimate")
    factor, info = torch.linalg.cholesky_ex(gram + noise[..., None, None] * identity)
    check_none("noise_power", info != 0, "value(s) too small to regularise linearly dependent users")
    estimate = torch.cholesky_solve(matched, factor.expand(*batch, *factor.shape[-2:])).squeeze(-1)
    if unbiased:
        gain = torch.cholesky_solve(gram.expand_as(factor), factor).diagonal(dim1=-2, dim2=-1).real
        estimate = estimate / gain
    return estimate.to(y.dtype)


def ml(h: Tensor, y: Tensor, order: int) -> Tensor:
    """Maximum-likelihood detector: the symbol vector that minimises ``|y - H x|``, found by trying all of them.

    An oracle for small systems. The search is exact, in complex128 and bounded memory; of candidates at the same
    distance the first in lexicographic order of indices wins.

    Args:
        h: Channels, complex ``[..., antenna, user]``.
        y: Received signal, complex ``[..., antenna]``; leading axes broadcast with those of ``h``.
        order: 4, 16, 64 or 256.

    Returns:
        Symbol indices, int64 ``[..., user]``. Not differentiable.

    Raises:
        TypeError: not complex tensors.
        ValueError: another order, shapes or devices that do not fit, non-finite values, or more than 2^16 candidates
            (``order ** users``).
    """
    _bits_per_symbol(order)
    batch = _check_received(h, y)
    users = h.shape[-1]
    if order**users > ML_MAX_CANDIDATES:
        raise ValueError(
            f"order, h: {order}-QAM with {users} users has {order}^{users} candidates, more than the "
            f"{ML_MAX_CANDIDATES} of an exhaustive search; use fewer users, a lower order, or lmmse()"
        )
    digits = torch.cartesian_prod(*[torch.arange(order)] * users).reshape(-1, users).to(h.device)
    candidates = qam_constellation(order, dtype=torch.complex128, device=h.device)[digits].mT  # [user, candidate]
    # |y - H x|^2 = |Q^H y - R x|^2 + what no x changes; unlike the expanded square nothing cancels.
    q, r = torch.linalg.qr(as_double(h.detach()))
    rotated = q.mH @ as_double(y.detach()).unsqueeze(-1)
    r = r.expand(*batch, *r.shape[-2:]).reshape(-1, *r.shape[-2:])
    rotated = rotated.expand(*batch, *rotated.shape[-2:]).reshape(-1, rotated.shape[-2], 1)
    block = max(1, _ML_BLOCK_ELEMENTS // (candidates.shape[1] * max(r.shape[-2], 1)))
    best = [
        _first_minimum((target - factor @ candidates).abs().square().sum(-2))
        for factor, target in zip(r.split(block), rotated.split(block), strict=True)
    ]
    return digits[torch.cat(best)].reshape(*batch, users)


def _first_minimum(distance: Tensor) -> Tensor:
    """Index of the smallest entry of each row, the lowest one on a tie (``argmin`` does not promise which)."""
    columns = torch.arange(distance.shape[-1], device=distance.device)
    is_best = distance == distance.amin(-1, keepdim=True)
    return torch.where(is_best, columns, distance.shape[-1]).amin(-1)


def _bits_per_symbol(order: int) -> int:
    if not isinstance(order, int) or order not in QAM_ORDERS:
        raise ValueError(f"order: expected one of {', '.join(map(str, QAM_ORDERS))}, got {order!r}")
    return order.bit_length() - 1


def _amplitude(order: int) -> float:
    """Root mean square of the unnormalised points: sqrt 2, 10, 42, 170."""
    return math.sqrt(2 * (order - 1) / 3)


def _index_by_level(order: int) -> Tensor:
    """Symbol index by real and imaginary amplitude level, ascending: ``[sqrt(order), sqrt(order)]``."""
    points = qam_constellation(order, dtype=torch.complex128) * _amplitude(order)
    levels = math.isqrt(order)
    table = torch.empty(levels, levels, dtype=torch.int64)
    rows, columns = (((part + levels - 1) / 2).round().long() for part in (points.real, points.imag))
    table[rows, columns] = torch.arange(order)
    return table


def _check_symbols(symbols: Tensor, order: int) -> None:
    check_tensor("symbols", symbols, "[...]", min_dim=0, dtypes=INTEGER_DTYPES)
    check_none("symbols", (symbols < 0) | (symbols.long() >= order), f"value(s) outside 0..{order - 1}")


def _check_received(h: Tensor, y: Tensor) -> torch.Size:
    check_tensor("h", h, "[..., antenna, user]", min_dim=2, dtypes=COMPLEX_DTYPES)
    check_tensor("y", y, "[..., antenna]", min_dim=1, dtypes=COMPLEX_DTYPES)
    check_same_device("y", y, "h", h)
    if 0 in h.shape[-2:]:
        raise ValueError(f"h: expected at least one antenna and one user, got shape {tuple(h.shape)}")
    if y.shape[-1] != h.shape[-2]:
        raise ValueError(f"y: expected {h.shape[-2]} antennas like h {tuple(h.shape)}, got shape {tuple(y.shape)}")
    try:
        batch = torch.broadcast_shapes(h.shape[:-2], y.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"y: expected leading axes that broadcast with {tuple(h.shape[:-2])} of h, got {tuple(y.shape[:-1])}"
        ) from None
    check_finite("h", h)
    check_finite("y", y)
    return batch
