"""Write benches/roofline.md: what each GPU kernel moves and computes, against what it must.

Usage: ``python benches/roofline.py [--output FILE]``. No GPU is needed. CUDA kernels run in the PTX simulator of the
tests and Triton kernels in Triton's interpreter, which count the bytes; registers come from the compilers. The floor is
the larger of bytes over bandwidth and operations over peak on an H100 SXM: 3.35 TB/s, 67 float32 and 990 bfloat16
TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import interpreted  # noqa: E402
import simulator  # noqa: E402
from roofline_cases import CASES, Case  # noqa: E402

import csikernels  # noqa: E402

BANDWIDTH = 3.35e12
PEAK = {"float32": 67e12, "bfloat16": 990e12}
# Of one multiprocessor of an H100.
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32

INTRODUCTION = """# Roofline of the GPU kernels

Written by `python benches/roofline.py`, without a GPU. Bytes are those that the PTX simulator (CUDA) and Triton's
interpreter count; registers and shared memory are the compilers' for sm_90a and sm_90, the floor is that of an H100 SXM
(3.35 TB/s, 67 float32 and 990 bfloat16 TFLOP/s). The last column has registers a thread, shared memory a block, and how
many blocks and threads of the 2,048 a multiprocessor holds at once.
"""
TITLES = {
    "cuda": "## CUDA\n",
    "triton": """## Triton

A kernel with several configurations has a line for each; a GPU keeps the fastest. Bytes are those of the first.
""",
}


@dataclass
class Use:
    """What a kernel's block takes of a multiprocessor."""

    kernel: str
    registers: int  # a thread
    shared: int  # bytes
    threads: int
    spilled: int = 0  # bytes of stack a thread

    def __str__(self) -> str:
        resident = blocks_resident(self.threads, self.registers, self.shared)
        spills = f", **{self.spilled} bytes of stack**" if self.spilled else ""
        return (
            f"`{self.kernel}`: {self.registers} registers{spills}, {self.shared / 1024:.1f} KiB, "
            f"{resident} x {self.threads} threads ({resident * self.threads / THREADS:.0%})"
        )


@functools.cache
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


def simulated(case: Case) -> tuple[int, list]:
    """Bytes that the CUDA kernels move, and their launches."""
    with simulator.attached() as attached, csikernels.use_backend("cuda"):
        call = case.prepare()
        attached.clear()
        call()
        launches = list(attached.launches)
    return sum(launch["global_load_bytes"] + launch["global_store_bytes"] for launch in launches), launches


def uses_of_cuda(launches: Sequence) -> list[Use]:
    return [
        Use(
            _short(launch["kernel"]),
            registers()[simulator.unhashed(launch["kernel"])],
            launch["static_shared"] + launch["dynamic_shared"],
            launch["block"][0] * launch["block"][1] * launch["block"][2],
        )
        for launch in launches
    ]


def interpreted_call(case: Case) -> tuple[int, list[interpreted.Launch]]:
    """Bytes that the Triton kernels move, and their launches."""
    with csikernels.use_backend("triton"):
        call = case.prepare()
        with interpreted.as_on_an_h100(), interpreted.noted() as launches:
            call()
    return sum(launch.loaded + launch.stored for launch in launches), launches


def uses_of_triton(launches: Sequence[interpreted.Launch]) -> list[Use]:
    return [
        Use(found["name"], found["registers"], found["shared"], 32 * found["warps"], found["stack"])
        for configurations in interpreted.machine_code(launches)
        for found in configurations
    ]


COUNTED = {"cuda": (simulated, uses_of_cuda), "triton": (interpreted_call, uses_of_triton)}


def cases(backend: str) -> list[Case]:
    """Those whose op this backend has."""
    with simulator.attached() if backend == "cuda" else contextlib.nullcontext():
        available = {op for op, devices in csikernels.backends().items() if backend in devices["cpu"]}
    return [case for make in CASES for case in make() if case.op in available and backend in case.backends]


def bytes_cell(case: Case, backend: str, moved: int) -> str:
    why = f": {case.excess[backend]}" if backend in case.excess else ""
    return f"{moved:,} ({moved / case.bytes:.2f}x){why}"


def row(case: Case, backend: str) -> list[str]:
    count, uses_of = COUNTED[backend]
    moved, launches = count(case)
    floor = max(case.bytes / BANDWIDTH, case.flops / PEAK[case.peak])
    kernels = Counter(map(str, uses_of(launches)))
    return [
        case.name,
        f"{case.bytes_formula} = {case.bytes:,.0f}",
        bytes_cell(case, backend, moved),
        f"{case.flops_formula} = {case.flops:,.0f}" if case.flops else "-",
        f"{floor * 1e6:.2f}",
        "<br>".join(f"{count} times {use}" if count > 1 else use for use, count in kernels.items()),
    ]


def render(tables: dict[str, list[list[str]]]) -> str:
    head = ["call", "bytes at least", "bytes counted", "operations", "floor us", "kernels on an H100"]
    parts = [INTRODUCTION]
    for backend, table in tables.items():
        lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *table]]
        parts += [TITLES[backend], *lines, ""]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / "roofline.md")
    output = parser.parse_args().output
    if reason := simulator.missing():
        print(f"roofline: nothing was run: {reason}", file=sys.stderr)
        return 1
    os.environ["TRITON_INTERPRET"] = "1"  # read as a kernel is defined: none is yet
    tables: dict[str, list[list[str]]] = {}
    for backend in COUNTED:
        tables[backend] = []
        for case in cases(backend):
            tables[backend].append(row(case, backend))
            print(f"roofline: {backend}: {case.name}: {tables[backend][-1][2]}")
    output.write_text(render(tables))
    print(f"roofline: wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
