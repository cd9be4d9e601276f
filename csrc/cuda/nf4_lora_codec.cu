// Quantising to NF4 and dequantising.
//
// Quantise: a block's scale is its largest magnitude; a code counts the midpoints between levels below x / scale. The
//   arithmetic is the reference's, operation by operation, so that codes are equal at the decision thresholds too.
// Layout: a thread block takes 4,096 elements, a multiple of every quantisation block, 16 per thread in registers: the
//   weight is read once. Maxima go through shuffles, beyond a warp through shared memory.
// Bytes: e + 1/2 + 4/block per element of e bytes; floor on an H100 (3.35 TB/s) for a float32 4096 x 4096 weight, block
//   64: 22.9 us. Operations: 15 comparisons and sums an element, 30 of the 39 instructions the memory leaves time for.
// Dequantise: 8 elements per thread at a time, 4 bytes in, 16 (half) to 64 (float64) bytes out. Same bytes and floor.
#include <climits>
#include <cmath>

#include "cuda/nf4_lora.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kTile = kThreads * kPerThread;
constexpr int kDecoded = 8;  // elements at a time, by a thread
constexpr int kDecodedTile = 4 * kThreads * kDecoded;
constexpr float kSmallest = 1e-38f;  // bitsandbytes' guard against division by zero
static_assert(kTile == 4096, "the largest quantisation block");

template <class In>
__device__ float to_float(In x) {
  return static_cast<float>(widen(x));
}

// A value on a midpoint takes the lower level.
__device__ uint32_t code_of(float relative) {
  uint32_t code = 0;
#pragma unroll
  for (int i = 0; i < 15; ++i) code += relative > (level(i) + level(i + 1)) / 2;
  return code;
}

// The 16 elements from `first` on, zero beyond the end.
template <class In>
__device__ void load_elements(const In* weight, int64_t first, int64_t count, float (&values)[kPerThread]) {
  constexpr int kVector = 16 / sizeof(In);
  if (first + kPerThread <= count && is_vector(weight)) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += kVector) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(weight + first + i));
      const In* parts = reinterpret_cast<const In*>(&bits);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[i + j] = to_float(parts[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) values[i] = first + i < count ? to_float(weight[first + i]) : 0.0f;
  }
}

template <class In>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const In* weight, int64_t count, int block, uint8_t* packed, float* absmax,
                    unsigned long long* first_refused) {
  __shared__ float warp_largest[kThreads / 32];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kPerThread;
  float values[kPerThread];
  load_elements(weight, first, count, values);
  float largest = 0;
  int refused = -1;
#pragma unroll
  for (int i = kPerThread - 1; i >= 0; --i) {
    largest = fmaxf(largest, fabsf(values[i]));
    if (!isfinite(values[i])) refused = i;
  }
  if (refused >= 0) atomicMin(first_refused, static_cast<unsigned long long>(first + refused));

  const int sharing = block / kPerThread;  // threads of one quantisation block: 2 .. 256
  for (int lane = min(sharing, 32) / 2; lane > 0; lane /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lane));
  }
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  const int warps = sharing / 32, first_warp = warps > 0 ? threadIdx.x / 32 / warps * warps : 0;
  for (int i = 0; i < warps; ++i) largest = fmaxf(largest, warp_largest[first_warp + i]);
  if (first >= count) return;

  // bitsandbytes divides in the last, shorter block, and its scale is never below the guard.
  const bool whole = (first / block + 1) * block <= count;
  const float guarded = fmaxf(largest, kSmallest), inverse = 1.0f / guarded;
  if (threadIdx.x % sharing == 0) absmax[first / block] = whole ? largest : guarded;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float relative = whole ? values[i] * inverse : values[i] / guarded;
    words[i / 8] |= code_of(fminf(fmaxf(relative, -1.0f), 1.0f)) << code_shift(i % 8);
  }
  uint8_t* const to = packed + first / 2;
  if (first + kPerThread <= count) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread / 2; ++i) {
      if (first + 2 * i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
}

// The kDecoded elements from `first` on; all lanes of a warp at once, one behind the other.
template <class Out>
__device__ void decode(const NF4& weight, int64_t first, int64_t count, float own, Out* out) {
  const bool inside = first < count;
  const uint32_t word = inside ? __byte_perm(big_endian(weight.packed, (count + 1) / 2, first / 8), 0, 0x0123) : 0;
  int distance;
  const float read = read_scale(weight, first, kDecoded, threadIdx.x % 32, inside, distance);
  const float scale = hand_on(read, distance);
  union {
    Out values[kDecoded];
    uint4 vectors[sizeof(Out) * kDecoded / 16];
  };
#pragma unroll
  for (int e = 0; e < kDecoded; ++e) values[e] = narrow<Out>(look_up(own, word, e) * scale);
  if (first + kDecoded <= count) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Out)) * kDecoded / 16; ++i) {
      reinterpret_cast<uint4*>(out + first)[i] = vectors[i];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kDecoded; ++e) {
      if (first + e < count) out[first + e] = values[e];
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads, 4) dequantize_kernel(NF4 weight, int64_t count, Out* out) {
  const float own = own_level();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodedTile + threadIdx.x * kDecoded;
#pragma unroll 2
  for (int i = 0; i < kDecodedTile; i += kThreads * kDecoded) decode(weight, first + i, count, own, out);
}

unsigned blocks_of(int64_t count, int64_t tile) { return static_cast<unsigned>((count + tile - 1) / tile); }

}  // namespace

cudaError_t nf4_quantize(const void* weight, Scalar type, int64_t count, int block, uint8_t* packed, float* absmax,
                         unsigned long long* first_refused, cudaStream_t stream) {
  return with_type(type, [&]<class In>(Type<In>) {
    quantize_kernel<In><<<blocks_of(count, kTile), kThreads, 0, stream>>>(static_cast<const In*>(weight), count, block,
                                                                          packed, absmax, first_refused);
    return cudaGetLastError();
  });
}

cudaError_t nf4_dequantize(const NF4& weight, void* out, Scalar type, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(weight.n) * weight.k;
  return with_type(type, [&]<class Out>(Type<Out>) {
    dequantize_kernel<Out>
        <<<blocks_of(count, kDecodedTile), kThreads, 0, stream>>>(weight, count, static_cast<Out*>(out));
    return cudaGetLastError();
  });
}

}  // namespace csikernels::cuda
