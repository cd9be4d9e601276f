"""Uplink draws and added noise: the SNR they realise, determinism, and bad input."""

import math

import numpy as np
import pytest
import torch

from csimodels.channels.transmission import add_noise, draw_uplink
from csimodels.evaluation.detection import lmmse, qam_demodulate, qam_modulate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=seeded(seed))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("users", [1, 4, 8])
def test_uplink_realises_the_snr_at_an_antenna(users, dtype):
    h, snr_db = random_complex(3, 64, users, dtype=dtype), torch.tensor([-5.0, 0.0, 15.0])
    h = h / h.abs().square().mean(1, keepdim=True).sqrt()
    y, symbols, noise_power = draw_uplink(h, 500, 16, snr_db, seeded())
    assert (y.dtype, y.shape) == (dtype, (3, 500, 64))
    assert (symbols.dtype, symbols.shape) == (torch.int64, (3, 500, users))
    assert (noise_power.dtype, noise_power.shape) == (h.real.dtype, (3,))
    np.testing.assert_allclose(noise_power, users / 10 ** (snr_db.double() / 10), rtol=1e-6)
    received = np.einsum("bnk,blk->bln", h, qam_modulate(symbols, 16, dtype=dtype))
    noise = y.numpy() - received
    measured = (np.abs(noise) ** 2).mean((1, 2))
    np.testing.assert_allclose(measured, noise_power, rtol=0.03)
    signal = (np.abs(received) ** 2).mean((1, 2))
    np.testing.assert_allclose(10 * np.log10(signal / measured), snr_db, atol=0.3)
    # White and circular.
    unit = noise / np.sqrt(measured)[:, None, None]
    assert abs(unit.mean()) < 0.02 and abs((unit**2).mean()) < 0.02
    assert abs((unit[:, :, 1:] * unit[:, :, :-1].conj()).mean()) < 0.02


def test_uplink_symbols_are_uniform_and_detectable():
    h = random_complex(40, 16, 3)
    y, symbols, noise_power = draw_uplink(h, 50, 16, 30, seeded())
    counts = torch.bincount(symbols.flatten(), minlength=16) / symbols.numel()
    assert counts.min() > 0.05 and counts.max() < 0.075
    detected = qam_demodulate(lmmse(h.unsqueeze(1), y, noise_power[:, None]), 16)
    assert torch.equal(detected, symbols)


@pytest.mark.parametrize("shape", [(5, 1), (4, 16, 48), (3, 4, 5, 6)])
def test_noise_is_relative_to_each_sample(shape):
    x = random_complex(*shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    snr_db = torch.linspace(-10, 20, shape[0])
    draws = torch.stack([add_noise(x, snr_db, seeded(i)) - x for i in range(400)])
    assert draws.dtype == torch.complex64
    axes = (0, *range(2, draws.dim()))
    power = x.abs().square().flatten(1).mean(1)
    measured = 10 * torch.log10(power / draws.abs().square().mean(axes))
    np.testing.assert_allclose(measured, snr_db, atol=1.0 if math.prod(shape[1:]) == 1 else 0.2)


def test_one_snr_serves_all_samples():
    x = random_complex(3, 7)
    assert torch.equal(add_noise(x, 10, seeded()), add_noise(x, torch.full((3,), 10.0), seeded()))
    h = random_complex(3, 5, 2)
    for one, other in zip(
        draw_uplink(h, 2, 4, 10, seeded()), draw_uplink(h, 2, 4, torch.full((3,), 10.0), seeded()), strict=True
    ):
        assert torch.equal(one, other)


def test_a_generator_repeats_and_moves_on():
    x, h, generator = random_complex(2, 9), random_complex(2, 5, 3), seeded(1)
    before = x.clone()
    first, second = add_noise(x, 10, generator), add_noise(x, 10, generator)
    assert torch.equal(first, add_noise(x, 10, seeded(1))) and not torch.equal(first, second)
    assert torch.equal(x, before)
    one, other = draw_uplink(h, 4, 16, 10, seeded(1)), draw_uplink(h, 4, 16, 10, seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[1], draw_uplink(h, 4, 16, 10, seeded(2))[1])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    add_noise(random_complex(2, 3), 0, seeded())
    draw_uplink(random_complex(2, 5, 3), 1, 4, 0, seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_strided_and_empty_inputs():
    h = random_complex(2, 3, 5).mT
    assert not h.is_contiguous()
    for one, other in zip(
        draw_uplink(h, 2, 16, 5, seeded()), draw_uplink(h.contiguous(), 2, 16, 5, seeded()), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert draw_uplink(h[:0], 2, 16, 5, seeded())[0].shape == (0, 2, 5)
    assert add_noise(h[:0], 5, seeded()).shape == (0, 5, 3)


def test_errors():
    h, generator = random_complex(2, 5, 3), seeded()
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, antenna, user\], got \(5, 3\)"):
        draw_uplink(h[0], 2, 16, 5, generator)
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, antenna, user\] without an empty axis"):
        draw_uplink(h[..., :0], 2, 16, 5, generator)
    with pytest.raises(TypeError, match="h: expected dtype complex64, complex128, got float32"):
        draw_uplink(h.real, 2, 16, 5, generator)
    for slots in (0, 2.0, True):
        with pytest.raises(ValueError, match="slots: expected an int of at least 1, got"):
            draw_uplink(h, slots, 16, 5, generator)
    with pytest.raises(ValueError, match="order: expected one of 4, 16, 64, 256, got 8"):
        draw_uplink(h, 2, 8, 5, generator)
    with pytest.raises(TypeError, match="x: expected dtype complex64, complex128, got float32"):
        add_noise(h.real, 5, generator)
    with pytest.raises(ValueError, match=r"x: expected shape \[batch, \.\.\.\] without an empty axis, got \(2, 0\)"):
        add_noise(h[:, :0, 0], 5, generator)
    silent = h.clone()
    silent[1] = 0
    with pytest.raises(ValueError, match=r"x: 1 sample\(s\) of zero power, first at index 1"):
        add_noise(silent, 5, generator)
    silent[0, 1, 2] = torch.nan
    for call in (lambda x, snr: add_noise(x, snr, generator), lambda x, snr: draw_uplink(x, 2, 16, snr, generator)):
        with pytest.raises(ValueError, match=r"1 non-finite value\(s\), first at index \(0, 1, 2\)"):
            call(silent, 5)
        with pytest.raises(ValueError, match=r"snr_db: 1 non-finite value\(s\)"):
            call(h, math.inf)
        with pytest.raises(ValueError, match=r"snr_db: expected a scalar or .* broadcasts to \(2,\), got \(3,\)"):
            call(h, torch.zeros(3))
        with pytest.raises(TypeError, match="snr_db: expected a number or a real tensor, got str"):
            call(h, "10")
        with pytest.raises(TypeError, match="snr_db: expected a real dtype, got complex64"):
            call(h, torch.zeros(2, dtype=torch.complex64))
