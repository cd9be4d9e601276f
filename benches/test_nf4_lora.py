"""Timings of the NF4 + LoRA layer, rank 16, at the sizes of small and large language models.

Peers of ``nf4_lora_linear``: ``F.linear`` on the dense weight, and bitsandbytes' ``Linear4bit`` in training mode and in
eval mode (where it repacks the weight at its first call, outside the timing), each with the adapter as two more
products; of ``nf4_quantize`` and ``dequantize``: bitsandbytes. Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, compare
from torch.nn import functional as F

from csikernels import NF4Weight, loftq_init, nf4_lora_linear, nf4_quantize

RANK = 16
CASES = [  # tokens, N, K, calls per round, rounds
    (1, 768, 3072, 60, 15),
    (1, 1280, 5120, 40, 15),
    (1, 4096, 4096, 40, 9),
    (16, 4096, 4096, 12, 9),
    (128, 1280, 5120, 4, 9),
    (1024, 4096, 4096, 1, 15),
]
Functions = dict[str, Callable[[], torch.Tensor]]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Layer:
    """A dense weight in ``dtype``, the same in NF4, and an adapter."""

    def __init__(self, n: int, k: int, dtype: torch.dtype):
        self.dense = (gaussian(n, k) / k**0.5).to(dtype)
        self.weight: NF4Weight = nf4_quantize(self.dense)
        self.lora_a, self.lora_b = (gaussian(RANK, k, seed=1) / k**0.5).to(dtype), gaussian(n, RANK, seed=2).to(dtype)

    def adapter(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.lora_a), self.lora_b)

    def ours(self, x: torch.Tensor) -> torch.Tensor:
        return nf4_lora_linear(x, self.weight, self.lora_a, self.lora_b)

    def peers(self, x: torch.Tensor, train: bool = True) -> Functions:
        quantised = self.weight.dequantize()
        peers: Functions = {"dense F.linear": lambda: F.linear(x, quantised) + self.adapter(x)}
        try:
            from bitsandbytes import nn
        except ImportError:
            return peers

        def linear4bit(mode: str) -> Callable[[], torch.Tensor]:
            n, k = self.dense.shape
            kind = {"quant_type": "nf4", "compress_statistics": False}
            base = nn.Linear4bit(k, n, bias=False, compute_dtype=x.dtype, **kind)
            base.weight = nn.Params4bit(self.dense, **kind)
            base = base.to(DEVICE).train(mode == "train")
            return lambda: base(x) + self.adapter(x)

        return peers | {f"bitsandbytes {mode}": linear4bit(mode) for mode in (["train"] if train else []) + ["eval"]}

    def checker(self, x: torch.Tensor) -> Callable[[str, torch.Tensor], None]:
        wanted = F.linear(
            x.double(), self.weight.dequantize(torch.float64) + self.lora_b.double() @ self.lora_a.double()
        )
        # bitsandbytes' eval mode computes in bfloat16 whatever the input.
        loose = 1e-2

        def check(name: str, result: torch.Tensor) -> None:
            exact = name == "csikernels" and x.dtype == torch.float32
            assert result.dtype == x.dtype
            assert (result.double() - wanted).norm() < (1e-5 if exact else loose) * wanted.norm(), name

        return check


def run(benchmark, dtype: torch.dtype, tokens: int, n: int, k: int, calls: int, rounds: int, train: bool) -> None:
    layer, x = Layer(n, k, dtype), gaussian(tokens, k, seed=3).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        compare(
            benchmark,
            case=f"nf4_lora_linear, M={tokens}, {n} x {k}, {kind}",
            ours={"csikernels": lambda: layer.ours(x)},
            peers=layer.peers(x, train),
            check=layer.checker(x),
            flops=2 * tokens * (n * k + RANK * (n + k)),
            bytes=layer.weight.nbytes + x.element_size() * RANK * (n + k),
            peak="dram" if tokens == 1 else kind,
            calls=calls,
            rounds=rounds,
        )


@pytest.mark.parametrize(("tokens", "n", "k", "calls", "rounds"), CASES)
def test_linear_bfloat16(benchmark, tokens, n, k, calls, rounds):
    run(benchmark, torch.bfloat16, tokens, n, k, calls, rounds, train=n * k < 2**23 or tokens > 16)


@pytest.mark.parametrize(("tokens", "n", "k", "calls", "rounds"), [(1, 768, 3072, 10, 9), (128, 768, 3072, 1, 9)])
def test_linear_float32(benchmark, tokens, n, k, calls, rounds):
    run(benchmark, torch.float32, tokens, n, k, calls, rounds, train=True)


def test_training_step(benchmark):
    tokens, n, k = 256, 768, 3072
    layer = Layer(n, k, torch.float32)
    x = gaussian(tokens, k, seed=3)
    leaves = [tensor.requires_grad_() for tensor in (x, layer.lora_a, layer.lora_b)]
    merged = (layer.weight.dequantize(torch.float64) + layer.lora_b.double() @ layer.lora_a.double()).detach()

    def check(name: str, grads: tuple[torch.Tensor, ...]) -> None:
        wanted = merged.sum(0).expand(tokens, k)
        assert (grads[0] - wanted).norm() < (1e-2 if "bitsandbytes" in name else 1e-5) * wanted.norm()

    def step(forward: Callable[[], torch.Tensor]) -> Callable:
        return lambda: torch.autograd.grad(forward().sum(), leaves)

    compare(
        benchmark,
        case=f"nf4_lora_linear forward + backward, M={tokens}, {n} x {k}, float32",
        ours={"csikernels": step(lambda: layer.ours(x))},
        peers={name: step(forward) for name, forward in layer.peers(x).items() if "eval" not in name},
        check=check,
        flops=4 * tokens * (n * k + 2 * RANK * (n + k)),
        peak="float32",
        rounds=9,
    )


def bitsandbytes_functional():
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


def test_quantize(benchmark):
    dense, functional = gaussian(4096, 4096), bitsandbytes_functional()
    wanted = nf4_quantize(dense).packed
    peers = {} if functional is None else {"bitsandbytes": lambda: functional.quantize_4bit(dense, quant_type="nf4")}

    def check(name: str, result) -> None:
        assert torch.equal(result.packed if name == "csikernels" else result[0].view(-1), wanted), name

    compare(
        benchmark,
        case="nf4_quantize, 4096 x 4096, float32",
        ours={"csikernels": lambda: nf4_quantize(dense)},
        peers=peers,
        check=check,
        bytes=4 * dense.numel(),
        peak="dram",
        rounds=7,
    )


def test_dequantize(benchmark):
    dense, functional = gaussian(4096, 4096).bfloat16(), bitsandbytes_functional()
    weight = nf4_quantize(dense)
    wanted, peers = weight.dequantize(), {}
    if functional is not None:
        packed, state = functional.quantize_4bit(dense, quant_type="nf4")
        peers = {"bitsandbytes": lambda: functional.dequantize_4bit(packed, state)}

    def check(name: str, result: torch.Tensor) -> None:
        assert torch.equal(result, wanted), name

    compare(
        benchmark,
        case="NF4Weight.dequantize, 4096 x 4096, bfloat16",
        ours={"csikernels": weight.dequantize},
        peers=peers,
        check=check,
        bytes=weight.nbytes + 2 * dense.numel(),
        peak="dram",
        rounds=7,
    )


def test_loftq(benchmark):
    dense = gaussian(192, 768)
    weight, lora_a, lora_b = loftq_init(dense, RANK, iterations=1)
    loss = (dense - weight.dequantize()).norm()
    assert (dense - weight.dequantize() - lora_b @ lora_a).norm() < loss
    wide = dense.double()
    compare(
        benchmark,
        case=f"loftq_init, 192 x 768, rank {RANK}, 1 iteration",
        ours={"csikernels": lambda: loftq_init(dense, RANK, iterations=1)},
        # The part of an iteration that no kernel replaces.
        peers={"torch.linalg.svd alone": lambda: torch.linalg.svd(wide, full_matrices=False)},
        check=lambda name, result: None,
        rounds=7,
    )
