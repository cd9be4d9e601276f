"""Second half of the codebook search: the words that may be the best of a query, scored.

Formula: |w^H q| of the words as given, times their factors to unit norm. "exact" computes in float64: of the words
  whose scores agree to within rounding the lowest index is the result, whatever else was scored. "float32" computes in
  float32, and equal scores go to the lowest index.
Layout: a program reads the keys of its queries twice, for the best lower bounds and for what reaches them, and then
  uses their place for the lists of the latter.
Bytes: 8 N K / G of keys twice; for each word scored 8 D (complex64) or 16 D (complex128). Of K = 65536 random words of
  D = 128 a query scores 2 to 4: N = 1024: 34 MB of keys and 4 MB of words, 11 us of an H100. In the worst case, all
  words equal, every word is scored twice: 137 GB, 25 ms from L2, and 172 GFLOP in float64.
Tiling: of D = 128 four queries by two words at a time, since most queries have few to score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels.triton.codebook_rows import AT_ONCE, Layout, load_queries, power_of_two

KEYS = 1024  # at a time
WARPS = 8
NOBODY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _similarity(keys, at, inside, G: tl.constexpr):
    squared = (tl.load(keys + at, mask=inside, other=0) & -G).to(tl.float32, bitcast=True)
    return tl.sqrt(squared)


@triton.jit
def _list(
    keys, second_keys, residuals, start, book, usable, norm, rest, groups, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Replaces ``keys`` of each query by the positions of single words to score and ``second_keys`` by the groups to
    score whole; how many of each, [R]."""
    least = tl.full(norm.shape, -1.0, tl.float32)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        inside = usable[:, None] & (group < groups)[None, :]
        at = start[:, None] + group[None, :]
        residual = tl.load(residuals + (book * groups)[:, None] + group[None, :], mask=inside, other=0.0)
        low = _similarity(keys, at, inside, G) - (residual * norm[:, None] + rest[:, None])
        least = tl.maximum(least, tl.max(tl.where(inside, low, -1.0), 1))
    singles = tl.zeros(norm.shape, tl.int32)
    wholes = tl.zeros(norm.shape, tl.int32)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        inside = usable[:, None] & (group < groups)[None, :]
        at = start[:, None] + group[None, :]
        residual = tl.load(residuals + (book * groups)[:, None] + group[None, :], mask=inside, other=0.0)
        error = residual * norm[:, None] + rest[:, None]
        whole = inside & (_similarity(second_keys, at, inside, G) + error >= least[:, None])
        single = inside & (_similarity(keys, at, inside, G) + error >= least[:, None]) & (whole == 0)
        position = (group * G)[None, :] + (tl.load(keys + at, mask=inside, other=0) & (G - 1))
        to = (start + singles)[:, None] + tl.cumsum(single.to(tl.int32), 1) - 1
        whole_to = (start + wholes)[:, None] + tl.cumsum(whole.to(tl.int32), 1) - 1
        tl.debug_barrier()  # all have read what is overwritten now: no list is longer than what has been read
        tl.store(keys + to, position, mask=single)
        tl.store(second_keys + whole_to, tl.broadcast_to(group[None, :], whole.shape), mask=whole)
        singles += tl.sum(single.to(tl.int32), 1)
        wholes += tl.sum(whole.to(tl.int32), 1)
    tl.debug_barrier()
    return singles, wholes


@triton.jit
def _scores(words, factors, word, active, re, im, dimension, D: tl.constexpr, EXACT: tl.constexpr):
    """Each score [R, W] and the rounding it may carry, float64; ``word`` counts through all books."""
    c = tl.arange(0, D)[None, None, :]
    inside = active[:, :, None] & (c < dimension)
    at = words + word[:, :, None] * (2 * dimension) + 2 * c
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    factor = tl.load(factors + word, mask=active, other=1.0)
    re, im = re[:, None, :], im[:, None, :]
    if EXACT:
        x, y = x.to(tl.float64), y.to(tl.float64)
        value = _hypotenuse(tl.sum(x * re + y * im, 2) * factor, tl.sum(x * im - y * re, 2) * factor)
        magnitudes = tl.sum((tl.abs(x) + tl.abs(y)) * (tl.abs(re) + tl.abs(im)), 2) * factor
        # 2^-49: a few ulp of the sum of magnitudes, which pairwise summation leaves.
        return value, magnitudes * 1.7763568394002505e-15
    else:
        # The factor is 2^n m with n = half + (n - half), so that no product leaves the range of float32.
        half = ((factor.to(tl.int64, bitcast=True) >> 52) - 1023) // 2
        power = power_of_two(half).to(x.dtype)[:, :, None]
        x, y = (x * power).to(tl.float32), (y * power).to(tl.float32)
        re, im = re.to(tl.float32), im.to(tl.float32)
        rest = (factor * power_of_two(-half)).to(tl.float32)
        in_phase, quadrature = tl.sum(x * re + y * im, 2) * rest, tl.sum(x * im - y * re, 2) * rest
        value = tl.sqrt(in_phase * in_phase + quadrature * quadrature).to(tl.float64)
        return value, tl.zeros_like(value)


@triton.jit
def _hypotenuse(x, y):
    """Of legs whose squares may under- or overflow."""
    long, short = tl.maximum(tl.abs(x), tl.abs(y)), tl.minimum(tl.abs(x), tl.abs(y))
    ratio = short / tl.where(long > 0, long, 1.0)
    return long * tl.sqrt(1.0 + ratio * ratio)


@triton.jit
def _choose(
    singles, wholes, keys, second_keys, highs, start, book, words, factors, re, im, count, step, dimension,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The lowest of the words whose scores reach the best, [R]."""
    base = (book * count)[:, None]
    best = tl.full(start.shape, -1.0, tl.float64)
    for first in range(0, tl.max(singles, 0), W):
        slot = first + tl.arange(0, W)
        listed = slot[None, :] < singles[:, None]
        at = start[:, None] + slot[None, :]
        position = tl.load(keys + at, mask=listed, other=0).to(tl.int64)
        active = listed & (position < count)  # a group that begins or ends beyond the book holds zeros there
        word = base + position * step % count
        value, slack = _scores(words, factors, word, active, re, im, dimension, D, EXACT)
        best = tl.maximum(best, tl.max(tl.where(active, value - slack, -1.0), 1))
        tl.store(highs + at, tl.where(active, value + slack, -1.0), mask=listed)
    for whole in range(0, tl.max(wholes, 0)):
        listed = whole < wholes
        group = tl.load(second_keys + start + whole, mask=listed, other=0).to(tl.int64) * G
        for first in range(0, G, W):
            position = group[:, None] + (first + tl.arange(0, W))[None, :]
            active = listed[:, None] & (position < count)
            word = base + position * step % count
            value, slack = _scores(words, factors, word, active, re, im, dimension, D, EXACT)
            best = tl.maximum(best, tl.max(tl.where(active, value - slack, -1.0), 1))
    tl.debug_barrier()
    chosen = tl.full(start.shape, NOBODY, tl.int64)
    for first in range(0, tl.max(singles, 0), W):
        slot = first + tl.arange(0, W)
        listed = slot[None, :] < singles[:, None]
        at = start[:, None] + slot[None, :]
        position = tl.load(keys + at, mask=listed, other=0).to(tl.int64)
        reaches = listed & (tl.load(highs + at, mask=listed, other=-1.0) >= best[:, None])
        chosen = tl.minimum(chosen, tl.min(tl.where(reaches, position * step % count, NOBODY), 1))
    for whole in range(0, tl.max(wholes, 0)):
        listed = whole < wholes
        group = tl.load(second_keys + start + whole, mask=listed, other=0).to(tl.int64) * G
        for first in range(0, G, W):
            position = group[:, None] + (first + tl.arange(0, W))[None, :]
            active = listed[:, None] & (position < count)
            word = position * step % count
            value, slack = _scores(words, factors, base + word, active, re, im, dimension, D, EXACT)
            reaches = active & (value + slack >= best[:, None])
            chosen = tl.minimum(chosen, tl.min(tl.where(reaches, word, NOBODY), 1))
    return chosen


@triton.jit
def rescore_kernel(
    h,  # [N, dimension] of (Re, Im)
    order,  # int64 [N], the rows of h by environment where ORDERED
    environment,  # int64 [rows], theirs, where ORDERED
    words,  # [E, K, dimension] of (Re, Im)
    factors,  # float64 [E, K]
    residuals,  # float32 [E, groups]
    errors,  # float32 [2, rows]
    keys,  # int32 [2, rows, groups]; overwritten
    highs,  # float64 [rows, groups], for the scores of single words
    index,  # int64 [N]
    similarity,  # float32 [N]
    first,
    rows,
    count,  # K
    step,
    groups,
    dimension,
    D: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,  # queries of a program
    W: tl.constexpr,  # words of each at a time
    BLOCK: tl.constexpr,  # groups of each at a time
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_query = place < rows
    row = tl.load(order + first + place, mask=is_query, other=0) if ORDERED else first + place
    book = tl.load(environment + place, mask=is_query, other=0) if ORDERED else tl.zeros([R], tl.int64)
    re, im, usable = load_queries(h, row, is_query, dimension, D)
    second_keys = keys + rows * groups  # at most LISTED
    start = place * groups
    norm = tl.load(errors + place, mask=is_query, other=0.0)
    rest = tl.load(errors + rows + place, mask=is_query, other=0.0)
    singles, wholes = _list(keys, second_keys, residuals, start, book, usable, norm, rest, groups, G, BLOCK)
    chosen = _choose(
        singles, wholes, keys, second_keys, highs, start, book, words, factors, re, im, count, step, dimension,
        D, G, W, EXACT,
    )  # fmt: skip
    word = (book * count + tl.where(usable, chosen, 0))[:, None]
    value, _ = _scores(words, factors, word, usable[:, None], re, im, dimension, D, True)
    norm = tl.sqrt(tl.sum(re * re + im * im, 1))  # in float64
    score = tl.sum(value, 1) / tl.where(usable, norm, 1.0)
    tl.store(index + row, tl.where(usable, chosen, -1), mask=is_query)
    tl.store(similarity + row, tl.where(usable, score, float("nan")).to(tl.float32), mask=is_query)


def rescore(
    h: Tensor, order: Tensor | None, environment: Tensor | None, words: Tensor, parts: tuple[Tensor, Tensor],
    errors: Tensor, keys: Tensor, result: tuple[Tensor, Tensor], first: int, layout: Layout, exact: bool,
) -> None:  # fmt: skip
    """Index and similarity (``result``, [N] each) of the queries of keys [2, rows, P / G], which start at ``first`` of
    the order of h, real [N, D, 2]. ``parts``: factors and residuals of a packed buffer."""
    _, rows, groups = keys.shape
    highs = torch.empty(rows, groups, dtype=torch.float64, device=h.device)
    constants = sizes(rows, layout, exact)
    rescore_kernel[(triton.cdiv(rows, constants["R"]),)](
        h, h if order is None else order, h if environment is None else environment, words, *parts, errors, keys, highs,
        *result, first, rows, layout.words, layout.step, groups, layout.dimension,
        **constants, ORDERED=order is not None, num_warps=WARPS,
    )  # fmt: skip


def sizes(rows: int, layout: Layout, exact: bool) -> dict[str, int]:
    """What the kernel is compiled for."""
    pairs = AT_ONCE * (1 if exact else 2) // layout.padded
    together = min(triton.next_power_of_2(rows), max(4, pairs // 8), pairs)
    block = min(KEYS // together, triton.next_power_of_2(layout.groups))
    at_once = min(layout.group, pairs // together)
    return {"D": layout.padded, "G": layout.group, "R": together, "W": at_once, "BLOCK": block, "EXACT": exact}
