"""Device functions for how dense the neighbourhood of each element is: in fixed point for a 3x3 grid, or in float64.

K(c, c_k) is symmetric, and in CUDA each pair of elements is evaluated once. Here both sides evaluate it: Triton has no
atomics in shared memory, and to hand a term over by tl.gather takes a store, a barrier, a load and another barrier. For
the four directions of 2,048 elements that is 16,384 accesses at 32 a cycle and eight barriers, to save 8,192 ex2 at 16
a cycle: 512 cycles either way, without the barriers. Both sides square the same difference, so their terms are equal
bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = 2.0**27  # a term of 1, in fixed point: eight of them stay below the sign
_UNIT = tl.constexpr(UNIT)
_INFINITY = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def fixed_point_sum(image, i, n, height, width, row_step, column_step, coefficient):
    """Sum over the eight neighbours at (+-row_step or 0, +-column_step or 0), int32; -1 where it is not a number.

    coefficient = -log2(e) / (2 b^2). Integers add up to the same in any order, so that equal differences tie.
    """
    row, column = i // width % height, i % width
    centre = tl.load(image + i, mask=i < n, other=0.0).to(tl.float32)
    number = tl.abs(centre) < _INFINITY
    total = tl.zeros(i.shape, tl.int32)
    for vertical in tl.static_range(-1, 2):
        for horizontal in tl.static_range(-1, 2):
            if vertical != 0 or horizontal != 0:
                down, right = vertical * row_step, horizontal * column_step
                inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
                neighbour = tl.load(image + i + down * width + right, mask=inside & (i < n), other=0.0).to(tl.float32)
                difference = centre - neighbour
                known = difference == difference
                term = tl.exp2(coefficient * (difference * difference))
                total += tl.where(known, _UNIT * term + 0.5, 0.0).to(tl.int32)
                number &= known
    return tl.where(number, total, -1)


@triton.jit
def neighbour_sum(image, i, n, height, width, offsets, neighbours, rounder, inverse):
    """Sum over the neighbours of exp(nearest - d_k), and nearest = min d_k with d = (c - c_k)^2 / (2 b^2), in float64.

    inverse = 1 / b: a division of float64 is a call, before which registers would be saved on the stack.
    NaN where it is not a number. Each term is rounded to a multiple of 2^-52 times the rounder's power of two, as in
    the reference: all partial sums are exact, so that equal differences tie in whatever order they are met.
    """
    row, column = i // width % height, i % width
    centre = tl.load(image + i, mask=i < n, other=0.0).to(tl.float64)
    nearest = tl.full(i.shape, _LARGEST, tl.float64)
    for k in range(neighbours):
        d = _distance(image, i, n, row, column, centre, height, width, offsets + 2 * k, inverse)
        nearest = tl.where(d < nearest, d, nearest)
    total = tl.where(tl.abs(centre) < _INFINITY, tl.zeros(i.shape, tl.float64), float("nan"))
    for k in range(neighbours):
        d = _distance(image, i, n, row, column, centre, height, width, offsets + 2 * k, inverse)
        total += (tl.exp(nearest - d) + rounder) - rounder
    return total, nearest


@triton.jit
def _distance(image, i, n, row, column, centre, height, width, offset, inverse):
    down, right = tl.load(offset), tl.load(offset + 1)
    inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
    neighbour = tl.load(image + i + down * width + right, mask=inside & (i < n), other=0.0).to(tl.float64)
    difference = (centre - neighbour) * inverse
    return difference * difference * 0.5
