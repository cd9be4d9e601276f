"""The data of LASCO's experiments: sizes, splits, and files that can be made again from what they say."""

import dataclasses
import importlib.util

import pytest
import torch

from csimodels.channels.disc import CellConfig
from csimodels.channels.environment import Environment
from csimodels.channels.hdf5 import ChannelReader
from csimodels.channels.presets import (
    LAPTOP,
    PAPER,
    data_preset,
    generate_dataset,
    make_environment,
    split_811,
)
from csimodels.channels.rays import AntennaArray, SubcarrierGrid

CELL = CellConfig(array=AntennaArray.ula(4), grid=SubcarrierGrid(6, 10e6), patches=2)


def test_paper_is_the_paper():
    assert data_preset("paper") is PAPER
    environments = [*PAPER.pretraining, *PAPER.adaptation]
    assert environments == list(range(1, 111)) and not PAPER.fresh_positions
    assert PAPER.pretraining_samples == sum(PAPER.adaptation_samples) == 10_000
    training, validation, test = PAPER.adaptation_samples
    assert training == 8 * validation == 8 * test
    assert (PAPER.cell.carrier, PAPER.cell.radius, PAPER.cell.disc_radius) == (2.655e9, 200.0, 5.0)
    assert PAPER.cell.grid == SubcarrierGrid(32, 70e6) and PAPER.cell.array == AntennaArray.ula(32)
    assert [Environment(PAPER.cell, index, 0).los for index in (101, 102)] == [False, True]


@pytest.mark.parametrize("preset", [PAPER, LAPTOP], ids=lambda preset: preset.name)
def test_no_environment_has_two_uses(preset):
    uses = [set(preset.pretraining), set(preset.validation), set(preset.adaptation)]
    assert len(set.union(*uses)) == sum(map(len, uses))
    # Both states are adapted to, half and half.
    assert sum(index % 2 for index in preset.adaptation) * 2 == len(preset.adaptation)


def test_laptop():
    assert data_preset("laptop") is LAPTOP and LAPTOP.fresh_positions
    assert list(LAPTOP.pretraining) == list(range(1, 1001)) and LAPTOP.pretraining_samples == 100
    assert LAPTOP.adaptation[0] == 1101 and LAPTOP.cell == PAPER.cell


def test_presets_are_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAPTOP.name = "other"
    assert dataclasses.replace(LAPTOP) == LAPTOP != PAPER


def test_unknown_preset():
    with pytest.raises(ValueError, match="expected paper or laptop, got 'server'"):
        data_preset("server")


@pytest.mark.parametrize("count", [10, 19, 1000, 10_007])
def test_split(count):
    parts = split_811(count, seed=3)
    assert [len(part) for part in parts[1:]] == [count // 10] * 2
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))
    assert all(torch.equal(a, b) for a, b in zip(parts, split_811(count, seed=3), strict=True))
    assert not torch.equal(torch.cat(parts), torch.cat(split_811(count, seed=4)))


def test_split_is_random():
    # Of 1,000 permuted samples, a tenth of the first hundred is in the validation split.
    assert 2 <= (split_811(1000, 0)[1] < 100).sum() <= 22


def test_nothing_to_split():
    with pytest.raises(ValueError, match="at least 10 samples.*got 9"):
        split_811(9, 0)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_environments(tmp_path):
    calls = []
    count = generate_dataset(
        tmp_path / "x.h5", CELL, 7, range(3, 6), 20, progress=lambda done, total: calls.append((done, total))
    )
    assert count == 60 and calls == [(1, 3), (2, 3), (3, 3)]
    with ChannelReader(tmp_path / "x.h5") as file:
        assert file.generator == "builtin" and file.seed == 7
        assert file.environment.tolist() == [3] * 20 + [4] * 20 + [5] * 20
        assert file.los.tolist() == [False] * 20 + [True] * 20 + [False] * 20
        for index in (3, 4, 5):
            assert torch.equal(file.read(file.environment == index), Environment(CELL, index, 7).sample(20))


def test_a_file_can_be_made_again_from_what_it_says(tmp_path):
    generate_dataset(tmp_path / "x.h5", CELL, 7, [2, 9], 5, options={"los": True})
    with ChannelReader(tmp_path / "x.h5") as file:
        made = file.parameters
        cell = CellConfig.from_dict(made["cell"])
        assert cell == CELL
        generate_dataset(
            tmp_path / "again.h5",
            cell,
            file.seed,
            made["indices"],
            made["per_environment"],
            generator=file.generator,
            options=made["options"],
        )
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "x.h5").read_bytes()


def test_an_interruption_leaves_the_old_file_and_the_next_call_ends_as_if_there_was_none(tmp_path):
    path = tmp_path / "x.h5"
    generate_dataset(path, CELL, 1, [1], 5)
    old = path.read_bytes()

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(path, CELL, 2, [1, 2, 3], 5, progress=interrupt)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    generate_dataset(path, CELL, 2, [1, 2, 3], 5)
    generate_dataset(tmp_path / "unbroken.h5", CELL, 2, [1, 2, 3], 5)
    assert path.read_bytes() == (tmp_path / "unbroken.h5").read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"indices": []}, "indices"),
        ({"indices": [1, 2, 1]}, "indices: .*each once"),
        ({"indices": [1, 0]}, "index: expected at least 1, got 0"),
        ({"per_environment": 0}, "per_environment"),
        ({"generator": "quadriga"}, "expected builtin or sionna, got 'quadriga'"),
        ({"generator": "sionna", "options": {"scenario": "indoor"}}, "scenario"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_leave_no_file(tmp_path, changes, message):
    arguments = {"cell": CELL, "seed": 0, "indices": [1], "per_environment": 2} | changes
    with pytest.raises(ValueError, match=message):
        generate_dataset(tmp_path / "x.h5", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sionna
@pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="Sionna is not installed (extra `sionna`)")
def test_a_file_from_sionna(tmp_path):
    options = {"scenario": "uma", "spec_version": "19.2"}
    generate_dataset(tmp_path / "x.h5", CELL, 7, [1, 2], 4, generator="sionna", options=options)
    with ChannelReader(tmp_path / "x.h5") as file:
        assert file.generator == "sionna" and file.parameters["options"] == options
        expected = [make_environment("sionna", CELL, index, 7, **options).sample(4) for index in (1, 2)]
        assert torch.equal(file.read(), torch.cat(expected))
