"""LVM4CF and the networks that it is compared with: equations, sizes, and what they take."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from csimodels.models.backbone import BackboneConfig
from csimodels.models.channel_transformer import parameter_count
from csimodels.models.codeword_baselines import (
    FcConfig,
    TransformerCodewordConfig,
    build_network,
    config_of,
    count_parameters,
    describe,
)
from csimodels.models.codeword_network import CodewordConfig, refine_codebook
from csimodels.models.lvm4cf import Lvm4CfConfig

pytestmark = pytest.mark.usefixtures("small_models")

LLAMA = BackboneConfig("llama", None, 2, width=16, heads=2, feedforward=24)
GPT2 = BackboneConfig("gpt2", None, 2, width=16, heads=2, feedforward=24)
CONFIGS = {
    "fc": FcConfig(8, hidden=(12,)),
    "transformer": TransformerCodewordConfig(8, width=16, heads=2, feedforward=24),
    "llm": Lvm4CfConfig(8, backbone=GPT2),
    "lvm4cf": Lvm4CfConfig(8, backbone=LLAMA),
}


def words(count: int, dimension: int = 8, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dimension, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def build(name: str, **changes):
    torch.manual_seed(0)
    return build_network(dataclasses.replace(CONFIGS[name], **changes))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_codewords_of_unit_norm_and_gradients_for_all_weights(name, residual):
    network, c = build(name, residual=residual), words(5)
    if residual:
        assert torch.allclose(network(c), c, atol=1e-6)  # drawn anew it gives the codeword itself
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    g = network(c)
    assert (g.dtype, g.shape) == (torch.complex64, c.shape)
    assert torch.allclose(torch.linalg.vector_norm(g, dim=1), torch.ones(5), atol=1e-6)
    (g.conj() * words(5, seed=1)).sum(1).abs().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    still = [key for key, p in network.named_parameters() if not bool(p.grad.abs().sum() > 0)]
    assert still == []


@pytest.mark.parametrize("name", CONFIGS)
def test_each_codeword_is_refined_by_itself(name):
    network, c = build(name).eval(), words(7)
    whole = network(c)
    assert torch.allclose(network(c[2:3]), whole[2:3], atol=1e-6)
    assert network(c[:0]).shape == (0, 8)
    refined = refine_codebook(network, c, batch=3)
    assert torch.allclose(refined, whole.detach(), atol=1e-6)
    assert refined.is_contiguous() and not refined.requires_grad
    assert refine_codebook(network, c[:0]).shape == (0, 8)


def test_refining_leaves_the_mode_as_it_was():
    network = build("lvm4cf").train()
    refine_codebook(network, words(2))
    assert network.training


def test_tokens_are_the_polarisations_real_parts_first():
    network, c = build("fc"), words(3)
    tokens = network.to_tokens(c)
    assert tokens.shape == (3, 2, 8)
    assert torch.allclose(tokens[:, 0, :4], c[:, :4].real * 4)  # sqrt(2 * 8)
    assert torch.allclose(tokens[:, 0, 4:], c[:, :4].imag * 4)
    assert torch.allclose(tokens[:, 1, :4], c[:, 4:].real * 4)
    assert torch.allclose(tokens.square().mean((1, 2)), torch.ones(3))
    assert torch.allclose(network.to_words(tokens), c, atol=1e-6)


def test_the_equations_written_out():
    network, c = build("lvm4cf").double(), words(4)
    x = network.to_tokens(c).double()
    first, norm, _, second = network.embed
    assert (first.in_features, first.out_features, second.out_features) == (8, 8, 16)  # N_c, D/2, D of eq. 18
    x = torch.nn.functional.gelu(norm(x @ first.weight.T + first.bias)) @ second.weight.T + second.bias
    model = network.backbone.model
    angle = torch.arange(2.0).double()[:, None] * 10000 ** (-torch.arange(4.0).double() / 4)  # position, pair of 8

    def rotate(v):  # [n, heads, tokens, 8]
        one, two = v[..., :4], v[..., 4:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    def rms(module, v):
        return module.weight * v / (v.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

    for layer in model.layers:  # eq. 20
        y, attention = rms(layer.input_layernorm, x), layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = ((y @ part.weight.T).view(4, 2, 2, 8).transpose(1, 2) for part in projections)
        mixed = ((rotate(q) @ rotate(k).mT) / math.sqrt(8)).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
        y, ffn = rms(layer.post_attention_layernorm, x), layer.mlp
        gate = torch.nn.functional.silu(y @ ffn.gate_proj.weight.T) * (y @ ffn.up_proj.weight.T)
        x = x + gate @ ffn.down_proj.weight.T
    x = (x @ network.output.weight.T + network.output.bias).tanh()  # eq. 21
    g = torch.cat([torch.complex(x[:, p, :4], x[:, p, 4:]) for p in (0, 1)], 1)  # eq. 22
    g = g / g.abs().square().sum(1, keepdim=True).sqrt()
    network.float()
    assert torch.allclose(network(c), g.to(torch.complex64), atol=1e-5)


def test_residual_adds_the_output_to_the_codeword():
    network, c = build("fc", residual=True), words(3)
    torch.nn.init.constant_(network.layers[-1].bias, 0.5)
    tokens = network.to_tokens(c) + math.tanh(0.5)
    assert torch.allclose(network(c), network.to_words(tokens), atol=1e-6)


def test_the_order_of_the_polarisations_matters():
    swapped = [4, 5, 6, 7, 0, 1, 2, 3]
    for name in ("transformer", "llm", "lvm4cf"):
        network, c = build(name).eval(), words(3)
        with torch.no_grad():
            for parameter in network.parameters():  # drawn with a deviation of 0.02, they hardly turn with the position
                parameter.mul_(5)
        assert not torch.allclose(network(c[:, swapped])[:, swapped], network(c), atol=1e-2), name


def test_the_norm_after_the_last_layer_is_left_out_unless_wanted():
    for name in ("llm", "lvm4cf"):
        with_norm, without = build(name, final_norm=True), build(name)
        lost = set(with_norm.state_dict()) - set(without.state_dict())
        assert lost and all(".norm." in key or ".ln_f." in key for key in lost)
        c = words(3)
        assert not torch.allclose(with_norm(c), without(c), atol=1e-3)


def test_parameters_of_the_papers_sizes():
    # Per layer of a 7B LLaMA: 4 D^2 of attention, 3 D 11008 of the feed-forward network, 2 norms.
    lvm = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    ends = 128 * 2048 + 2048 + 2 * 2048 + 2048 * 4096 + 4096 + 4096 * 128 + 128
    assert count_parameters(Lvm4CfConfig.paper()) == lvm + ends == 413_952_128
    assert count_parameters(Lvm4CfConfig.llm_paper()) == 370_484_128  # "comparable parameter scales" (section V)
    assert count_parameters(FcConfig()) == 525_568
    assert count_parameters(TransformerCodewordConfig()) == 1_645_952
    assert count_parameters(Lvm4CfConfig.laptop()) == 428_992


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_survives_json(name):
    config = build(name).config
    assert config_of(json.loads(json.dumps(describe(config)))) == config
    assert count_parameters(config) == parameter_count(build(name))


def test_a_pretrained_folder_gives_the_first_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    settings = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=24,
    )
    model = transformers.LlamaForCausalLM(settings)
    model.save_pretrained(tmp_path)
    network = build("lvm4cf", backbone=dataclasses.replace(LLAMA, source=str(tmp_path)))
    for mine, theirs in zip(network.backbone.model.layers, model.model.layers[:2], strict=True):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
    with pytest.raises(ValueError, match="width: expected 16"):
        build("lvm4cf", backbone=dataclasses.replace(LLAMA, source=str(tmp_path), width=32))


def test_what_does_not_fit_is_refused():
    network = build("lvm4cf")
    with pytest.raises(ValueError, match=r"words: expected shape \[n, 8\], got \[2, 9\]"):
        network(words(2, 9))
    with pytest.raises(TypeError, match=r"words: expected complex64, got torch.float32"):
        network(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"codebook: expected shape \[n, 8\]"):
        refine_codebook(network, words(2, 4))
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        refine_codebook(network, words(2), batch=0)
    with pytest.raises(ValueError, match="dimension: expected a multiple of polarisations=2, got 7"):
        CodewordConfig(7)
    with pytest.raises(ValueError, match="polarisations: expected at least 1, got 0"):
        CodewordConfig(8, polarisations=0)
    with pytest.raises(ValueError, match="hidden: expected at least one width"):
        FcConfig(hidden=())
    with pytest.raises(ValueError, match="width: expected a multiple of heads"):
        TransformerCodewordConfig(width=30, heads=4)
    with pytest.raises(TypeError, match="config: expected one of fc, transformer, lvm4cf, got CodewordConfig"):
        build_network(CodewordConfig())
    with pytest.raises(ValueError, match="network: expected one of fc, transformer, lvm4cf, got 'cnn'"):
        config_of({"network": "cnn"})


def test_a_network_that_lost_its_mind_is_noticed():
    network = build("fc")
    torch.nn.init.constant_(network.layers[-1].bias, math.nan)
    with pytest.raises(FloatingPointError, match="refines codeword 0 to one without a direction"):
        refine_codebook(network, words(2))
