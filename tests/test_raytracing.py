"""Ray-traced users: Sionna RT's arrays as rays, whom a site takes and whom it leaves out, and Sionna RT itself."""

import dataclasses
import math
import subprocess

import numpy as np
import pytest
import torch
from command_line import refuse, succeed

from csimodels.channels import raytracing
from csimodels.channels.angle_delay import angle_delay
from csimodels.channels.angle_delay_sets import RAYTRACED
from csimodels.channels.hdf5 import ChannelReader
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, Rays, SubcarrierGrid, synthesize
from csimodels.channels.raytracing import RayTracedSite, rays_of_paths

CARRIER = 3.4e9
SITE = RayTracedSite(area=(-10.0, 0.0, 10.0, 30.0), spacing=1.0)
missing = raytracing.missing()
traced = [pytest.mark.raytracing, pytest.mark.skipif(missing is not None, reason=str(missing))]


def paths():
    """Arrays of Sionna RT's shapes; user 1 has no path, user 2 lacks the second."""
    users, found, rng = 4, 3, np.random.default_rng(0)
    angles = {
        name: rng.uniform(low, high, (users, 1, found)).astype(np.float32)
        for name, low, high in (
            ("theta_t", 0.5, 2.5),
            ("phi_t", -3.0, 3.0),
            ("theta_r", 0.5, 2.5),
            ("phi_r", -3.0, 3.0),
        )
    }
    valid = np.ones((users, 1, found), dtype=bool)
    valid[1], valid[2, 0, 1] = False, False
    tau = rng.uniform(2e-7, 1e-6, (users, 1, found)).astype(np.float32)
    a = rng.standard_normal((2, users, 1, 1, 1, found, 1)).astype(np.float32) * 1e-5
    return {"a": (a[0] + 1j * a[1]), "tau": np.where(valid, tau, -1), **angles, "valid": valid}


def heading():
    azimuth = np.linspace(0, 3, 4)
    return np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros(4)], axis=1)


def convert(arrays, max_paths=3):
    return rays_of_paths(**arrays, carrier=CARRIER, heading=heading(), max_paths=max_paths)


# Conversion -----------------------------------------------------------------------------------------------------------


def test_rays_make_the_channel_that_sionna_s_formula_makes():
    arrays, array, grid = paths(), AntennaArray.ula(4), SubcarrierGrid(8, 10e6)
    h = synthesize(convert(arrays), array, grid, dtype=torch.complex128)
    for user in (0, 2, 3):
        expected = torch.zeros(4, 8, dtype=torch.complex128)
        there = arrays["valid"][user, 0]
        first = arrays["tau"][user, 0][there].min()
        for path in np.flatnonzero(there):
            theta, phi = float(arrays["theta_t"][user, 0, path]), float(arrays["phi_t"][user, 0, path])
            steering = torch.exp(1j * math.pi * torch.arange(4) * math.sin(theta) * math.sin(phi))
            delay = float(arrays["tau"][user, 0, path]) - float(first)
            response = torch.exp(-2j * math.pi * grid.frequencies * delay)
            expected += complex(arrays["a"][user, 0, 0, 0, path, 0]) * torch.outer(steering, response)
        torch.testing.assert_close(h[user], expected, rtol=1e-5, atol=1e-10)
    assert (h[1] == 0).all()


def test_the_strongest_paths_are_kept_and_missing_ones_filled_up():
    arrays = paths()
    rays = convert(arrays, max_paths=2)
    magnitudes = np.where(arrays["valid"][:, 0], np.abs(arrays["a"][:, 0, 0, 0, :, 0]), 0)
    np.testing.assert_allclose(rays.gain.abs(), -np.sort(-magnitudes, axis=1)[:, :2], rtol=1e-6)
    wide = convert(arrays, max_paths=6)
    assert wide.gain.shape == (4, 6) and (wide.gain[:, 3:] == 0).all() and (wide.delay[:, 3:] == 0).all()
    grid, array = SubcarrierGrid(8, 10e6), AntennaArray.ula(4)
    torch.testing.assert_close(synthesize(wide, array, grid), synthesize(convert(arrays), array, grid))


def test_nobody_is_reached():
    arrays = paths()
    empty = {name: value[:, :, :, :, :0] if name == "a" else value[:, :, :0] for name, value in arrays.items()}
    rays = convert(empty, max_paths=2)
    assert rays.gain.shape == (4, 2) and (rays.gain == 0).all() and rays.delay.isfinite().all()


def test_doppler_is_that_of_one_metre_per_second():
    arrays = paths()
    arrays["theta_r"][:], arrays["phi_r"][0, 0] = np.float32(math.pi / 2), [0.0, np.pi / 2, np.pi]
    rays = convert(arrays)
    order = np.argsort(-np.abs(arrays["a"][0, 0, 0, 0, :, 0]))
    # User 0 moves along x: towards the first path's origin, across the second, away from the third.
    expected = np.array([1.0, 0.0, -1.0])[order] * CARRIER / SPEED_OF_LIGHT
    np.testing.assert_allclose(rays.doppler[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["a", "tau", "phi_r", "valid"])
def test_other_shapes_are_refused(name):
    arrays = paths()
    arrays[name] = np.concatenate([arrays[name]] * 2, axis=1)
    with pytest.raises(ValueError, match=rf"{name}: expected \[4, 1"):
        convert(arrays)


# Sites ----------------------------------------------------------------------------------------------------------------


class FakeTracer:
    """A quarter of the points is indoors, half the others in sight; every third traced one is not reached."""

    def __init__(self):
        self.calls = 0

    def look(self, positions):
        x, y = np.floor(positions[:, 0]).astype(int), np.floor(positions[:, 1]).astype(int)
        return (x % 2 == 0) | (y % 2 == 0), y % 4 < 2

    def trace(self, positions, headings):
        self.calls += 1
        gain = torch.zeros(len(positions), 2, dtype=torch.complex128)
        gain[:, 0] = torch.from_numpy((np.floor(positions[:, 0] + positions[:, 1]).astype(int) % 3 > 0) * 1.0)
        direction = torch.zeros(len(positions), 2, 3, dtype=torch.float64)
        doppler = torch.from_numpy(headings[:, :2].copy())
        return Rays(gain, torch.zeros(len(positions), 2, dtype=torch.float64), direction, doppler)


@pytest.fixture
def fake(monkeypatch):
    tracer = FakeTracer()
    monkeypatch.setattr(raytracing, "_tracer", lambda site: tracer)
    return tracer


def test_splits_have_disjoint_points_and_cover_all():
    splits = [SITE.points(split) for split in raytracing.SPLITS]
    assert sorted(np.concatenate(splits)) == list(range(20 * 30))
    assert [len(points) for points in splits] == [300, 150, 150]
    again = SITE.points("test", draw=1)
    assert sorted(again) == sorted(splits[2]) and list(again) != list(splits[2])
    assert list(SITE.points("train")) == list(splits[0])
    assert list(dataclasses.replace(SITE, seed=1).points("train")) != list(splits[0])
    place = SITE.positions(np.arange(600))
    assert (place.min(0) > [-10, 0, 1.4]).all() and (place.max(0) < [10, 30, 1.6]).all()
    assert len(np.unique(place, axis=0)) == 600
    np.testing.assert_allclose(np.linalg.norm(SITE.headings(np.arange(600)), axis=1), 1)


@pytest.mark.parametrize("los", [True, False, None])
def test_who_is_not_reached_or_not_suitable_is_left_out_and_counted(fake, monkeypatch, los):
    monkeypatch.setattr(raytracing, "_TRACED", 7)
    monkeypatch.setattr(raytracing, "_LOOKED_AT", 40)
    site = dataclasses.replace(SITE, los=los)
    users = site.users("train", 30)
    points = site.points("train")
    place = site.positions(points)
    outdoors, sighted = fake.look(place)
    suitable = outdoors & ((sighted == los) if los is not None else True)
    reached = suitable & (fake.trace(place, site.headings(points)).gain[:, 0].numpy() != 0)
    last = np.flatnonzero(reached)[29] + 1
    np.testing.assert_array_equal(users.positions, place[reached][:30])
    assert users.rays.gain.shape == (30, 2)
    np.testing.assert_allclose(users.rays.doppler, site.headings(points[reached][:30])[:, :2])
    assert users.left_out == {
        "indoors": (~outdoors)[:last].sum(),
        "other_state": (outdoors & ~suitable)[:last].sum(),
        "unreached": (suitable & ~reached)[:last].sum(),
    }
    # Fewer users are the first of more, however many are traced at a time.
    monkeypatch.setattr(raytracing, "_TRACED", 512)
    torch.testing.assert_close(site.users("train", 11).positions, users.positions[:11])


def test_a_site_without_enough_users_says_how_many_it_has(fake):
    with pytest.raises(ValueError, match=r"count: expected at most \d+ UEs \(test\) that rays reach, got 151"):
        SITE.users("test", 151)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SITE.points("val"), "split: expected one of train, validation, test, got 'val'"),
        (lambda: SITE.points("test", -1), "draw: expected at least 0, got -1"),
        (lambda: RayTracedSite(spacing=0.0), "spacing: expected a positive number"),
        (lambda: RayTracedSite(max_depth=-1), "max_depth: expected at least 0"),
        (lambda: RayTracedSite(area=(0.0, 0.0, 0.1, 5.0)), "area: expected room for 2 x 2 points"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What is not there ----------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(raytracing.importlib.util, "find_spec", lambda name: None)
    expected = "Sionna RT is not installed; it comes with the extra: pip install 'csikernels[raytracing]'"
    raytracing._tracer.cache_clear()
    with pytest.raises(ImportError) as error:
        RAYTRACED.sample("test", 1)
    assert str(error.value) == expected
    said = refuse("generate", tmp_path / "x.h5", "--channels", "raytraced")
    assert said == f"channels: raytraced: {expected}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code, text, expected",
    [
        (0, "", None),
        (-6, "x\nLLVM ERROR: Cannot select: 0x1: f32 = fmaximum\nIn function: f", "LLVM ERROR: Cannot select"),
        (1, "ImportError: the LLVM backend is inactive", "the LLVM backend is inactive"),
        (1, "", "no message"),
    ],
)
def test_an_llvm_that_does_not_work_is_named(monkeypatch, code, text, expected):
    monkeypatch.setattr(raytracing.importlib.util, "find_spec", lambda name: name)
    done = subprocess.CompletedProcess([], code, "", text)
    monkeypatch.setattr(raytracing.subprocess, "run", lambda *arguments, **options: done)
    raytracing._probed.cache_clear()
    try:
        said = raytracing.missing()
    finally:
        raytracing._probed.cache_clear()
    if expected is None:
        assert said is None
    else:
        assert said is not None and expected in said
        assert "extra raytracing" in said and "LLVM newer than 16" in said and "DRJIT_LIBLLVM_PATH" in said


def test_generate_writes_the_set_that_it_is_asked_for(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(raytracing, "missing", lambda: None)
    output = succeed("generate", tmp_path / "site.h5", "--channels", "raytraced", "--samples", 3, "--split", "train")
    assert "wrote 3 samples of raytraced (train)" in output
    with ChannelReader(tmp_path / "site.h5") as reader:
        assert torch.equal(reader.read(), RAYTRACED.frequency("train", 3))
        assert reader.parameters["left_out"] == RAYTRACED.users("train", 3).left_out
        assert not reader.los.any() and set(reader.environment) == {1}
    said = refuse("generate", tmp_path / "x.h5", "--channels", "raytraced", "--environments", "1")
    assert said.startswith("channels: expected no --environments")
    said = refuse("generate", tmp_path / "x.h5", "--channels", "raytraced", "--split", "all")
    assert said == "split: expected one of train, validation, test, got 'all'"


# Sionna RT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Munich with fewer rays shot."""
    return dataclasses.replace(RAYTRACED, site=dataclasses.replace(RAYTRACED.site, samples=3000))


@pytest.mark.parametrize("los", [pytest.param(False, marks=traced), pytest.param(True, marks=traced)])
def test_users_of_munich(small, los):
    site = dataclasses.replace(small.site, los=los)
    users = site.users("test", 20)
    assert (users.rays.gain[:, 0] != 0).all() and set(users.left_out) == {"indoors", "other_state", "unreached"}
    distance = (users.positions - torch.tensor(site.bs)).norm(dim=1)
    free_space = SPEED_OF_LIGHT / site.carrier / (4 * math.pi * distance)
    ratio = users.rays.gain.abs().amax(1) / free_space
    if los:
        # The direct path, here the first and the strongest, is known in closed form.
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=0)
        assert (users.rays.delay[:, 0] == 0).all()
        direction = (users.positions - torch.tensor(site.bs)) / distance[:, None]
        torch.testing.assert_close(users.rays.direction[:, 0], direction, rtol=0, atol=1e-5)
    else:
        assert (ratio < 0.99).all()


@pytest.mark.parametrize("repeat", [pytest.param(0, marks=traced)])
def test_traced_samples_are_reproducible_and_disjoint(small, repeat):
    h = small.sample("test", 6)
    assert h.shape == (6, 2, 32, 32) and h.isfinite().all()
    expected, kept = angle_delay(small.frequency("test", 6))
    expected *= (1024 / expected.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
    torch.testing.assert_close(h, expected, rtol=0, atol=2e-4)
    assert (kept > 0.9).all()
    raytracing._tracer.cache_clear()
    torch.testing.assert_close(dataclasses.replace(small, name="again").sample("test", 4), h[:4])
    positions = [{tuple(row.tolist()) for row in small.users(split, 20).positions} for split in raytracing.SPLITS]
    assert len(set.union(*positions)) == 60
    moved = dataclasses.replace(small, speed_kmh=1.0).sample("test", 6)
    assert 1e-6 < (moved - h).square().sum() / h.square().sum() < 1
