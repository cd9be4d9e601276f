"""nf4_quantize, dequantize and nf4_lora_linear with its gradients on a GPU, or its simulator."""

from __future__ import annotations

import math
import re

import pytest
import torch
from on_reference import reference
from test_nf4_lora import dense, gaussian, layer
from test_nf4_lora_kernels import sizes
from torch.nn import functional as F

import csikernels
from csikernels import NF4LoRALinear, NF4Weight, nf4_lora_linear, nf4_quantize

pytestmark = pytest.mark.gpu("cuda", "triton")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


def layer_on(device, n, k, rank, dtype=torch.float32, block_size=64):
    """A weight [n, k] quantised by the reference, and an adapter."""
    _, lora_a, lora_b = reference(layer, n, k, rank, dtype)
    weight = reference(nf4_quantize, gaussian(n, k) / k**0.5, block_size)
    return weight.to(device), lora_a.to(device), lora_b.to(device)


def wanted_output(*args):
    return reference(dense, *args)


# Codes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "k", "block_size"),
    [
        (64, 64, 64),
        (7, 13, 32),
        (1, 1, 4096),
        (3, 43, 64),
        (33, 100, 512),
        (2, 5000, 4096),
        (5, 1639, 2048),
        (4, 32, 32),
    ],
)
def test_codes_and_scales_are_the_references(device, dtype, n, k, block_size):
    dense_weight = gaussian(n, k, dtype=dtype)
    got = nf4_quantize(dense_weight.to(device), block_size)
    wanted = reference(nf4_quantize, dense_weight, block_size)
    assert torch.equal(got.packed.cpu(), wanted.packed) and torch.equal(got.absmax.cpu(), wanted.absmax)
    for to in FLOATS:
        assert torch.equal(got.dequantize(to).cpu(), reference(wanted.dequantize, to))


def test_codes_at_the_thresholds(device):
    levels = torch.tensor(csikernels.reference.nf4_lora.LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    nearby = [middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels]
    blocks = F.pad(torch.cat(nearby), (0, 64 - 61), value=1.0)
    scales = torch.tensor([1.0, 0.37, 3e38, 1.2e-38, 3e-42, 0.0])[:, None]
    for dense_weight in (blocks * scales, (blocks * scales)[:, :61]):  # the latter ends in a shorter block
        got = nf4_quantize(dense_weight.to(device))
        wanted = reference(nf4_quantize, dense_weight)
        assert torch.equal(got.packed.cpu(), wanted.packed) and torch.equal(got.absmax.cpu(), wanted.absmax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_element_that_is_not_finite_is_named(device, bad):
    dense_weight = gaussian(90, 100)
    dense_weight[61, 7] = dense_weight[83, 99] = dense_weight[61, 9] = bad
    with pytest.raises(ValueError, match=r"got -?(nan|inf) at index \(61, 7\)"):
        nf4_quantize(dense_weight.to(device))


def test_strided_and_shifted_weights(device):
    dense_weight = gaussian(40, 70).T
    got, wanted = nf4_quantize(dense_weight.to(device)), reference(nf4_quantize, dense_weight)
    assert torch.equal(got.packed.cpu(), wanted.packed)
    # Codes at an odd address: no vector loads.
    weight, lora_a, lora_b = layer_on(device, 40, 64, 4)
    shifted = torch.cat([weight.packed[:1], weight.packed])[1:]
    moved = NF4Weight(shifted, weight.absmax, weight.shape)
    assert torch.equal(moved.dequantize(), weight.dequantize())
    for rows in (3, 20):
        for dtype in (torch.float32, torch.bfloat16):
            x = gaussian(rows, 64, dtype=dtype).to(device)
            wanted = wanted_output(x, weight, lora_a, lora_b)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            result = nf4_lora_linear(x, moved, lora_a, lora_b).double()
            torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)


# Layer ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "rank", "lead"),
    [(96, 128, 16, (5,)), (1, 1, 1, (3,)), (13, 7, 2, (2, 3)), (65, 63, 1, ()), (40, 200, 8, (1,)), (31, 33, 0, (4,)),
     (33, 544, 40, (16,)), (130, 192, 0, (17,)), (129, 95, 65, (3, 23)), (70, 64, 70, (65,)), (20, 2080, 3, (30,))],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_float32_accuracy(device, n, k, rank, lead, bias):
    weight, lora_a, lora_b = layer_on(device, n, k, rank)
    x, offset = gaussian(*lead, k, seed=9).to(device), gaussian(n, seed=10).to(device) if bias else None
    result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=offset)
    assert result.shape == (*lead, n) and result.dtype == torch.float32
    wanted = wanted_output(x, weight, lora_a, lora_b, 0.5, offset)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adapter", [torch.float32, None])
@pytest.mark.parametrize(("rows", "k"), [(1, 256), (5, 252), (13, 256), (64, 256), (70, 256), (70, 251)])
def test_half_precision_beats_the_plain_layer(device, dtype, adapter, rows, k):
    n = 96
    weight, lora_a, lora_b = layer_on(device, n, k, 8, adapter or dtype)
    x, bias = gaussian(rows, k, dtype=dtype, seed=9).to(device), gaussian(n, dtype=dtype, seed=10).to(device)
    result = nf4_lora_linear(x, weight, lora_a, lora_b, bias=bias)
    assert result.dtype == dtype
    wanted = wanted_output(x, weight, lora_a, lora_b, 1.0, bias)
    plain = F.linear(x, weight.dequantize(dtype), bias) + F.linear(F.linear(x, lora_a.to(dtype)), lora_b.to(dtype))
    error = (result.double() - wanted).square().mean().sqrt()
    assert error <= 1.1 * (plain.double() - wanted).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * wanted.square().mean().sqrt()


@pytest.mark.parametrize("seed", range(30))
def test_any_size_and_its_gradients(device, seed):
    tokens, n, k, rank, block = sizes(seed)
    x_dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    adapter = x_dtype if seed % 2 else torch.float32
    weight, lora_a, lora_b = layer_on(device, n, k, rank, adapter, block)
    tensors = {"x": gaussian(tokens, k, dtype=x_dtype, seed=3), "a": lora_a, "b": lora_b}
    if seed % 4 < 2:
        tensors["bias"] = gaussian(n, dtype=adapter, seed=4)
    tensors = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    x, a, b, bias = (tensors.get(name) for name in ("x", "a", "b", "bias"))
    result = nf4_lora_linear(x, weight, a, b, scaling=0.5, bias=bias)
    upstream = gaussian(tokens, n, dtype=x_dtype, seed=5).to(device)
    grads = torch.autograd.grad(result, list(tensors.values()), upstream)

    doubles = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    wanted = wanted_output(doubles["x"], weight, doubles["a"], doubles["b"], 0.5, doubles.get("bias"))
    eps = 4e-7 if x_dtype == torch.float32 else torch.finfo(x_dtype).eps
    assert (result - wanted).norm() <= eps * (wanted.norm() + 0.01)
    expected = torch.autograd.grad(wanted, list(doubles.values()), upstream.double())
    for name, got, right in zip(tensors, grads, expected, strict=True):
        rounding = max(torch.finfo(got.dtype).eps, 4e-6)
        assert got.dtype == tensors[name].dtype and got.shape == right.shape
        assert (got - right).norm() <= rounding * (right.norm() + 1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 65])
@pytest.mark.parametrize(("n", "k"), [(100, 512), (512, 100)])
def test_a_reduction_cut_in_parts(device, dtype, rows, n, k):
    # One or two tiles of outputs and 8 steps: cut on any GPU, forward for one of the shapes, backward for the other.
    weight, lora_a, lora_b = layer_on(device, n, k, 5, dtype)
    x = gaussian(rows, k, dtype=dtype).to(device).requires_grad_()
    bias = gaussian(n, seed=4).to(device)
    results = [nf4_lora_linear(x, weight, lora_a, lora_b, scaling=3.0, bias=bias) for _ in range(2)]
    assert torch.equal(*results)
    wanted = wanted_output(x, weight, lora_a, lora_b, 3.0, bias)
    eps = 4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (results[0] - wanted).norm() <= eps * wanted.norm()
    upstream = gaussian(rows, n, dtype=dtype, seed=5).to(device)
    grads = [torch.autograd.grad(result, x, upstream)[0] for result in results]
    assert torch.equal(*grads)
    (right,) = torch.autograd.grad(wanted, x, upstream.double())
    assert (grads[0] - right).norm() <= eps * right.norm()


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("bias",), ("x", "bias"), ("a", "b")])
def test_each_gradient_alone(device, wanted):
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    tensors = {"x": gaussian(5, 70, seed=9), "a": lora_a, "b": lora_b, "bias": gaussian(20, seed=10)}
    tensors = {name: tensor.to(device).requires_grad_(name in wanted) for name, tensor in tensors.items()}
    x, a, b, bias = tensors.values()
    upstream = gaussian(5, 20, seed=11).to(device)
    nf4_lora_linear(x, weight, a, b, scaling=0.5, bias=bias).backward(upstream)
    leaves = [tensors[name] for name in wanted]
    expected = torch.autograd.grad(wanted_output(x, weight, a, b, 0.5, bias), leaves, upstream.double())
    for name, right in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensors[name].grad, right, rtol=1e-5, atol=1e-5, check_dtype=False, msg=name)
    assert all((tensor.grad is not None) == (name in wanted) for name, tensor in tensors.items())


def test_gradients_keep_their_dtypes(device):
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    tensors = [gaussian(5, 70, dtype=torch.bfloat16), lora_a, lora_b.half(), gaussian(20, dtype=torch.bfloat16)]
    x, a, b, bias = leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
    nf4_lora_linear(x, weight, a, b, bias=bias).sum().backward()  # an expanded, stride-0 gradient
    expected = torch.autograd.grad(wanted_output(x, weight, a, b, 1.0, bias).sum(), leaves)
    for leaf, right in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad - right).norm() <= max(torch.finfo(leaf.dtype).eps, 1e-6) * right.norm()


def test_float64_takes_the_reference(device):
    weight, lora_a, lora_b = layer_on(device, 6, 5, 2, torch.float64)
    inputs = [gaussian(3, 5, dtype=torch.float64), lora_a, lora_b, gaussian(6, dtype=torch.float64)]
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
    result = nf4_lora_linear(*inputs[:1], weight, *inputs[1:3], bias=inputs[3])
    wanted = wanted_output(inputs[0], weight, *inputs[1:3], 1.0, inputs[3])
    torch.testing.assert_close(result, wanted, rtol=1e-13, atol=1e-13)

    def forward(x, a, b, bias):
        return nf4_lora_linear(x, weight, a, b, scaling=0.7, bias=bias)

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
def test_empty_batch(device, lead):
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    x = torch.zeros(*lead, 70, device=device, requires_grad=True)
    leaves = [x, lora_a.requires_grad_(), lora_b.requires_grad_()]
    result = nf4_lora_linear(x, weight, lora_a, lora_b)
    assert result.shape == (*lead, 20)
    result.sum().backward()
    assert x.grad.shape == x.shape and all(torch.all(leaf.grad == 0) for leaf in leaves)


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_may_lie_anywhere(device, tokens, dtype):
    weight, _, _ = layer_on(device, 40, 128, 0)
    # Sliced where they lie: a copy to another device would close the gaps.
    lora_a, lora_b = gaussian(8, 256, dtype=dtype).to(device)[::2, ::2], gaussian(4, 40, dtype=dtype).to(device).T
    x = gaussian(256, 2 * tokens, dtype=dtype, seed=3).to(device).T[::2, ::2]
    bias = gaussian(80).to(device)[::2]
    result = nf4_lora_linear(x, weight, lora_a, lora_b, bias=bias)
    contiguous = [tensor.contiguous() for tensor in (x, lora_a, lora_b, bias)]
    assert torch.equal(result, nf4_lora_linear(contiguous[0], weight, *contiguous[1:3], bias=contiguous[3]))
    assert result.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "k"), [(3, 200), (13, 192), (37, 192), (80, 200)])
def test_a_token_does_not_see_its_neighbours(device, dtype, tokens, k):
    weight, lora_a, lora_b = layer_on(device, 33, k, 3, dtype)
    x = gaussian(tokens, k, dtype=dtype, seed=2)
    x[1, 77] = math.nan
    result = nf4_lora_linear(x.to(device), weight, lora_a, lora_b)
    rows = result.isnan().any(dim=1)
    assert result[1].isnan().all() and rows.sum() == 1


@pytest.mark.parametrize("tokens", [2, 20])
def test_a_scale_that_is_not_a_number_stays_in_its_block(device, tokens):
    weight, lora_a, lora_b = layer_on(device, 5, 40, 2)
    weight.absmax[1] = math.nan  # elements 64 to 127: rows 1 to 3
    result = nf4_lora_linear(gaussian(tokens, 40).to(device), weight, lora_a, lora_b)
    assert result.isnan().any(dim=0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(device, dtype):
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    for tokens in (5, 30):
        x = gaussian(tokens, 70, seed=9).to(device).requires_grad_()
        a = lora_a.clone().requires_grad_()
        with torch.autocast(device.type, dtype=dtype):
            result = nf4_lora_linear(x, weight, a, lora_b)
            assert result.dtype == dtype
            result.float().sum().backward()  # inside the region, as under activation checkpointing
        assert torch.equal(result, nf4_lora_linear(x.to(dtype), weight, a, lora_b))
        assert x.grad.dtype == a.grad.dtype == torch.float32
        wanted = x.detach().to(dtype).double().sum(dim=0) * lora_b.double().sum(dim=0)[:, None]
        torch.testing.assert_close(a.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_module_trains(device):
    torch.manual_seed(0)
    module = NF4LoRALinear.from_loftq(torch.nn.Linear(48, 24).to(device), 4)
    x, target = gaussian(32, 48).to(device), gaussian(32, 24, seed=1).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_outputs_share_no_memory_with_inputs(device):
    weight, lora_a, lora_b = layer_on(device, 4, 4, 2)
    x = gaussian(4, 4).to(device)
    outputs = [nf4_lora_linear(x, weight, lora_a, lora_b), weight.dequantize(), weight.dequantize()]
    tensors = [x, weight.packed, weight.absmax, lora_a, lora_b, *outputs]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 8


@pytest.mark.gpu("triton")
def test_opcheck(device, opcheck):
    weight, lora_a, lora_b = layer_on(device, 6, 40, 2)
    codes = (weight.packed, weight.absmax)
    opcheck("nf4_quantize", (gaussian(3, 43).to(device), 32))
    opcheck("nf4_dequantize", (*codes, [6, 40], 64, torch.bfloat16))
    x, bias = gaussian(2, 3, 40, seed=9).to(device), gaussian(6, seed=10).to(device)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b, bias)]
    opcheck("nf4_lora_linear", (leaves[0], *codes, 64, *leaves[1:3], 0.5, leaves[3]))
    opcheck("nf4_lora_linear", (x.bfloat16(), *codes, 64, lora_a, lora_b, 0.5, None))
    grad = gaussian(2, 3, 6, seed=11).to(device)
    for mask in ([True] * 4, [False, True, False, False]):
        opcheck("nf4_lora_linear_backward", (grad, x, *codes, 64, lora_a, lora_b, 0.5, mask))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 69)},
        {"x": torch.tensor(1.0)},
        {"x": torch.zeros(3, 70, dtype=torch.int64)},
        {"lora_a": torch.zeros(4, 71)},
        {"lora_b": torch.zeros(20, 5)},
        {"bias": torch.zeros(21)},
        {"bias": torch.zeros(20, dtype=torch.int32)},
        {"block_size": 48},
        {"block_size": 128},
        {"packed": torch.zeros(699, dtype=torch.uint8)},
        {"packed": torch.zeros(700, dtype=torch.int8)},
        {"absmax": torch.zeros(22, dtype=torch.float64)},
    ],
)
def test_errors_are_the_cpus(device, change):
    weight, lora_a, lora_b = layer_on("cpu", 20, 70, 4)
    arguments = {"x": torch.zeros(3, 70), "packed": weight.packed, "absmax": weight.absmax, "block_size": 64}
    arguments |= {"lora_a": lora_a, "lora_b": lora_b, "scaling": 1.0, "bias": None} | change

    def run(to):
        moved = [value.to(to) if isinstance(value, torch.Tensor) else value for value in arguments.values()]
        torch.ops.csikernels.nf4_lora_linear(*moved)

    with pytest.raises((TypeError, ValueError)) as expected, csikernels.use_backend("cpp"):
        run("cpu")
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        run(device)


def test_errors_of_the_other_ops(device):
    with pytest.raises(ValueError, match="weight: expected shape"):
        torch.ops.csikernels.nf4_quantize(torch.zeros(3, device=device), 64)
    with pytest.raises(ValueError, match="block_size: expected one of 32, 64, .* got 65"):
        torch.ops.csikernels.nf4_quantize(torch.zeros(3, 3, device=device), 65)
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    with pytest.raises(TypeError, match="dtype: expected float16, .*"):
        torch.ops.csikernels.nf4_dequantize(weight.packed, weight.absmax, [20, 70], 64, torch.int32)
    with pytest.raises(ValueError, match="packed: expected a contiguous tensor of 710 bytes"):
        torch.ops.csikernels.nf4_dequantize(weight.packed, weight.absmax, [20, 71], 64, torch.float32)
    with pytest.raises(ValueError, match="absmax: expected a contiguous tensor of 22 scales"):
        every_other = weight.absmax.repeat_interleave(2)[::2]
        torch.ops.csikernels.nf4_dequantize(weight.packed, every_other, [20, 70], 64, torch.float32)
    x = torch.zeros(3, 70, device=device)
    arguments = (x, weight.packed, weight.absmax, 64, lora_a, lora_b, 1.0, [True] * 4)
    with pytest.raises(ValueError, match="grad: expected the leading shape of x"):
        torch.ops.csikernels.nf4_lora_linear_backward(torch.zeros(2, 20, device=device), *arguments)


def test_tensors_on_another_device_are_named(device):
    weight, lora_a, lora_b = layer_on(device, 20, 70, 4)
    with pytest.raises(ValueError, match="lora_a: expected a tensor on .* got one on meta"):
        nf4_lora_linear(torch.zeros(3, 70, device=device), weight, lora_a.to("meta"), lora_b)


# What only the simulator shows ----------------------------------------------------------------------------------------


def moved_bytes(simulated) -> int:
    return sum(launch["global_load_bytes"] + launch["global_store_bytes"] for launch in simulated.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_codes_are_within_a_quarter_of_the_least(simulated, dtype):
    dense_weight = gaussian(64, 1024, dtype=dtype)
    weight = nf4_quantize(dense_weight)
    least = dense_weight.nbytes + weight.nbytes
    assert moved_bytes(simulated) <= 1.05 * least
    simulated.clear()
    weight.dequantize(dtype)
    assert moved_bytes(simulated) <= 1.05 * least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_one_token_are_within_a_quarter_of_the_least(simulated, dtype):
    n, k, rank = 256, 2048, 8
    weight, lora_a, lora_b = layer_on("cpu", n, k, rank, dtype)
    x = gaussian(1, k, dtype=dtype)
    result = nf4_lora_linear(x, weight, lora_a, lora_b)
    least = weight.nbytes + sum(tensor.nbytes for tensor in (x, lora_a, lora_b, result))
    assert moved_bytes(simulated) <= 1.25 * least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_of_a_product_are_those_of_its_tiles(simulated, dtype, backward):
    # Every tile reads its rows and its part of the weight once; what tiles share comes from L2.
    tokens, n, k = 64, 256, 256
    weight, lora_a, lora_b = layer_on("cpu", n, k, 8, dtype)
    x = gaussian(tokens, k, dtype=dtype).requires_grad_(backward)
    result = nf4_lora_linear(x, weight, lora_a, lora_b)
    if backward:
        simulated.clear()
        result.sum().backward()
    tiles = math.ceil(n / 128)
    partial = 4 * tokens * n * simulated.launches[0]["grid"][2] * (2 if len(simulated.launches) > 1 else 0)
    least = weight.nbytes + tiles * x.nbytes + result.nbytes + lora_a.nbytes + tiles * tokens * 8 * x.element_size()
    assert moved_bytes(simulated) <= 1.1 * (least + partial)


def test_tensor_cores_multiply_half_precision_only(simulated):
    weight, lora_a, lora_b = layer_on("cpu", 128, 128, 8)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (4, 64):
            simulated.clear()
            nf4_lora_linear(gaussian(tokens, 128, dtype=dtype), weight, lora_a, lora_b)
            used = any(launch["classes"].get("tensor", 0) for launch in simulated.launches)
            assert used == (dtype == torch.bfloat16)
