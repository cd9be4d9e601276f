"""The channels of LVM4CF: their form, what determines them, their two polarisations, and how alike a site's are."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from command_line import refuse, succeed

from csimodels.channels.codebook_data import (
    CODEBOOK_SETS,
    codebook_channels,
    codebook_set,
    element_amplitude,
)
from csimodels.channels.disc import CellConfig
from csimodels.channels.environment import Environment
from csimodels.channels.hdf5 import ChannelReader
from csimodels.channels.raytracing import SPLITS
from csimodels.channels.scenarios import SCENARIOS, rma_statistics, uma_statistics
from csimodels.evaluation import lvm4cf_runs
from csimodels.evaluation.lvm4cf_runs import ChannelSet, CodebookTask
from csimodels.models.codebooks import PortLayout
from csimodels.training.k_lines import k_lines
from csimodels.training.lvm4cf_presets import codebook_preset

FEW = codebook_set("uma_28ghz_site", discs=3)


# Form and what determines it ------------------------------------------------------------------------------------------


def test_the_presets_find_their_sets():
    for name in ("laptop", "paper"):
        preset = codebook_preset(name)
        assert {preset.site, *preset.environments} <= set(CODEBOOK_SETS)
    site, pooled = CODEBOOK_SETS["uma_28ghz_site"], CODEBOOK_SETS["uma_28ghz"]
    assert len(site.sites) == 1 and len(pooled.sites) == 100 and not set(site.sites) & set(pooled.sites)
    assert dataclasses.replace(site, name=pooled.name, sites=pooled.sites) == pooled


@pytest.mark.parametrize("name", list(CODEBOOK_SETS))
def test_form_of_the_channels(name):
    h = codebook_channels(name, "validation", 9)
    assert h.shape == (9, len(PortLayout(2, 8, 8))) and h.dtype == torch.complex64 and h.isfinite().all()
    torch.testing.assert_close(torch.linalg.vector_norm(h, dim=1), torch.ones(9))


def test_the_arguments_alone_determine_the_channels():
    h = FEW.sample("train", 10, draw=1)
    assert torch.equal(codebook_set("uma_28ghz_site", discs=3).sample("train", 10, draw=1), h)
    others = [FEW.sample("train", 10), FEW.sample("test", 10, draw=1), FEW.sample("validation", 10, draw=1)]
    others.append(codebook_set("uma_28ghz", discs=3, sites=range(1, 2)).sample("train", 10, draw=1))
    for other in others:
        assert (h @ other.mH).abs().max() < 0.999


def test_no_two_splits_or_draws_share_a_position():
    positions, environment = [], FEW.place(0, 1).environment
    original = environment.displacements

    def recorded(count, *, seed):
        positions.append(original(count, seed=seed))
        return positions[-1]

    environment.displacements = recorded
    try:
        for split in SPLITS:
            for draw in (0, 1, 2):
                FEW.sample(split, 60, draw=draw)
    finally:
        del environment.displacements
    assert [len(drawn) for drawn in positions] == [20] * 9
    assert len(np.unique(np.concatenate(positions), axis=0)) == 180
    assert np.linalg.norm(np.concatenate(positions), axis=1).max() <= 5


def test_few_samples_are_of_all_sites():
    pooled = codebook_set("rma_28ghz", sites=range(4, 7), discs=5)
    assert pooled._positions_per_place(8) == [1] * 8
    h = pooled.sample("test", 6)
    expected = torch.cat([pooled.place(site, disc).sample(1, seed=2) for disc in range(2) for site in range(3)])
    # The same channels in an order of chance.
    overlap = (h @ expected.mH).abs()
    assert (overlap > 1 - 1e-5).sum() == 6 and (overlap.argmax(1).unique()).numel() == 6
    assert sum(pooled._positions_per_place(32)) == 32 and set(pooled._positions_per_place(32)) == {2, 3}


def test_ports_are_polarisation_major_and_rows_first():
    """A single ray: the vertical phase step is between rows, the horizontal one between columns."""
    place = FEW.place(0, 0)
    place = type(place)(place.environment, (7.0, 3.0))
    direction = torch.tensor([0.8, 0.36, -0.48], dtype=torch.float64)
    place.departure = direction.expand_as(place.departure)
    h = place.sample(1, seed=0)[0].view(2, 8, 8)
    vertical, horizontal = (np.exp(1j * math.pi * cosine) for cosine in (-0.48, 0.36))
    np.testing.assert_allclose(h[:, 1:] / h[:, :-1], np.full((2, 7, 8), vertical), atol=1e-4)
    np.testing.assert_allclose(h[:, :, 1:] / h[:, :, :-1], np.full((2, 8, 7), horizontal), atol=1e-4)


# Polarisations --------------------------------------------------------------------------------------------------------


def test_cross_polarisation_of_the_rays():
    """Vertical and horizontal components of all rays: 7 dB apart in the mean, with a deviation of 3 dB."""
    gains = torch.cat([codebook_set("uma_28ghz_site").place(0, disc).gain for disc in range(12)], dim=1)
    vertical, horizontal = gains[0] + gains[1], gains[0] - gains[1]
    ratio = 20 * (vertical.abs() / horizontal.abs()).log10()
    error = 3 / math.sqrt(len(ratio))
    assert ratio.mean().item() == pytest.approx(7, abs=4 * error)
    assert ratio.std().item() == pytest.approx(3, abs=4 * error)
    # Independent phases: their difference has no direction.
    turn = vertical * horizontal.conj()
    assert (turn / turn.abs()).mean().abs() < 4 / math.sqrt(len(ratio))


@pytest.mark.parametrize("name", ["uma_28ghz", "rma_3.5ghz"])
def test_cross_polarisation_of_the_channels(name):
    def powers(h):
        components = h[:, :64] + h[:, 64:], h[:, :64] - h[:, 64:]
        return torch.stack([part.abs().square().sum() for part in components])

    pooled = codebook_set(name, sites=range(1, 16), discs=4)
    places = [pooled.place(site, disc) for site in range(15) for disc in range(4)]
    faded = sum(powers(place.channels(50, seed=0)) for place in places)
    # The mean of 1 / kappa of a normal X in dB: its own dB are off the mean of X by half its variance.
    expected = 7 - 3**2 * math.log(10) / 20
    assert 10 * (faded[0] / faded[1]).log10().item() == pytest.approx(expected, abs=0.5)
    # Unit norm weighs deep fades of the stronger component more. With Rayleigh fading of one direction the shares have
    # a closed form, and channels of several directions lie in between.
    r = 10 ** (expected / 10)
    share = (r / (r - 1) * math.log(r) - 1) / (r - 1)
    unit = powers(pooled.sample("test", 3000))
    assert 10 * math.log10(1 / share - 1) - 0.3 < 10 * (unit[0] / unit[1]).log10().item() < expected
    slanted = sum(place.gain.abs().square().sum(1) for place in places)
    assert (slanted[0] / slanted[1]).item() == pytest.approx(1, abs=0.05)


def test_power_of_the_rays_is_kept():
    place = FEW.place(0, 2)
    (rays,) = place.environment.ray_sets
    kept = (place.gain / element_amplitude(place.departure)).abs().square().sum(0)
    vertical = (place.gain[0] + place.gain[1]) / math.sqrt(2) / element_amplitude(place.departure)
    torch.testing.assert_close(vertical, rays.gain)  # the rays' own phases are those of vertical to vertical
    assert (kept > rays.gain.abs().square()).all()


def test_element_pattern():
    """38.901, Table 7.3-1: 3 dB down at half of 65 degrees, both cuts added, 30 dB at most."""
    half, third = math.radians(32.5), math.radians(20)
    directions = torch.tensor(
        [
            [1, 0, 0],
            [math.cos(half), math.sin(half), 0],
            [math.cos(half), 0, -math.sin(half)],
            [math.cos(third) ** 2, math.cos(third) * math.sin(third), math.sin(third)],
            [-1, 0, 0],
        ],
        dtype=torch.float64,
    )
    expected = [0, -3, -3, -2 * 12 * (20 / 65) ** 2, -30]
    assert (20 * element_amplitude(directions).log10()).tolist() == pytest.approx(expected, abs=1e-9)


def test_discs_are_turned_into_the_sector():
    turned = set()
    for disc in range(20):
        place = codebook_set("uma_28ghz_site").place(0, disc)
        (rays,) = place.environment.ray_sets
        x, y, _ = place.environment.centre
        angle = -round(math.degrees(math.atan2(y, x)) / 120) * 120
        turned.add(angle)
        assert abs(math.degrees(math.atan2(y, x)) + angle) <= 60
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rotation = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
        torch.testing.assert_close(place.departure, rays.departure @ rotation.T)
    assert turned == {-120, 0, 120}


# Sites ----------------------------------------------------------------------------------------------------------------


def test_a_site_has_structure():
    """Words fitted to a site serve its other users better than words of other sites, and those better than chance."""
    pooled = codebook_set("uma_28ghz", sites=range(1, 21), discs=4)
    site = codebook_set("uma_28ghz_site", discs=4)
    test = site.sample("test", 300)

    def served(words):
        return (test @ words.mH).abs().amax(1).mean().item()

    own, others = (k_lines(one.sample("train", 1000), 5, seed=0, iterations=10).words for one in (site, pooled))
    chance = k_lines(torch.randn(40, 128, dtype=torch.complex64), 5, seed=0, iterations=1).words
    assert served(own) > served(others) + 0.05 > served(chance) + 0.1

    def energy(h):
        return torch.linalg.eigvalsh(h.mH @ h)[-16:].sum() / h.abs().square().sum()

    assert energy(site.sample("train", 1000)) > energy(pooled.sample("train", 1000)) + 0.02


# Statistics -----------------------------------------------------------------------------------------------------------


def test_uma_statistics_are_those_of_the_standard():
    """38.901, Table 7.5-6, UMa; of several frequencies, at 10 GHz, where log10(fc) is 1."""
    table = dataclasses.asdict(uma_statistics(10e9, False))
    assert table == {
        "clusters": 20,
        "delay_spread": pytest.approx((-6.484, 0.39)),
        "azimuth_departure": pytest.approx((1.3856, 0.28)),
        "azimuth_arrival": pytest.approx((1.81, 0.11)),
        "zenith_arrival": pytest.approx((1.1884, 0.16)),
        "rician_db": None,
        "delay_scaling": 2.3,
        "cluster_delay": pytest.approx(3.1538e-9),
        "cluster_azimuth_departure": 2.0,
        "cluster_azimuth_arrival": 15.0,
        "correlation": (0.4, 0.6, 0.4, 0.0, 0.0, 0.0),
        "cross_polarisation_db": (7.0, 3.0),
        "cluster_zenith_arrival": 7.0,
        "cluster_shadowing_db": 3.0,
    }
    assert uma_statistics(3.5e9, False) == uma_statistics(6e9, False) != uma_statistics(6.1e9, False)
    assert uma_statistics(100e9, False).cluster_delay == 0.25e-9


def test_rma_statistics_are_those_of_the_standard():
    table = dataclasses.asdict(rma_statistics(28e9, False))
    assert table == {
        "clusters": 10,
        "delay_spread": (-7.43, 0.48),
        "azimuth_departure": (0.95, 0.45),
        "azimuth_arrival": (1.52, 0.13),
        "zenith_arrival": (0.58, 0.37),
        "rician_db": None,
        "delay_scaling": 1.7,
        "cluster_delay": 3.91e-9,
        "cluster_azimuth_departure": 2.0,
        "cluster_azimuth_arrival": 3.0,
        "correlation": (-0.4, 0.0, 0.0, 0.0, 0.0, 0.0),
        "cross_polarisation_db": (7.0, 3.0),
        "cluster_zenith_arrival": 3.0,
        "cluster_shadowing_db": 3.0,
    }
    assert rma_statistics(3.5e9, False) == rma_statistics(28e9, False)


def test_zeniths_of_departure():
    """38.901, Tables 7.5-7 and 7.5-9, at 100 m and, for UMa, 10 GHz."""
    uma = SCENARIOS["uma"].zenith_departure(10e9, False, 100.0, 25.0, 1.5)
    assert uma.spread == pytest.approx((0.69, 0.49))
    assert uma.offset == pytest.approx(1.7 - 10 ** (2 * -0.574 + 1.9))
    assert SCENARIOS["uma"].zenith_departure(3.5e9, False, 5000.0, 25.0, 1.5).spread[0] == -0.5
    rma = SCENARIOS["rma"].zenith_departure(10e9, False, 100.0, 25.0, 3.5)
    assert rma.spread == pytest.approx((0.241, 0.30))
    assert rma.offset == pytest.approx(math.degrees(math.atan(0.315) - math.atan(0.335)))
    for scenario in SCENARIOS.values():
        assert scenario.zenith_departure(10e9, True, 100.0, 25.0, 1.5).offset == 0


@pytest.mark.sionna
@pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="Sionna is not installed (extra `sionna`)")
@pytest.mark.parametrize("los, suffix", [(True, "LoS"), (False, "NLoS")])
@pytest.mark.parametrize("scenario, label", [("umi", "UMi"), ("uma", "UMa"), ("rma", "RMa")])
def test_statistics_are_those_of_sionna(scenario, label, los, suffix):
    from importlib import resources

    folder = resources.files("sionna.phy.channel.tr38901") / "models" / "v16_1"
    table = json.loads((folder / f"{label}_{suffix}.json").read_text())
    ours = SCENARIOS[scenario].statistics(28e9, los)
    for field, name in {
        "delay_spread": "DS",
        "azimuth_departure": "ASD",
        "azimuth_arrival": "ASA",
        "zenith_arrival": "ZSA",
    }.items():
        expected = [
            table[f"{kind}{name}a"] * math.log10(table[f"{kind}{name}b"] + 28) + table[f"{kind}{name}c"]
            for kind in ("mu", "sigma")
        ]
        assert getattr(ours, field) == pytest.approx(expected), field
    pairs = ("ASDvsDS", "ASAvsDS", "ASDvsASA", "DSvsK", "ASDvsK", "ASAvsK")
    assert list(ours.correlation) == [table[f"corr{pair}"] for pair in pairs]
    assert ours.cross_polarisation_db == (table["muXPR"], table["sigmaXPR"])
    assert ours.rician_db == ((table["muK"], table["sigmaK"]) if los else None)
    assert (ours.clusters, ours.delay_scaling) == (table["numClusters"], table["rTau"])
    within = ours.cluster_azimuth_departure, ours.cluster_azimuth_arrival, ours.cluster_zenith_arrival
    assert within == (table["cASD"], table["cASA"], table["cZSA"])
    assert ours.cluster_shadowing_db == table["zeta"]


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("los", [False, True])
def test_environments_of_every_scenario_follow_their_table(scenario, los):
    cell = CellConfig(28e9, bs_height=25.0, min_distance=35.0, radius=250.0)
    table = SCENARIOS[scenario].statistics(cell.carrier, los)
    environments = [Environment(cell, index, 0, los=los, scenario=scenario) for index in range(1, 101)]
    for name in ("delay", "azimuth_arrival", "azimuth_departure", "zenith_arrival"):
        mean, deviation = getattr(table, "delay_spread" if name == "delay" else name)
        drawn = np.log10([environment.spreads[name] for environment in environments])
        # Four standard errors of a median of 100; caps cut the deviation alone.
        assert np.median(drawn) == pytest.approx(mean, abs=4 * 1.25 * deviation / 10)
    # At most all rays of all clusters, and their directions are unit vectors.
    for environment in environments[:5]:
        (rays,) = environment.ray_sets
        assert len(rays.gain) % 20 == 0 and len(rays.gain) <= 20 * table.clusters
        torch.testing.assert_close(rays.departure.norm(dim=1), torch.ones(len(rays.gain), dtype=torch.float64))


# Sets as channels of the experiments ----------------------------------------------------------------------------------


def test_another_definition_is_another_set_of_channels(tmp_path, monkeypatch):
    few = ChannelSet("uma_28ghz_site", 6, 2, 2)
    first = few.load(tmp_path)
    assert torch.equal(first["test"], codebook_channels("uma_28ghz_site", "test", 2))
    task = CodebookTask("RVQ", "rvq", 3, PortLayout(), few, few, str(tmp_path))
    before = few.key(), task.run_dir(), task.key()
    assert before == (few.key(), task.run_dir(), task.key())
    changed = codebook_set("uma_28ghz_site", sites=range(200, 201))
    monkeypatch.setitem(lvm4cf_runs.CODEBOOK_SETS, "uma_28ghz_site", changed)
    after = few.key(), task.run_dir(), task.key()
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert torch.equal(few.load(tmp_path)["test"], changed.sample("test", 2))
    assert not torch.equal(few.load(tmp_path)["test"], first["test"])


def test_descriptions_are_json_and_tell_sets_apart():
    sets = [*CODEBOOK_SETS.values(), FEW, codebook_set("uma_28ghz_site", generator="sionna")]
    described = {json.dumps(one.describe(), sort_keys=True) for one in sets}
    assert len(described) == len(sets)


@pytest.mark.sionna
@pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="Sionna is not installed (extra `sionna`)")
def test_sionna_draws_the_rays():
    sionna = codebook_set("uma_28ghz_site", generator="sionna", discs=2)
    assert sionna.unavailable() is None
    h = sionna.sample("train", 6)
    assert h.shape == (6, 128) and torch.equal(h, sionna.sample("train", 6))
    torch.testing.assert_close(torch.linalg.vector_norm(h, dim=1), torch.ones(6))
    ours, theirs = FEW.place(0, 0).environment, sionna.place(0, 0).environment
    assert np.array_equal(ours.centre, theirs.centre) and type(ours) is not type(theirs)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: codebook_channels("umi", "train", 1), "name: expected one of uma_28ghz_site, .*, got 'umi'"),
        (lambda: codebook_channels("uma_28ghz", "all", 1), "split: expected one of train, validation, test, got 'all'"),
        (lambda: codebook_channels("uma_28ghz", "train", 0), "count: expected at least 1, got 0"),
        (lambda: codebook_channels("uma_28ghz", "train", 1, draw=-1), "draw: expected at least 0, got -1"),
        (lambda: codebook_set("uma_28ghz", discs=0), "discs: expected at least 1, got 0"),
        (lambda: codebook_set("uma_28ghz", sites=range(0)), "sites: expected seeds of at least 0"),
        (lambda: codebook_set("uma_28ghz", scenario="inh"), "scenario: expected one of umi, uma, rma, got 'inh'"),
        (lambda: codebook_set("uma_28ghz", generator="x"), "generator: expected builtin or sionna, got 'x'"),
        (lambda: codebook_set("uma_28ghz", cell=CellConfig()), "cell: expected one patch and one subcarrier"),
        (lambda: Environment(CellConfig(), 1, 0, scenario="inf"), "scenario: expected one of umi, uma, rma, got 'inf'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_set_is_written_from_the_command_line(tmp_path):
    path = tmp_path / "ports.h5"
    out = succeed("generate", path, "--channels", "codebook:uma_28ghz_site", "--samples", 12, "--split", "train")
    assert f"wrote 12 samples of codebook:uma_28ghz_site (train) to {path}" in out
    with ChannelReader(path) as reader:
        assert (reader.antennas, reader.subcarriers) == (128, 1)
        assert torch.equal(reader.read()[:, :, 0], codebook_channels("uma_28ghz_site", "train", 12))
    message = refuse("generate", tmp_path / "no.h5", "--channels", "codebook:moon")
    assert "name: expected one of uma_28ghz_site" in message
    assert not (tmp_path / "no.h5").exists()
