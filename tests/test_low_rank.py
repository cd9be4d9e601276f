"""Low-rank adaptation of language backbones: full precision and 4 bits, start, training, merging, state dicts."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from csikernels import NF4LoRALinear, loftq_init, nf4_quantize

pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from tiny_language import FAMILIES, PROJECTIONS, outputs, shake, tiny

from csimodels.models.low_rank import add_lora, merge_adapters, projection_bytes, quantize_backbone

pytestmark = [
    pytest.mark.usefixtures("small_models"),
    pytest.mark.op("nf4_quantize", "nf4_dequantize", "nf4_lora_linear", "nf4_lora_linear_backward"),
]


def relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((value - wanted).double().norm() / wanted.double().norm()).detach())


def plain_start(model: nn.Module, rank: int) -> nn.Module:
    return quantize_backbone(model, rank, start="lora")


def trainable(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}


def quantised_layers(model: nn.Module) -> dict[str, NF4LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4LoRALinear)}


# --- which layers, what trains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_quantised_and_nothing_else(family):
    model = quantize_backbone(tiny(family), 4, start="lora")
    assert len(quantised_layers(model)) == 2 * PROJECTIONS[family]
    left = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert left == (["pooler.dense"] if family == "bert" else [])


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_norms_and_positions_train(family, adapt):
    names = {name.lower() for name in trainable(adapt(tiny(family), 4))}
    kinds = ("lora_a", "lora_b", "norm", "ln_", "wpe", "position_embeddings")
    assert all(any(kind in name for kind in kinds) for name in names)
    assert sum("lora_" in name for name in names) == 2 * 2 * PROJECTIONS[family]
    norms = {"gpt2": 2 * 5, "llama": 5, "qwen2": 5, "bert": 2 * 5}[family]
    assert sum("norm" in name or "ln_" in name for name in names) == norms
    assert sum("wpe" in name or "position_embeddings" in name for name in names) == (family in ("gpt2", "bert"))


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
def test_norms_and_positions_can_stay_frozen(adapt):
    assert not any("ln_" in name for name in trainable(adapt(tiny(), 4, train_norms=False)))
    assert not any("wpe" in name for name in trainable(adapt(tiny(), 4, train_positions=False)))


def test_gpt2_has_the_trainable_parameters_of_the_paper():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2Model(transformers.GPT2Config())
        total = sum(parameter.numel() for parameter in model.parameters())
        add_lora(model)
    counts = {"lora": 0, "norms": 0, "positions": 0}
    for name, shape in trainable(model).items():
        counts["lora" if "lora_" in name else "positions" if "wpe" in name else "norms"] += shape.numel()
    width = 768
    adapters = 12 * 16 * ((width + 3 * width) + 2 * width + 2 * (width + 4 * width))
    assert counts == {"lora": adapters, "norms": 2 * width * 25, "positions": 1024 * width}
    assert sum(counts.values()) == 3_184_128  # 3.18 M
    assert round(total / 1e6, 2) == 124.44


class Network(nn.Module):
    """As MultiTaskPhy holds its LanguageBackbone: the transformers model one level deeper, other modules beside."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.model = tiny()
        self.backbone.embedding = nn.Embedding(11, 21)
        self.encoder, self.decoder = nn.Linear(5, 21), nn.Linear(21, 5)
        self.decoder.requires_grad_(False)


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
def test_a_networks_backbone_is_meant(adapt):
    network = Network()
    assert adapt(network, 4) is network
    names = trainable(network)
    assert {"encoder.weight", "backbone.model.ln_f.weight"} <= set(names)
    assert not {"decoder.weight", "backbone.embedding.weight", "backbone.model.wte.weight"} & set(names)
    assert type(network.encoder) is nn.Linear
    assert projection_bytes(network)[1] == projection_bytes(network.backbone)[1] > 0


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_lora_starts_as_the_model(family):
    model = tiny(family)
    wanted = outputs(model)
    torch.testing.assert_close(outputs(add_lora(model, 4)), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["loftq", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_quantised_model_is_the_one_with_those_dense_weights(backend, family, start):
    model = tiny(family)
    adapted = quantize_backbone(copy.deepcopy(model), 4, start=start)
    layers = quantised_layers(adapted)
    dense, errors = copy.deepcopy(model), []
    with torch.no_grad():
        for name, layer in layers.items():
            plain = dense.get_submodule(name)
            weight = layer.weight.dequantize(torch.float64) + layer.lora_b.double() @ layer.lora_a.double()
            weight = weight.T if family == "gpt2" else weight
            errors.append(relative(weight, plain.weight))
            plain.weight.copy_(weight)
    torch.testing.assert_close(outputs(adapted), outputs(dense), rtol=1e-4, atol=1e-4)
    assert max(errors) < 0.13 and relative(outputs(adapted), outputs(model)) < 0.3
    if start == "lora":
        assert all((layer.lora_b == 0).all() and layer.lora_a.std() > 0 for layer in layers.values())


def test_loftq_starts_closer_than_the_plain_start():
    model = tiny(n_embd=48, n_inner=96)
    wanted = outputs(model)
    errors = {
        start: relative(outputs(quantize_backbone(copy.deepcopy(model), 16, start=start)), wanted)
        for start in ("loftq", "lora")
    }
    assert errors["loftq"] < 0.7 * errors["lora"]


@pytest.mark.parametrize("adapt", [add_lora, plain_start])
def test_the_first_matrix_is_normal(adapt):
    torch.manual_seed(0)
    model = adapt(tiny(n_embd=96, n_inner=400), 8)
    drawn = {name: value for name, value in model.named_parameters() if "lora_a" in name.lower()}
    for value in drawn.values():
        samples = value.detach().double() * 8
        assert abs(samples.std() - 1) < 0.1
        assert abs((samples.abs() < 1).double().mean() - 0.6827) < 0.06  # 0.577 for a uniform distribution


@pytest.mark.parametrize("start", ["loftq", "lora"])
def test_alpha_scales_the_adapter_not_loftqs_start(start):
    layers = [quantised_layers(quantize_backbone(tiny(), 4, start=start, alpha=alpha)) for alpha in (None, 8)]
    for plain, scaled in zip(*(group.values() for group in layers), strict=True):
        assert (plain.scaling, scaled.scaling) == (1.0, 2.0)
        torch.testing.assert_close(scaled.merged_weight(), plain.merged_weight())
    lora = add_lora(tiny(), 4, alpha=8)
    assert lora.h[0].attn.c_attn.scaling == {"default": 2.0}


@pytest.mark.parametrize("seed", range(3))
def test_loftqs_residual_falls_and_is_no_worse_than_pefts(seed, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # PEFT's own code asks for a GPU by name.
    source = inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    theirs = dict(vars(loftq_utils))
    exec(source, theirs)
    weight = 0.02 * torch.randn(192, 128, generator=torch.Generator().manual_seed(seed))
    norms = [torch.linalg.matrix_norm(weight - nf4_quantize(weight).dequantize())]
    for iterations in range(1, 6):
        quantised, lora_a, lora_b = loftq_init(weight, 16, iterations=iterations)
        norms.append(torch.linalg.matrix_norm(weight - quantised.dequantize() - lora_b @ lora_a))
        dense, their_a, their_b = theirs["loftq_init"](weight, 4, 16, num_iter=iterations)
        assert norms[-1] <= torch.linalg.matrix_norm(weight - dense - their_b @ their_a) * (1 + 1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(norms))


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "share"), [(64, 0.1407), (32, 0.1563)])
def test_projections_take_four_bits_and_their_scales(block_size, share):
    model = tiny(n_embd=48, n_inner=96)
    count = 2 * (48 * 144 + 48 * 48 + 2 * 48 * 96)
    assert projection_bytes(model) == projection_bytes(add_lora(copy.deepcopy(model), 4)) == (4 * count, 4 * count)
    quantize_backbone(model, 4, start="lora", block_size=block_size)
    stored, plain = projection_bytes(model)
    held = [buffer for name, buffer in model.named_buffers() if name.endswith(("packed", "absmax"))]
    assert stored == sum(buffer.numel() * buffer.element_size() for buffer in held)
    assert plain == 4 * count
    assert stored / plain == pytest.approx(share, abs=1e-4) and stored <= 0.16 * plain


# --- training ---------------------------------------------------------------------------------------------------------


def step(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(2):  # with B = 0 the first step leaves A as it is
        optimizer.zero_grad()
        (outputs(model.train()) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone, plain_start])
def test_training_changes_what_trains_and_nothing_else(backend, adapt):
    def run():
        model = tiny(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        torch.manual_seed(3)
        return adapt(model, 4)

    model = run()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = set(trainable(model))
    step(model)
    assert {name for name, value in model.named_parameters() if value.grad is not None} == wanted
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == wanted
    again = step(run()).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_through_a_file_and_a_fresh_model(backend, family, tmp_path):
    model = shake(quantize_backbone(tiny(family), 4, alpha=6))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = quantize_backbone(tiny(family, seed=5), 4, start="lora")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    again, wanted = fresh.state_dict(), model.state_dict()
    assert list(again) == list(wanted)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert torch.equal(outputs(fresh), outputs(model))
    assert trainable(fresh) == trainable(model)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_outputs_and_gives_up_the_adapters(backend, family, adapt):
    model = shake(adapt(tiny(family), 4, alpha=6))
    wanted = outputs(model)
    assert merge_adapters(model) is model
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)
    plain = tiny(family, seed=7)
    plain.load_state_dict(model.state_dict())  # the names and layouts of a model that was never adapted
    assert torch.equal(outputs(plain), outputs(model))
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    stored, dense = projection_bytes(model)
    assert stored == dense
    assert not any("lora" in name or "proj" in name for name in trainable(model))


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
def test_merging_into_four_bits_again(backend, adapt):
    model = shake(adapt(tiny(), 4))
    merged = merge_adapters(copy.deepcopy(model))
    quantised = merge_adapters(model, quantize=True)
    for name, layer in quantised_layers(quantised).items():
        assert layer.rank == 0 and not layer.training
        wanted = nf4_quantize(merged.get_submodule(name).weight.T)
        assert torch.equal(layer.packed, wanted.packed) and torch.equal(layer.absmax, wanted.absmax)
    stored, dense = projection_bytes(quantised)
    assert stored < 0.16 * dense
    assert relative(outputs(quantised), outputs(merged)) < 0.3
    fresh = merge_adapters(quantize_backbone(tiny(seed=4), 2, start="lora"), quantize=True)
    fresh.load_state_dict(quantised.state_dict())
    assert torch.equal(outputs(fresh), outputs(quantised))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [add_lora, quantize_backbone])
def test_bad_arguments(adapt):
    with pytest.raises(
        ValueError, match=r"rank: expected an integer in 1\.\.21 for h\.0\.attn\.c_attn of shape \(63, 21\), got 22"
    ):
        adapt(tiny(), 22)
    with pytest.raises(
        ValueError,
        match=r"rank: expected an integer in 1\.\.10 for layers\.0\.self_attn\.k_proj of shape \(10, 20\), got 11",
    ):
        adapt(tiny("llama"), 11)
    with pytest.raises(ValueError, match="rank: .* got 0"):
        adapt(tiny(), 0)
    for alpha in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"alpha: expected a positive number, got {alpha}"):
            adapt(tiny(), 4, alpha=alpha)
    with pytest.raises(ValueError, match="model: expected a transformers model, .* got Linear"):
        adapt(nn.Linear(4, 4), 4)
    network = Network()
    network.backbone = None
    with pytest.raises(ValueError, match="model: expected one with a backbone, got Network"):
        adapt(network, 4)
    with pytest.raises(ValueError, match="expected Transformer layers with linear projections, GPT2Model has none"):
        adapt(tiny(n_layer=0), 4)


@pytest.mark.parametrize("second", [add_lora, quantize_backbone])
@pytest.mark.parametrize("first", [add_lora, quantize_backbone])
def test_adapters_are_refused_on_adapters(first, second):
    model = first(tiny(), 4)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"model: expected no adapters, got \w+ in h\.0\.attn\.c_attn"):
        second(model, 4)
    assert list(model.state_dict()) == list(before)


def test_bad_arguments_of_the_quantisation():
    with pytest.raises(ValueError, match="start: expected one of loftq, lora, got 'qlora'"):
        quantize_backbone(tiny(), 4, start="qlora")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn: iterations: expected an integer of at least 1, got 0"):
        quantize_backbone(tiny(), 4, 0)
    with pytest.raises(ValueError, match="block_size"):
        quantize_backbone(tiny(), 4, block_size=48)
    model = tiny()
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj: .*nan"):
        quantize_backbone(model, 4, start="lora")
    assert not quantised_layers(model) and all(value.requires_grad for value in model.parameters())


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="model: expected adapters, got none"):
        merge_adapters(tiny())
