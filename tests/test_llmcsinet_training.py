"""Algorithm 1: what each stage trains, that a killed training goes on, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_feedback import CONFIG, data, images, stage, training
from tiny_runs import KillAt, KilledError

from csimodels.evaluation.metrics import nmse_db
from csimodels.files import load_tensors
from csimodels.models.baselines import CLASSICAL
from csimodels.models.llmcsinet import LlmCsiNet
from csimodels.training.feedback_file import load_feedback, save_feedback
from csimodels.training.llmcsinet import FeedbackData, FeedbackTraining, train_feedback, validation_nmse_db

pytestmark = pytest.mark.usefixtures("small_models")


def trained(task, folder, accelerator, **options):
    return train_feedback(task, data(), folder, accelerator=accelerator, **options)


def parts(network):
    """Weights that stage 1 trains, those that only stage 2 does, without batch normalisation's statistics."""
    first = {id(p) for module in network.stage1_modules() for p in module.parameters()}
    named = dict(network.named_parameters())
    return (
        {name: p.detach().clone() for name, p in named.items() if id(p) in first},
        {name: p.detach().clone() for name, p in named.items() if id(p) not in first},
    )


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_stage_1_trains_the_encoder_and_the_preliminary_decoder_only(tmp_path, accelerator):
    task = training(stage("preliminary"))
    before_first, before_rest = parts(task.build())
    network, best = trained(task, tmp_path, accelerator)
    first, rest = parts(network)
    assert same(rest, before_rest)
    assert all(not torch.equal(first[name], before_first[name]) for name in first if name.endswith("weight"))
    with torch.inference_mode():
        h = data().validation
        assert nmse_db(h, network.preliminary(network.encode(h))).item() == pytest.approx(best, abs=1e-4)
    assert best < 0


def test_stage_2_goes_on_from_stage_1_and_trains_everything(tmp_path, accelerator):
    only_first, _ = trained(training(stage("preliminary")), tmp_path / "1", accelerator)
    network, best = trained(training(), tmp_path / "2", accelerator)
    (start, fresh), (first, rest) = parts(only_first), parts(network)
    assert not same(first, start)
    assert not same(rest, fresh)
    assert validation_nmse_db(network, data().validation) == pytest.approx(best, abs=1e-4)
    log = json.loads((tmp_path / "2" / "log.json").read_text())
    assert [len(entry["history"]) for entry in log["stages"]] == [2, 2]


def test_frozen_the_first_modules_keep_weights_and_statistics(tmp_path, accelerator):
    only_first, _ = trained(training(stage("preliminary")), tmp_path / "1", accelerator)
    task = training(stage("preliminary"), stage(frozen=True))
    network, _ = trained(task, tmp_path / "2", accelerator)
    for kept, module in zip(only_first.stage1_modules(), network.stage1_modules(), strict=True):
        assert same(kept.state_dict(), module.state_dict())
    assert not same(parts(only_first)[1], parts(network)[1])


@pytest.mark.parametrize("kill_at", [5, 13], ids=["in stage 1", "in stage 2"])
def test_a_killed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, accelerator, kill_at):
    task = training(lengths=(8, 32))
    whole, best = trained(task, tmp_path / "whole", accelerator)
    step = KillAt(kill_at)
    with pytest.raises(KilledError):
        trained(task, tmp_path / "broken", accelerator, on_step=step)
    network, again = trained(task, tmp_path / "broken", accelerator, on_step=step)
    assert step.steps < 16 + kill_at  # the finished part was not repeated
    assert again == best
    assert same(network.state_dict(), whole.state_dict())


def test_a_finished_training_is_read_and_another_one_refused(tmp_path, accelerator):
    task = training(stage("preliminary"))
    network, best = trained(task, tmp_path, accelerator)
    steps = []
    again, value = trained(task, tmp_path, accelerator, on_step=lambda *step: steps.append(step))
    assert (value, steps) == (best, [])
    assert same(again.state_dict(), network.state_dict())
    assert not list(tmp_path.glob("stage*/state.safetensors"))
    with pytest.raises(ValueError, match="belongs to another training"):
        trained(task.seeded(1), tmp_path, accelerator)


def test_one_network_learns_all_codeword_lengths(tmp_path, accelerator):
    lengths = (4, 64)
    mixed, best = trained(training(lengths=lengths), tmp_path / "mixed", accelerator)
    h = data().validation
    values = [nmse_db(h, mixed(h, m)).item() for m in lengths]
    assert best == pytest.approx(sum(values) / 2, abs=1e-4)
    assert values[1] < values[0]
    single, _ = trained(training(), tmp_path / "single", accelerator)
    assert not same(mixed.state_dict(), single.state_dict())


def test_a_transfer_starts_from_the_checkpoint_and_never_does_worse(tmp_path, accelerator):
    source, _ = trained(training(), tmp_path / "source", accelerator)
    start = validation_nmse_db(source, data().validation)
    path = tmp_path / "source" / "model.safetensors"
    # A learning rate of nothing leaves the source; the weights before any step are a candidate.
    still = training(stage(learning_rate=0.0, schedule="constant", initial_candidate=True), initial=str(path))
    _, best = trained(still, tmp_path / "still", accelerator)
    assert best <= start + 1e-6
    other = dataclasses.replace(CONFIG, features=4)
    with pytest.raises(ValueError, match=r"model.safetensors: holds another network than the training is for"):
        trained(training(config=other, initial=str(path)), tmp_path / "other", accelerator)


def test_without_a_preliminary_decoder_and_without_prediction_one_stage_is_left(tmp_path, accelerator):
    for changes, part in (({"preliminary": False}, "whole"), ({"prediction": False}, "preliminary")):
        task = training(stage(part), config=dataclasses.replace(CONFIG, **changes))
        _, best = trained(task, tmp_path / part, accelerator)
        assert best < 0


def test_a_random_mask_leaves_the_decoders_to_train(tmp_path, accelerator):
    task = training(config=dataclasses.replace(CONFIG, mask="random"))
    network, best = trained(task, tmp_path, accelerator)
    assert network.encoder is None
    assert not same(parts(network)[0], parts(task.build())[0])
    assert best < 0


def test_the_quantiser_of_the_model_is_fitted_to_its_codewords(tmp_path, accelerator):
    network, _ = trained(training(), tmp_path, accelerator)
    loaded, _ = load_feedback(tmp_path / "model.safetensors")
    assert loaded.quantizer.fitted
    assert torch.equal(loaded.quantizer.levels, network.quantizer.levels)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_rebuilds_the_network_by_itself(tmp_path):
    torch.manual_seed(3)
    network = LlmCsiNet(CONFIG).eval()
    save_feedback(tmp_path / "a.safetensors", network, "llmcsinet", extra={"note": 1})
    state = torch.get_rng_state()
    loaded, metadata = load_feedback(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.config, metadata["note"]) == (CONFIG, 1)
    h = images(3)
    assert torch.equal(loaded(h), network(h))


def test_files_of_something_else_are_refused(tmp_path):
    from csimodels.files import save_tensors

    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(ValueError, match="not a feedback network"):
        load_feedback(tmp_path / "a.safetensors")
    path = tmp_path / "b.safetensors"
    save_feedback(path, LlmCsiNet(CONFIG), "llmcsinet")
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "config": {**metadata["config"], "colour": "blue"}})
    with pytest.raises(ValueError, match="does not know its configuration .*colour"):
        load_feedback(path)
    save_tensors(path, dict(list(tensors.items())[1:]), metadata)
    with pytest.raises(ValueError, match="its weights do not fit its own configuration"):
        load_feedback(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "largest", "config": None, "compression": 8},
            "stages: expected none for the model 'largest', got 1",
        ),
        ({"stages": ()}, "stages: expected at least one for the model 'llmcsinet', got 0"),
        (
            {"model": "crnet", "config": None, "compression": 8, "identity_start": True},
            "identity_start: expected False for the model 'crnet', got True",
        ),
        ({"model": "alexnet"}, "model: expected one of llmcsinet, .*got 'alexnet'"),
        ({"compression": 8}, "config, compression: expected a configuration alone"),
        ({"model": "crnet"}, "config, compression: expected a compression alone"),
        ({"model": "crnet", "config": None, "compression": 8, "lengths": (3,)}, "lengths, stages: expected one length"),
    ],
)
def test_trainings_that_make_no_sense_are_refused(changes, message):
    fields = {"model": "llmcsinet", "config": CONFIG, "stages": (stage(),), **changes}
    with pytest.raises(ValueError, match=message):
        FeedbackTraining(**fields)


def test_stages_and_channels_that_make_no_sense_are_refused(tmp_path, accelerator):
    with pytest.raises(ValueError, match="part: expected one of preliminary, whole, got 'half'"):
        stage("half")
    with pytest.raises(ValueError, match="frozen: expected False"):
        stage("preliminary", frozen=True)
    bad = data()
    bad.train[5, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="train: 1 of 64 samples are not finite, the first is 5"):
        train_feedback(training(), bad, tmp_path, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"train: expected float32 \[samples, 2, delays, antennas\]"):
        train_feedback(training(), dataclasses.replace(bad, train=bad.train[0]), tmp_path, accelerator=accelerator)


@pytest.mark.parametrize("name", CLASSICAL)
def test_a_classical_method_is_fitted_and_kept(tmp_path, accelerator, name):
    h = images(40).repeat(1, 1, 4, 4)  # 2 x 32 x 32
    source = FeedbackData(h[:30], h[30:], {"samples": 30})
    method = FeedbackTraining(name, (), compression=8)
    network, validation = train_feedback(method, source, tmp_path, accelerator=accelerator)
    assert validation == pytest.approx(nmse_db(h[30:], network(h[30:])).item(), abs=1e-5)
    assert validation < -3
    assert json.loads((tmp_path / "log.json").read_text())["stages"] == []
    again, value = train_feedback(method, source, tmp_path, accelerator=accelerator)
    assert value == validation
    assert torch.equal(again(h[30:]), network(h[30:]))


def test_an_identity_start_is_part_of_the_training():
    plain, started = (training(identity_start=value) for value in (False, True))
    assert plain.described() != started.described()
    h = images(32)
    errors = []
    for network in (plain.build(), started.build()):
        with torch.no_grad():
            errors.append(nmse_db(h, network.preliminary(network.encode(h))).item())
    assert errors[1] < errors[0] - 1
