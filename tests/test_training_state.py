"""A run that stops at any step continues from its last state as if nothing had been; other states are refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from line_training import Interrupted, Line, interrupt_at, line_config, line_trainer, scripted
from tiny_training import CODEC, MODEL, TRAIN, log_without_times, names, saved_state, train, weights

from csimodels.files import save_tensors

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run_dir, CONTINUED)
    return run_dir


CONTINUED = dataclasses.replace(TRAIN, initial_candidate=True, patience=2)


@pytest.mark.parametrize("stop", [1, 4, 5, 15, 16, 30, 44])
def test_interrupted_and_continued_equals_unbroken(tmp_path, unbroken, stop):
    with pytest.raises(Interrupted):
        train(tmp_path, CONTINUED, on_step=interrupt_at(stop))
    steps = []
    train(tmp_path, CONTINUED, on_step=lambda step, *_: steps.append(step))
    last_state = max(step for step in (0, 4, 8, 12, 15, 16, 20, 24, 28, 30, 32, 36, 40, 44) if step < stop)
    assert steps == list(range(last_state + 1, 46))
    actual, expected = weights(tmp_path), weights(unbroken)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert log_without_times(tmp_path) == log_without_times(unbroken)


def test_groups_and_scales_continue(tmp_path, accelerator):
    def build():
        model = torch.nn.Sequential(Line(1.0), Line(0.5))
        groups = [
            {"params": list(model[0].parameters())},
            {"params": list(model[1].parameters()), "lr_scale": 3.0, "weight_decay": 0.0},
        ]
        return model, {"groups": groups, "validate": lambda network: 1.0 / (1 + abs(network[0].weight.item()))}

    config = line_config(save_every=2)
    unbroken, options = build()
    line_trainer(accelerator, config, model=unbroken, **options).fit()
    model, options = build()
    with pytest.raises(Interrupted):
        line_trainer(accelerator, config, model=model, run_dir=tmp_path, on_step=interrupt_at(5), **options).fit()
    model, options = build()
    result = line_trainer(accelerator, config, model=model, run_dir=tmp_path, **options).fit()
    assert result.steps == 9
    assert [line.weight.item() for line in model] == [line.weight.item() for line in unbroken]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(tmp_path)
    before = weights(tmp_path)
    steps = []
    second = train(tmp_path, on_step=lambda *arguments: steps.append(arguments))
    assert steps == []
    assert second == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_an_early_stopped_run_stays_stopped(tmp_path, accelerator):
    config = line_config(epochs=6, patience=2)
    values = [1.0, 2.0, 3.0]
    first = line_trainer(accelerator, config, run_dir=tmp_path, validate=scripted(values, [])).fit()
    second = line_trainer(accelerator, config, run_dir=tmp_path, validate=scripted([], [])).fit()
    assert first.epochs == second.epochs == 3
    assert second.best_epoch == 1


def test_state_is_written_every_so_many_steps(tmp_path):
    states = []

    def on_step(step: int, total: int, loss: float) -> None:
        if (tmp_path / "state.safetensors").exists():
            state = saved_state(tmp_path)
            states.append((step, state["step"], state["epoch"], state["step_in_epoch"]))

    train(tmp_path, dataclasses.replace(TRAIN, epochs=2, save_every=7), on_step=on_step)
    # Before step 8 there is none; a state comes after steps 7, 14, 21, 28 and at the end of each epoch of 15 steps.
    assert states[0] == (8, 7, 0, 7)
    assert states[7] == (15, 14, 0, 14)
    assert states[8] == (16, 15, 1, 0)
    assert states[-1] == (30, 28, 1, 13)


def test_without_a_folder_nothing_is_written(tmp_path, accelerator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line_trainer(accelerator, line_config()).fit()
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [{"learning_rate": 1e-2}, {"epochs": 9}, {"seed": 8}, {"batch_size": 8}])
def test_state_of_another_training_is_refused(tmp_path, change):
    with pytest.raises(Interrupted):
        train(tmp_path, on_step=interrupt_at(6))
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"state\.safetensors: belongs to another run .* this one is .* remove the file"
    ):
        train(tmp_path, dataclasses.replace(TRAIN, **change))
    assert (tmp_path / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": dataclasses.replace(MODEL, feedforward=40)},
        {"codec": dataclasses.replace(CODEC, codeword_length=16)},
    ],
)
def test_state_of_another_model_is_refused(tmp_path, change):
    with pytest.raises(Interrupted):
        train(tmp_path, on_step=interrupt_at(6))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path, **change)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, None])
def test_state_that_is_not_whole_is_refused(tmp_path, content):
    with pytest.raises(Interrupted):
        train(tmp_path, on_step=interrupt_at(6))
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable safetensors file"):
        train(tmp_path)


def test_foreign_file_in_the_state_s_place_is_refused(tmp_path):
    save_tensors(tmp_path / "state.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"belongs to another run \(None\)"):
        train(tmp_path)


def test_fingerprint_must_be_json(accelerator, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        line_trainer(accelerator, line_config(), run_dir=tmp_path, fingerprint={"path": Path("x")})


def test_processes_that_see_different_states_are_refused(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "gather", lambda tensor: torch.cat([tensor, tensor + 4]))
    with pytest.raises(ValueError, match=r"run_dir: expected a folder that all processes see, .* of steps \[0, 4\]"):
        line_trainer(accelerator, line_config(), run_dir=tmp_path)
