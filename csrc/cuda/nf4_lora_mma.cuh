// Tensor-core products of half precision with float32 sums, and the loads that feed them (compute capability 8.0).
#pragma once

#include "cuda/nf4_lora.cuh"

namespace csikernels::cuda {
namespace {

// acc [16 x 8] += a [16 x 16] b [16 x 8], in the layout of mma.sync m16n8k16.
template <class In>
__device__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ void mma<__half>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ void mma<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool kTransposed>
__device__ void load_matrices(uint32_t (&to)[4], uint32_t shared_address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address)
                 : "memory");
  }
}

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, zeros in place of what is not `inside`.
__device__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the last kPending.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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
