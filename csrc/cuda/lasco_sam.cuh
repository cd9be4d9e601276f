// One network on one sample, through every step, for the tiled lasco_forward kernels.
#pragma once

#include <cuda_bf16.h>

#include "cuda/lasco_attention.cuh"
#include "cuda/lasco_layout.cuh"
#include "cuda/lasco_math.cuh"
#include "cuda/lasco_product.cuh"

namespace csikernels::cuda {
namespace {

// One network on one sample, by the C::kWarps warps that share it. Networks side by side run in lock step: a barrier is
// one of the whole block.
template <class C>
struct Sam {
  using Weight = typename C::Weight;
  static constexpr int kNone = -1, kResidualBytes = 4 * C::kWidth;

  const LascoCall& call;
  const int64_t sample, slot;
  const int warp, lane;
  float* const affine;            // [2][d]: weight and bias of the next LayerNorm
  unsigned char* const residual;  // [32][d], float32
  unsigned char* const operand;   // [32][d]
  unsigned char* const wide;      // [32][3 d] as qkv, [32][kHidden] or [32][F]
  Stream<C> stream;
  int network;

  // An entry of the flat weight list that has `count` elements a network, float32.
  __device__ const float* vector(int entry, int count) const {
    return static_cast<const float*>(call.weights[network][entry]) + (network == kProxySam ? slot * count : 0);
  }

  // Calls visit(token, column, i) for the elements that this lane has of a tile.
  template <class Visit>
  __device__ void each(int tile, const Visit& visit) const {
    const int column = (tile * C::kWarps + warp) * kRowsOfTile + 2 * pair_of<Weight>(lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(row_of<Weight>(lane) + 8 * i, column, i);
  }

  // The warp's share of a bias, requested before a product and used after it: each value is held by one lane.
  template <int kTiles>
  struct Bias {
    static constexpr int kTilesOfLane = 32 / kRowsOfTile;
    float own[round_up(kTiles, kTilesOfLane) / kTilesOfLane];

    __device__ Bias(const float* bias, int warp, int lane) {
#pragma unroll
      for (int k = 0; k < kTiles; k += kTilesOfLane) {
        const int tile = k + lane / kRowsOfTile;
        const bool inside = tile < kTiles;
        own[k / kTilesOfLane] = inside ? bias[(tile * C::kWarps + warp) * kRowsOfTile + lane % kRowsOfTile] : 0;
      }
    }

    __device__ float2 pair(int tile, int lane) const {
      const float own_tile = own[tile / kTilesOfLane];
      const int from = tile % kTilesOfLane * kRowsOfTile + 2 * pair_of<Weight>(lane);
      return make_float2(__shfl_sync(kWarp, own_tile, from), __shfl_sync(kWarp, own_tile, from + 1));
    }
  };

  // operand [32][kDepth] by weights of 8 kTiles kWarps rows, added to `sums`.
  template <int kDepth, int kTiles>
  __device__ void multiply_add(const unsigned char* from, Sums<kTiles>& sums) {
    multiply<C, kDepth, kTiles>(from, stream, lane, sums, static_cast<Weight*>(nullptr));
  }

  // Sums plus bias go to emit(token, column, sum, sum of the next column).
  template <int kTiles, class Emit>
  __device__ void finish(const Sums<kTiles>& sums, const Bias<kTiles>& bias, const Emit& emit) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 offset = bias.pair(tile, lane);
      each(tile, [&](int token, int column, int i) {
        emit(token, column, sums[tile][i][0] + offset.x, sums[tile][i][1] + offset.y);
      });
    }
  }

  template <int kDepth, int kTiles, class Emit>
  __device__ void product(const unsigned char* from, const float* bias, const Emit& emit) {
    const Bias<kTiles> offset(bias, warp, lane);
    Sums<kTiles> sums = {};
    multiply_add<kDepth, kTiles>(from, sums);
    finish<kTiles>(sums, offset, emit);
  }

  // The input as an operand, in `wide`.
  __device__ void stage() const {
    const float4* h = reinterpret_cast<const float4*>(call.h_in + sample * kTokens * kFeatures);
    constexpr int kCount = kTokens * kFeatures / 4, kStep = 32 * C::kWarps;
#pragma unroll
    for (int k = 0; k < kCount / kStep; ++k) {
      const int i = k * kStep + 32 * warp + lane, token = i / (kFeatures / 4), column = i % (kFeatures / 4) * 4;
      store_operand<C>(wide, C::row_bytes(kFeatures), token, column, h[i]);
    }
  }

  // residual and operand = input(h) + position
  __device__ void embed() {
    constexpr int kTiles = C::tiles(C::kWidth);
    const float* position = vector(2, kTokens * C::kWidth);
    Sums<kTiles> sums;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      each(tile, [&](int token, int column, int i) {
        const float2 own = *reinterpret_cast<const float2*>(position + token * C::kWidth + column);
        sums[tile][i][0] = own.x;
        sums[tile][i][1] = own.y;
      });
    }
    const Bias<kTiles> bias(vector(1, C::kWidth), warp, lane);
    const float requested = request(call.sizes.norm_first ? 3 + 8 : kNone);
    multiply_add<kFeatures, kTiles>(wide, sums);
    finish<kTiles>(sums, bias, [&](int token, int column, float a, float b) {
      store_pair(reinterpret_cast<float*>(element<float>(residual, kResidualBytes, token, column)), a, b);
      store_operand<C>(operand, C::row_bytes(C::kWidth), token, column, a, b);
    });
    keep(requested);
  }

  // A norm's weight and bias come by way of shared memory: requested before a product, stored after it, for the
  // normalise() behind the next barrier.
  __device__ float request(int norm) const {
    static_assert(2 * C::kWidth <= 32 * C::kWarps);
    const int own = 32 * warp + lane;
    return norm != kNone && own < 2 * C::kWidth ? vector(norm + own / C::kWidth, C::kWidth)[own % C::kWidth] : 0;
  }
  __device__ void keep(float requested) const {
    if (32 * warp + lane < 2 * C::kWidth) affine[32 * warp + lane] = requested;
  }

  // Tokens of this lane where 8 lanes share one.
  template <class Visit>
  __device__ void rows(const Visit& visit) const {
#pragma unroll
    for (int token = 4 * warp + lane / 8; token < kTokens; token += 4 * C::kWarps) visit(token);
  }

  __device__ float4* residual_at(int token, int column) const {
    return reinterpret_cast<float4*>(element<float>(residual, kResidualBytes, token, column));
  }

  __device__ void store_four(int token, int column, float4 y) const {
    store_operand<C>(operand, C::row_bytes(C::kWidth), token, column, y);
  }

  // operand = LayerNorm(residual), and so the residual stream itself where `replace`; 8 lanes a token.
  __device__ void normalise(bool replace) const {
    constexpr int kOwn = C::kWidth / 32;
    const int first = lane % 8 * 4;
    rows([&](int token) {
      float4 x[kOwn];
      float sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        x[u] = *residual_at(token, first + 32 * u);
        sum += (x[u].x + x[u].y) + (x[u].z + x[u].w);
      }
      const float mean = sum_of_8(sum) * (1.0f / C::kWidth);
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        x[u] = make_float4(x[u].x - mean, x[u].y - mean, x[u].z - mean, x[u].w - mean);
        squares += (x[u].x * x[u].x + x[u].y * x[u].y) + (x[u].z * x[u].z + x[u].w * x[u].w);
      }
      const float scale = rsqrtf(sum_of_8(squares) * (1.0f / C::kWidth) + call.sizes.eps);
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        const int column = first + 32 * u;
        const float4 gain = *reinterpret_cast<const float4*>(affine + column);
        const float4 offset = *reinterpret_cast<const float4*>(affine + C::kWidth + column);
        const float4 y = make_float4(fmaf(x[u].x * scale, gain.x, offset.x), fmaf(x[u].y * scale, gain.y, offset.y),
                                     fmaf(x[u].z * scale, gain.z, offset.z), fmaf(x[u].w * scale, gain.w, offset.w));
        if (replace) *residual_at(token, column) = y;
        store_four(token, column, y);
      }
    });
    __syncthreads();
  }

  // operand = residual
  __device__ void convert() const {
    rows([&](int token) {
#pragma unroll
      for (int column = lane % 8 * 4; column < C::kWidth; column += 32) {
        store_four(token, column, *residual_at(token, column));
      }
    });
    __syncthreads();
  }

  __device__ void add_to_residual(int token, int column, float a, float b) const {
    float2& x = *reinterpret_cast<float2*>(element<float>(residual, kResidualBytes, token, column));
    x = make_float2(x.x + a, x.y + b);
  }

  // residual += attention(operand); the operand is overwritten. `norm` is that of the next normalise().
  __device__ void attention(int entry, int norm) {
    product<C::kWidth, C::tiles(3 * C::kWidth)>(
        operand, vector(entry + 1, 3 * C::kWidth), [&](int token, int column, float a, float b) {
          store_operand<C>(wide, C::row_bytes(3 * C::kWidth), token, column, a, b);
        });
    __syncthreads();
    for (int task = warp; task < kTasks; task += C::kWarps) {
      attend<C>(wide, operand, task, lane, static_cast<Weight*>(nullptr));
    }
    __syncthreads();
    const float requested = request(norm);
    product<C::kWidth, C::tiles(C::kWidth)>(
        operand, vector(entry + 3, C::kWidth),
        [&](int token, int column, float a, float b) { add_to_residual(token, column, a, b); });
    keep(requested);
    __syncthreads();
  }

  // residual += down(activation(up(operand)))
  __device__ void feed_forward(int entry, int norm) {
    constexpr int kTiles = C::tiles(C::kHidden), kOwn = C::tiles(C::kWidth);
    const Bias<kOwn> bias(vector(entry + 3, C::kWidth), warp, lane);
    const float requested = request(norm);
    Sums<kOwn> sums = {};
#pragma unroll 1
    for (int part = 0; part < C::kParts; ++part) {
      if (part > 0) __syncthreads();
      product<C::kWidth, kTiles>(operand, vector(entry + 1, C::kFeedforward) + part * C::kHidden,
                                 [&](int token, int column, float a, float b) {
                                   const bool gelu = call.sizes.gelu;
                                   store_operand<C>(wide, C::row_bytes(C::kHidden), token, column, activate(a, gelu),
                                                    activate(b, gelu));
                                 });
      __syncthreads();
      multiply_add<C::kHidden, kOwn>(wide, sums);
    }
    finish<kOwn>(sums, bias, [&](int token, int column, float a, float b) { add_to_residual(token, column, a, b); });
    keep(requested);
    __syncthreads();
  }

  // The encoder's result as an operand.
  __device__ void encode() {
    const int layers = static_cast<int>(call.sizes.layers),
              final_norm = call.sizes.final_norm ? 3 + 12 * layers : kNone;
    const bool norm_first = call.sizes.norm_first;
    for (int block = 0; block < layers; ++block) {
      const int entry = 3 + 12 * block, norm1 = entry + 8, norm2 = entry + 10;
      if (norm_first) normalise(false);
      attention(entry, norm_first ? norm2 : norm1);
      normalise(!norm_first);
      feed_forward(entry + 4, !norm_first ? norm2 : block + 1 < layers ? norm1 + 12 : final_norm);
      if (!norm_first) normalise(true);
    }
    if (final_norm != kNone) {
      if (!norm_first) {
        keep(request(final_norm));
        __syncthreads();
      }
      normalise(false);
    } else if (norm_first) {
      convert();
    }
  }

  // output = proxy + alpha shift with shift = base - reference. The reference's share is written first, and added to by
  // the proxy's lane of the same place, on the other side of a barrier.
  __device__ void project() {
    constexpr int kTiles = C::tiles(kFeatures);
    const int entry = static_cast<int>(call.entries) - 2;
    const int64_t first = sample * kTokens * kFeatures;
    const bool reference = network == kReferenceSam;
    const Bias<kTiles> bias(vector(entry + 1, kFeatures), warp, lane);
    Sums<kTiles> sums = {};
    if (reference) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        each(tile, [&](int token, int column, int i) {
          const float2 base = *reinterpret_cast<const float2*>(call.base_output + first + token * kFeatures + column);
          sums[tile][i][0] = -base.x;
          sums[tile][i][1] = -base.y;
        });
      }
    }
    multiply_add<C::kWidth, kTiles>(operand, sums);
    const float alpha = call.alpha[slot];
    const auto place = [&](float* of, int token, int column) {
      return reinterpret_cast<float2*>(of + first + token * kFeatures + column);
    };
    if (reference) {
      finish<kTiles>(sums, bias, [&](int token, int column, float a, float b) {
        if (call.shift) *place(call.shift, token, column) = make_float2(-a, -b);
        *place(call.output, token, column) = make_float2(-alpha * a, -alpha * b);
      });
    }
    __syncthreads();
    if (!reference) {
      finish<kTiles>(sums, bias, [&](int token, int column, float a, float b) {
        float2* const y = place(call.output, token, column);
        *y = make_float2(y->x + a, y->y + b);
      });
    }
  }
};

}  // namespace
}  // namespace csikernels::cuda
