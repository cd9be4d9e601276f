"""The self_information family in Triton: one program per sample selects, one per tile of a sample does the rest.

Formula: I = -log2( (1 + sum_k exp(-(c - c_k)^2 / (2 b^2))) / K / (sqrt(2 pi) b) ); ranked by the neighbour sum, which
  is monotone in I.
Exactness: of a 3x3 grid with one centre, terms are added in fixed point of 2^-27, so that sums do not depend on their
  order: elements with equal differences tie, and go by position. ex2.approx errs by 2^-22 at most, eight terms by 2e-6
  of a density of at least 1: 3e-7 bits. Other neighbourhoods and float64 go through float64, as in the reference: one
  launch writes the scores, the next selects.
Layout: image [C][H][W] read once from memory, its neighbours out of the L1 cache; up to 4,096 keys in registers, eight
  a thread, so that 2,048 of them leave room for two programs of eight warps on a multiprocessor; survivors change
  places in the output's own memory.
Bytes of [B, 2, 32, 32] float32, m = 221: 8,192 read, 221 * (4 + 4 + 8) read and written: 11.7 kB a sample. Of
  self_information 16.4 kB and 2,048 * (8 * 7 + 12) FLOP; of scatter_codeword 8,192 written and 221 * 12 read. Scratch
  of 221 * 16 and 2,048 * 8 bytes stays within the caches.
Floor on an H100 (3.35 TB/s, 67 TFLOP/s) for B = 256: selection 0.9 us, information 1.3 us, scattering 0.8 us. A
  selection is bound by the latency of its barriers; several samples share a multiprocessor meanwhile.

A neighbourhood other than a grid is copied to the GPU when it is first seen there, and kept: as with the compilation of
a kernel, run once before capturing a graph. Samples of more than 16,384 elements, and bandwidths beyond 2^-1000 to
2^1000, take the reference; scatter_codeword takes any.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import self_information as in_pytorch
from csikernels.triton.launch import on
from csikernels.triton.self_information_density import UNIT, fixed_point_sum, neighbour_sum
from csikernels.triton.self_information_select import (
    MOST_ELEMENTS,
    options_of,
    ordered,
    padded,
    select_smallest,
    store_keys,
    tiles_of,
)

SPREAD = 1024  # elements of a program that does not select
_STEP = tl.constexpr(1 / UNIT)
_INFINITIES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0xFF << 23, torch.float64: 0x7FF << 52}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _grid_information_kernel(
    images,  # [B, n]
    bits,  # [B, n] float32
    n,
    height,
    width,
    row_step,
    column_step,
    coefficient,
    constant,
    TILE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * n
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = fixed_point_sum(images + sample, i, n, height, width, row_step, column_step, coefficient)
    information = constant - tl.log2(1.0 + total.to(tl.float32) * _STEP)
    tl.store(bits + sample + i, tl.where(total < 0, float("nan"), information), mask=i < n)


@triton.jit
def _information_kernel(
    images,  # [B, n]
    bits,  # [B, n] float32 or float64
    offsets,  # [neighbours, 2]
    n,
    height,
    width,
    neighbours,
    rounder: tl.float64,
    inverse: tl.float64,
    centres: tl.float64,
    constant: tl.float64,
    scale: tl.float64,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * n
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total, nearest = neighbour_sum(images + sample, i, n, height, width, offsets, neighbours, rounder, inverse)
    # Without a centre the sum may underflow where its logarithm does not.
    log_density = tl.log(centres + total * tl.exp(-nearest)) if CENTRED else tl.log(total) - nearest
    tl.store(bits + sample + i, (constant - log_density * scale).to(bits.dtype.element_ty), mask=i < n)


@triton.jit
def _grid_key(image, first, n, height, width, row_step, column_step, coefficient, S: tl.constexpr):
    i = first + tl.arange(0, S.tile)
    total = fixed_point_sum(image, i, n, height, width, row_step, column_step, coefficient)
    return tl.where(i < n, total, -1).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["m"])
def _grid_select_kernel(
    source,  # [B, n], integers of the width of the values
    keys,  # [B, n] int32 unless S.held
    survivors,  # [B, m] int64, scratch
    values,  # [B, m]
    indices,  # [B, m] int64
    n,
    m,
    images,  # [B, n]
    height,
    width,
    row_step,
    column_step,
    coefficient,
    S: tl.constexpr,
):
    sample, codeword = tl.program_id(0).to(tl.int64) * n, tl.program_id(0).to(tl.int64) * m
    image, keys = images + sample, keys + sample
    if S.held:
        key = _grid_key(image, 0, n, height, width, row_step, column_step, coefficient, S)
    else:
        key = None
        for first in range(0, n, S.tile):
            tile = _grid_key(image, first, n, height, width, row_step, column_step, coefficient, S)
            store_keys(tile, keys, first, n)
        tl.debug_barrier()
    out = (source + sample, survivors + codeword, values + codeword, indices + codeword)
    select_smallest(key, keys, *out, n, m, S)


@triton.jit(do_not_specialize=["m"])
def _top_m_kernel(
    source,  # [B, n], integers of the width of the values
    keys,  # [B, n] int32 or int64 unless S.held
    survivors,  # [B, m] int64, scratch
    values,  # [B, m]
    indices,  # [B, m] int64
    n,
    m,
    scores,  # [B, n], their bits as integers
    INFINITY: tl.constexpr,
    S: tl.constexpr,
):
    sample, codeword = tl.program_id(0).to(tl.int64) * n, tl.program_id(0).to(tl.int64) * m
    score, keys = scores + sample, keys + sample
    if S.held:
        key = _score_key(score, 0, n, INFINITY, S)
    else:
        key = None
        for first in range(0, n, S.tile):
            store_keys(_score_key(score, first, n, INFINITY, S), keys, first, n)
        tl.debug_barrier()
    out = (source + sample, survivors + codeword, values + codeword, indices + codeword)
    select_smallest(key, keys, *out, n, m, S)


@triton.jit
def _score_key(score, first, n, INFINITY: tl.constexpr, S: tl.constexpr):
    i = first + tl.arange(0, S.tile)
    return ordered(tl.load(score + i, mask=i < n, other=-1), True, S.bits, INFINITY)


@triton.jit(do_not_specialize=["m"])
def _scatter_kernel(
    values,  # [B, m], integers of their width
    indices,  # [B, m] int64
    mean,  # [B]
    owner,  # [B, n] int32, scratch
    image,  # [B, n]
    n,
    m,
    TILE: tl.constexpr,
):
    sample, codeword = tl.program_id(0).to(tl.int64) * n, tl.program_id(0).to(tl.int64) * m
    start = tl.program_id(1).to(tl.int64) * TILE
    i = start + tl.arange(0, TILE)
    tl.store(owner + sample + i, tl.full([TILE], -1, tl.int32), mask=i < n)
    tl.debug_barrier()
    for first in range(0, m, TILE):
        place = first + tl.arange(0, TILE)
        element = tl.load(indices + codeword + place, mask=place < m, other=0)
        tl.device_assert((element >= 0) & (element < n), "scatter_codeword: expected indices within shape")
        # A maximum does not depend on the order of writes: where a position occurs twice, the later value stands.
        mine = (place < m) & (element >= start) & (element < tl.minimum(start + TILE, n))
        tl.atomic_max(owner + sample + element, place, mask=mine, sem="relaxed", scope="cta")
    tl.debug_barrier()
    place = tl.load(owner + sample + i, mask=i < n, other=-1)
    value = tl.load(values + codeword + place, mask=place >= 0, other=0)
    background = tl.load(mean + tl.program_id(0))
    tl.store(image + sample + i, tl.where(place >= 0, value, background), mask=i < n)


# Launches -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Neighbourhood:
    """Offsets as the kernels take them: those further away than the image is large are outside, wherever they are."""

    centres: int
    others: tuple[tuple[int, int], ...]
    grid: tuple[int, int] | None  # steps, where the others are the eight of a 3x3 grid, each once

    @property
    def rounder(self) -> float:
        return 1.5 * 2.0 ** math.ceil(math.log2(max(1, len(self.others))))

    def constant(self, bandwidth: float) -> float:
        """The information of a density of 1."""
        return math.log2(self.centres + len(self.others)) + math.log2(math.sqrt(2 * math.pi)) + math.log2(bandwidth)


@functools.lru_cache(maxsize=64)
def _neighbourhood(offsets: tuple[int, ...], height: int, width: int) -> _Neighbourhood:
    pairs = list(zip(offsets[0::2], offsets[1::2], strict=True))
    others = tuple(
        (max(-height, min(row, height)), max(-width, min(column, width)))
        for row, column in pairs
        if (row, column) != (0, 0)
    )
    rows, columns = (max((abs(pair[axis]) for pair in others), default=0) for axis in (0, 1))
    grid = {(row, column) for row in (-rows, 0, rows) for column in (-columns, 0, columns)} - {(0, 0)}
    is_grid = len(others) == len(grid) == 8 and set(others) == grid
    return _Neighbourhood(len(pairs) - len(others), others, (rows, columns) if is_grid else None)


@functools.cache  # for good: a captured graph goes on reading it
def _table(others: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(others or ((0, 0),), dtype=torch.int32, device=device)


def _serves(n: int, bandwidth: float) -> bool:
    """Whether the kernels take the call: positions fit their keys, and the inverse bandwidth is a normal number."""
    return n <= MOST_ELEMENTS and abs(math.log2(bandwidth)) < 1000


def _fast_steps(h: Tensor, around: _Neighbourhood, bandwidth: float) -> tuple[int, int] | None:
    """The grid's steps where fixed point serves: one centre, and a bandwidth whose inverse square is a float."""
    serves = h.dtype != torch.float64 and around.centres == 1 and abs(math.log2(bandwidth)) < 60
    return around.grid if serves else None


def _coefficient(bandwidth: float) -> float:
    return -1 / (math.log(2) * 2 * bandwidth * bandwidth)


@implement("self_information", "triton")
def self_information(h: Tensor, bandwidth: float, offsets: list[int]) -> Tensor:
    n = math.prod(h.shape[1:])
    if not _serves(n, bandwidth):
        return in_pytorch.self_information(h, bandwidth, offsets)
    bits = torch.empty(h.shape, dtype=h.dtype if h.dtype == torch.float64 else torch.float32, device=h.device)
    around = _neighbourhood(tuple(offsets), *h.shape[2:])
    constant = around.constant(bandwidth)
    if steps := _fast_steps(h, around, bandwidth):
        scalars = (n, *h.shape[2:], *steps, _coefficient(bandwidth), constant)
        _over_tiles(_grid_information_kernel, bits, (h.contiguous(), bits, *scalars))
    else:
        _write_information(h, bandwidth, around, bits, around.centres, constant, 1 / math.log(2))
    return bits


@implement("select_informative", "triton")
def select_informative(
    h: Tensor, m: int, bandwidth: float, offsets: list[int], source: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if not _serves(math.prod(h.shape[1:]), bandwidth):
        return in_pytorch.select_informative(h, m, bandwidth, offsets, source)
    around = _neighbourhood(tuple(offsets), *h.shape[2:])
    values = (h if source is None else source).flatten(1)
    if steps := _fast_steps(h, around, bandwidth):
        given = (h.contiguous(), *h.shape[2:], *steps, _coefficient(bandwidth))
        return _select(_grid_select_kernel, values, m, 32, given)
    # The constant centre is left out: it would only round away differences between very informative elements.
    score = torch.empty(h.shape, dtype=torch.float64, device=h.device)
    _write_information(h, bandwidth, around, score, 0, 0.0, 1.0)
    return _select(_top_m_kernel, values, m, 64, (_bits(score), _INFINITIES[torch.float64]))


def _write_information(
    h: Tensor, bandwidth: float, around: _Neighbourhood, out: Tensor, centres: int, constant: float, scale: float
) -> None:
    """out = constant - scale * log(centres + sum over the neighbours), computed in float64."""
    scalars = (math.prod(h.shape[1:]), *h.shape[2:], len(around.others), around.rounder, 1 / bandwidth)
    arguments = (h.contiguous(), out, _table(around.others, h.device), *scalars, float(centres), constant, scale)
    _over_tiles(_information_kernel, out, arguments, CENTRED=centres > 0)


def _over_tiles(kernel: Any, out: Tensor, arguments: tuple, **constants: Any) -> None:
    """One program per tile of a sample of ``out``."""
    if out.numel():
        size = out[0].numel()
        tile = min(SPREAD, padded(size))
        with on(out):
            grid = (out.shape[0], triton.cdiv(size, tile))
            kernel[grid](*arguments, TILE=tile, num_warps=4, enable_fp_fusion=True, **constants)


@implement("top_m", "triton")
def top_m(score: Tensor, m: int, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if score.shape[1] > MOST_ELEMENTS:
        return in_pytorch.top_m(score, m, source)
    given = (_bits(score), _INFINITIES[score.dtype])
    return _select(_top_m_kernel, score if source is None else source, m, 8 * score.element_size(), given)


def _select(kernel: Any, source: Tensor, m: int, bits: int, given: tuple) -> tuple[Tensor, Tensor]:
    """source [B, n] -> values [B, m], indices [B, m]; ``given`` is what the kernel makes keys of."""
    batch, n = source.shape
    values, indices = source.new_empty((batch, m)), source.new_empty((batch, m), dtype=torch.int64)
    if batch:
        tiles = tiles_of(n, m, bits)
        keys = indices if tiles.held else indices.new_empty((batch, n), dtype=_INTEGERS[max(4, bits // 8)])
        survivors = torch.empty_like(indices) if tiles.merged else indices
        with on(source):
            kernel[(batch,)](
                _bits(source), keys, survivors, _bits(values), indices, n, m, *given, S=tiles,
                enable_fp_fusion=True, **options_of(tiles),
            )  # fmt: skip
    return values, indices


@implement("scatter_codeword", "triton")
def scatter_codeword(values: Tensor, indices: Tensor, mean: Tensor, shape: list[int]) -> Tensor:
    batch, size = values.shape[0], math.prod(shape)
    in_pytorch.check_positions(indices, shape)
    image = values.new_empty((batch, *shape))
    owner = torch.empty((batch, size), dtype=torch.int32, device=values.device)
    arguments = (_bits(values), indices.contiguous(), _bits(mean), owner, _bits(image), size, values.shape[1])
    # debug: device_assert, without the checks of overflow that it would bring along
    _over_tiles(_scatter_kernel, owner, arguments, debug=True, sanitize_overflow=False)
    return image


def _bits(tensor: Tensor) -> Tensor:
    """As integers, which move bit for bit."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])
