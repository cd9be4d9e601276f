"""Device functions that select the m smallest of a sample's n keys, in order: radix select, compaction, sort.

Keys are unsigned integers in the order wanted, smallest first; equal keys go by the lower position, so the result is
deterministic. A radix select finds the m-th smallest key, eight bits a pass, from histograms of the keys that share the
bits found so far. Prefix sums then give each survivor its slot in the order of positions, and it goes there as
``key << 14 | position``: no two of these are equal, so that any sort of them is a stable sort of the keys. Keys of 64
bits are sorted by their low half first and then by (high half, rank).

Up to 4,096 keys of 32 bits stay in the program's registers; others lie in memory and are read a tile at a time.
Survivors change places through memory, since Triton has no scatter into shared memory: a sample's own lines stay in the
L1 cache. The increments of a histogram compile to ATOMS.POPC.INC, which counts the lanes of a warp that share a bin:
zero-filled CSI, most of whose keys are equal, costs what noise does.
A run of R survivors is sorted by log2(R) (log2(R) + 1) / 2 exchanges (36 for 221 of them); longer lists are merged by
rank, each survivor counting by binary search how many of every run come before it.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

MOST_ELEMENTS = 1 << 14  # of a sample: a position takes 14 bits of a packed survivor
_POSITION_BITS = tl.constexpr(14)
_POSITION = tl.constexpr((1 << 14) - 1)
_LOW_HALF = tl.constexpr(0xFFFFFFFF)
_BEHIND_ALL = tl.constexpr((1 << 63) - 1)
_BINS = tl.constexpr(256)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a selection is compiled for."""

    tile: int  # keys in registers at a time
    held: bool  # these are all
    bits: int  # of a key
    run: int  # survivors sorted at a time
    merged: bool  # there are several runs

    @property
    def log_run(self) -> int:
        return self.run.bit_length() - 1


def tiles_of(n: int, m: int, bits: int) -> Tiles:
    """For m of n keys."""
    # At eight keys a thread, 16 warps leave 128 registers to each: too few for twice the bits.
    longest = 2048 if bits == 64 else 4096
    tile, run = min(longest, padded(n)), min(longest, padded(m))
    return Tiles(tile, n <= tile and bits < 64, bits, run, m > run)


def padded(size: int) -> int:
    """The tile that holds so many elements."""
    return max(128, triton.next_power_of_2(size))


def options_of(tiles: Tiles) -> dict[str, int | None]:
    """Of a launch: eight keys, or survivors, a thread. Unless told that it may use more registers, the compiler spills
    keys of 64 bits for the sake of occupancy."""
    warps = max(4, max(tiles.tile, tiles.run) // 256)
    return {"num_warps": warps, "maxnreg": 168 if tiles.bits == 64 else None}


@triton.jit
def ordered(bits, LARGEST_FIRST: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """Integers whose unsigned order is that of the floats with these bits; -0 as +0, NaN behind all."""
    # On integers, because a comparison of floats may take subnormal numbers for zero.
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    sign = tl.full(bits.shape, 1 << (BITS - 1), KEY)
    magnitude = bits.to(KEY) & (sign - 1)
    nan = magnitude > tl.full(bits.shape, INFINITY, KEY)
    before_zero = (bits >= 0) if LARGEST_FIRST else (bits < 0)
    key = tl.where(before_zero & (magnitude != 0), sign - 1 - magnitude, sign | magnitude)
    return tl.where(nan, sign | (sign - 1), key)


@triton.jit
def store_keys(key, keys, first, n):
    """Keep the keys of the elements from ``first`` on. Memory holds them as signed integers, which torch has."""
    i = first + tl.arange(0, key.shape[0])
    SIGNED: tl.constexpr = tl.int64 if key.dtype == tl.uint64 else tl.int32
    tl.store(keys + i, key.to(SIGNED, bitcast=True), mask=i < n)


@triton.jit
def load_keys(keys, first, n, S: tl.constexpr):
    """The keys of the elements from ``first`` on, all ones beyond the sample: behind every element, NaN too."""
    KEY: tl.constexpr = tl.uint64 if S.bits == 64 else tl.uint32
    i = first + tl.arange(0, S.tile)
    return tl.load(keys + i, mask=i < n, other=-1).to(KEY, bitcast=True)


@triton.jit
def _mth_smallest(key, keys, n, m, S: tl.constexpr):
    """The m-th smallest key, and how many of those equal to it are among the m smallest."""
    prefix = tl.full([], 0, tl.uint64 if S.bits == 64 else tl.uint32)
    remaining = m
    for step in range(S.bits // 8):
        shift = S.bits - 8 - 8 * step
        counts = tl.zeros([_BINS], tl.int32)
        for first in range(0, n, S.tile):
            tile = key if S.held else load_keys(keys, first, n, S)
            # Two shifts, because a shift by all bits is undefined.
            shares = (tile >> shift >> 8) == (prefix >> shift >> 8)
            digit = ((tile >> shift) & (_BINS - 1)).to(tl.int32)
            counts += tl.histogram(digit, _BINS, mask=shares)
        upto = tl.cumsum(counts, 0)
        smaller = upto < remaining
        digit = tl.sum(smaller.to(tl.int32), 0)
        remaining -= tl.max(tl.where(smaller, upto, 0), 0)
        prefix |= digit.to(prefix.dtype) << shift
    return prefix, remaining


@triton.jit
def _compact(key, keys, threshold, ties, survivors, n, S: tl.constexpr):
    """survivors [m] = (low half of the) key << 14 | position of the keys below the threshold and of its first ties."""
    before = 0  # keys below the threshold, and << 16 those equal to it: one prefix sum for both
    for first in range(0, n, S.tile):
        i = first + tl.arange(0, S.tile)
        tile = key if S.held else load_keys(keys, first, n, S)
        below, tie = tile < threshold, tile == threshold
        flags = below.to(tl.int32) + (tie.to(tl.int32) << 16)
        earlier = before + tl.cumsum(flags, 0) - flags
        slot = (earlier & 0xFFFF) + tl.minimum(earlier >> 16, ties)
        packed = ((tile & _LOW_HALF).to(tl.int64) << _POSITION_BITS) | i
        tl.store(survivors + slot, packed, mask=below | (tie & (earlier >> 16 < ties)))
        before += tl.sum(flags, 0)
    tl.debug_barrier()


@triton.jit
def _load_run(survivors, first, m, S: tl.constexpr):
    place = first + tl.arange(0, S.run)
    return tl.load(survivors + place, mask=place < m, other=_BEHIND_ALL)


@triton.jit
def _sort(survivors, target, m, S: tl.constexpr):
    """target [m] = survivors [m], ascending. Only a single run may be its own target."""
    for first in range(0, m, S.run):
        run = _load_run(survivors, first, m, S)
        tl.debug_barrier()  # short runs are held by several warps: all have read before one writes
        place = first + tl.arange(0, S.run)
        tl.store((survivors if S.merged else target) + place, _bitonic(run, S.log_run), mask=place < m)
    tl.debug_barrier()
    if S.merged:
        for first in range(0, m, S.run):
            run = _load_run(survivors, first, m, S)
            rank = tl.zeros([S.run], tl.int32)
            for other in range(0, m, S.run):
                rank += _count_smaller(survivors + other, m - other, run, S)
            tl.store(target + rank, run, mask=first + tl.arange(0, S.run) < m)
        tl.debug_barrier()


@triton.jit
def _bitonic(x, LOG: tl.constexpr):
    """x [2^LOG], ascending. As a cube of 2 x 2 x .. a partner is the sum of both less oneself: a shuffle within a warp,
    and through shared memory only where the distance is that of warps. (tl.sort does the same by exclusive or, element
    by element in Triton's interpreter.)"""
    cube = tl.reshape(x, [2] * LOG)
    place = tl.reshape(tl.arange(0, 1 << LOG), [2] * LOG)
    for stage in tl.static_range(1, LOG + 1):
        for step in tl.static_range(stage):
            partner = tl.sum(cube, LOG - stage + step, keep_dims=True) - cube
            keeps_larger = ((place >> (stage - 1 - step)) ^ (place >> stage)) & 1
            cube = tl.where((cube > partner) != (keeps_larger == 1), partner, cube)
    return tl.reshape(cube, x.shape)


@triton.jit
def _count_smaller(run, length, x, S: tl.constexpr):
    """How many of the sorted run[0 .. min(length, S.run)) are smaller than each of ``x``."""
    count = tl.zeros(x.shape, tl.int32)
    for halving in range(S.log_run + 1):
        probe = count + (S.run >> halving)
        inside = (probe <= S.run) & (probe <= length)
        smaller = tl.load(run + probe - 1, mask=inside, other=_BEHIND_ALL) < x
        count = tl.where(smaller, probe, count)
    return count


@triton.jit
def _by_high_half(survivors, target, keys, m, S: tl.constexpr):
    """Repack survivors [m], sorted by the low half of their keys, so that a sort by the high half keeps that order."""
    for first in range(0, m, S.run):
        place = first + tl.arange(0, S.run)
        position = _load_run(survivors, first, m, S) & _POSITION
        high = (tl.load(keys + position, mask=place < m, other=0).to(tl.uint64, bitcast=True) >> 32).to(tl.int64)
        packed = (((high << _POSITION_BITS) | place) << _POSITION_BITS) | position
        tl.debug_barrier()
        tl.store(target + place, packed, mask=place < m)
    tl.debug_barrier()


@triton.jit
def select_smallest(
    key,  # [S.tile], the sample's keys where S.held
    keys,  # [n] signed, the sample's keys elsewhere
    source,  # [n], integers of the width of the values
    survivors,  # [m] int64, scratch; `indices` itself unless S.merged
    values,  # [m]
    indices,  # [m] int64
    n,
    m,
    S: tl.constexpr,  # Tiles
):
    """indices = positions of the m smallest keys, in order, and values = source there."""
    threshold, ties = _mth_smallest(key, keys, n, m, S)
    _compact(key, keys, threshold, ties, survivors, n, S)
    _sort(survivors, indices, m, S)
    if S.bits == 64:
        _by_high_half(indices, survivors, keys, m, S)
        _sort(survivors, indices, m, S)
    for first in range(0, m, S.run):
        place = first + tl.arange(0, S.run)
        position = _load_run(indices, first, m, S) & _POSITION
        value = tl.load(source + position, mask=place < m)
        tl.debug_barrier()
        tl.store(indices + place, position, mask=place < m)
        tl.store(values + place, value, mask=place < m)
