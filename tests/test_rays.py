"""Rays to channel matrices against a direct sum over rays, and the steering and Doppler conventions."""

import cmath
import math

import numpy as np
import pytest
import torch

from csimodels.channels.rays import AntennaArray, Rays, SubcarrierGrid, normalize_power, phasor, synthesize

GRID = SubcarrierGrid(5, 7e6)
# complex64 rounds each phasor to 6e-8; sums of tens of unit rays keep the error below this.
TOLERANCE = {torch.complex64: 5e-6, torch.complex128: 1e-11}


def random_rays(generator, *, gain=(), geometry=(), paths=7, groups=None, doppler=False):
    """Random rays; ``gain`` and ``geometry`` are batch dimensions, ``groups`` the number of distinct delays."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delay = normal(*geometry, paths).abs() * 300e-9
    if groups is not None:
        delay = delay[..., torch.arange(paths) % groups]
    direction = torch.nn.functional.normalize(normal(*geometry, paths, 3), dim=-1)
    shift = normal(*geometry, paths) * 100 if doppler else None
    return Rays(torch.complex(normal(*gain, paths), normal(*gain, paths)), delay, direction, shift)


def direct_sum(gain, delay, direction, array, grid):
    """One channel matrix, entry by entry and ray by ray, in Python floats."""
    h = np.zeros((len(array), grid.subcarriers), dtype=complex)
    for a, position in enumerate(array.positions.tolist()):
        for k in range(grid.subcarriers):
            frequency = (k - (grid.subcarriers - 1) / 2) * grid.bandwidth / grid.subcarriers
            for path in range(len(gain)):
                along = sum(p * d for p, d in zip(position, direction[path].tolist(), strict=True))
                phase = 2 * math.pi * (along - frequency * delay[path].item())
                h[a, k] += complex(gain[path]) * cmath.exp(1j * phase)
    return torch.from_numpy(h)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("array", [AntennaArray.ula(6), AntennaArray.upa(2, 3)], ids=["ula", "upa"])
@pytest.mark.parametrize("paths, groups", [(1, None), (7, None), (12, 2), (13, 3), (40, 40)])
def test_fixed_geometry_is_the_sum_over_rays(array, paths, groups, dtype):
    rays = random_rays(torch.Generator().manual_seed(0), gain=(2, 3), paths=paths, groups=groups)
    h = synthesize(rays, array, GRID, dtype=dtype)
    assert h.shape == (2, 3, 6, 5) and h.dtype == dtype
    for i in range(2):
        for j in range(3):
            expected = direct_sum(rays.gain[i, j], rays.delay, rays.direction, array, GRID)
            torch.testing.assert_close(h[i, j].to(torch.complex128), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("paths", [1, 7])
def test_a_geometry_per_item_is_the_sum_over_rays(paths, dtype):
    array = AntennaArray.ula(4)
    rays = random_rays(torch.Generator().manual_seed(1), gain=(3,), geometry=(3,), paths=paths)
    h = synthesize(rays, array, GRID, dtype=dtype)
    for i in range(3):
        expected = direct_sum(rays.gain[i], rays.delay[i], rays.direction[i], array, GRID)
        torch.testing.assert_close(h[i].to(torch.complex128), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_all_strategies_agree(groups):
    # More items than one block of the grouped product, so that blocks are joined too.
    rays = random_rays(torch.Generator().manual_seed(2), gain=(5000,), paths=60, groups=groups)
    array, grid = AntennaArray.ula(8), SubcarrierGrid(16, 70e6)
    fixed = synthesize(rays, array, grid, dtype=torch.complex128)
    # A leading dimension of the geometry, even of size 1, selects the product per item.
    per_item = Rays(rays.gain, rays.delay[None], rays.direction[None])
    torch.testing.assert_close(synthesize(per_item, array, grid, dtype=torch.complex128), fixed, rtol=0, atol=1e-11)


def test_results_do_not_depend_on_the_batch():
    rays = random_rays(torch.Generator().manual_seed(3), gain=(4700,), paths=60, groups=4)
    array, grid = AntennaArray.ula(8), SubcarrierGrid(16, 70e6)
    whole = synthesize(rays, array, grid, dtype=torch.complex128)
    part = synthesize(Rays(rays.gain[4600:], rays.delay, rays.direction), array, grid, dtype=torch.complex128)
    torch.testing.assert_close(part, whole[4600:], rtol=0, atol=1e-12)


def test_empty_batch():
    rays = random_rays(torch.Generator().manual_seed(4), gain=(0,), paths=40, groups=2)
    assert synthesize(rays, AntennaArray.ula(4), GRID).shape == (0, 4, 5)


def test_ula_steering():
    azimuth = 0.3
    direction = torch.tensor([[math.cos(azimuth), math.sin(azimuth), 0.0]], dtype=torch.float64)
    rays = Rays(torch.ones(1, dtype=torch.complex128), torch.zeros(1, dtype=torch.float64), direction)
    h = synthesize(rays, AntennaArray.ula(4), SubcarrierGrid(1, 1.0), dtype=torch.complex128)[:, 0]
    expected = torch.tensor([cmath.exp(1j * math.pi * n * math.sin(azimuth)) for n in range(4)], dtype=torch.complex128)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-14)


def test_upa_steering_is_row_major_over_z():
    direction = torch.tensor([[0.0, 0.6, 0.8]], dtype=torch.float64)
    rays = Rays(torch.ones(1, dtype=torch.complex128), torch.zeros(1, dtype=torch.float64), direction)
    h = synthesize(rays, AntennaArray.upa(2, 3), SubcarrierGrid(1, 1.0), dtype=torch.complex128)[:, 0]
    expected = [cmath.exp(1j * math.pi * (row * 0.8 + column * 0.6)) for row in range(2) for column in range(3)]
    torch.testing.assert_close(h, torch.tensor(expected, dtype=torch.complex128), rtol=0, atol=1e-14)


def test_subcarriers_are_centred_on_the_carrier():
    torch.testing.assert_close(
        SubcarrierGrid(4, 8.0).frequencies, torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("geometry", [(), (2,)])
def test_doppler_turns_each_ray(geometry):
    rays = random_rays(torch.Generator().manual_seed(5), gain=geometry, geometry=geometry, doppler=True)
    times = torch.tensor([0.0, 1e-3, 5e-3], dtype=torch.float64)
    array = AntennaArray.ula(3)
    h = synthesize(rays.at(times), array, GRID, dtype=torch.complex128)
    assert h.shape == (*geometry, 3, 3, 5)
    for t, time in enumerate(times):
        turned = rays.gain * torch.exp(2j * math.pi * rays.doppler * time)
        frozen = synthesize(Rays(turned, rays.delay, rays.direction), array, GRID, dtype=torch.complex128)
        torch.testing.assert_close(h[..., t, :, :], frozen, rtol=0, atol=1e-12)


def test_static_rays_have_no_time():
    with pytest.raises(ValueError, match="doppler"):
        random_rays(torch.Generator().manual_seed(6)).at(torch.zeros(1))


def test_phasor_keeps_float32_accuracy_at_large_phases():
    phase = torch.tensor([1e7 + 0.25, -3e8 + 1.0], dtype=torch.float64)
    expected = torch.polar(torch.ones_like(phase), phase)
    torch.testing.assert_close(phasor(phase, torch.complex64).to(torch.complex128), expected, rtol=0, atol=2e-7)
    # 3e8 rad itself has a spacing of 6e-8 in float64, which bounds what the reduction can keep.
    torch.testing.assert_close(phasor(phase, torch.complex128), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "gain, delay, direction",
    [((4,), (3,), (4, 3)), ((4,), (4,), (3, 3)), ((4,), (4,), (4, 2)), ((0,), (0,), (0, 3)), ((), (), (3,))],
)
def test_shapes_that_do_not_fit_are_named(gain, delay, direction):
    rays = Rays(torch.ones(gain, dtype=torch.complex128), torch.zeros(delay), torch.zeros(direction))
    with pytest.raises(ValueError, match="expected gain"):
        synthesize(rays, AntennaArray.ula(2), GRID)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"dtype.*complex64.*float32"):
        synthesize(random_rays(torch.Generator().manual_seed(7)), AntennaArray.ula(2), GRID, dtype=torch.float32)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AntennaArray.upa(0, 2), "rows, columns"),
        (lambda: AntennaArray(torch.zeros(3, 2, dtype=torch.float64)), "positions"),
        (lambda: AntennaArray(torch.zeros(3, 3)), "positions"),
        (lambda: SubcarrierGrid(0, 1.0), "subcarriers"),
        (lambda: SubcarrierGrid(3, 0.0), "bandwidth"),
    ],
)
def test_bad_arrays_and_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_compare_by_position():
    assert AntennaArray.ula(4) == AntennaArray.upa(1, 4) != AntennaArray.ula(5)
    assert len({AntennaArray.ula(4), AntennaArray.ula(4)}) == 1


def test_normalize_power():
    h = torch.randn(3, 4, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(8)) * 1e-6
    normalized = normalize_power(h)
    torch.testing.assert_close(normalized.abs().square().sum(dim=(1, 2)), torch.full((3,), 20.0, dtype=torch.float64))
    torch.testing.assert_close(normalized / normalized[:, :1, :1], h / h[:, :1, :1])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_samples_without_finite_power_are_named(bad):
    h = torch.ones(5, 2, 2, dtype=torch.complex64)
    h[[2, 4]] = bad
    with pytest.raises(ValueError, match=r"got 2 others, the first at index 2"):
        normalize_power(h)
