// What the nf4_lora kernels share: the 16 levels, loading 32 codes, and looking levels up by shuffles.
//
// Every lane keeps level (lane mod 16) in a register. A shuffle of width 16 takes only the low four bits of its source
// lane, so a look-up is one shift and one shuffle: no table in shared memory, no bank conflicts, the exact float32
// level.
#pragma once

#include <cstdint>

#include "cuda/nf4_lora.h"
#include "cuda/scalar.cuh"
#include "nf4_levels.h"

namespace csikernels::cuda {
namespace {

__host__ __device__ constexpr float level(int i) {
  constexpr float levels[16] = {CSIKERNELS_NF4_LEVELS};
  return levels[i];
}

constexpr int kChunk = 32;  // codes of a 16-byte load; they never span more than two scales, whatever the block size

// Two numbers in a register, the first in the low half.
template <class T>
__device__ uint32_t narrow_pair(float first, float second);
template <>
__device__ uint32_t narrow_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ uint32_t narrow_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// An element of a tensor whose type only the launch knows; all but float64.
__device__ float element(const Dense& dense, int64_t i) {
  if (dense.type == Scalar::float32) return static_cast<const float*>(dense.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(dense.data)[i];
  return dense.type == Scalar::bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                        : __half2float(__ushort_as_half(bits));
}

// Indexed by lane: selects over constants would become an array in local memory.
__constant__ float lane_levels[16] = {level(0),  level(1),  level(2),  level(3), level(4),  level(5),
                                      level(6),  level(7),  level(8),  level(9), level(10), level(11),
                                      level(12), level(13), level(14), level(15)};

__device__ float own_level() { return lane_levels[threadIdx.x % 16]; }

// Bit position of code e of a 32-bit word of packed codes.
__host__ __device__ constexpr int code_shift(int e) { return e / 2 * 8 + (e % 2 == 0 ? 4 : 0); }

// The level of code e of the word; all lanes of the warp at once.
__device__ float look_up(float own, uint32_t word, int e) {
  return __shfl_sync(~0u, own, static_cast<int>(word >> code_shift(e)), 16);
}

// 32 codes of a row, and their scales. Beyond the row's end the scale is zero.
struct Chunk {
  uint32_t word[4];
  float scale;   // until it is shared: only the first lane of a block has it
  int distance;  // how many lanes before this one that is
};
struct LooseChunk {
  uint32_t word[4];
  float scale, next_scale;
  int next, end;  // from here on: the next scale, outside the row
};
template <bool kAligned>
struct ChunkOf {
  using type = Chunk;
};
template <>
struct ChunkOf<false> {
  using type = LooseChunk;
};

template <class AnyChunk>
__device__ float scale_of(const AnyChunk& chunk, int e);
template <>
__device__ float scale_of(const Chunk& chunk, int) {
  return chunk.scale;
}
template <>
__device__ float scale_of(const LooseChunk& chunk, int e) {
  return e >= chunk.end ? 0.0f : e >= chunk.next ? chunk.next_scale : chunk.scale;
}

// Lanes whose codes lie in the same block read its scale once: the first of them, for all. The `before` lanes before
// this one hold the codes before `first`, `codes` each. To read and to hand on are apart, so that the reading lane need
// not wait where the scale is used later.
__device__ float read_scale(const NF4& weight, int64_t first, int codes, int before, bool inside, int& distance) {
  const int position = static_cast<int>(first & ((1 << weight.block_shift) - 1)) / codes;
  distance = inside ? min(before, position) : 0;
  return inside && distance == 0 ? __ldg(weight.absmax + (first >> weight.block_shift)) : 0.0f;
}

// All lanes of the warp at once.
__device__ float hand_on(float scale, int distance) {
  return __shfl_sync(~0u, scale, static_cast<int>(threadIdx.x % 32) - distance);
}

// Where a weight's chunks are 16-byte aligned: k is a multiple of 32, and so is `column`. The `before` lanes before
// this one hold the chunks before it.
__device__ void load_chunk(const NF4& weight, int row, int column, bool inside, int before, Chunk& chunk) {
  const int64_t first = static_cast<int64_t>(row) * weight.k + column;
  uint4 words = make_uint4(0, 0, 0, 0);
  if (inside) words = __ldg(reinterpret_cast<const uint4*>(weight.packed + first / 2));
  chunk.scale = read_scale(weight, first, kChunk, before, inside, chunk.distance);
  chunk.word[0] = words.x;
  chunk.word[1] = words.y;
  chunk.word[2] = words.z;
  chunk.word[3] = words.w;
}

// Before a loaded chunk is used; all lanes of the warp at once.
__device__ void complete(Chunk& chunk) { chunk.scale = hand_on(chunk.scale, chunk.distance); }
__device__ void complete(LooseChunk&) {}

// The bytes 4i .. 4i + 3 of the codes, the first one in the highest byte; zero beyond the end.
__device__ uint32_t big_endian(const uint8_t* packed, int64_t bytes, int64_t i) {
  const bool whole = 4 * i + 4 <= bytes && reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  if (whole) return __byte_perm(reinterpret_cast<const uint32_t*>(packed)[i], 0, 0x0123);
  uint32_t word = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) word = word << 8 | (4 * i + b < bytes ? packed[4 * i + b] : 0);
  return word;
}

// Any k: the chunk may begin at a low nibble, span two blocks and reach into the next row.
__device__ void load_chunk(const NF4& weight, int row, int column, bool inside, int, LooseChunk& chunk) {
  const int64_t first = static_cast<int64_t>(row) * weight.k + column;
  const int64_t count = static_cast<int64_t>(weight.n) * weight.k, bytes = (count + 1) / 2;
  const int block = 1 << weight.block_shift;
  chunk.end = inside ? min(kChunk, weight.k - column) : 0;
  chunk.next = block - static_cast<int>(first & (block - 1));
  chunk.scale = inside ? weight.absmax[first >> weight.block_shift] : 0.0f;
  chunk.next_scale = inside && chunk.next < chunk.end ? weight.absmax[(first >> weight.block_shift) + 1] : 0.0f;
  const unsigned shift = static_cast<unsigned>(first % 8) * 4;
  uint32_t before = inside ? big_endian(weight.packed, bytes, first / 8) : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t after = inside ? big_endian(weight.packed, bytes, first / 8 + i + 1) : 0;
    chunk.word[i] = __byte_perm(__funnelshift_l(after, before, shift), 0, 0x0123);
    before = after;
  }
}

// Whether loads of 16 bytes may begin here.
__host__ __device__ inline bool is_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every row's chunks are loads of 16 bytes.
inline bool is_aligned(const NF4& weight) { return weight.k % kChunk == 0 && is_vector(weight.packed); }

}  // namespace
}  // namespace csikernels::cuda
