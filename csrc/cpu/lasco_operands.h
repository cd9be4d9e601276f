// The three arithmetics of lasco_forward_body.h: what an operand of a product is and how it is stored. Included after
// lasco_tile.h (and, for Pairs, lasco_tile_bf16.h).
#pragma once

#include "cpu/lasco_stream.h"

namespace csikernels::cpu {
namespace {

template <int R, int V>
CSIKERNELS_INLINE void store_tile(float* y, int64_t y_stride, int64_t row, int64_t column, const Tile<R, V>& tile) {
  float* to = y + row * y_stride + column;
  for_tile<R, V>([&](int r, int v) { store(to + r * y_stride + v * F32::lanes, tile.at[r][v]); });
}

// float32 weights: an activation is its own operand.
struct Exact {
  using Operand = float;  // of activations, queries, keys and attention's weights
  using Value = float;    // of attention's values, [feature][token]
  using Stream = WeightStream;
  static constexpr bool kSame = true;    // operands are the activations themselves
  static constexpr bool kPairs = false;  // operands hold two features in a row

  static CSIKERNELS_INLINE Weights matrix(const void* stored, int64_t first, int64_t, int64_t depth, float*) {
    return {static_cast<const float*>(stored) + first * depth, depth, 1};
  }
  static CSIKERNELS_INLINE Weights keys(const float* k, int64_t stride) { return {k, 1, stride}; }
  static CSIKERNELS_INLINE Weights values(const float* v, int64_t stride) { return {v, stride, 1}; }

  template <int R, int V>
  static CSIKERNELS_INLINE void store_operand(float* y, int64_t stride, int64_t row, int64_t column,
                                              const Tile<R, V>& tile) {
    store_tile(y, stride, row, column, tile);
  }
  template <int R, int V>
  static CSIKERNELS_INLINE void store_values(float* y, int64_t stride, int64_t row, int64_t column,
                                             const Tile<R, V>& tile) {
    store_tile(y, stride, row, column, tile);
  }
};

// bfloat16 weights where bfloat16 products are missing: operands rounded, but held and multiplied in float32.
struct Rounded : Exact {
  using Stream = Unfetched;  // it would run over the stored halves twice as fast as the widened copy is read
  static constexpr bool kSame = false;

  static CSIKERNELS_INLINE Weights matrix(const void* stored, int64_t first, int64_t rows, int64_t depth, float* wide) {
    const uint16_t* from = static_cast<const uint16_t*>(stored) + first * depth;
    const int64_t count = rows * depth, whole = count / F32::lanes * F32::lanes;
    for (int64_t i = 0; i < whole; i += F32::lanes) store(wide + i, load_bf16(from + i));
    for (int64_t i = whole; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      __builtin_memcpy(wide + i, &bits, sizeof(bits));
    }
    return {wide, depth, 1};
  }

  template <int R, int V>
  static CSIKERNELS_INLINE void store_operand(float* y, int64_t stride, int64_t row, int64_t column,
                                              const Tile<R, V>& tile) {
    Tile<R, V> rounded;
    for_tile<R, V>([&](int r, int v) { rounded.at[r][v] = round_bf16(tile.at[r][v]); });
    store_tile(y, stride, row, column, rounded);
  }
  template <int R, int V>
  static CSIKERNELS_INLINE void store_values(float* y, int64_t stride, int64_t row, int64_t column,
                                             const Tile<R, V>& tile) {
    store_operand(y, stride, row, column, tile);
  }
};

#if defined(CSIKERNELS_BF16)
// bfloat16 weights and products.
struct Pairs {
  using Operand = uint32_t;
  using Value = uint16_t;
  using Stream = WeightStream;
  static constexpr bool kSame = false;
  static constexpr bool kPairs = true;

  static CSIKERNELS_INLINE PairWeights matrix(const void* stored, int64_t first, int64_t, int64_t depth, float*) {
    return {static_cast<const uint16_t*>(stored) + first * depth, depth, 2};
  }
  static CSIKERNELS_INLINE PairWeights keys(const uint32_t* k, int64_t stride) {
    return {reinterpret_cast<const uint16_t*>(k), 2, 2 * stride};
  }
  static CSIKERNELS_INLINE PairWeights values(const uint16_t* v, int64_t stride) { return {v, stride, 2}; }

  // y may be written up to the next 16 values.
  static CSIKERNELS_INLINE void round(const float* x, int64_t count, uint16_t* y) {
    for (int64_t i = 0; i < count; i += F32::lanes) {
      const int left = count - i < F32::lanes ? static_cast<int>(count - i) : F32::lanes;
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(load_first(x + i, left).v);
      _mm256_storeu_si256((__m256i_u*)(y + i), rounded);
    }
  }

  template <int R, int V>
  static CSIKERNELS_INLINE void store_operand(uint32_t* y, int64_t stride, int64_t row, int64_t column,
                                              const Tile<R, V>& tile) {
    store_pairs(y, stride, row, column, tile);
  }
  template <int R, int V>
  static CSIKERNELS_INLINE void store_values(uint16_t* y, int64_t stride, int64_t row, int64_t column,
                                             const Tile<R, V>& tile) {
    store_bf16_rows(y, stride, row, column, tile);
  }
};
#endif

}  // namespace
}  // namespace csikernels::cpu
