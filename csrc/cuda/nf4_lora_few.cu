// The NF4 + LoRA layer for 1..16 tokens: out = x W^T + t B^T + bias with t = scaling * x A^T.
//
// Two launches, the second bound by reading the weight:
//   t: one block per 2 to 8 rows of A. out: one block per 32 rows of W; its warps split K in steps of 128, each lane
//   holding 16-byte loads (32 codes) of 4 rows, 4 lanes a row's 128 codes; partial sums meet in shared memory and are
//   added in the order of the warps, so that results are deterministic.
// Half precision: W is the 16-row operand of mma.sync m16n8k16 and the tokens are its 8 columns. A sum does not mind
//   the order of k, so that a lane's 32 consecutive codes serve as its elements of 8 products, and x is read to match:
//   no exchange between lanes, no shared memory for W.
// float32: the same lanes, fused multiply-adds; x goes through shared memory because 8 lanes share each element.
// Look-up: a shift, a shuffle and the product with the scale per weight, and half a conversion: 3.5 instructions of
//   the 4.85 for which reading at 3.35 TB/s leaves time (132 SMs, 128 lanes, 1.7 GHz).
// Bytes: N K (1/2 + 4/block) + e tokens (K + N) + e r (K + N) for elements of e bytes. Every block reads x again, from
//   L2: 2 K bytes per bfloat16 token beside 18 K of weight, so that 16 tokens are bound by L2. Floor on an H100 for a
//   4096 x 4096 weight, block 64, rank 16: 2.9 us for one bfloat16 token; 8 us for 16 float32 tokens, 0.54 GFLOP at
//   67 TFLOP/s.
// Shared memory: up to 32 KB (half), 37 KB (up to 4 float32 tokens), 74 KB (16 float32 tokens); one block of up to 16
//   warps per SM, each with 2 KB of codes in flight.
#include <algorithm>
#include <type_traits>

#include "cuda/nf4_lora.cuh"
#include "cuda/nf4_lora_mma.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kRows = 32;            // of W per block
constexpr int kGroups = kRows / 16;  // of 16 rows: a lane has rows lane / 4 and lane / 4 + 8 of each
constexpr int kStep = 4 * kChunk;    // of k, by a warp
constexpr int kInnerThreads = 256;
constexpr int kStagedRow = 4 * (kChunk + 4);  // 4 lanes read 4 chunks of a token at once: no bank twice

template <int kTokens>
constexpr int kInnerRows = kTokens == 1   ? 8
                           : kTokens == 8 ? 4
                                          : 2;  // of A per block: their sums are registers

extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Tokens of the template for half precision are whole groups of 8; only the first `tokens` exist.
template <class In, int kTokens>
struct Few {
  const In* x;
  NF4 weight;
  const float* t;
  Dense lora_b, bias;
  In* out;
  int tokens, rank;
};

// t[token][j] = scaling * sum over k of x[token][k] A[j][k]
template <class In, int kTokens>
__global__ void __launch_bounds__(kInnerThreads, 2)
    inner_kernel(const In* x, int tokens, int k, Dense lora_a, int rank, float scaling, float* t) {
  constexpr int kMine = kInnerRows<kTokens>;
  __shared__ float sums[kInnerThreads / 32][kMine * kTokens];
  const int first = blockIdx.x * kMine;
  float acc[kMine][kTokens] = {};
#pragma unroll 2
  for (int i = threadIdx.x; i < k; i += kInnerThreads) {
    float a[kMine];
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      a[j] = first + j < rank ? element(lora_a, static_cast<int64_t>(first + j) * k + i) : 0.0f;
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float value = token < tokens ? widen(x[static_cast<int64_t>(token) * k + i]) : 0.0f;
#pragma unroll
      for (int j = 0; j < kMine; ++j) acc[j][token] += a[j] * value;
    }
  }
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float sum = warp_sum(acc[j][token]);
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][j * kTokens + token] = sum;
    }
  }
  __syncthreads();
  const int j = threadIdx.x / kTokens, token = threadIdx.x % kTokens;
  if (j >= kMine || first + j >= rank || token >= tokens) return;
  float sum = 0;
  for (int warp = 0; warp < kInnerThreads / 32; ++warp) sum += sums[warp][threadIdx.x];
  t[token * rank + first + j] = scaling * sum;
}

template <bool kAligned>
using Chunks = typename ChunkOf<kAligned>::type[kGroups][2];

// The chunks of this lane's rows from its column on.
template <bool kAligned>
__device__ void load_rows(const NF4& weight, int column, Chunks<kAligned>& chunks) {
  const int lane_row = blockIdx.x * kRows + threadIdx.x % 32 / 4;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row + group * 16 + half * 8;
      load_chunk(weight, row, column, row < weight.n && column < weight.k, threadIdx.x % 4, chunks[group][half]);
    }
  }
}

template <bool kAligned>
__device__ void complete_rows(Chunks<kAligned>& chunks) {
#pragma unroll
  for (int i = 0; i < kGroups * 2; ++i) complete(chunks[i / 2][i % 2]);
}

// Writes this warp's sums of the split to partial [warps][kRows][kTokens]. Half precision: tensor cores.
template <bool kAligned, class In, int kTokens>
__device__ void partial_sums_half(const Few<In, kTokens>& layer, float* partial) {
  constexpr int kParts = kTokens / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int k = layer.weight.k;
  const float own = own_level();
  float acc[kGroups][kParts][4] = {};
  Chunks<kAligned> chunks;
  for (int first = warp * kStep; first < k; first += warps * kStep) {
    const int column = first + lane % 4 * kChunk;
    load_rows<kAligned>(layer.weight, column, chunks);
    uint32_t x[kParts][kChunk / 2];  // pairs of the token lane / 4
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int token = part * 8 + lane / 4;
      load_halves<kAligned, kChunk>(layer.x + static_cast<int64_t>(token) * k + column,
                                    token < layer.tokens ? k - column : 0, x[part]);
    }
    complete_rows<kAligned>(chunks);
#pragma unroll
    for (int e = 0; e < kChunk; e += 4) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t w[4];  // rows lane / 4 and + 8, elements e and e + 1; then e + 2 and e + 3
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& chunk = chunks[group][i % 2];
          const int at = e + i / 2 * 2;
          w[i] = narrow_pair<In>(look_up(own, chunk.word[at / 8], at % 8) * scale_of(chunk, at),
                                 look_up(own, chunk.word[at / 8], at % 8 + 1) * scale_of(chunk, at + 1));
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) mma<In>(acc[group][part], w, x[part][e / 2], x[part][e / 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = group * 16 + i / 2 * 8 + lane / 4, token = part * 8 + lane % 4 * 2 + i % 2;
        partial[(warp * kRows + row) * kTokens + token] = acc[group][part][i];
      }
    }
  }
}

// This warp's tokens from `first` on, kStep elements each, in its part of shared memory. Zeros beyond the row.
template <bool kAligned, int kTokens>
__device__ void stage(const Few<float, kTokens>& layer, int first, float* staged) {
  const int lane = threadIdx.x % 32, k = layer.weight.k;
  const int column = first + lane * 4;  // lane / 8 is the chunk it belongs to
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float* from = layer.x + static_cast<int64_t>(token) * k + column;
    float4 x = make_float4(0, 0, 0, 0);
    if constexpr (kAligned) {
      if (token < layer.tokens && column < k) x = __ldg(reinterpret_cast<const float4*>(from));
    } else {
      const int valid = token < layer.tokens ? k - column : 0;
      if (valid > 0) x.x = from[0];
      if (valid > 1) x.y = from[1];
      if (valid > 2) x.z = from[2];
      if (valid > 3) x.w = from[3];
    }
    *reinterpret_cast<float4*>(staged + token * kStagedRow + lane * 4 + lane / 8 * 4) = x;
  }
}

// As partial_sums_half, for float32. `staged` is [warps][kTokens][kStagedRow] and may overlap `partial`.
template <bool kAligned, int kTokens>
__device__ void partial_sums_float(const Few<float, kTokens>& layer, float* staged, float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float own = own_level();
  staged += warp * kTokens * kStagedRow;
  float acc[kGroups * 2][kTokens] = {};
  Chunks<kAligned> chunks;
  for (int first = warp * kStep; first < layer.weight.k; first += warps * kStep) {
    load_rows<kAligned>(layer.weight, first + lane % 4 * kChunk, chunks);
    stage<kAligned>(layer, first, staged);
    __syncwarp();
    complete_rows<kAligned>(chunks);
    // Not unrolled where there are many sums: the look-ups of all 128 codes ahead would take the registers.
#pragma unroll(kTokens == 1 && kAligned ? 4 : 1)
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        float w[kGroups * 2][4];
#pragma unroll
        for (int i = 0; i < kGroups * 8; ++i) {
          const auto& chunk = chunks[i / 8][i / 4 % 2];
          w[i / 4][i % 4] = look_up(own, chunk.word[0], e + i % 4) * scale_of(chunk, 8 * word + e + i % 4);
        }
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float4 x =
              *reinterpret_cast<const float4*>(staged + token * kStagedRow + lane % 4 * (kChunk + 4) + 8 * word + e);
#pragma unroll
          for (int i = 0; i < kGroups * 2; ++i) {
            float& sum = acc[i][token];
            sum += w[i][0] * x.x;
            sum += w[i][1] * x.y;
            sum += w[i][2] * x.z;
            sum += w[i][3] * x.w;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kGroups * 2; ++i) {
        auto& words = chunks[i / 2][i % 2].word;
        words[0] = words[1];
        words[1] = words[2];
        words[2] = words[3];
      }
    }
    __syncwarp();
  }
  __syncthreads();  // the staged tokens of other warps may lie where the sums go
#pragma unroll
  for (int i = 0; i < kGroups * 2; ++i) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float sum = acc[i][token];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == token % 4) partial[(warp * kRows + i * 8 + lane / 4) * kTokens + token] = sum;
    }
  }
}

// Adds the splits of each row, t B^T and the bias: a row per warp, the rank along its lanes, then a token per lane.
template <class In, int kTokens>
__device__ void finish(const Few<In, kTokens>& layer, const float* partial) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, n = layer.weight.n, rank = layer.rank;
  for (int i = threadIdx.x / 32; i < kRows; i += warps) {
    const int row = blockIdx.x * kRows + i;
    if (row >= n) return;
    float inner = 0;
    if (rank > 0) {
      float acc[kTokens] = {};
      for (int j = lane; j < rank; j += 32) {
        const float b = element(layer.lora_b, static_cast<int64_t>(row) * rank + j);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          if (token < layer.tokens) acc[token] += b * layer.t[token * rank + j];
        }
      }
      __syncwarp();
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float sum = warp_sum(acc[token]);
        inner = lane == token ? sum : inner;
      }
    }
    if (lane < layer.tokens) {
      float sum = 0;
      for (int split = 0; split < warps; ++split) sum += partial[(split * kRows + i) * kTokens + lane];
      sum += inner;
      if (layer.bias.data) sum += element(layer.bias, row);
      layer.out[static_cast<int64_t>(lane) * n + row] = narrow<In>(sum);
    }
    __syncwarp();
  }
}

// As many warps as the registers of their sums allow.
template <class In, int kTokens, bool kAligned>
constexpr int kFewWarps = kAligned && (!std::is_same_v<In, float> || kTokens <= 4) ? 16 : 8;

template <class In, int kTokens, bool kAligned>
__global__ void __launch_bounds__(32 * kFewWarps<In, kTokens, kAligned>, 1) few_kernel(Few<In, kTokens> layer) {
  const int first_token = blockIdx.y * kTokens;
  layer.x += static_cast<int64_t>(first_token) * layer.weight.k;
  layer.out += static_cast<int64_t>(first_token) * layer.weight.n;
  layer.t += static_cast<int64_t>(first_token) * layer.rank;
  layer.tokens = min(layer.tokens - first_token, kTokens);
  float* const partial = reinterpret_cast<float*>(shared_memory);
  if constexpr (std::is_same_v<In, float>) {
    partial_sums_float<kAligned>(layer, partial, partial);
  } else {
    partial_sums_half<kAligned>(layer, partial);
  }
  __syncthreads();
  finish(layer, partial);
}

// Launchers ----------------------------------------------------------------------------------------------------------

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class In, int kTokens>
cudaError_t launch_inner(const FewTokens& layer, cudaStream_t stream) {
  inner_kernel<In, kTokens><<<ceil_div(layer.rank, kInnerRows<kTokens>), kInnerThreads, 0, stream>>>(
      static_cast<const In*>(layer.x), layer.tokens, layer.weight.k, layer.lora_a, layer.rank, layer.scaling, layer.t);
  return cudaGetLastError();
}

template <class In>
cudaError_t launch_inner(const FewTokens& layer, cudaStream_t stream) {
  if (layer.rank == 0) return cudaSuccess;
  if (layer.tokens == 1) return launch_inner<In, 1>(layer, stream);
  return layer.tokens <= 8 ? launch_inner<In, 8>(layer, stream) : launch_inner<In, 16>(layer, stream);
}

template <class In, int kTokens, bool kAligned>
cudaError_t launch_few(const FewTokens& layer, cudaStream_t stream) {
  const Few<In, kTokens> few{.x = static_cast<const In*>(layer.x),
                             .weight = layer.weight,
                             .t = layer.t,
                             .lora_b = layer.lora_b,
                             .bias = layer.bias,
                             .out = static_cast<In*>(layer.out),
                             .tokens = layer.tokens,
                             .rank = layer.rank};
  const int warps = std::clamp(ceil_div(layer.weight.k, kStep), 1, kFewWarps<In, kTokens, kAligned>);
  const int staged = std::is_same_v<In, float> ? kTokens * kStagedRow : 0;
  const size_t bytes = sizeof(float) * warps * std::max(kRows * kTokens, staged);
  const auto kernel = few_kernel<In, kTokens, kAligned>;
  if (const cudaError_t error = allow_shared(kernel, bytes)) return error;
  const dim3 grid(ceil_div(layer.weight.n, kRows), ceil_div(layer.tokens, kTokens));
  kernel<<<grid, 32 * warps, bytes, stream>>>(few);
  return cudaGetLastError();
}

bool aligned(const FewTokens& layer) { return is_aligned(layer.weight) && is_vector(layer.x); }

template <class In, int kTokens>
cudaError_t launch(const FewTokens& layer, cudaStream_t stream) {
  return aligned(layer) ? launch_few<In, kTokens, true>(layer, stream) : launch_few<In, kTokens, false>(layer, stream);
}

template <class In>
cudaError_t launch_half(const FewTokens& layer, cudaStream_t stream) {
  if (const cudaError_t error = launch_inner<In>(layer, stream)) return error;
  return layer.tokens <= 8 ? launch<In, 8>(layer, stream) : launch<In, 16>(layer, stream);
}

cudaError_t launch_float(const FewTokens& layer, cudaStream_t stream) {
  if (const cudaError_t error = launch_inner<float>(layer, stream)) return error;
  if (layer.tokens == 1) return launch<float, 1>(layer, stream);
  if (layer.tokens <= 4) return launch<float, 4>(layer, stream);
  // Loose chunks take more registers: 4 tokens at a time, the weight read again from L2.
  return aligned(layer) ? launch_few<float, 16, true>(layer, stream) : launch_few<float, 4, false>(layer, stream);
}

}  // namespace

cudaError_t nf4_few_tokens(const FewTokens& layer, cudaStream_t stream) {
  switch (layer.type) {
    case Scalar::float16:
      return launch_half<__half>(layer, stream);
    case Scalar::bfloat16:
      return launch_half<__nv_bfloat16>(layer, stream);
    default:
      return launch_float(layer, stream);
  }
}

}  // namespace csikernels::cuda
