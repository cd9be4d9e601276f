// Product of float32 rows with an NF4 weight and an adapter by fused multiply-adds, forward and backward: no TF32. And
// what both types of product share: cutting the reduction, and adding its parts.
//
//   forward:  out [M, N] = x W^T + t B^T + bias     (t = scaling * x A^T, [M, r])
//   backward: out [M, K] = g W + u A                (u = scaling * g B, [M, r])
//
// Tiling: a block of 8 warps owns 64 rows by 128 outputs and walks the reduction in steps of 64; a thread owns 8 rows
//   by 4 outputs. Both operands of a step are loaded into registers a step ahead (32 codes by one 16-byte load, 16
//   elements of the rows) and stored along the reduction, so that a step of one reads a row of each: 8 elements that
//   the warp shares and 4 of its own, 6 cycles of shared memory for 8 of multiply-adds. The adapter is the last steps
//   of the reduction.
// Shared memory: 64 x (132 + 68) x 4 bytes = 50 KB, 2 blocks per SM; rows are padded so that neither loads nor stores
//   meet in a bank.
// FLOPs 2 M N K + 2 M r N; floor on an H100 at M = N = K = 4096, r = 16: 2.1 ms at 67 TFLOP/s, 45 us of bytes.
#include <algorithm>

#include "cuda/nf4_lora.cuh"

namespace csikernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64, kOutputs = 128;  // of a tile
constexpr int kStep = 64;                  // of the reduction
constexpr int kOwnRows = 8, kOwnOutputs = 4;
constexpr int kLeftRow = kRows + 4, kWeightRow = kOutputs + 4;  // a step of the reduction in shared memory
constexpr int kFetched = kRows * kStep / kThreads;              // elements of the rows, by a thread
constexpr int kSharedBytes = kStep * (kLeftRow + kWeightRow) * 4;
static_assert(kOutputs * kStep == kThreads * kChunk);
static_assert(kRows == kOwnRows * (kThreads / 32) && kOutputs == kOwnOutputs * 32);

extern __shared__ __align__(16) unsigned char shared_memory[];

struct Product {
  const float* left;
  NF4 weight;
  const float *inner, *right;
  Dense bias;
  float *out, *partial;
  int rows, reduction, outputs, rank, steps_per_split;
};

template <bool kBackward, bool kAligned>
struct Tile {
  using AnyChunk = typename ChunkOf<kAligned>::type;
  const Product& p;
  const int first_row, first_output, weight_steps;
  const float own;
  // This thread's 32 codes of a step: the row of the tile of W, and the column they begin at. Lanes take one row each,
  // so that their stores lie in different banks.
  const int chunk_row, chunk_column;
  float* const left;    // [kStep][kLeftRow]
  float* const weight;  // [kStep][kWeightRow]
  float acc[kOwnRows][kOwnOutputs];

  __device__ explicit Tile(const Product& product)
      : p(product),
        first_row(blockIdx.x * kRows),
        first_output(blockIdx.y * kOutputs),
        weight_steps((product.reduction + kStep - 1) / kStep),
        own(own_level()),
        chunk_row(threadIdx.x % (kBackward ? kStep : kOutputs)),
        chunk_column(threadIdx.x / (kBackward ? kStep : kOutputs) * kChunk),
        left(reinterpret_cast<float*>(shared_memory)),
        weight(left + kStep * kLeftRow),
        acc{} {}

  // Four elements of one row per load: row threadIdx.x % kRows, columns 4 (threadIdx.x / kRows + 4 i) on.
  __device__ void fetch_left(int step, float (&values)[kFetched]) const {
    const bool adapter = step >= weight_steps;
    const int first = (adapter ? step - weight_steps : step) * kStep, columns = adapter ? p.rank : p.reduction;
    const int row = first_row + threadIdx.x % kRows;
    const float* const from = (adapter ? p.inner : p.left) + static_cast<int64_t>(row) * columns;
#pragma unroll
    for (int i = 0; i < kFetched; i += 4) {
      const int column = first + threadIdx.x / kRows * 4 + i * (kThreads / kRows);
      const int valid = row < p.rows ? columns - column : 0;
      if (kAligned && !adapter) {
        float4 four = make_float4(0, 0, 0, 0);
        if (valid > 0) four = __ldg(reinterpret_cast<const float4*>(from + column));
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = j < valid ? from[column + j] : 0.0f;
      }
    }
  }

  __device__ void store_left(const float (&values)[kFetched]) const {
#pragma unroll
    for (int i = 0; i < kFetched; ++i) {
      const int k = threadIdx.x / kRows * 4 + i / 4 * 4 * (kThreads / kRows) + i % 4;
      left[k * kLeftRow + threadIdx.x % kRows] = values[i];
    }
  }

  __device__ void fetch_weight(int step, AnyChunk& chunk) const {
    const int row = chunk_row + (kBackward ? step * kStep : first_output);
    const int column = chunk_column + (kBackward ? first_output : step * kStep);
    load_chunk(p.weight, row, column, step < weight_steps && row < p.weight.n && column < p.weight.k, 0, chunk);
  }

  // Elements e .. e + 3 of this thread's codes to shared memory, along the reduction.
  __device__ void store_four(int e, const float (&values)[4]) const {
    if constexpr (kBackward) {
      *reinterpret_cast<float4*>(weight + chunk_row * kWeightRow + chunk_column + e) =
          make_float4(values[0], values[1], values[2], values[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) weight[(chunk_column + e + j) * kWeightRow + chunk_row] = values[j];
    }
  }

  __device__ void store_weight(AnyChunk& chunk) const {
    complete(chunk);
#pragma unroll
    for (int e = 0; e < kChunk; e += 4) {
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = look_up(own, chunk.word[e / 8], e % 8 + j) * scale_of(chunk, e + j);
      store_four(e, values);
    }
  }

  // In place of the weight, the adapter's: B [outputs, rank], or A [rank, outputs] in the backward.
  __device__ void store_adapter(int step) const {
    const int first = (step - weight_steps) * kStep, columns = kBackward ? p.outputs : p.rank;
    const int row = chunk_row + (kBackward ? first : first_output);
    const int column = chunk_column + (kBackward ? first_output : first);
    const int valid = row < (kBackward ? p.rank : p.outputs) ? columns - column : 0;
    const float* const from = p.right + static_cast<int64_t>(row) * columns + column;
#pragma unroll 1
    for (int e = 0; e < kChunk; e += 4) {
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = e + j < valid ? from[e + j] : 0.0f;
      store_four(e, values);
    }
  }

  __device__ void multiply() {
    const float* const rows = left + threadIdx.x / 32 * kOwnRows;
    const float* const outputs = weight + threadIdx.x % 32 * kOwnOutputs;
#pragma unroll 8
    for (int k = 0; k < kStep; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(rows + k * kLeftRow);
      const float4 high = *reinterpret_cast<const float4*>(rows + k * kLeftRow + 4);
      const float4 w = *reinterpret_cast<const float4*>(outputs + k * kWeightRow);
      const float mine[kOwnRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        acc[i][0] += mine[i] * w.x;
        acc[i][1] += mine[i] * w.y;
        acc[i][2] += mine[i] * w.z;
        acc[i][3] += mine[i] * w.w;
      }
    }
  }

  __device__ void store() const {
    const int row0 = first_row + threadIdx.x / 32 * kOwnRows, output0 = first_output + threadIdx.x % 32 * kOwnOutputs;
    float bias[kOwnOutputs] = {};
#pragma unroll
    for (int j = 0; j < kOwnOutputs; ++j) {
      if (p.bias.data && !p.partial && output0 + j < p.outputs) bias[j] = element(p.bias, output0 + j);
    }
    float* const to = p.partial ? p.partial + static_cast<int64_t>(blockIdx.z) * p.rows * p.outputs : p.out;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (row0 + i >= p.rows) break;
      float* const row = to + static_cast<int64_t>(row0 + i) * p.outputs + output0;
      if (p.outputs % 4 == 0 && output0 < p.outputs) {
        *reinterpret_cast<float4*>(row) =
            make_float4(acc[i][0] + bias[0], acc[i][1] + bias[1], acc[i][2] + bias[2], acc[i][3] + bias[3]);
      } else {
#pragma unroll
        for (int j = 0; j < kOwnOutputs; ++j) {
          if (output0 + j < p.outputs) row[j] = acc[i][j] + bias[j];
        }
      }
    }
  }
};

template <bool kBackward, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) product_kernel(const __grid_constant__ Product p) {
  Tile<kBackward, kAligned> tile(p);
  const int all = tile.weight_steps + (p.rank + kStep - 1) / kStep;
  const int begin = blockIdx.z * p.steps_per_split, end = min(all, begin + p.steps_per_split);
  typename ChunkOf<kAligned>::type chunk;
  float values[kFetched];
  tile.fetch_weight(begin, chunk);
  tile.fetch_left(begin, values);
  for (int step = begin; step < end; ++step) {
    __syncthreads();  // the step before has been read
    if (step < tile.weight_steps) {
      tile.store_weight(chunk);
    } else {
      tile.store_adapter(step);
    }
    tile.store_left(values);
    __syncthreads();
    if (step + 1 < end) {
      tile.fetch_weight(step + 1, chunk);
      tile.fetch_left(step + 1, values);
    }
    tile.multiply();
  }
  tile.store();
}

// out = the sum of the parts + bias
template <class Out>
__global__ void __launch_bounds__(kThreads, 4)
    add_parts(const float* partial, int splits, int64_t count, int outputs, Dense bias, Out* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += __ldg(partial + split * count + i);
  if (bias.data) sum += element(bias, i % outputs);
  out[i] = narrow<Out>(sum);
}

template <class Out>
cudaError_t launch_sum(const NF4Product& product, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(product.rows) * product.outputs();
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  add_parts<Out><<<blocks, kThreads, 0, stream>>>(product.partial, product.splits, count, product.outputs(),
                                                  product.bias, static_cast<Out*>(product.out));
  return cudaGetLastError();
}

template <bool kBackward, bool kAligned>
cudaError_t launch(const NF4Product& product, cudaStream_t stream) {
  const int outputs = product.outputs(), reduction = product.reduction();
  const int all = (reduction + kStep - 1) / kStep + (product.rank + kStep - 1) / kStep;
  const Product p{.left = static_cast<const float*>(product.left),
                  .weight = product.weight,
                  .inner = static_cast<const float*>(product.inner),
                  .right = static_cast<const float*>(product.right),
                  .bias = product.bias,
                  .out = static_cast<float*>(product.out),
                  .partial = product.splits > 1 ? product.partial : nullptr,
                  .rows = product.rows,
                  .reduction = reduction,
                  .outputs = outputs,
                  .rank = product.rank,
                  .steps_per_split = (all + product.splits - 1) / product.splits};
  const auto kernel = product_kernel<kBackward, kAligned>;
  if (const cudaError_t error = allow_shared(kernel, kSharedBytes)) return error;
  const dim3 grid((product.rows + kRows - 1) / kRows, (outputs + kOutputs - 1) / kOutputs, product.splits);
  kernel<<<grid, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int nf4_splits(const NF4Product& product, int device) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int tile = product.type != Scalar::float32 && product.rows > 64 ? 128 : 64;
  const int64_t blocks =
      static_cast<int64_t>((product.rows + tile - 1) / tile) * ((product.outputs() + kOutputs - 1) / kOutputs);
  const int all = (product.reduction() + kStep - 1) / kStep + (product.rank + kStep - 1) / kStep;
  // Two blocks per multiprocessor, and at least four steps each.
  const int64_t wanted = std::clamp<int64_t>(2 * processors / blocks, 1, std::max(1, all / 4));
  const int64_t steps = (all + wanted - 1) / wanted;
  return static_cast<int>((all + steps - 1) / steps);
}

cudaError_t nf4_product_float(const NF4Product& product, cudaStream_t stream) {
  const bool aligned = is_aligned(product.weight) && product.reduction() % 4 == 0 && is_vector(product.left);
  if (product.transposed) {
    return aligned ? launch<true, true>(product, stream) : launch<true, false>(product, stream);
  }
  return aligned ? launch<false, true>(product, stream) : launch<false, false>(product, stream);
}

cudaError_t nf4_product(const NF4Product& product, cudaStream_t stream) {
  const bool half = product.type != Scalar::float32;
  const cudaError_t error = half ? nf4_product_half(product, stream) : nf4_product_float(product, stream);
  if (error != cudaSuccess || product.splits == 1) return error;
  switch (product.type) {
    case Scalar::float16:
      return launch_sum<__half>(product, stream);
    case Scalar::bfloat16:
      return launch_sum<__nv_bfloat16>(product, stream);
    default:
      return launch_sum<float>(product, stream);
  }
}

}  // namespace csikernels::cuda
