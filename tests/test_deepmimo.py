"""DeepMIMO scenario folders: rays and channels against the sum over paths by hand, and folders that are damaged."""

import json
import math

import numpy as np
import pytest
import scipy.io
import torch

from csimodels.channels.deepmimo import read_scenario
from csimodels.channels.rays import SPEED_OF_LIGHT, AntennaArray, DelayTaps, SubcarrierGrid

PAIR = "t001_tx000_r000"
CARRIER = 3.4e9
ARRAY, GRID = AntennaArray.ula(4), SubcarrierGrid(16, 10e6)


def matrices(users=5, paths=3):
    """User 1 has no paths, user 3 one less than the others."""
    rng = np.random.default_rng(0)
    values = {
        "power": rng.uniform(-120, -80, (users, paths)),
        "phase": rng.uniform(-180, 180, (users, paths)),
        "delay": rng.uniform(0.2e-6, 1.5e-6, (users, paths)),
        "aod_az": rng.uniform(-180, 180, (users, paths)),
        "aod_el": rng.uniform(60, 120, (users, paths)),
        "aoa_az": rng.uniform(-180, 180, (users, paths)),
        "aoa_el": rng.uniform(60, 120, (users, paths)),
    }
    for matrix in values.values():
        matrix[1] = np.nan
        matrix[3, -1] = np.nan
    return {name: matrix.astype(np.float32) for name, matrix in values.items()} | {
        "rx_pos": rng.uniform(0, 100, (users, 3)).astype(np.float32)
    }


def save(folder, values, pair=PAIR, kind="npz"):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({"rt_params": {"frequency": CARRIER}, "txrx_sets": {}}))
    for name, matrix in values.items():
        if kind == "npz":
            np.savez_compressed(folder / f"{name}_{pair}.npz", **{name: matrix})
        else:
            scipy.io.savemat(folder / f"{name}_{pair}.mat", {name: matrix})
    return folder


def by_hand(values, user, paths, first=0.0):
    """``[antenna, subcarrier]``: the sum over paths, for an array along y."""
    h = np.zeros((len(ARRAY), GRID.subcarriers), dtype=complex)
    for path in paths:
        get = {name: float(values[name][user, path]) for name in values if name != "rx_pos"}
        cosine = math.sin(math.radians(get["aod_el"])) * math.sin(math.radians(get["aod_az"]))
        steering = np.exp(1j * np.pi * np.arange(len(ARRAY)) * cosine)
        response = np.exp(-2j * np.pi * GRID.frequencies.numpy() * (get["delay"] - first))
        amplitude = 10 ** (get["power"] / 20) * np.exp(1j * math.radians(get["phase"]))
        h += amplitude * np.outer(steering, response)
    return h


def relative_error(got, expected):
    return np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["npz", "mat"])
def test_channels_are_the_sum_over_paths(tmp_path, kind):
    values = matrices()
    scenario = read_scenario(save(tmp_path / "o1", values, kind=kind), align=False)
    assert scenario.carrier == CARRIER and scenario.rays.doppler is None
    assert scenario.users.tolist() == [0, 2, 3, 4]
    torch.testing.assert_close(scenario.positions, torch.from_numpy(values["rx_pos"][[0, 2, 3, 4]]).double())
    h = scenario.channels(ARRAY, GRID)
    assert h.dtype == torch.complex64 and h.shape == (4, 4, 16)
    for row, user in enumerate([0, 2, 3, 4]):
        assert relative_error(h[row], by_hand(values, user, range(2 if user == 3 else 3))) < 1e-5


def test_delays_count_from_the_first_path(tmp_path):
    values = matrices()
    h = read_scenario(save(tmp_path / "o1", values)).channels(ARRAY, GRID)
    first = float(np.nanmin(values["delay"][4]))
    assert relative_error(h[3], by_hand(values, 4, range(3), first)) < 1e-5


def test_the_strongest_paths_are_kept(tmp_path):
    values = matrices()
    values["power"][0] = [-100, -90, -80]
    h = read_scenario(save(tmp_path / "o1", values), max_paths=2, align=False).channels(ARRAY, GRID)
    assert relative_error(h[0], by_hand(values, 0, [1, 2])) < 1e-5


def test_channels_in_the_delay_domain(tmp_path):
    scenario = read_scenario(save(tmp_path / "o1", matrices()))
    expected = torch.fft.ifft(scenario.channels(ARRAY, GRID), norm="ortho")[..., :6]
    got = scenario.channels(ARRAY, DelayTaps(GRID, 6))
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_speed_turns_every_path_by_its_doppler_shift(tmp_path):
    values = matrices()
    scenario = read_scenario(save(tmp_path / "o1", values), speed_kmh=30.0, seed=3)
    largest = 30 / 3.6 * CARRIER / SPEED_OF_LIGHT
    doppler = scenario.rays.doppler
    there = scenario.rays.gain.abs() > 0
    assert doppler.abs().max() <= largest and doppler[there].abs().max() > 0.3 * largest
    # Two paths of one user have one direction of movement: their shifts give it, and the third path's shift agrees.
    azimuth, zenith = (np.deg2rad(values[name][0].astype(np.float64)) for name in ("aoa_az", "aoa_el"))
    order = np.argsort(-values["power"][0])
    arrival = np.stack([np.sin(zenith) * np.cos(azimuth), np.sin(zenith) * np.sin(azimuth)], axis=1)[order]
    velocity = np.linalg.solve(arrival[:2], doppler[0, :2].numpy())
    assert np.linalg.norm(velocity) == pytest.approx(largest) and arrival[2] @ velocity == pytest.approx(
        doppler[0, 2].item()
    )
    still = scenario.channels(ARRAY, GRID)
    assert torch.equal(still, read_scenario(tmp_path / "o1").channels(ARRAY, GRID))
    # With one path, time turns the whole channel by one phase.
    single = read_scenario(tmp_path / "o1", max_paths=1, speed_kmh=30.0, seed=3)
    turn = torch.polar(torch.ones(4, 1, dtype=torch.float64), 2 * math.pi * 1e-3 * single.rays.doppler)
    expected = single.channels(ARRAY, GRID) * turn[..., None].to(torch.complex64)
    torch.testing.assert_close(single.channels(ARRAY, GRID, elapsed=1e-3), expected, rtol=1e-4, atol=1e-10)
    assert not torch.allclose(scenario.channels(ARRAY, GRID, elapsed=1e-3), still, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="doppler"):
        read_scenario(tmp_path / "o1").channels(ARRAY, GRID, elapsed=1e-3)


def test_a_pair_is_chosen_by_name(tmp_path):
    folder = save(tmp_path / "o1", matrices())
    save(folder, matrices(users=6), pair="t001_tx001_r000")
    assert len(read_scenario(folder, "t001_tx001_r000").users) == 5
    with pytest.raises(ValueError, match="pair: expected one of t001_tx000_r000, t001_tx001_r000, got none"):
        read_scenario(folder)
    with pytest.raises(ValueError, match="got 't002_tx000_r000'"):
        read_scenario(folder, "t002_tx000_r000")


def test_a_scene_of_a_dynamic_scenario(tmp_path):
    scene = save(tmp_path / "scene_0", matrices())
    (scene / "params.json").rename(tmp_path / "params.json")
    assert read_scenario(scene).carrier == CARRIER


# Damaged folders ------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_scenario(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        read_scenario(tmp_path)
    folder = save(tmp_path / "o1", {})
    with pytest.raises(ValueError, match=r"power_t001_tx000_r000\.npz, got none"):
        read_scenario(folder)
    save(folder, matrices())
    (folder / f"phase_{PAIR}.npz").unlink()
    with pytest.raises(FileNotFoundError, match=f"phase_{PAIR}.npz"):
        read_scenario(folder)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"rt_params": {"frequency": "x"}}', '{"rt_params": {"frequency": -1}}']
)
def test_a_carrier_that_cannot_be_read(tmp_path, content):
    folder = save(tmp_path / "o1", matrices())
    (folder / "params.json").write_text(content)
    with pytest.raises(ValueError, match=r"rt_params\.frequency"):
        read_scenario(folder)


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_truncated_matrices_are_refused(tmp_path, kept):
    folder = save(tmp_path / "o1", matrices())
    path = folder / f"delay_{PAIR}.npz"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match="expected an array delay"):
        read_scenario(folder)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("delay", lambda m: m[:, :2], r"delay: expected \(5, 3\) as power, got \(5, 2\)"),
        ("rx_pos", lambda m: m[:4], r"\(4, 3\)"),
        ("phase", lambda m: np.where(m == m[2, 1], np.nan, m), "phase: not finite at user 2, path 1"),
        ("power", lambda m: m * np.nan, "expected users with paths, got none of 5"),
        ("power", lambda m: m.astype(complex), "power: expected real numbers"),
    ],
)
def test_matrices_that_do_not_fit_are_named(tmp_path, name, change, message):
    values = matrices()
    with pytest.raises(ValueError, match=message):
        read_scenario(save(tmp_path / "o1", values | {name: change(values[name])}))


@pytest.mark.parametrize("options", [{"max_paths": 0}, {"speed_kmh": -1.0}, {"speed_kmh": math.nan}])
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        read_scenario(save(tmp_path / "o1", matrices()), **options)
