"""Downlink multi-user precoders for single-antenna users: zero forcing, regularised, WMMSE, and the optimal structure.

Conventions: channels are complex ``[..., antenna, user]``, column k is ``h_k`` and user k receives ``h_k^H W x + n``;
precoders have the same shape, column k is ``w_k`` (Zheng and Dai, "Large Language Model Enabled Multi-Task Physical
Layer Network", eqs. 1-4). Subcarriers and realisations are leading axes. ``power`` is the total transmit power of one
realisation, ``noise_power`` the noise variance at each user; both are positive scalars or tensors that broadcast to the
leading axes.

Every precoder works in the K-dimensional span of the users' channels (a K x K system however many antennas there are),
computes in complex128 and returns the dtype of ``h``; the power constraint holds to that dtype's rounding. All are
differentiable. NaN or infinity, and a user whose channel is zero (it has no direction), raise ``ValueError`` with the
index ``(..., user)``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from csimodels.evaluation._checks import (
    COMPLEX_DTYPES,
    REAL_DTYPES,
    as_double,
    as_positive,
    check_finite,
    check_none,
    check_same_device,
    check_same_shape,
    check_tensor,
)

Normalization = Literal["per_user", "total"]


def zf(
    h: Tensor, power: float | Tensor = 1.0, *, normalization: Normalization = "per_user", rtol: float = 1e-6
) -> Tensor:
    """Zero-forcing precoder: the Moore-Penrose pseudo-inverse of the multi-user channel, scaled to ``power``.

    Interference vanishes when the users' channels are linearly independent. When they are not (two users fed back the
    same codeword, say) nothing can null it, and the pseudo-inverse gives the nearest answer: users with the same
    channel get the same beam.

    Args:
        h: Channels, complex ``[..., antenna, user]``, no more users than antennas.
        power: Total transmit power, positive; scalar or broadcasting to ``[...]``.
        normalization: ``"per_user"`` gives every user ``power / K``; ``"total"`` scales the whole matrix, so every user
            receives the same signal amplitude.
        rtol: Singular values of the channel with unit columns below ``rtol`` times the largest count as dependence.

    Returns:
        Precoders ``[..., antenna, user]``, dtype of ``h``, with ``sum_k |w_k|^2 = power``.

    Raises:
        TypeError: not complex tensors.
        ValueError: more users than antennas, a zero or non-finite channel, ``power`` not positive, or an unknown
            ``normalization``.
    """
    channel, norm = _check_channel(h)
    if h.shape[-1] > h.shape[-2]:
        raise ValueError(f"h: zero forcing serves at most one user per antenna, got shape {tuple(h.shape)}")
    budget = as_positive("power", power, h.shape[:-2], h)
    # With unit columns the rank decision is about directions alone, not about path loss.
    inverse = torch.linalg.pinv(channel / norm, rtol=rtol).mH / norm
    return _scale(inverse, budget, normalization).to(h.dtype)


def mmse(
    h: Tensor, power: float | Tensor, noise_power: float | Tensor, *, normalization: Normalization = "per_user"
) -> Tensor:
    """Regularised zero forcing, ``H (H^H H + (K noise_power / power) I)^-1`` scaled to ``power``.

    The loading is that of the transmit Wiener filter. It tends to maximum-ratio transmission as the noise grows and to
    :func:`zf` as it vanishes; with ``"per_user"`` it is :func:`structured_precoder` with equal parameters. Any number
    of users is served.

    Args:
        h: Channels, complex ``[..., antenna, user]``.
        power: Total transmit power, positive; scalar or broadcasting to ``[...]``.
        noise_power: Noise variance at each user, positive; scalar or broadcasting to ``[...]``.
        normalization: As for :func:`zf`.

    Returns:
        Precoders ``[..., antenna, user]``, dtype of ``h``, with ``sum_k |w_k|^2 = power``.

    Raises:
        TypeError, ValueError: as :func:`zf`, and ``noise_power`` not positive.
    """
    channel, _ = _check_channel(h)
    budget = as_positive("power", power, h.shape[:-2], h)
    noise = as_positive("noise_power", noise_power, h.shape[:-2], h)
    users = h.shape[-1]
    loading = (budget / (users * noise)).unsqueeze(-1).expand(*h.shape[:-2], users)
    return _scale(_loaded_directions(channel, loading), budget, normalization).to(h.dtype)


def structured_precoder(h: Tensor, lambdas: Tensor, p: Tensor, noise_power: float | Tensor) -> Tensor:
    """The optimal structure of sum-rate precoders (Zheng and Dai, eq. 4).

    ``w_k = sqrt(p_k) v_k / |v_k|`` with ``v_k = (I + sum_j lambda_j / noise_power h_j h_j^H)^-1 h_k``: 2K reals
    describe a whole N x K precoder, so a network need learn only those. Scale both with :func:`scale_to_power`; the
    constraint is not enforced here.

    Args:
        h: Channels, complex ``[..., antenna, user]``.
        lambdas: Virtual uplink powers, real and non-negative ``[..., user]``, in units of power.
        p: Downlink powers, real and non-negative ``[..., user]``. A user with ``p_k = 0`` is switched off (and its
            gradient with respect to ``p_k``, infinite there, is set to 0).
        noise_power: Noise variance at each user, positive; scalar or broadcasting to ``[...]``.

    Returns:
        Precoders ``[..., antenna, user]``, dtype of ``h``, with ``|w_k|^2 = p_k``.

    Raises:
        TypeError: ``h`` not complex, ``lambdas`` or ``p`` not real floating point.
        ValueError: shapes or devices that do not fit, a zero or non-finite channel, negative parameters, or
            ``noise_power`` not positive.
    """
    channel, _ = _check_channel(h)
    noise = as_positive("noise_power", noise_power, h.shape[:-2], h)
    lambdas = _check_user_powers("lambdas", lambdas, h)
    p = _check_user_powers("p", p, h)
    directions = _loaded_directions(channel, lambdas / noise.unsqueeze(-1))
    is_on = p.detach() > 0
    amplitude = torch.where(is_on, torch.where(is_on, p, torch.ones_like(p)).sqrt(), torch.zeros_like(p))
    norm = torch.linalg.vector_norm(directions, dim=-2)
    return (directions * (amplitude / norm).unsqueeze(-2)).to(h.dtype)


def scale_to_power(x: Tensor, power: float | Tensor) -> Tensor:
    """Scale non-negative values so that they sum to ``power`` (Zheng and Dai, eq. 24).

    Args:
        x: Real and non-negative ``[..., user]``, e.g. a network's output after softplus.
        power: The sum to reach, positive; scalar or broadcasting to ``[...]``.

    Returns:
        ``[..., user]``, dtype of ``x``. Differentiable.

    Raises:
        TypeError: ``x`` not real floating point.
        ValueError: negative or non-finite values, or a row of zeros (its index is named).
    """
    check_tensor("x", x, "[..., user]", min_dim=1, dtypes=REAL_DTYPES)
    check_finite("x", x)
    check_none("x", x.detach() < 0, "negative value(s)")
    budget = as_positive("power", power, x.shape[:-1], x)
    total = as_double(x).sum(-1)
    check_none("x", total.detach() == 0, "row(s) that sum to zero")
    return (as_double(x) * (budget / total).unsqueeze(-1)).to(x.dtype)


def wmmse(
    h: Tensor,
    power: float | Tensor,
    noise_power: float | Tensor,
    *,
    iterations: int = 20,
    initial: Tensor | None = None,
) -> Tensor:
    """Sum-rate maximising precoder by iteratively weighted MMSE (Shi et al., 2011; 20 iterations in Zheng and Dai).

    The power constraint is folded into the noise: full power is always optimal, so the problem is solved for the
    scale-free objective in which the noise is ``noise_power |W|_F^2 / power``. Every update is then closed-form,
    without the usual search for a multiplier; the sum rate never falls from one iteration to the next; and any number
    of iterations meets the constraint. It climbs towards a local optimum and never ends below the start.

    Args:
        h: Channels, complex ``[..., antenna, user]``.
        power: Total transmit power, positive; scalar or broadcasting to ``[...]``.
        noise_power: Noise variance at each user, positive; scalar or broadcasting to ``[...]``.
        iterations: Rounds of receiver, weight and precoder updates; 0 returns the scaled start.
        initial: Precoders to start from, complex, shape of ``h``; default :func:`mmse`. A zero column stays off.

    Returns:
        Precoders ``[..., antenna, user]``, dtype of ``h``, with ``sum_k |w_k|^2 = power``.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes or devices that do not fit, a zero or non-finite channel, ``power`` or ``noise_power`` not
            positive, ``iterations`` negative, or an ``initial`` that is zero, or useless to every user.
    """
    return _wmmse(h, power, noise_power, iterations, initial)[0]


def wmmse_parameters(
    h: Tensor, power: float | Tensor, noise_power: float | Tensor, *, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """The ``lambda`` and ``p`` of eq. 4 that reproduce :func:`wmmse`: labels for supervised training (eq. 38).

    A WMMSE iterate has that structure exactly, with ``lambda_k`` proportional to the weight times the squared receive
    filter; both vectors sum to ``power`` by themselves.

    Args:
        h, power, noise_power: As for :func:`wmmse`.
        iterations: At least 1 (the start has no such parameters).

    Returns:
        ``(lambdas, p)``, real ``[..., user]`` in the precision of ``h``;
        ``structured_precoder(h, lambdas, p, noise_power)`` equals ``wmmse(h, power, noise_power)``.

    Raises:
        TypeError, ValueError: as :func:`wmmse`.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an int of at least 1, got {iterations!r}")
    w, lambdas = _wmmse(h, power, noise_power, iterations, None)
    dtype = w.real.dtype
    return lambdas.to(dtype), as_double(w).abs().square().sum(-2).to(dtype)


def _wmmse(
    h: Tensor, power: float | Tensor, noise_power: float | Tensor, iterations: int, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Precoders and, from the last update, the virtual uplink powers (NaN without iterations)."""
    channel, _ = _check_channel(h)
    budget = as_positive("power", power, h.shape[:-2], h)
    noise = as_positive("noise_power", noise_power, h.shape[:-2], h)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: expected a non-negative int, got {iterations!r}")
    start = as_double(mmse(h, power, noise_power) if initial is None else _check_initial(initial, h))
    w = _scale(start, budget, "total")
    relative_noise = (noise / budget).unsqueeze(-1)
    gram = channel.mH @ channel
    gains = channel.mH @ w  # [..., user, stream]
    transmitted = budget.expand(h.shape[:-2])
    lambdas = torch.full_like(gram.real[..., 0], torch.nan)
    for _ in range(iterations):
        coefficients, lambdas = _wmmse_update(gram, gains, relative_noise, transmitted)
        w = channel @ coefficients
        gains = gram @ coefficients
        transmitted = w.abs().square().sum((-2, -1))
    return _scale(w, budget, "total").to(h.dtype), lambdas * budget.unsqueeze(-1)


def _wmmse_update(gram: Tensor, gains: Tensor, relative_noise: Tensor, transmitted: Tensor) -> tuple[Tensor, Tensor]:
    """One round: MMSE receivers u, weights m = 1/MSE, then the precoder ``W = H C``; C and lambda / power."""
    power = gains.real.square() + gains.imag.square()
    signal_gain = gains.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
    # From the off-diagonal: total minus signal would cancel at high SINR.
    interference = (power * (1 - identity)).sum(-1) + relative_noise * transmitted.unsqueeze(-1)
    total = interference + power.diagonal(dim1=-2, dim2=-1)
    receiver = signal_gain / total
    weight = total / interference
    uplink = weight * (receiver.real.square() + receiver.imag.square())
    # min over W of sum_k m_k e_k: (H D H^H + loading I) W = H diag(m u), D = diag(m |u|^2), loading from the noise.
    # Dividing by the loading leaves lambda / noise_power on the diagonal, and K x K by the push-through identity.
    shares = uplink / uplink.sum(-1, keepdim=True)
    system = identity + (shares / relative_noise).unsqueeze(-1) * gram
    right = torch.diag_embed(weight * receiver)
    return torch.linalg.solve(system, right), shares


def _loaded_directions(channel: Tensor, loading: Tensor) -> Tensor:
    """Columns ``(I + H diag(loading) H^H)^-1 h_k`` by way of ``H (I + diag(loading) H^H H)^-1``."""
    gram = channel.mH @ channel
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    system = identity + loading.unsqueeze(-1) * gram
    return channel @ torch.linalg.inv(system)


def _scale(w: Tensor, budget: Tensor, normalization: str) -> Tensor:
    if normalization == "per_user":
        norm = torch.linalg.vector_norm(w, dim=-2, keepdim=True)
        amplitude = (budget / w.shape[-1]).sqrt()[..., None, None]
    elif normalization == "total":
        norm = torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True)
        amplitude = budget.sqrt()[..., None, None]
    else:
        raise ValueError(f"normalization: expected 'per_user' or 'total', got {normalization!r}")
    return w * (amplitude / norm)


def _check_channel(h: Tensor) -> tuple[Tensor, Tensor]:
    """The channel in complex128 and its column norms ``[..., 1, user]``."""
    check_tensor("h", h, "[..., antenna, user]", min_dim=2, dtypes=COMPLEX_DTYPES)
    if 0 in h.shape[-2:]:
        raise ValueError(f"h: expected at least one antenna and one user, got shape {tuple(h.shape)}")
    check_finite("h", h)
    channel = as_double(h)
    norm = torch.linalg.vector_norm(channel, dim=-2, keepdim=True)
    check_none("h", norm.detach().squeeze(-2) == 0, "user(s) of zero channel")
    return channel, norm


def _check_user_powers(name: str, value: Tensor, h: Tensor) -> Tensor:
    check_tensor(name, value, "[..., user]", min_dim=1, dtypes=REAL_DTYPES)
    expected = h.shape[:-2] + h.shape[-1:]
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)} for h {tuple(h.shape)}, got {tuple(value.shape)}")
    check_same_device(name, value, "h", h)
    check_finite(name, value)
    check_none(name, value.detach() < 0, "negative value(s)")
    return as_double(value)


def _check_initial(initial: Tensor, h: Tensor) -> Tensor:
    check_tensor("initial", initial, "[..., antenna, user]", min_dim=2, dtypes=COMPLEX_DTYPES)
    check_same_shape("initial", initial, "h", h)
    check_finite("initial", initial)
    gains = (h.detach().conj() * initial.detach()).sum(-2)
    check_none("initial", (gains == 0).all(-1), "precoder(s) that reach no user")
    return initial
