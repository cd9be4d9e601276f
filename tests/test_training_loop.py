"""The training loop in one process: it learns, repeats itself, stops in time, keeps the best, and refuses."""

import dataclasses
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from line_training import Line, line_config, line_trainer, scripted
from tiny_training import CODEC, MODEL, TRAIN, channels, log_without_times, saved_state, train, weights

from csimodels.channels.source import FixedSource
from csimodels.files import load_tensors
from csimodels.training.loop import TrainConfig, make_accelerator, supports_bf16
from csimodels.training.pretrain import PretrainTask, pretrain
from csimodels.training.schedule import warmup_cosine

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# It learns, and the same way every time -------------------------------------------------------------------------------


def test_loss_and_validation_fall(tmp_path):
    result = train(tmp_path)
    losses = [entry["loss"] for entry in result.history]
    validations = [entry["validation"] for entry in result.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert validations[-1] < validations[0] < 1.0  # dB; the zero estimate has 0
    assert result.best_validation == min(validations)
    assert (result.epochs, result.steps, result.best_epoch) == (3, 45, 3)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]


def test_same_seed_same_weights(tmp_path):
    train(tmp_path / "first")
    torch.randn(100)  # the caller's draws do not matter
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_without_times(tmp_path / "first") == log_without_times(tmp_path / "second")


def test_another_seed_other_weights(tmp_path):
    config = dataclasses.replace(TRAIN, epochs=1)
    train(tmp_path / "first", config)
    train(tmp_path / "second", dataclasses.replace(config, seed=4))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert not torch.equal(first["input.weight"], second["input.weight"])


def test_every_sample_once_per_epoch_in_a_new_order(accelerator):
    seen: list[torch.Tensor] = []

    def loss(network, batch):
        seen.append(batch[0])
        return network(batch[0]).square().mean()

    data = (torch.arange(24.0),)
    line_trainer(accelerator, line_config(epochs=2), data=lambda epoch: data, loss=loss).fit()
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort().values, data[0])
    assert torch.equal(second.sort().values, data[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, data[0])


def test_adamw_step_by_hand(accelerator):
    """AdamW's first step moves every weight by the learning rate against its gradient's sign, after the decay."""
    config = line_config(epochs=1, batch_size=24, learning_rate=0.01, weight_decay=0.5)
    model = Line(start=1.0)
    line_trainer(accelerator, config, model=model).fit()
    assert model.weight.item() == pytest.approx(1.0 * (1 - 0.01 * 0.5) + 0.01, rel=1e-5)


def test_fresh_data_each_epoch(accelerator):
    epochs = []

    def data(epoch):
        epochs.append(epoch)
        x = torch.linspace(-1, 1, 24) * (epoch + 1)
        return x, 2 * x

    line_trainer(accelerator, line_config(), data=data).fit()
    assert epochs == [0, 1, 2]


def test_on_step_and_history(accelerator):
    steps = []
    result = line_trainer(accelerator, line_config(), on_step=lambda *arguments: steps.append(arguments)).fit()
    assert [(step, total) for step, total, _ in steps] == [(step, 9) for step in range(1, 10)]
    means = [sum(loss for _, _, loss in steps[i : i + 3]) / 3 for i in (0, 3, 6)]
    assert [entry["loss"] for entry in result.history] == pytest.approx(means, rel=1e-12)


# Learning rates -------------------------------------------------------------------------------------------------------


def rates_used(accelerator, config: TrainConfig, **options) -> list[list[float]]:
    used: list[list[float]] = []
    trainer = line_trainer(accelerator, config, on_step=lambda *_: used.append([]), **options)
    original = trainer.optimizer.step

    def step(*arguments, **keywords):
        used.append([group["lr"] for group in trainer.optimizer.param_groups])
        return original(*arguments, **keywords)

    trainer.optimizer.step = step
    trainer.fit()
    return [rates for rates in used if rates]


def test_constant_rate(accelerator):
    assert rates_used(accelerator, line_config()) == [[0.1]] * 9


def test_cosine_rate(accelerator):
    config = line_config(schedule="cosine", final_learning_rate=0.001, warmup_fraction=0.25)
    expected = [[warmup_cosine(step, 9, warmup_fraction=0.25, peak=0.1, final=0.001)] for step in range(9)]
    assert rates_used(accelerator, config) == expected


def test_groups_have_their_own_scale_and_are_left_alone(accelerator):
    model = torch.nn.Sequential(Line(1.0), Line(2.0))
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[1].parameters()), "lr_scale": 20.0, "weight_decay": 0.0},
    ]
    options = {"model": model, "groups": groups, "validate": lambda network: 0.0}
    assert rates_used(accelerator, line_config(learning_rate=0.001), **options) == [[0.001, 0.02]] * 9
    assert groups[1]["lr_scale"] == 20.0


def test_parameters_in_no_group_stay(accelerator):
    model = torch.nn.Sequential(Line(1.0), Line(2.0))
    groups = [{"params": list(model[0].parameters())}]
    line_trainer(accelerator, line_config(), model=model, groups=groups, validate=lambda network: 0.0).fit()
    assert model[1].weight.item() == 2.0
    assert model[0].weight.item() != 1.0


# Which weights stay ---------------------------------------------------------------------------------------------------


def test_best_weights_are_kept(accelerator):
    seen: list[float] = []
    model = Line()
    trainer = line_trainer(
        accelerator, line_config(epochs=4), model=model, validate=scripted([3.0, 1.0, 2.0, 1.5], seen)
    )
    result = trainer.fit()
    assert (result.best_epoch, result.best_validation, result.epochs) == (2, 1.0, 4)
    assert model.weight.item() == seen[1]
    assert len(set(seen)) == 4
    assert not model.training


def test_ties_keep_the_earlier_epoch(accelerator):
    result = line_trainer(accelerator, line_config(), validate=scripted([1.0, 1.0, 1.0], [])).fit()
    assert result.best_epoch == 1


def test_early_stopping(accelerator):
    values = [5.0, 4.0, 4.5, 4.2, 4.1, 1.0]
    result = line_trainer(accelerator, line_config(epochs=6, patience=3), validate=scripted(values, [])).fit()
    assert (result.epochs, result.best_epoch, result.best_validation) == (5, 2, 4.0)


def test_patience_is_renewed_by_every_improvement(accelerator):
    values = [5.0, 5.5, 4.0, 4.5, 3.0, 3.5]
    result = line_trainer(accelerator, line_config(epochs=6, patience=2), validate=scripted(values, [])).fit()
    assert (result.epochs, result.best_epoch) == (6, 5)


def test_initial_candidate(accelerator):
    seen: list[float] = []
    model = Line(start=0.25)
    config = line_config(epochs=9, patience=2, initial_candidate=True)
    trainer = line_trainer(accelerator, config, model=model, validate=scripted([1.0, 2.0, 3.0], seen))
    result = trainer.fit()
    assert (result.best_epoch, result.best_validation, result.epochs) == (0, 1.0, 2)
    assert seen[0] == model.weight.item() == 0.25
    assert [entry["epoch"] for entry in result.history] == [1, 2]


def test_without_the_initial_candidate_training_always_counts(accelerator):
    model = Line(start=2.0)  # already perfect
    result = line_trainer(accelerator, line_config(epochs=1), model=model).fit()
    assert result.best_epoch == 1


# Numbers that are none ------------------------------------------------------------------------------------------------


def test_loss_that_explodes_raises_and_keeps_the_last_state(tmp_path, accelerator):
    def data(epoch):
        x = torch.linspace(-1, 1, 24) * (1e30 if epoch == 2 else 1.0)
        return x, 2 * x

    trainer = line_trainer(accelerator, line_config(), data=data, run_dir=tmp_path)
    with pytest.raises(FloatingPointError, match=r"training loss became inf at step 6; lower the learning rate"):
        trainer.fit()
    tensors, metadata = load_tensors(tmp_path / "state.safetensors")
    assert metadata["state"]["step"] == 6
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_nan_loss_raises(accelerator):
    def loss(network, batch):
        return network(batch[0]).mean() * math.nan

    with pytest.raises(FloatingPointError, match="training loss became nan at step 0"):
        line_trainer(accelerator, line_config(), loss=loss).fit()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validation_that_is_not_finite_raises(tmp_path, accelerator, value):
    trainer = line_trainer(accelerator, line_config(), validate=scripted([1.0, value], []), run_dir=tmp_path)
    with pytest.raises(FloatingPointError, match=f"validation became {value} after epoch 2"):
        trainer.fit()
    assert saved_state(tmp_path)["best_validation"] == 1.0


def test_nan_channels_are_refused_by_index(tmp_path, accelerator):
    h = channels()
    h[17, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="got 1 others, the first at index 17"):
        FixedSource(h)
    task = PretrainTask(MODEL, CODEC, TRAIN)
    with pytest.raises(ValueError, match="the first at index 17"):
        pretrain(task, FixedSource(channels()), h, tmp_path, accelerator=accelerator, data_description={})


# Configuration and data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("save_every", -1),
        ("patience", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("final_learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("warmup_fraction", 1.5),
        ("warmup_fraction", math.nan),
        ("schedule", "linear"),
        ("mixed_precision", "fp16"),
    ],
)
def test_config_names_what_is_wrong(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got '?{value}"):
        TrainConfig(**{"epochs": 1, name: value})


def test_data_that_does_not_fill_a_batch(accelerator):
    with pytest.raises(ValueError, match="data: expected at least one batch of 25 samples, got 24"):
        line_trainer(accelerator, line_config(batch_size=25)).fit()


def test_data_of_different_lengths(accelerator):
    data = (torch.ones(24), torch.ones(23))
    with pytest.raises(ValueError, match=r"data: expected tensors of one length, got \[24, 23\]"):
        line_trainer(accelerator, line_config(), data=lambda epoch: data).fit()


def test_samples_beyond_the_last_whole_batch_wait_for_another_epoch(accelerator):
    result = line_trainer(accelerator, line_config(batch_size=7, epochs=2)).fit()
    assert result.steps == 6


# Precision and processes ----------------------------------------------------------------------------------------------


def test_bf16_trains_close_to_float32(tmp_path):
    exact = train(tmp_path / "float32")
    AcceleratorState._reset_state(reset_partial_state=True)
    rounded = train(tmp_path / "bf16", dataclasses.replace(TRAIN, mixed_precision="bf16"))
    assert rounded.best_validation == pytest.approx(exact.best_validation, abs=0.1)
    assert rounded.best_validation != exact.best_validation
    stored = weights(tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


def test_auto_precision_follows_the_processor():
    accelerator = make_accelerator(dataclasses.replace(TRAIN, mixed_precision="auto"), cpu=True)
    assert accelerator.mixed_precision == ("bf16" if supports_bf16(torch.device("cpu")) else "no")


def test_processes_that_were_launched_but_did_not_join_are_an_error(accelerator, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but 1 joined"):
        make_accelerator(TRAIN, cpu=True)


def test_the_accelerator_lets_finished_models_go(accelerator):
    line_trainer(accelerator, line_config()).fit()
    assert accelerator._models == []
    assert accelerator._optimizers == []
