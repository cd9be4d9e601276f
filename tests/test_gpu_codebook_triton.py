"""The codebook's Triton kernels: what the cases of every GPU backend leave out, and the machine code they become."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from test_codebook import gaussian, oracle
from test_codebook_kernels import agrees, by_reference, make_book

from csikernels import Codebook, codebook_argmax

pytestmark = pytest.mark.gpu("triton")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SAME_PATH = f"import sys; sys.path[:] = {sys.path!r}\n"
CASES = """
import json
import torch
from triton_compile import compiled
from csikernels.triton import codebook_filter, codebook_pack, codebook_rescore
from csikernels.triton.codebook_rows import AT_ONCE, Layout

rows_at_once, words = (1, 1) if {dimension} == 1 else (1024, 65536)
layout = Layout(3, words, {dimension})
sizes = dict(rows=rows_at_once, count=layout.words, step=layout.step, groups=layout.groups, positions=layout.positions,
             dimension=layout.dimension, first=0)
low = torch.zeros(4, dtype=torch.bfloat16)
single, double = torch.zeros(4), torch.zeros(4, dtype=torch.float64)
keys, rows = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
common = dict(order=rows, environment=rows, index=rows, keys=keys, packed=low, planes=low, factors=double, highs=double,
              residuals=single, errors=single, similarity=single, **sizes)
shared = dict(D=layout.padded, ORDERED=True)

def cases():
    for few in (True, False):
        for config in codebook_filter.configs({arch} // 10, layout.padded, few):
            constants = dict(shared, G=layout.group, **config.kwargs)
            yield codebook_filter.filter_kernel, common, constants, config.num_warps, config.num_stages
    for real in (single, double):
        given = dict(common, h=real, words=real, codebook=real)
        constants = dict(D=layout.padded, W=AT_ONCE // layout.padded, IS_DOUBLE=real is double)
        for copies in (True, False) if real is single else (True,):
            yield codebook_pack.pack_kernel, given, dict(constants, COPY=copies), 4, 3
        constants = dict(shared, R=AT_ONCE // layout.padded)
        yield codebook_filter.queries_kernel, given, constants, 4, 3
        for exact in (True, False):
            constants = dict(codebook_rescore.sizes(rows_at_once, layout, exact), ORDERED=True)
            yield codebook_rescore.rescore_kernel, given, constants, codebook_rescore.WARPS, 3

# A launch takes sizes of 1 for constants, which lack some of the methods of values.
def with_ones():
    ones = "rows", "count", "step", "dimension"
    for kernel, given, constants, *options in cases():
        yield kernel, given, {{**constants, **{{name: 1 for name in ones if name in kernel.arg_names}}}}, *options

for kernel, arguments, constants, warps, stages in {cases}():
    found = compiled(kernel, arguments, constants, {arch}, warps, stages)
    print(json.dumps(dict(found, warps=warps, stages=stages, constants=repr(constants))))
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "arch"),
    [(128, 80), (256, 80), (128, 90), (256, 90), (128, 100), (256, 100), (32, 90), (32, 80), (1, 90)],
)
def test_kernels_spill_nothing_and_multiply_on_tensor_cores(run_python, record_property, dimension, arch):
    cases = "cases" if dimension > 1 else "with_ones"
    shown = run_python(SAME_PATH + CASES.format(dimension=dimension, arch=arch, cases=cases), TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stderr
    kernels = [json.loads(line) for line in shown.stdout.splitlines()]
    names = {kernel["name"] for kernel in kernels}
    assert names == {"filter_kernel", "pack_kernel", "queries_kernel", "rescore_kernel"}
    most = {80: 163, 90: 227, 100: 227}[arch] * 1024
    for kernel in kernels:
        record_property(kernel["name"], kernel)
        found = kernel["instructions"]
        assert kernel["stack"] == 0 and not {"LDL", "STL"} & set(found), kernel
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536 and kernel["shared"] <= most, kernel
        if kernel["name"] == "filter_kernel":
            assert sum(found.get(name, 0) for name in ("HMMA", "HGMMA", "UTCHMMA")) >= 4, kernel  # as the products have
    many = [kernel for kernel in kernels if "'Q': 64" in kernel["constants"] or "'Q': 128" in kernel["constants"]]
    if arch == 90:
        assert many and all(kernel["instructions"].get("HGMMA") for kernel in many), "warp groups multiply on sm_90"


@pytest.fixture
def small_tiles(monkeypatch):
    """The tiles of a GPU, where Triton's interpreter takes larger ones."""
    from csikernels.triton import codebook_filter, codebook_pack, codebook_rescore

    for module in (codebook_filter, codebook_pack, codebook_rescore):
        monkeypatch.setattr(module, "AT_ONCE", 1024)


@pytest.mark.parametrize("precision", ["exact", "float32"])
@pytest.mark.parametrize("kind", ["gaussian", "cluster", "repeated"])
def test_the_tiles_of_a_gpu(device, small_tiles, kind, precision):
    h, book = gaussian(7, 70, seed=9).to(device), make_book(kind, 150, 70, torch.complex64, 0)
    index, similarity = (part.cpu() for part in Codebook(book.to(device), precision).search(h))
    wanted = by_reference(h.cpu(), book)
    if kind == "gaussian" or precision == "exact":
        agrees((index, similarity), wanted)
    torch.testing.assert_close(similarity, wanted[1], rtol=1e-6, atol=0)


def test_launches_for_part_of_the_queries_change_nothing(device, monkeypatch):
    from csikernels.triton import codebook

    h, books = gaussian(50, 12, seed=1).to(device), gaussian(3, 200, 12).to(device)
    environment = (torch.arange(50) * 7 % 3).to(device)
    whole = codebook_argmax(h, books, environment)
    monkeypatch.setattr(codebook, "LISTED", 20 * 8)  # 20 queries, each with 8 groups of 32 words
    parts = codebook_argmax(h, books, environment)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    agrees(tuple(part.cpu() for part in whole), by_reference(h.cpu(), books.cpu(), environment=environment.cpu()))


@pytest.mark.parametrize("kind", ["gaussian", "cluster", "sparse"])
def test_the_bounds_of_every_group_hold(device, kind):
    from csikernels.triton import codebook, codebook_filter
    from csikernels.triton.codebook_rows import Layout

    n, k, d = 20, 300, 48
    layout = Layout(1, k, d)
    h, book = gaussian(n, d, seed=1) * torch.logspace(-20, 20, n)[:, None], make_book(kind, k, d, torch.complex64, 2)
    planes = torch.empty(n, 3, layout.padded, dtype=torch.bfloat16, device=device)
    errors, keys = torch.empty(2, n, device=device), torch.empty(2, n, layout.groups, dtype=torch.int32, device=device)
    _, words, residuals = codebook._parts(Codebook(book.to(device))._packed(), layout)
    codebook_filter.spread_queries(torch.view_as_real(h.to(device)), None, planes, errors, 0)
    codebook_filter.list_groups(planes, words, None, keys, layout)

    exponent = torch.frexp(torch.view_as_real(h).abs().amax(dim=(1, 2))).exponent
    scaled = h.to(torch.complex128) * torch.exp2(-exponent.double())[:, None]
    truth = torch.zeros(n, layout.positions, dtype=torch.float64)
    truth[:, :k] = (oracle(h, book) * scaled.norm(dim=1)[:, None])[:, torch.arange(k) * layout.step % k]
    truth = truth.view(n, layout.groups, layout.group)
    norm, rest = errors.cpu().double()
    error = residuals.cpu().double() * norm[:, None] + rest[:, None]
    assert torch.all(error < 0.01 * norm[:, None]), "bounds that exclude nothing hold, too"
    value, second = (keys.cpu() & -layout.group).view(torch.float32).double().sqrt()
    place = (keys[0].cpu() & layout.group - 1).long()[..., None]
    assert torch.all((truth.gather(2, place)[..., 0] - value).abs() <= error)
    others = truth.scatter(2, place, 0.0).amax(dim=2)
    assert torch.all(others <= second + error) and torch.all(others >= second - error)


@pytest.mark.parametrize("shape", [(4, 257), (5, 1)], ids=["dimension", "words"])
def test_sizes_beyond_the_kernels_take_the_reference(device, monkeypatch, shape):
    from csikernels.triton import codebook, codebook_rows

    monkeypatch.setattr(codebook, "MOST_WORDS", 4)
    assert codebook_rows.MOST_WORDS >= 1 << 20
    h, book = gaussian(3, shape[1]).to(device), gaussian(*shape, seed=1).to(device)
    packed = torch.ops.csikernels.codebook_pack(book, "exact")[1]
    assert packed.numel() == 8 * shape[0], "the layout of the reference"
    index, similarity = codebook_argmax(h, book)
    agrees((index.cpu(), similarity.cpu()), by_reference(h.cpu(), book.cpu()))


def test_spreading_step_is_that_of_the_compiled_backends(device):
    from csikernels.triton.codebook_rows import Layout

    # From csrc/codebook_order.h.
    steps = {1: 1, 2: 1, 3: 1, 4: 3, 5: 3, 7: 5, 128: 79, 1000: 619, 4096: 2531, 65537: 40505, 1048576: 648055}
    assert {words: Layout(1, words, 8).step for words in steps} == steps


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_opcheck(device, opcheck, precision):
    h, words = gaussian(5, 8).to(device), gaussian(9, 8, seed=1).to(device)
    opcheck("codebook_pack", (words, precision))
    opcheck("codebook_pack", (words, precision, False))
    copy, packed = torch.ops.csikernels.codebook_pack(words, precision)
    opcheck("codebook_search", (h, copy, packed, None, precision))
    books, packed = torch.ops.csikernels.codebook_pack(gaussian(2, 9, 8).to(device), precision)
    opcheck("codebook_search", (h, books, packed, torch.tensor([0, 1, 1, 0, 0], device=device), precision))
