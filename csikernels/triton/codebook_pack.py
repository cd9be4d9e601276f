"""Packing of codebooks in Triton: factors to unit norm, and the unit words in bfloat16.

Layout: see ``codebook_rows``. One program packs a group of 32 or 64 words, 2048 complex numbers at a time, in float64
  throughout: what bfloat16 leaves out of a word is known exactly, up to the rounding of the bound.
Bytes for K words of D complex64: 8 D in, 8 D + 8 + 4 D out. K = 65536, D = 128: 168 MB, 50 us on an H100 (3.35 TB/s).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csikernels.triton.codebook_rows import Layout, load_pairs, magnitude, power_of_two, scale_of
from csikernels.triton.lasco_block import operand


@triton.jit
def pack_kernel(
    codebook,  # [E, K, dimension] of (Re, Im)
    words,  # the copy, scaled by powers of two where it is float64
    factors,  # float64 [E, K], 0 for a word without a direction
    packed,  # bfloat16 [E, P, 2, D]
    residuals,  # float32 [E, P / G]
    count,  # K
    step,
    groups,  # P / G
    dimension,
    D: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,  # words at a time
    IS_DOUBLE: tl.constexpr,
):
    book = tl.program_id(0).to(tl.int64) // groups
    first = tl.program_id(0).to(tl.int64) % groups * G
    c = tl.arange(0, D)
    residual = tl.zeros([W], tl.float64)
    for part in range(0, G, W):
        position = first + part + tl.arange(0, W)
        is_word = position < count
        word = book * count + position * step % count
        re, im = load_pairs(codebook, word, is_word, dimension, D)
        usable, exponent, up, further = scale_of(tl.max(tl.maximum(magnitude(re), magnitude(im)), 1))
        usable = usable & is_word
        to = words + word[:, None] * (2 * dimension) + 2 * c[None, :]
        inside = is_word[:, None] & (c < dimension)[None, :]
        scaled_re = re * up[:, None] * further[:, None]
        scaled_im = im * up[:, None] * further[:, None]
        tl.store(to, scaled_re if IS_DOUBLE else re.to(tl.float32), mask=inside)
        tl.store(to + 1, scaled_im if IS_DOUBLE else im.to(tl.float32), mask=inside)
        re, im = scaled_re, scaled_im
        norm = tl.sqrt(tl.sum(re * re + im * im, 1))
        inverse = tl.where(usable, 1.0 / tl.where(usable, norm, 1.0), 0.0)
        # The copy of float32 words is not scaled, so that its factor also takes the power of two.
        factor = inverse if IS_DOUBLE else inverse * power_of_two(-exponent)
        tl.store(factors + word, factor, mask=is_word)
        re, im = _unit(re, inverse, usable), _unit(im, inverse, usable)
        low_re, low_im = operand(re.to(tl.float32), True), operand(im.to(tl.float32), True)
        at = packed + (book * (groups * G) + position)[:, None] * (2 * D) + c[None, :]
        tl.store(at, low_re)
        tl.store(at + D, low_im)
        re -= low_re.to(tl.float32).to(tl.float64)
        im -= low_im.to(tl.float32).to(tl.float64)
        residual = tl.maximum(residual, tl.sum(re * re + im * im, 1))
    largest = tl.sqrt(tl.max(residual, 0)) * 1.000001  # above what the sums and float32 round off
    tl.store(residuals + tl.program_id(0), largest.to(tl.float32))


@triton.jit
def _unit(x, inverse, usable):
    return tl.where(usable[:, None], x * inverse[:, None], 0.0)  # a word without a direction may hold NaN


def pack(codebook: Tensor, words: Tensor, parts: tuple[Tensor, Tensor, Tensor], layout: Layout) -> None:
    """From codebook, real [E, K, D, 2]: its copy and ``parts``, the factors, words and residuals of a packed buffer."""
    factors, packed, residuals = parts
    pack_kernel[(layout.books * layout.groups,)](
        codebook, words, factors, packed, residuals, layout.words, layout.step, layout.groups, layout.dimension,
        D=layout.padded, G=layout.group, W=layout.at_once, IS_DOUBLE=words.element_size() == 8, num_warps=4,
    )  # fmt: skip
