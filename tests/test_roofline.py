"""benches/roofline.md has every kernel of the GPU backends, at what it was last counted, near the least bytes."""

from __future__ import annotations

import re
from pathlib import Path

import interpreted
import pytest
import roofline
import simulator
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, here are GPUs")
TABLE = Path(roofline.__file__).with_name("roofline.md").read_text()
QUICK = {  # counted anew
    "cuda": ("`scatter_codeword`", "`top_m`"),
    "triton": ("`scatter_codeword`", "`self_information`", "`Codebook.search`, N=1,"),
}
SPILLS = ("triton", "`lasco_forward`, B=8, 2 x 128, float32")  # its docstring says why


@triton.jit
def scale_kernel(x, factors, total, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0)
    value *= tl.load(factors + at // 4)
    tl.store(x + at, value, mask=at < count)
    tl.atomic_add(total + at % 2, value, mask=at < count)


@triton.jit
def twice_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.load(x + BLOCK - 1 - at))


@pytest.fixture(scope="module")
def launch():
    x, factors, total = torch.ones(16, dtype=torch.bfloat16), torch.full((4,), 2.0), torch.zeros(2)
    with interpreted.noted() as launches:
        scale_kernel[(2,)](x, factors, total, 10, BLOCK=16, num_warps=2)
    assert x.tolist() == [4.0] * 10 + [1.0] * 6
    (only,) = launches
    return only


def test_bytes_of_unmasked_lanes_are_counted_once(launch):
    # Per program: ten elements of x, four factors that four lanes share each, and two sums, read and written.
    assert launch.loaded == 2 * (10 * 2 + 4 * 4 + 2 * 4)
    assert launch.stored == 2 * (10 * 2 + 2 * 4)


@pytest.mark.parametrize("cached", [256, 255])
def test_bytes_read_again_count_beyond_the_cache(monkeypatch, cached):
    monkeypatch.setattr(interpreted, "CACHED", cached)
    with interpreted.noted() as launches:
        twice_kernel[(1,)](torch.ones(64), torch.empty(64), BLOCK=64)
    assert (launches[0].loaded, launches[0].stored) == (256 if cached == 256 else 512, 256)


def test_nothing_is_counted_outside():
    with interpreted.noted() as launches:
        pass
    scale_kernel[(1,)](torch.ones(16), torch.ones(4), torch.zeros(2), 3, BLOCK=16)
    assert launches == []


def test_a_noted_launch_compiles_for_a_gpu(launch):
    ((found,),) = interpreted.machine_code([launch])
    assert found["name"] == "scale_kernel" and found["warps"] == 2
    assert 0 < found["registers"] <= 64 and found["stack"] == 0


def test_blocks_are_limited_by_each_resource():
    assert roofline.blocks_resident(32, 16, 0) == 32  # blocks
    assert roofline.blocks_resident(1024, 16, 0) == 2  # threads
    assert roofline.blocks_resident(128, 168, 0) == 3  # registers
    assert roofline.blocks_resident(128, 16, 100 * 1024) == 2  # shared memory


def rows(backend: str) -> dict[str, list[str]]:
    """Call -> cells of this backend's part of the table."""
    part = TABLE.partition(roofline.TITLES[backend])[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return {cells[0]: cells for cells in lines}


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_the_table_is_whole_and_current(kind):
    if kind == "cuda" and (reason := simulator.missing()):
        pytest.skip(reason)
    table, cases = rows(kind), roofline.cases(kind)
    assert list(table) == [case.name for case in cases], "run python benches/roofline.py"
    for case in cases:
        moved, used = table[case.name][2], table[case.name][5]
        ratio = re.search(r"\((\d+\.\d+)x\)", moved)
        assert ratio and float(ratio[1]) >= 0.99, f"{case.name}: {moved}"
        assert (float(ratio[1]) > 1.25) == (kind in case.excess), f"{case.name}: {moved}"
        assert ("stack" in used) == ((kind, case.name) == SPILLS), f"{case.name}: {used}"
    quick = [case for case in cases if case.name.startswith(QUICK[kind])]
    assert len(quick) == len(QUICK[kind])
    for case in quick:
        moved, _ = roofline.COUNTED[kind][0](case)
        assert table[case.name][2] == roofline.bytes_cell(case, kind, moved), "run python benches/roofline.py"
