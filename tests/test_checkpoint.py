"""Checkpoints come back bit for bit, and say what they are when they do not fit."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import CODEC, MODEL, names

from csimodels import __version__
from csimodels.files import load_tensors, save_tensors
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.training.checkpoint import freeze, load_checkpoint, save_checkpoint


@pytest.fixture
def model() -> ChannelTransformer:
    torch.manual_seed(0)
    return ChannelTransformer(MODEL)


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, CODEC, {"validation_nmse_db": -7.5, "data": {"seed": 1}})
    return path


def rewrite(path, **changes):
    """Change entries of the file's metadata; None takes one away."""
    tensors, metadata = load_tensors(path)
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    save_tensors(path, tensors, metadata)


def test_round_trip(path, model):
    loaded, codec, extra = load_checkpoint(path, expected=MODEL, codec=CODEC)
    assert codec == CODEC
    assert loaded.config == MODEL
    assert extra == {"validation_nmse_db": -7.5, "data": {"seed": 1}}
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    h_in = torch.randn(3, MODEL.tokens, MODEL.features)
    assert torch.equal(loaded(h_in), model(h_in))


def test_records_the_version(path):
    assert load_tensors(path)[1]["version"] == __version__


def test_extra_is_optional(tmp_path, model):
    save_checkpoint(tmp_path / "m.safetensors", model, CODEC)
    assert load_checkpoint(tmp_path / "m.safetensors")[2] == {}


def test_loaded_weights_train(path):
    loaded, _, _ = load_checkpoint(path)
    loaded(torch.randn(2, MODEL.tokens, MODEL.features)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_bfloat16_weights_come_back_as_float32(tmp_path, model):
    path = tmp_path / "half.safetensors"
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    save_checkpoint(path, model.bfloat16(), CODEC)
    loaded, _, _ = load_checkpoint(path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, rounded[name]), name


def test_freeze(model):
    frozen = freeze(model.train())
    assert frozen is model
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_another_architecture_names_both(path):
    other = dataclasses.replace(MODEL, layers=5)
    with pytest.raises(ValueError, match=r"expected architecture .*layers=5.*the file holds .*layers=1"):
        load_checkpoint(path, expected=other)


def test_another_model_class_names_both(path):
    rewrite(path, architecture="CsiNet")
    with pytest.raises(ValueError, match=r"expected architecture ChannelTransformer, the file holds CsiNet"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [{"codeword_length": 16}, {"seed": 9}])
def test_another_codec_names_both(path, change):
    other = dataclasses.replace(CODEC, **change)
    (name,) = change
    given, stored = getattr(other, name), getattr(CODEC, name)
    with pytest.raises(ValueError, match=rf"{name}={given}.*was trained for .*{name}={stored}"):
        load_checkpoint(path, codec=other)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {**dataclasses.asdict(MODEL), "experts": 4}},
        {"config": {**dataclasses.asdict(MODEL), "width": 17}},
        {"config": None},
        {"codec": {"antennas": 8}, "config": 3},
    ],
)
def test_a_configuration_this_version_does_not_know(path, changes):
    rewrite(path, version="9.9", **changes)
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: written by csimodels 9\.9, {__version__} does not know"
    ):
        load_checkpoint(path)


def test_weights_that_do_not_fit_their_own_configuration(path):
    rewrite(path, config=dataclasses.asdict(dataclasses.replace(MODEL, width=32)))
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: its weights do not fit .*size mismatch"):
        load_checkpoint(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "bert.safetensors"
    save_file({"embedding": torch.ones(3, 4)}, path)
    with pytest.raises(ValueError, match=r"bert\.safetensors: not a csimodels checkpoint"):
        load_checkpoint(path)


def test_a_training_state_is_no_checkpoint(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"model.a": torch.ones(2)}, {"state": {}, "fingerprint": {}})
    with pytest.raises(ValueError, match="not a csimodels checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_truncated(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def test_failed_write_keeps_the_old_checkpoint(path, model):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(path, model, CODEC, {"tensor": torch.ones(2)})
    assert path.read_bytes() == before
    assert names(path.parent) == ["model.safetensors"]
