"""Pre-training: what it writes, what it measures, what it refuses before it starts."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_training import CODEC, MODEL, TRAIN, channels, names, train, weights

from csimodels.channels.source import FixedSource
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.checkpoint import load_checkpoint, save_checkpoint
from csimodels.training.pretrain import PretrainTask, pretrain, validation_nmse_db

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_pretrain_writes_checkpoint_and_log(tmp_path):
    result = train(tmp_path)
    model, codec, extra = load_checkpoint(tmp_path / "model.safetensors", expected=MODEL, codec=CODEC)
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["validation_nmse_db"] == extra["validation_nmse_db"] == result.best_validation
    assert log["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert log["history"] == result.history
    assert log["train"]["seed"] == TRAIN.seed
    again = validation_nmse_db(model, RandomProjectionCodec(codec), FixedSource(channels(64, seed=1)).h)
    assert again == pytest.approx(result.best_validation, abs=1e-4)


def test_validation_nmse_against_float64():
    torch.manual_seed(0)
    model, codec = ChannelTransformer(MODEL).eval(), RandomProjectionCodec(CODEC)
    h = FixedSource(channels(37)).h
    with torch.inference_mode():
        estimate = codec.to_channel(model(codec.initial(codec.encode(h)))).to(torch.complex128)
        ratios = (estimate - h).abs().square().sum((1, 2)) / h.to(torch.complex128).abs().square().sum((1, 2))
        expected = 10 * math.log10(ratios.mean().item())
        assert validation_nmse_db(model, codec, h) == pytest.approx(expected, abs=1e-4)
        assert validation_nmse_db(model, codec, h, batch=5) == pytest.approx(expected, abs=1e-4)


def test_pretrain_from_a_checkpoint(tmp_path):
    config = dataclasses.replace(TRAIN, epochs=1, learning_rate=0.0, final_learning_rate=0.0)
    torch.manual_seed(11)
    start = ChannelTransformer(MODEL)
    save_checkpoint(tmp_path / "start.safetensors", start, dataclasses.replace(CODEC, codeword_length=64))
    train(tmp_path / "run", config, initial_checkpoint=str(tmp_path / "start.safetensors"))
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, start.state_dict()[name]), name


def test_pretrain_refuses_another_architecture_to_start_from(tmp_path):
    save_checkpoint(tmp_path / "start.safetensors", ChannelTransformer(MODEL), CODEC)
    with pytest.raises(ValueError, match=r"expected architecture .*layers=2.*the file holds .*layers=1"):
        train(
            tmp_path / "run",
            architecture=dataclasses.replace(MODEL, layers=2),
            initial_checkpoint=str(tmp_path / "start.safetensors"),
        )


def test_pretrain_refuses_what_does_not_fit_before_training(tmp_path, accelerator):
    steps = []

    def attempt(validation: torch.Tensor, **changes) -> None:
        task = PretrainTask(**{"architecture": MODEL, "codec": CODEC, "train": TRAIN, **changes})
        pretrain(
            task,
            FixedSource(channels()),
            validation,
            tmp_path,
            accelerator=accelerator,
            data_description={},
            on_step=lambda *arguments: steps.append(arguments),
        )

    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 8, 8\], got \(4, 8, 9\)"):
        attempt(torch.ones(4, 8, 9, dtype=torch.complex64))
    with pytest.raises(TypeError, match="h: expected a complex tensor"):
        attempt(torch.ones(4, 8, 8))
    with pytest.raises(ValueError, match="validation: expected at least one sample, got none"):
        attempt(channels(0))
    with pytest.raises(ValueError, match=r"task: expected an architecture of \(8, 16\) tokens and features"):
        attempt(channels(4), architecture=dataclasses.replace(MODEL, tokens=32))
    assert steps == []
    assert names(tmp_path) == []
