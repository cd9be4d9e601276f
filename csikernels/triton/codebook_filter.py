"""First half of the codebook search: which words may be the best of a query, found with bfloat16 on the tensor cores.

Formula: with w = v + r and q = p + s (v, p in bfloat16, w of unit norm), | |w^H q| - |v^H p| | <= |r| |p| + |s| by
  Cauchy-Schwarz, to which the rounding of the sums is added. A query is scaled by a power of two. Of each group of
  G = 32 or 64 words two keys are kept: the largest |v^H p|^2 and the second largest, with the word's place in the
  group in their lowest bits. The rescoring takes from them the best lower bound of all groups; the first word of a
  group is scored where its upper bound reaches it, and the whole group where that of the second does. So what is kept
  is bounded, needs neither a running maximum nor atomics, and does not depend on the order of the programs. The N x K
  products are never written.
Layout: re = q_re w_re + q_im w_im and im = q_im w_re - q_re w_im as four products of [Q, D'] by [D', T], D' the power
  of two from D on. The sums of re and im are held alike, so that |.|^2 needs no exchange between threads. The queries
  (with -q_re: 6 D' bytes each) stay in shared memory and the words stream through it, as keys do in an attention.
Bytes: 4 D' K of words for each tile of queries, from L2 beyond the first; 6 D' N of queries for each split; 8 N K / G
  of keys, written once and read twice.
FLOPs: 8 D' N K. On an H100 (3.35 TB/s, 990 bf16 TFLOP/s), D = 128: N = 1024, K = 65536: 68.7 GFLOP, 69 us; 34 MB of
  words and 17 MB of keys, 15 us. N = 16, K = 65536: 34 MB, 10 us. N = 1, K = 4096: bound by the latency of three
  launches.
Tiling: 128 queries by 128 words of 8 warps where there are as many: each warp group of an H100 multiplies 64 x 128 x 16
  at a time from shared memory (HGMMA), 6 KB in 48 cycles beside 64 of the tensor cores, where the warps' own products
  (HMMA) of the CUDA kernel take twice the tensor cores' time. 16 queries suffice where few are given: words are
  what takes time then. How many warps and stages is tuned where the kernel first runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels.triton.codebook_rows import AT_ONCE, UNIT, Layout, load_queries
from csikernels.triton.lasco_block import operand, product
from csikernels.triton.launch import tuned

# Errors relative to the norm of the query. A tensor core cuts each of at most 17 addends of a sum off at 2^-23 of the
# largest, itself at most 1: 1.1 * 2^-23 a term and component, less than half of this.
SUM_ERROR = tl.constexpr(2.0**-21)  # times 2 D'
# The place in a key (2^-18), all other roundings of the filter (below 2^-18 together), and twice the error of a score
# in float32 (2^-17 each): a word that is not scored has a lower score in float32, too, so that results do not depend on
# tiles.
SLACK = tl.constexpr(2.0**-15)
STEP = tl.constexpr(UNIT)


@triton.jit
def queries_kernel(
    h,  # [N, dimension] of (Re, Im)
    order,  # int64 [N], the rows of h by environment where ORDERED
    planes,  # bfloat16 [rows, 3, D]: Re, Im, -Re of the scaled queries, 0 for one without a direction
    errors,  # float32 [2, rows]: the norm of these, and what has to be added to residual * norm
    first,
    rows,
    dimension,
    D: tl.constexpr,
    R: tl.constexpr,
    ORDERED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_query = place < rows
    row = tl.load(order + first + place, mask=is_query, other=0) if ORDERED else first + place
    re, im, _ = load_queries(h, row, is_query, dimension, D)
    low_re, low_im = operand(re.to(tl.float32), True), operand(im.to(tl.float32), True)
    at = planes + place[:, None] * (3 * D) + tl.arange(0, D)[None, :]
    tl.store(at, low_re, mask=is_query[:, None])
    tl.store(at + D, low_im, mask=is_query[:, None])
    tl.store(at + 2 * D, operand(-re.to(tl.float32), True), mask=is_query[:, None])
    kept_re, kept_im = low_re.to(tl.float32).to(tl.float64), low_im.to(tl.float32).to(tl.float64)
    norm = tl.sqrt(tl.sum(kept_re * kept_re + kept_im * kept_im, 1))
    re -= kept_re
    im -= kept_im
    rest = tl.sqrt(tl.sum(re * re + im * im, 1)) + norm * (2 * D * SUM_ERROR + SLACK)
    # Above what float32 rounds off.
    tl.store(errors + place, (norm * 1.000001).to(tl.float32), mask=is_query)
    tl.store(errors + rows + place, (rest * 1.000001).to(tl.float32), mask=is_query)


@triton.jit
def _scan(
    re_q, im_q, minus_re, words, keys, between, mine, tiles, D: tl.constexpr, G: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """``tiles`` tiles of a book from ``words`` on, for the queries that are ``mine``."""
    column = tl.arange(0, T)
    at = column[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    group = tl.arange(0, T // G)
    for _ in range(tiles):
        re_w, im_w = tl.trans(tl.load(words + at)), tl.trans(tl.load(words + D + at))
        re = product(im_q, im_w, product(re_q, re_w))
        im = product(minus_re, im_w, product(im_q, re_w))
        squared = re * re + im * im  # no sign: as integers these are in the order of the numbers
        key = (squared.to(tl.int32, bitcast=True) & -G) | (column % G)[None, :]
        key = tl.reshape(key, [re_q.shape[0], T // G, G])
        best = tl.max(key, 2)
        second = tl.max(tl.where(key == best[:, :, None], 0, key), 2)
        tl.store(keys[:, None] + group[None, :], best, mask=mine[:, None])
        tl.store(keys[:, None] + between + group[None, :], second, mask=mine[:, None])
        words += T * 2 * D
        keys += T // G


@triton.jit
def filter_kernel(
    planes,  # bfloat16 [rows, 3, D]
    packed,  # bfloat16 [E, P, 2, D]
    environment,  # int64 [rows], ascending, where ORDERED
    keys,  # int32 [2, rows, groups]
    rows,
    positions,  # P
    D: tl.constexpr,
    G: tl.constexpr,
    ORDERED: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    place = tl.program_id(0) * Q + tl.arange(0, Q)
    is_query = place < rows
    at = planes + place[:, None] * (3 * D) + tl.arange(0, D)[None, :]
    re = tl.load(at, mask=is_query[:, None], other=0.0)
    im = tl.load(at + D, mask=is_query[:, None], other=0.0)
    minus_re = tl.load(at + 2 * D, mask=is_query[:, None], other=0.0)
    split = tl.cdiv(positions // STEP, tl.num_programs(1)) * STEP
    first = tl.program_id(1) * split
    tiles = tl.minimum(split, positions - first) // T  # may be below 0: then there is nothing left
    to = keys + place.to(tl.int64) * (positions // G) + first // G
    between = rows * (positions // G)  # from the best keys to the second: at most LISTED
    if ORDERED:
        # One run for each book that queries of this program use; in the order of environments these are few.
        nobody = 0x7FFFFFFFFFFFFFFF
        own = tl.load(environment + place, mask=is_query, other=nobody)
        book = tl.min(own, 0)
        while book < nobody:
            words = packed + (book * positions + first) * (2 * D)
            _scan(re, im, minus_re, words, to, between, own == book, tiles, D, G, T)
            book = tl.min(tl.where(own > book, own, nobody), 0)
    else:
        words = packed + first.to(tl.int64) * (2 * D)
        _scan(re, im, minus_re, words, to, between, is_query, tiles, D, G, T)


def _config(queries: int, words: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"Q": queries, "T": words}, num_warps=warps, num_stages=stages)


FEW = [_config(16, 64, 4, 2), _config(16, 64, 4, 1), _config(16, 64, 4, 3), _config(16, 128, 4, 2)]
# On sm_100 the others spill, of D' = 256.
FEW_WIDE = {10: [_config(16, 128, 4, 2), _config(16, 64, 4, 1)]}
# By major compute capability, then for D' of at most 128 and for 256; what spills there is not among them. Before and
# after sm_90 and sm_100 queries are held in registers, which limits how many. What does not fit into the shared memory
# of a GPU is left out when its kernel is tuned.
MANY = {
    9: (
        [_config(128, 128, 8, 2), _config(128, 64, 8, 3), _config(64, 128, 4, 2), _config(64, 64, 4, 3)],
        [_config(64, 64, 4, 2), _config(64, 64, 4, 1)],
    ),
    10: (
        [_config(128, 64, 8, 3), _config(128, 64, 8, 2), _config(64, 64, 4, 3), _config(64, 64, 4, 1)],
        [_config(32, 64, 4, 2), _config(32, 64, 4, 1)],
    ),
}
MANY_BY_WARPS = (
    [_config(64, 64, 4, 3), _config(32, 64, 4, 2), _config(32, 64, 4, 1)],
    [_config(32, 64, 4, 1), _config(16, 64, 4, 2), _config(16, 64, 4, 1)],
)


def configs(major: int, padded: int, few: bool) -> list[triton.Config]:
    """What the filter is tuned over."""
    wide = padded > 128
    if few:
        return FEW_WIDE.get(major, FEW) if wide else FEW
    return MANY.get(major, MANY_BY_WARPS)[wide]


@functools.cache
def _filter_for(major: int, wide: bool, few: bool) -> Any:
    return tuned(configs(major, 256 if wide else 128, few), key=["D", "G", "ORDERED"])(filter_kernel)


def spread_queries(h: Tensor, order: Tensor | None, planes: Tensor, errors: Tensor, first: int) -> None:
    """Rows of h, real [N, D, 2], from ``first`` of their order on, into planes [rows, 3, D'] and errors [2, rows]."""
    rows, _, padded = planes.shape
    at_once = AT_ONCE // padded
    queries_kernel[(triton.cdiv(rows, at_once),)](
        h, h if order is None else order, planes, errors, first, rows, h.shape[1],
        D=padded, R=at_once, ORDERED=order is not None, num_warps=4,
    )  # fmt: skip


def list_groups(planes: Tensor, packed: Tensor, environment: Tensor | None, keys: Tensor, layout: Layout) -> None:
    """The keys [2, rows, P / G] of planes [rows, 3, D'], whose books are ``environment`` [rows] in ascending order."""
    rows, units = planes.shape[0], layout.positions // UNIT
    major, processors = _gpu(planes.device)

    def grid(meta: dict) -> tuple[int, int]:
        tiles = triton.cdiv(rows, meta["Q"])
        return tiles, _splits(tiles, units, processors * (2 if meta["Q"] <= 32 else 1))

    _filter_for(major, layout.padded > 128, rows <= 16 * layout.books)[grid](
        planes, packed, planes if environment is None else environment, keys, rows, layout.positions,
        D=layout.padded, G=layout.group, ORDERED=environment is not None,
    )  # fmt: skip


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Major compute capability and multiprocessors; the interpreter has one and takes the tiles of sm_90."""
    if device.type == "cpu":
        return 9, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


@functools.cache
def _splits(tiles: int, units: int, at_once: int) -> int:
    """Into how many parts of the book each tile of queries is divided, so that all end soonest: rounds of programs,
    times the units of a program and the staging of its queries, which takes about as long as one."""
    return min(
        range(1, min(units, at_once) + 1),
        key=lambda splits: -(-tiles * splits // at_once) * (-(-units // splits) + 1),
    )
