"""Training of the multi-task network: losses by their equations, what an epoch draws, adaptation, exact resume."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_multitask import CONFIG, DRAWING, SAMPLES, TRAIN, add_sets, detector, single, training
from tiny_runs import KillAt, KilledError

import csikernels
from csimodels.channels.transmission import add_noise, draw_uplink
from csimodels.evaluation.detection import qam_modulate
from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.precoding import structured_precoder, wmmse_parameters
from csimodels.models.detnet import layer_loss
from csimodels.models.multitask import TASKS
from csimodels.models.multitask_baselines import NAMES, TASK_OF, baseline_config, build_network, config_from_dict
from csimodels.training import multitask
from csimodels.training.loop import make_accelerator
from csimodels.training.multitask import MultiTaskTraining, task_losses, train_multitask, validation_losses
from csimodels.training.multitask_data import DRAW, NOISE_POWER, Noise, seeded, served
from csimodels.training.multitask_file import Adaptation, load_multitask, save_multitask
from csimodels.training.multitask_presets import multitask_preset

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(autouse=True)
def sets(monkeypatch):
    add_sets(monkeypatch)


def fit(chosen: MultiTaskTraining, run_dir, channels=None, **options):
    accelerator = make_accelerator(chosen.train, cpu=True)
    return train_multitask(chosen, run_dir, channels or run_dir.parent / "channels", accelerator=accelerator, **options)


def log(run_dir):
    return json.loads((run_dir / "log.json").read_text())


def drawn(task, n=8, seed=0):
    read = SAMPLES.prediction if task == "predict" else SAMPLES.multiuser
    return DRAW[task](read("train", FOLDER[0])[:n], DRAWING, torch.Generator().manual_seed(seed))


FOLDER = []


@pytest.fixture(autouse=True)
def folder(tmp_path):
    FOLDER[:] = [tmp_path / "kept"]


def test_an_epoch_draws_within_the_ranges_and_anew(tmp_path):
    h = SAMPLES.multiuser("train", tmp_path)
    many = h[:1].expand(2000, -1, -1)
    for task, spans in (("detect", [(0, 20), (2, 3)]), ("precode", [(0.1, 10), (2, 3)])):
        first, again = (DRAW[task](many, DRAWING, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        for values, other, (low, high) in zip(first[1:], again[1:], spans, strict=False):
            assert low <= values.min() < low + 0.05 * (high - low) + 1e-6
            assert high - 0.05 * (high - low) - 1e-6 <= values.max() <= high
            assert not torch.equal(values, other)
    power_dbw = 10 * DRAW["precode"](many, DRAWING, torch.Generator().manual_seed(0))[1].log10()
    assert power_dbw.mean() == pytest.approx(0, abs=0.5)  # uniform in dB, as Fig. 7's axis
    narrow = dataclasses.replace(DRAWING, noise=Noise(snr_db=(3.0, 3.0)))
    assert (DRAW["detect"](many, narrow, torch.Generator().manual_seed(0))[1] == 3).all()


def test_served_users_have_unit_mean_power():
    h = torch.randn(5, 4, 3, dtype=torch.complex64) * torch.tensor([1.0, 5.0, 0.1])
    two = served(h, 2)
    torch.testing.assert_close(two.abs().square().mean((1, 2)), torch.ones(5))
    torch.testing.assert_close(two[..., 1] / two[..., 0], h[..., 1] / h[..., 0])
    with pytest.raises(ValueError, match="users: expected at most the 3 of the channels, got 4"):
        served(h, 4)


def test_channels_are_kept_and_depend_on_what_defines_them(tmp_path, monkeypatch):
    h = SAMPLES.prediction("train", tmp_path)
    assert h.shape == (80, 6, 5) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("csimodels.training.multitask_data.prediction_channels", None)
    assert torch.equal(SAMPLES.prediction("train", tmp_path), h)
    odd = dataclasses.replace(SAMPLES, train=79)
    assert torch.equal(odd.prediction("train", tmp_path), h[:79])  # the last UE's second antenna is not used
    tenth = SAMPLES.fraction(0.1)
    assert (tenth.train, tenth.validation, tenth.test) == (8, 1, 8)
    fixed = dataclasses.replace(SAMPLES, name="other")
    with pytest.raises(TypeError, match="not callable"):
        fixed.prediction("train", tmp_path)
    assert SAMPLES.described()["set"]["columns"] == 4


def test_losses_are_those_of_the_equations():
    inputs, answers = {}, {}

    def model(given):
        inputs.update(given)
        return answers

    # Eq. 40 and eq. 39: half the mean squared magnitude of the error.
    h, snr, seeds = drawn("predict")
    answers["predict"] = torch.zeros(8, 2, 5, dtype=torch.complex64)
    loss = task_losses(model, {"predict": (h, snr, seeds)}, DRAWING)["predict"]
    torch.testing.assert_close(loss, h[:, 4:].abs().square().mean() / 2)
    torch.testing.assert_close(inputs["predict"][0], add_noise(h[:, :4], snr, seeded(seeds)))

    h, snr, users, seeds = drawn("detect")
    k = int(users[0])
    y, symbols, noise_power = draw_uplink(served(h, k), 2, 16, snr, seeded(seeds))
    x = qam_modulate(symbols, 16)
    answers["detect"] = x + 0.3j
    loss = task_losses(model, {"detect": (h, snr, users, seeds)}, DRAWING)["detect"]
    torch.testing.assert_close(loss, torch.tensor(0.045))
    torch.testing.assert_close(inputs["detect"], (served(h, k), y, noise_power))
    answers["detect"] = torch.stack([x, x + 1, x + 2j])
    loss = task_losses(model, {"detect": (h, snr, users, seeds)}, DRAWING)["detect"]
    torch.testing.assert_close(loss, layer_loss(answers["detect"], x))

    h, power, users, supervised = drawn("precode")
    assert not supervised.any()
    used = served(h, int(users[0]))
    shares = torch.rand(8, used.shape[-1], generator=torch.Generator().manual_seed(3))
    lambdas = p = shares / shares.sum(1, keepdim=True) * power[:, None]
    answers["precode"] = (lambdas, p)
    loss = task_losses(model, {"precode": (h, power, users, supervised)}, DRAWING)["precode"]
    expected = sum_rate(used, structured_precoder(used, lambdas, p, NOISE_POWER), NOISE_POWER).mean()
    torch.testing.assert_close(loss, -expected)
    loss = task_losses(model, {"precode": (h, power, users, ~supervised)}, DRAWING)["precode"]
    wanted = wmmse_parameters(used, power, NOISE_POWER)
    squares = ((lambdas - wanted[0]).square() + (p - wanted[1]).square()) / power[:, None].square()
    torch.testing.assert_close(loss, squares.mean() / 2)
    answers["precode"] = wanted
    assert task_losses(model, {"precode": (h, power, users, ~supervised)}, DRAWING)["precode"] == 0


def test_wmmse_supervises_the_first_epochs_alone(tmp_path, monkeypatch):
    seen = []
    genuine = multitask.task_losses

    def spied(model, drawn, drawing):
        if model.training:
            seen.append(bool(drawn["precode"][-1][0]))
        return genuine(model, drawn, drawing)

    monkeypatch.setattr(multitask, "task_losses", spied)
    fit(dataclasses.replace(single("precode"), train=dataclasses.replace(TRAIN, epochs=3)), tmp_path / "run")
    assert seen == [True] * 10 + [False] * 20  # 80 samples in batches of 8, one epoch of three


def test_a_log_is_there_before_the_model(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("disk full")

    chosen = single("predict")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(multitask, "save_multitask", full)
        fit(chosen, tmp_path / "run")
    fit(chosen, tmp_path / "run", on_step=KillAt(1))  # from the last state: no step is left
    assert len(log(tmp_path / "run")["history"]) == 2


def test_validation_takes_every_sample_with_its_own_users():
    h, snr, users, seeds = drawn("detect", 24)
    counts = []

    def model(given):
        counts.append((given["detect"][0].shape[0], given["detect"][0].shape[2]))
        return {"detect": given["detect"][0].new_zeros(len(given["detect"][0]), 2, given["detect"][0].shape[2])}

    value = validation_losses(model, {"detect": (h, snr, users, seeds)}, DRAWING, torch.device("cpu"), batch=5)
    assert sum(n for n, k in counts if k == 2) == int((users == 2).sum()) and sum(n for n, _ in counts) == 24
    assert value["detect"] == pytest.approx(0.5, abs=0.15)  # symbols of unit power against zero


def test_a_training_lowers_every_loss_and_is_read_again(tmp_path):
    chosen = training(train=dataclasses.replace(TRAIN, epochs=6), supervised_epochs=2)
    network = fit(chosen, tmp_path / "run")
    told = log(tmp_path / "run")
    entries = told["history"]
    assert len(entries) == 6
    for task in TASKS:
        assert entries[-1][task] < entries[0][task], task
    assert told["best_validation"] == min(entry["validation"] for entry in entries)
    weighted = entries[-1]["predict"] + 5 * entries[-1]["detect"] + 0.2 * entries[-1]["precode"]
    assert entries[-1]["validation"] == pytest.approx(weighted)  # eq. 36
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = fit(chosen, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="belongs to another training"):
        fit(dataclasses.replace(chosen, seed=1), tmp_path / "run")


@pytest.mark.parametrize("kill_at", [4, 13])
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, kill_at):
    chosen = training(adaptation=Adaptation("loftq", rank=2, iterations=2))
    whole = fit(chosen, tmp_path / "whole")
    with pytest.raises(KilledError):
        fit(chosen, tmp_path / "killed", on_step=KillAt(kill_at))
    resumed = fit(chosen, tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["lora", "loftq", "qlora"])
def test_an_adapted_backbone_keeps_its_weights(tmp_path, kind):
    chosen = training(adaptation=Adaptation(kind, rank=2, iterations=2))
    network = fit(chosen, tmp_path / "run")
    start = chosen.build().state_dict()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, start[name])}
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert changed <= trainable
    assert any("lora" in name.lower() for name in changed) and any("encoders" in name for name in changed)
    frozen = "base_layer.weight" if kind == "lora" else "packed"
    assert any(name.endswith(frozen) for name in start) and not any(name.endswith(frozen) for name in changed)


@pytest.mark.skipif("cpp" not in csikernels.backends()["nf4_lora_linear"]["cpu"], reason="no compiled extension")
def test_a_4_bit_backbone_trains_on_the_compiled_kernel_as_on_the_reference(tmp_path):
    chosen = training(adaptation=Adaptation("loftq", rank=2, iterations=2))
    histories, states = {}, {}
    for backend in ("cpp", "reference"):
        with csikernels.use_backend(backend):
            states[backend] = fit(chosen, tmp_path / backend).state_dict()
        histories[backend] = [entry["validation"] for entry in log(tmp_path / backend)["history"]]
    assert histories["cpp"] == pytest.approx(histories["reference"], rel=1e-3)
    packed = [name for name in states["cpp"] if name.endswith("packed")]
    assert len(packed) == 4 and all(torch.equal(states["cpp"][name], states["reference"][name]) for name in packed)


def test_the_start_of_qlora_is_the_quantised_network_and_loftq_is_closer():
    full = training().build().eval()
    history = torch.randn(6, 4, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    errors = {}
    with torch.no_grad():
        wanted = full("predict", history)
        for kind in ("lora", "loftq", "qlora"):
            network = training(adaptation=Adaptation(kind, rank=8)).build().eval()
            errors[kind] = (network("predict", history) - wanted).abs().square().mean().item()
    assert errors["lora"] < 1e-10 < errors["loftq"] < errors["qlora"]


@pytest.mark.parametrize("kind", ["dnn", "detnet"])
def test_a_detector_is_trained_by_the_same_code(tmp_path, kind):
    chosen = detector(kind)
    network = fit(dataclasses.replace(chosen, train=dataclasses.replace(TRAIN, epochs=3)), tmp_path / "run")
    history = log(tmp_path / "run")["history"]
    assert min(entry["detect"] for entry in history) < 0.5 and set(history[0]) >= {"detect", "loss", "validation"}
    loaded, metadata = load_multitask(tmp_path / "run" / "model.safetensors")
    assert (metadata["model"], metadata["tasks"], metadata["order"]) == (kind, ["detect"], 16)
    assert loaded.config == network.config


@pytest.mark.parametrize("task", TASKS)
def test_a_single_task_trains_its_own_parts_alone(tmp_path, task):
    network = fit(single(task), tmp_path / "run")
    assert list(network.encoders) == [task]
    assert [set(entry) & set(TASKS) for entry in log(tmp_path / "run")["history"]] == [{task}] * 2


def test_every_network_of_the_presets_is_rebuilt_from_its_file(tmp_path):
    for name in NAMES:
        config = baseline_config(name, "laptop")
        network = build_network(name, config)
        assert config_from_dict(name, json.loads(json.dumps(dataclasses.asdict(config)))) == config
        save_multitask(tmp_path / name, network, name, config, extra={"tasks": [TASK_OF[name]], "order": 16})
        loaded, _ = load_multitask(tmp_path / name)
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
    with pytest.raises(ValueError, match="model: expected one of rnn, .*, got 'x'"):
        baseline_config("x", "laptop")
    with pytest.raises(ValueError, match="model: expected one of multitask, rnn, .*, got 'x'"):
        config_from_dict("x", {})


def test_files_that_are_none_are_refused(tmp_path):
    network = build_network("multitask", CONFIG)
    path = tmp_path / "model.safetensors"
    save_multitask(path, network, "multitask", CONFIG, Adaptation("qlora", 2))  # which it was not adapted by
    with pytest.raises(ValueError, match="its weights do not fit its own configuration"):
        load_multitask(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_multitask(path)


def test_trainings_that_make_no_sense_are_refused():
    for changes, message in (
        ({"model": "x"}, "model: expected one of multitask, rnn, .*, got 'x'"),
        ({"tasks": ("sing",)}, "tasks: expected some of predict, detect, precode for multitask"),
        ({"tasks": ()}, "tasks: expected some of"),
        ({"supervised_epochs": 2}, "supervised_epochs: expected 0 to below the 2 epochs, got 2"),
        ({"tasks": ("predict",)}, "supervised_epochs: expected 0 without precoding, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            training(**changes)
    with pytest.raises(ValueError, match="drawing: expected order 16, as the configuration has, got 64"):
        training(drawing=dataclasses.replace(DRAWING, order=64))
    with pytest.raises(ValueError, match="adaptation: expected None for dnn"):
        dataclasses.replace(detector("dnn"), adaptation=Adaptation())
    with pytest.raises(ValueError, match="kind: expected one of lora, loftq, qlora, got 'x'"):
        Adaptation("x")


def test_the_presets():
    paper, laptop = multitask_preset("paper"), multitask_preset("laptop")
    assert (paper.samples.train, paper.samples.test, paper.train.epochs, paper.train.batch_size) == (
        50_000,
        10_000,
        500,
        100,
    )
    assert (paper.rank, paper.adaptation) == (16, Adaptation("lora", 16))
    assert (paper.drawing.noise.snr_db, paper.drawing.order) == ((0, 20), 16)
    for preset in (paper, laptop):
        joint, one = preset.multitask(), preset.multitask(("predict",))
        assert 0 < joint.supervised_epochs < joint.train.epochs and one.supervised_epochs == 0
        assert one.config.tasks == ("predict",) and one.train == joint.train
        few = preset.multitask(share=0.1)
        steps = [t.samples.train // t.train.batch_size * t.train.epochs for t in (joint, few)]
        assert steps[0] == pytest.approx(steps[1], rel=0.2)
        assert preset.multitask(backbone=None).adaptation is None
        assert all(preset.baseline(name).tasks == (TASK_OF[name],) for name in NAMES)
    longer = laptop.multitask().optimised(epochs=40, batch_size=None)
    assert (longer.train.epochs, longer.supervised_epochs) == (40, round(40 * laptop.supervised_share))
    assert laptop.multitask().optimised(epochs=1).supervised_epochs == 0
    with pytest.raises(ValueError, match="preset: expected one of"):
        multitask_preset("desktop")
