"""The NF4 + LoRA kernels over many sizes, block sizes and types, against the formula in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from csikernels import nf4_lora_linear, nf4_quantize

pytestmark = pytest.mark.op("nf4_quantize", "nf4_dequantize", "nf4_lora_linear", "nf4_lora_linear_backward")


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(x, weight, lora_a, lora_b, scaling, bias) -> torch.Tensor:
    merged = weight.dequantize(torch.float64) + scaling * lora_b.double() @ lora_a.double()
    return F.linear(x.double(), merged, None if bias is None else bias.double())


def sizes(seed: int) -> tuple[int, int, int, int, int]:
    """Tokens, N, K, rank and block size: anything, or of a kind for which a kernel has a path of its own."""
    draw = random.Random(seed)
    tokens = draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 65, 80, 97])
    n = draw.choice([draw.randint(1, 130), 64, 129])
    k = draw.choice([draw.randint(1, 130), 8 * draw.randint(1, 40), 32 * draw.randint(1, 12), 128 * draw.randint(1, 9)])
    return tokens, n, k, draw.choice([0, 1, 2, 3, 7, 8, 16, 17, 40]), 2 ** draw.randint(5, 12)


@pytest.mark.parametrize("seed", range(48))
def test_any_size(backend, seed):
    tokens, n, k, rank, block = sizes(seed)
    x_dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    adapter = x_dtype if seed % 2 else torch.float32
    weight = nf4_quantize(gaussian(n, k, seed=seed) / k**0.5, block)
    lora_a = (gaussian(rank, k, seed=1) / k**0.5).to(adapter).requires_grad_()
    lora_b = gaussian(n, rank, dtype=adapter, seed=2).requires_grad_()
    x = gaussian(tokens, k, dtype=x_dtype, seed=3).requires_grad_()
    bias = gaussian(n, dtype=adapter, seed=4).requires_grad_() if seed % 4 < 2 else None
    result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=bias)
    inputs = [tensor for tensor in (x, lora_a, lora_b, bias) if tensor is not None]
    upstream = gaussian(tokens, n, dtype=x_dtype, seed=5)
    grads = torch.autograd.grad(result, inputs, upstream)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = dense(doubles[0], weight, doubles[1], doubles[2], 0.5, doubles[3] if bias is not None else None)
    # Sums of k products in this precision: each is off by at most an eps of the sum of magnitudes.
    eps = 2e-6 if x_dtype == torch.float32 else torch.finfo(x_dtype).eps
    scale = dense(x.abs(), weight, lora_a, lora_b, 0.5, bias).abs().amax() + 1
    assert (result - wanted).abs().amax() <= eps * scale
    error = (result - wanted).square().mean().sqrt()
    assert error <= max(eps, 4e-7) * (wanted.square().mean().sqrt() + 0.01)
    expected_grads = torch.autograd.grad(wanted, doubles, upstream.double())
    for name, got, expected in zip("xabc"[: len(grads)], grads, expected_grads, strict=True):
        rounding = max(torch.finfo(got.dtype).eps, 4e-6)
        assert got.dtype == inputs["xabc".index(name)].dtype
        if got.numel():
            assert (got - expected).norm() <= rounding * (expected.norm() + 1e-3), name


@pytest.mark.parametrize("tokens", [9, 13, 16])
@pytest.mark.parametrize(
    ("n", "k", "rank", "block"),
    [
        (1, 64, 0, 64),
        (17, 192, 3, 64),
        (33, 1024, 16, 128),
        (49, 1088, 40, 64),
        (97, 2240, 33, 4096),
        (130, 128, 2, 32),
    ],
)
def test_a_handful_of_tokens(backend, tokens, n, k, rank, block):
    # Multiples of 64 columns, which have a kernel of their own in bfloat16: parts of vectors, chunks and scales.
    weight = nf4_quantize(gaussian(n, k) / k**0.5, block)
    lora_a, lora_b = (gaussian(rank, k, seed=1) / k**0.5).bfloat16(), gaussian(n, rank, seed=2).bfloat16()
    x, bias = gaussian(tokens, k, dtype=torch.bfloat16, seed=3), gaussian(n, seed=4)
    x[tokens - 1, k - 1] = float("nan")
    result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=bias)
    assert result[tokens - 1].isnan().all()
    wanted = dense(x, weight, lora_a, lora_b, 0.5, bias)[:-1]
    error = (result[:-1] - wanted).abs().amax(dim=0)
    assert (error <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().amax()).all()
    assert (result[:-1] - wanted).norm() <= 0.005 * wanted.norm()


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 64), (torch.bfloat16, 512), (torch.float32, 64)])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1043, 203, 1088), (50, 331, 4224)])
def test_many_panels(backend, threads, dtype, block, tokens, n, k):
    # More tokens than have their sums in the cache at once; whole and thin panels of W, in more than one part.
    weight = nf4_quantize(gaussian(n, k) / k**0.5, block)
    lora_a, lora_b = (gaussian(3, k, seed=1) / k**0.5).to(dtype), gaussian(n, 3, dtype=dtype, seed=2)
    x, bias = gaussian(tokens, k, dtype=dtype, seed=3), gaussian(n, dtype=dtype, seed=4)
    wanted = dense(x, weight, lora_a, lora_b, 0.5, bias)
    # The roundings of a sum of k products add up like a random walk.
    tolerance = torch.finfo(dtype).eps * k**0.5 / 2 if dtype == torch.float32 else 0.005
    for count in (1, 2, 3):
        threads(count)
        result = nf4_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, bias=bias)
        assert ((result - wanted).norm(dim=1) <= tolerance * wanted.norm(dim=1)).all()
        assert ((result - wanted).norm(dim=0) <= tolerance * wanted.norm(dim=0)).all()


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_x_may_lie_anywhere(backend, tokens, dtype):
    weight = nf4_quantize(gaussian(40, 128))
    lora_a, lora_b = gaussian(8, 256, dtype=dtype)[:, ::2], gaussian(4, 40, dtype=dtype).T
    lora_a = lora_a[::2]
    x = gaussian(256, 2 * tokens, dtype=dtype, seed=3).T[::2, ::2]
    result = nf4_lora_linear(x, weight, lora_a, lora_b)
    together = nf4_lora_linear(x.contiguous(), weight, lora_a.contiguous(), lora_b.contiguous())
    assert torch.equal(result, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_see_its_neighbours(backend, dtype):
    # A NaN in one token stays there, also where tokens share a vector and where vectors are filled up.
    weight = nf4_quantize(gaussian(33, 200))
    lora_a, lora_b = gaussian(3, 200, dtype=dtype), gaussian(33, 3, dtype=dtype, seed=1)
    for tokens in (3, 13, 37):
        x = gaussian(tokens, 200, dtype=dtype, seed=2)
        x[1, 77] = float("nan")
        result = nf4_lora_linear(x, weight, lora_a, lora_b)
        rows = result.isnan().any(dim=1)
        assert rows[1] and result[1].isnan().all() and rows.sum() == 1


@pytest.mark.parametrize("rows", [1, 8, 16, 70])
def test_threads_change_nothing_in_bfloat16(backend, threads, rows):
    weight = nf4_quantize(gaussian(200, 1024))
    x, lora_a = gaussian(rows, 1024, dtype=torch.bfloat16), gaussian(6, 1024, dtype=torch.bfloat16)
    lora_b = gaussian(200, 6, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(nf4_lora_linear(x, weight, lora_a, lora_b))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
