// lasco_forward at any sizes that lasco_tiled.cu has no kernel for; a block per sample, or per several.
//
// Formula: that of lasco_tiled.cu, with the same roundings. Arithmetic is float32; what a bfloat16 bank's products take
//   is rounded to bfloat16 first.
// Layout: activations lie in a workspace of the block in global memory, [tokens][columns], where the caches keep them,
//   so that no size is too large. Products go through tiles of 32 tokens x 64 columns x 16 deep in shared memory, 2 x 4
//   sums a thread; each weight is read once for 32 tokens. Attention: a warp per query and head, its scores in the
//   workspace.
// Bytes of a sample: both networks' weights, once per 32 tokens, and about 10 T d floats of workspace from the L2
// cache. Floor on an H100: 4 T (F d + L (2 d^2 + d ff + T d)) multiplications a network at 67 float32 TFLOP/s; this
// kernel
//   stays well below, since it waits for its tiles: sizes that matter belong into lasco_tiled.cu.
#include <algorithm>

#include "cuda/lasco.h"
#include "cuda/lasco_math.cuh"
#include "cuda/scalar.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileTokens = 32, kTileColumns = 64, kTileDepth = 16;
constexpr int kOwnTokens = 2, kOwnColumns = 4;  // of a thread
static_assert(kTileTokens * kTileColumns == kThreads * kOwnTokens * kOwnColumns);

// x as an operand of a product by such weights.
template <class Weight>
__device__ float rounded(float x) {
  return widen(narrow<Weight>(x));
}

// Shared memory of a product.
struct Tiles {
  float from[kTileDepth][kTileTokens + 1], weight[kTileDepth][kTileColumns + 1];
};

// One network on one sample, by the whole block.
template <class Weight>
struct GeneralSam {
  const LascoCall& call;
  const int tokens, features, width, heads, feedforward, layers;
  Tiles& tiles;
  int network;
  int64_t slot;
  float *residual, *operand, *wide, *scores;  // [T][d], [T][max(d, F)], [T][max(3 d, ff)], [kWarps][T]

  template <class T>
  __device__ const T* weights(int entry, int64_t count) const {
    return static_cast<const T*>(call.weights[network][entry]) + (network == kProxySam ? slot * count : 0);
  }

  // from [T][depth] by weights[entry] [rows][depth], plus the bias that follows it: emit(token, column, sum).
  template <class Emit>
  __device__ void product(const float* from, int entry, int rows, int depth, const Emit& emit) const {
    auto& [from_tile, weight_tile] = tiles;
    const Weight* weight = weights<Weight>(entry, int64_t(rows) * depth);
    const float* bias = weights<float>(entry + 1, rows);
    const int own_token = threadIdx.x / (kTileColumns / kOwnColumns), own_column = threadIdx.x % 16;
    for (int first_token = 0; first_token < tokens; first_token += kTileTokens) {
      for (int first_row = 0; first_row < rows; first_row += kTileColumns) {
        float sums[kOwnTokens][kOwnColumns] = {};
        for (int first = 0; first < depth; first += kTileDepth) {
          __syncthreads();
#pragma unroll
          for (int k = 0; k < kTileTokens * kTileDepth / kThreads; ++k) {
            const int i = k * kThreads + threadIdx.x, column = first + i % kTileDepth;
            const int token = first_token + i / kTileDepth;
            const bool inside = token < tokens && column < depth;
            from_tile[i % kTileDepth][i / kTileDepth] = inside ? from[int64_t(token) * depth + column] : 0;
          }
#pragma unroll
          for (int k = 0; k < kTileColumns * kTileDepth / kThreads; ++k) {
            const int i = k * kThreads + threadIdx.x, column = first + i % kTileDepth, row = first_row + i / kTileDepth;
            const bool inside = row < rows && column < depth;
            weight_tile[i % kTileDepth][i / kTileDepth] = inside ? widen(weight[int64_t(row) * depth + column]) : 0;
          }
          __syncthreads();
#pragma unroll
          for (int k = 0; k < kTileDepth; ++k) {
#pragma unroll
            for (int i = 0; i < kOwnTokens; ++i) {
#pragma unroll
              for (int j = 0; j < kOwnColumns; ++j) {
                sums[i][j] = fmaf(from_tile[k][own_token + 16 * i], weight_tile[k][own_column + 16 * j], sums[i][j]);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kOwnTokens; ++i) {
#pragma unroll
          for (int j = 0; j < kOwnColumns; ++j) {
            const int token = first_token + own_token + 16 * i, row = first_row + own_column + 16 * j;
            if (token < tokens && row < rows) emit(token, row, sums[i][j] + bias[row]);
          }
        }
      }
    }
    __syncthreads();
  }

  // operand = LayerNorm(residual), and so the residual stream itself where `keep`; a warp per token.
  __device__ void normalise(int entry, bool keep) const {
    const float *gain = weights<float>(entry, width), *offset = weights<float>(entry + 1, width);
    const int lane = threadIdx.x % 32;
    for (int token = threadIdx.x / 32; token < tokens; token += kWarps) {
      float* const x = residual + int64_t(token) * width;
      float sum = 0, squares = 0;
      for (int i = lane; i < width; i += 32) sum += x[i];
      const float mean = warp_sum(sum) / width;
      for (int i = lane; i < width; i += 32) squares = fmaf(x[i] - mean, x[i] - mean, squares);
      const float scale = rsqrtf(warp_sum(squares) / width + call.sizes.eps);
      for (int i = lane; i < width; i += 32) {
        const float y = fmaf((x[i] - mean) * scale, gain[i], offset[i]);
        if (keep) x[i] = y;
        operand[int64_t(token) * width + i] = rounded<Weight>(y);
      }
    }
    __syncthreads();
  }

  // operand = softmax(queries keys^T / sqrt(size)) values per head, all of them in `wide`, rounded.
  __device__ void attend() const {
    const int size = width / heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float scale = rsqrtf(float(size)) * kLog2e;
    float* const score = scores + int64_t(warp) * tokens;
    for (int64_t task = warp; task < int64_t(tokens) * heads; task += kWarps) {
      const int query = static_cast<int>(task / heads), head = static_cast<int>(task % heads);
      const auto part = [&](int token, int of) { return wide + (int64_t(token) * 3 + of) * width + head * size; };
      float most = -INFINITY, total = 0;
      for (int key = lane; key < tokens; key += 32) {
        float sum = 0;
        for (int i = 0; i < size; ++i) sum = fmaf(part(query, 0)[i], part(key, 1)[i], sum);
        score[key] = sum * scale;
        most = fmaxf(most, score[key]);
      }
      most = warp_max(most);
      for (int key = lane; key < tokens; key += 32) {
        score[key] = exp2_fast(score[key] - most);
        total += score[key];
      }
      const float share = 1 / warp_sum(total);
      __syncwarp();
      for (int i = lane; i < size; i += 32) {
        float sum = 0;
        for (int key = 0; key < tokens; ++key) sum = fmaf(rounded<Weight>(score[key] * share), part(key, 2)[i], sum);
        operand[int64_t(query) * width + head * size + i] = rounded<Weight>(sum);
      }
      __syncwarp();
    }
    __syncthreads();
  }

  __device__ void add(const float* from, int entry, int depth) const {
    product(from, entry, width, depth,
            [&](int token, int column, float y) { residual[int64_t(token) * width + column] += y; });
  }

  // The encoder's result as an operand.
  __device__ void encode(const float* h) const {
    const bool norm_first = call.sizes.norm_first, gelu = call.sizes.gelu;
    for (int i = threadIdx.x; i < tokens * features; i += kThreads) wide[i] = rounded<Weight>(h[i]);
    __syncthreads();
    const float* position = weights<float>(2, int64_t(tokens) * width);
    product(wide, 0, width, features, [&](int token, int column, float y) {
      const int64_t at = int64_t(token) * width + column;
      residual[at] = y + position[at];
      operand[at] = rounded<Weight>(residual[at]);
    });
    for (int block = 0; block < layers; ++block) {
      const int entry = 3 + 12 * block;
      if (norm_first) normalise(entry + 8, false);
      product(operand, entry, 3 * width, width,
              [&](int token, int column, float y) { wide[int64_t(token) * 3 * width + column] = rounded<Weight>(y); });
      attend();
      add(operand, entry + 2, width);
      normalise(entry + (norm_first ? 10 : 8), !norm_first);
      product(operand, entry + 4, feedforward, width, [&](int token, int column, float y) {
        wide[int64_t(token) * feedforward + column] = rounded<Weight>(activate(y, gelu));
      });
      add(wide, entry + 6, feedforward);
      if (!norm_first) normalise(entry + 10, true);
    }
    if (call.sizes.final_norm) {
      normalise(3 + 12 * layers, false);
    } else if (norm_first) {
      for (int i = threadIdx.x; i < tokens * width; i += kThreads) operand[i] = rounded<Weight>(residual[i]);
      __syncthreads();
    }
  }
};

template <class Weight>
__global__ void __launch_bounds__(kThreads, 1)
    lasco_general_kernel(const __grid_constant__ LascoCall call, float* workspace, int64_t floats) {
  __shared__ Tiles tiles;
  const SamSizes& s = call.sizes;
  const int tokens = static_cast<int>(s.tokens), features = static_cast<int>(s.features);
  const int width = static_cast<int>(s.width), feedforward = static_cast<int>(s.feedforward);
  GeneralSam<Weight> sam{.call = call,
                         .tokens = tokens,
                         .features = features,
                         .width = width,
                         .heads = static_cast<int>(s.heads),
                         .feedforward = feedforward,
                         .layers = static_cast<int>(s.layers),
                         .tiles = tiles};
  sam.residual = workspace + blockIdx.x * floats;
  sam.operand = sam.residual + int64_t(tokens) * width;
  sam.wide = sam.operand + int64_t(tokens) * width;
  sam.scores = sam.wide + int64_t(tokens) * max(max(3 * width, feedforward), features);
  for (int64_t sample = blockIdx.x; sample < call.samples; sample += gridDim.x) {
    sam.slot = call.slot[sample];
    if (sam.slot < 0 || sam.slot >= call.slots) __trap();  // as torch's own indexing does
    const int64_t first = sample * tokens * features;
    const float alpha = call.alpha[sam.slot];
#pragma unroll 1
    for (sam.network = kReferenceSam; sam.network < kSamKinds; ++sam.network) {
      sam.encode(call.h_in + first);
      sam.product(sam.operand, static_cast<int>(call.entries) - 2, features, width,
                  [&](int token, int column, float y) {
                    const int64_t at = first + int64_t(token) * features + column;
                    if (sam.network == kProxySam) {
                      call.output[at] += y;
                      return;
                    }
                    const float shift = call.base_output[at] - y;
                    if (call.shift) call.shift[at] = shift;
                    call.output[at] = alpha * shift;
                  });
    }
  }
}

}  // namespace

int64_t general_workspace(const SamSizes& s) {
  return s.tokens * (2 * s.width + std::max({3 * s.width, s.feedforward, s.features}) + kWarps);
}

cudaError_t lasco_general(const LascoCall& call, float* workspace, int blocks, cudaStream_t stream) {
  const int64_t floats = general_workspace(call.sizes);
  if (call.sizes.bfloat16) {
    lasco_general_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(call, workspace, floats);
  } else {
    lasco_general_kernel<float><<<blocks, kThreads, 0, stream>>>(call, workspace, floats);
  }
  return cudaGetLastError();
}

}  // namespace csikernels::cuda
