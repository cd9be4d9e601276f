"""Adapter files in PEFT's format, to and from PEFT, and 4-bit weights of bitsandbytes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from csikernels import NF4LoRALinear, NF4Weight

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from safetensors.torch import load_file, save_file
from tiny_language import FAMILIES, outputs, shake, tiny

from csimodels.files import load_metadata
from csimodels.models.adapter_file import CONFIG_FILE, TENSORS_FILE, load_adapter, save_adapter
from csimodels.models.bitsandbytes_weights import load_bitsandbytes, read_bitsandbytes
from csimodels.models.low_rank import add_lora, quantize_backbone

pytestmark = [
    pytest.mark.usefixtures("small_models"),
    # PEFT asks the base model's folder whether the vocabulary changed.
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # which PEFT still asks for
]


def loftq(model: nn.Module, rank: int, **more) -> nn.Module:
    return quantize_backbone(model, rank, 2, **more)  # the first iteration has the Q of the plain start


def plain_start(model: nn.Module, rank: int, **more) -> nn.Module:
    return quantize_backbone(model, rank, start="lora", **more)


ADAPT = [add_lora, loftq, plain_start]


def dequantised(model: nn.Module, quantised: nn.Module) -> nn.Module:
    """``model`` with the quantised weights, without adapters."""
    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, NF4LoRALinear):
                weight = model.get_submodule(name).weight
                dense = layer.weight.dequantize()
                weight.copy_(dense.T if model.config.model_type == "gpt2" else dense)
    return model


def written_by_peft(model: nn.Module, folder, **config) -> nn.Module:
    """A PEFT model over ``model`` with a random adapter, saved to ``folder``."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings | {"fan_in_fan_out": True} | config)).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def edit(folder, **changes) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- ours to ours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, adapt, tmp_path):
    model = shake(adapt(tiny(family), 4, alpha=6))
    save_adapter(model, tmp_path / "new" / "adapter")
    other = adapt(tiny(family), 4)
    load_adapter(other, tmp_path / "new" / "adapter")
    assert torch.equal(outputs(other), outputs(model))
    again, wanted = other.state_dict(), model.state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    save_adapter(other, tmp_path / "again")
    first, second = tmp_path / "new" / "adapter", tmp_path / "again"
    assert (first / CONFIG_FILE).read_bytes() == (second / CONFIG_FILE).read_bytes()
    assert load_metadata(first / TENSORS_FILE) == load_metadata(second / TENSORS_FILE)


def test_frozen_norms_and_positions_are_saved_too(tmp_path):
    model = shake(add_lora(tiny(), 4)).requires_grad_(False)
    save_adapter(model, tmp_path)
    other = add_lora(tiny(), 4)
    load_adapter(other, tmp_path)
    assert torch.equal(outputs(other), outputs(model))


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_saved(family, tmp_path):
    model = shake(add_lora(tiny(family), 4, alpha=6))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path)
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(model), rtol=1e-5, atol=1e-6)
    assert relative_change(outputs(tiny(family)), outputs(model)) > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    other = add_lora(tiny(family), 4)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(outputs(other), outputs(model))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float(((before - after).norm() / before.norm()).detach())


@pytest.mark.parametrize("adapt", [loftq, plain_start])
def test_peft_loads_an_adapter_over_the_dequantised_weights(adapt, tmp_path):
    model = shake(adapt(tiny(), 4, alpha=6))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(dequantised(tiny(), model), tmp_path)
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"modules_to_save": ["ln_1", "ln_2", "ln_f", "wpe"]}],
    ids=["", "rslora", "norms"],
)
def test_an_adapter_that_peft_wrote(config, tmp_path):
    theirs = written_by_peft(tiny(), tmp_path, **config)
    model = add_lora(tiny(), 4)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs.base_model.model), rtol=1e-5, atol=1e-6)
    quantised = plain_start(tiny(), 4)
    theirs = peft.PeftModel.from_pretrained(dequantised(tiny(), quantised), tmp_path)
    load_adapter(quantised, tmp_path)
    torch.testing.assert_close(outputs(quantised), outputs(theirs.base_model.model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_causal_model(tmp_path):
    import transformers

    model = tiny()
    causal = transformers.GPT2LMHeadModel(model.config)
    causal.transformer.load_state_dict(model.state_dict())
    theirs = written_by_peft(causal, tmp_path)
    ours = add_lora(tiny(), 4)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(outputs(ours), outputs(theirs.base_model.model.transformer), rtol=1e-5, atol=1e-6)


# --- what does not fit ------------------------------------------------------------------------------------------------


def refused(model: nn.Module, folder, message: str, error: type[Exception] = ValueError) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_backbone(tmp_path):
    save_adapter(add_lora(tiny(), 4), tmp_path)
    names = [r"gpt2 \(width 21, 2 layers\)", r"gpt2 \(width 24, 2 layers\)", r"gpt2 \(width 21, 3 layers\)"]
    refused(add_lora(tiny(n_embd=24), 4), tmp_path, f"an adapter of {names[0]}, the model is {names[1]}")
    refused(loftq(tiny(n_layer=3), 4), tmp_path, f"an adapter of {names[0]}, the model is {names[2]}")
    refused(add_lora(tiny("llama"), 4), tmp_path, rf"an adapter of {names[0]}, the model is llama \(width 20")


def test_another_backbone_of_pefts_files(tmp_path):
    written_by_peft(tiny(), tmp_path / "deep")
    message = r"an adapter of 'some/model' does not fit gpt2 \(width 21, 1 layers\): 8 tensors"
    edit(tmp_path / "deep", base_model_name_or_path="some/model")
    refused(add_lora(tiny(n_layer=1), 4), tmp_path / "deep", message)
    refused(add_lora(tiny(n_layer=3), 4), tmp_path / "deep", r"0 tensors .* 8 missing \['h\.2\.attn\.c_attn\.lora_A")
    refused(add_lora(tiny(n_inner=34), 4), tmp_path / "deep", r"4 tensors .*'h\.0\.mlp\.c_fc\.lora_B\.weight'")
    written_by_peft(tiny(), tmp_path / "partial", target_modules=["c_attn"])
    refused(add_lora(tiny(), 4), tmp_path / "partial", "12 missing")
    written_by_peft(tiny(), tmp_path / "more", modules_to_save=["wte"])
    refused(add_lora(tiny(), 4), tmp_path / "more", r"1 tensors .*'wte\.weight'")


@pytest.mark.parametrize("adapt", ADAPT)
def test_another_rank(adapt, tmp_path):
    save_adapter(adapt(tiny(), 4), tmp_path)
    refused(adapt(tiny(), 5), tmp_path, "rank: expected 5, as the model's adapters have, got 4")


@pytest.mark.parametrize("adapt", ADAPT)
def test_other_weights(adapt, tmp_path):
    source = shake(adapt(tiny(), 4))
    save_adapter(source, tmp_path)
    others = [adapt(tiny(seed=1), 4)] + [other(tiny(), 4) for other in ADAPT if other is not adapt]
    if adapt is loftq:
        others.append(quantize_backbone(tiny(), 4, 5))  # another Q of the same W
    for model in others:
        refused(model, tmp_path, r"trained over weights [0-9a-f]{12} of gpt2 \(width 21, 2 layers\), the model has")
        load_adapter(model, tmp_path, other_weights=True)
        assert torch.equal(model.ln_f.weight, source.ln_f.weight)


def test_weights_with_the_same_codes_and_other_scales(tmp_path):
    model, doubled = plain_start(tiny(), 4), tiny()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4LoRALinear):
                doubled.get_submodule(name).weight.mul_(2)
    other = plain_start(doubled, 4)
    assert torch.equal(other.h[0].attn.c_attn.packed, model.h[0].attn.c_attn.packed)
    refused(other, tmp_path, "trained over weights")


def test_unreadable_files(tmp_path):
    model = add_lora(tiny(), 4)
    refused(model, tmp_path, "adapter_config.json: no such file", FileNotFoundError)
    save_adapter(model, tmp_path)
    good = (tmp_path / TENSORS_FILE).read_bytes()
    (tmp_path / TENSORS_FILE).write_bytes(good[:-5])
    refused(model, tmp_path, "adapter_model.safetensors: not a readable safetensors file")
    (tmp_path / TENSORS_FILE).unlink()
    refused(model, tmp_path, "adapter_model.safetensors: no such file", FileNotFoundError)
    (tmp_path / TENSORS_FILE).write_bytes(good)
    for changes, message in [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', as of plain LoRA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected False"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern: expected {}"),
        ({"lora_alpha": None}, "r, lora_alpha: expected numbers, got 4, None"),
    ]:
        whole = json.loads((tmp_path / CONFIG_FILE).read_text())
        edit(tmp_path, **changes)
        refused(model, tmp_path, message)
        (tmp_path / CONFIG_FILE).write_text(json.dumps(whole))
    for text in ("{", "[]", '{"r": 4}'):
        (tmp_path / CONFIG_FILE).write_text(text)
        refused(model, tmp_path, "not a configuration of a PEFT LoRA adapter")


def test_models_without_one_adapter(tmp_path):
    for call in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match="model: expected adapters, got none"):
            call(tiny(), tmp_path)
        with pytest.raises(ValueError, match="model: expected the transformers model itself, got one wrapped"):
            call(written_by_peft(tiny(), tmp_path / "peft"), tmp_path)
    mixed = loftq(tiny(), 4)
    mixed.h[0].attn.c_attn.scaling = 2.0
    with pytest.raises(ValueError, match="expected adapters of one rank and scaling"):
        save_adapter(mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    several = add_lora(tiny(), 4)
    several.h[1].mlp.c_fc.update_layer("second", 2, lora_alpha=2, config=peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"expected one adapter in h\.1\.mlp\.c_fc, got \['default', 'second'\]"):
        save_adapter(several, tmp_path / "several")


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def bitsandbytes_layer(weight: torch.Tensor, bias: torch.Tensor | None = None, **config) -> nn.Module:
    """Its Linear4bit of a dense weight [out, in]."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = {"quant_type": "nf4"} | config
    layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=bias is not None, **config)
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, **config)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.to("cpu")


def bitsandbytes_model(family: str, nested: bool) -> dict[str, torch.Tensor]:
    """State dict of the tiny model as `transformers` writes it after 4-bit loading."""
    model = tiny(family)
    for name, module in dict(model.named_modules()).items():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "pooler.dense":
            weight = module.weight.detach().T.contiguous() if family == "gpt2" else module.weight.detach()
            model.set_submodule(name, bitsandbytes_layer(weight, module.bias, compress_statistics=nested))
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (300, 256)])  # of the latter, double quantisation has five blocks
def test_read_bitsandbytes(shape, nested, dtype, tmp_path):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = bitsandbytes_layer(weight, compress_statistics=nested)
    save_file({f"a.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "layer.safetensors")
    tensors = load_file(tmp_path / "layer.safetensors")
    assert ("a.weight.nested_absmax" in tensors) == nested
    read = read_bitsandbytes(tensors, "a.weight")
    from bitsandbytes.functional import dequantize_4bit

    wanted = NF4Weight.from_bitsandbytes(layer.weight.quant_state, layer.weight.data)
    assert (read.shape, read.dtype, read.block_size) == (shape, dtype, 64)
    assert torch.equal(read.packed, wanted.packed) and torch.equal(read.absmax, wanted.absmax)
    assert torch.equal(read.dequantize(), dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_bitsandbytes(family, nested):
    tensors = bitsandbytes_model(family, nested)
    prefix = tiny(family).base_model_prefix
    model = load_bitsandbytes(tiny(family, seed=1), {f"{prefix}.{name}": value for name, value in tensors.items()}, 4)
    if not nested:  # the codes that our own quantisation gives, and all else taken over
        assert torch.equal(outputs(model), outputs(plain_start(tiny(family), 4)))
    else:
        dense = dequantised(tiny(family), model)
        torch.testing.assert_close(outputs(model), outputs(dense), rtol=1e-4, atol=1e-5)
    reference = plain_start(tiny(family), 4)
    wanted = {name: value.requires_grad for name, value in reference.named_parameters()}
    assert {name: value.requires_grad for name, value in model.named_parameters()} == wanted


def test_bitsandbytes_errors():
    layer = bitsandbytes_layer(torch.ones(64, 64), compress_statistics=True)
    tensors = {name: value.clone() for name, value in layer.state_dict().items()}
    state = "weight.quant_state.bitsandbytes__nf4"
    for changes, message in [
        ({"weight": None}, "weight: expected a bitsandbytes NF4 weight, missing the codes"),
        ({"weight.absmax": None, state: None}, f"missing absmax, {state.removeprefix('weight.')}"),
        ({"weight.nested_quant_map": None}, "missing nested_quant_map"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, r"weight\.quant_map: expected NF4's levels"),
        ({state: torch.zeros(5, dtype=torch.uint8)}, "weight: no readable bitsandbytes NF4 weight"),
        ({"weight.absmax": torch.zeros(3, dtype=torch.uint8)}, r"no readable .*absmax: expected .* shape \(64,\)"),
    ]:
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            read_bitsandbytes(changed)
    fp4 = bitsandbytes_layer(torch.ones(64, 64), quant_type="fp4")
    with pytest.raises(ValueError, match=r"weight: expected .*nf4, got quant_state\.bitsandbytes__fp4"):
        read_bitsandbytes(fp4.state_dict())
    with pytest.raises(ValueError, match="h.0.attn.c_attn.weight: expected a bitsandbytes NF4 weight, missing absmax"):
        load_bitsandbytes(tiny(), tiny().state_dict(), 4)
    whole = bitsandbytes_model("gpt2", False)
    for changes, message in [
        ({"ln_f.weight": None}, r"ln_f\.weight: expected \(21,\), got none"),
        ({"wpe.weight": torch.zeros(8, 21)}, r"wpe\.weight: expected \(9, 21\), got \(8, 21\)"),
        ({}, r"h\.0\.mlp\.c_fc\.weight: expected \(34, 21\), got \(33, 21\)"),
    ]:
        changed = {name: value for name, value in {**whole, **changes}.items() if value is not None}
        model = tiny(seed=1) if changes else tiny(n_inner=34)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            load_bitsandbytes(model, changed, 4)
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(value, before[name]) for name, value in after.items())


def test_bitsandbytes_layers_are_not_quantised_again():
    model = tiny("llama")
    model.layers[1].mlp.up_proj = bitsandbytes_layer(torch.ones(34, 20))
    with pytest.raises(TypeError, match=r"layer: expected a floating weight, got torch\.uint8"):
        quantize_backbone(model, 1, start="lora")
