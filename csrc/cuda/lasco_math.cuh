// What both kernels of lasco_forward compute element by element or warp by warp.
#pragma once

#include <cuda_bf16.h>

#include "cuda/exp2.cuh"

namespace csikernels::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;  // all lanes
constexpr float kLog2e = 1.44269504089f;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

// Over 8 neighbouring lanes.
__device__ inline float sum_of_8(float x) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}

// NaN passes through both.
__device__ inline float activate(float x, bool gelu) {
  if (gelu) return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
  return x < 0 ? 0 : x;
}

}  // namespace
}  // namespace csikernels::cuda
