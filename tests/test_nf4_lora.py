"""nf4_quantize and nf4_lora_linear on every backend, and loftq_init."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from csikernels import NF4Weight, loftq_init, nf4_lora_linear, nf4_quantize

pytestmark = pytest.mark.op("nf4_quantize", "nf4_dequantize", "nf4_lora_linear", "nf4_lora_linear_backward")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(64, 64), (7, 13), (1, 1), (3, 43), (33, 100), (2, 5000)]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(n: int, k: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """An NF4 weight [n, k] and an adapter, of the sizes that training gives them."""
    weight = nf4_quantize(gaussian(n, k, seed=seed) / k**0.5)
    lora_a, lora_b = gaussian(rank, k, seed=seed + 1) / k**0.5, gaussian(n, rank, seed=seed + 2)
    return weight, lora_a.to(dtype), lora_b.to(dtype)


def dense(x, weight, lora_a, lora_b, scaling=1.0, bias=None) -> torch.Tensor:
    """The layer from its formula, in float64."""
    merged = weight.dequantize(torch.float64) + scaling * lora_b.double() @ lora_a.double()
    return F.linear(x.double(), merged, None if bias is None else bias.double())


@pytest.mark.parametrize(
    ("n", "k", "rank", "lead"),
    [(96, 128, 16, (5,)), (1, 1, 1, (3,)), (13, 7, 2, (2, 3)), (65, 63, 1, ()), (40, 200, 8, (1,)), (31, 33, 0, (4,))],
)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_accuracy(backend, n, k, rank, lead, bias):
    weight, lora_a, lora_b = layer(n, k, rank)
    x, offset = gaussian(*lead, k, seed=9), gaussian(n, seed=10) if bias else None
    result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=offset)
    wanted = dense(x, weight, lora_a, lora_b, 0.5, offset)
    assert result.shape == (*lead, n) and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, None])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_half_precision_beats_the_plain_layer(backend, dtype, adapter, rows):
    n, k = 96, 256
    weight, lora_a, lora_b = layer(n, k, 8, adapter or dtype)
    x, bias = gaussian(rows, k, dtype=dtype, seed=9), gaussian(n, dtype=dtype, seed=10)
    result = nf4_lora_linear(x, weight, lora_a, lora_b, bias=bias)
    assert result.dtype == dtype
    wanted = dense(x, weight, lora_a, lora_b, bias=bias)
    plain = F.linear(x, weight.dequantize(dtype), bias) + F.linear(F.linear(x, lora_a.to(dtype)), lora_b.to(dtype))
    error = (result.double() - wanted).square().mean().sqrt()
    assert error <= 1.1 * (plain.double() - wanted).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * wanted.square().mean().sqrt()


def test_float64_is_float64(backend):
    weight, lora_a, lora_b = layer(20, 70, 4)
    x = gaussian(6, 70, dtype=torch.float64, seed=9)
    result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=2)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, dense(x, weight, lora_a, lora_b, 2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
def test_empty_batch(backend, lead):
    weight, lora_a, lora_b = layer(20, 70, 4)
    x, lora_a = torch.zeros(*lead, 70, requires_grad=True), lora_a.requires_grad_()
    result = nf4_lora_linear(x, weight, lora_a, lora_b)
    assert result.shape == (*lead, 20)
    result.sum().backward()
    assert x.grad.shape == x.shape and torch.all(lora_a.grad == 0)


@pytest.mark.parametrize("lead", [(3,), (), (2, 2)])
def test_gradcheck(backend, lead):
    weight, lora_a, lora_b = layer(6, 5, 2, torch.float64)
    inputs = [gaussian(*lead, 5, dtype=torch.float64, seed=9), lora_a, lora_b, gaussian(6, dtype=torch.float64)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def forward(x, a, b, bias):
        return nf4_lora_linear(x, weight, a, b, scaling=0.7, bias=bias)

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("bias",), ("x", "bias"), ("lora_a", "lora_b")])
def test_each_gradient_alone(backend, wanted):
    weight, lora_a, lora_b = layer(20, 70, 4)
    tensors = {"x": gaussian(5, 70, seed=9), "lora_a": lora_a, "lora_b": lora_b, "bias": gaussian(20, seed=10)}
    for name in wanted:
        tensors[name].requires_grad_()
    x, a, b, bias = tensors.values()
    upstream = gaussian(5, 20, seed=11)
    nf4_lora_linear(x, weight, a, b, scaling=0.5, bias=bias).backward(upstream)
    got = {name: tensors[name].grad.clone() for name in wanted}
    for name in wanted:
        tensors[name].grad = None
    dense(x, weight, a, b, 0.5, bias).backward(upstream.double())
    for name in wanted:
        torch.testing.assert_close(got[name], tensors[name].grad, rtol=1e-5, atol=1e-5, msg=name)
    assert all((tensors[name].grad is not None) == (name in wanted) for name in tensors)


def test_gradients_keep_their_dtypes(backend):
    weight, lora_a, lora_b = layer(20, 70, 4)
    tensors = [gaussian(5, 70, dtype=torch.bfloat16), lora_a, lora_b.half(), gaussian(20, dtype=torch.bfloat16)]
    x, a, b, bias = (tensor.requires_grad_() for tensor in tensors)
    nf4_lora_linear(x, weight, a, b, bias=bias).sum().backward()  # an expanded, stride-0 gradient
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dense(doubles[0], weight, *doubles[1:3], bias=doubles[3]).sum().backward()
    for tensor, double in zip(tensors, doubles, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.grad.double(), double.grad, rtol=4 * max(eps, 1e-6), atol=1e-4)


def test_no_second_derivative(backend):
    weight, lora_a, lora_b = layer(6, 5, 2)
    x = gaussian(3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(nf4_lora_linear(x, weight, lora_a, lora_b).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    weight, lora_a, lora_b = layer(20, 70, 4)
    x = gaussian(5, 70, seed=9).requires_grad_()
    lora_a.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        result = nf4_lora_linear(x, weight, lora_a, lora_b)
        assert F.linear(x, lora_a).dtype == result.dtype == dtype
        assert nf4_lora_linear(x.double(), weight, lora_a, lora_b).dtype == torch.float64
        result.float().sum().backward()  # inside the region, as under activation checkpointing
    assert torch.equal(result, nf4_lora_linear(x.to(dtype), weight, lora_a, lora_b))
    assert x.grad.dtype == lora_a.grad.dtype == torch.float32
    wanted = x.detach().to(dtype).double().sum(dim=0) * lora_b.double().sum(dim=0)[:, None]
    torch.testing.assert_close(lora_a.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_non_contiguous(backend):
    weight = nf4_quantize(gaussian(70, 20).T)
    x = gaussian(70, 4, 6, seed=9).permute(2, 1, 0)[::2]
    lora_a, lora_b, bias = gaussian(70, 8, seed=1).T[::2], gaussian(40, 4, seed=2)[::2], gaussian(40)[::2]
    result = nf4_lora_linear(x, weight, lora_a, lora_b, bias=bias)
    wanted = dense(x, weight, lora_a, lora_b, bias=bias)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous()


def test_no_alias(backend):
    weight, lora_a, lora_b = layer(4, 4, 2)
    x = gaussian(4, 4)
    outputs = [nf4_lora_linear(x, weight, lora_a, lora_b), weight.dequantize(), weight.dequantize()]
    tensors = [x, weight.packed, weight.absmax, lora_a, lora_b, *outputs]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 8


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 130, 700), (7, 96, 33), (200, 33, 100)])
def test_thread_count_changes_nothing(backend, threads, rows, n, k):
    weight, lora_a, lora_b = layer(n, k, 8)
    x = gaussian(rows, k, seed=9)
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b)]
        out = nf4_lora_linear(leaves[0], weight, *leaves[1:])
        out.square().sum().backward()
        quantised = nf4_quantize(gaussian(n, k))
        results.append([out, *(leaf.grad for leaf in leaves), quantised.packed, quantised.dequantize()])
    for result in results[1:]:
        for name, got, wanted in zip(("out", "x", "a", "b", "packed", "dense"), result, results[0], strict=True):
            assert torch.equal(got, wanted), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 69)}, ValueError, r"x: expected \[..., 70\] .* got \(3, 69\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected \[..., 70\] .* got \(\)"),
        ({"x": torch.zeros(3, 70, dtype=torch.int64)}, TypeError, "x: expected a float16, .* got torch.int64"),
        ({"x": torch.zeros(3, 70, dtype=torch.complex64)}, TypeError, "x: .* got torch.complex64"),
        ({"x": torch.zeros(3, 70, device="meta")}, ValueError, "x: expected a tensor on cpu, .* got one on meta"),
        ({"weight": torch.zeros(20, 70)}, TypeError, "weight: expected an NF4Weight, got Tensor"),
        ({"lora_a": torch.zeros(4, 71)}, ValueError, r"lora_a: expected \[r, 70\] .* got \(4, 71\)"),
        ({"lora_b": torch.zeros(20, 5)}, ValueError, r"lora_b: expected \(20, 4\), got \(20, 5\)"),
        ({"lora_b": torch.zeros(4, 20)}, ValueError, r"lora_b: expected \(20, 4\), got \(4, 20\)"),
        ({"bias": torch.zeros(21)}, ValueError, r"bias: expected \(20,\), got \(21,\)"),
        ({"bias": 0.5}, TypeError, "bias: .* got float"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number, got nan"),
        ({"scaling": "2"}, ValueError, "scaling: expected a finite number, got '2'"),
    ],
)
def test_linear_errors(backend, change, error, message):
    weight, lora_a, lora_b = layer(20, 70, 4)
    arguments = {"x": torch.zeros(3, 70), "weight": weight, "lora_a": lora_a, "lora_b": lora_b} | change
    with pytest.raises(error, match=message):
        nf4_lora_linear(**arguments)


def test_arrays(backend):
    weight, lora_a, lora_b = layer(20, 70, 4)
    x = gaussian(5, 70, seed=9)
    wanted = nf4_lora_linear(x, weight, lora_a, lora_b, bias=lora_b[:, 0])
    result = nf4_lora_linear(x.numpy(), weight, lora_a.numpy(), lora_b.numpy(), bias=lora_b[:, 0].numpy())
    assert isinstance(result, np.ndarray) and np.array_equal(result, wanted.numpy())
    assert np.array_equal(np.from_dlpack(wanted), result)
    with pytest.raises(TypeError, match="arrays of one kind"):
        nf4_lora_linear(x.numpy(), weight, lora_a, lora_b)
    dense_weight = gaussian(20, 70)
    assert torch.equal(nf4_quantize(dense_weight.numpy()).packed, weight_codes(dense_weight))
    flipped = dense_weight.numpy()[::-1]
    assert torch.equal(nf4_quantize(flipped).packed, weight_codes(dense_weight.flip(0)))
    quantised, a, b = loftq_init(dense_weight.numpy(), 3, iterations=1)
    assert isinstance(quantised, NF4Weight) and isinstance(a, np.ndarray) and isinstance(b, np.ndarray)


def weight_codes(dense_weight: torch.Tensor) -> torch.Tensor:
    return nf4_quantize(dense_weight).packed


def test_opcheck(backend, opcheck):
    dense_weight = gaussian(20, 35)
    opcheck("nf4_quantize", (dense_weight, 64))
    weight, lora_a, lora_b = layer(20, 35, 4)
    opcheck("nf4_dequantize", (weight.packed, weight.absmax, [20, 35], 64, torch.bfloat16))
    x, bias = gaussian(2, 3, 35), gaussian(20)
    for tensor in (x, lora_a, lora_b, bias):
        tensor.requires_grad_()
    opcheck("nf4_lora_linear", (x, weight.packed, weight.absmax, 64, lora_a, lora_b, 0.5, bias))
    opcheck("nf4_lora_linear", (x.bfloat16(), weight.packed, weight.absmax, 64, lora_a, lora_b, 0.5, None))
    given = [tensor.detach() for tensor in (gaussian(2, 3, 20), x, weight.packed, weight.absmax)]
    for mask in ([True] * 4, [False, True, False, True]):
        opcheck("nf4_lora_linear_backward", (*given, 64, lora_a.detach(), lora_b.detach(), 0.5, mask))


def test_compile(backend):
    weight, lora_a, lora_b = layer(20, 70, 4)
    lora_a.requires_grad_()

    def forward(x, a):
        return nf4_lora_linear(x, weight, a, lora_b, scaling=2.0)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for rows in (5, 8):
        x = gaussian(rows, 70, seed=rows)
        result = compiled(x, lora_a)
        assert torch.equal(result, nf4_lora_linear(x, weight, lora_a, lora_b, scaling=2.0))
        lora_a.grad = None
        result.sum().backward()
        wanted = 2 * x.double().sum(dim=0) * lora_b.double().sum(dim=0)[:, None]
        torch.testing.assert_close(lora_a.grad.double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traced = torch.compile(forward, fullgraph=True, backend="aot_eager")(x, lora_a)
        assert traced.dtype == torch.bfloat16 and torch.equal(traced, forward(x, lora_a))
