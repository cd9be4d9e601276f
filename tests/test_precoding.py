"""Precoders against hand-computed cases, the papers' N x N formulas in NumPy, and the properties that define them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.evaluation.metrics import sum_rate, user_rates
from csimodels.evaluation.precoding import mmse, scale_to_power, structured_precoder, wmmse, wmmse_parameters, zf

PRECODERS = {
    "zf": lambda h, power=2.0: zf(h, power),
    "mmse": lambda h, power=2.0: mmse(h, power, 0.1),
    "wmmse": lambda h, power=2.0: wmmse(h, power, 0.1, iterations=5),
}
every_precoder = pytest.mark.parametrize("precoder", PRECODERS.values(), ids=PRECODERS)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6))  # users, antennas
snrs_db = st.floats(-20, 40)


def random_channel(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=rtol, atol=atol)


def total_power(w: torch.Tensor) -> torch.Tensor:
    return w.abs().square().sum((-2, -1))


# What all share -------------------------------------------------------------------------------------------------------


@every_precoder
@given(seed=st.integers(0, 2**31), power=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=15)
def test_power_constraint(precoder, seed, power):
    for dtype, rtol in ((torch.complex64, 1e-5), (torch.complex128, 1e-12)):
        w = precoder(random_channel(3, 6, 4, seed=seed, dtype=dtype), power)
        assert w.dtype == dtype
        close(total_power(w), [power] * 3, rtol=rtol)


@every_precoder
def test_leading_axes_are_independent_and_may_be_empty(precoder):
    h, power = random_channel(2, 3, 6, 4), torch.tensor([0.5, 1.0, 4.0])
    batched = precoder(h, power)
    for i, j in np.ndindex(2, 3):
        close(batched[i, j], precoder(h[i, j].contiguous(), float(power[j])).numpy())
    assert precoder(h[:0]).shape == (0, 3, 6, 4)
    strided = random_channel(2, 3, 4, 6).mT
    close(precoder(strided), precoder(strided.contiguous()).numpy())


@every_precoder
def test_single_precision_input_is_worked_in_double(precoder):
    h = random_channel(5, 8, 4, dtype=torch.complex64)
    close(precoder(h), precoder(h.to(torch.complex128)).numpy(), rtol=1e-6, atol=1e-7)


@every_precoder
def test_one_user_gets_maximum_ratio_transmission(precoder):
    h = random_channel(4, 1)
    close(precoder(h), (math.sqrt(2) * h / torch.linalg.vector_norm(h)).numpy())
    close(sum_rate(h, precoder(h), 0.1), math.log2(1 + 2 / 0.1 * float(h.abs().square().sum())))


@every_precoder
def test_gradients(precoder):
    h = random_channel(2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: precoder(h), (h,))


@every_precoder
def test_bad_channels(precoder):
    h = random_channel(2, 3, 4, 3)
    h[1, 2, :, 0] = 0
    with pytest.raises(ValueError, match=r"h: 1 user\(s\) of zero channel, first at index \(1, 2, 0\)"):
        precoder(h)
    h[1, 0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"h: 1 non-finite value\(s\), first at index \(1, 0, 2, 1\)"):
        precoder(h)
    with pytest.raises(TypeError, match="h: expected dtype complex64, complex128, got float64"):
        precoder(h.real)
    with pytest.raises(TypeError, match=r"h: expected a torch\.Tensor"):
        precoder(h.numpy())
    with pytest.raises(ValueError, match=r"h: expected shape \[\.\.\., antenna, user\], got \(4,\)"):
        precoder(random_channel(4))
    with pytest.raises(ValueError, match="h: expected at least one antenna and one user"):
        precoder(random_channel(2, 4, 0))
    with pytest.raises(ValueError, match=r"power: 1 value\(s\) that are not positive"):
        precoder(random_channel(4, 2), -1.0)
    with pytest.raises(ValueError, match=r"power: expected a scalar or a shape that broadcasts to \(5,\), got \(3,\)"):
        precoder(random_channel(5, 4, 2), torch.ones(3))


@every_precoder
@pytest.mark.parametrize("users", range(4, 9))
def test_batches_of_a_128_antenna_array(precoder, users):
    h, power = random_channel(5, 128, users, dtype=torch.complex64), torch.linspace(0.1, 10, 5)
    w = precoder(h, power)
    assert w.shape == h.shape
    close(total_power(w), power.numpy(), rtol=1e-5)
    # So many antennas leave little interference: most of what every user would have alone.
    alone = torch.log2(1 + power[:, None] / users * h.abs().square().sum(1) / 0.1).sum(1)
    rates = sum_rate(h, w, 0.1)
    assert ((rates > 0.9 * alone) & (rates < 1.1 * alone)).all()


# Zero forcing ---------------------------------------------------------------------------------------------------------


def test_zf_by_hand():
    h = torch.diag(torch.tensor([1.0, 2.0])).to(torch.complex128)
    # Pseudo-inverse diag(1, 1/2), squared norm 5/4.
    close(zf(h, 3.0), np.diag([math.sqrt(1.5)] * 2))
    close(zf(h, 3.0, normalization="total"), np.diag([1, 0.5]) * math.sqrt(3 / 1.25))


@pytest.mark.parametrize("normalization", ["per_user", "total"])
def test_zf_is_the_scaled_pseudo_inverse_and_nulls_interference(normalization):
    h = random_channel(6, 8, 4)
    w = zf(h, 2.0, normalization=normalization)
    inverse = np.linalg.pinv(h.numpy().conj().swapaxes(-2, -1))
    axes = -2 if normalization == "per_user" else (-2, -1)
    share = 2 / 4 if normalization == "per_user" else 2
    close(w, inverse * np.sqrt(share / (np.abs(inverse) ** 2).sum(axes, keepdims=True)))
    received = (h.mH @ w).numpy()
    signal = received.diagonal(axis1=-2, axis2=-1)
    np.testing.assert_allclose(received - signal[..., None] * np.eye(4), 0, atol=1e-12)
    if normalization == "total":
        np.testing.assert_allclose(signal, signal[:, :1].repeat(4, 1), rtol=1e-12)


def test_zf_separates_users_of_very_different_path_loss():
    # A rank decision on the raw channel would drop the user who is 100 dB weaker.
    h = random_channel(4, 3)
    gains = torch.tensor([1.0, 1e-5, 1e-8], dtype=torch.float64)
    received = (h.mH @ zf(h * gains)).abs()
    assert (received - received.diagonal().diag()).max() < 1e-12
    assert received.diagonal().min() > 1e-3


def test_zf_gives_users_with_one_codeword_one_beam():
    h = random_channel(6, 3)
    h[:, 2] = h[:, 0] * (0.6 + 0.8j)
    w = zf(h)
    close(w[:, 2], (w[:, 0] * (0.6 + 0.8j)).numpy())
    # The third user is still served without interference from the other two.
    close((h[:, 1].conj() @ w[:, [0, 2]]).abs(), [0, 0])
    assert torch.isfinite(user_rates(h, w, 0.1)).all()


def test_zf_needs_an_antenna_per_user():
    with pytest.raises(ValueError, match=r"h: zero forcing serves at most one user per antenna, got shape \(2, 3\)"):
        zf(random_channel(2, 3))
    with pytest.raises(ValueError, match="normalization: expected 'per_user' or 'total', got 'sum'"):
        zf(random_channel(3, 2), normalization="sum")


# Regularised zero forcing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["per_user", "total"])
@pytest.mark.parametrize("users", [2, 4, 6])
def test_mmse_is_the_antenna_domain_formula(normalization, users):
    h, power, noise = random_channel(5, 4, users), torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64), 0.3
    x = h.numpy()
    loading = (users * noise / power.numpy())[:, None, None]
    w = np.linalg.solve(x @ x.conj().swapaxes(-2, -1) + loading * np.eye(4), x)
    axes, share = (-2, power / users) if normalization == "per_user" else ((-2, -1), power)
    w *= np.sqrt(share.numpy()[:, None, None] / (np.abs(w) ** 2).sum(axes, keepdims=True))
    close(mmse(h, power, noise, normalization=normalization), w)


@pytest.mark.parametrize("normalization", ["per_user", "total"])
def test_mmse_limits(normalization):
    h = random_channel(5, 3)
    close(mmse(h, 1.0, 1e-12, normalization=normalization), zf(h, normalization=normalization).numpy(), rtol=1e-6)
    norm = torch.linalg.vector_norm(h, dim=0) * math.sqrt(3) if normalization == "per_user" else torch.linalg.norm(h)
    close(mmse(h, 1.0, 1e9, normalization=normalization), (h / norm).numpy(), rtol=1e-6)


# The structure of optimal precoders -----------------------------------------------------------------------------------


def test_structured_precoder_by_hand():
    # I + h1 h1' + h2 h2' = [[3, 1], [1, 2]] has the inverse [[2, -1], [-1, 3]] / 5: v1 ~ (2, -1), v2 ~ (1, 2).
    h = torch.tensor([[1, 1], [0, 1]], dtype=torch.complex128)
    w = structured_precoder(h, torch.tensor([2.0, 2.0]), torch.tensor([4.0, 9.0]), 2.0)
    close(w, np.array([[2 * 2, 3 * 1], [2 * -1, 3 * 2]]) / math.sqrt(5))


@pytest.mark.parametrize("users", [1, 3, 6])
def test_structured_precoder_is_equation_4(users):
    h = random_channel(2, 4, users)
    generator = torch.Generator().manual_seed(1)
    lambdas, p = torch.rand(2, 2, users, dtype=torch.float64, generator=generator)
    noise = torch.tensor([0.1, 2.0])
    x, w = h.numpy(), np.empty(h.shape, dtype=np.complex128)
    for i, k in np.ndindex(2, users):
        ratios = (lambdas[i] / noise.double()[i]).tolist()
        covariance = sum(ratio * np.outer(x[i, :, j], x[i, :, j].conj()) for j, ratio in enumerate(ratios))
        v = np.linalg.solve(np.eye(4) + covariance, x[i, :, k])
        w[i, :, k] = math.sqrt(p[i, k]) * v / np.linalg.norm(v)
    close(structured_precoder(h, lambdas, p, noise), w)


def test_equal_parameters_give_regularised_zero_forcing():
    h, share = random_channel(3, 6, 4), torch.full((3, 4), 0.5)
    close(structured_precoder(h, share, share, 0.3), mmse(h, 2.0, 0.3).numpy())


def test_structured_precoder_gradients():
    h = random_channel(2, 3, 2).requires_grad_()
    lambdas, p = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.autograd.gradcheck(
        lambda *arguments: structured_precoder(*arguments, 0.3),
        (h, lambdas.requires_grad_(), p.requires_grad_()),
    )


def test_a_user_without_power_is_off_and_leaves_gradients_finite():
    h, p = random_channel(4, 2), torch.tensor([1.0, 0.0], requires_grad=True)
    w = structured_precoder(h, torch.tensor([1.0, 0.0]), p, 0.3)
    assert (w[:, 1] == 0).all() and total_power(w).item() == pytest.approx(1.0)
    sum_rate(h, w, 0.3).backward()
    assert p.grad[0] != 0 and p.grad[1] == 0


def test_structured_precoder_errors():
    h, ones = random_channel(2, 4, 3), torch.ones(2, 3)
    negative = ones.clone()
    negative[1, 2] = -0.5
    with pytest.raises(ValueError, match=r"lambdas: 1 negative value\(s\), first at index \(1, 2\)"):
        structured_precoder(h, negative, ones, 1.0)
    with pytest.raises(ValueError, match=r"p: 1 negative value\(s\), first at index \(1, 2\)"):
        structured_precoder(h, ones, negative, 1.0)
    with pytest.raises(ValueError, match=r"p: expected shape \(2, 3\) for h \(2, 4, 3\), got \(3,\)"):
        structured_precoder(h, ones, ones[0], 1.0)
    with pytest.raises(TypeError, match=r"lambdas: expected dtype .* got complex64"):
        structured_precoder(h, ones.to(torch.complex64), ones, 1.0)
    with pytest.raises(ValueError, match="noise_power: 1 value"):
        structured_precoder(h, ones, ones, 0.0)


def test_scale_to_power():
    x = torch.tensor([[1.0, 3.0], [0.0, 2.0]], requires_grad=True)
    scaled = scale_to_power(x, torch.tensor([2.0, 5.0]))
    assert scaled.dtype == torch.float32
    close(scaled, [[0.5, 1.5], [0, 5]])
    assert torch.autograd.gradcheck(lambda x: scale_to_power(x, 2.0), (x.detach().double().add(0.1).requires_grad_(),))
    with pytest.raises(ValueError, match=r"x: 1 negative value\(s\), first at index \(0, 1\)"):
        scale_to_power(torch.tensor([[1.0, -3.0]]), 1.0)
    with pytest.raises(ValueError, match=r"x: 1 row\(s\) that sum to zero, first at index 1"):
        scale_to_power(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), 1.0)


# WMMSE ----------------------------------------------------------------------------------------------------------------


@given(size=sizes, snr_db=snrs_db, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_wmmse_never_lowers_the_sum_rate(size, snr_db, seed):
    users, antennas = size
    h, noise = random_channel(antennas, users, seed=seed), 10 ** (-snr_db / 10)
    rates = [float(sum_rate(h, wmmse(h, 1.0, noise, iterations=n), noise)) for n in range(8)]
    assert all(after >= before - 1e-9 * max(1.0, before) for before, after in itertools.pairwise(rates))


@given(size=sizes, snr_db=snrs_db, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_wmmse_is_no_worse_than_its_start(size, snr_db, seed):
    users, antennas = size
    h, noise = random_channel(antennas, users, seed=seed), 10 ** (-snr_db / 10)
    start = random_channel(antennas, users, seed=seed + 1)
    scaled = start / torch.linalg.norm(start)
    assert sum_rate(h, wmmse(h, 1.0, noise, initial=start), noise) >= sum_rate(h, scaled, noise) - 1e-9
    assert sum_rate(h, wmmse(h, 1.0, noise), noise) >= sum_rate(h, mmse(h, 1.0, noise), noise) - 1e-9


def textbook_wmmse(h: np.ndarray, power: float, noise: float, w: np.ndarray, iterations: int) -> np.ndarray:
    """Receiver, weight and precoder updates in the antenna domain, the noise scaled by the power in use."""
    antennas, users = h.shape
    for _ in range(iterations):
        scaled_noise = noise / power * np.sum(np.abs(w) ** 2)
        system = np.zeros((antennas, antennas), dtype=np.complex128)
        right = np.zeros_like(h)
        for k in range(users):
            gains = h[:, k].conj() @ w
            u = gains[k] / (np.sum(np.abs(gains) ** 2) + scaled_noise)
            m = 1 / (1 - np.abs(gains[k]) ** 2 / (np.sum(np.abs(gains) ** 2) + scaled_noise))
            system += m * abs(u) ** 2 * (np.outer(h[:, k], h[:, k].conj()) + noise / power * np.eye(antennas))
            right[:, k] = m * u * h[:, k]
        w = np.linalg.solve(system, right)
    return w * math.sqrt(power) / np.linalg.norm(w)


@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize("users", [2, 4, 6])
def test_wmmse_follows_the_antenna_domain_iteration(iterations, users):
    h, start = random_channel(4, users), random_channel(4, users, seed=1)
    expected = textbook_wmmse(h.numpy(), 2.0, 0.1, start.numpy(), iterations)
    close(wmmse(h, 2.0, 0.1, iterations=iterations, initial=start), expected, rtol=1e-7, atol=1e-9)


def test_wmmse_converges_to_a_stationary_point_of_the_sum_rate():
    h = random_channel(4, 3)
    w = wmmse(h, 2.0, 0.1, iterations=3000).requires_grad_()
    sum_rate(h, w, 0.1).backward()
    # On the sphere |W|^2 = power the gradient must point along W.
    along = (w.detach().conj() * w.grad).sum().real / 2.0
    assert along > 0.1
    close(w.grad, (along * w).detach().numpy(), rtol=0, atol=1e-6)


def test_wmmse_on_orthogonal_users_is_water_filling():
    gains = np.array([2.0, 1.0, 0.1])  # |h_k|^2; water level 1 leaves the last user dry
    h = torch.diag(torch.from_numpy(np.sqrt(gains))).to(torch.complex128)
    noise, power = 0.5, 1.25
    w = wmmse(h, power, noise, iterations=2000)
    # Level mu with (mu - 0.25) + (mu - 0.5) = 1.25 is 1, below noise / gain = 5 of the third.
    close(w.abs().square().sum(0), [0.75, 0.5, 0.0], rtol=1e-6, atol=1e-6)
    close(sum_rate(h, w, noise), math.log2(1 + 0.75 / 0.25) + math.log2(1 + 0.5 / 0.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_wmmse_parameters_reproduce_it(dtype):
    h, power = random_channel(3, 8, 4, dtype=dtype), torch.tensor([0.1, 1.0, 10.0])
    lambdas, p = wmmse_parameters(h, power, 0.1)
    assert lambdas.dtype == p.dtype == h.real.dtype
    close(lambdas.sum(-1), power.numpy(), rtol=1e-6)
    close(p.sum(-1), power.numpy(), rtol=1e-6)
    assert lambdas.min() >= 0
    tolerance = 1e-6 if dtype == torch.complex64 else 1e-9
    close(structured_precoder(h, lambdas, p, 0.1), wmmse(h, power, 0.1).numpy(), rtol=10 * tolerance, atol=tolerance)


def test_wmmse_keeps_a_user_off_who_starts_without_power():
    h, start = random_channel(4, 3), random_channel(4, 3, seed=1)
    start[:, 1] = 0
    w = wmmse(h, 1.0, 0.1, initial=start)
    assert (w[:, 1] == 0).all()
    close(total_power(w), 1.0)


def test_wmmse_survives_identical_users_at_high_snr():
    h = random_channel(4, 1).repeat(1, 3)
    w = wmmse(h, 1.0, 1e-10, iterations=50)
    assert torch.isfinite(torch.view_as_real(w)).all()
    close(total_power(w), 1.0)


def test_wmmse_errors():
    h = random_channel(2, 4, 3)
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="iterations: expected a non-negative int"):
            wmmse(h, 1.0, 0.1, iterations=bad)
    with pytest.raises(ValueError, match="iterations: expected an int of at least 1, got 0"):
        wmmse_parameters(h, 1.0, 0.1, iterations=0)
    with pytest.raises(ValueError, match=r"initial: expected the shape of h, \(2, 4, 3\), got \(4, 3\)"):
        wmmse(h, 1.0, 0.1, initial=h[0])
    start = h.clone()
    start[1] = 0
    with pytest.raises(ValueError, match=r"initial: 1 precoder\(s\) that reach no user, first at index 1"):
        wmmse(h, 1.0, 0.1, initial=start)
