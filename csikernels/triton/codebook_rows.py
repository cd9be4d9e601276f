"""Rows of the codebook's Triton kernels: powers of two that keep squares in range, and where a packed codebook lies.

A packed buffer of E books of K words of D complex numbers, read back from here and written by ``codebook_pack``:

- float64 [E K]  factors that bring each word to unit norm
- bfloat16 [E, P, 2, D']  unit words, real parts and then imaginary parts; D' is D padded to a power of two, P is K
  padded to a multiple of 128, and what is padded is 0
- float32 [E, P / G]  the largest residual |w - bf16(w)| of each group of G words, rounded up

Position p of a book holds word p * step mod K. Neighbouring words of a structured book (a DFT grid) have neighbouring
similarities; a step near the golden section of K keeps them out of each other's groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import triton
import triton.language as tl

from csikernels.triton import interpreted

MOST_DIMENSION = 256  # the filter holds whole words and queries in shared memory
MOST_WORDS = 1 << 22  # what the filter keeps of 64 queries then fits into its bound of memory
UNIT = 128  # positions: a multiple of every tile and group
# Complex numbers at a time. In float64 a thread of four or eight warps has registers for 8 or 4 of them and what
# becomes of them; the interpreter takes its time for each program, whatever its size.
AT_ONCE = 1 << 16 if interpreted() else 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes and byte offsets of a packed codebook."""

    books: int
    words: int
    dimension: int

    @property
    def padded(self) -> int:
        """D'"""
        return max(16, triton.next_power_of_2(self.dimension))

    @property
    def positions(self) -> int:
        """P"""
        return -(-self.words // UNIT) * UNIT

    @property
    def group(self) -> int:
        """G. Of a group with two words near the best all are scored; in larger books these are as rare in larger ones,
        and what is kept for each query and group takes less memory."""
        return 32 if self.words < 1 << 18 else 64

    @property
    def groups(self) -> int:
        """Per book."""
        return self.positions // self.group

    @property
    def step(self) -> int:
        return _spreading_step(self.words)

    @property
    def factor_bytes(self) -> int:
        return -(-8 * self.books * self.words // 16) * 16

    @property
    def word_bytes(self) -> int:
        return 4 * self.books * self.positions * self.padded

    @property
    def bytes(self) -> int:
        return self.factor_bytes + self.word_bytes + 4 * self.books * self.groups


@functools.cache
def _spreading_step(words: int) -> int:
    """As ``csrc/codebook_order.h``, which the compiled backends use."""
    step = int(0.6180339887498949 * words) | 1
    while step > 1 and math.gcd(step, words) != 1:
        step -= 2
    return 1 if step % words == 0 else step


@triton.jit
def load_pairs(rows, row, is_row, dimension, D: tl.constexpr):
    """Real and imaginary parts, float64 [R, D] each, of rows [.., dimension] of (Re, Im); 0 beyond."""
    c = tl.arange(0, D)
    at = rows + row[:, None] * (2 * dimension) + 2 * c[None, :]
    inside = is_row[:, None] & (c < dimension)[None, :]
    re, im = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    return re.to(tl.float64), im.to(tl.float64)


@triton.jit
def magnitude(x):
    """Bits of |x|, float64. As integers they are in the order of the numbers, NaN above infinity."""
    return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def power_of_two(n):
    """2^n in float64, for n within the exponents of normal numbers."""
    return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scale_of(largest):
    """From ``magnitude`` of the largest component of each row: whether the row is finite and not zero, the exponent
    that takes this component into [0.5, 1) and two powers of two whose product does that: 2^1074, which lifts a
    denormal, is beyond float64. All of what is not usable is 1 or 0."""
    usable = (largest > 0) & (largest < 0x7FF0000000000000)
    largest = tl.where(usable, largest, 0x3FE0000000000000)  # 0.5
    denormal = largest < 0x0010000000000000
    lifted = tl.where(denormal, largest, 0).to(tl.float64, bitcast=True) * 1.6069380442589903e60  # 2^200
    exponent = tl.where(denormal, (lifted.to(tl.int64, bitcast=True) >> 52) - 200, largest >> 52) - 1022
    half = exponent // 2
    return usable, exponent, power_of_two(-half), power_of_two(half - exponent)


@triton.jit
def load_queries(h, row, is_query, dimension, D: tl.constexpr):
    """Real and imaginary parts, float64 [R, D] each, of rows scaled by powers of two, 0 for one without a direction;
    and which have one."""
    re, im = load_pairs(h, row, is_query, dimension, D)
    usable, _, up, further = scale_of(tl.max(tl.maximum(magnitude(re), magnitude(im)), 1))
    re = tl.where(usable[:, None], re * up[:, None] * further[:, None], 0.0)
    im = tl.where(usable[:, None], im * up[:, None] * further[:, None], 0.0)
    return re, im, usable
