"""The NF4 kernels in Triton: every tile, and what each becomes on GPUs that are not here: no spills, tensor cores."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from test_gpu_nf4_lora import layer_on, wanted_output
from test_nf4_lora import gaussian

from csikernels import nf4_lora_linear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ARCHITECTURES = [80, 90, 100]
# What a block may have of shared memory; sm_86 and sm_89, whose code is that of sm_80, have less of it than sm_80.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PREAMBLE = f"""
import sys; sys.path[:] = {sys.path!r}
import json
import torch
from triton_compile import compiled
from csikernels.triton import nf4_lora, nf4_lora_codec

def show(kernel, arguments, constants, warps, stages, **more):
    found = compiled(kernel, arguments, constants, int(sys.argv[1]), warps, stages)
    print(json.dumps({{**more, **found, "warps": warps, "arch": int(sys.argv[1])}}))

def codec(types):
    codes, scales = torch.zeros(4, dtype=torch.uint8), torch.zeros(4)
    for dtype in types:
        dense, more = torch.zeros(4, dtype=dtype), {{"kind": str(dtype)}}
        arguments = {{"packed": codes, "absmax": scales, "count": 4096}}
        quantize = {{**arguments, "weight": dense, "refused": torch.zeros(1, dtype=torch.int64)}}
        show(nf4_lora_codec._quantize_kernel, quantize, {{"BLOCK": 64, "TILE": nf4_lora_codec.QUANTIZED}}, 8, 3, **more)
        constants = {{"TILE": nf4_lora_codec.DECODED, "GROUP": nf4_lora_codec.CHUNK}}
        show(nf4_lora_codec._dequantize_kernel, {{**arguments, "out": dense, "shift": 6}}, constants, 4, 3, **more)

def products(dtype, rows, configs, variants):
    left, scales = torch.zeros(4, dtype=dtype), torch.zeros(4)
    for config in configs:
        for backward, fused, group, cut in variants:
            adapter = scales if fused else left
            arguments = dict(left=left, packed=torch.zeros(4, dtype=torch.uint8), absmax=scales, lora_a=adapter,
                             inner=left, right=adapter, bias=scales, out=scales if cut else left, rows=rows, n=4096,
                             k=4096 if group else 4095, row_bytes=2048, shift=6, rank=8, scaling=0.5, span=4096)
            constants = dict(ROWS=nf4_lora.tile_rows(rows, dtype), BACKWARD=backward, GROUP=group, FUSED=fused,
                             BIAS=not backward, **config.kwargs)
            show(nf4_lora._product_kernel, arguments, constants, config.num_warps, config.num_stages, kind=str(dtype),
                 tile=[constants["ROWS"], *config.kwargs.values()], variant=[backward, fused, group, cut])
"""
# Backward, rank fused, elements known to share a scale, reduction cut.
VARIANTS = [(False, 16, 64, False), (True, 0, 64, True)]
MORE_VARIANTS = [(False, 32, 64, True), (False, 0, 32, False)]
ODD_VARIANTS = [(False, 16, 0, False), (False, 32, 0, True), (False, 0, 0, False), (True, 0, 0, False)]


def kernels_of(run_python, arch: int, code: str) -> list[dict]:
    shown = run_python(PREAMBLE.replace("int(sys.argv[1])", str(arch)) + code, TRITON_INTERPRET="0")
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


def check(kernel: dict) -> None:
    assert kernel["stack"] == 0 and not {"LDL", "STL"} & set(kernel["instructions"]), kernel
    assert kernel["registers"] * 32 * kernel["warps"] <= 65536 and kernel["shared"] <= SHARED[kernel["arch"]], kernel


def tensor_products(kernel: dict) -> int:
    return sum(kernel["instructions"].get(name, 0) for name in ("HMMA", "HGMMA", "UTCHMMA"))


@pytest.mark.gpu("triton")
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_every_tile_gives_the_layer_and_its_gradient(device, monkeypatch, few, single, odd):
    from csikernels.triton import nf4_lora

    kind, n, k, rows = (few, single, odd), 35, 33 if odd else 96, 5 if few else 20
    dtype = torch.float32 if single else torch.bfloat16
    weight, lora_a, lora_b = layer_on(device, n, k, 3, dtype)
    x, upstream = gaussian(rows, k, dtype=dtype).to(device), gaussian(rows, n, dtype=dtype, seed=5).to(device)
    x.requires_grad_()
    wanted = wanted_output(x, weight, lora_a, lora_b)
    (right,) = torch.autograd.grad(wanted, x, upstream.double())
    eps = 4e-7 if single else torch.finfo(dtype).eps
    for config in nf4_lora.CONFIGS[kind]:
        kernel = nf4_lora.tuned([config], nf4_lora._KEY)(nf4_lora._product_kernel)
        monkeypatch.setitem(nf4_lora._KERNELS, kind, kernel)
        result = nf4_lora_linear(x, weight, lora_a, lora_b)
        (grad,) = torch.autograd.grad(result, x, upstream)
        assert (result - wanted).norm() <= eps * wanted.norm()
        assert (grad - right).norm() <= eps * right.norm()


def test_a_bfloat16_product_compiles_for_an_h100(run_python):
    code = "products(torch.bfloat16, 100, nf4_lora.CONFIGS[False, False, False][:1], [(False, 16, 64, False)])"
    (kernel,) = kernels_of(run_python, 90, code)
    check(kernel)
    assert kernel["instructions"]["HGMMA"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_codec_spills_nothing_and_leaves_room(run_python, record_property, arch):
    types = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
    kernels = kernels_of(run_python, arch, f"codec([{types}])")
    assert len(kernels) == 8
    for kernel in kernels:
        record_property(f"{kernel['name']} {kernel['kind']}", kernel)
        check(kernel)
        # Two programs of 8 warps or more on a multiprocessor: both kernels wait for memory.
        assert kernel["registers"] <= 128 and kernel["shared"] <= 48 * 1024, kernel


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 64), ("bfloat16", 1000), ("float32", 1), ("float32", 1000)]
)
def test_products_spill_nothing(run_python, record_property, arch, dtype, rows):
    few, single = rows <= 16, dtype == "float32"
    code = f"products(torch.{dtype}, {rows}, nf4_lora.CONFIGS[{few}, {single}, False], {VARIANTS})"
    kernels = kernels_of(run_python, arch, code)
    assert len(kernels) >= 4
    for kernel in kernels:
        record_property(f"{kernel['tile']} {kernel['variant']}", kernel)
        check(kernel)
        # Beyond 16 rows Hopper's and Blackwell's own products; below, no product of theirs is short enough.
        own = {80: "HMMA", 90: "HMMA" if few else "HGMMA", 100: "HMMA" if few else "UTCHMMA"}[arch]
        assert (kernel["instructions"].get(own, 0) >= 4) != single, kernel
        assert tensor_products(kernel) == 0 or not single, kernel


@pytest.mark.slow
@pytest.mark.parametrize(("odd", "arch"), [(False, 90), (True, 80), (True, 90), (True, 100)])
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 5), ("float16", 1000), ("float32", 1), ("float32", 1000)])
def test_other_ranks_and_odd_rows_spill_nothing(run_python, record_property, dtype, rows, odd, arch):
    few, single = rows <= 16, dtype == "float32"
    variants = ODD_VARIANTS if odd else MORE_VARIANTS
    code = f"products(torch.{dtype}, {rows}, nf4_lora.CONFIGS[{few}, {single}, {odd}], {variants})"
    for kernel in kernels_of(run_python, arch, code):
        record_property(f"{kernel['tile']} {kernel['variant']}", kernel)
        check(kernel)
        assert bool(tensor_products(kernel)) != single, kernel
