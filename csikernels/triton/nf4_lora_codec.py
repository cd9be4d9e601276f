"""nf4_quantize and nf4_dequantize in Triton, and how every NF4 kernel here turns codes into numbers.

Quantise: a block's scale is its largest magnitude; a code counts the midpoints between levels below x / scale. The
arithmetic is the reference's, operation by operation (IEEE quotients, which Triton's ``/`` is not), so that codes are
equal at the decision thresholds too. A program takes 4,096 elements, a multiple of every block: the weight is read
once. Bytes: e + 1/2 + 4/block per element of e bytes; floor on an H100 (3.35 TB/s) for a float32 4096 x 4096 weight,
block 64: 22.9 us. Dequantise: the same bytes and floor, 2,048 elements a program.

Look-up: the 16 levels lie in shared memory and ``tl.gather`` reads them by code. 16 entries lie in 16 banks, so a
warp's 32 codes take one cycle whatever they are, as a shuffle would. A table in global memory compiles to more: in a
loop Triton copies each entry it finds to shared memory first. Selects take 15 instructions a code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import nf4_lora as in_pytorch
from csikernels.triton.lasco_block import operand
from csikernels.triton.launch import on
from csikernels.triton.nf4_lora_checks import check_dequantize, check_weight, has_kernel_for

LEVELS = tl.constexpr(in_pytorch.LEVELS)
# In float32, as the reference takes them; float64 would place some of the thresholds elsewhere.
MIDPOINTS = tl.constexpr(((torch.tensor(in_pytorch.LEVELS[:-1]) + torch.tensor(in_pytorch.LEVELS[1:])) / 2).tolist())
SMALLEST = tl.constexpr(torch.tensor(in_pytorch.SMALLEST).item())
QUANTIZED = 4096  # elements of a program, the largest block
DECODED = 2048
CHUNK = 32  # elements that share a scale whatever the block size, where they begin at a multiple of it


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def level_table():
    """The 16 levels, float32."""
    code = tl.arange(0, 16)
    levels = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        levels = tl.where(code == i, LEVELS[i], levels)
    return levels


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """A float32 tile as an operand or output of this type."""
    if dtype == tl.bfloat16:
        return operand(x, True)
    else:
        return x.to(dtype)


@triton.jit
def _both_codes(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes [ROWS, COLUMNS / 2] -> codes [ROWS, COLUMNS]."""
    byte = byte.to(tl.int32)
    return tl.reshape(tl.join(byte >> 4, byte & 15), [ROWS, COLUMNS])


@triton.jit
def weight_tile(
    levels,  # of level_table
    packed,  # uint8 [ceil(n k / 2)]
    absmax,  # float32 [ceil(n k / 2^shift)]
    first_row,
    first,  # column, a multiple of GROUP
    n,
    k,
    row_bytes,  # k / 2
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,  # elements from a multiple of it on that lie in one row and block: at least 32, or 0 for any k
):
    """Rows and columns of the weight [n, k] in float32 [ROWS, COLUMNS], 0 beyond its ends."""
    # Within a tile 32 bits count the elements: twice as many addresses fit in registers.
    row = tl.arange(0, ROWS)[:, None]
    inside = row < n - first_row
    start = (tl.zeros([], tl.int64) + first_row) * k + first
    block, in_block = start >> shift, (start & ((1 << shift) - 1)).to(tl.int32)
    if GROUP == 0:
        column = tl.arange(0, COLUMNS)[None, :]
        here = inside & (column < k - first)
        at = row * k + column
        half = at + (start % 2).to(tl.int32)
        byte = tl.load(packed + start // 2 + (half >> 1), mask=here, other=0).to(tl.int32)
        code = tl.where(half % 2 == 0, byte >> 4, byte & 15)
        scale = tl.load(absmax + block + ((in_block + at) >> shift), mask=here, other=0.0)
    else:
        # Triton does not see how even these halves are; told so, it loads 16 bytes at once.
        EVEN: tl.constexpr = 16 if COLUMNS >= 32 else COLUMNS // 2
        first_byte, bytes = tl.multiple_of(start // 2, EVEN), tl.multiple_of((k - first) // 2, EVEN)
        i = tl.arange(0, COLUMNS // 2)[None, :]
        byte = tl.load(packed + first_byte + (row * row_bytes + i), mask=inside & (i < bytes), other=0)
        code = _both_codes(byte, ROWS, COLUMNS)
        SHARING: tl.constexpr = GROUP if GROUP < COLUMNS else COLUMNS
        GROUPS: tl.constexpr = COLUMNS // SHARING
        group = tl.arange(0, GROUPS)[None, :] * SHARING
        at = (in_block + row * k + group) >> shift
        scale = tl.load(absmax + block + at, mask=inside & (group < k - first), other=0.0)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, SHARING]), [ROWS, COLUMNS])
    level = tl.gather(levels, tl.reshape(code, [ROWS * COLUMNS]), 0)
    return tl.reshape(level, [ROWS, COLUMNS]) * scale


@triton.jit
def _code(relative):
    """A value on a midpoint takes the lower level."""
    relative = tl.minimum(tl.maximum(relative, -1.0), 1.0)
    code = tl.zeros_like(relative).to(tl.int32)
    for i in tl.static_range(15):
        code += (relative > MIDPOINTS[i]).to(tl.int32)
    return code


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_kernel(
    weight,  # [count]
    packed,  # uint8 [ceil(count / 2)]
    absmax,  # float32 [ceil(count / BLOCK)]
    refused,  # int64 [1], becomes the least of its value and the position of the first element that is not finite
    count,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    element, block = tl.arange(0, TILE), tl.arange(0, TILE // BLOCK)
    left = count - tile * TILE
    value = tl.load(weight + tile * TILE + element, mask=element < left, other=0.0).to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for NaN too
    first = tl.min(tl.where(finite, TILE, element), 0)
    tl.atomic_min(refused + tl.arange(0, 1), tile * TILE + first, mask=first + tl.zeros([1], tl.int32) < TILE)

    value = tl.reshape(value, [TILE // BLOCK, BLOCK])
    largest = tl.max(tl.abs(value), 1)
    guarded = tl.maximum(largest, SMALLEST)
    inverse = tl.div_rn(tl.full([TILE // BLOCK], 1.0, tl.float32), guarded)
    relative = value * inverse[:, None]
    if left < TILE:
        # bitsandbytes divides in the last, shorter block, and its scale is never below the guard.
        whole = (block + 1) * BLOCK <= left
        quotient = tl.div_rn(value, tl.broadcast_to(guarded[:, None], [TILE // BLOCK, BLOCK]))
        relative = tl.where(whole[:, None], relative, quotient)
        largest = tl.where(whole, largest, guarded)
    tl.store(absmax + tile * (TILE // BLOCK) + block, largest, mask=block * BLOCK < left)
    high, low = tl.split(tl.reshape(_code(relative), [TILE // 2, 2]))
    byte = tl.arange(0, TILE // 2)
    tl.store(packed + tile * (TILE // 2) + byte, ((high << 4) | low).to(tl.uint8), mask=2 * byte < left)


@triton.jit
def _dequantize_kernel(
    packed,  # uint8 [ceil(count / 2)]
    absmax,  # float32 [ceil(count / 2^shift)]
    out,  # [count]
    count,
    shift,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE
    i, element, group = tl.arange(0, TILE // 2), tl.arange(0, TILE), tl.arange(0, TILE // GROUP) * GROUP
    byte = tl.load(packed + first // 2 + i, mask=2 * i < count - first, other=0)
    scale = tl.load(absmax + ((first + group) >> shift), mask=group < count - first, other=0.0)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [TILE // GROUP, GROUP]), [TILE])
    level = tl.gather(level_table(), tl.reshape(_both_codes(byte[None, :], 1, TILE), [TILE]), 0)
    value = rounded(level * scale, out.dtype.element_ty)
    tl.store(out + first + element, value, mask=element < count - first)


# Ops ------------------------------------------------------------------------------------------------------------------


@implement("nf4_quantize", "triton")
def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_weight(weight, block_size)
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-count // block_size), dtype=torch.float32)
    if count == 0:
        return packed, absmax
    refused = weight.new_full((1,), count, dtype=torch.int64)
    with on(weight):
        _quantize_kernel[(triton.cdiv(count, QUANTIZED),)](
            weight.contiguous(), packed, absmax, refused, count, BLOCK=block_size, TILE=QUANTIZED, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    first = int(refused)
    if first < count:
        in_pytorch.refuse(weight, first)
    return packed, absmax


@implement("nf4_dequantize", "triton")
def nf4_dequantize(packed: Tensor, absmax: Tensor, shape: list[int], block_size: int, dtype: torch.dtype) -> Tensor:
    check_dequantize(packed, absmax, shape, block_size, dtype)
    n, k = shape
    if not has_kernel_for(n, k):
        return in_pytorch.dequantize(packed, absmax, shape, block_size, dtype)
    out = packed.new_empty((n, k), dtype=dtype)
    with on(packed):
        _dequantize_kernel[(triton.cdiv(n * k, DECODED),)](
            packed, absmax, out, n * k, block_size.bit_length() - 1, TILE=DECODED, GROUP=CHUNK, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
