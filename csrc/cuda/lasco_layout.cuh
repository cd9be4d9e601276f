// Sizes, shared memory and the stream of weights of the tiled lasco_forward kernels.
//
// Shared memory. An operand of a product is [32 tokens][K] of the weights' type; rows start at multiples of 128 bytes.
// Its 16-byte units are permuted within each row by the token, so that the accesses of products (units of 4 or 8
// neighbouring tokens), of ldmatrix (8 tokens) and of what writes results meet every bank once.
//
// Stream. A warp computes 8 rows of a weight matrix at a time ("tile"). It reads its tiles in pieces of 8 rows x 64
// bytes, 16 bytes a lane, through a ring of its own in shared memory: cp.async runs kStages - 1 pieces ahead, over
// tiles, matrices, encoder blocks and networks, whatever barriers the block waits at meanwhile. Nobody else reads a
// warp's ring, so it needs no barrier of the block; every weight is read once.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/lasco.h"
#include "cuda/tensor_core.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kTokens = 32, kFeatures = 64, kHeads = 4;
constexpr int kTiledLayers = 6;  // at most
constexpr int kRowsOfTile = 8, kPieceBytes = 64, kUnit = 16;
constexpr int kStageBytes = kRowsOfTile * kPieceBytes;

__host__ __device__ constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <class Weight_, int kWidth_, int kWarps_, int kAtOnce_, int kParts_, int kStages_, int kBlocks_>
struct Config {
  using Weight = Weight_;
  static constexpr int kWidth = kWidth_, kFeedforward = 4 * kWidth, kHeadWidth = kWidth / kHeads;
  static constexpr int kWarps = kWarps_;    // that share a network
  static constexpr int kAtOnce = kAtOnce_;  // networks side by side: 2 (reference and proxy) or 1 (one after the other)
  static constexpr int kParts = kParts_;    // the hidden layer is computed in so many parts
  static constexpr int kHidden = kFeedforward / kParts;  // of a part
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarps * kAtOnce;

  __host__ __device__ static constexpr int row_bytes(int columns) {
    return round_up(columns * int(sizeof(Weight)), 128);
  }
  __host__ __device__ static constexpr int tiles(int rows) { return rows / (kRowsOfTile * kWarps); }
  __host__ __device__ static constexpr int chunks(int depth) { return depth * int(sizeof(Weight)) / kPieceBytes; }

  // Bytes of shared memory: per network | LayerNorm | residual stream | operand | qkv, hidden layer or input |, then
  // the rings and the list of products.
  static constexpr int kAffine = 4 * 2 * kWidth;
  static constexpr int kResidual = 4 * kTokens * kWidth;
  static constexpr int kOperand = kTokens * row_bytes(kWidth);
  static constexpr int kWide = kTokens * std::max({row_bytes(3 * kWidth), row_bytes(kHidden), row_bytes(kFeatures)});
  static constexpr int kNetwork = kAffine + kResidual + kOperand + kWide;
  static constexpr int kProductsOfBlock = 2 + 2 * kParts;
  static constexpr int kProducts = 2 + kTiledLayers * kProductsOfBlock;  // at most
  static constexpr int kRings = kAtOnce * kWarps * kStages * kStageBytes;
  static constexpr int kShared = kAtOnce * kNetwork + kRings + kSamKinds * kProducts * kUnit;

  static_assert(kFeatures % (kRowsOfTile * kWarps) == 0 && kWidth % (kRowsOfTile * kWarps) == 0, "warps share tiles");
  static_assert(kHidden % (kRowsOfTile * kWarps) == 0 && kWidth * sizeof(Weight) % kPieceBytes == 0);
  static_assert(kShared <= 99 * 1024, "more than every architecture has");
};

// What is added to the unit of an element of an operand, by its token, without a carry.
template <class Weight>
__device__ int permutation(int token) {
  if constexpr (sizeof(Weight) == 4) return (token & 3) << 1 | (token >> 2 & 1);
  return (token & 1) << 2 | (token >> 1 & 3);
}

// The address of an element of an operand.
template <class Weight, class Byte>
__device__ Byte* element(Byte* operand, int row_bytes, int token, int column) {
  const int byte = column * int(sizeof(Weight));
  return operand + token * row_bytes + ((byte / kUnit ^ permutation<Weight>(token)) * kUnit) + byte % kUnit;
}

__device__ inline void store_pair(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
__device__ inline void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}

template <class C>
__device__ void store_operand(unsigned char* operand, int row_bytes, int token, int column, float a, float b) {
  using Weight = typename C::Weight;
  store_pair(reinterpret_cast<Weight*>(element<Weight>(operand, row_bytes, token, column)), a, b);
}

// Of 4 neighbouring columns.
__device__ inline void store_four(float* to, float4 y) { *reinterpret_cast<float4*>(to) = y; }
__device__ inline void store_four(__nv_bfloat16* to, float4 y) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(y.x, y.y), high = __floats2bfloat162_rn(y.z, y.w);
  *reinterpret_cast<uint2*>(to) =
      make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

template <class C>
__device__ void store_operand(unsigned char* operand, int row_bytes, int token, int column, float4 y) {
  using Weight = typename C::Weight;
  store_four(reinterpret_cast<Weight*>(element<Weight>(operand, row_bytes, token, column)), y);
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 unit;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(unit.x), "=r"(unit.y), "=r"(unit.z), "=r"(unit.w)
               : "r"(address)
               : "memory");
  return unit;
}

// What a product reads of a matrix, by all warps of a network.
struct alignas(16) Matrix {
  const unsigned char* first;
  uint32_t row_units;  // from a row to the next, in units
  uint16_t tiles;      // of a warp
  uint16_t chunks;     // pieces of a row
};

// Writes the products of networks first..last into `list`, in the order of the forward; called by all `count` threads
// that share them, of which this is number `thread`. A table costs far less code than working it out in each product.
template <class C>
__device__ void list_matrices(const LascoCall& call, int first, int last, int64_t slot, int thread, Matrix* list) {
  constexpr int d = C::kWidth, ff = C::kFeedforward, size = sizeof(typename C::Weight);
  const int layers = static_cast<int>(call.sizes.layers), count = 2 + layers * C::kProductsOfBlock;
  for (int i = thread; i < count * (last - first + 1); i += 32 * C::kWarps) {
    const int network = first + i / count, product = i % count;
    const int block = (product - 1) / C::kProductsOfBlock, step = (product - 1) % C::kProductsOfBlock;
    const int part = (step - 2) / 2;
    // An entry [all_rows][all_depth]; of it `rows` x `depth` elements from number `from` on.
    int entry = 0, all_rows = d, all_depth = kFeatures, rows = d, depth = kFeatures, from = 0;
    if (product == count - 1) {
      entry = static_cast<int>(call.entries) - 2;
      all_rows = rows = kFeatures;
      all_depth = depth = d;
    } else if (product > 0) {
      entry = 3 + 12 * block + (step < 2 ? 2 * step : step % 2 == 0 ? 4 : 6);
      all_depth = depth = d;
      if (step == 0) all_rows = rows = 3 * d;
      if (step >= 2 && step % 2 == 0) {
        all_rows = ff;
        rows = C::kHidden;
        from = part * C::kHidden * d;
      } else if (step >= 2) {
        all_depth = ff;
        depth = C::kHidden;
        from = part * C::kHidden;
      }
    }
    const int64_t skipped = network == kProxySam ? slot * all_rows * all_depth : 0;
    list[i].first = static_cast<const unsigned char*>(call.weights[network][entry]) + (skipped + from) * size;
    list[i].row_units = all_depth * size / kUnit;
    list[i].tiles = C::tiles(rows);
    list[i].chunks = C::chunks(depth);
  }
}

// The weights of one warp, in the order in which it uses them.
template <class C>
class Stream {
 public:
  // list, end: the products to come; warp: within those that share a network; ring: of this warp.
  __device__ Stream(const Matrix* list, const Matrix* end, int warp, int lane, unsigned char* ring)
      : list_(list), end_(end), row_(warp * kRowsOfTile + lane / 4), unit_(lane % 4) {
    own_ = shared_address(ring) + lane / 4 * kPieceBytes + stage_unit(lane) * kUnit;
    open();
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) fetch(i * kStageBytes);
  }

  // Where in its row of a stage a lane puts its unit. Lanes of float32 read those of one another, of 4 rows at a time:
  // these are then in different banks.
  __device__ static int stage_unit(int lane) {
    return sizeof(typename C::Weight) == 4 ? (lane & 3) ^ (lane >> 3 & 3) : lane & 3;
  }

  // The shared address of this lane's unit of the next piece; orders the one kStages - 1 behind it.
  __device__ uint32_t take() {
    wait_for_copies<C::kStages - 2>();
    // The piece is there for all lanes, and all of them are done with the one before, whose place is filled next.
    if constexpr (sizeof(typename C::Weight) == 4) __syncwarp();
    constexpr int kLast = (C::kStages - 1) * kStageBytes;
    fetch(free_);
    free_ = at_;
    at_ = at_ == kLast ? 0 : at_ + kStageBytes;
    return own_ + free_;
  }

 private:
  __device__ void fetch(int stage) {
    if (tiles_ > 0) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(own_ + stage), "l"(next_) : "memory");
      next_ += tile_step_;
      if (--tile_ == 0) {
        tile_ = tiles_;
        next_ += to_next_chunk_;
        if (--chunks_ == 0) open();
      }
    }
    // Also where nothing is left, so that the number of groups behind a piece is always the same.
    commit_copies();
  }

  __device__ void open() {
    tiles_ = 0;
    if (list_ == end_) return;
    const Matrix matrix = *list_++;
    const int row_bytes = static_cast<int>(matrix.row_units) * kUnit;
    next_ = matrix.first + row_ * row_bytes + unit_ * kUnit;
    tile_step_ = C::kWarps * kRowsOfTile * row_bytes;
    tile_ = tiles_ = matrix.tiles;
    to_next_chunk_ = kPieceBytes - tiles_ * tile_step_;
    chunks_ = matrix.chunks;
  }

  const Matrix *list_, *end_;
  const int row_, unit_;                                // of this lane, in a tile and in a piece of a row
  uint32_t own_;                                        // where its unit lies in the first stage
  int at_ = 0, free_ = (C::kStages - 1) * kStageBytes;  // the stage to be taken next, and the one before; in bytes
  const unsigned char* next_;
  int tile_, tiles_, chunks_, tile_step_, to_next_chunk_;  // of the piece to be fetched next; tile_ and chunks_: left
};

}  // namespace
}  // namespace csikernels::cuda
