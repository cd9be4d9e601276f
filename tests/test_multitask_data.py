"""Channels of moving UEs: against sums over rays in NumPy, and the statistics that 38.901 and Doppler's law give."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from csimodels.channels import clusters
from csimodels.channels.moving_users import chosen_antennas, draw_users, slot_channels
from csimodels.channels.multitask_data import (
    MULTITASK_SETS,
    multitask_set,
    multiuser_channels,
    prediction_channels,
)
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, SubcarrierGrid, synthesize
from csimodels.channels.scenarios import uma_statistics, umi_statistics

UMA, UMI = MULTITASK_SETS["uma_nlos"], MULTITASK_SETS["umi_nlos"]
T = torch.float64
needs_sionna = pytest.mark.skipif(
    importlib.util.find_spec("sionna") is None, reason="Sionna is not installed (extra `sionna`)"
)


def power(h, dims):
    return h.abs().square().mean(dims)


def correlation(a, b):
    """Of two arrays of unit power, over everything; a real number for channels whose phases are uniform."""
    return abs((a * b.conj()).mean().item())


def by_displacement(user, carrier, positions, frequencies, speed, time):
    """The static channel of one UE that stands ``speed * time`` metres further: a plain sum over its rays."""
    gain, delay, departure, arrival = (
        getattr(user, name)[0].numpy() for name in ("gain", "delay", "departure", "arrival")
    )
    heading = user.heading[0].item()
    moved = speed * time * np.array([math.cos(heading), math.sin(heading), 0.0])
    moved_gain = gain * np.exp(2j * math.pi * carrier / SPEED_OF_LIGHT * (arrival @ moved))
    h = np.zeros((len(positions), len(frequencies)), dtype=complex)
    for a, position in enumerate(positions.numpy()):
        for k, frequency in enumerate(frequencies.tolist()):
            h[a, k] = np.sum(moved_gain * np.exp(2j * math.pi * (departure @ position - frequency * delay)))
    return torch.from_numpy(h)


def test_a_moving_ue_sees_the_static_channel_of_where_it_is():
    users = draw_users(UMA, 3, (0, 1, 2, 3))
    speed = torch.tensor([3.0, 11.5, 27.0], dtype=T)
    times = torch.tensor([0.0, 0.5e-3, 4.1e-3], dtype=T)
    grid = SubcarrierGrid(5, 9e5)
    positions = chosen_antennas(UMA.array, 2, 3, np.random.default_rng(0))
    h = slot_channels(users.rays(speed, UMA.carrier), positions, grid, times, dtype=torch.complex128)
    assert h.shape == (3, 2, 3, 5)
    for ue in range(3):
        for slot, time in enumerate(times.tolist()):
            expected = by_displacement(
                users[ue : ue + 1], UMA.carrier, positions[ue], grid.frequencies, speed[ue].item(), time
            )
            torch.testing.assert_close(h[ue, :, slot], expected, rtol=0, atol=1e-10)
    single = slot_channels(users.rays(speed, UMA.carrier), positions, grid, times)
    assert single.dtype == torch.complex64
    torch.testing.assert_close(single.to(torch.complex128), h, rtol=0, atol=2e-5)


def test_carrier_channels_are_those_of_all_antennas_at_time_zero():
    users = draw_users(UMI, 3, (5,))
    planar = users.carrier_channels(2, 3, 0.4)
    direct = synthesize(users.rays(torch.zeros(3, dtype=T), 1e9), AntennaArray.upa(2, 3, 0.4), SubcarrierGrid(1, 1.0))
    torch.testing.assert_close(planar, direct[:, :, 0], rtol=0, atol=1e-5)


def test_blocks_of_channels_are_those_of_one_ue_at_a_time(monkeypatch):
    users = draw_users(UMA, 5, (6,))
    rays, times = users.rays(torch.full((5,), 20.0, dtype=T), UMA.carrier), torch.arange(3, dtype=T) * 1e-3
    whole, planar = slot_channels(rays, UMA.array.positions[:4], UMA.grid, times), users.carrier_channels(8, 16, 0.5)
    monkeypatch.setattr("csimodels.channels.moving_users._BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(
        slot_channels(rays, UMA.array.positions[:4], UMA.grid, times), whole, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(users.carrier_channels(8, 16, 0.5), planar, rtol=1e-5, atol=1e-5)


def test_slot_channels_need_doppler_shifts():
    rays = draw_users(UMA, 1, (0,)).rays(torch.zeros(1, dtype=T), 1e9)
    still = type(rays)(rays.gain, rays.delay, rays.direction)
    with pytest.raises(ValueError, match=r"rays: expected Doppler shifts, got None"):
        slot_channels(still, UMA.array.positions, UMA.grid, torch.zeros(1, dtype=T))


def test_shapes_power_and_speeds():
    h, speed = prediction_channels("uma_nlos", "train", 300)
    assert h.shape == (300, 4, 20, 48) and h.dtype == torch.complex64
    assert speed.shape == (300,) and speed.dtype == torch.float32
    torch.testing.assert_close(power(h, (1, 2, 3)), torch.ones(300), rtol=1e-5, atol=0)
    assert 10 <= speed.min() < 20 and 90 < speed.max() <= 100 and 50 < speed.mean() < 60
    g = multiuser_channels("uma_nlos", "train", 70, users=5)
    assert g.shape == (70, 128, 5) and g.dtype == torch.complex64 and g.is_contiguous()
    torch.testing.assert_close(power(g, (1, 2)), torch.ones(70), rtol=1e-5, atol=0)


def test_users_of_a_sample_keep_their_path_loss():
    g = multiuser_channels("uma_nlos", "test", 60, users=4)
    position = torch.cat([block.position for block, _ in UMA._blocks("test", 240, 1)]).unflatten(0, (60, 4))
    distance = (position[..., :2].square().sum(-1) + (25.0 - 1.5) ** 2).sqrt()
    loss_db = 39.08 * distance.log10()  # 38.901, Table 7.4.1-1, UMa out of sight
    gain_db = 10 * g.abs().square().sum(1).double().log10()
    torch.testing.assert_close(gain_db - gain_db[:, :1], loss_db[:, :1] - loss_db, rtol=0, atol=1e-3)
    assert gain_db.std(dim=1).mean() > 3


def test_one_sample_all_antennas_and_one_antenna():
    h, speed = prediction_channels("umi_nlos", "validation", 1, speed_kmh=30, antennas=None)
    assert h.shape == (1, 128, 20, 48) and speed.tolist() == [30.0]
    one, _ = prediction_channels("umi_nlos", "validation", 1, speed_kmh=30, antennas=1)
    assert one.shape == (1, 1, 20, 48)
    # The one antenna is one of the 128, up to the scale.
    similarity = (h[0].flatten(1) @ one[0, 0].flatten().conj()).abs() / h[0].flatten(1).norm(dim=1) / one.norm()
    assert similarity.max() > 1 - 1e-5
    assert multiuser_channels("umi_nlos", "test", 1, users=1).shape == (1, 128, 1)


def test_antennas_are_drawn_without_repetition_in_the_array_s_order():
    array = AntennaArray.upa(3, 5)
    number = {tuple(position): i for i, position in enumerate(array.positions.tolist())}
    drawn = chosen_antennas(array, 4, 200, np.random.default_rng(1))
    places = torch.tensor([[number[tuple(p)] for p in row] for row in drawn.tolist()])
    assert (places.diff(dim=1) > 0).all()
    assert places.unique().tolist() == list(range(15))
    assert len(places.unique(dim=0)) > 100
    assert torch.equal(chosen_antennas(array, None, 2, np.random.default_rng(1)), array.positions)


def test_same_arguments_same_result_and_a_smaller_count_is_the_beginning():
    h, speed = prediction_channels("uma_nlos", "test", 300)
    again, speeds = prediction_channels("uma_nlos", "test", 260)
    assert torch.equal(h[:260], again) and torch.equal(speed[:260], speeds)
    g = multiuser_channels("uma_nlos", "test", 40, users=4)
    assert torch.equal(multiuser_channels("uma_nlos", "test", 33, users=4), g[:33])


def test_no_two_samples_share_a_ue():
    places = [block.position for split in ("train", "validation", "test") for block in UMA.users(split, 600)]
    assert len(torch.cat(places).unique(dim=0)) == 1800
    g = [multiuser_channels("uma_nlos", split, 30, users=2) for split in ("train", "validation", "test")]
    columns = torch.cat([part.mT.flatten(0, 1) for part in g])
    columns = columns / columns.norm(dim=1, keepdim=True)  # UEs keep their path loss
    gram = (columns @ columns.mH).abs()
    assert (gram - torch.eye(len(gram))).abs().max() < 0.99
    first = next(UMA.users("test", 1)).carrier_channels(8, 16, 0.5)[0]
    assert ((columns @ first.conj()).abs() / first.norm() / columns.norm(dim=1)).max() < 0.99


def test_speed_changes_nothing_but_the_doppler_shifts():
    slow, _ = prediction_channels("uma_nlos", "test", 20, speed_kmh=0.0)
    fast, speed = prediction_channels("uma_nlos", "test", 20, speed_kmh=100.0)
    assert speed.unique().tolist() == [100.0]
    torch.testing.assert_close(slow, slow[:, :, :1].expand_as(slow), rtol=1e-5, atol=1e-6)

    def shape(h):  # at the first slot, free of the scale
        return h[:, :, 0].flatten(1) / h[:, :, 0].flatten(1).norm(dim=1, keepdim=True)

    torch.testing.assert_close(shape(slow), shape(fast), rtol=1e-4, atol=1e-5)


def test_ues_are_uniform_in_angle_and_distance():
    position = torch.cat([block.position for block in UMA.users("train", 4000)])
    heading = torch.cat([block.heading for block in UMA.users("train", 4000)])
    distance, azimuth = position[:, :2].norm(dim=1), torch.atan2(position[:, 1], position[:, 0])
    assert (position[:, 2] == 1.5).all()
    for value, low, high in ((distance, 20, 100), (azimuth, -math.pi / 2, math.pi / 2), (heading, -math.pi, math.pi)):
        assert low <= value.min() and value.max() <= high
        fraction = ((value - low) / (high - low)).sort().values
        uniform = (torch.arange(4000, dtype=T) + 0.5) / 4000
        assert (fraction - uniform).abs().max() < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("scenario, expected", [(UMA, uma_statistics), (UMI, umi_statistics)], ids=["uma", "umi"])
def test_delay_spread_and_clusters_are_the_scenario_s(scenario, expected):
    users = list(scenario.users("train", 1500))
    gain, delay = torch.cat([u.gain for u in users]), torch.cat([u.delay for u in users])
    statistics = expected(2.4e9, False)
    assert gain.shape[1] == statistics.clusters * 20
    weight = gain.abs().square()
    assert 0.9 < weight.sum(1).mean() <= 1
    weight = weight / weight.sum(1, keepdim=True)
    mean = (weight * delay).sum(1, keepdim=True)
    spread = (weight * (delay - mean).square()).sum(1).sqrt()
    # Clusters' random powers put the spread of a draw off the parameter; the median over UEs follows it.
    assert spread.log10().median().item() == pytest.approx(statistics.delay_spread[0], abs=0.12)
    lengths = torch.cat([torch.cat([u.departure, u.arrival]) for u in users]).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("kmh", [10.0, 50.0, 100.0])
def test_the_doppler_spectrum_ends_at_the_speed(kmh):
    limit = kmh / 3.6 * UMA.carrier / SPEED_OF_LIGHT
    for users in UMA.users("train", 200):
        doppler = users.rays(torch.full((len(users),), kmh / 3.6, dtype=T), UMA.carrier).doppler
        assert doppler.abs().max() <= limit * (1 + 1e-12)
        assert doppler.abs().max() > 0.98 * limit
    # Of the channels themselves: over 512 slots, next to nothing lies beyond the limit and a window's leakage.
    times = torch.arange(512, dtype=T) * UMA.slot
    users = next(UMA.users("train", 50))
    rays = users.rays(torch.full((50,), kmh / 3.6, dtype=T), UMA.carrier)
    h = slot_channels(rays, UMA.array.positions[:1], SubcarrierGrid(1, 1.0), times)[:, 0, :, 0]
    spectrum = power(torch.fft.fft(h * torch.hann_window(512)), 0)
    frequency = torch.fft.fftfreq(512, UMA.slot).abs()
    outside = spectrum[frequency > limit + 3 / (512 * UMA.slot)].sum() / spectrum.sum()
    assert outside < 1e-4
    assert spectrum[(frequency > 0.5 * limit) & (frequency < limit)].sum() / spectrum.sum() > 0.2


def test_correlation_over_time_falls_with_speed_and_lag():
    table = {}
    for kmh in (10.0, 30.0, 60.0, 100.0):
        h, _ = prediction_channels("uma_nlos", "train", 400, speed_kmh=kmh, antennas=2)
        table[kmh] = [(h[:, :, lag:] * h[:, :, : 20 - lag].conj()).mean().real.item() for lag in (1, 2, 4)]
    rows = torch.tensor(list(table.values()))
    assert (rows.diff(dim=0) < 0).all() and (rows.diff(dim=1) < 0).all()
    # J0(2 pi f_D tau), f_D = 222 Hz at 100 km/h, is for arrivals from all sides in the plane; these have less spread.
    bessel = torch.tensor(
        [
            [torch.special.bessel_j0(torch.tensor(2 * math.pi * kmh / 3.6 * 2.4e9 / SPEED_OF_LIGHT * lag * 0.5e-3))]
            for kmh in table
            for lag in (1, 2, 4)
        ]
    ).view(4, 3)
    near = bessel > 0.7
    assert near.sum() >= 8
    assert ((rows - bessel)[near] > -0.01).all() and ((rows - bessel)[near] < 0.12).all()


def test_correlation_over_antennas_and_subcarriers():
    h, _ = prediction_channels("uma_nlos", "train", 150, speed_kmh=30, antennas=None)
    planes = h[:, :, 0, :].unflatten(1, (8, 16))
    vertical = correlation(planes[:, :-1], planes[:, 1:])
    far_vertical = correlation(planes[:, :-4], planes[:, 4:])
    # Each UE's rays come from its own direction: what neighbours share is seen UE by UE.
    per_ue = (planes[:, :, 1:] * planes[:, :, :-1].conj()).mean((1, 2, 3)).abs().mean()
    far = (planes[:, :, 8:] * planes[:, :, :-8].conj()).mean((1, 2, 3)).abs().mean()
    assert per_ue > 0.6 and far < 0.7 * per_ue
    assert vertical > far_vertical
    subcarrier = [correlation(h[..., lag:], h[..., : 48 - lag]) for lag in (1, 8, 24)]
    assert subcarrier[0] > 0.8 and subcarrier[0] > subcarrier[1] > subcarrier[2] and subcarrier[2] < 0.5


def test_the_two_scenarios_differ():
    uma, _ = prediction_channels("uma_nlos", "train", 3, speed_kmh=30)
    umi, _ = prediction_channels("umi_nlos", "train", 3, speed_kmh=30)
    assert (uma - umi).abs().max() > 0.1
    assert (UMA.bs_height, UMI.bs_height) == (25.0, 10.0)


def test_a_batch_of_one_link_draws_what_one_link_draws():
    statistics = uma_statistics(2.4e9, False)

    def draw(shape):
        rng = np.random.default_rng(3)
        spread = clusters.draw_spreads(rng, statistics, (0.5, 0.4), shape)
        delay, ranking, share = clusters.draw_clusters(rng, statistics, spread)
        azimuth = clusters.draw_azimuths(rng, ranking, spread["azimuth_arrival"], 15.0)
        zenith = clusters.draw_zeniths(rng, ranking, spread["zenith_arrival"], 0.375 * spread["zenith_departure_mean"])
        return [share, clusters.split_delays(delay, ranking, 5e-9), azimuth, zenith]

    for one, batch in zip(draw(()), draw((1,)), strict=True):
        assert batch.shape == (1, *one.shape)
        np.testing.assert_allclose(batch[0], one, rtol=1e-12)


def test_links_of_a_batch_are_scaled_one_by_one():
    # Two links that differ in their spreads alone, with the same random numbers: angles are proportional.
    share = np.array([[0.5, 0.3, 0.2] + [0.01] * 17] * 2)

    class Same:
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def choice(self, values, shape):
            return np.broadcast_to(self.rng.choice(values, shape[-1]), shape)

        def standard_normal(self, shape):
            return np.broadcast_to(self.rng.standard_normal(shape[-1]), shape)

        def permuted(self, values, axis):
            return np.zeros_like(values)

    angles = clusters.draw_azimuths(Same(), share, np.array([10.0, 40.0]), 2.0)
    np.testing.assert_allclose(angles[1], 4 * angles[0])


def test_the_description_names_every_field_and_changes_with_each():
    described = UMA.describe()
    assert json.loads(json.dumps(described)).keys() == described.keys()
    assert {"scenario", "carrier", "slot", "speed_kmh", "statistics", "seed"} <= described.keys()
    for changes in ({"slot": 1e-3}, {"seed": 1}, {"clusters": 19}, {"generator": "sionna"}, {"bs_height": 30.0}):
        assert multitask_set("uma_nlos", **changes).describe() != described
    assert UMA.unavailable() is None


def test_fewer_clusters_and_another_seed():
    smaller = multitask_set("uma_nlos", clusters=10)
    assert next(smaller.users("train", 2)).gain.shape == (2, 200)
    other = multitask_set("uma_nlos", seed=1).multiuser("train", 1, users=1)
    assert not torch.equal(other, multiuser_channels("uma_nlos", "train", 1, users=1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prediction_channels("uma", "train", 1), "name: expected one of uma_nlos, umi_nlos, got 'uma'"),
        (lambda: multiuser_channels("x", "train", 1), "name: expected one of uma_nlos, umi_nlos, got 'x'"),
        (
            lambda: prediction_channels("uma_nlos", "dev", 1),
            "split: expected one of train, validation, test, got 'dev'",
        ),
        (
            lambda: multiuser_channels("uma_nlos", "dev", 1),
            "split: expected one of train, validation, test, got 'dev'",
        ),
        (lambda: prediction_channels("uma_nlos", "train", 0), "count: expected at least 1, got 0"),
        (lambda: multiuser_channels("uma_nlos", "train", -3), "count: expected at least 1, got -3"),
        (lambda: multiuser_channels("uma_nlos", "train", 1, users=0), "users: expected at least 1, got 0"),
        (
            lambda: prediction_channels("uma_nlos", "train", 1, antennas=129),
            "antennas: expected None or 1 to 128, got 129",
        ),
        (lambda: prediction_channels("uma_nlos", "train", 1, antennas=0), "antennas: expected None or 1 to 128, got 0"),
        (
            lambda: prediction_channels("uma_nlos", "train", 1, speed_kmh=-1),
            "speed_kmh: expected None or a number of at least 0, got -1",
        ),
        (
            lambda: prediction_channels("uma_nlos", "train", 1, speed_kmh=math.nan),
            "speed_kmh: expected None or a number of at least 0, got nan",
        ),
        (
            lambda: prediction_channels("uma_nlos", "train", 1, generator="quadriga"),
            "generator: expected builtin or sionna, got 'quadriga'",
        ),
        (lambda: multitask_set("uma_nlos", scenario="inh"), "scenario: expected one of umi, uma, rma, got 'inh'"),
        (lambda: multitask_set("uma_nlos", slot=0.0), "slot: expected a positive number, got 0.0"),
        (lambda: multitask_set("uma_nlos", future=0), "future: expected at least 1, got 0"),
        (
            lambda: multitask_set("uma_nlos", distance=(50.0, 20.0)),
            "distance: expected two numbers in order, of at least 1.0, got 50.0 and 20.0",
        ),
        (
            lambda: multitask_set("uma_nlos", clusters=21),
            "clusters: expected None or one of 10, 11, 12, 19, 20, got 21",
        ),
        (lambda: multitask_set("uma_nlos", seed=-1), "seed: expected at least 0, got -1"),
        (
            lambda: multitask_set("uma_nlos", clusters=20, generator="sionna"),
            "clusters: expected None, since Sionna has 38.901's, got 20",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


def test_without_sionna_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'csikernels[sionna]'" in multitask_set("uma_nlos", generator="sionna").unavailable()
    monkeypatch.setitem(__import__("sys").modules, "sionna", None)
    monkeypatch.setitem(__import__("sys").modules, "sionna.phy", None)
    with pytest.raises(ModuleNotFoundError, match=r"csikernels\[sionna\]"):
        prediction_channels("uma_nlos", "train", 1, generator="sionna")


@needs_sionna
@pytest.mark.sionna
def test_sionna_draws_ues_of_the_same_statistics():
    h, speed = prediction_channels("uma_nlos", "test", 200, speed_kmh=60.0, generator="sionna")
    again, _ = prediction_channels("uma_nlos", "test", 200, speed_kmh=60.0, generator="sionna")
    assert torch.equal(h, again)
    torch.testing.assert_close(power(h, (1, 2, 3)), torch.ones(200), rtol=1e-5, atol=0)
    own, speeds = prediction_channels("uma_nlos", "test", 200, speed_kmh=60.0)
    assert torch.equal(speed, speeds) and not torch.equal(h, own)
    for lag in (1, 2, 3):
        over_time = [(x[:, :, lag:] * x[:, :, : 20 - lag].conj()).mean().real.item() for x in (h, own)]
        assert over_time[0] == pytest.approx(over_time[1], abs=0.06)
    assert correlation(h[..., 1:], h[..., :-1]) == pytest.approx(correlation(own[..., 1:], own[..., :-1]), abs=0.05)
    sionna = next(multitask_set("uma_nlos", generator="sionna").users("test", 20))
    assert torch.equal(sionna.position, next(UMA.users("test", 20)).position)
    assert sionna.gain.shape == (20, 400)
