"""NF4LoRALinear.from_peft, against PEFT layers over bitsandbytes' Linear4bit as both packages build them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from csikernels import NF4LoRALinear

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.op("nf4_quantize", "nf4_dequantize", "nf4_lora_linear", "nf4_lora_linear_backward")
IN, OUT = 128, 96


def peft_model(*, quantised: bool = True, nested: bool = True, quant_type: str = "nf4", bias: bool = True, **config):
    """A model of one layer, its adapter drawn at random."""
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(IN, OUT, bias=bias, quant_type=quant_type, compress_statistics=nested)
    model = nn.Sequential(linear)
    if quantised:
        model.to("cpu")
    model.is_loaded_in_4bit = True
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False} | config
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def layer_of(model) -> nn.Module:
    layer = model.base_model.model[0]
    assert isinstance(layer, peft.tuners.lora.bnb.Linear4bit)
    return layer


def rows(count: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "config",
    [{}, {"bias": False}, {"use_rslora": True}, {"lora_bias": True}],
    ids=["plain", "no bias", "rslora", "lora bias"],
)
def test_same_outputs_and_gradients(backend, nested, config):
    model = peft_model(nested=nested, **config)
    source = layer_of(model)
    layer = NF4LoRALinear.from_peft(source)
    x = rows()
    torch.testing.assert_close(layer(x), model(x), rtol=1e-5, atol=1e-4)
    layer(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, source.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(layer.lora_b.grad, source.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-2)
    assert layer.rank == 4 and layer.scaling == source.scaling["default"]


def test_the_source_is_copied(backend):
    model = peft_model()
    layer = NF4LoRALinear.from_peft(layer_of(model))
    before = layer(rows())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(layer(rows()), before)


def test_not_quantised_yet(backend):
    # Outside .to(device), bitsandbytes keeps the dense weight; PEFT then wraps the layer as well.
    pending, ready = peft_model(quantised=False, nested=False), peft_model(nested=False)
    layer = NF4LoRALinear.from_peft(layer_of(pending))
    assert torch.equal(layer.packed, NF4LoRALinear.from_peft(layer_of(ready)).packed)
    torch.testing.assert_close(layer(rows()), ready(rows()), rtol=1e-5, atol=1e-4)


def test_after_a_call_in_eval_mode(backend):
    # On CPUs with AVX-512 BF16, that call changes the layer's own storage.
    exact = NF4LoRALinear.from_peft(layer_of(peft_model()))
    model = peft_model().eval()
    with torch.no_grad():
        wanted = model(rows(dtype=torch.bfloat16))
    state = layer_of(model).get_base_layer().weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        with pytest.warns(UserWarning, match="rounded the NF4 scales"):
            layer = NF4LoRALinear.from_peft(layer_of(model))
    else:
        layer = NF4LoRALinear.from_peft(layer_of(model))
    assert torch.equal(layer.packed, exact.packed)
    torch.testing.assert_close(layer.absmax, exact.absmax, rtol=2**-8, atol=0)
    assert layer.weight_dtype == torch.float32
    torch.testing.assert_close(layer(rows(dtype=torch.bfloat16)), wanted, rtol=0.05, atol=0.1)


def test_half_precision_input(backend):
    model = peft_model()
    layer = NF4LoRALinear.from_peft(layer_of(model))
    x = rows(dtype=torch.bfloat16)
    result = layer(x)
    assert result.dtype == torch.bfloat16
    wanted = layer(x.float())
    if backend == "cpp-avx512_bf16":  # multiplies in bfloat16: operands are rounded too, which elements near 0 feel
        error = (result.float() - wanted).square().mean().sqrt()
        assert error <= torch.finfo(torch.bfloat16).eps * wanted.square().mean().sqrt()
    else:
        torch.testing.assert_close(result, wanted.bfloat16())
    torch.testing.assert_close(result, model(x), rtol=0.02, atol=0.1)


def test_several_adapters(backend):
    model = peft_model()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    source = layer_of(model)
    assert NF4LoRALinear.from_peft(source).rank == 4
    second = NF4LoRALinear.from_peft(source, "second")
    model.set_adapter("second")
    torch.testing.assert_close(second(rows()), model(rows()), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"adapter: expected one of \['default', 'second'\], got 'third'"):
        NF4LoRALinear.from_peft(source, "third")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="adapter: expected a name, as 2 of"):
        NF4LoRALinear.from_peft(source)


def test_dropout(backend):
    model = peft_model(lora_dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout in training mode, got p=0.5; call layer.eval\(\) first"):
        NF4LoRALinear.from_peft(layer_of(model.train()))
    assert NF4LoRALinear.from_peft(layer_of(model.eval())).rank == 4


def test_errors(backend):
    with pytest.raises(TypeError, match="layer: expected a PEFT LoRA layer over a bitsandbytes Linear4bit, got Linear"):
        NF4LoRALinear.from_peft(nn.Linear(4, 4))
    dense = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), peft.LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(TypeError, match="layer: expected a PEFT LoRA layer over"):
        NF4LoRALinear.from_peft(dense.base_model.model[0])
    with pytest.raises(ValueError, match="expected NF4 codes, got quant_type 'fp4'"):
        NF4LoRALinear.from_peft(layer_of(peft_model(quant_type="fp4")))
    with pytest.raises(ValueError, match="expected plain LoRA, got Dora"):
        NF4LoRALinear.from_peft(layer_of(peft_model(use_dora=True)))
    merged = peft_model()
    with pytest.warns(UserWarning, match="4-bit"):
        merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerged"):
        NF4LoRALinear.from_peft(layer_of(merged))
