"""Every Triton kernel compiled for GPUs that are not here: no spills, and tensor cores where operands are bfloat16."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SAME_PATH = f"import sys; sys.path[:] = {sys.path!r}\n"
CASES = """
import json
import torch
from lasco_modules import PAPER, inputs, sams
from triton_compile import compiled
from csikernels import SamBank
from csikernels.triton import lasco, lasco_backward
from csikernels.triton.lasco_block import sizes_of

def lasco_cases(precision, width, arch):
    sizes = {{**PAPER, "layers": 1, "width": width, "feedforward": 4 * width}}
    bank = SamBank.from_modules(*sams(1, sizes), 1.0, precision=precision)
    h, _, slot = inputs([0])
    own, shared = tuple(bank.proxies.tensors()), tuple(bank.reference.tensors())
    S = sizes_of(h, own, *bank.architecture.hyper(), precision == "bfloat16")
    rest = {{"slot": slot, "alpha": h, "slots": 3, "h_in": h, "kept": h, "grad": h, "weights": own}}
    for config in (config for config in lasco.CONFIGS if lasco.fits(config, S, arch)):
        tensors = dict.fromkeys(("base_output", "known", "output", "shift"), h)
        arguments = {{**rest, **tensors, "proxies": own, "reference": shared}}
        constants = {{"S": S, "KNOWN": False, "KEEP_SHIFT": False}}
        yield lasco._forward_kernel, arguments, constants, config.num_warps, config.num_stages
    if precision == "bfloat16":
        return
    warps, stages = lasco_backward.OPTIONS["num_warps"], lasco_backward.OPTIONS["num_stages"]
    yield lasco_backward._keep_kernel, rest, {{"S": S, "STACKED": True}}, warps, stages
    constants = {{"S": S, "STACKED": True, "INPUT": True, "WEIGHTS": True}}
    yield lasco_backward._activation_kernel, {{**rest, "grad_h": h, "sums": h}}, constants, warps, stages
    products = dict(gradient=h, gradient_row=S.row, x=h, x_row=S.row, order=slot, first=slot, weight=h, bias=h,
                    position=h, rows=width, columns=width, slots=3)
    for config in lasco_backward.TILES:
        constants = {{"S": S, "ACTIVATED": True, "POSITION": True, **config.kwargs}}
        yield lasco_backward._weight_kernel, products, constants, config.num_warps, config.num_stages
    sums = {{"values": h, "order": slot, "first": slot, "outputs": (h,) * 4}}
    yield lasco_backward._slot_sum_kernel, sums, {{"SIZE": width, "BLOCK": S.D}}, 4, 1

for kernel, arguments, constants, warps, stages in lasco_cases({precision!r}, {width}, {arch}):
    found = compiled(kernel, arguments, constants, {arch}, warps, stages)
    print(json.dumps({{"name": found.pop("name"), "warps": warps, "stages": stages, **found}}))
"""


ROW_CASES = """
import json
import torch
from triton_compile import compiled
from csikernels.triton import transformer

h = torch.zeros(4)
for low in (False, True):
    following = h.bfloat16() if low else h
    tensors = {**dict.fromkeys(("x", "y", "bias", "weight", "shift", "residual"), h), "following": following}
    for width, period, post in ((512, 0, False), (500, 32, True)):
        constants = dict(PERIOD=period, WIDTH=width, W=512, ROWS=8, NORM=True, POST=post, LOW=low)
        arguments = {**tensors, "rows": 3, "eps": 1e-5}
        print(json.dumps(compiled(transformer._add_norm_kernel, arguments, constants, ARCH, 8, 3, maxnreg=64)))
    constants = dict(WIDTH=2048, ACTIVATION=2, LOW=low, ROWS=8, COLUMNS=128)
    arguments = {**tensors, "rows": 4096}
    print(json.dumps(compiled(transformer._bias_activation_kernel, arguments, constants, ARCH, 4, 3)))
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_row_kernels_spill_nothing_and_leave_room(run_python, record_property, arch):
    shown = run_python(SAME_PATH + ROW_CASES.replace("ARCH", str(arch)), TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stderr
    kernels = [json.loads(line) for line in shown.stdout.splitlines()]
    assert len(kernels) == 6
    for kernel in kernels:
        record_property(kernel["name"], kernel)
        assert kernel["stack"] == 0 and kernel["registers"] <= 64 and kernel["shared"] <= 8192, kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "width", "arch"),
    [("bfloat16", 64, 80), ("bfloat16", 64, 90), ("bfloat16", 64, 100), ("bfloat16", 32, 80), ("bfloat16", 128, 90),
     ("float32", 64, 90), ("float32", 32, 80), ("float32", 32, 100)],
)  # fmt: skip
def test_lasco_kernels_spill_nothing(run_python, record_property, precision, width, arch):
    code = CASES.format(precision=precision, width=width, arch=arch)
    shown = run_python(SAME_PATH + code, TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stderr
    kernels = [json.loads(line) for line in shown.stdout.splitlines()]
    pipelined = [kernel for kernel in kernels if kernel["stages"] == 2]
    assert [kernel["warps"] for kernel in pipelined] == (
        [8] if precision == "float32" or (width, arch) == (64, 80) else [4, 8]
    )
    assert len(kernels) - len(pipelined) == (2 if precision == "bfloat16" else 7)
    for kernel in kernels:
        record_property(kernel["name"], kernel)
        assert kernel["stack"] == 0 and not {"LDL", "STL"} & set(kernel["instructions"]), kernel
        assert kernel["registers"] <= 255 and kernel["shared"] <= 48 * 1024, kernel
        if precision == "bfloat16":
            products = kernel["instructions"].get("HMMA", 0) + kernel["instructions"].get("HGMMA", 0)
            assert products > (100 if width >= 64 else 64), kernel
        if kernel in pipelined:  # copies that nobody waits for (cp.async)
            assert kernel["instructions"]["LDGSTS"] > 20, kernel


def test_the_kernels_are_known_without_triton(run_python):
    """Which ops have Triton kernels is known without importing triton, and agrees with what the modules register."""
    shown = run_python(
        SAME_PATH + "import sys, csikernels; from csikernels import _dispatch, triton\n"
        "print('triton' in sys.modules, set(triton.KERNELS) <= set(_dispatch.schemas()))\n"
    )
    assert shown.stdout.split() == ["False", "True"], shown.stderr


@needs_triton
def test_the_modules_register_what_the_table_says(run_python):
    shown = run_python(
        SAME_PATH + "from csikernels import _dispatch, triton\n"
        "for op in triton.KERNELS: triton.load(op)\n"
        "print({op for op, own in _dispatch._implementations.items() if 'triton' in own} == set(triton.KERNELS))\n",
        TRITON_INTERPRET="1",
    )
    assert shown.stdout.strip() == "True", shown.stderr


@needs_triton
def test_import_and_choice_need_no_gpu(run_python):
    shown = run_python(
        SAME_PATH + "import torch, csikernels\n"
        "assert not torch.cuda.is_available()\n"
        "print('triton' in csikernels.backends()['lasco_forward']['cpu'])\n"
        "import csikernels.triton.lasco_backward\n"
        "try:\n"
        "    csikernels.use_backend('triton').__enter__()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="0",
    )
    assert shown.stdout.splitlines() == ["False", "backend 'triton' is not available: torch sees no CUDA device"]
