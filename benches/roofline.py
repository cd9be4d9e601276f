"""Write benches/roofline.md: what each CUDA kernel moves and computes, against what it must.

Usage: ``python benches/roofline.py [--output FILE]``. No GPU is needed: the kernels run in the PTX simulator of the
tests, which counts the bytes; registers come from the compiler. The floor is the larger of bytes over bandwidth and
operations over peak on an H100 SXM: 3.35 TB/s, 67 float32 and 990 bfloat16 TFLOP/s.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import simulator  # noqa: E402
from lasco_modules import sams  # noqa: E402

import csikernels  # noqa: E402
from csikernels import SamBank  # noqa: E402

BANDWIDTH = 3.35e12
PEAK = {"float32": 67e12, "bfloat16": 990e12}
# Of one multiprocessor of an H100.
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32


@dataclass
class Case:
    """A call at its bench size, with the bytes it must move and the operations it must do, as formula and number."""

    name: str
    call: Callable[[], object]
    bytes_formula: str
    bytes: float
    flops_formula: str
    flops: float
    peak: str = "float32"


def self_information_cases() -> list[Case]:
    batch, n, m = 64, 2048, 221
    h = torch.randn(batch, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    score = h.flatten(1)
    values, indices = score[:, :m].clone(), torch.randperm(n)[:m].repeat(batch, 1)
    return [
        Case(
            f"`select_informative`, B={batch}, [2, 32, 32], m={m}",
            lambda: csikernels.select_informative(h, m, bandwidth=0.5),
            "B (4 n + 16 m)",
            batch * (4 * n + 16 * m),
            "B n (4 * 7 + 9)",
            batch * n * 37,
        ),
        Case(
            f"`self_information`, B={batch}, [2, 32, 32]",
            lambda: csikernels.self_information(h, bandwidth=0.5),
            "8 B n",
            8 * batch * n,
            "B n (4 * 7 + 12)",
            batch * n * 40,
        ),
        Case(f"`top_m`, B={batch}, N={n}, m={m}", lambda: csikernels.top_m(score, m), "B (4 N + 16 m)",
             batch * (4 * n + 16 * m), "-", 0),
        Case(
            f"`scatter_codeword`, B={batch}, [2, 32, 32], m={m}",
            lambda: csikernels.scatter_codeword(values, indices, h.mean(dim=(1, 2, 3)), [2, 32, 32]),
            "B (4 n + 12 m)",
            batch * (4 * n + 12 * m),
            "-",
            0,
        ),
    ]  # fmt: skip


def codebook_cases() -> list[Case]:
    d = 128

    def case(n: int, k: int) -> Case:
        generator = torch.Generator().manual_seed(0)
        h, words = (torch.randn(rows, d, dtype=torch.complex64, generator=generator) for rows in (n, k))
        with simulator.attached(), csikernels.use_backend("cuda"):
            book = csikernels.Codebook(words)
        return Case(
            f"`Codebook.search`, N={n}, K={k}, D={d}",
            lambda: book.search(h),
            "4 D K + (8 D + 12) N",
            4 * d * k + (8 * d + 12) * n,
            "8 D N K",
            8 * d * n * k,
            "bfloat16",
        )

    return [case(1, 4096), case(16, 16384), case(64, 16384)]


def nf4_lora_cases() -> list[Case]:
    n, k, r = 1024, 4096, 16
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(n, k, generator=generator) / k**0.5
    with csikernels.use_backend("reference"):
        weight = csikernels.nf4_quantize(dense)
    a, b = torch.randn(r, k, generator=generator) / k**0.5, torch.randn(n, r, generator=generator)
    codes = "N K (1/2 + 4/64)"

    def layer(tokens: int, dtype: torch.dtype) -> Case:
        x = torch.randn(tokens, k, generator=generator).to(dtype)
        adapter = [a.to(dtype), b.to(dtype)]
        size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
        few = tokens <= 16
        # Beyond 16 tokens tiles of 128 outputs read their rows again, from L2.
        reads = 1 if few else -(-n // 128)
        moved = weight.nbytes + size * (reads * tokens * (k + (0 if few else r)) + tokens * n + r * n)
        moved += size * r * k if few else 0
        return Case(
            f"`nf4_lora_linear`, M={tokens}, N={n}, K={k}, r={r}, {name}",
            lambda: csikernels.nf4_lora_linear(x, weight, *adapter),
            f"{codes} + {size} (M K + M N + r (K + N))" if few else f"{codes} + {size} (N/128 M (K + r) + M N + r N)",
            moved,
            "2 M (N K + r (N + K))" if few else "2 M N (K + r)",
            2 * tokens * (n * k + r * (n + k if few else n)),
            name,
        )

    return [
        Case(f"`nf4_quantize`, {n} x {k} float32", lambda: csikernels.nf4_quantize(dense), f"4 N K + {codes}",
             dense.nbytes + weight.nbytes, "30 N K", 30 * n * k),
        Case(f"`nf4_dequantize`, {n} x {k} bfloat16", lambda: weight.dequantize(torch.bfloat16), f"2 N K + {codes}",
             2 * n * k + weight.nbytes, "-", 0),
        layer(1, torch.bfloat16),
        layer(1, torch.float32),
        layer(64, torch.bfloat16),
        layer(64, torch.float32),
    ]  # fmt: skip


def lasco_cases() -> list[Case]:
    batch, tokens, features = 8, 32, 64

    def case(layers: int, width: int, precision: str) -> Case:
        sizes = {"tokens": tokens, "features": features, "layers": layers, "width": width, "heads": 4}
        bank = SamBank.from_modules(*sams(batch, {**sizes, "feedforward": 4 * width}), 1.0, precision=precision)
        h_in, base_output = torch.randn(2, batch, tokens, features, generator=torch.Generator().manual_seed(0))
        slot = torch.arange(batch)
        weights = sum(weight.nbytes for weight in bank.reference.tensors())
        flops = 4 * tokens * (2 * features * width + layers * (12 * width**2 + 2 * tokens * width))
        return Case(
            f"`lasco_forward`, B={batch}, {layers} x {width}, {precision}",
            lambda: csikernels.lasco_forward(h_in, base_output, bank, slot),
            "B (2 weights + 12 T F)",
            batch * (2 * weights + 12 * tokens * features),
            "4 B T (2 F d + L (12 d^2 + 2 T d))",
            batch * flops,
            precision,
        )

    return [case(2, width, precision) for precision in ("bfloat16", "float32") for width in (32, 64, 128)]


INTRODUCTION = """# Roofline of the CUDA kernels

Written by `python benches/roofline.py`, without a GPU: bytes are those that the PTX simulator counts, registers those
that the compiler reports for sm_90a, the floor that of an H100 SXM (3.35 TB/s, 67 float32 and 990 bfloat16 TFLOP/s).
The last column has registers a thread, shared memory a block, and how many blocks and threads of the 2,048 a
multiprocessor holds at once.
"""

CASES = [self_information_cases, codebook_cases, nf4_lora_cases, lasco_cases]


def registers() -> dict[str, int]:
    """Kernel (without the hash of its file) -> registers a thread on sm_90a."""
    found = {}
    for source in simulator.kernel_sources():
        flags = ["-arch=sm_90a", "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
        command = ["nvcc", *simulator.NVCC_FLAGS, *flags, str(source)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for kernel, used in re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL):
            found[simulator.unhashed(kernel)] = int(used)
    return found


def _short(kernel: str) -> str:
    """The kernel's own name, out of the mangled one."""
    readable = subprocess.run(["c++filt", "-p", kernel], check=True, capture_output=True, text=True).stdout
    return re.sub(r"(\w+|\(anonymous namespace\))::", "", readable.strip()).removeprefix("void ")


def blocks_resident(threads: int, registers_a_thread: int, shared: int) -> int:
    """Blocks that one multiprocessor of an H100 holds at once."""
    warp = -(-registers_a_thread * 32 // 256) * 256
    by_shared = SHARED // (shared + 1024)
    return min(BLOCKS, THREADS // threads, REGISTERS // (warp * -(-threads // 32)), by_shared)


def rows() -> list[list[str]]:
    used = registers()
    table = []
    for case in (case for cases in CASES for case in cases()):
        with simulator.attached() as attached, csikernels.use_backend("cuda"):
            case.call()
            launches = list(attached.launches)
        moved = sum(launch["global_load_bytes"] + launch["global_store_bytes"] for launch in launches)
        floor = max(case.bytes / BANDWIDTH, case.flops / PEAK[case.peak])
        kernels = []
        for launch in launches:
            threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
            shared = launch["static_shared"] + launch["dynamic_shared"]
            count = used[simulator.unhashed(launch["kernel"])]
            resident = blocks_resident(threads, count, shared)
            kernels.append(
                f"`{_short(launch['kernel'])}`: {count} registers, {shared / 1024:.1f} KiB, "
                f"{resident} x {threads} threads ({resident * threads / THREADS:.0%})"
            )
        table.append(
            [
                case.name,
                f"{case.bytes_formula} = {case.bytes:,.0f}",
                f"{moved:,} ({moved / case.bytes:.2f}x)",
                f"{case.flops_formula} = {case.flops:,.0f}" if case.flops else "-",
                f"{floor * 1e6:.2f}",
                "<br>".join(kernels),
            ]
        )
    return table


def render(table: list[list[str]]) -> str:
    head = ["call", "bytes at least", "bytes counted", "operations", "floor us", "kernels on an H100"]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *table]]
    return "\n".join([INTRODUCTION, *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / "roofline.md")
    output = parser.parse_args().output
    if reason := simulator.missing():
        print(f"roofline: nothing was run: {reason}", file=sys.stderr)
        return 1
    output.write_text(render(rows()))
    print(f"roofline: wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
