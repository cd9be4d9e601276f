"""Timings of the NF4 + LoRA layer at the sizes of GPT-2's MLP (768 x 3072, rank 16).

Peers of ``nf4_lora_linear``: ``F.linear`` on the dense weight, and bitsandbytes' ``Linear4bit`` in training mode and in
eval mode (where it repacks the weight at its first call, outside the timing), each with the adapter as two more
products; of ``nf4_quantize`` and ``dequantize``: bitsandbytes. Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import csikernels
from csikernels import NF4Weight, loftq_init, nf4_lora_linear, nf4_quantize

BACKENDS = csikernels.backends()["nf4_lora_linear"]["cpu"]
N, K, RANK = 768, 3072, 16
ROWS = [1, 16, 128]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PEERS = ["dense F.linear", "bitsandbytes train", "bitsandbytes eval"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(dtype: torch.dtype) -> tuple[NF4Weight, torch.Tensor, torch.Tensor]:
    weight = nf4_quantize(gaussian(N, K).to(dtype) / K**0.5)
    return weight, (gaussian(RANK, K, seed=1) / K**0.5).to(dtype), gaussian(N, RANK, seed=2).to(dtype)


def peer(name: str, dtype: torch.dtype, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Callable:
    """A function of x that computes the same layer with the peer's own weight."""
    if name == "dense F.linear":
        dense = parts(dtype)[0].dequantize(dtype)
        return lambda x: F.linear(x, dense) + F.linear(F.linear(x, lora_a), lora_b)
    nn = pytest.importorskip("bitsandbytes").nn
    base = nn.Linear4bit(K, N, bias=False, quant_type="nf4", compress_statistics=False, compute_dtype=dtype)
    base.weight = nn.Params4bit(gaussian(N, K).to(dtype) / K**0.5, quant_type="nf4", compress_statistics=False)
    base = base.to("cpu").train(name.endswith("train"))
    return lambda x: base(x) + F.linear(F.linear(x, lora_a), lora_b)


def run(benchmark, name: str, function: Callable, *arguments) -> None:
    benchmark.name = name
    benchmark.pedantic(function, arguments, rounds=9, iterations=1, warmup_rounds=2)


def check(result: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> None:
    """bitsandbytes' eval mode computes in bfloat16 whatever the input, hence one tolerance for both dtypes."""
    weight, lora_a, lora_b = parts(dtype)
    merged = weight.dequantize(torch.float64) + lora_b.double() @ lora_a.double()
    wanted = F.linear(x.double(), merged)
    assert result.dtype == dtype
    assert (result.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("who", [*BACKENDS, *PEERS])
def test_linear(benchmark, rows, dtype, who):
    benchmark.group = f"nf4_lora_linear, {rows} rows, {K} -> {N}, rank {RANK}, {dtype}"
    wanted = DTYPES[dtype]
    x = gaussian(rows, K, seed=3).to(wanted)
    weight, lora_a, lora_b = parts(wanted)
    with torch.no_grad():
        if who in PEERS:
            function = peer(who, wanted, lora_a, lora_b)
            check(function(x), x, wanted)
            run(benchmark, who, function, x)
            return
        with csikernels.use_backend(who):
            check(nf4_lora_linear(x, weight, lora_a, lora_b), x, wanted)
            run(benchmark, f"csikernels {who}", nf4_lora_linear, x, weight, lora_a, lora_b)


@pytest.mark.parametrize("who", [*BACKENDS, "dense F.linear", "bitsandbytes train"])
def test_training_step(benchmark, who):
    benchmark.group = f"nf4_lora_linear forward + backward, 64 rows, {K} -> {N}, rank {RANK}, float32"
    weight, lora_a, lora_b = parts(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (gaussian(64, K, seed=3), lora_a, lora_b)]
    merged = (weight.dequantize(torch.float64) + lora_b.double() @ lora_a.double()).detach()

    def step(forward: Callable) -> list[torch.Tensor]:
        return torch.autograd.grad(forward(leaves[0]).sum(), leaves)

    def check_and_time(name: str, forward: Callable) -> None:
        torch.testing.assert_close(step(forward)[0].double(), merged.sum(0).expand(64, K), rtol=1e-3, atol=1e-3)
        run(benchmark, name, step, forward)

    if who in PEERS:
        check_and_time(who, peer(who, torch.float32, lora_a, lora_b))
        return
    with csikernels.use_backend(who):
        check_and_time(f"csikernels {who}", lambda x: nf4_lora_linear(x, weight, lora_a, lora_b))


@pytest.mark.parametrize("who", [*BACKENDS, "bitsandbytes"])
def test_quantize(benchmark, who):
    benchmark.group = f"nf4_quantize [{N}, {K}] float32"
    dense = gaussian(N, K)
    wanted = nf4_quantize(dense)
    if who == "bitsandbytes":
        functional = pytest.importorskip("bitsandbytes.functional")
        assert torch.equal(functional.quantize_4bit(dense, quant_type="nf4")[0].view(-1), wanted.packed)
        run(benchmark, who, lambda: functional.quantize_4bit(dense, quant_type="nf4"))
        return
    with csikernels.use_backend(who):
        assert torch.equal(nf4_quantize(dense).packed, wanted.packed)
        run(benchmark, f"csikernels {who}", nf4_quantize, dense)


@pytest.mark.parametrize("who", [*BACKENDS, "bitsandbytes"])
def test_dequantize(benchmark, who):
    benchmark.group = f"NF4Weight.dequantize [{N}, {K}] bfloat16"
    dense = gaussian(N, K).bfloat16()
    weight = nf4_quantize(dense)
    if who == "bitsandbytes":
        functional = pytest.importorskip("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(dense, quant_type="nf4")
        assert torch.equal(functional.dequantize_4bit(packed, state), weight.dequantize())
        run(benchmark, who, functional.dequantize_4bit, packed, state)
        return
    with csikernels.use_backend(who):
        assert (weight.dequantize() - dense).norm() < 0.15 * dense.norm()
        run(benchmark, f"csikernels {who}", weight.dequantize)


@pytest.mark.parametrize("who", ["csikernels", "torch.linalg.svd alone"])
def test_loftq(benchmark, who):
    benchmark.group = f"loftq_init [192, {N}], rank {RANK}, 1 iteration"
    dense = gaussian(192, N)
    weight, lora_a, lora_b = loftq_init(dense, RANK, iterations=1)
    loss = (dense - weight.dequantize()).norm()
    assert (dense - weight.dequantize() - lora_b @ lora_a).norm() < loss
    if who == "csikernels":
        run(benchmark, who, lambda: loftq_init(dense, RANK, iterations=1))
    else:  # the part of an iteration that no kernel replaces
        run(benchmark, who, lambda: torch.linalg.svd(dense.double(), full_matrices=False))
