// Attention, head by head. Included inside an instruction set's namespace.
//
// Scores are formed transposed, [key][32 queries], so that the softmax over keys runs down the lanes and a probability
// can be broadcast for the product with the values.

#pragma once

#include "cpu/transformer_rows.h"

namespace {

// One step of the transpose of a square of rows: blocks of kHalf x kHalf off the diagonal change places.
template <int kHalf>
CSIKERNELS_INLINE void exchange(F32* rows) {
  IntLanes upper{}, lower{};
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    upper[j] = (j & kHalf) != 0 ? kLanes + j - kHalf : j;
    lower[j] = (j & kHalf) != 0 ? kLanes + j : j + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kHalf) != 0) continue;
    const FloatLanes a = rows[i].v, b = rows[i + kHalf].v;
    rows[i].v = __builtin_shuffle(a, b, upper);
    rows[i + kHalf].v = __builtin_shuffle(a, b, lower);
  }
}

CSIKERNELS_INLINE void transpose(F32* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes >= 8) exchange<4>(rows);
  if constexpr (kLanes >= 16) exchange<8>(rows);
}

// panels[p][c][q] = x[32 p + q][c] for c < n, zeros beyond the rows
void transpose_to_panels(const float* x, int64_t stride, int64_t rows, int64_t n, float* panels) {
  for (int64_t first = 0; first < panels_of(rows) * kPanel; first += kLanes) {
    float* const panel = panels + first / kPanel * n * kPanel + first % kPanel;
    for (int64_t c = 0; c < n; c += kLanes) {
      F32 square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = first + i < rows ? load_up_to(x + (first + i) * stride + c, n - c) : broadcast(0.0f);
      }
      transpose(square);
      const int64_t columns = least(kLanes, n - c);
      for (int64_t i = 0; i < columns; ++i) store(panel + (c + i) * kPanel, square[i]);
    }
  }
}

// panels[p][r][c] = x[r][32 p + c], zeros beyond n
void copy_to_panels(const float* x, int64_t stride, int64_t rows, int64_t n, float* panels) {
  for (int64_t p = 0; p < n; p += kPanel) {
    for (int64_t r = 0; r < rows; ++r, panels += kPanel) {
      for (int64_t c = 0; c < kPanel; c += F32::lanes) {
        const int64_t left = n - p - c;
        store(panels + c, left > 0 ? load_up_to(x + r * stride + p + c, left) : broadcast(0.0f));
      }
    }
  }
}

// Down the keys, per query: p = exp(scale (s - max)) / sum
template <bool kRound>
void softmax(float* scores, int64_t keys, float scale) {
  const F32 factor = broadcast(scale * 1.44269504f);
  for (int64_t q = 0; q < kPanel; q += F32::lanes) {
    F32 largest = load(scores + q), sum = broadcast(0.0f);
    for (int64_t k = 1; k < keys; ++k) largest = max(largest, load(scores + k * kPanel + q));
    for (int64_t k = 0; k < keys; ++k) {
      float* at = scores + k * kPanel + q;
      const F32 e = exp2((load(at) - largest) * factor);
      sum = sum + e;
      store(at, e);
    }
    const F32 inverse = broadcast(1.0f) / sum;
    for (int64_t k = 0; k < keys; ++k) {
      float* at = scores + k * kPanel + q;
      store(at, kRound ? to_bf16(load(at) * inverse) : load(at) * inverse);
    }
  }
}

// One head of one sample, columns `at` on: qkv [tokens][3 width] -> context [tokens][width]. With kRound qkv holds
// bfloat16 values, as do the probabilities.
template <bool kRound>
void attention(const float* qkv, int64_t stride, const Network& net, const Workspace& space, int64_t member, int64_t at,
               float* context, int64_t context_stride) {
  const int64_t tokens = net.tokens, head = net.width / net.heads;
  const float scale = __builtin_sqrtf(1.0f / static_cast<float>(head));
  alignas(64) float sums[FloatDot::rows * kPanel];
  float *const queries = space.queries + member * space.queries_size, *const scores =
                                                                          space.scores + member * space.scores_size;
  float* const values = space.values + member * space.values_size;
  const float* const keys = qkv + net.width + at;
  transpose_to_panels(qkv + at, stride, tokens, head, queries);
  copy_to_panels(qkv + 2 * net.width + at, stride, tokens, head, values);
  for (int64_t query = 0; query < tokens; query += kPanel) {
    const float* panel = queries + query * head;
    for_tiles<FloatDot>(tokens, [&](int64_t first, int64_t count) {
      tile_of<FloatDot, false>(count)(keys + first * stride, stride, panel, head, reinterpret_cast<const char*>(panel),
                                      scores + first * kPanel);
    });
    softmax<kRound>(scores, tokens, scale);
    for (int64_t column = 0; column < head; column += kPanel) {
      const float* mixed = values + column * tokens;
      for_tiles<FloatDot>(least(kPanel, tokens - query), [&](int64_t first, int64_t count) {
        tile_of<FloatDot, true>(count)(scores + first, kPanel, mixed, tokens, reinterpret_cast<const char*>(mixed),
                                       sums);
        for (int64_t r = 0; r < count; ++r) {
          float* out = context + (query + first + r) * context_stride + at + column;
          for (int64_t c = 0; c < least(kPanel, head - column); c += F32::lanes) {
            store_up_to(out + c, load(sums + r * kPanel + c), head - column - c);
          }
        }
      });
    }
  }
}

}  // namespace
