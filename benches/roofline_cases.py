"""The calls of the roofline table: each at its bench size, with the bytes it must move and the operations it must do.

A new op needs entries here and nothing else: which backends have it is asked for, and their launches are noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from lasco_modules import inputs, sams

import csikernels
from csikernels import SamBank


@dataclass
class Case:
    """A call with the bytes it must move and the operations it must do, as formula and number."""

    op: str
    name: str
    prepare: Callable[[], Callable[[], object]]  # the call; what is packed once is packed here, by the backend in force
    bytes_formula: str
    bytes: float
    flops_formula: str = "-"
    flops: float = 0
    peak: str = "float32"
    backends: tuple[str, ...] = ("cuda", "triton")  # that the formula is for, where tiles differ
    excess: dict[str, str] = field(default_factory=dict)  # backend -> why it moves more than 1.25 times as much


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def self_information_cases() -> list[Case]:
    batch, n, m = 64, 2048, 221
    h = gaussian(batch, 2, 32, 32)
    score = h.flatten(1)
    indices = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:m].repeat(batch, 1)
    codeword = (score[:, :m].clone(), indices, h.mean(dim=(1, 2, 3)), [2, 32, 32])
    survivors = "survivors change places through memory (L2), since Triton has no scatter into shared memory"
    return [
        Case(
            "select_informative",
            f"`select_informative`, B={batch}, [2, 32, 32], m={m}",
            lambda: partial(csikernels.select_informative, h, m, bandwidth=0.5),
            "B (4 n + 16 m)",
            batch * (4 * n + 16 * m),
            "B n (4 * 7 + 9)",
            batch * n * 37,
            excess={"triton": survivors},
        ),
        Case(
            "self_information",
            f"`self_information`, B={batch}, [2, 32, 32]",
            lambda: partial(csikernels.self_information, h, bandwidth=0.5),
            "8 B n",
            8 * batch * n,
            "B n (4 * 7 + 12)",
            batch * n * 40,
        ),
        Case(
            "top_m",
            f"`top_m`, B={batch}, N={n}, m={m}",
            lambda: partial(csikernels.top_m, score, m),
            "B (4 N + 16 m)",
            batch * (4 * n + 16 * m),
            excess={"triton": survivors},
        ),
        Case(
            "scatter_codeword",
            f"`scatter_codeword`, B={batch}, [2, 32, 32], m={m}",
            lambda: partial(csikernels.scatter_codeword, *codeword),
            "B (4 n + 12 m)",
            batch * (4 * n + 12 * m),
            excess={
                "triton": "which value stands is found in an array in memory, 4 B n written and 4 B n read from L2"
            },
        ),
    ]


def codebook_cases() -> list[Case]:
    d = 128

    def case(n: int, k: int) -> Case:
        h, words = (gaussian(rows, d, dtype=torch.complex64, seed=rows) for rows in (n, k))
        return Case(
            "codebook_search",
            f"`Codebook.search`, N={n}, K={k}, D={d}",
            lambda: partial(csikernels.Codebook(words).search, h),
            "4 D K + (8 D + 12) N",
            4 * d * k + (8 * d + 12) * n,
            "8 D N K",
            8 * d * n * k,
            "bfloat16",
            excess={"triton": "each of 128 parts of the book reads 49 KB of queries from L2"} if n == 64 else {},
        )

    return [case(1, 4096), case(16, 16384), case(64, 16384)]


def nf4_lora_cases() -> list[Case]:
    n, k, r = 1024, 4096, 16
    dense = gaussian(n, k) / k**0.5
    with csikernels.use_backend("reference"):
        weight = csikernels.nf4_quantize(dense)
    a, b = gaussian(r, k, seed=1) / k**0.5, gaussian(n, r, seed=2)
    codes = "N K (1/2 + 4/64)"

    def few(tokens: int, dtype: torch.dtype) -> Case:
        size = dtype.itemsize
        moved = weight.nbytes + size * (tokens * (k + n) + r * (k + n))
        return linear(tokens, dtype, f"{codes} + {size} (M K + M N + r (K + N))", moved, *whole(tokens), "cuda")

    def many(tokens: int, dtype: torch.dtype) -> Case:
        # Tiles of 128 outputs read their rows again, from L2; x A^T comes from cuBLAS.
        size = dtype.itemsize
        moved = weight.nbytes + size * (n // 128 * tokens * (k + r) + tokens * n + r * n)
        formula, flops = f"{codes} + {size} (N/128 M (K + r) + M N + r N)", 2 * tokens * n * (k + r)
        return linear(tokens, dtype, formula, moved, "2 M N (K + r)", flops, "cuda")

    def fused(tokens: int, dtype: torch.dtype, outputs: int) -> Case:
        # Each tile of outputs reads its rows and the adapter's A again, from L2.
        size = dtype.itemsize
        moved = weight.nbytes + size * (n // outputs * (tokens + r) * k + tokens * n + r * n)
        formula = f"{codes} + {size} (N/{outputs} (M + r) K + M N + r N)"
        case = linear(tokens, dtype, formula, moved, *whole(tokens), "triton")
        if tokens > 1 and size == 2:
            case.excess["triton"] = "cut in 16 for 132 multiprocessors, the reduction leaves 8 M N of sums a part in L2"
        return case

    def whole(tokens: int) -> tuple[str, float]:
        return "2 M (N K + r (N + K))", 2 * tokens * (n * k + r * (n + k))

    def linear(
        tokens: int, dtype: torch.dtype, bytes_formula: str, moved: float, flops_formula: str, flops: float,
        backend: str,
    ) -> Case:  # fmt: skip
        name = str(dtype).removeprefix("torch.")
        x, adapter = gaussian(tokens, k, seed=3).to(dtype), (a.to(dtype), b.to(dtype))
        return Case(
            "nf4_lora_linear", f"`nf4_lora_linear`, M={tokens}, N={n}, K={k}, r={r}, {name}",
            lambda: partial(csikernels.nf4_lora_linear, x, weight, *adapter),
            bytes_formula, moved, flops_formula, flops, name, (backend,),
        )  # fmt: skip

    return [
        Case("nf4_quantize", f"`nf4_quantize`, {n} x {k} float32", lambda: partial(csikernels.nf4_quantize, dense),
             f"4 N K + {codes}", dense.nbytes + weight.nbytes, "30 N K", 30 * n * k),
        Case("nf4_dequantize", f"`nf4_dequantize`, {n} x {k} bfloat16",
             lambda: partial(weight.dequantize, torch.bfloat16), f"2 N K + {codes}", 2 * n * k + weight.nbytes),
        few(1, torch.bfloat16),
        few(1, torch.float32),
        many(64, torch.bfloat16),
        many(64, torch.float32),
        *(fused(1, dtype, 64) for dtype in (torch.bfloat16, torch.float32)),
        fused(64, torch.bfloat16, 128),
        fused(64, torch.float32, 32),
    ]  # fmt: skip


def lasco_cases() -> list[Case]:
    batch, tokens, features = 8, 32, 64

    def case(layers: int, width: int, precision: str) -> Case:
        sizes = {"tokens": tokens, "features": features, "layers": layers, "width": width, "heads": 4}
        sizes |= {"feedforward": 4 * width}
        bank = SamBank.from_modules(*sams(batch, sizes), 1.0, precision=precision)
        h_in, base_output, slot = inputs(range(batch), sizes)
        weights = sum(weight.nbytes for weight in bank.reference.tensors())
        flops = 4 * tokens * (2 * features * width + layers * (12 * width**2 + 2 * tokens * width))
        return Case(
            "lasco_forward",
            f"`lasco_forward`, B={batch}, {layers} x {width}, {precision}",
            lambda: partial(csikernels.lasco_forward, h_in, base_output, bank, slot),
            "B (2 weights + 12 T F)",
            batch * (2 * weights + 12 * tokens * features),
            "4 B T (2 F d + L (12 d^2 + 2 T d))",
            batch * flops,
            precision,
        )

    return [case(2, width, precision) for precision in ("bfloat16", "float32") for width in (32, 64, 128)]


def transformer_cases() -> list[Case]:
    """What stands between the products of a base model's blocks: of the products themselves nothing is counted."""
    samples, tokens, layers, width = 4, 32, 2, 512
    sizes = {"tokens": tokens, "features": 64, "layers": layers, "width": width, "heads": 8, "feedforward": 4 * width}
    reference, proxies = sams(1, sizes, norm_first=True)

    def case(precision: str, formula: str, floats: int) -> Case:
        bank = SamBank.from_modules(reference, proxies, 1.0, precision=precision)
        h_in, _, _ = inputs(range(samples), sizes)
        weights, hyper = bank.reference.tensors(), bank.architecture.hyper()
        return Case(
            "transformer_forward",
            f"`transformer_forward` between its products, M={samples * tokens}, {layers} x {width}, {precision}",
            lambda: partial(torch.ops.csikernels.transformer_forward, h_in, weights, [], [], *hyper),
            formula,
            samples * tokens * width * floats,
            peak=precision,
        )

    return [
        case("bfloat16", "M d (14 + 70 L)", 14 + 70 * layers),
        case("float32", "M d (16 + 88 L)", 16 + 88 * layers),
    ]


CASES = [self_information_cases, codebook_cases, nf4_lora_cases, lasco_cases, transformer_cases]
