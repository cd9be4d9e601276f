"""nf4_lora_linear and its gradients in Triton: products of rows with a 4-bit weight and an adapter.

    forward:   out [M, N] = x W^T + scaling (x A^T) B^T + bias
    backward:  gradient of x [M, K] = g W + u A             (u = scaling g B, [M, r])

Tiling: a program owns ROWS rows by OUTPUTS outputs and walks a part of the reduction in steps. It decodes its part of
  the weight (level times scale in float32, rounded once) and multiplies: half precision on tensor cores with float32
  sums, float32 by fused multiply-adds. Codes and rows of later steps are copied to shared memory meanwhile.
Adapter: a forward step multiplies its rows with A too, whose r columns are added to the output's OUTPUTS; ``x A^T``
  never leaves the program, and (times B^T) is a last step of the reduction. That is r / OUTPUTS more products, so a
  rank above 32 takes cuBLAS for ``x A^T``, as the backward does for u, which the gradient of A needs besides.
Up to 16 rows a program reads each code once and there is one tile of rows: the weight is read once. Few tiles of
  outputs leave multiprocessors idle, so the reduction is cut for two programs on each; float32 sums of the parts, the
  adapter's share in each, are added by a second launch in the order of the parts: results repeat.
FLOPs 2 M N K + 2 M r (N + K); bytes N K (1/2 + 4/block) + e M (N + K) + e r (N + K) for elements of e bytes, and
  8 M N for each part of a cut reduction. Floor on an H100 at N = K = 4096, block 64, r = 16: 2.9 us for one bfloat16
  token; 0.14 ms for 4,096 of them at 990 TFLOP/s, 2.1 ms in float32 at 67.
What bounds it: the look-up is one load from shared memory per code, at most 32 a cycle and multiprocessor, and a step's
  decoded tile passes through shared memory once more. For one token that allows about 60 % of the bandwidth; a tile of
  128 rows has 128 multiply-adds per code, 16 look-ups a cycle at the tensor cores' peak.

Sizes of more than 8 million rows or columns of the weight, and float64, take the reference.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import nf4_lora as in_pytorch
from csikernels.triton import interpreted
from csikernels.triton.lasco_block import load_tile, product, store_tile
from csikernels.triton.launch import on, tuned
from csikernels.triton.nf4_lora_checks import check_gradient, check_layer, has_kernel_for
from csikernels.triton.nf4_lora_codec import CHUNK, level_table, rounded, weight_tile

_MOST_FUSED = 32  # rank
_FEW = 16  # rows: the least that a tensor core's product takes
_PART = 128  # a cut reduction's parts are multiples of it: of every step


@triton.jit
def _product_kernel(
    left,  # [rows, reduction]
    packed,  # uint8
    absmax,  # float32
    lora_a,  # [rank, k] where FUSED
    inner,  # [rows, rank] unless FUSED
    right,  # [outputs, rank], or [rank, outputs] where BACKWARD
    bias,  # [outputs] where BIAS
    out,  # [rows, outputs], or float32 [parts, rows, outputs]
    rows,
    n,
    k,
    row_bytes,  # k / 2
    shift,  # of the scales' blocks
    rank,
    scaling,  # where FUSED
    span,  # of the reduction, by a part
    ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
    GROUP: tl.constexpr,  # see weight_tile
    FUSED: tl.constexpr,  # the rank padded, or 0
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    TYPE: tl.constexpr = left.dtype.element_ty
    reduction, outputs = (n, k) if BACKWARD else (k, n)
    # Tiles of the same outputs follow each other: their part of the weight comes from L2.
    row_tiles = tl.cdiv(rows, ROWS)
    tile, part = tl.program_id(0), tl.program_id(1)
    row = (tile % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first_output = tile // row_tiles * OUTPUTS
    output = first_output + tl.arange(0, OUTPUTS)
    end = tl.minimum(reduction, (part + 1) * span)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    levels = level_table()
    if FUSED:
        j = tl.arange(0, FUSED)
        through = tl.zeros([ROWS, FUSED], tl.float32)
    for first in range(part * span, end, STEP):
        at = first + tl.arange(0, STEP)
        x = load_tile(left, row, rows, at, end, reduction)
        if BACKWARD:
            w = weight_tile(levels, packed, absmax, first, first_output, n, k, row_bytes, shift, STEP, OUTPUTS, GROUP)
            total = product(x, rounded(w, TYPE), total)
        else:
            w = weight_tile(levels, packed, absmax, first_output, first, n, k, row_bytes, shift, OUTPUTS, STEP, GROUP)
            total = product(x, tl.trans(rounded(w, TYPE)), total)
            if FUSED:
                a = rounded(load_tile(lora_a, j, rank, at, end, k).to(tl.float32), TYPE)
                through = product(x, tl.trans(a), through)
    if FUSED:
        b = rounded(load_tile(right, output, outputs, j, rank, rank).to(tl.float32), TYPE)
        total = product(rounded(through * scaling, TYPE), tl.trans(b), total)
    else:
        for first in range(0, tl.where(part == 0, rank, 0), 16):
            at = first + tl.arange(0, 16)
            t = load_tile(inner, row, rows, at, rank, rank)
            if BACKWARD:
                total = product(t, load_tile(right, at, rank, output, outputs, outputs), total)
            else:
                total = product(t, tl.trans(load_tile(right, output, outputs, at, rank, rank)), total)
    if BIAS:
        offset = tl.load(bias + output, mask=output < tl.where(part == 0, outputs, 0), other=0.0)
        total += offset.to(tl.float32)[None, :]
    out += part.to(tl.int64) * rows * outputs
    store_tile(out, row, rows, output, outputs, outputs, rounded(total, out.dtype.element_ty))


@triton.jit
def _sum_kernel(
    partial,  # float32 [parts, count]
    out,  # [count]
    parts,
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(partial + at, mask=at < count, other=0.0)
        partial += count
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=at < count)


# Launches -------------------------------------------------------------------------------------------------------------


def _config(outputs: int, step: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"OUTPUTS": outputs, "STEP": step}, num_warps=warps, num_stages=stages)


# By whether there are few rows, of float32, of a weight whose rows are no multiple of 32 long: all that fits in
# registers on sm_80 to sm_100, and in the 99 KB of shared memory of sm_86. Few rows: several programs of four warps on
# a multiprocessor keep more codes in flight. Float32: a thread holds a step of its rows and outputs, so that steps are
# short. Odd rows: an address for each code and scale, so that tiles are small.
CONFIGS = {
    (True, False, False): [_config(64, 64, 4, 4), _config(128, 64, 4, 3)],
    (False, False, False): [_config(128, 64, 8, 3), _config(64, 128, 8, 2), _config(64, 64, 4, 3)],
    (True, True, False): [_config(64, 32, 8, 3), _config(64, 16, 4, 3)],
    (False, True, False): [_config(32, 32, 8, 2), _config(64, 16, 8, 2)],
    (True, False, True): [_config(64, 32, 4, 3)],
    (False, False, True): [_config(64, 64, 8, 1)],
    (True, True, True): [_config(64, 16, 4, 2)],
    (False, True, True): [_config(32, 32, 8, 1)],
}
_INTERPRETED = [_config(64, 128, 4, 1)]  # the interpreter takes about as long for a small tile as for a large one
_KEY = ["n", "k", "ROWS", "BACKWARD", "GROUP", "FUSED"]
_KERNELS = {
    kind: tuned(_INTERPRETED if interpreted() else configs, _KEY)(_product_kernel) for kind, configs in CONFIGS.items()
}


def tile_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows of a program's tile."""
    if rows <= _FEW:
        return _FEW
    return 64 if rows <= 64 or dtype == torch.float32 else 128


def shared_scale(k: int, block_size: int) -> int:
    """``weight_tile``'s GROUP."""
    group = math.gcd(k, block_size, _PART)
    return group if group >= CHUNK else 0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def _parts(tiles: int, reduction: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts the reduction is cut, and their length: for two programs on each multiprocessor."""
    pieces = triton.cdiv(reduction, _PART)
    wanted = max(1, min(2 * _multiprocessors(device) // tiles, pieces // 2))
    span = triton.cdiv(pieces, wanted) * _PART
    return triton.cdiv(reduction, span), span


def _product(
    left: Tensor, packed: Tensor, absmax: Tensor, block_size: int, k: int, right: Tensor, *,
    backward: bool = False, lora_a: Tensor | None = None, inner: Tensor | None = None, scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """left W^T + (inner, or scaling left A^T) right^T + bias; ``backward``: left W + inner right. -> [M, outputs]"""
    rows, reduction = left.shape
    n, outputs = (reduction, k) if backward else (right.shape[0], right.shape[0])
    rank = right.shape[0 if backward else 1]
    tall = tile_rows(rows, left.dtype)
    parts, span = _parts(triton.cdiv(rows, tall) * triton.cdiv(outputs, 128), reduction, left.device)
    out = left.new_empty((rows, outputs))
    sums = out if parts == 1 else left.new_empty((parts, rows, outputs), dtype=torch.float32)
    fused = max(_FEW, triton.next_power_of_2(rank)) if lora_a is not None else 0
    group = shared_scale(k, block_size)
    kernel = _KERNELS[rows <= _FEW, left.dtype == torch.float32, group == 0]

    def grid(meta):
        return triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(outputs, meta["OUTPUTS"]), parts

    with on(left):
        kernel[grid](
            left, packed, absmax, left if lora_a is None else lora_a, left if inner is None else inner, right,
            left if bias is None else bias, sums, rows, n, k, k // 2, block_size.bit_length() - 1, rank, scaling, span,
            ROWS=tall, BACKWARD=backward, GROUP=group, FUSED=fused, BIAS=bias is not None,
            enable_fp_fusion=True,
        )  # fmt: skip
        if parts > 1:
            block = 1024
            _sum_kernel[(triton.cdiv(out.numel(), block),)](
                sums, out, parts, out.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
            )
    return out


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a b, rounded once."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


# Ops ------------------------------------------------------------------------------------------------------------------


def _is_wide(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)


@implement("nf4_lora_linear", "triton")
def nf4_lora_linear(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias):
    check_layer(x, packed, absmax, block_size, lora_a, lora_b, bias)
    n, k, rank = lora_b.shape[0], x.shape[-1], lora_a.shape[0]
    if _is_wide(x, lora_a, lora_b, bias) or not has_kernel_for(n, k, rank):
        return in_pytorch.linear(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias)
    rows = x.reshape(-1, k).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    bias = None if bias is None else bias.contiguous()
    if 0 < rank <= _MOST_FUSED:
        adapter = {"lora_a": lora_a.contiguous(), "right": lora_b.contiguous(), "scaling": scaling}
    else:
        inner = _scaled_product(rows, lora_a.to(x.dtype).t(), scaling) if rank else rows
        adapter = {"inner": inner, "right": lora_b.to(x.dtype).contiguous()}
    return _product(rows, packed, absmax, block_size, k, bias=bias, **adapter).view(*x.shape[:-1], n)


@implement("nf4_lora_linear_backward", "triton")
def nf4_lora_linear_backward(grad, x, packed, absmax, block_size, lora_a, lora_b, scaling, output_mask):
    check_layer(x, packed, absmax, block_size, lora_a, lora_b)
    n, k, rank = lora_b.shape[0], x.shape[-1], lora_a.shape[0]
    check_gradient(grad, x, n)
    if _is_wide(grad, x, lora_a, lora_b) or not has_kernel_for(n, k, rank):
        return in_pytorch.linear_backward(grad, x, packed, absmax, block_size, lora_a, lora_b, scaling, output_mask)
    tokens = x.numel() // k
    g, rows = grad.reshape(tokens, n), x.reshape(tokens, k)
    # Gradients are those of float32 products unless all that goes into one is of the same half precision.
    dtype = x.dtype if grad.dtype == x.dtype else torch.float32
    adapter_dtype = dtype if lora_a.dtype == lora_b.dtype == dtype else torch.float32
    wants_x, wants_a, wants_b, wants_bias = output_mask
    for_x, for_a, for_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    u = None  # scaling g B
    if wants_x and tokens == 0:
        for_x = torch.empty_like(x)
    elif wants_x:
        left = g.to(dtype).contiguous()
        u = _scaled_product(left, lora_b.to(dtype), scaling) if rank else left.new_empty((tokens, 0))
        right = lora_a.to(dtype).contiguous()
        for_x = _product(left, packed, absmax, block_size, k, right, backward=True, inner=u)
        for_x = for_x.to(x.dtype).view(x.shape)
    if wants_a:
        if u is None or adapter_dtype != dtype:
            u = _scaled_product(g.to(adapter_dtype), lora_b.to(adapter_dtype), scaling)
        for_a = (u.t() @ rows.to(adapter_dtype)).to(lora_a.dtype)
    if wants_b:
        t = _scaled_product(rows.to(adapter_dtype), lora_a.to(adapter_dtype).t(), scaling)
        for_b = (g.to(adapter_dtype).t() @ t).to(lora_b.dtype)
    for_bias = g.sum(dim=0, dtype=torch.float32) if wants_bias else x.new_empty(0, dtype=torch.float32)
    return for_x, for_a, for_b, for_bias
