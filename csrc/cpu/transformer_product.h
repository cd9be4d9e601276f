// Matrix products against packed panels, on a Dot. Included inside an instruction set's namespace.
//
// A tile of R rows by two vectors stays in registers over all inputs: per step two loads of columns and R broadcasts
// feed 2 R multiply-adds. Panels come in order, all rows of the call against one before the next; meanwhile the
// following panel is fetched into L2.

#pragma once

#include "cpu/transformer_dots.h"

namespace {

// out[r][0..31] = sum over steps of a's rows against one panel. Rows lie lda elements apart and their groups side by
// side; with kAcross rows lie side by side and the groups lda elements apart.
template <class Dot>
using Tile = void(const typename Dot::Element* a, int64_t lda, const typename Dot::Element* panel, int64_t steps,
                  const char* ahead, typename Dot::Sum* out);

template <class Dot, int R, bool kAcross>
__attribute__((noinline)) void tile(const typename Dot::Element* a, int64_t lda, const typename Dot::Element* panel,
                                    int64_t steps, const char* ahead, typename Dot::Sum* out) {
  constexpr int kVectors = 2, kUnroll = 4, kGroup = Dot::group;
  for (int column = 0; column < kPanel; column += kVectors * F32::lanes) {
    typename Dot::Accumulator sum[R][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Dot::zero();
    const typename Dot::Element* b = panel + column * kGroup;
    // Three rows per pointer: x, x + lda and x + 2 lda are single address operands, and the pointers fit the registers.
    const typename Dot::Element* base[(R + 2) / 3];
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 3) base[r / 3] = kAcross ? a + r : a + r * lda;
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      const typename Dot::Operand b0 = Dot::columns(b + k * kPanel * kGroup);
      const typename Dot::Operand b1 = Dot::columns(b + (k * kPanel + F32::lanes) * kGroup);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto* at = kAcross ? base[0] + k * lda + r : base[r / 3] + r % 3 * lda + k * kGroup;
        const typename Dot::Operand x = Dot::row(at);
        sum[r][0] = Dot::add(sum[r][0], x, b0);
        sum[r][1] = Dot::add(sum[r][1], x, b1);
      }
    };
    const auto advance = [&](int64_t k) __attribute__((always_inline)) {
      b += k * kPanel * kGroup;
#pragma GCC unroll 16
      for (int r = 0; r < R; r += 3) base[r / 3] += kAcross ? k * lda : k * kGroup;
    };
    int64_t k = steps;
    for (; k >= kUnroll; k -= kUnroll) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 128;
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) step(u);
      advance(kUnroll);
    }
    for (; k > 0; --k) {
      step(0);
      advance(1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Dot::put(out + r * kPanel + column, sum[r][0]);
      Dot::put(out + r * kPanel + column + F32::lanes, sum[r][1]);
    }
  }
}

template <class Dot, bool kAcross, int R = Dot::rows>
Tile<Dot>* tile_of(int64_t rows) {
  if constexpr (R == 1) {
    return tile<Dot, 1, kAcross>;
  } else {
    return rows == R ? tile<Dot, R, kAcross> : tile_of<Dot, kAcross, R - 1>(rows);
  }
}

// Calls body(first row, rows) for tiles of nearly equal height.
template <class Dot, class Body>
CSIKERNELS_INLINE void for_tiles(int64_t rows, Body body) {
  const int64_t tiles = (rows + Dot::rows - 1) / Dot::rows;
  for (int64_t t = 0; t < tiles; ++t) body(rows * t / tiles, rows * (t + 1) / tiles - rows * t / tiles);
}

CSIKERNELS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

CSIKERNELS_INLINE F32 load_up_to(const float* p, int64_t n) {
  return n >= F32::lanes ? load(p) : load_first(p, static_cast<int>(n));
}

CSIKERNELS_INLINE void store_up_to(float* p, F32 a, int64_t n) {
  if (n >= F32::lanes) return store(p, a);
  store_first(p, a, static_cast<int>(n));
}

// Rows of a product's left side.
template <class Dot>
struct Rows {
  typename Dot::Element* data;
  int64_t stride;  // in elements
  float* scale;    // int8 only: of each row
};

// body(first, end, member) for parts of 0..count, one per member of the team.
template <class Body>
CSIKERNELS_INLINE void share(const Team& team, int64_t count, const Body& body) {
  if (team.members == 1) return body(0, count, 0);
  struct Job {
    const Body& body;
    int64_t count, members;
  } job{body, count, team.members};
  const auto run = [](void* argument, int64_t member) {
    const Job& own = *static_cast<const Job*>(argument);
    own.body(own.count * member / own.members, own.count * (member + 1) / own.members, member);
  };
  team.run(team.members, run, &job);
}

// write(row, column, n, value) gets x W^T + bias, n columns from `column` on at a time (n at most a vector), for the
// panels first..end-1.
template <class Dot, class Write>
void product_part(const Rows<Dot>& x, int64_t rows, const Linear& w, const Write& write, int64_t first, int64_t end) {
  constexpr bool kInteger = Dot::group == 4;
  const int64_t steps = (w.in + Dot::group - 1) / Dot::group, panel_size = steps * kPanel * Dot::group;
  const auto* panel = static_cast<const typename Dot::Element*>(w.panels) + first * panel_size;
  alignas(64) typename Dot::Sum sums[Dot::rows * kPanel];
  for (int64_t p = first; p < end; ++p, panel += panel_size) {
    const int64_t column = p * kPanel;
    const char* ahead = reinterpret_cast<const char*>(panel + panel_size);
    for_tiles<Dot>(rows, [&](int64_t row, int64_t count) __attribute__((always_inline)) {
      tile_of<Dot, false>(count)(x.data + row * x.stride, x.stride, panel, steps, ahead, sums);
      ahead += steps * 32;
      const int64_t valid = least(kPanel, w.out - column);
      for (int64_t c = 0; c < valid; c += F32::lanes) {
        const int64_t n = least(valid - c, F32::lanes), at = column + c;
        const F32 bias = load_up_to(w.bias + at, n);
        if constexpr (kInteger) {
          const F32 scale = load_up_to(w.scale + at, n);
          const IntLanes shift = load_bits(w.shift + at);
          for (int64_t r = 0; r < count; ++r) {
            const F32 sum = {__builtin_convertvector(load_bits(sums + r * kPanel + c) - shift, FloatLanes)};
            write(row + r, at, n, fma(sum * broadcast(x.scale[row + r]), scale, bias));
          }
        } else {
          for (int64_t r = 0; r < count; ++r) write(row + r, at, n, load(sums + r * kPanel + c) + bias);
        }
      }
    });
  }
}

template <class Dot, class Write>
CSIKERNELS_INLINE void product(const Team& team, const Rows<Dot>& x, int64_t rows, const Linear& w,
                               const Write& write) {
  share(team, panels_of(w.out),
        [&](int64_t first, int64_t end, int64_t) { product_part(x, rows, w, write, first, end); });
}

}  // namespace
