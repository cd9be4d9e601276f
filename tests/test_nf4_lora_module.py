"""loftq_init and NF4LoRALinear: from dense and PEFT layers, through training, dtypes and state dicts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from csikernels import NF4LoRALinear, loftq_init, nf4_lora_linear, nf4_quantize

pytestmark = pytest.mark.op("nf4_quantize", "nf4_dequantize", "nf4_lora_linear", "nf4_lora_linear_backward")


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(rank: int = 4, **arguments) -> NF4LoRALinear:
    """A layer 70 -> 20 whose adapter is no longer zero."""
    torch.manual_seed(0)
    layer = NF4LoRALinear(70, 20, rank, **arguments)
    nn.init.normal_(layer.lora_b)
    return layer


def test_loftq_lowers_the_residual(backend):
    dense_weight = gaussian(48, 80) @ torch.diag(torch.linspace(0.1, 2, 80))
    plain = torch.linalg.matrix_norm(dense_weight - nf4_quantize(dense_weight).dequantize())
    norms = []
    for iterations in range(1, 7):
        weight, lora_a, lora_b = loftq_init(dense_weight, 8, iterations=iterations)
        norms.append(torch.linalg.matrix_norm(dense_weight - weight.dequantize() - lora_b @ lora_a))
    assert (lora_a.shape, lora_b.shape) == ((8, 80), (48, 8))
    assert (weight.shape, weight.block_size, weight.dtype) == ((48, 80), 64, torch.float32)
    assert norms[0] < plain
    assert all(later <= earlier for earlier, later in itertools.pairwise(norms))
    assert norms[4] < 0.98 * norms[0]


def test_loftq_first_iteration_is_the_best_approximation(backend):
    dense_weight = gaussian(30, 20, dtype=torch.float64)
    weight, lora_a, lora_b = loftq_init(dense_weight, 4, iterations=1, block_size=32)
    residual = dense_weight - weight.dequantize()
    assert torch.equal(weight.packed, nf4_quantize(dense_weight, 32).packed)
    singular = torch.linalg.svdvals(residual)
    torch.testing.assert_close(torch.linalg.matrix_norm(residual - lora_b @ lora_a), singular[4:].norm())
    for factor in (lora_a @ lora_a.T, lora_b.T @ lora_b):  # the singular values, split evenly
        torch.testing.assert_close(factor, torch.diag(singular[:4]), rtol=1e-10, atol=1e-10)


def test_loftq_at_full_rank_restores_the_weight(backend):
    dense_weight = gaussian(12, 16, dtype=torch.bfloat16)
    weight, lora_a, lora_b = loftq_init(dense_weight, 12)
    assert weight.dtype == torch.bfloat16 and lora_a.dtype == lora_b.dtype == torch.float32
    identity = torch.eye(16)
    merged = nf4_lora_linear(identity, weight, lora_a, lora_b).T
    torch.testing.assert_close(merged, dense_weight.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank: expected an integer in 1\.\.12 .* got 0"),
        ({"rank": 13}, r"rank: expected an integer in 1\.\.12 .* got 13"),
        ({"rank": 2.0}, "rank: .* got 2.0"),
        ({"rank": 2, "iterations": 0}, "iterations: expected an integer of at least 1, got 0"),
        ({"rank": 2, "block_size": 16}, "block_size"),
    ],
)
def test_loftq_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        loftq_init(gaussian(12, 16), **arguments)


def test_loftq_refuses_nan(backend):
    dense_weight = gaussian(12, 16)
    dense_weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"got nan at index \(3, 2\)"):
        loftq_init(dense_weight, 2)


def test_from_linear_starts_as_the_quantised_layer(backend):
    linear = nn.Linear(70, 20)
    layer = NF4LoRALinear.from_linear(linear, 4, alpha=8)
    x = gaussian(3, 70)
    weight = nf4_quantize(linear.weight)
    assert layer.scaling == 2.0
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize(), linear.bias), rtol=1e-5, atol=1e-5)
    assert torch.any(layer.lora_a != 0) and torch.all(layer.lora_b == 0)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert NF4LoRALinear.from_linear(nn.Linear(70, 20, bias=False), 4).bias is None


def test_from_loftq_is_closer_than_plain_nf4(backend):
    torch.manual_seed(0)
    linear = nn.Linear(70, 20)
    x = gaussian(50, 70)
    errors = [
        (layer(x) - linear(x)).norm()
        for layer in (NF4LoRALinear.from_linear(linear, 8), NF4LoRALinear.from_loftq(linear, 8))
    ]
    assert errors[1] < 0.8 * errors[0]
    layer = NF4LoRALinear.from_loftq(linear, 8, iterations=2, block_size=32)
    weight, lora_a, lora_b = loftq_init(linear.weight, 8, iterations=2, block_size=32)
    assert layer.scaling == 1.0 and torch.equal(layer.packed, weight.packed)
    assert torch.equal(layer.lora_a, lora_a) and torch.equal(layer.lora_b, lora_b)


def test_only_adapter_and_bias_train(backend):
    layer = trained(scaling=0.5)
    assert [name for name, _ in layer.named_parameters()] == ["lora_a", "lora_b", "bias"]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    x = gaussian(64, 70)
    target = layer(x).detach() + F.linear(F.linear(x, gaussian(2, 70, seed=1)), gaussian(20, 2, seed=2)) / 5
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.mse_loss(layer(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = layer.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lora_a", "lora_b", "bias"]


def test_merged_weight(backend):
    layer = trained(scaling=0.5)
    x = gaussian(3, 70)
    torch.testing.assert_close(layer(x), F.linear(x, layer.merged_weight(), layer.bias), rtol=1e-5, atol=1e-5)
    assert layer.merged_weight(torch.bfloat16).dtype == torch.bfloat16
    assert not layer.merged_weight().requires_grad


@pytest.mark.parametrize("block_size", [32, 256])
def test_state_dict_survives_a_file(backend, tmp_path, block_size):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = trained(scaling=0.3, block_size=block_size)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = NF4LoRALinear(70, 20, 4, block_size=block_size)
    result = other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    assert other.scaling == 0.3
    x = gaussian(3, 70)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: NF4LoRALinear(20, 70, 4), ValueError, r"expected .* \[70, 20, 64\], got format 1 with \[20, 70, 64\]"),
        (lambda: NF4LoRALinear(70, 20, 4, block_size=32), ValueError, r"\[20, 70, 32\], got .* \[20, 70, 64\]"),
        (lambda: NF4LoRALinear(70, 20, 5), RuntimeError, "lora_a"),
        (lambda: NF4LoRALinear(70, 20, 4, bias=False), RuntimeError, "bias"),
    ],
)
def test_a_foreign_state_dict_is_refused(other, error, message):
    with pytest.raises(error, match=message):
        other().load_state_dict(trained().state_dict())


def test_changes_of_dtype_keep_the_scales(backend):
    layer = trained()
    absmax = layer.absmax.clone()
    for half in (layer.bfloat16(), layer.half(), layer.to(torch.bfloat16)):
        assert half.absmax.dtype == torch.float32 and torch.equal(half.absmax, absmax)
        assert half.packed.dtype == torch.uint8
    assert layer.lora_a.dtype == layer.bias.dtype == torch.bfloat16
    assert layer(gaussian(3, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double()(gaussian(3, 70, dtype=torch.float64)).dtype == torch.float64
    assert torch.equal(layer.absmax, absmax)
    moved = layer.to("meta")
    assert moved.absmax.device == moved.packed.device == torch.device("meta")
    assert moved.absmax.dtype == torch.float32
    assert moved(torch.empty(3, 70, device="meta")).shape == (3, 20)


def test_built_on_meta(backend):
    layer = NF4LoRALinear(70, 20, 4, device="meta")
    layer.load_state_dict(trained(scaling=3.0).state_dict(), assign=True)
    x = gaussian(3, 70)
    assert torch.equal(layer(x), trained(scaling=3.0)(x))


def test_loftqs_state_dict_can_be_saved(backend, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = NF4LoRALinear.from_loftq(nn.Linear(70, 20), 4, 1)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    _, lora_a, lora_b = loftq_init(gaussian(20, 70), 4, iterations=1)
    assert lora_a.is_contiguous() and lora_b.is_contiguous()
    transposed = NF4LoRALinear.from_weight(nf4_quantize(gaussian(20, 70)), gaussian(70, 4).T, gaussian(4, 20).T)
    assert transposed.lora_a.is_contiguous() and transposed.lora_b.is_contiguous()


def test_from_weight(backend):
    weight, bias = nf4_quantize(gaussian(20, 70)), gaussian(20, seed=1)
    lora_a, lora_b, x = gaussian(4, 70, seed=2), gaussian(20, 4, seed=3), gaussian(3, 70, seed=4)
    layer = NF4LoRALinear.from_weight(weight, lora_a, lora_b, scaling=0.5, bias=bias)
    assert torch.equal(layer(x), nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=bias))
    assert (layer.rank, layer.scaling) == (4, 0.5)
    lora_a.zero_()
    bias.zero_()
    assert layer.lora_a.abs().min() > 0 and layer.bias.abs().min() > 0


def test_from_weight_without_an_adapter(backend):
    weight, x = nf4_quantize(gaussian(20, 70)), gaussian(3, 70, seed=4)
    layer = NF4LoRALinear.from_weight(weight)
    assert (layer.rank, layer.bias) == (0, None)
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize()), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.merged_weight(), weight.dequantize())
    layer(x).sum().backward()
    assert layer.lora_a.grad.shape == (0, 70)
    again = NF4LoRALinear.from_weight(nf4_quantize(gaussian(20, 70, seed=5)))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_weight_shares_the_buffers(backend):
    layer = trained()
    assert layer.weight.packed.data_ptr() == layer.packed.data_ptr()
    x = gaussian(3, 70)
    assert torch.equal(nf4_lora_linear(x, layer.weight, layer.lora_a, layer.lora_b, bias=layer.bias), layer(x))


def test_repr():
    wanted = "in_features=70, out_features=20, rank=4, scaling=0.5, bias=True, block_size=64"
    assert repr(trained(scaling=0.5)) == f"NF4LoRALinear({wanted})"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NF4LoRALinear(70, 20, 0), ValueError, r"rank: expected an integer in 1\.\.20 .* got 0"),
        (lambda: NF4LoRALinear(70, 20, 21), ValueError, r"rank: expected an integer in 1\.\.20 .* got 21"),
        (lambda: NF4LoRALinear(70, 20, 4, block_size=10), ValueError, "block_size"),
        (lambda: NF4LoRALinear(70, 20, 4, scaling=float("inf")), ValueError, "scaling"),
        (lambda: NF4LoRALinear.from_linear(nn.Linear(8, 8), 0), ValueError, "rank"),
        (lambda: NF4LoRALinear.from_linear(nn.Linear(8, 8), 0, alpha=8), ValueError, "rank"),
        (lambda: NF4LoRALinear.from_linear(nn.Linear(8, 8), 2, scaling=2.0, alpha=8), ValueError, "alpha"),
        (lambda: NF4LoRALinear.from_linear(nn.ReLU(), 2), TypeError, "linear: expected an nn.Linear .* got ReLU"),
        (lambda: NF4LoRALinear.from_loftq(nn.Linear(8, 8), 9), ValueError, "rank"),
        (lambda: NF4LoRALinear.from_weight(torch.ones(4, 4)), TypeError, "weight: expected an NF4Weight, got Tensor"),
        (
            lambda: NF4LoRALinear.from_weight(nf4_quantize(torch.ones(4, 4)), torch.ones(1, 4)),
            ValueError,
            "lora_a, lora_b: expected both or none, got lora_a",
        ),
        (lambda: trained()(torch.zeros(3, 71)), ValueError, r"x: expected \[..., 70\]"),
    ],
)
def test_module_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_compile_and_export(backend):
    layer, x = trained(scaling=0.5), gaussian(6, 70)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    assert torch.equal(program.module()(x[:3]), layer(x[:3]))
