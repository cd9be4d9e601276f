"""The angle-delay domain: its transform both ways, rays that are put there directly, and the data sets made of them."""

import dataclasses
import importlib.util
import math

import pytest
import torch

from csimodels.channels.angle_delay import angle_delay, noisy, to_frequency
from csimodels.channels.angle_delay_sets import (
    ANGLE_DELAY_SETS,
    INDOOR_LOS,
    OUTDOOR_NLOS,
    UMA_28GHZ,
    angle_delay_preset,
)
from csimodels.channels.rays import AntennaArray, DelayTaps, Rays, SubcarrierGrid, synthesize

builtin = pytest.mark.parametrize("preset", [INDOOR_LOS, OUTDOOR_NLOS], ids=lambda preset: preset.name)


def random_channels(samples=3, antennas=4, subcarriers=12, dtype=torch.complex128):
    return torch.randn(samples, antennas, subcarriers, dtype=dtype, generator=torch.Generator().manual_seed(0))


def energy(h):
    return h.abs().square().flatten(1).sum(1)


# The transform --------------------------------------------------------------------------------------------------------


def test_it_is_the_conjugate_of_equation_2():
    h = random_channels()
    dft = {n: torch.fft.fft(torch.eye(n, dtype=h.dtype), norm="ortho") for n in h.shape[1:]}
    # Eq. 2 on rows h^H: F_c conj(H)^T F_d.
    expected = (dft[12] @ h.conj().mT @ dft[4]).conj()
    got, kept = angle_delay(h, delays=12, shift=0)
    torch.testing.assert_close(torch.complex(got[:, 0], got[:, 1]), expected.to(torch.complex64))
    torch.testing.assert_close(kept, torch.ones(3, dtype=torch.float64))


def test_a_ray_lies_at_its_delay_and_angle():
    grid, array = SubcarrierGrid(64, 20e6), AntennaArray.ula(8)
    # Direction cosine 2 * 3 / 8 puts the phase of element n at 2 pi n 3 / 8.
    direction = torch.tensor([[math.sqrt(1 - 0.75**2), 0.75, 0.0]], dtype=torch.float64)
    ray = Rays(torch.ones(1, 1, dtype=torch.complex64), torch.tensor([5 / 20e6], dtype=torch.float64), direction)
    h, kept = angle_delay(synthesize(ray, array, grid), delays=16, shift=2)
    magnitude = torch.complex(h[0, 0], h[0, 1]).abs()
    # The inverse DFT over the antennas mirrors the angle: bin -3 of 8.
    assert divmod(int(magnitude.argmax()), 8) == (5 + 2, 5)
    assert magnitude.max().item() == pytest.approx(math.sqrt(64 * 8), rel=1e-5) and kept.item() == pytest.approx(1)


def test_shift_keeps_what_leaks_to_the_end():
    rays = Rays(
        torch.ones(1, 1, dtype=torch.complex64),
        torch.tensor([0.5 / 20e6], dtype=torch.float64),
        torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64),
    )
    h = synthesize(rays, AntennaArray.ula(2), SubcarrierGrid(256, 20e6))
    kept = [angle_delay(h, delays=8, shift=shift)[1].item() for shift in (0, 1)]
    # A tap at a distance of y taps holds sinc(y)^2: one shift wins the tap 1.5 before the ray, loses that 6.5 after it.
    distances = torch.arange(8) - 0.5
    assert kept[0] == pytest.approx(distances.sinc().square().sum().item(), abs=1e-3)
    assert kept[1] - kept[0] == pytest.approx((1 / 1.5**2 - 1 / 6.5**2) / math.pi**2, abs=1e-3)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_to_frequency_inverts_what_was_kept(shift):
    h = random_channels()
    whole, _ = angle_delay(h, delays=12, shift=shift)
    torch.testing.assert_close(to_frequency(whole, 12, shift), h.to(torch.complex64), rtol=0, atol=1e-5)
    cut, kept = angle_delay(h, delays=5, shift=shift)
    back = to_frequency(cut.double(), 12, shift)
    # What is lost is orthogonal to what is kept.
    torch.testing.assert_close(energy(h - back) / energy(h), 1 - kept, rtol=0, atol=1e-6)
    torch.testing.assert_close(angle_delay(back, 5, shift)[0], cut)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: angle_delay(torch.zeros(2, 3, 4)), r"complex \[sample, antenna, subcarrier\]"),
        (lambda: angle_delay(random_channels(samples=0)), "not empty"),
        (lambda: angle_delay(random_channels(), delays=13), "delays: expected 1 to 12"),
        (lambda: angle_delay(random_channels(), delays=4, shift=4), "shift: expected 0 to 3"),
        (
            lambda: angle_delay(random_channels() * torch.tensor([1, 0, 0])[:, None, None], 4, 0),
            "got 2 others.* index 1",
        ),
        (
            lambda: angle_delay(random_channels() / torch.tensor([1, 1, 0])[:, None, None], 4, 0),
            "got 1 others.* index 2",
        ),
        (lambda: to_frequency(torch.zeros(1, 3, 4, 4), 12), r"float \[sample, 2, delay, antenna\]"),
        (lambda: to_frequency(torch.zeros(1, 2, 4, 4), 3), "delays: expected 1 to 3"),
        (lambda: noisy(torch.zeros(3, 2, 4, 4), torch.zeros(2)), "one per sample \\(3\\)"),
        (lambda: noisy(torch.zeros(3, 2, 4, 4), math.nan), "snr_db"),
        (lambda: DelayTaps(SubcarrierGrid(8, 1.0), 9), "delays: expected 1 to 8"),
        (lambda: DelayTaps(SubcarrierGrid(8, 1.0), 4, -1), "shift"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Rays straight to delay taps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subcarriers", [16, 17])
def test_delay_taps_are_the_truncated_inverse_dft(subcarriers):
    grid = SubcarrierGrid(subcarriers, 4.0)
    # On taps, between them, before the first, a period or several later: where the kernel is 0 / 0 among others.
    delay = torch.tensor([0.0, 0.25, 0.3, -0.1, -0.75, 3.99, subcarriers / 4, subcarriers / 4 + 0.1, 2.5 * subcarriers])
    expected = torch.fft.ifft(grid.response(delay, torch.complex128), norm="ortho")
    taps = DelayTaps(grid, delays=7, shift=2)
    got = taps.response(delay, torch.complex128)
    torch.testing.assert_close(got, expected[:, torch.arange(-2, 5)], rtol=0, atol=1e-12)
    assert taps.subcarriers == 7 and taps.response(delay, torch.complex64).dtype == torch.complex64


@builtin
def test_samples_are_those_of_the_subcarriers(preset):
    got = preset.sample("test", 12, draw=1)
    expected, kept = angle_delay(preset.frequency("test", 12, draw=1), preset.delays, preset.shift)
    expected *= (32 * 32 / expected.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(preset.kept_energy("test", 12, draw=1), kept)


# The data sets --------------------------------------------------------------------------------------------------------


@builtin
def test_samples_have_the_documented_shape_and_scale(preset):
    h = preset.sample("train", 5)
    assert h.shape == (5, 2, 32, 32) and h.dtype == torch.float32
    torch.testing.assert_close(h.square().sum(dim=(1, 2, 3)), torch.full((5,), 1024.0))
    assert torch.equal(preset.sample("train", 5), h)
    assert not torch.equal(preset.sample("train", 5, draw=1), h)
    assert not torch.equal(preset.sample("validation", 5), h)


# Means over 100 environments; the truncation of the paper's channels keeps 97 to 98%.
@pytest.mark.parametrize("preset, low, high", [(INDOOR_LOS, 0.99, 1.0), (OUTDOOR_NLOS, 0.97, 0.99)])
def test_the_truncation_keeps_the_reported_energy(preset, low, high):
    kept = preset.kept_energy("test", 100)
    assert low < kept.mean() < high and kept.max() <= 1
    assert preset.sample("test", 100).isfinite().all()


def test_more_samples_than_environments_are_spread_evenly():
    preset = angle_delay_preset("outdoor_nlos", train=range(1, 4), validation=range(4, 5), test=range(5, 6))
    h = preset.sample("train", 8)
    single = [dataclasses.replace(preset, train=range(i, i + 1), validation=range(4, 5)) for i in (1, 2, 3)]
    expected = torch.cat([p.sample("train", n) for p, n in zip(single, (3, 3, 2), strict=True)])
    assert torch.equal(h, expected)


@builtin
def test_a_moving_ue_is_where_its_speed_took_it(preset):
    still = preset.sample("test", 20)
    nmse = []
    for speed in (1e-4, 1.0, 30.0):
        moved = dataclasses.replace(preset, speed_kmh=speed).sample("test", 20)
        nmse.append(((moved - still).square().sum() / still.square().sum()).item())
    assert nmse[0] < 1e-7 < nmse[1] < nmse[2]
    # Phases turn by 2 pi travel / wavelength at most: a small movement's error is below its square.
    assert nmse[1] < (2 * math.pi * 1.0 / 3.6 * preset.elapsed / preset.cell.wavelength) ** 2
    assert torch.equal(dataclasses.replace(preset, speed_kmh=0.0).sample("test", 20), still)


@pytest.mark.parametrize("snr", [10.0, torch.tensor([0.0, 10.0, 20.0])])
def test_noise_has_the_snr_asked_for(snr):
    h = (
        torch.randn(3, 2, 64, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 5, 0.1])[:, None, None, None]
    )
    generator = torch.Generator().manual_seed(1)
    noise = noisy(h, snr, generator) - h
    measured = 10 * (h.square().sum((1, 2, 3)) / noise.square().sum((1, 2, 3))).log10()
    torch.testing.assert_close(measured, torch.as_tensor(snr).expand(3), rtol=0, atol=0.25)
    assert not torch.equal(noisy(h, snr, generator) - h, noise)


def test_presets_are_found_by_name():
    assert set(ANGLE_DELAY_SETS) == {"indoor_los", "outdoor_nlos", "uma_28ghz", "raytraced"}
    assert angle_delay_preset("indoor_los", shift=3).shift == 3
    with pytest.raises(ValueError, match="indoor_los, outdoor_nlos, uma_28ghz, raytraced, got 'indoor'"):
        angle_delay_preset("indoor")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation": range(2000, 2010)}, "none in two of them"),
        ({"test": range(5, 5)}, "environments in each"),
        ({"speed_kmh": -1.0}, "speed_kmh"),
        ({"elapsed": math.inf}, "elapsed"),
        ({"delays": 2000}, "delays: expected 1 to 1024"),
    ],
)
def test_presets_refuse_what_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        angle_delay_preset("indoor_los", **changes)


def test_sampling_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'val'"):
        INDOOR_LOS.sample("val", 4)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        INDOOR_LOS.sample("test", 0)
    with pytest.raises(ValueError, match="seed"):
        INDOOR_LOS.sample("test", 1, draw=-1)


@pytest.mark.sionna
@pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="needs the extra sionna")
def test_uma_at_28_ghz_comes_from_sionna():
    h = UMA_28GHZ.sample("test", 3)
    assert h.shape == (3, 2, 32, 32) and h.isfinite().all()
    expected, kept = angle_delay(UMA_28GHZ.frequency("test", 3))
    expected *= (1024 / expected.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
    torch.testing.assert_close(h, expected, rtol=0, atol=2e-4)
    assert (kept > 0).all() and (kept < 1).all()
