// The loads that feed the tensor-core products of the nf4_lora kernels.
#pragma once

#include "cuda/nf4_lora.cuh"
#include "cuda/tensor_core.cuh"

namespace csikernels::cuda {
namespace {

// 16 bytes to shared memory, zeros in place of what is not `inside`.
__device__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// kCount elements of 16 bits as pairs, zero from element `valid` on. If aligned, so is `from`, and `valid` is at least
// kCount or at most 0.
template <bool kAligned, int kCount>
__device__ void load_halves(const void* from, int valid, uint32_t* pairs) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      uint4 part = make_uint4(0, 0, 0, 0);
      if (valid > 0) part = __ldg(static_cast<const uint4*>(from) + i);
      pairs[4 * i] = part.x;
      pairs[4 * i + 1] = part.y;
      pairs[4 * i + 2] = part.z;
      pairs[4 * i + 3] = part.w;
    }
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const uint32_t first = 2 * i < valid ? bits[2 * i] : 0, second = 2 * i + 1 < valid ? bits[2 * i + 1] : 0;
      pairs[i] = first | second << 16;
    }
  }
}

}  // namespace
}  // namespace csikernels::cuda
