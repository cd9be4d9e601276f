// Product of half-precision rows with an NF4 weight and an adapter on tensor cores, forward and backward.
//
//   forward:  out [M, N] = x W^T + t B^T + bias     (t = scaling * x A^T, [M, r])
//   backward: out [M, K] = g W + u A                (u = scaling * g B, [M, r])
//
// Tiling: a block of 8 warps owns 128 (or 64) rows by 128 outputs and walks the reduction in steps of 64. A step of the
//   weight is 8,192 codes, 32 per thread: one 16-byte load into registers a step ahead, decoded (float32 level times
//   scale, rounded once) into shared memory for ldmatrix. Rows come by cp.async, three steps in flight. Decoding step
//   i + 1 and multiplying step i stand between the same barriers, so that warps overlap the two. The adapter is the
//   last steps of the reduction, its rank filled up with zeros. ldmatrix.trans serves the backward: W is stored the
//   same way there, along K, which is then the output.
// Shared memory: rows 3 x 16 (or 8) KB, weight 2 x 16 KB: 80 (56) KB, 2 blocks per SM where there is room. Pieces of 16
//   bytes change places within 8 rows, so that ldmatrix and the stores meet in no bank (two ways in the backward).
// Few rows: the reduction is cut so that 2 blocks per SM have work; float32 sums of the parts are added by a second
//   launch in the order of the parts, so that results are deterministic.
// FLOPs 2 M N K + 2 M r N; bytes N K (1/2 + 4/block) + 2 M (N + K + r) + adapter; every tile reads its rows and its
//   part of the weight, what tiles share from L2. Floor on an H100 at M = N = K = 4096, r = 16: 0.14 ms at 990 TFLOP/s,
//   of which mma.sync reaches about 60 %; 23 us of bytes. Decoding costs a tile of 128 rows 3.5 instructions per weight
//   for 128 multiply-adds.
#include "cuda/nf4_lora_mma.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOutputs = 128;  // of a tile
constexpr int kStep = 64;      // of the reduction
constexpr int kStages = 3;
static_assert(kOutputs * kStep == kThreads * kChunk);
constexpr int kWeightBytes = kOutputs * kStep * 2;

template <int kRows>
constexpr int kLeftBytes = kRows * kStep * 2;
template <int kRows>
constexpr int kSharedBytes = kStages * kLeftBytes<kRows> + 2 * kWeightBytes;

extern __shared__ __align__(128) unsigned char shared_memory[];

// Where the 16-byte piece of a row lies: rows are a multiple of 128 bytes long.
template <int kRowBytes>
__device__ int place(int row, int piece) {
  return row * kRowBytes + (piece ^ (row % 8)) * 16;
}

struct Product {
  const uint16_t* left;
  NF4 weight;
  const uint16_t *inner, *right;
  Dense bias;
  void* out;
  float* partial;
  int rows, reduction, outputs, rank, steps_per_split;
  bool adapter_vectors;  // whether rows of inner and right are whole aligned 16-byte vectors
};

template <class In, int kRows, bool kBackward, bool kAligned>
struct Tile {
  using AnyChunk = typename ChunkOf<kAligned>::type;
  static constexpr int kWeightRow = kBackward ? kOutputs * 2 : kStep * 2;   // bytes
  static constexpr int kWarpRows = kRows / 2, kWarpOutputs = kOutputs / 4;  // 2 x 4 warps
  static constexpr int kRowParts = kWarpRows / 16, kOutputParts = kWarpOutputs / 8;

  const Product& p;
  const int first_row, first_output, weight_steps;
  const float own;
  // This thread's 32 codes of a step: the row of the tile of W, and the column they begin at.
  const int chunk_row, chunk_column;
  float acc[kRowParts][kOutputParts][4];

  __device__ explicit Tile(const Product& product)
      : p(product),
        first_row(blockIdx.x * kRows),
        first_output(blockIdx.y * kOutputs),
        weight_steps((product.reduction + kStep - 1) / kStep),
        own(own_level()),
        chunk_row(kBackward ? threadIdx.x / 4 : threadIdx.x / 2),
        chunk_column(kBackward ? threadIdx.x % 4 * kChunk : threadIdx.x % 2 * kChunk),
        acc{} {}

  static __device__ unsigned char* left(int step) { return shared_memory + step % kStages * kLeftBytes<kRows>; }
  static __device__ unsigned char* weight(int step) {
    return shared_memory + kStages * kLeftBytes<kRows> + step % 2 * kWeightBytes;
  }

  // Rows of the left operand for a step, of `columns` columns from `first` on. Asynchronous where that is possible.
  __device__ void load_left(int step) const {
    const bool adapter = step >= weight_steps;
    const int first = (adapter ? step - weight_steps : step) * kStep, columns = adapter ? p.rank : p.reduction;
    const uint16_t* const from = adapter ? p.inner : p.left;
    unsigned char* const to = left(step);
#pragma unroll
    for (int i = 0; i < kRows * 8 / kThreads; ++i) {
      const int row = (threadIdx.x + i * kThreads) / 8, piece = threadIdx.x % 8, column = first + piece * 8;
      const int64_t at = static_cast<int64_t>(first_row + row) * columns + column;
      const bool inside = first_row + row < p.rows && column < columns;
      if (kAligned && (!adapter || p.adapter_vectors)) {
        copy_async(shared_address(to + place<kStep * 2>(row, piece)), inside ? from + at : from, inside);
      } else {
        uint32_t pairs[4];
        load_halves<false, 8>(from + at, inside ? columns - column : 0, pairs);
        *reinterpret_cast<uint4*>(to + place<kStep * 2>(row, piece)) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }

  // The weight's row and column of this thread's codes, and whether they are codes.
  __device__ bool locate(int step, int& row, int& column) const {
    row = chunk_row + (kBackward ? step * kStep : first_output);
    column = chunk_column + (kBackward ? first_output : step * kStep);
    return step < weight_steps && row < p.weight.n && column < p.weight.k;
  }

  __device__ void load_weight(int step, AnyChunk& chunk) const {
    int row, column;
    const bool inside = locate(step, row, column);
    load_chunk(p.weight, row, column, inside, threadIdx.x % (kBackward ? 4 : 2), chunk);
  }

  __device__ void store_weight(int step, AnyChunk& chunk) const {
    complete(chunk);
    unsigned char* const to = weight(step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float first = look_up(own, chunk.word[i], 2 * j) * scale_of(chunk, 8 * i + 2 * j);
        const float second = look_up(own, chunk.word[i], 2 * j + 1) * scale_of(chunk, 8 * i + 2 * j + 1);
        pairs[j] = narrow_pair<In>(first, second);
      }
      *reinterpret_cast<uint4*>(to + place<kWeightRow>(chunk_row, chunk_column / 8 + i)) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  // In place of the weight, the adapter's: B [outputs, rank], or A [rank, outputs] in the backward.
  __device__ void store_adapter(int step) const {
    const int first = (step - weight_steps) * kStep, columns = kBackward ? p.outputs : p.rank;
    const int row = chunk_row + (kBackward ? first : first_output);
    const bool inside = row < (kBackward ? p.rank : p.outputs);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int column = chunk_column + 8 * i + (kBackward ? first_output : first);
      const uint16_t* const from = p.right + static_cast<int64_t>(row) * columns + column;
      uint32_t pairs[4];
      if (kAligned && p.adapter_vectors) {
        load_halves<true, 8>(from, inside ? columns - column : 0, pairs);
      } else {
        load_halves<false, 8>(from, inside ? columns - column : 0, pairs);
      }
      *reinterpret_cast<uint4*>(weight(step) + place<kWeightRow>(chunk_row, chunk_column / 8 + i)) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  __device__ void multiply(int step) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char *const rows = left(step), *const weights = weight(step);
    const int row = warp / 4 * kWarpRows + lane % 16, output = warp % 4 * kWarpOutputs;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kRowParts][4], b[kOutputParts / 2][4];
#pragma unroll
      for (int i = 0; i < kRowParts; ++i) {
        load_matrices<false>(a[i], shared_address(rows + place<kStep * 2>(row + i * 16, k / 8 + lane / 16)));
      }
#pragma unroll
      for (int j = 0; j < kOutputParts / 2; ++j) {
        const int column = output + j * 16;
        const int at = kBackward ? place<kWeightRow>(k + lane % 16, column / 8 + lane / 16)
                                 : place<kWeightRow>(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2);
        load_matrices<kBackward>(b[j], shared_address(weights + at));
      }
#pragma unroll
      for (int i = 0; i < kRowParts; ++i) {
#pragma unroll
        for (int j = 0; j < kOutputParts; ++j) mma<In>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  __device__ void store() const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = first_row + warp / 4 * kWarpRows + lane / 4;
    const int output0 = first_output + warp % 4 * kWarpOutputs + lane % 4 * 2;
    const bool pairs = p.outputs % 2 == 0;
#pragma unroll
    for (int j = 0; j < kOutputParts; ++j) {
      const int output = output0 + j * 8;
      const bool first = output < p.outputs, second = output + 1 < p.outputs;
      float bias[2] = {};
      if (p.bias.data && !p.partial) {
        if (first) bias[0] = element(p.bias, output);
        if (second) bias[1] = element(p.bias, output + 1);
      }
#pragma unroll
      for (int i = 0; i < kRowParts * 2; ++i) {
        const int row = row0 + i * 8;
        if (row >= p.rows || !first) continue;
        const float sums[2] = {acc[i / 2][j][i % 2 * 2] + bias[0], acc[i / 2][j][i % 2 * 2 + 1] + bias[1]};
        const int64_t at = static_cast<int64_t>(row) * p.outputs + output;
        if (p.partial) {
          float* const to = p.partial + static_cast<int64_t>(blockIdx.z) * p.rows * p.outputs + at;
          to[0] = sums[0];
          if (second) to[1] = sums[1];
        } else if (pairs) {
          *reinterpret_cast<uint32_t*>(static_cast<In*>(p.out) + at) = narrow_pair<In>(sums[0], sums[1]);
        } else {
          static_cast<In*>(p.out)[at] = narrow<In>(sums[0]);
          if (second) static_cast<In*>(p.out)[at + 1] = narrow<In>(sums[1]);
        }
      }
    }
  }
};

template <class In, int kRows, bool kBackward, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) product_kernel(const __grid_constant__ Product p) {
  Tile<In, kRows, kBackward, kAligned> tile(p);
  const int all = tile.weight_steps + (p.rank + kStep - 1) / kStep;
  const int begin = blockIdx.z * p.steps_per_split, end = min(all, begin + p.steps_per_split);
  typename ChunkOf<kAligned>::type chunk;
  tile.load_weight(begin, chunk);
  tile.load_left(begin);
  commit_copies();
  if (begin + 1 < end) tile.load_left(begin + 1);
  commit_copies();
  const auto store_weight = [&](int step) {
    if (step < tile.weight_steps) {
      tile.store_weight(step, chunk);
    } else {
      tile.store_adapter(step);
    }
  };
  store_weight(begin);
  tile.load_weight(begin + 1, chunk);
  for (int step = begin; step < end; ++step) {
    wait_for_copies<1>();
    // The rows and the weight of this step are there, and what is overwritten below has been read by all warps.
    __syncthreads();
    if (step + 2 < end) tile.load_left(step + 2);
    commit_copies();
    if (step + 1 < end) {
      store_weight(step + 1);
      tile.load_weight(step + 2, chunk);
    }
    tile.multiply(step);
  }
  tile.store();
}

template <class In, int kRows, bool kBackward, bool kAligned>
cudaError_t launch(const NF4Product& product, cudaStream_t stream) {
  const int outputs = product.outputs(), reduction = product.reduction();
  const int all = (reduction + kStep - 1) / kStep + (product.rank + kStep - 1) / kStep;
  const Product p{.left = static_cast<const uint16_t*>(product.left),
                  .weight = product.weight,
                  .inner = static_cast<const uint16_t*>(product.inner),
                  .right = static_cast<const uint16_t*>(product.right),
                  .bias = product.bias,
                  .out = product.out,
                  .partial = product.splits > 1 ? product.partial : nullptr,
                  .rows = product.rows,
                  .reduction = reduction,
                  .outputs = outputs,
                  .rank = product.rank,
                  .steps_per_split = (all + product.splits - 1) / product.splits,
                  .adapter_vectors = product.rank % 8 == 0 && outputs % 8 == 0 && is_vector(product.inner) &&
                                     is_vector(product.right)};
  const auto kernel = product_kernel<In, kRows, kBackward, kAligned>;
  if (const cudaError_t error = allow_shared(kernel, kSharedBytes<kRows>)) return error;
  const dim3 grid((product.rows + kRows - 1) / kRows, (outputs + kOutputs - 1) / kOutputs, product.splits);
  kernel<<<grid, kThreads, kSharedBytes<kRows>, stream>>>(p);
  return cudaGetLastError();
}

template <class In, bool kBackward>
cudaError_t launch_sized(const NF4Product& product, cudaStream_t stream) {
  const bool aligned = is_aligned(product.weight) && product.reduction() % 8 == 0 && is_vector(product.left);
  if (!aligned) return launch<In, 64, kBackward, false>(product, stream);
  return product.rows > 64 ? launch<In, 128, kBackward, true>(product, stream)
                           : launch<In, 64, kBackward, true>(product, stream);
}

template <class In>
cudaError_t launch_directed(const NF4Product& product, cudaStream_t stream) {
  return product.transposed ? launch_sized<In, true>(product, stream) : launch_sized<In, false>(product, stream);
}

}  // namespace

cudaError_t nf4_product_half(const NF4Product& product, cudaStream_t stream) {
  return product.type == Scalar::float16 ? launch_directed<__half>(product, stream)
                                         : launch_directed<__nv_bfloat16>(product, stream);
}

}  // namespace csikernels::cuda
