"""The built-in generator: what determines an environment, and its moments against the parameters drawn for it."""

import math

import numpy as np
import pytest
import torch

from csimodels.channels.disc import CellConfig
from csimodels.channels.environment import Environment, umi_statistics
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, SubcarrierGrid
from csimodels.channels.source import EnvironmentSource, FixedSource
from csimodels.channels.statistics import subspace_dimension

CELL = CellConfig()
SMALL = CellConfig(array=AntennaArray.ula(4), grid=SubcarrierGrid(6, 20e6))


# What determines an environment ---------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_samples():
    first = Environment(CELL, 2, 5).sample(7, seed=3)
    assert first.shape == (7, 32, 32) and first.dtype == torch.complex64
    assert torch.equal(Environment(CELL, 2, 5).sample(7, seed=3), first)


# Index, patches, and entry [1, 31, 31] of the channels that the shipped checkpoints were trained on.
KNOWN = [
    (1, 1, (2.5204438284 + 0.9931422631j)),
    (2, 1, (0.5970483072 - 0.7736681419j)),
    (1104, 1, (0.8482080022 - 0.5095892419j)),
    (7, 16, (0.3050578651 - 0.4844065354j)),
]


@pytest.mark.parametrize("index, patches, expected", KNOWN)
def test_environments_stay_what_they_were(index, patches, expected):
    h = Environment(CellConfig(patches=patches), index, 7).sample(2, seed=3, dtype=torch.complex128)
    assert h[1, 31, 31].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("los", [False, True])
@pytest.mark.parametrize("paths", [2, 3, 10, 48, 10_000])
def test_few_paths_carry_the_power_of_their_clusters(paths, los):
    whole, few = (Environment(CELL, 9, 4, los=los, paths=count).ray_sets[0] for count in (None, paths))
    scattered = min(paths - los, len(whole.gain))
    assert len(few.gain) == len(few.delay) == len(few.departure) == len(few.arrival) == scattered
    assert few.direct == whole.direct
    # Rays of the whole, in its order, and no other change than the amplitude within a cluster.
    places = [(whole.departure == direction).all(1).nonzero().item() for direction in few.departure]
    assert places == sorted(places)
    torch.testing.assert_close(few.gain / few.gain.abs(), whole.gain[places] / whole.gain[places].abs())
    clusters = torch.tensor(places) // 20
    power = whole.gain.abs().square().view(-1, 20).sum(1)
    for cluster in clusters.unique():
        torch.testing.assert_close(few.gain[clusters == cluster].abs().square().sum(), power[cluster])
    # In turn: no cluster has two rays more than another, and those without any are the weakest.
    counts = torch.bincount(clusters, minlength=len(power))
    assert counts.max() - counts.min() <= 1
    if counts.max() > counts.min():
        assert power[counts == counts.max()].min() >= power[counts == counts.min()].max()


def test_too_few_paths_are_refused():
    with pytest.raises(ValueError, match="paths: expected at least 1, got 0"):
        Environment(CELL, 1, 0, paths=0)
    with pytest.raises(ValueError, match="paths: expected at least 2, got 1"):
        Environment(CELL, 2, 0, paths=1)


def test_seeds_and_indices_are_independent():
    def flat(index, seed, draw):
        return Environment(SMALL, index, seed, los=False).sample(400, seed=draw).flatten()

    reference = flat(1, 0, 0)
    for other in (flat(3, 0, 0), flat(1, 1, 0), flat(1, 0, 1)):
        correlation = torch.vdot(reference, other).abs() / (reference.norm() * other.norm())
        assert correlation < 0.2


def test_draws_of_one_environment_share_its_rays():
    environment = Environment(SMALL, 1, 0)
    # The covariance is a matter of the rays alone, and 4,000 positions leave a few percent of error.
    covariances = [torch.cov(environment.sample(4000, seed=draw).flatten(1).T) for draw in (0, 1)]
    assert (covariances[0] - covariances[1]).norm() < 0.1 * covariances[0].norm()


def test_the_index_decides_the_state():
    assert [Environment(SMALL, index, 0).los for index in (1, 2, 3, 4)] == [False, True, False, True]
    assert Environment(SMALL, 1, 0, los=True).los and not Environment(SMALL, 2, 0, los=False).los


def test_discs_lie_in_the_cell():
    centres = np.array([Environment(SMALL, index, 0).centre for index in range(1, 400)])
    distance = np.hypot(centres[:, 0], centres[:, 1])
    assert distance.min() >= 15 and distance.max() <= 195 and (centres[:, 2] == 1.5).all()
    # Uniform over the area: half of the discs lie beyond the radius that halves it.
    assert np.mean(distance > math.sqrt((15**2 + 195**2) / 2)) == pytest.approx(0.5, abs=0.08)


def test_double_precision_refines_single_precision():
    environment = Environment(CELL, 2, 0)
    single, double = environment.sample(50), environment.sample(50, dtype=torch.complex128)
    torch.testing.assert_close(single.to(torch.complex128), double, rtol=0, atol=5e-6)


@pytest.mark.parametrize("los", [True, False])
def test_empty_draw(los):
    assert Environment(CELL, 1, 0, los=los).sample(0).shape == (0, 32, 32)


# Moments --------------------------------------------------------------------------------------------------------------


def profile(rays):
    """Powers and delays of the direct ray and the scattered ones."""
    power = torch.cat([torch.tensor([rays.direct**2], dtype=torch.float64), rays.gain.abs().square()])
    return power, torch.cat([torch.zeros(1, dtype=torch.float64), rays.delay])


@pytest.mark.parametrize("los", [True, False])
def test_mean_power_is_that_of_the_rays(los):
    powers = []
    for index in range(1, 13):
        environment = Environment(SMALL, index, 0, los=los)
        (rays,) = environment.ray_sets
        power, _ = profile(rays)
        powers.append(power.sum().item())
        measured = environment.sample(3000).abs().square().mean().item()
        assert measured == pytest.approx(powers[-1], rel=0.1)
    # Clusters 25 dB below the strongest are missing: a few percent at most.
    assert min(powers) > 0.9 and max(powers) < 1 + 1e-12


def test_rician_factor():
    environments = [Environment(CELL, index, 0, los=True) for index in range(1, 301)]
    for environment in environments[:5]:
        linear = 10 ** (environment.spreads["rician_db"] / 10)
        (rays,) = environment.ray_sets
        assert rays.direct**2 == pytest.approx(linear / (linear + 1))
        assert rays.gain.abs().square().sum() < 1 / (linear + 1) * (1 + 1e-9)
    drawn = np.array([environment.spreads["rician_db"] for environment in environments])
    # 38.901, table 7.5-6: 9 dB with a standard deviation of 5 dB; 300 draws leave 0.3 dB.
    assert drawn.mean() == pytest.approx(9, abs=1.0) and drawn.std() == pytest.approx(5, abs=0.7)
    assert Environment(CELL, 1, 0).ray_sets[0].direct == 0.0


@pytest.mark.parametrize("los", [True, False])
def test_large_scale_parameters_have_their_distribution(los):
    table = umi_statistics(CELL.carrier, los)
    spreads = [Environment(SMALL, index, 0, los=los).spreads for index in range(1, 401)]
    for name in ("delay", "azimuth_arrival", "azimuth_departure", "zenith_arrival"):
        mean, deviation = getattr(table, "delay_spread" if name == "delay" else name)
        drawn = np.log10([spread[name] for spread in spreads])
        # Four standard errors of a median of 400; the caps of 104 and 52 degrees cut the deviation.
        assert np.median(drawn) == pytest.approx(mean, abs=4 * 1.25 * deviation / 20)
        assert drawn.std() == pytest.approx(deviation, rel=0.25)


@pytest.mark.parametrize("los, low", [(True, 0.5), (False, 0.8)])
def test_delay_spread_follows_the_drawn_one(los, low):
    ratios = []
    for index in range(1, 301):
        environment = Environment(SMALL, index, 0, los=los)
        power, delay = profile(environment.ray_sets[0])
        power = power / power.sum()
        spread = ((power * delay.square()).sum() - (power * delay).sum().square()).sqrt().item()
        ratios.append(spread / environment.spreads["delay"])
    # Twelve or nineteen clusters leave much of one environment's spread to chance, and those 25 dB below the strongest
    # (which in line of sight includes the direct ray) are dropped.
    assert low < np.median(ratios) < 1.2


def test_the_direct_ray_is_exact():
    # So strong a direct ray that it is all there is.
    environment = Environment(CELL, 2, 0)
    position = np.array([[1.25, -3.0, 0.0]])
    rays = environment._direct(position, np.array([1.0]))
    offset = environment.centre + position[0] - [0, 0, 10]
    excess = np.linalg.norm(offset) - np.linalg.norm(environment.centre - [0, 0, 10])
    assert rays.delay.item() == pytest.approx(excess / SPEED_OF_LIGHT)
    assert rays.gain.item() == pytest.approx(np.exp(-2j * np.pi * excess / CELL.wavelength))
    assert rays.direction[0, 0].tolist() == pytest.approx((offset / np.linalg.norm(offset)).tolist())


def test_the_direct_ray_and_a_plane_wave_agree_near_the_centre():
    """A scattered ray along the direct one turns its phase as the direct one does, to first order."""
    environment = Environment(CELL, 2, 0)
    step = np.array([[0.01, 0.02, 0.0]])
    toward = environment._bs - environment.centre
    plane = 2 * np.pi / CELL.wavelength * step[0] @ toward / np.linalg.norm(toward)
    direct = np.angle(environment._direct(step, np.array([1.0])).gain.item())
    assert direct == pytest.approx(plane, abs=1e-3)


def test_patches_change_the_dimensions():
    """LASCO's environments are low-dimensional; more patches make them less so."""
    environments = [Environment(CellConfig(patches=patches), 2, 0) for patches in (1, 4, 16)]
    assert [len(environment.ray_sets) for environment in environments] == [1, 4, 16]
    dimensions = [subspace_dimension(environment.sample(400)).item() for environment in environments]
    assert dimensions[0] < 0.7 * dimensions[1] and dimensions[1] < 0.7 * dimensions[2]


def test_patches_belong_to_places():
    environment = Environment(CellConfig(patches=2), 1, 0)
    # Only the nearest patch's rays reach a position: silencing one leaves the channels of the other's positions.
    whole = environment.sample(200)
    silent = environment.ray_sets[1]
    silent.gain.zero_()
    left = environment.sample(200)
    changed = (left != whole).flatten(1).any(1)
    assert 0 < changed.sum() < 200
    assert (left[changed] == 0).all() and torch.equal(left[~changed], whole[~changed])


# Sources --------------------------------------------------------------------------------------------------------------


def test_every_epoch_draws_new_positions():
    source = EnvironmentSource(SMALL, 3, [2, 5], 4)
    (first,), (again,), (second,) = source(0), source(0), source(1)
    assert first.shape == (8, 4, 6) and torch.equal(first, again) and not torch.equal(first, second)
    torch.testing.assert_close(first.abs().square().sum(dim=(1, 2)), torch.full((8,), 24.0))
    # Draw 0 is left for data sets and tests.
    sample = Environment(SMALL, 2, 3).sample(4)
    assert not torch.allclose(first[:4] / first[:4, :1, :1], sample / sample[:, :1, :1])


def test_fixed_samples_are_normalised():
    h = Environment(SMALL, 1, 0).sample(3)
    source = FixedSource(h)
    assert torch.equal(source(0)[0], source(9)[0])
    torch.testing.assert_close(source(0)[0].abs().square().sum(dim=(1, 2)), torch.full((3,), 24.0))


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Environment(SMALL, 0, 0), "index: expected at least 1, got 0"),
        (lambda: Environment(SMALL, 1, -1), "seed: expected at least 0, got -1"),
        (lambda: Environment(SMALL, 1, 0).sample(-1), "count: expected at least 0, got -1"),
        (lambda: Environment(SMALL, 1, 0).sample(1, seed=-1), "seed"),
        (lambda: Environment(SMALL, 1, 0).sample(1, dtype=torch.float32), "dtype"),
        (lambda: CellConfig(patches=0), "patches: expected at least 1, got 0"),
        (lambda: CellConfig(carrier=-1.0), "carrier: expected a positive number, got -1"),
        (lambda: CellConfig(disc_radius=math.nan), "disc_radius"),
        (lambda: CellConfig(radius=19.0), "radius: expected room for a disc"),
        (lambda: EnvironmentSource(SMALL, 0, [1], 0), "per_environment"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_configurations_survive_json():
    assert CellConfig.from_dict(SMALL.to_dict()) == SMALL != CELL
