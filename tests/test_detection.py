"""QAM against the formulas of 3GPP TS 38.211, detectors against closed forms and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.evaluation import detection
from csimodels.evaluation.detection import (
    bits_to_symbols,
    lmmse,
    ml,
    qam_constellation,
    qam_demodulate,
    qam_modulate,
    symbols_to_bits,
)
from csimodels.evaluation.metrics import ser

ORDERS = (4, 16, 64, 256)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_symbols(*shape: int, order: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(order, shape, generator=torch.Generator().manual_seed(seed))


# QAM ------------------------------------------------------------------------------------------------------------------


def point_of_38_211(index: int, order: int) -> complex:
    """The four formulas of sections 5.1.3 to 5.1.6, as printed there."""
    count = {4: 2, 16: 4, 64: 6, 256: 8}[order]
    s = [1 - 2 * ((index >> (count - 1 - i)) & 1) for i in range(count)]
    if order == 4:
        return complex(s[0], s[1]) / math.sqrt(2)
    if order == 16:
        return complex(s[0] * (2 - s[2]), s[1] * (2 - s[3])) / math.sqrt(10)
    if order == 64:
        return complex(s[0] * (4 - s[2] * (2 - s[4])), s[1] * (4 - s[3] * (2 - s[5]))) / math.sqrt(42)
    in_phase = s[0] * (8 - s[2] * (4 - s[4] * (2 - s[6])))
    return complex(in_phase, s[1] * (8 - s[3] * (4 - s[5] * (2 - s[7])))) / math.sqrt(170)


def test_constellation_by_hand():
    assert qam_constellation(4).tolist() == pytest.approx(
        [c / math.sqrt(2) for c in (1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j)]
    )
    # b = 1011: real -(2 - (-1)) = -3, imaginary +(2 - (-1)) = 3.
    assert qam_constellation(16)[0b1011].item() == pytest.approx((-3 + 3j) / math.sqrt(10))


@pytest.mark.parametrize("order", ORDERS)
def test_constellation(order):
    points = qam_constellation(order, dtype=torch.complex128)
    expected = [point_of_38_211(index, order) for index in range(order)]
    np.testing.assert_allclose(points.numpy(), expected, rtol=1e-14)
    assert points.abs().square().mean().item() == pytest.approx(1.0, abs=1e-14)
    assert qam_constellation(order).dtype == torch.complex64
    # Gray: nearest neighbours differ in exactly one bit.
    distance = (points[:, None] - points[None, :]).abs().fill_diagonal_(torch.inf)
    for i, j in (distance < distance.min() * 1.001).nonzero().tolist():
        assert (i ^ j).bit_count() == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_round_trips(order, dtype):
    symbols = random_symbols(3, 50, order=order)
    x = qam_modulate(symbols, order, dtype=dtype)
    assert x.dtype == dtype and x.shape == symbols.shape
    assert torch.equal(qam_demodulate(x, order), symbols)
    bits = symbols_to_bits(symbols, order)
    assert bits.shape == (3, 50, int(math.log2(order)))
    assert torch.equal(bits_to_symbols(bits, order), symbols)
    assert torch.equal(bits_to_symbols(bits.bool(), order), symbols)


def test_bits_are_most_significant_first():
    assert symbols_to_bits(torch.tensor(0b1101), 16).tolist() == [1, 1, 0, 1]
    assert bits_to_symbols(torch.tensor([[1, 0, 0, 0]]), 16).tolist() == [8]


@pytest.mark.parametrize("order", ORDERS)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 10))
@settings(deadline=None, max_examples=15)
def test_demodulation_is_the_nearest_point(order, seed, scale):
    x = random_complex(200, seed=seed) * scale
    distance = (x[:, None] - qam_constellation(order, dtype=torch.complex128)).abs()
    assert torch.equal(qam_demodulate(x, order), distance.argmin(1))


def test_qam_errors():
    for bad in (2, 8, 32, 1024, 16.0, True):
        with pytest.raises(ValueError, match="order: expected one of 4, 16, 64, 256, got"):
            qam_constellation(bad)
    with pytest.raises(TypeError, match=r"dtype: expected torch\.complex64 or torch\.complex128, got torch\.float32"):
        qam_constellation(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"symbols: 2 value\(s\) outside 0\.\.3, first at index \(0, 1\)"):
        qam_modulate(torch.tensor([[0, 4], [-1, 3]]), 4)
    with pytest.raises(TypeError, match=r"symbols: expected dtype .*, got float32"):
        qam_modulate(torch.zeros(2), 4)
    with pytest.raises(ValueError, match=r"bits: expected shape \[\.\.\., 4\] for 16-QAM, got \(2,\)"):
        bits_to_symbols(torch.tensor([0, 1]), 16)
    with pytest.raises(ValueError, match=r"bits: 1 value\(s\) other than 0 and 1, first at index 1"):
        bits_to_symbols(torch.tensor([0, 2]), 4)
    with pytest.raises(ValueError, match=r"x: 1 non-finite value\(s\), first at index 1"):
        qam_demodulate(torch.tensor([0j, complex(math.nan, 0)]), 4)
    with pytest.raises(TypeError, match="x: expected dtype complex64, complex128, got float32"):
        qam_demodulate(torch.zeros(2), 4)


# Linear MMSE ----------------------------------------------------------------------------------------------------------


def test_lmmse_by_hand():
    # One user, h = (1, j): h^H y = 3, |h|^2 = 2, so 3 / (2 + 0.5); unbiased 3 / 2.
    h, y = torch.tensor([[1], [1j]], dtype=torch.complex128), torch.tensor([1, 2j], dtype=torch.complex128)
    assert lmmse(h, y, 0.5).item() == pytest.approx(1.2)
    assert lmmse(h, y, 0.5, unbiased=True).item() == pytest.approx(1.5)


@pytest.mark.parametrize("users", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_lmmse_is_the_covariance_formula(users, dtype):
    # In the antenna domain: C_xy C_yy^-1 y with C_yy = H H^H + noise I.
    h, y = random_complex(2, 3, 4, users, dtype=dtype), random_complex(2, 3, 4, seed=1, dtype=dtype)
    noise = torch.tensor([0.1, 1.0, 10.0])
    x = h.numpy().astype(np.complex128)
    covariance = x @ x.conj().swapaxes(-2, -1) + noise.double().numpy()[:, None, None] * np.eye(4)
    filters = x.conj().swapaxes(-2, -1) @ np.linalg.inv(covariance)
    expected = (filters @ y.numpy()[..., None].astype(np.complex128))[..., 0]
    rtol = 1e-10 if dtype == torch.complex128 else 1e-6
    estimate = lmmse(h, y, noise)
    assert estimate.dtype == dtype
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=rtol, atol=rtol)
    gain = (filters @ x).diagonal(axis1=-2, axis2=-1)
    np.testing.assert_allclose(lmmse(h, y, noise, unbiased=True).numpy(), expected / gain, rtol=10 * rtol, atol=rtol)


def test_unbiased_estimates_have_unit_gain():
    h = random_complex(6, 4)
    for k in range(4):
        x = torch.zeros(4, dtype=torch.complex128)
        x[k] = 1
        assert lmmse(h, h @ x, 0.7, unbiased=True)[k].item() == pytest.approx(1.0, abs=1e-12)


def test_slots_share_a_channel_by_broadcasting():
    h, y = random_complex(3, 4, 2), random_complex(3, 8, 4, seed=1)
    together = lmmse(h.unsqueeze(-3), y, 0.2, unbiased=True)
    assert together.shape == (3, 8, 2)
    for i, slot in np.ndindex(3, 8):
        np.testing.assert_allclose(together[i, slot], lmmse(h[i], y[i, slot], 0.2, unbiased=True), rtol=1e-10)
    decided = ml(h.unsqueeze(-3), y, 16)
    for i, slot in np.ndindex(3, 8):
        assert torch.equal(decided[i, slot], ml(h[i], y[i, slot], 16))


@pytest.mark.parametrize("unbiased", [False, True])
def test_lmmse_gradients(unbiased):
    h, y = random_complex(2, 3, 2).requires_grad_(), random_complex(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, y: lmmse(h, y, 0.3, unbiased=unbiased), (h, y))


# Maximum likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "users", "antennas"), [(4, 3, 3), (4, 4, 2), (16, 2, 4), (256, 1, 1)])
def test_ml_is_the_exhaustive_minimum(order, users, antennas):
    h, y = random_complex(6, antennas, users), random_complex(6, antennas, seed=1)
    points = [point_of_38_211(index, order) for index in range(order)]
    for i, detected in enumerate(ml(h, y, order).tolist()):
        candidates = list(itertools.product(range(order), repeat=users))
        vectors = np.array([[points[index] for index in candidate] for candidate in candidates])
        distance = np.linalg.norm(y[i].numpy() - vectors @ h[i].numpy().T, axis=1)
        assert tuple(detected) == candidates[distance.argmin()]


@pytest.mark.parametrize(("order", "users"), [(4, 8), (16, 4), (256, 2)])
def test_ml_recovers_noise_free_symbols(order, users):
    symbols = random_symbols(3, users, order=order)
    h = random_complex(3, users, users, dtype=torch.complex64)
    y = (h @ qam_modulate(symbols, order).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(ml(h, y, order), symbols)


def test_ml_beats_lmmse_at_four_by_four():
    symbols = random_symbols(2000, 4, order=4)
    h = random_complex(2000, 4, 4)
    noise = 0.3
    y = (h @ qam_modulate(symbols, 4, dtype=torch.complex128).unsqueeze(-1)).squeeze(-1)
    y = y + math.sqrt(noise) * random_complex(2000, 4, seed=2)
    exact = ser(symbols, ml(h, y, 4))
    linear = ser(symbols, qam_demodulate(lmmse(h, y, noise, unbiased=True), 4))
    assert 0 < exact < 0.5 * linear < 0.5


def test_ml_blocks_do_not_show(monkeypatch):
    h, y = random_complex(7, 3, 2), random_complex(7, 3, seed=1)
    whole = ml(h, y, 16)
    monkeypatch.setattr(detection, "_ML_BLOCK_ELEMENTS", 2 * 256 * 2 + 1)
    assert torch.equal(ml(h, y, 16), whole)


def test_ml_takes_the_first_of_equal_candidates():
    # The second user cannot be heard: all of its symbols are equally far, and index 0 is first.
    h = torch.tensor([[1, 0]], dtype=torch.complex128)
    y = qam_constellation(16, dtype=torch.complex128)[[11]]
    assert ml(h, y, 16).tolist() == [11, 0]
    # On the imaginary axis real parts tie: of indices 0 and 2 of QPSK the lower one.
    assert ml(h[:, :1], torch.tensor([1j]), 4).tolist() == [0]


def test_ml_refuses_a_hopeless_search():
    h = random_complex(4, 5)
    with pytest.raises(ValueError, match=r"16-QAM with 5 users has 16\^5 candidates, more than the 65536"):
        ml(h, random_complex(4), 16)
    assert ml(h, random_complex(4), 4).shape == (5,)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detect", [lambda h, y: lmmse(h, y, 0.1), lambda h, y: ml(h, y, 4)])
def test_detector_errors(detect):
    h, y = random_complex(2, 3, 4, 2), random_complex(2, 3, 4, seed=1)
    assert detect(h[:0], y[:0]).shape == (0, 3, 2)
    with pytest.raises(ValueError, match=r"y: expected 4 antennas like h \(2, 3, 4, 2\), got shape \(2, 3, 5\)"):
        detect(h, random_complex(2, 3, 5))
    with pytest.raises(ValueError, match=r"y: expected leading axes that broadcast with \(2, 3\) of h, got \(2, 4\)"):
        detect(h, random_complex(2, 4, 4))
    with pytest.raises(TypeError, match="y: expected dtype complex64, complex128, got float64"):
        detect(h, y.real)
    with pytest.raises(ValueError, match="y: expected the device of h, cpu, got meta"):
        detect(h, y.to("meta"))
    with pytest.raises(ValueError, match="h: expected at least one antenna and one user"):
        detect(h[..., :0], y)
    h[1, 2, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"h: 1 non-finite value\(s\), first at index \(1, 2, 3, 0\)"):
        detect(h, y)


def test_lmmse_errors():
    h, y = random_complex(2, 4, 3), random_complex(2, 4, seed=1)
    with pytest.raises(ValueError, match=r"noise_power: 1 value\(s\) that are not positive"):
        lmmse(h, y, 0.0)
    h[1, :, 2] = 0
    with pytest.raises(ValueError, match=r"h: 1 user\(s\) of zero channel, .*, first at index \(1, 2\)"):
        lmmse(h, y, 0.1, unbiased=True)
    assert lmmse(h, y, 0.1)[1, 2] == 0
    h[1] = h[1, :, :1]
    with pytest.raises(ValueError, match=r"noise_power: 1 value\(s\) too small to regularise .*, first at index 1"):
        lmmse(h, y, 1e-30)
