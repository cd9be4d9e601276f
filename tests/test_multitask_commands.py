"""The physical-layer tasks from the command line: files drawn, networks trained, outcomes written."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from command_line import refuse, succeed
from tiny_multitask import CONFIG, DRAWING, PRESET, SAMPLES, TRAIN, add_sets, detector, training

from csimodels.channels.multitask_file import read_multitask, write_multitask
from csimodels.evaluation.detection import qam_demodulate, qam_modulate
from csimodels.evaluation.metrics import nmse_db, sum_rate
from csimodels.multitask_inference import load_network
from csimodels.training.loop import make_accelerator
from csimodels.training.multitask import train_multitask
from csimodels.training.multitask_file import Adaptation, load_multitask

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(autouse=True)
def sets(monkeypatch):
    add_sets(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained network of all tasks over 4-bit weights."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        add_sets(patch)
        chosen = training(adaptation=Adaptation("loftq", rank=2, iterations=2))
        train_multitask(chosen, folder, folder / "channels", accelerator=make_accelerator(TRAIN, cpu=True))
    return folder / "model.safetensors"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """One file per task, as ``multitask generate`` draws them."""
    monkeypatch.setattr("csimodels.training.multitask_data.SLOTS", DRAWING.slots)
    paths = {}
    for task in CONFIG.tasks:
        paths[task] = tmp_path / f"{task}.safetensors"
        size = ("--samples", "6", "--users", "3", "--antennas", "2", "--channels", "tiny")
        assert "wrote" in succeed("multitask", "generate", paths[task], "--task", task, *size)
    return paths


def test_generated_files_hold_what_they_say(files):
    file = read_multitask(files["predict"], ["history", "future", "speed_kmh"])
    assert file["history"].shape == (6, 2, 4, 5) and file["future"].shape == (6, 2, 2, 5)
    assert file.parameters["channels"] == "tiny" and file.parameters["snr_db"] == 20
    file = read_multitask(files["detect"], ["channels", "received", "noise_power", "symbols"])
    h, y, x = file["channels"], file["received"], file["symbols"]
    noise = (y - x @ h.mT).abs().square().mean()
    assert noise == pytest.approx(file["noise_power"].mean().item(), rel=0.3)
    torch.testing.assert_close(file["noise_power"], torch.full((6,), 3 / 100.0))
    assert read_multitask(files["precode"], ["channels"])["channels"].shape == (6, 8, 3)


def test_predict_writes_the_future_and_its_error(files, model, tmp_path):
    out = tmp_path / "out.npz"
    text = succeed("predict", files["predict"], out, "--model", model)
    future, truth = read_multitask(out, ["future"])["future"], read_multitask(files["predict"], ["future"])["future"]
    network, _ = load_multitask(model)
    history = read_multitask(files["predict"], ["history"])["history"]
    with torch.no_grad():
        one = network("predict", history[2])
    torch.testing.assert_close(future[2], one)
    expected = nmse_db(truth.flatten(1), future.flatten(1), reduction="ratio_of_sums").item()
    assert f"NMSE {expected:.2f} dB" in text
    # Without the truth nothing is told of it; a history of one antenna has no antenna axis.
    write_multitask(tmp_path / "bare.npz", {"history": history[:, 0]})
    text = succeed("predict", tmp_path / "bare.npz", tmp_path / "bare.out.npz", "--model", model)
    assert "NMSE" not in text
    torch.testing.assert_close(read_multitask(tmp_path / "bare.out.npz", ["future"])["future"], future[:, 0])


def test_precode_keeps_the_power(files, model, tmp_path):
    out = tmp_path / "out.safetensors"
    text = succeed("precode", files["precode"], out, "--model", model, "--power-dbw", "3", "--noise-dbw", "-7")
    w = read_multitask(out, ["precoder"])["precoder"]
    h = read_multitask(files["precode"], ["channels"])["channels"]
    torch.testing.assert_close(w.abs().square().sum((1, 2)), torch.full((6,), 10**0.3), rtol=1e-4, atol=0)
    assert f"mean sum rate {sum_rate(h, w, 10**-0.7).mean().item():.2f} bit/s/Hz" in text


def test_detect_tells_errors_of_known_symbols(files, model, tmp_path):
    out = tmp_path / "out.mat"
    text = succeed("detect", files["detect"], out, "--model", model)
    estimate = read_multitask(out, ["symbols"])["symbols"]
    truth = read_multitask(files["detect"], ["symbols"])["symbols"]
    found = re.search(r"NMSE ([0-9.]+), SER ([0-9.]+)", text)
    expected = ((estimate - truth).abs().square().sum() / truth.abs().square().sum()).item()
    assert float(found[1]) == pytest.approx(expected, abs=1e-4)
    wrong = (qam_demodulate(estimate, 16) != qam_demodulate(truth, 16)).float().mean().item()
    assert float(found[2]) == pytest.approx(wrong, abs=1e-5)


def test_merged_weights_give_the_same(files, model, tmp_path):
    paths = {flag: tmp_path / f"{len(flag)}.npz" for flag in ((), ("--merged",))}
    for flag, out in paths.items():
        succeed("predict", files["predict"], out, "--model", model, *flag)
    plain, merged = (read_multitask(path, ["future"])["future"] for path in paths.values())
    torch.testing.assert_close(plain, merged, rtol=1e-3, atol=1e-4)
    names = [name for name, _ in load_network(model, merged=True).network.named_buffers()]
    assert not any(name.endswith("packed") for name in names)


def test_train_writes_a_network_that_the_commands_take(files, tmp_path, monkeypatch):
    monkeypatch.setattr("csimodels.training.multitask_presets.multitask_preset", lambda name: PRESET)
    arguments = ("--tasks", "predict", "--adaptation", "qlora", "--epochs", "1", "--samples", "16", "--batch-size", "8")
    text = succeed("multitask", "train", tmp_path / "run", *arguments)
    assert text.split() == f"wrote {tmp_path}/run/model.safetensors".split()
    metadata = load_multitask(tmp_path / "run" / "model.safetensors")[1]
    assert metadata["tasks"] == ["predict"] and metadata["adaptation"]["kind"] == "qlora"
    succeed("predict", files["predict"], tmp_path / "out.npz", "--model", tmp_path / "run" / "model.safetensors")
    told = refuse("detect", files["detect"], tmp_path / "x.npz", "--model", tmp_path / "run" / "model.safetensors")
    assert told.endswith("expected a network for detect, it was trained for predict")
    assert not (tmp_path / "x.npz").exists()
    assert "belongs to another training" in refuse("multitask", "train", tmp_path / "run", *arguments, "--seed", "1")
    succeed("multitask", "train", tmp_path / "none", *arguments[:2], "--backbone", "none", *arguments[4:])
    succeed("multitask", "train", tmp_path / "two", *arguments, "--backbone", "random", "--layers", "2")
    assert load_multitask(tmp_path / "two" / "model.safetensors")[0].config.backbone.layers == 2


def test_bad_input_ends_in_one_line(files, model, tmp_path):
    out = tmp_path / "out.npz"
    h = torch.randn(3, 8, 5, dtype=torch.complex64)
    write_multitask(tmp_path / "many.npz", {"channels": h})
    told = refuse("precode", tmp_path / "many.npz", out, "--model", model)
    assert "users: expected 2 to 3, got 5" in told
    write_multitask(tmp_path / "short.npz", {"history": h[:, :3]})
    assert "T1=4" in refuse("predict", tmp_path / "short.npz", out, "--model", model)
    assert "expected an array history" in refuse("predict", files["precode"], out, "--model", model)
    assert "order: expected one of 4, 16, 64, 256, got 8" in refuse(
        "multitask", "generate", out, "--task", "detect", "--order", "8", "--channels", "tiny"
    )
    assert "task: expected one of" in refuse("multitask", "generate", out, "--task", "sing")
    assert "adaptation: expected one of" in refuse("multitask", "train", tmp_path / "r", "--adaptation", "x")
    assert "layers: expected only with a --backbone" in refuse("multitask", "train", tmp_path / "r", "--layers", "2")
    assert "adaptation, backbone, tasks: expected none for rnn" in refuse(
        "multitask", "train", tmp_path / "r", "--model", "rnn", "--backbone", "none"
    )
    assert "backbone: expected family:source" in refuse("multitask", "train", tmp_path / "r", "--backbone", "gpt2")
    arrays = read_multitask(files["detect"], ["channels", "received", "noise_power", "symbols"]).arrays
    points = qam_modulate(torch.arange(36).reshape(6, 2, 3), 64)
    write_multitask(tmp_path / "other.npz", {**arrays, "symbols": points})
    told = refuse("detect", tmp_path / "other.npz", out, "--model", model)
    assert "symbols: expected 16-QAM of unit power, as the network detects, got" in told
    write_multitask(tmp_path / "long.npz", {"history": h[:, :4], "future": h[:, :3]})
    assert "future: expected [3, 2, 5], got [3, 3, 5]" in refuse(
        "predict", tmp_path / "long.npz", out, "--model", model
    )
    assert not out.exists() and not (tmp_path / "r").exists()


@pytest.mark.parametrize("task", CONFIG.tasks)
def test_a_file_is_not_written_over_what_is_read(files, model, task):
    before = files[task].read_bytes()
    told = refuse(task, files[task], files[task], "--model", model)
    assert told.endswith("expected another file than the one that is read")
    assert files[task].read_bytes() == before


def test_a_baseline_detects_files_too(files, tmp_path):
    run = tmp_path / "run"
    chosen = dataclasses.replace(detector("detnet"), samples=SAMPLES)
    train_multitask(chosen, run, run / "channels", accelerator=make_accelerator(TRAIN, cpu=True))
    assert "SER" in succeed("detect", files["detect"], tmp_path / "out.npz", "--model", run / "model.safetensors")
