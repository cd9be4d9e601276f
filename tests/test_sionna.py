"""The Sionna generator: its rays against Sionna's own channel coefficients, and its behaviour as an environment."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from csimodels.channels.disc import CellConfig
from csimodels.channels.environment import Environment
from csimodels.channels.rays import AntennaArray, Rays, SubcarrierGrid, synthesize
from csimodels.channels.sionna import SionnaEnvironment

INSTALLED = importlib.util.find_spec("sionna") is not None
needs_sionna = pytest.mark.skipif(not INSTALLED, reason="Sionna is not installed (extra `sionna`)")
pytestmark = pytest.mark.sionna

# Sionna centres its panels on the origin.
ULA = AntennaArray(AntennaArray.ula(8).positions - torch.tensor([0.0, 1.75, 0.0], dtype=torch.float64))
CELL = CellConfig(array=ULA, grid=SubcarrierGrid(16, 70e6))


class Recorder:
    """Wraps Sionna's ray sampler and keeps what it drew."""

    def __init__(self, monkeypatch):
        from sionna.phy.channel import tr38901

        self.tr38901, self.drawn = tr38901, []
        original = tr38901.RaysGenerator.__call__

        def call(generator, parameters):
            rays = original(generator, parameters)
            self.drawn.append((generator._scenario, parameters, rays))
            return rays

        monkeypatch.setattr(tr38901.RaysGenerator, "__call__", call)


def sionna_channel(recorder, environment, patch):
    """``H`` at a patch's UE by Sionna's steps 10 and 11, with the environment's ray phases."""
    tr38901 = recorder.tr38901
    scenario, parameters, rays = recorder.drawn[-1]
    # Vertical antennas see the first of the four polarisation phases alone.
    phases = torch.zeros(*rays.aod.shape, 4, dtype=torch.float64)
    for number, ray_set in enumerate(environment.ray_sets):
        phases[0, 0, number, rays.powers[0, 0, number] > 0, :, 0] = ray_set.gain.angle().reshape(-1, 20)
    rays.phases = phases

    def panel(columns):
        carrier = environment.config.carrier
        return tr38901.PanelArray(1, columns, "single", "V", "omni", carrier, precision="double", device="cpu")

    still = torch.zeros(1, 1, 3, dtype=torch.float64)
    topology = tr38901.Topology(
        velocities=still.expand(1, len(environment.ray_sets), 3),
        moving_end="rx",
        los_aoa=torch.deg2rad(scenario.los_aoa),
        los_aod=torch.deg2rad(scenario.los_aod),
        los_zoa=torch.deg2rad(scenario.los_zoa),
        los_zod=torch.deg2rad(scenario.los_zod),
        los=scenario.los,
        distance_3d=torch.zeros_like(scenario.distance_3d),  # the phase of the direct ray counts from the UE here
        tx_orientations=still,
        rx_orientations=still.expand(1, len(environment.ray_sets), 3),
    )
    generator = tr38901.ChannelCoefficientsGenerator(
        environment.config.carrier, panel(8), panel(1), subclustering=True, precision="double", device="cpu"
    )
    coefficients, delays = generator(1, 1.0, parameters.k_factor, rays, topology, scenario.get_param("cDS") * 1e-9)
    turns = torch.exp(-2j * math.pi * delays[0, 0, patch][:, None] * environment.config.grid.frequencies)
    return coefficients[0, 0, patch, :, 0, :, 0].T @ turns


@needs_sionna
@pytest.mark.parametrize("los", [True, False])
@pytest.mark.parametrize("scenario", ["umi", "uma", "rma"])
def test_rays_give_the_channel_that_sionna_gives(scenario, los, monkeypatch):
    recorder = Recorder(monkeypatch)
    cell = CellConfig(array=ULA, grid=CELL.grid, patches=2)
    environment = SionnaEnvironment(cell, 3, 0, los=los, scenario=scenario)
    for patch, rays in enumerate(environment.ray_sets):
        fixed = Rays(rays.gain, rays.delay, rays.departure)
        h = synthesize(fixed, ULA, cell.grid, dtype=torch.complex128)
        if los:
            direct = environment._direct(environment.patch_centres[patch][None], np.array([rays.direct]))
            # Seen from the patch's own centre, the direct ray has no delay and no phase.
            still = Rays(direct.gain.abs(), torch.zeros_like(direct.delay), direct.direction)
            h = h + synthesize(still, ULA, cell.grid, dtype=torch.complex128)[0]
        expected = sionna_channel(recorder, environment, patch)
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)


@needs_sionna
@pytest.mark.parametrize("profile, rician_db", [("a", None), ("b", None), ("c", None), ("d", 9.0), ("e", None)])
def test_cdl_profiles_have_their_delay_spread(profile, rician_db):
    environment = SionnaEnvironment(CELL, 5, 0, scenario=f"cdl-{profile}", delay_spread=60e-9)
    assert environment.los == (profile in "de")
    (rays,) = environment.ray_sets
    power = torch.cat([rays.gain.abs().square(), torch.tensor([rays.direct**2], dtype=torch.float64)])
    delay = torch.cat([rays.delay, torch.zeros(1, dtype=torch.float64)])
    assert power.sum().item() == pytest.approx(1.0, rel=1e-9)
    spread = ((power * delay.square()).sum() - (power * delay).sum().square()).sqrt().item()
    # The tables are rounded to 0.1 dB and four digits of delay.
    assert spread == pytest.approx(60e-9, rel=0.02)
    if rician_db is not None:
        assert 10 * math.log10(rays.direct**2 / (1 - rays.direct**2)) == pytest.approx(rician_db, abs=0.2)


@needs_sionna
def test_cdl_lies_where_the_environment_lies():
    environment = SionnaEnvironment(CELL, 6, 0, scenario="cdl-d")
    (rays,) = environment.ray_sets
    toward = torch.from_numpy(environment.centre - environment._bs)
    toward /= toward.norm()
    # The first scattered cluster of CDL-D has the angles of its direct ray (38.901, table 7.7.1-4).
    departure, arrival = rays.departure[:20].mean(0), rays.arrival[:20].mean(0)
    assert torch.dot(departure / departure.norm(), toward).item() > math.cos(math.radians(2))
    assert torch.dot(arrival / arrival.norm(), -toward).item() > math.cos(math.radians(3))


@needs_sionna
def test_the_environment_is_determined_by_seed_and_index():
    first = SionnaEnvironment(CELL, 2, 4).sample(5)
    assert torch.equal(SionnaEnvironment(CELL, 2, 4).sample(5), first)
    assert not torch.equal(SionnaEnvironment(CELL, 2, 5).sample(5), first)
    assert not torch.equal(SionnaEnvironment(CELL, 4, 4).sample(5), first)
    assert not torch.equal(SionnaEnvironment(CELL, 2, 4).sample(5, seed=1), first)
    assert first.shape == (5, 8, 16) and first.dtype == torch.complex64


@needs_sionna
def test_it_lies_where_the_built_in_environment_lies():
    ours, theirs = Environment(CELL, 7, 3), SionnaEnvironment(CELL, 7, 3)
    assert np.array_equal(ours.centre, theirs.centre) and ours.los is theirs.los is False


@needs_sionna
def test_random_states_are_left_alone():
    from sionna.phy import config

    def draws():
        return torch.rand(2).tolist(), torch.rand(2, generator=config.torch_rng("cpu")).tolist(), config.np_rng.random()

    config.seed = 11
    torch.manual_seed(12)
    expected = draws()
    config.seed = 11
    torch.manual_seed(12)
    SionnaEnvironment(CELL, 1, 0)
    assert draws() == expected and config.seed == 11


@needs_sionna
@pytest.mark.parametrize("los", [True, False])
def test_forced_state_and_mean_power(los):
    environment = SionnaEnvironment(CELL, 1, 0, los=los, scenario="umi")
    assert environment.los is los
    (rays,) = environment.ray_sets
    assert (rays.direct > 0) is los
    scattered = rays.gain.abs().square().sum().item()
    # All but the clusters 25 dB below the strongest: at most 18 times 0.3 % is missing.
    assert 0.94 < scattered + rays.direct**2 <= 1 + 1e-9
    assert environment.sample(4000).abs().square().mean().item() == pytest.approx(scattered + rays.direct**2, rel=0.06)


@needs_sionna
def test_large_scale_parameters_of_patches_are_correlated():
    cell = CellConfig(array=ULA, grid=CELL.grid, patches=2, disc_radius=0.01)
    close = [SionnaEnvironment(cell, index, 0, los=True) for index in range(1, 9)]
    # Two centimetres apart, with a correlation distance of 15 m, the Rician factors are equal to a few percent.
    ratios = [math.atanh(e.ray_sets[0].direct) / math.atanh(e.ray_sets[1].direct) for e in close]
    assert np.allclose(ratios, 1, atol=0.1)
    assert not np.allclose(close[0].ray_sets[0].gain[:20], close[0].ray_sets[1].gain[:20])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scenario": "uma-av"}, r"scenario: expected one of umi, uma, rma, cdl-a.*'uma-av'"),
        ({"scenario": "cdl-a", "los": True}, "los: cdl-a is NLOS, got True"),
        ({"scenario": "cdl-d", "los": False}, "los: cdl-d is LOS, got False"),
        ({"scenario": "cdl-c", "delay_spread": 0.0}, "delay_spread"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SionnaEnvironment(CELL, 1, 0, **options)


def test_a_missing_sionna_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sionna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sionna", None)
    with pytest.raises(ModuleNotFoundError, match=r"csikernels\[sionna\]"):
        SionnaEnvironment(CELL, 1, 0)
