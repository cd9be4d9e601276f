"""A user's files as sets of LLMCsiNet's experiments: reading, splits, what identifies them, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import scipy.io
import torch
from command_line import refuse, succeed
from test_deepmimo import matrices, save

from csimodels.channels.angle_delay import angle_delay
from csimodels.channels.angle_delay_sets import ANGLE_DELAY_SETS, angle_delay_preset
from csimodels.channels.channel_files import find_files
from csimodels.channels.deepmimo import read_scenario
from csimodels.channels.hdf5 import write_channels
from csimodels.channels.rays import AntennaArray, SubcarrierGrid
from csimodels.evaluation import llmcsinet_experiments, llmcsinet_settings
from csimodels.evaluation.llmcsinet_runs import FeedbackTask
from csimodels.evaluation.outcome import Context
from csimodels.training.llmcsinet_presets import Channels, feedback_preset

SIZES = dataclasses.replace(feedback_preset("laptop"), batch_size=4)


def save_cost2100(path, samples, seed=0):
    """Every sample has its strongest element at angle 3, delay 5, and a size of its own."""
    rng = np.random.default_rng(seed)
    h = 0.5 + 0.02 * rng.standard_normal((samples, 2, 32, 32)).clip(-3, 3)
    h[:, 0, 3, 5] = 0.9
    scipy.io.savemat(path, {"HT": h.reshape(samples, -1)})


def cost2100(folder, ending="out", counts=(12, 5, 6)):
    folder.mkdir(exist_ok=True)
    for seed, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        save_cost2100(folder / f"DATA_H{split}{ending}.mat", count, seed)
    return folder


def save_hdf5(path, samples, seed=0, shape=(32, 40)):
    h = torch.randn(samples, *shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    with write_channels(
        path, antennas=shape[0], subcarriers=shape[1], generator="test", parameters={}, seed=0
    ) as writer:
        writer.append(h, environment=1, los=False)
    return h


# Reading --------------------------------------------------------------------------------------------------------------


def test_cost2100_files_become_rows_of_delay(tmp_path):
    files = find_files("mine", cost2100(tmp_path / "data"))
    assert (files.kind, files.available, files.frozen) == ("cost2100", (12, 5, 6), False)
    stored = scipy.io.loadmat(tmp_path / "data" / "DATA_Hvalout.mat")["HT"].reshape(5, 2, 32, 32) - 0.5
    got = files.sample("validation", 4)
    assert got.shape == (4, 2, 32, 32) and got.dtype == torch.float32
    torch.testing.assert_close(got.square().sum(dim=(1, 2, 3)), torch.full((4,), 1024.0))
    expected = torch.from_numpy(stored[:4]).transpose(2, 3)
    expected = expected * (1024 / expected.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
    assert divmod(int(got[0, 0].argmax()), 32) == (5, 3)
    assert files.kept_energy("test", 3) is None


def test_indoor_files_freeze_and_the_name_tells_two_sets_apart(tmp_path):
    cost2100(cost2100(tmp_path / "data"), "in", (8, 4, 4))
    indoor, outdoor = find_files("in", tmp_path / "data"), find_files("cost2100out", tmp_path / "data")
    assert (indoor.available, indoor.frozen) == ((8, 4, 4), True)
    assert (outdoor.available, outdoor.frozen) == ((12, 5, 6), False)
    with pytest.raises(ValueError, match="mine: expected a name that ends in in or out, since .* has files of both"):
        find_files("mine", tmp_path / "data")
    (tmp_path / "data" / "DATA_Hvalout.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"DATA_Htrainout.mat, DATA_Hvalout.mat, .*, DATA_Hvalout.mat missing"):
        find_files("cost2100out", tmp_path / "data")


def test_one_file_is_cut_into_disjoint_splits(tmp_path):
    save_cost2100(tmp_path / "DATA_Htestin.mat", 23)
    files = find_files("mine", tmp_path / "DATA_Htestin.mat")
    assert (files.available, files.frozen) == ((13, 5, 5), True)
    parts = [
        files.sample(split, count) for split, count in zip(("train", "validation", "test"), (13, 5, 5), strict=True)
    ]
    assert len(torch.cat(parts).unique(dim=0)) == 23
    assert torch.equal(files.sample("test", 3), parts[2][:3])
    with pytest.raises(ValueError, match="test: expected 1 to 5 samples of mine, got 6"):
        files.sample("test", 6)


def test_project_files_are_transformed_and_their_energy_known(tmp_path):
    h = {
        split: save_hdf5(tmp_path / f"{split}.h5", 6, seed)
        for seed, split in enumerate(("train", "validation", "test"))
    }
    files = find_files("mine", tmp_path)
    assert (files.kind, files.available, files.frozen) == ("hdf5", (6, 6, 6), False)
    expected, kept = angle_delay(h["test"][:4])
    got = files.sample("test", 4)
    torch.testing.assert_close(got, expected * (1024 / expected.square().sum((1, 2, 3), keepdim=True)).sqrt())
    torch.testing.assert_close(files.kept_energy("test", 4), kept)
    single = save_hdf5(tmp_path / "site.h5", 17, 3)
    site = find_files("mine", tmp_path / "site.h5")
    assert site.available == (9, 4, 4)
    _, all_kept = angle_delay(single)
    values = torch.cat([site.kept_energy(split, n) for split, n in (("train", 9), ("validation", 4), ("test", 4))])
    torch.testing.assert_close(values.sort().values, all_kept.sort().values)


def test_deepmimo_folders_and_pairs(tmp_path):
    folder = save(tmp_path / "o1", matrices(users=18))
    files = find_files("o1", folder)
    assert (files.kind, files.available, files.frozen, files.moves) == ("deepmimo", (9, 4, 4), True, True)
    h = read_scenario(folder).channels(AntennaArray.ula(32), SubcarrierGrid(1024, 10e6))
    images, kept = angle_delay(h)
    images = images * (1024 / images.square().sum((1, 2, 3), keepdim=True)).sqrt()
    for split, count in (("train", 9), ("validation", 4), ("test", 4)):
        got = files.sample(split, count)
        # Every sample is that of some user, and no two of the same.
        nearest = (got[:, None] - images[None]).square().sum((2, 3, 4)).min(1)
        assert (nearest.values < 1e-2).all() and len(nearest.indices.unique()) == count
        torch.testing.assert_close(files.kept_energy(split, count), kept[nearest.indices])
    still, moved = files.sample("test", 4), files.sample("test", 4, speed_kmh=30.0)
    assert (moved - still).square().sum() > 1
    save(tmp_path / "o1", matrices(users=18), pair="t001_tx000_r001")
    with pytest.raises(ValueError, match="expected one of t001_tx000_r000, t001_tx000_r001, got none"):
        find_files("o1", folder)
    chosen = find_files("o1", folder / "t001_tx000_r000")
    assert torch.equal(chosen.sample("test", 4), still) and chosen.digest == files.digest


# Identity -------------------------------------------------------------------------------------------------------------


def test_the_key_depends_on_the_content_not_on_the_place(tmp_path):
    folder = cost2100(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    sets = [SIZES.with_channels([f"mine={tmp_path / place}"]).channel_set("mine") for place in "ab"]
    task = FeedbackTask("x", SIZES.baseline("crnet", 8), sets[0], 8, "f", tests=(sets[0],))
    other = dataclasses.replace(task, channels=sets[1], tests=(sets[1],))
    assert sets[0].key() == sets[1].key() and task.key() == other.key() and task.run_dir() == other.run_dir()
    assert sets[0].training_data(tmp_path / "cache").description == sets[1].described()
    save_cost2100(tmp_path / "b" / "DATA_Hvalout.mat", 5, seed=9)
    changed = SIZES.with_channels([f"mine={tmp_path / 'b'}"]).channel_set("mine")
    again = dataclasses.replace(task, channels=changed)
    assert changed.key() != sets[0].key() and again.key() != task.key() and again.run_dir() != task.run_dir()


@pytest.mark.parametrize("name", ["outdoor_nlos", "indoor_los", "uma_28ghz", "raytraced"])
def test_the_key_of_a_named_set_depends_on_what_the_name_stands_for(name, monkeypatch):
    channels = Channels(name, 2000, 300, 1000)
    described, key = channels.described(), channels.key()
    assert json.loads(json.dumps(described)) == described
    assert key == Channels(name, 2000, 300, 1000).key()
    for change in ({"train": 1999}, {"speed_kmh": 30.0}, {"mixed": True}):
        assert dataclasses.replace(channels, **change).key() != key
    monkeypatch.setitem(ANGLE_DELAY_SETS, name, angle_delay_preset(name, shift=3))
    assert channels.key() != key
    assert {**channels.described(), "definition": described["definition"]} == described


# Presets --------------------------------------------------------------------------------------------------------------


def test_a_preset_takes_files_beside_named_sets(tmp_path):
    sizes = SIZES.with_channels(["outdoor_nlos", f"mine={cost2100(tmp_path / 'data', 'in')}"])
    assert sizes.channels == ("outdoor_nlos", "mine")
    chosen = sizes.channel_set("mine")
    assert (chosen.train, chosen.validation, chosen.test) == (12, 5, 6)
    assert sizes.channel_set("outdoor_nlos") == SIZES.channel_set("outdoor_nlos")
    assert [stage.frozen for stage in sizes.llmcsinet("S", 8, "mine").stages] == [False, True]
    assert [stage.frozen for stage in sizes.llmcsinet("S", 8, "outdoor_nlos").stages] == [False, False]
    assert sizes.transfer == (12,)
    splits = chosen.load(tmp_path / "cache")
    assert {split: len(h) for split, h in splits.items()} == {"train": 12, "validation": 5, "test": 6}
    with pytest.raises(ValueError, match="train: expected at most 12 samples of mine, got 13"):
        sizes.channel_set("mine", train=13)
    with pytest.raises(ValueError, match="speed_kmh: mine has files of still channels, got 30 km/h"):
        sizes.channel_set("mine", speed_kmh=30.0)


def test_moving_and_still_samples_alternate_for_deepmimo(tmp_path):
    sizes = SIZES.with_channels([f"o1={save(tmp_path / 'o1', matrices(users=18))}"])
    still, mixed = sizes.channel_set("o1").draw(), sizes.channel_set("o1", speed_kmh=30.0, mixed=True).draw()
    same = [torch.equal(a, b) for a, b in zip(still["train"], mixed["train"], strict=True)]
    assert same == [True, False] * 4 + [True]
    assert not any(torch.equal(a, b) for a, b in zip(still["test"], mixed["test"], strict=True))


def test_fewer_training_samples_than_a_batch_are_refused(tmp_path):
    save_cost2100(tmp_path / "few.mat", 17)
    with pytest.raises(ValueError, match=r"few.mat: expected at least 10 training samples, a batch, got 9"):
        dataclasses.replace(SIZES, batch_size=10).with_channels([f"mine={tmp_path / 'few.mat'}"])


@pytest.mark.parametrize(
    "sets, message",
    [
        (["indoor_los", "indoor_los"], "channels: expected names that differ, got indoor_los, indoor_los"),
        (["indoor"], "name: expected one of indoor_los, outdoor_nlos, uma_28ghz, raytraced, got 'indoor'"),
        (["indoor_los=x"], "expected NAME=PATH with a name .* that is not indoor_los, .*, got 'indoor_los'"),
        (["a b=x"], "expected NAME=PATH"),
    ],
)
def test_names_that_make_no_sense_are_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        SIZES.with_channels(sets)


# Commands -------------------------------------------------------------------------------------------------------------


def refused(path, name="mine"):
    return refuse("experiment", "llmcsinet-table3", "--channels", f"{name}={path}", "--out", path.parent / "out")


def test_bad_files_take_one_line(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path}/empty: expected DATA_Htrainin.mat, DATA_Hvalin.mat and ")
    scipy.io.savemat(tmp_path / "x.mat", {"H": np.zeros((3, 3))})
    assert refused(tmp_path / "x.mat") == f"{tmp_path}/x.mat: expected a variable HT, got H"
    save_cost2100(tmp_path / "few.mat", 15)
    assert refused(tmp_path / "few.mat") == f"{tmp_path}/few.mat: expected at least 16 samples to cut 2:1:1, got 15"
    said = refused(cost2100(tmp_path / "short", counts=(40, 3, 4)))
    assert said == f"{tmp_path}/short/DATA_Hvalout.mat: expected at least 4 samples (validation), got 3"
    save_hdf5(tmp_path / "small.h5", 20, shape=(16, 40))
    said = refused(tmp_path / "small.h5")
    assert said == f"{tmp_path}/small.h5: expected 32 antennas and at least 32 subcarriers, got 16 and 40"
    (tmp_path / "out.h5").write_bytes(b"no HDF5")
    assert refused(tmp_path / "out.h5").startswith(f"{tmp_path}/out.h5: not an HDF5 file")
    said = refuse("experiment", "lasco-fig6", "--channels", "indoor_los", "--out", tmp_path / "out")
    assert said == "channels: expected none for LASCO's experiments, whose environments are the preset's"
    said = refuse("experiment", "llmcsinet-fig11", "--channels", "indoor_los", "--out", tmp_path / "out")
    assert said == "channels: expected two sets to transfer between, got indoor_los"


@pytest.mark.usefixtures("small_models")
def test_an_experiment_on_files_from_the_command_to_its_table(tmp_path, monkeypatch):
    folder = cost2100(tmp_path / "data", counts=(16, 8, 8))
    save_hdf5(tmp_path / "site.h5", 32)
    preset = dataclasses.replace(SIZES, epochs=1, batch_size=8, compressions=(64,), variants=())
    monkeypatch.setattr(llmcsinet_settings, "feedback_preset", lambda name: preset)
    original = llmcsinet_settings.Settings
    monkeypatch.setattr(
        llmcsinet_settings,
        "Settings",
        lambda *arguments, **fields: original(*arguments, **{**fields, "baselines": ("idasnet",)}),
    )
    sets = ["--channels", f"mine={folder}", "--channels", f"site={tmp_path / 'site.h5'}"]
    succeed("experiment", "llmcsinet-fig5", *sets, "--out", tmp_path / "out", "--workers", 1)
    rows = json.loads((tmp_path / "out" / "llmcsinet-fig5.json").read_text())["rows"]
    assert {(row["channels"], row["train_samples"]) for row in rows} == {("mine", 16), ("site", 16)}
    assert [row["channels"] for row in rows if row["label"] == "IdasNet"] == ["mine", "site"]
    report = (tmp_path / "out" / "llmcsinet-fig5.md").read_text()
    assert "mine, 1/64" in report and "site, 1/64" in report
    kept = find_files("site", tmp_path / "site.h5").kept_energy("test", 8).mean()
    assert f"Energy that the delay rows keep: mine not known, site {kept:.1%}." in report


def test_settings_take_the_context_s_channels(tmp_path):
    context = Context(
        "laptop", tmp_path, channels=("indoor_los", f"mine={cost2100(tmp_path / 'd', counts=(40, 4, 4))}")
    )
    s = llmcsinet_settings.settings(context)
    assert s.sizes.channels == ("indoor_los", "mine") and s.outdoor == "indoor_los"
    assert "mine not known" in llmcsinet_experiments._kept_energy(s, 2)
