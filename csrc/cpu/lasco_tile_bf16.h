// The product of lasco_tile.h on pairs of bfloat16: vdpbf16ps adds two products to each float32 sum. Included after a
// vector header with CSIKERNELS_BF16.
//
// An operand is [pair of features][token], a pair of bfloat16 (the lower feature in the lower half) in 32 bits; the
// last of an odd number of features is paired with 0. The small operand is two bfloat16 of adjacent k, adjacent in
// memory.
#pragma once

#include "cpu/lasco_tile.h"

namespace csikernels::cpu {
namespace {

// w(n, k) = data[n * row + k], or for pairs that lie apart, data[n * row + k / 2 * step + k % 2].
struct PairWeights {
  const uint16_t* data;
  int64_t row, step;  // step 2: a row of bfloat16

  static constexpr int kBytes = sizeof(uint16_t);
  static constexpr int kDepthStep = 2;

  CSIKERNELS_INLINE PairWeights from(int64_t n) const { return {data + n * row, row, step}; }
  CSIKERNELS_INLINE void next() { data += step; }
  CSIKERNELS_INLINE __m512i at(int r) const {
    int32_t pair;
    __builtin_memcpy(&pair, data + r * row, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  CSIKERNELS_INLINE __m512i half_at(int r) const { return _mm512_set1_epi32(data[r * row]); }  // the last of odd depth
  static CSIKERNELS_INLINE __m512i vector(const uint32_t* x) { return _mm512_loadu_si512(x); }
  static CSIKERNELS_INLINE F32 multiply_add(__m512i weight, __m512i x, F32 sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)weight, (__m512bh)x)};
  }
};

// Two rows rounded to bfloat16 (nearest even; denormals to 0, as vdpbf16ps takes them) as pairs.
CSIKERNELS_INLINE __m512i pair_rows(F32 lower, F32 upper) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(upper.v, lower.v);  // lower's sixteen, then upper's
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, halves);
}

// Rounds a tile into an operand; its first row is even, and a single row is the last.
template <int R, int V>
CSIKERNELS_INLINE void store_pairs(uint32_t* y, int64_t y_stride, int64_t row, int64_t column, const Tile<R, V>& tile) {
  uint32_t* to = y + row / 2 * y_stride + column;
  for_tile<(R + 1) / 2, V>([&](int pair, int v) {
    const F32 upper = 2 * pair + 1 < R ? tile.at[(2 * pair + 1) % R][v] : broadcast(0.0f);
    _mm512_storeu_si512(to + pair * y_stride + v * F32::lanes, pair_rows(tile.at[2 * pair][v], upper));
  });
}

// Rounds a tile row by row.
template <int R, int V>
CSIKERNELS_INLINE void store_bf16_rows(uint16_t* y, int64_t y_stride, int64_t row, int64_t column,
                                       const Tile<R, V>& tile) {
  for_tile<R, V>([&](int r, int v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(tile.at[r][v].v);
    _mm256_storeu_si256((__m256i_u*)(y + (row + r) * y_stride + column + v * F32::lanes), rounded);
  });
}

}  // namespace
}  // namespace csikernels::cpu
