// Products of the tiled lasco_forward kernels: 32 tokens by the weights that a warp's stream brings.
//
// Lane l holds tokens row(l) + 8 i (i = 0..3) and columns 2 pair(l), 2 pair(l) + 1 of each tile of 8 rows of weights;
// this is the accumulator of two mma.m16n8k16, and float32 uses the same.
#pragma once

#include "cuda/lasco_layout.cuh"

namespace csikernels::cuda {
namespace {

// In float32 the lanes of each group of 8 (a 16-byte access is served in such groups) share tokens and columns in ways
// that let two groups be served at once: tokens do not depend on bits 0 and 2, columns not on bits 1, 3 and 4.
template <class Weight>
__device__ int row_of(int lane) {
  if constexpr (sizeof(Weight) == 4) return (lane >> 1 & 1) | (lane >> 2 & 6);
  return lane / 4;
}
template <class Weight>
__device__ int pair_of(int lane) {
  if constexpr (sizeof(Weight) == 4) return (lane & 1) | (lane >> 1 & 2);
  return lane % 4;
}

__device__ inline void mma(float (&low)[2], float (&high)[2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int kTiles>
using Sums = float[kTiles][4][2];

// A piece is 32 columns of 8 rows. The order of columns within a product is free, as long as both operands agree: lane
// l takes columns 8 (l % 4) .. + 7 for two steps of mma, one 16-byte access each for the weights and for every token.
template <class C, int kDepth, int kTiles>
__device__ void multiply(const unsigned char* operand, Stream<C>& stream, int lane, Sums<kTiles>& sums,
                         __nv_bfloat16*) {
  constexpr int row_bytes = C::row_bytes(kDepth), kUnrolled = kTiles > 1 ? 1 : 2;
  const unsigned char* own = operand + lane / 4 * row_bytes;
  const int permuted = permutation<__nv_bfloat16>(lane / 4);
#pragma unroll kUnrolled
  for (int chunk = 0; chunk < C::chunks(kDepth); ++chunk) {
    uint4 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = (4 * chunk + lane % 4) ^ permuted;
      a[i] = *reinterpret_cast<const uint4*>(own + 8 * i * row_bytes + unit * kUnit);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 b = load_shared(stream.take());
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        mma(sums[tile][i], sums[tile][i + 1], a[i].x, a[i + 1].x, a[i].y, a[i + 1].y, b.x, b.y);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        mma(sums[tile][i], sums[tile][i + 1], a[i].z, a[i + 1].z, a[i].w, a[i + 1].w, b.z, b.w);
      }
    }
  }
}

// A piece is 16 columns of 8 rows; a lane multiplies 4 tokens by 2 of the rows.
template <class C, int kDepth, int kTiles>
__device__ void multiply(const unsigned char* operand, Stream<C>& stream, int lane, Sums<kTiles>& sums, float*) {
  constexpr int row_bytes = C::row_bytes(kDepth), kUnits = kPieceBytes / kUnit;
  const int row = row_of<float>(lane), pair = pair_of<float>(lane);
  const unsigned char* own = operand + row * row_bytes;
  const int permuted = permutation<float>(row);
  // From this lane's unit of a piece to the first of its rows.
  const int to_rows = (2 * pair - lane / 4) * kPieceBytes - Stream<C>::stage_unit(lane) * kUnit;
#pragma unroll 1
  for (int chunk = 0; chunk < C::chunks(kDepth); ++chunk) {
    float4 a[kUnits][4];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (kUnits * chunk + unit) ^ permuted;
        a[unit][i] = *reinterpret_cast<const float4*>(own + 8 * i * row_bytes + at * kUnit);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t piece = stream.take() + to_rows;
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint4 bits = load_shared(piece + j * kPieceBytes + (unit ^ pair) * kUnit);
          const float4 b = *reinterpret_cast<const float4*>(&bits);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[tile][i][j];
            sum = fmaf(a[unit][i].x, b.x, sum);
            sum = fmaf(a[unit][i].y, b.y, sum);
            sum = fmaf(a[unit][i].z, b.z, sum);
            sum = fmaf(a[unit][i].w, b.w, sum);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace csikernels::cuda
