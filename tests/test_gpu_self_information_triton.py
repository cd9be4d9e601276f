"""The self_information family in Triton: selections that do not fit in registers, and the code compiled for GPUs."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from on_reference import reference
from test_self_information import grid, random_image

from csikernels import scatter_codeword, select_informative, self_information, top_m

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
on_triton = pytest.mark.gpu("triton")

SAME_PATH = f"import sys; sys.path[:] = {sys.path!r}\n"
CASES = """
import json
import torch
from triton_compile import compiled
from csikernels.triton import self_information as ours
from csikernels.triton.self_information_select import options_of, tiles_of

TYPES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
single, double = torch.zeros(4), torch.zeros(4, dtype=torch.float64)
integers, long = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
shape = {"n": 2048, "height": 32, "width": 32}
steps = {"row_step": 3, "column_step": 3, "coefficient": 1.0}
table = {"offsets": integers, "neighbours": 8, "rounder": 1.0, "inverse": 1.0}

def selection(kernel, n, m, bits, given, /, **constants):
    tiles = tiles_of(n, m, bits)
    out = {"source": integers, "survivors": long, "values": integers, "indices": long, "n": n, "m": m}
    arguments = {**shape, **given, **out, "keys": long if bits == 64 else integers}
    return kernel, arguments, {"S": tiles, **constants}, options_of(tiles)

def cases(every):
    images = {"images": single, **steps}
    yield selection(ours._grid_select_kernel, 2048, 221, 32, images)
    if not every:
        return
    yield selection(ours._grid_select_kernel, 16384, 16384, 32, {**images, "images": single.bfloat16()})
    # A launch makes constants of arguments that are 1.
    ones = dict.fromkeys(("n", "height", "width", "row_step", "column_step"), 1)
    yield selection(ours._grid_select_kernel, 1, 1, 32, images, **ones)
    for dtype, infinity in ours._INFINITIES.items():
        bits = 8 * dtype.itemsize
        yield selection(ours._top_m_kernel, 2048, 221, bits, {"scores": long.to(TYPES[bits])}, INFINITY=infinity)
    yield selection(ours._top_m_kernel, 16384, 16384, 64, {"scores": long}, INFINITY=infinity)
    tile = {"TILE": ours.SPREAD}
    yield ours._grid_information_kernel, {**shape, **images, "bits": single, "constant": 1.0}, tile, {"num_warps": 4}
    for centred in (False, True):
        arguments = {**shape, **table, "images": double, "bits": double, "centres": 1.0, "constant": 1.0,
                     "scale": 1.0}
        yield ours._information_kernel, arguments, {**tile, "CENTRED": centred}, {"num_warps": 4}
    arguments = {"values": integers, "indices": long, "mean": integers, "owner": integers, "image": integers, "m": 221}
    options = {"num_warps": 4, "debug": True, "sanitize_overflow": False}
    yield ours._scatter_kernel, {**shape, **arguments}, tile, options

for kernel, arguments, constants, options in cases(EVERY):
    warps = options.pop("num_warps")
    wide = options.get("maxnreg") is not None
    found = compiled(kernel, arguments, constants, ARCH, warps, 3, **options)
    print(json.dumps({"warps": warps, "wide": wide, **found}))
"""


def compile_all(run_python, arch: int, every: bool) -> list[dict]:
    code = CASES.replace("ARCH", str(arch)).replace("EVERY", str(every))
    shown = run_python(SAME_PATH + code, TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


def check_usage(kernel: dict) -> None:
    assert kernel["stack"] == 0 and not {"LDL", "STL"} & set(kernel["instructions"]), kernel
    limit = 168 if kernel["wide"] else 128
    assert kernel["registers"] <= limit and kernel["shared"] <= 32 * 1024, kernel


@needs_triton
def test_selection_at_the_papers_size_spills_nothing(run_python, record_property):
    (kernel,) = compile_all(run_python, 90, every=False)
    record_property(kernel["name"], kernel)
    check_usage(kernel)
    assert kernel["instructions"]["MUFU"] >= 8 * 2048 / (32 * kernel["warps"])  # the terms of eight keys a thread


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_spill_nothing(run_python, record_property, arch):
    kernels = compile_all(run_python, arch, every=True)
    assert len(kernels) == 12
    for kernel in kernels:
        record_property(kernel["name"], kernel)
        check_usage(kernel)


@on_triton
@pytest.mark.parametrize(
    ("dtype", "n", "m"),
    [
        (torch.float32, 4096, 4096),
        (torch.float32, 4097, 4097),
        (torch.bfloat16, 5000, 4500),
        (torch.float64, 4500, 129),
    ],
)
def test_rows_beside_the_tiles(device, dtype, n, m):
    score = random_image(1, 1, 1, n, dtype=dtype).flatten(1)
    score[:, ::3] = score[:, 7:8]  # a third ties
    _, indices = top_m(score.to(device), m)
    assert torch.equal(indices.cpu(), reference(top_m, score, m)[1])


@on_triton
@pytest.mark.parametrize("bandwidth", [5e-310, 1e-290, 1e200, 1e308])
def test_bandwidths_beyond_any_channel(device, bandwidth):
    h = random_image(1, 1, 5, 6, dtype=torch.float64) * min(bandwidth, 1e300)
    bits = self_information(h.to(device), bandwidth=bandwidth).cpu()
    torch.testing.assert_close(bits, reference(self_information, h, bandwidth=bandwidth))
    selected = select_informative(h.to(device), 30, bandwidth=bandwidth)[1].cpu()
    assert torch.equal(selected, reference(select_informative, h, 30, bandwidth=bandwidth)[1])


@on_triton
def test_a_sample_has_the_same_bits_in_every_batch(device):
    h = random_image(4, 2, 8, 9).to(device)
    for offsets in (grid(2), [(1, 0), (0, 3)]):
        values, indices = select_informative(h, 30, bandwidth=0.5, offsets=offsets)
        for i in range(4):
            alone = select_informative(h[i : i + 1], 30, bandwidth=0.5, offsets=offsets)
            assert torch.equal(alone[0], values[i : i + 1]) and torch.equal(alone[1], indices[i : i + 1])


@on_triton
def test_values_move_bit_for_bit(device):
    # Payloads of NaN and the sign of zero are not arithmetic's to touch.
    bits = torch.tensor([[0x7FC12345, -0x80000000, 0x7F812345, -1, 1]], dtype=torch.int32).to(device)
    values, indices = top_m(torch.zeros(1, 5, device=device), 5, source=bits.view(torch.float32))
    assert torch.equal(values.view(torch.int32), bits)
    mean = torch.zeros(1, dtype=torch.int32, device=device).view(torch.float32)
    image = scatter_codeword(values, indices.flip(1), mean, (5,))
    assert torch.equal(image.view(torch.int32), bits.flip(1))


@on_triton
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_outside_the_shape_is_named(device, wrong):
    if device.type != "cpu":
        pytest.skip("on a GPU this is an assertion after which the process cannot use it")
    indices = torch.tensor([[0, wrong]])
    with pytest.raises(ValueError, match=rf"indices: expected 0\.\.3, the elements of \(2, 2\), got {wrong}"):
        scatter_codeword(torch.ones(1, 2), indices, torch.zeros(1), (2, 2))


@needs_triton
@pytest.mark.parametrize(
    ("offsets", "steps"),
    [(grid(3), (3, 3)), (grid(1)[::-1], (1, 1)), (grid(9), (4, 5)), (grid(2)[:-1], None), ([*grid(2), (2, 2)], None),
     ([(0, 0)], None), ([*grid(2)[:-1], (2, 1)], None)],
)  # fmt: skip
def test_a_grid_is_known_by_its_offsets(offsets, steps):
    from csikernels.triton.self_information import _neighbourhood

    found = _neighbourhood(tuple(step for pair in offsets for step in pair), 4, 5)
    assert found.grid == steps and found.centres == offsets.count((0, 0))
