"""Packing of codebooks in Triton: factors to unit norm, and the unit words in bfloat16.

Layout: see ``codebook_rows``. One program packs 1024 complex numbers in float64 throughout: what bfloat16 leaves out
  of a word is known exactly, up to the rounding of the bound.
Bytes for K words of D complex64: 8 D in, 8 D + 12 + 4 D out. K = 65536, D = 128: 168 MB, 50 us on an H100 (3.35 TB/s).
  Without the copy of the words 8 D less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels.triton.codebook_rows import AT_ONCE, Layout, load_pairs, magnitude, power_of_two, scale_of
from csikernels.triton.lasco_block import operand


@triton.jit
def pack_kernel(
    codebook,  # [E, K, dimension] of (Re, Im)
    words,  # the copy, scaled by powers of two where it is float64; not written without COPY
    factors,  # float64 [E, K], 0 for a word without a direction
    packed,  # bfloat16 [E, P, 2, D]
    residuals,  # float32 [E, P]
    count,  # K
    step,
    positions,  # P
    dimension,
    D: tl.constexpr,
    W: tl.constexpr,  # words of a program
    IS_DOUBLE: tl.constexpr,
    COPY: tl.constexpr,
):
    parts = tl.cdiv(positions, W)
    book = tl.program_id(0).to(tl.int64) // parts
    position = tl.program_id(0).to(tl.int64) % parts * W + tl.arange(0, W)
    is_word = position < count
    word = book * count + position * step % count
    re, im = load_pairs(codebook, word, is_word, dimension, D)
    usable, exponent, up, further = scale_of(tl.max(tl.maximum(magnitude(re), magnitude(im)), 1))
    usable = usable & is_word
    c = tl.arange(0, D)
    scaled_re, scaled_im = re * up[:, None] * further[:, None], im * up[:, None] * further[:, None]
    if COPY:
        to = words + word[:, None] * (2 * dimension) + 2 * c[None, :]
        inside = is_word[:, None] & (c < dimension)[None, :]
        tl.store(to, scaled_re if IS_DOUBLE else re.to(tl.float32), mask=inside)
        tl.store(to + 1, scaled_im if IS_DOUBLE else im.to(tl.float32), mask=inside)
    norm = tl.sqrt(tl.sum(scaled_re * scaled_re + scaled_im * scaled_im, 1))
    inverse = 1.0 / tl.where(usable, norm, 1.0)
    # The copy of float32 words is not scaled, so that its factor also takes the power of two.
    factor = inverse if IS_DOUBLE else inverse * power_of_two(-exponent)
    tl.store(factors + word, tl.where(usable, factor, 0.0), mask=is_word)
    # A word without a direction may hold NaN.
    re = tl.where(usable[:, None], scaled_re * inverse[:, None], 0.0)
    im = tl.where(usable[:, None], scaled_im * inverse[:, None], 0.0)
    low_re, low_im = operand(re.to(tl.float32), True), operand(im.to(tl.float32), True)
    at = packed + (book * positions + position)[:, None] * (2 * D) + c[None, :]
    is_position = position < positions
    tl.store(at, low_re, mask=is_position[:, None])
    tl.store(at + D, low_im, mask=is_position[:, None])
    re -= low_re.to(tl.float32).to(tl.float64)
    im -= low_im.to(tl.float32).to(tl.float64)
    residual = tl.sqrt(tl.sum(re * re + im * im, 1)) * 1.000001  # above what the sums and float32 round off
    tl.store(residuals + book * positions + position, residual.to(tl.float32), mask=is_position)


def pack(codebook: Tensor, words: Tensor, parts: tuple[Tensor, Tensor, Tensor], layout: Layout) -> None:
    """From codebook, real [E, K, D, 2]: ``parts``, the factors, words and residuals of a packed buffer; and its copy,
    unless ``words`` is empty."""
    factors, packed, residuals = parts
    each = torch.empty(residuals.numel(), layout.group, dtype=torch.float32, device=words.device)
    at_once = AT_ONCE // layout.padded
    pack_kernel[(layout.books * triton.cdiv(layout.positions, at_once),)](
        codebook, words, factors, packed, each, layout.words, layout.step, layout.positions, layout.dimension,
        D=layout.padded, W=at_once, IS_DOUBLE=words.element_size() == 8, COPY=words.numel() > 0, num_warps=4,
    )  # fmt: skip
    torch.amax(each, dim=1, out=residuals)
