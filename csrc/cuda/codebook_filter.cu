// First half of the codebook search: which words may be the best of a query, found with bf16 on the tensor cores.
//
// Formula: with words and queries as rows of 2 D real numbers, a query is two columns, (Re, Im) and (Im, -Re), whose
//   products with a word are Re and Im of w^H q. With w = v + r and q = p + s (v, p in bf16),
//   | |w^H q| - |v^H p| | <= |r| |p| + |s| by Cauchy-Schwarz, to which the rounding of the sums is added. The best
//   lower bound of a query is shared by all blocks; words whose upper bound reaches it are listed. Which words are
//   listed depends on the order of the blocks; that the winner is among them does not. The N x K products are never
//   written.
// Tiling: 4 warps, 128 words by 64 queries (128 columns), 64 x 64 a warp: 4 KB from shared memory for 32 products of
//   16 x 8 x 16, half of what an H100 multiplies meanwhile, and the most that registers allow. Queries stay in shared
//   memory in the order of the lanes; words come through a ring of 4 stages of 8 KB by cp.async, one contiguous stream
//   per block. Few queries take tiles of 16 or 32, so that more blocks stream at once.
// Bytes: 4 D K of bf16 words for each tile of queries, from L2 beyond the first; 8 D N of queries for each split.
// FLOPs: 8 D' N' K, D' and N' padded to 16 and to the tile. Floors on an H100 (3.35 TB/s, 990 bf16 TFLOP/s), D = 128:
//   N = 1024, K = 65536: 68.7 GFLOP, 69 us; 34 MB, 10 us. At the rate of shared memory 139 us.
//   N = 16,   K = 65536: 34 MB, 10 us;  N = 1, K = 4096: 2.1 MB, 0.6 us, bound by the latency of two launches.
// Shared memory: 8 D' bytes a query and 32 KB of stages: 97 KB for 64 queries of D = 128 (2 blocks on an H100, 1 on
//   sm_86 and sm_120), 48 KB for 16 (3 and 2 blocks).
#include <cuda_bf16.h>

#include <algorithm>

#include "cuda/codebook.h"
#include "cuda/codebook_rows.cuh"
#include "cuda/tensor_core.cuh"

namespace csikernels::cuda::codebook {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 4;
constexpr int kStageUnits = kChunkBytes / 16;  // of 16 bytes
constexpr float kInfinity = __builtin_huge_valf();

// Errors relative to the norm of the query. A tensor core cuts each of at most 17 addends of a sum off at 2^-23 of the
// largest, itself at most 1: 1.1 * 2^-23 a term and component, less than half of this.
constexpr float kSumError = 0x1p-21f;  // times 2 D
// All other roundings of the filter (below 2^-17 together), and twice the error of a score in float32: a word that is
// not listed has a lower score in float32, too, so that its result does not depend on the order of the blocks.
constexpr float kSlack = 0x1p-15f;

template <int queries>
struct Tiling {
  static constexpr int kColumnWarps = queries == 16 ? 1 : 2;
  static constexpr int kWordWarps = kThreads / 32 / kColumnWarps;
  static constexpr int kWordGroups = kTileWords / 16 / kWordWarps;           // of 16 words, a warp's
  static constexpr int kQueryGroups = queries / 4 / kColumnWarps;            // of 4 queries, a warp's
  static constexpr int kPairs = queries / 8;                                 // of groups of 4 queries, the block's
  static constexpr int kBlocks = queries == 64 ? 2 : queries == 32 ? 3 : 4;  // per multiprocessor
  // Blocks that keep a multiprocessor busy: of the smallest, two have 48 KB of words under way.
  static constexpr int kBusy = queries == 32 ? 3 : 2;
  static constexpr int kStagingTiles = queries / 16;  // about as long as staging takes
};

template <int queries>
struct Queries {
  uint32_t best[queries];  // bits of a lower bound of the best similarity; infinity where there is no query
  float norm[queries];     // of its bf16 form
  float rest[queries];     // what bf16 leaves out of it, and the rounding
  int64_t book[queries];
};

// The ring of stages | Queries | their rows in bf16
extern __shared__ __align__(16) uint4 shared_memory[];
static_assert(sizeof(Queries<16>) % 16 == 0);

__device__ inline float root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void copy_async(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// sum += words [16][16] * queries [16][8]
__device__ inline void multiply(float (&sum)[4], const uint4& words, uint32_t low, uint32_t high) {
  const uint32_t rows[4] = {words.x, words.y, words.z, words.w};
  mma<__nv_bfloat16>(sum, rows, low, high);
}

__device__ inline int64_t row_at(const Search& s, int64_t place) {
  return s.order ? s.order[s.first + place] : s.first + place;
}
__device__ inline int64_t book_at(const Search& s, int64_t place) {
  if (!s.environment) return 0;
  const int64_t book = s.environment[s.first + place];
  if (book < 0 || book >= s.layout.books) __trap();  // to name it would mean to wait for the GPU
  return book;
}

// The tile's queries, scaled by powers of two, in bf16: [2 * chunks][kPairs][32 lanes][4], and what is known of them.
// A row waits in registers for its largest component, so that it is read once and all loads are under way together.
template <class Float, int kQueries>
__device__ void stage_queries(const Search& s, uint32_t* staged, Queries<kQueries>& queries) {
  constexpr int kSharing = kLanes * sizeof(Float) / 4, kEach = kMaxDimension / kSharing;
  const int lane = threadIdx.x % kSharing, dimension = static_cast<int>(s.layout.dimension);
  const int padded = s.layout.chunks() * kChunk;
#pragma unroll 1
  for (int q = threadIdx.x / kSharing; q < kQueries; q += kThreads / kSharing) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * kQueries + q;
    const bool is_query = place < s.rows;
    const auto* row = static_cast<const Pair<Float>*>(s.h) + (is_query ? row_at(s, place) : 0) * dimension;
    Pair<Float> numbers[kEach];
    Magnitude<Float> largest = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int c = lane + i * kSharing;
      numbers[i] = is_query && c < dimension ? row[c] : Pair<Float>{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Magnitude<Float> m = magnitude<Float>(numbers[i]);
      largest = m > largest ? m : largest;
    }
    const Scale<Float> scale(maximum_of_group<kSharing>(largest));
    float squares = 0, left_out = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int c = lane + i * kSharing;
      if (c >= padded) break;
      const float re = scale.usable ? static_cast<float>(scale(numbers[i].x)) : 0;
      const float im = scale.usable ? static_cast<float>(scale(numbers[i].y)) : 0;
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(re, im);
      const float rest_re = re - __low2float(rounded), rest_im = im - __high2float(rounded);
      squares += re * re + im * im;
      left_out += rest_re * rest_re + rest_im * rest_im;
      // Lane 4 n + c % 4 holds (c, c + 4) of column n, for two groups of 8 columns.
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(&rounded);
      const int reader = q % 4 * 8 + c % 4, number = q / 4 % 2 * 2 + c % 8 / 4;
      uint32_t* const out = staged + (((c / 8) * (kQueries / 8) + q / 8) * 32 + reader) * 4 + number;
      out[0] = bits;                                            // (Re, Im)
      out[4 * 4] = __byte_perm(bits, 0, 0x1032) ^ 0x80000000u;  // (Im, -Re), the next column
    }
    const float norm = root(sum_of_group<kSharing>(squares));
    const float rest = root(sum_of_group<kSharing>(left_out)) * (1 + 0x1p-16f);
    if (lane == 0) {
      queries.best[q] = scale.usable ? 0 : __float_as_uint(kInfinity);
      queries.norm[q] = norm * (1 + 0x1p-16f) + rest;
      queries.rest[q] = rest + norm * (2 * padded * kSumError + kSlack);
      queries.book[q] = is_query ? book_at(s, place) : -1;
    }
  }
}

// Puts the warp's products of one tile of words to use: raises the best lower bounds, lists what may be the best.
template <class T, int kQueries>
class Listing {
 public:
  // Queries [begin, end) of the block use the book.
  __device__ Listing(const Search& s, Queries<kQueries>& queries, int begin, int end)
      : s_(s), queries_(queries), begin_(begin), end_(end), first_(static_cast<int64_t>(blockIdx.x) * kQueries) {
    const int q = threadIdx.x;
    owns_ = begin <= q && q < end && queries.best[q < kQueries ? q : 0] != __float_as_uint(kInfinity);
  }

  __device__ void take(const float (&sums)[T::kWordGroups][T::kQueryGroups][4], int64_t tile, float residual) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int query = warp % T::kColumnWarps * T::kQueryGroups * 4 + lane % 4;  // and every fourth from there
    const int64_t position = tile * kTileWords + warp / T::kColumnWarps * T::kWordGroups * 16 + lane / 4;
    // What other blocks had found at the end of the tile before; asked for then, so that nobody waits.
    if (owns_) atomicMax(&queries_.best[threadIdx.x], seen_);
    float largest[T::kQueryGroups];
#pragma unroll
    for (int n = 0; n < T::kQueryGroups; ++n) {
      largest[n] = 0;
#pragma unroll
      for (int m = 0; m < T::kWordGroups; ++m) {
        largest[n] = fmaxf(largest[n], fmaxf(square(sums[m][n], 0), square(sums[m][n], 1)));
      }
      const int q = query + 4 * n;
      const float lower = root(largest[n]) - error(q, residual);
      if (in_run(q) && lower > known_[n]) atomicMax(&queries_.best[q], __float_as_uint(lower));
    }
    __syncthreads();
    if (owns_) seen_ = atomicMax(&s_.best[first_ + threadIdx.x], queries_.best[threadIdx.x]);
#pragma unroll
    for (int n = 0; n < T::kQueryGroups; ++n) {
      const int q = query + 4 * n;
      known_[n] = __uint_as_float(queries_.best[q]);
      const float margin = error(q, residual), least = fmaxf(known_[n] - margin, 0.0f), threshold = least * least;
      if (!in_run(q) || largest[n] < threshold) continue;
#pragma unroll
      for (int m = 0; m < T::kWordGroups; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float squared = square(sums[m][n], half);
          if (squared >= threshold) list(first_ + q, position + m * 16 + half * 8, root(squared) + margin);
        }
      }
    }
  }

 private:
  __device__ static float square(const float (&sum)[4], int half) {
    return sum[2 * half] * sum[2 * half] + sum[2 * half + 1] * sum[2 * half + 1];
  }
  __device__ float error(int q, float residual) const { return residual * queries_.norm[q] + queries_.rest[q]; }
  __device__ bool in_run(int q) const { return begin_ <= q && q < end_; }
  __device__ void list(int64_t place, int64_t position, float upper) const {
    if (position >= s_.layout.words) return;
    const uint32_t slot = atomicAdd(&s_.count[place], 1u);
    if (slot < s_.capacity) s_.list[place * s_.capacity + slot] = {static_cast<uint32_t>(position), upper};
  }

  const Search& s_;
  Queries<kQueries>& queries_;
  int begin_, end_;
  int64_t first_;
  bool owns_;                          // this thread keeps the query of its number in step with the other blocks
  uint32_t seen_ = 0;                  // their best
  float known_[T::kQueryGroups] = {};  // best of this thread's queries after the tile before
};

template <class Float, int kQueries>
__global__ void __launch_bounds__(kThreads, Tiling<kQueries>::kBlocks)
    filter_kernel(const Search s, int tiles_per_split) {
  using T = Tiling<kQueries>;
  const int chunks = s.layout.chunks(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* const ring = shared_memory;
  auto& queries = *reinterpret_cast<Queries<kQueries>*>(ring + kStages * kStageUnits);
  uint4* const staged = ring + kStages * kStageUnits + sizeof(queries) / 16;
  const int64_t tiles = s.layout.tiles(), first = static_cast<int64_t>(blockIdx.y) * tiles_per_split;
  const int here = static_cast<int>(tiles - first < tiles_per_split ? tiles - first : tiles_per_split);
  const int64_t rows_left = s.rows - static_cast<int64_t>(blockIdx.x) * kQueries;
  const int count = static_cast<int>(rows_left < kQueries ? rows_left : kQueries), steps = here * chunks;
  const uint4* from;
  const auto copy = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kStageUnits; i += kThreads) {
        copy_async(ring + step % kStages * kStageUnits + i + threadIdx.x,
                   from + static_cast<int64_t>(step) * kStageUnits + i);
      }
    }
    commit_copies();
  };
  const auto start = [&](int64_t book) {
    from = static_cast<const uint4*>(s.tiles) + (book * tiles + first) * chunks * kStageUnits + threadIdx.x;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy(step);
  };
  int64_t book = book_at(s, static_cast<int64_t>(blockIdx.x) * kQueries);
  start(book);  // words are under way while queries are staged
  stage_queries<Float, kQueries>(s, reinterpret_cast<uint32_t*>(staged), queries);
  __syncthreads();

  // One run for each book that queries of the block use: in the order of environments these are few. The barrier within
  // the last listing of a run frees the ring for the next.
  for (int begin = 0, end; begin < count; begin = end) {
    if (begin > 0) {
      book = queries.book[begin];
      start(book);
    }
    for (end = begin + 1; end < count && queries.book[end] == book;) ++end;
    Listing<T, kQueries> listing(s, queries, begin, end);
    for (int t = 0, step = 0; t < here; ++t) {
      const float residual = s.residuals[book * tiles + first + t];
      float sums[T::kWordGroups][T::kQueryGroups][4] = {};
      for (int chunk = 0; chunk < chunks; ++chunk, ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        copy(step + kStages - 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4* const word = ring + step % kStages * kStageUnits + half * (kTileWords / 16 * 32) +
                                    warp / T::kColumnWarps * T::kWordGroups * 32 + lane;
          const uint4* const query =
              staged + ((chunk * 2 + half) * T::kPairs + warp % T::kColumnWarps * (T::kQueryGroups / 2)) * 32 + lane;
          uint4 words[T::kWordGroups];
#pragma unroll
          for (int m = 0; m < T::kWordGroups; ++m) words[m] = word[m * 32];
#pragma unroll
          for (int n = 0; n < T::kQueryGroups; n += 2) {
            const uint4 columns = query[n / 2 * 32];
#pragma unroll
            for (int m = 0; m < T::kWordGroups; ++m) {
              multiply(sums[m][n], words[m], columns.x, columns.y);
              multiply(sums[m][n + 1], words[m], columns.z, columns.w);
            }
          }
        }
      }
      listing.take(sums, first + t, residual);
    }
  }
}

// Launch -------------------------------------------------------------------------------------------------------------

template <class Float, int kQueries>
cudaError_t run_filter(const Search& s, cudaStream_t stream) {
  using T = Tiling<kQueries>;
  int device = 0, processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  // The number of splits that ends soonest: rounds of blocks, times tiles of a block and the staging of its queries.
  const int64_t at_once = static_cast<int64_t>(processors) * T::kBusy, tiles = s.layout.tiles();
  const int64_t query_tiles = (s.rows + kQueries - 1) / kQueries;
  int64_t per_split = tiles, least = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(tiles, at_once); ++splits) {
    const int64_t each = (tiles + splits - 1) / splits, blocks = query_tiles * ((tiles + each - 1) / each);
    const int64_t cost = (blocks + at_once - 1) / at_once * (each + T::kStagingTiles);
    if (cost < least) {
      least = cost;
      per_split = each;
    }
  }
  const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>((tiles + per_split - 1) / per_split));
  const int bytes =
      static_cast<int>(kStages * kChunkBytes + sizeof(Queries<kQueries>)) + s.layout.chunks() * 2 * T::kPairs * 32 * 16;
  const auto kernel = filter_kernel<Float, kQueries>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    return error;
  }
  kernel<<<grid, kThreads, bytes, stream>>>(s, static_cast<int>(per_split));
  return cudaGetLastError();
}

}  // namespace

cudaError_t filter(const Search& s, cudaStream_t stream) {
  const int64_t queries_per_book = s.environment ? (s.rows + s.layout.books - 1) / s.layout.books : s.rows;
  const bool wide = s.layout.chunks() * kChunk > 128;  // 64 queries of more do not fit into shared memory
  const auto with_type = [&]<class Float>(Float) {
    if (queries_per_book <= 16) return run_filter<Float, 16>(s, stream);
    if (queries_per_book <= 32 || wide) return run_filter<Float, 32>(s, stream);
    return run_filter<Float, 64>(s, stream);
  };
  return s.h_is_double ? with_type(double()) : with_type(float());
}

}  // namespace csikernels::cuda::codebook
