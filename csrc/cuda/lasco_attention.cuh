// Self-attention of 32 tokens in 4 heads; a warp takes 16 queries of a head at a time.
//
// qkv: operand [32][3 d] with queries, keys and values side by side; context: operand [32][d].
#pragma once

#include "cuda/lasco_layout.cuh"
#include "cuda/lasco_math.cuh"
#include "cuda/lasco_product.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kQueries = 16;  // of a task
constexpr int kTasks = kHeads * kTokens / kQueries;

// float32 -------------------------------------------------------------------------------------------------------------

// A lane takes one query and half of the keys; the two lanes of a query join their results.
template <class C>
__device__ void attend(const unsigned char* qkv, unsigned char* context, int task, int lane, float*) {
  constexpr int size = C::kHeadWidth, row_bytes = C::row_bytes(3 * C::kWidth), kKeys = kTokens / 2;
  const int column = task / 2 * size, query = task % 2 * kQueries + lane % 16, half = lane / 16;
  const auto load = [&](int token, int at) {
    return *reinterpret_cast<const float4*>(element<float>(qkv, row_bytes, token, at));
  };
  const float scale = rsqrtf(float(size)) * kLog2e;
  float4 q[size / 4];
#pragma unroll
  for (int c = 0; c < size / 4; ++c) q[c] = load(query, column + 4 * c);
  float score[kKeys], most = -INFINITY;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < size / 4; ++c) {
      const float4 key = load(half * kKeys + k, C::kWidth + column + 4 * c);
      sum = fmaf(q[c].x, key.x, sum);
      sum = fmaf(q[c].y, key.y, sum);
      sum = fmaf(q[c].z, key.z, sum);
      sum = fmaf(q[c].w, key.w, sum);
    }
    score[k] = sum * scale;
    most = fmaxf(most, score[k]);
  }
  most = fmaxf(most, __shfl_xor_sync(kWarp, most, 16));
  float total = 0;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    score[k] = exp2_fast(score[k] - most);
    total += score[k];
  }
  total += __shfl_xor_sync(kWarp, total, 16);
  const float share = 1 / total;
  float mixed[size] = {};
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    const float weight = score[k] * share;
#pragma unroll
    for (int c = 0; c < size / 4; ++c) {
      const float4 value = load(half * kKeys + k, 2 * C::kWidth + column + 4 * c);
      mixed[4 * c] = fmaf(weight, value.x, mixed[4 * c]);
      mixed[4 * c + 1] = fmaf(weight, value.y, mixed[4 * c + 1]);
      mixed[4 * c + 2] = fmaf(weight, value.z, mixed[4 * c + 2]);
      mixed[4 * c + 3] = fmaf(weight, value.w, mixed[4 * c + 3]);
    }
  }
  // Each of the two lanes keeps one half of the columns, and receives the other's sum of them.
#pragma unroll
  for (int c = 0; c < size / 2; c += 2) {
    float own[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float low = mixed[c + j], high = mixed[size / 2 + c + j];
      own[j] = (half ? high : low) + __shfl_xor_sync(kWarp, half ? low : high, 16);
    }
    store_operand<C>(context, C::row_bytes(C::kWidth), query, column + half * (size / 2) + c, own[0], own[1]);
  }
}

// bfloat16 ------------------------------------------------------------------------------------------------------------

__device__ inline uint32_t pack(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// score[t] holds queries lane / 4 (+ 8 in [2], [3]) and keys 8 t + 2 (lane % 4), + 1: softmax over the keys.
__device__ inline void softmax_rows(float (&score)[4][2][2], float scale) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float most = -INFINITY, total = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) most = fmaxf(most, fmaxf(score[t][row][0], score[t][row][1]));
    most = fmaxf(most, __shfl_xor_sync(kWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kWarp, most, 2));
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        score[t][row][j] = exp2_fast((score[t][row][j] - most) * scale);
        total += score[t][row][j];
      }
    }
    total += __shfl_xor_sync(kWarp, total, 1);
    total += __shfl_xor_sync(kWarp, total, 2);
    const float share = 1 / total;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      score[t][row][0] *= share;
      score[t][row][1] *= share;
    }
  }
}

template <class C>
__device__ void attend(const unsigned char* qkv, unsigned char* context, int task, int lane, __nv_bfloat16*) {
  using Weight = __nv_bfloat16;
  constexpr int size = C::kHeadWidth, row_bytes = C::row_bytes(3 * C::kWidth);
  constexpr bool kNarrow = size == 8;  // half of a step of mma: the other half is zero
  const int column = task / 2 * size, first = task % 2 * kQueries;
  const auto row = [&](int token, int at) { return element<Weight>(qkv, row_bytes, token, at); };

  float score[4][2][2] = {};
#pragma unroll
  for (int step = 0; step < (kNarrow ? 1 : size / 16); ++step) {
    const int at = column + 16 * step;
    uint32_t a[4], b[2][4];  // b: of keys 0..15 and 16..31
    load_matrices<false>(a, shared_address(row(first + lane % 16, at + (kNarrow ? 0 : lane / 16 * 8))));
    if constexpr (kNarrow) {
      load_matrices<false>(b[0], shared_address(row(lane, C::kWidth + at)));
#pragma unroll
      for (int t = 0; t < 4; ++t) mma(score[t][0], score[t][1], a[0], a[1], 0, 0, b[0][t], 0);
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        load_matrices<false>(b[k],
                             shared_address(row(16 * k + lane % 8 + lane / 16 * 8, C::kWidth + at + lane / 8 % 2 * 8)));
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        mma(score[t][0], score[t][1], a[0], a[1], a[2], a[3], b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
      }
    }
  }
  softmax_rows(score, rsqrtf(float(size)) * kLog2e);

  // The accumulator of two tiles of keys is the first operand of a step over these keys.
  uint32_t p[2][4];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) p[k][r] = pack(score[2 * k + r / 2][r % 2][0], score[2 * k + r / 2][r % 2][1]);
  }
  float mixed[size / 8][2][2] = {};
  if constexpr (kNarrow) {
    uint32_t v[4];
    load_matrices<true>(v, shared_address(row(lane, 2 * C::kWidth + column)));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      mma(mixed[0][0], mixed[0][1], p[k][0], p[k][1], p[k][2], p[k][3], v[2 * k], v[2 * k + 1]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int t = 0; t < size / 8; t += 2) {
        uint32_t v[4];
        load_matrices<true>(v, shared_address(row(16 * k + lane % 16, 2 * C::kWidth + column + 8 * t + lane / 16 * 8)));
        mma(mixed[t][0], mixed[t][1], p[k][0], p[k][1], p[k][2], p[k][3], v[0], v[1]);
        mma(mixed[t + 1][0], mixed[t + 1][1], p[k][0], p[k][1], p[k][2], p[k][3], v[2], v[3]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < size / 8; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_operand<C>(context, C::row_bytes(C::kWidth), first + lane / 4 + 8 * half, column + 8 * t + lane % 4 * 2,
                       mixed[t][half][0], mixed[t][half][1]);
    }
  }
}

}  // namespace
}  // namespace csikernels::cuda
