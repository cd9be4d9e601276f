"""What the CUDA compiler says of every kernel on every architecture, and that the simulator's checks can fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import simulator
import torch
from test_self_information import random_image

import csikernels

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "86", "89", "90a", "100a", "120a")
REGISTERS = 65536  # of a multiprocessor, on every one of them

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")


def launch_bounds(source: Path) -> dict[str, tuple[int, int]]:
    """Kernel -> threads of a block, blocks a multiprocessor must hold."""
    bounds = {}
    for entry in re.findall(r"\.entry\s.*?\n\{", simulator.compile_ptx(source), re.DOTALL):
        name = re.match(r"\.entry\s+(\w+)", entry)
        threads = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", entry)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", entry)
        assert name and threads and blocks, f"{source.name}: a kernel without __launch_bounds__(threads, blocks)"
        count = 1
        for size in threads.groups():
            count *= int(size or 1)
        bounds[name[1]] = count, int(blocks[1])
    return bounds


@pytest.mark.parametrize("source", simulator.kernel_sources(), ids=lambda path: path.stem)
def test_kernels_neither_spill_nor_exceed_their_registers(source, tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags = [
        *simulator.NVCC_FLAGS,
        *targets,
        "--threads=2",
        "-Xptxas",
        "-v",
        "-fatbin",
        "-o",
        str(tmp_path / "kernels.fatbin"),
    ]
    done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bounds = {simulator.unhashed(name): bound for name, bound in launch_bounds(source).items()}
    reports = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in reports} == {f"sm_{arch}" for arch in ARCHS}
    assert len(reports) == len(bounds) * len(ARCHS)
    for kernel, arch, stack, stored, loaded, registers in reports:
        threads, blocks = bounds[simulator.unhashed(kernel)]
        where = f"{kernel} on {arch}"
        assert (stack, stored, loaded) == ("0", "0", "0"), f"{where}: stack {stack}, spills {stored} and {loaded} bytes"
        # A warp's registers are handed out in units of 256.
        per_warp = -(-int(registers) * 32 // 256) * 256
        assert per_warp * (threads // 32) * blocks <= REGISTERS, f"{where}: {registers} registers for {blocks} blocks"


def test_no_two_sources_have_one_object_file():
    stems = [path.stem for kind in ("*.cpp", "*.cu") for path in simulator.SOURCES.glob(kind)]
    assert len(stems) == len(set(stems)), "torch's build names an object after its source, without .cpp or .cu"


def test_a_barrier_taken_away_is_found(simulated, tmp_path, monkeypatch):
    header = (simulator.SOURCES / "select.cuh").read_text()
    barrier = "  if (threadIdx.x == 0) state.survivors = 0;\n  __syncthreads();\n"
    assert barrier in header
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "select.cuh").write_text(header.replace(barrier, barrier.replace("  __syncthreads();\n", "")))
    source = simulator.SOURCES / "self_information_kernels.cu"
    # Its folder is searched before csrc. The kernels' names carry a hash, which differs between the two files.
    broken = simulator.ptxsim().Module(simulator.compile_ptx(source, extra=("-I", str(tmp_path))))
    kernels = {simulator.unhashed(name): (broken, name) for name in broken.kernels()}
    h = random_image(1, 2, 8, 8)
    csikernels.select_informative(h, 5, bandwidth=0.5)  # as it stands, nothing is found
    monkeypatch.setattr(simulated, "find", lambda kernel: kernels[simulator.unhashed(kernel)])
    with pytest.raises(simulator.ptxsim().PtxFault, match="race on shared memory"):
        csikernels.select_informative(h, 5, bandwidth=0.5)


def test_an_output_left_unwritten_is_found(simulated):
    # What torch allocates within is NaN: the check of values could not miss an element that no thread wrote.
    assert torch.empty(3).isnan().all()


def test_an_access_beyond_a_buffer_is_found(simulated, monkeypatch):
    know = simulated.know

    def short(data: int | None, size: int, writable: int) -> None:
        know(data, size - 4 if size > 4 and not writable else size, writable)

    monkeypatch.setattr(simulated, "know", short)
    with pytest.raises(simulator.ptxsim().PtxFault, match="out-of-bounds"):
        csikernels.top_m(torch.randn(1, 100), 5)
