"""Metrics against hand-computed cases, float64 oracles written out in NumPy, and their invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.evaluation.metrics import (
    codeword_cosine,
    delay_to_frequency,
    gcs,
    nmse,
    nmse_db,
    rho_csinet,
    ser,
    sgcs,
    sum_rate,
    user_rates,
)

seeds = st.integers(0, 2**31)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected, rtol: float = 1e-12) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=1e-15)


# NMSE -----------------------------------------------------------------------------------------------------------------

H = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
H_HAT = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # errors 1 and 1, powers 4 and 1: ratios 0.25 and 1


def test_nmse_by_hand():
    close(nmse(H, H_HAT), [0.25, 1.0])
    close(nmse_db(H, H_HAT), 10 * math.log10(0.625))
    close(nmse_db(H, H_HAT, "ratio_of_sums"), 10 * math.log10(2 / 5))
    close(nmse_db(H, H_HAT, "mean_of_batch_db", batch_size=1), 10 * (math.log10(0.25) + 0) / 2)
    close(nmse_db(H, H_HAT, "mean_of_batch_db", batch_size=2), 10 * math.log10(0.625))
    assert nmse_db(H, H).item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_nmse_of_complex_input(dtype):
    h, h_hat = random_complex(7, 4, 5, dtype=dtype), random_complex(7, 4, 5, seed=1, dtype=dtype)
    x, y = h.numpy().astype(np.complex128), h_hat.numpy().astype(np.complex128)
    error, power = (np.abs(x - y) ** 2).sum((1, 2)), (np.abs(x) ** 2).sum((1, 2))
    close(nmse(h, h_hat), error / power)
    close(nmse_db(h, h_hat), 10 * np.log10((error / power).mean()))
    close(nmse_db(h, h_hat, "ratio_of_sums"), 10 * np.log10(error.sum() / power.sum()))
    # Real and imaginary parts as channels are the same vector.
    close(nmse(torch.view_as_real(h), torch.view_as_real(h_hat)), error / power)


def test_batch_convention_weighs_a_short_last_batch_fully():
    h, h_hat = random_complex(7, 6), random_complex(7, 6, seed=1)
    ratios = (h - h_hat).abs().square().sum(1).numpy() / h.abs().square().sum(1).numpy()
    batches = [10 * math.log10(ratios[start : start + 3].mean()) for start in (0, 3, 6)]
    close(nmse_db(h, h_hat, "mean_of_batch_db", batch_size=3), sum(batches) / 3)


def test_nmse_keeps_the_last_digits_of_float32():
    h = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)) + 0.5
    h_hat = torch.nextafter(h, torch.full_like(h, 10.0))
    x, y = h.double().numpy(), h_hat.double().numpy()
    close(nmse_db(h, h_hat), 10 * np.log10((((x - y) ** 2).sum(1) / (x**2).sum(1)).mean()))
    assert nmse_db(h, h_hat).item() < -140


@given(seed=seeds, phase=st.floats(0.2, math.pi))
@settings(deadline=None, max_examples=25)
def test_nmse_sees_a_global_phase_and_not_a_common_gain(seed, phase):
    h, h_hat = random_complex(3, 4, 5, seed=seed), random_complex(3, 4, 5, seed=seed + 1)
    rotated = h * torch.exp(torch.tensor(1j * phase, dtype=torch.complex128))
    close(nmse(h, rotated), np.full(3, 4 * math.sin(phase / 2) ** 2), rtol=1e-9)
    close(nmse_db(-3j * h, -3j * h_hat), nmse_db(h, h_hat), rtol=1e-9)


@given(seed=seeds, batch_size=st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(deadline=None, max_examples=25)
def test_equal_batches_never_read_above_the_mean_of_ratios(seed, batch_size):
    h, h_hat = random_complex(12, 6, seed=seed), random_complex(12, 6, seed=seed + 1)
    by_batch = nmse_db(h, h_hat, "mean_of_batch_db", batch_size=batch_size)
    assert by_batch <= nmse_db(h, h_hat) + 1e-9


# Cosine similarities --------------------------------------------------------------------------------------------------

# Columns (1, 0) against (1, 1), and (1, j) against j (1, j).
G = torch.tensor([[1, 1], [0, 1j]])
G_HAT = torch.tensor([[1, 1j], [1, -1]], dtype=torch.complex64)


def test_similarities_by_hand():
    close(gcs(G, G_HAT), (1 / math.sqrt(2) + 1) / 2)
    # Trace 1 + 2j, squared norms 3 and 4.
    close(sgcs(G, G_HAT), 5 / 12)
    close(codeword_cosine(G.mT, G_HAT.mT, "none"), [1 / math.sqrt(2), 1])
    close(codeword_cosine(G.mT, G_HAT.mT), (1 / math.sqrt(2) + 1) / 2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_similarities_against_numpy(dtype):
    h, h_hat = random_complex(2, 3, 4, 5, dtype=dtype), random_complex(2, 3, 4, 5, seed=1, dtype=dtype)
    x, y = h.numpy().astype(np.complex128), h_hat.numpy().astype(np.complex128)
    dot = np.abs((y.conj() * x).sum(-2))
    cosine = dot / np.sqrt((np.abs(x) ** 2).sum(-2) * (np.abs(y) ** 2).sum(-2))
    close(gcs(h, h_hat, "none"), cosine.mean(-1))
    close(gcs(h, h_hat), cosine.mean())
    trace = np.trace(x.conj().swapaxes(-2, -1) @ y, axis1=-2, axis2=-1)
    expected = np.abs(trace) ** 2 / ((np.abs(x) ** 2).sum((-2, -1)) * (np.abs(y) ** 2).sum((-2, -1)))
    close(sgcs(h, h_hat, "none"), expected)
    close(sgcs(h, h_hat), expected.mean())
    close(codeword_cosine(h.mT, h_hat.mT, "none"), cosine)


@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_gcs_ignores_a_phase_and_gain_per_subcarrier(seed):
    h, h_hat = random_complex(3, 4, 5, seed=seed), random_complex(3, 4, 5, seed=seed + 1)
    factor = random_complex(3, 1, 5, seed=seed + 2)
    close(gcs(h, h_hat * factor, "none"), gcs(h, h_hat, "none"), rtol=1e-9)
    close(gcs(h * factor, h_hat, "none"), gcs(h, h_hat, "none"), rtol=1e-9)
    close(gcs(h, h * factor), 1.0, rtol=1e-12)


@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_sgcs_ignores_a_global_phase_and_gain_but_not_one_per_subcarrier(seed):
    h, h_hat = random_complex(3, 4, 5, seed=seed), random_complex(3, 4, 5, seed=seed + 1)
    factor = random_complex(3, 1, 1, seed=seed + 2)
    close(sgcs(h, h_hat * factor, "none"), sgcs(h, h_hat, "none"), rtol=1e-9)
    # Alternating signs cancel half of the trace or more: equal columns make it exact.
    column = h[..., :1].expand(3, 4, 4)
    close(sgcs(column, column * torch.tensor([1, -1, 1, -1])), 0.0)
    close(gcs(column, column * torch.tensor([1, -1, 1, -1])), 1.0)


@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_similarities_stay_in_range(seed):
    h, h_hat = random_complex(5, 3, 2, seed=seed), random_complex(5, 3, 2, seed=seed + 1)
    for metric in (gcs, sgcs, codeword_cosine):
        values = torch.cat([metric(h, h_hat, "none").flatten(), metric(h, h, "none").flatten()])
        assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("metric", [gcs, sgcs, codeword_cosine])
def test_a_zero_estimate_scores_zero_with_zero_gradient(metric):
    h = random_complex(2, 3, 4)
    h_hat = random_complex(2, 3, 4, seed=1)
    h_hat[0] = 0
    h_hat.requires_grad_()
    metric(h, h_hat).backward()
    assert (metric(h, h_hat, "none")[0] == 0).all()
    assert torch.isfinite(torch.view_as_real(h_hat.grad)).all()
    assert (h_hat.grad[0] == 0).all() and (h_hat.grad[1] != 0).any()


def test_non_contiguous_input():
    h, h_hat = random_complex(4, 5, 6), random_complex(4, 5, 6, seed=1)
    close(gcs(h.mT, h_hat.mT), gcs(h.mT.contiguous(), h_hat.mT.contiguous()))
    close(nmse(h[::2, :, ::3], h_hat[::2, :, ::3]), nmse(h[::2, :, ::3].clone(), h_hat[::2, :, ::3].clone()))


@pytest.mark.parametrize("metric", [nmse, nmse_db, gcs, sgcs, codeword_cosine])
def test_lazily_conjugated_input(metric):
    h, h_hat = random_complex(4, 5, 6), random_complex(4, 5, 6, seed=1)
    close(metric(h.mH, h_hat.mH), metric(h.mT, h_hat.mT), rtol=1e-12)


@pytest.mark.parametrize(
    "metric",
    [
        nmse,
        nmse_db,
        gcs,
        sgcs,
        codeword_cosine,
        lambda h, w: user_rates(h, w, 0.3),
        lambda h, h_hat: nmse_db(h, h_hat, "ratio_of_sums"),
        lambda h, h_hat: nmse_db(h, h_hat, "mean_of_batch_db", 2),
        lambda h, h_hat: rho_csinet(h, h_hat, num_delays=9),
    ],
)
def test_gradients(metric):
    h, h_hat = random_complex(3, 4, 5).requires_grad_(), random_complex(3, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(metric, (h, h_hat))


# CsiNet's rho ---------------------------------------------------------------------------------------------------------


def dft(taps: np.ndarray, length: int, bins: int) -> np.ndarray:
    delays = np.arange(taps.shape[-1])
    return taps @ np.exp(-2j * np.pi * np.outer(delays, np.arange(bins)) / length)


def test_delay_to_frequency_is_the_padded_dft():
    taps = random_complex(2, 3, 32, dtype=torch.complex64)
    actual = delay_to_frequency(taps)
    assert actual.dtype == torch.complex128 and actual.shape == (2, 3, 125)
    np.testing.assert_allclose(actual.numpy(), dft(taps.numpy().astype(np.complex128), 257, 125), atol=1e-12)


def test_rho_csinet_compares_with_the_untruncated_response():
    taps = random_complex(5, 4, 40)
    truth = torch.from_numpy(dft(taps.numpy(), 257, 125))
    estimate = dft(taps.numpy()[..., :32], 257, 125)
    dot = np.abs((truth.numpy().conj() * estimate).sum(1))
    cosine = dot / (np.linalg.norm(truth.numpy(), axis=1) * np.linalg.norm(estimate, axis=1))
    close(rho_csinet(truth, taps[..., :32], "none"), cosine.mean(1), rtol=1e-10)
    close(rho_csinet(truth, taps[..., :32]), cosine.mean(), rtol=1e-10)
    assert rho_csinet(truth, taps[..., :32]) < 0.99
    close(rho_csinet(truth, taps), 1.0, rtol=1e-12)


def test_rho_csinet_by_hand():
    # One tap at delay 1: every bin is the antenna vector (1, j) times a phase; against (1, 0) the cosine is 1/sqrt 2.
    taps = torch.zeros(2, 32, dtype=torch.complex64)
    taps[:, 1] = torch.tensor([1, 1j])
    truth = torch.zeros(2, 125, dtype=torch.complex64)
    truth[0] = 1
    close(rho_csinet(truth, taps), 1 / math.sqrt(2))


def test_rho_csinet_errors():
    taps, truth = random_complex(2, 4, 32), random_complex(2, 4, 125)
    with pytest.raises(ValueError, match=r"h_hat_delay: expected leading axes and antennas \(2, 4\), got \(2, 3\)"):
        rho_csinet(truth, taps[:, :3])
    with pytest.raises(ValueError, match="h_delay: expected at most num_delays=16 taps, got 32"):
        delay_to_frequency(taps, num_delays=16, num_subcarriers=4)
    with pytest.raises(ValueError, match=r"num_subcarriers: expected 1\.\.257, got 0"):
        delay_to_frequency(taps, num_subcarriers=0)
    with pytest.raises(TypeError, match="h_hat_delay: expected dtype complex64, complex128, got float64"):
        rho_csinet(truth, taps.real)
    taps[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"h_hat_delay: 1 non-finite value\(s\), first at index \(1, 2, 3\)"):
        rho_csinet(truth, taps)


# Rates and symbol errors ----------------------------------------------------------------------------------------------


def test_rates_by_hand():
    h = torch.eye(2, dtype=torch.complex64)
    w = torch.tensor([[1, 1], [0, 2]], dtype=torch.complex64)
    # User 0: signal 1, interference 1, noise 0.5. User 1: signal 4, none, 0.5.
    close(user_rates(h, w, 0.5), [math.log2(1 + 1 / 1.5), math.log2(1 + 4 / 0.5)])
    close(sum_rate(h, w, 0.5), math.log2(1 + 1 / 1.5) + math.log2(9))
    # The channel is conjugated: (1, j)^H (1, j) = 2, where a transpose would give 0.
    v = torch.tensor([[1], [1j]])
    close(sum_rate(v, v, 1.0), math.log2(5))


def test_rates_against_loops():
    h, w = random_complex(2, 3, 6, 4), random_complex(2, 3, 6, 4, seed=1)
    noise = torch.tensor([0.1, 1.0, 10.0])
    x, v = h.numpy(), w.numpy()
    expected = np.zeros((2, 3, 4))
    for i, j, k in np.ndindex(2, 3, 4):
        received = np.abs(x[i, j, :, k].conj() @ v[i, j]) ** 2
        expected[i, j, k] = np.log2(1 + received[k] / (received.sum() - received[k] + float(noise[j])))
    close(user_rates(h, w, noise), expected, rtol=1e-10)
    close(sum_rate(h, w, noise), expected.sum(-1), rtol=1e-10)


def test_rate_at_extreme_snr():
    # 1 + SINR rounds to 1, and total minus signal to 0: neither may be formed.
    h = torch.eye(2, dtype=torch.complex128)
    np.testing.assert_allclose(user_rates(h, h * 1e-9, 1.0), [1e-18 / math.log(2)] * 2, rtol=1e-12)
    w = torch.tensor([[1e9, 1e-3], [1e-3, 1e9]], dtype=torch.complex128)
    close(user_rates(h, w, 1e-6), [math.log2(1e18 / 2e-6)] * 2)


def test_a_user_without_channel_has_rate_zero():
    h = random_complex(4, 2)
    h[:, 1] = 0
    assert user_rates(h, random_complex(4, 2, seed=1), 1.0)[1] == 0


def test_ser():
    sent = torch.tensor([[0, 1], [2, 3]])
    close(ser(sent, torch.tensor([[0, 1], [2, 0]])), 0.25)
    close(ser(sent, sent), 0.0)
    with pytest.raises(TypeError, match=r"detected: expected dtype .*int64.*, got float32"):
        ser(sent, sent.float())
    with pytest.raises(ValueError, match=r"detected: expected the shape of transmitted, \(2, 2\), got \(4,\)"):
        ser(sent, sent.flatten())
    with pytest.raises(ValueError, match="transmitted: expected at least one symbol, got none"):
        ser(sent[:0], sent[:0])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "index"),
    [
        (nmse, 2),
        (nmse_db, 2),
        (sgcs, 2),
        (gcs, r"\(2, 0\)"),
        (codeword_cosine, r"\(2, 0\)"),
        (lambda h, h_hat: nmse_db(h, h_hat, "mean_of_batch_db", 2), 2),
    ],
)
def test_zero_power_names_the_sample(metric, index):
    h = random_complex(4, 3, 5)
    h[2] = 0
    with pytest.raises(ValueError, match=rf"h: \d+ \w+\(s\) of zero power, first at index {index}"):
        metric(h, random_complex(4, 3, 5, seed=1))


def test_ratio_of_sums_takes_silent_samples_but_not_a_silent_set():
    close(nmse_db(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [2.0]]), "ratio_of_sums"), 10 * math.log10(1 / 4))
    with pytest.raises(ValueError, match="h: expected at least one sample of positive power, got zero total power"):
        nmse_db(torch.zeros(2, 3), torch.ones(2, 3), "ratio_of_sums")


@pytest.mark.parametrize("metric", [nmse, nmse_db, gcs, sgcs, codeword_cosine, lambda h, w: sum_rate(h, w, 1.0)])
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_input_names_the_index(metric, argument, value):
    pair = [random_complex(4, 3, 5), random_complex(4, 3, 5, seed=1)]
    pair[argument][1, 2, 3] = value
    pair[argument][3, 0, 0] = value
    name = "h" if argument == 0 else r"(h_hat|g|w)"
    with pytest.raises(ValueError, match=rf"^{name}: 2 non-finite value\(s\), first at index \(1, 2, 3\)"):
        metric(*pair)


@pytest.mark.parametrize("metric", [nmse, nmse_db, gcs, sgcs, codeword_cosine, lambda h, w: sum_rate(h, w, 1.0)])
def test_mismatches(metric):
    h = random_complex(4, 3, 5)
    with pytest.raises(ValueError, match=r"expected the shape of h, \(4, 3, 5\), got \(4, 3, 1\)"):
        metric(h, h[..., :1])
    with pytest.raises(ValueError, match=r"expected the device of h, cpu, got meta"):
        metric(h, h.to("meta"))
    with pytest.raises(TypeError, match=r"expected (a complex tensor like h|dtype complex64, complex128)"):
        metric(h, h.real)
    with pytest.raises(TypeError, match=r"h: expected a torch\.Tensor .*, got ndarray"):
        metric(h.numpy(), h)
    with pytest.raises(TypeError, match="got int64"):
        metric(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64))


def test_an_empty_mean_is_refused_and_empty_values_are_not():
    h = random_complex(0, 3, 5)
    for metric in (nmse_db, gcs, sgcs, codeword_cosine):
        with pytest.raises(ValueError, match="h: expected at least one sample to average over, got none"):
            metric(h, h)
    assert gcs(h, h, "none").shape == sgcs(h, h, "none").shape == nmse(h, h).shape == (0,)
    assert sum_rate(h, h, 1.0).shape == (0,)
    with pytest.raises(ValueError, match=r"h: expected shape \[\.\.\., antenna, subcarrier\] without an empty axis"):
        gcs(random_complex(2, 0, 5), random_complex(2, 0, 5))


def test_conventions_are_checked():
    with pytest.raises(ValueError, match=r"reduction: expected 'mean_of_ratios'.*, got 'mean'"):
        nmse_db(H, H_HAT, "mean")
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'none', got 'sum'"):
        gcs(G, G_HAT, "sum")
    for bad in (None, 0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size: expected a positive int"):
            nmse_db(H, H_HAT, "mean_of_batch_db", batch_size=bad)
    with pytest.raises(ValueError, match="batch_size: expected only with reduction='mean_of_batch_db'"):
        nmse_db(H, H_HAT, batch_size=2)
    with pytest.raises(ValueError, match=r"h: expected shape \[N, \.\.\.\], got \(2,\)"):
        nmse(H[0], H[0])


def test_noise_power_is_checked():
    h = random_complex(2, 3, 4, 2)
    for bad in (0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match=r"noise_power: 1 value\(s\) that are not positive and finite"):
            sum_rate(h, h, bad)
    with pytest.raises(ValueError, match=r"noise_power: expected a scalar or a shape .*\(2, 3\), got \(2,\)"):
        sum_rate(h, h, torch.ones(2))
    with pytest.raises(ValueError, match=r"noise_power: expected a scalar or a shape .*\(2, 3\), got \(5, 2, 3\)"):
        sum_rate(h, h, torch.ones(5, 2, 3))
    for bad in ("1", True, None):
        with pytest.raises(TypeError, match="noise_power: expected a number or a real tensor"):
            sum_rate(h, h, bad)
    with pytest.raises(TypeError, match="noise_power: expected a real dtype, got complex128"):
        sum_rate(h, h, torch.ones(3, dtype=torch.complex128))
