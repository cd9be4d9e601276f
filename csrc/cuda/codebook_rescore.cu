// Second half of the codebook search: the listed words of each query in float32, and those within its error of the best
// in float64; one block per query.
//
// Formula: |w^H q| of the words as given, times their factors to unit norm. Of the words whose float64 scores agree to
//   within rounding the lowest index is the result, whatever else was listed. A list that overflowed stands for the
//   whole book: every word of it is scored.
// Layout: 8 lanes a word, which read 64 contiguous bytes of complex64 at a time; the query in shared memory.
// Bytes for each word scored: 8 D (complex64), 16 D (complex128); 8 for each listed. Of K = 65536 random words of
//   D = 128 a query lists some 20 and scores 2 to 4 in float32: 12 kB with the query itself, 4 us of an H100 for
//   N = 1024. In the worst case, all words equal, every word is scored three times: 206 GB, 40 ms from L2.
#include "cuda/codebook.h"
#include "cuda/codebook_rows.cuh"

namespace csikernels::cuda::codebook {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kLanes;  // words scored at once
static_assert(kThreads >= kMaxDimension);   // a thread takes one complex number of the query

// Bound on a score in float32, relative to the norm of the query: a lane sums up to 64 terms, three shuffles follow,
// and of two components. The filter's slack is four of these.
constexpr float kScoreError = 0x1p-17f;

// A score with the rounding it may carry: a few ulp of the sum of magnitudes, which pairwise summation leaves.
struct Score {
  double value, slack;
  __device__ double low() const { return value - slack < 0 ? 0 : value - slack; }
  __device__ double high() const { return value + slack; }
};

struct Query {
  double2 wide[kMaxDimension];  // scaled by a power of two
  float2 narrow[kMaxDimension];
  double squares[kThreads / 32];
  unsigned long long largest;
  unsigned long long best;  // float32: bits of the score, then of ~word; float64: bits of the highest lower end
  unsigned long long word;
  uint32_t floor;  // bits of the highest lower bound in float32
  uint32_t close;  // words scored in float64
};

// The words of one book, and one query against them.
template <class Word>
struct Book {
  const Query& query;
  const Pair<Word>* words;
  const double* factors;
  int dimension;

  // Called by whole warps; the result is that of the lane's group, where `active`.
  __device__ float score_float32(int64_t word, bool active) const {
    const Pair<Word>* row = words + word * dimension;
    // The factor is 2^n m with n = first + second, so that no product leaves the range of float32.
    const double factor = active ? factors[word] : 1;
    const int exponent = static_cast<int>(__double_as_longlong(factor) >> 52) - 1023, half = exponent / 2;
    const Word first = power_of_two<Word>(half);
    float re = 0, im = 0;
#pragma unroll 4
    for (int c = threadIdx.x % kLanes; c < dimension; c += kLanes) {
      if (!active) break;
      const Pair<Word> w = row[c];
      const float2 q = query.narrow[c];
      const float x = static_cast<float>(w.x * first), y = static_cast<float>(w.y * first);
      re += x * q.x;
      re += y * q.y;
      im += x * q.y;
      im -= y * q.x;
    }
    re = sum_of_group(re);
    im = sum_of_group(im);
    const float rest = static_cast<float>(factor * power_of_two<double>(-half));
    re *= rest;
    im *= rest;
    return sqrtf(re * re + im * im);
  }

  __device__ Score score_float64(int64_t word, bool active) const {
    const Pair<Word>* row = words + word * dimension;
    double re[2] = {}, im[2] = {}, magnitude = 0;
#pragma unroll 2
    for (int c = threadIdx.x % kLanes; c < dimension; c += kLanes) {
      if (!active) break;
      const double x = row[c].x, y = row[c].y;
      const double2 q = query.wide[c];
      re[0] += x * q.x;
      re[1] += y * q.y;
      im[0] += x * q.y;
      im[1] -= y * q.x;
      magnitude += (fabs(x) + fabs(y)) * (fabs(q.x) + fabs(q.y));
    }
    const double real = sum_of_group(re[0] + re[1]), imaginary = sum_of_group(im[0] + im[1]);
    const double factor = active ? factors[word] : 1;
    return {hypot(real * factor, imaginary * factor), 0x1p-49 * (sum_of_group(magnitude) * factor)};
  }
};

__device__ inline double sum_of_block(double x, double (&partial)[kThreads / 32]) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
  return sum;
}

// Reads the query of the block; false where it is zero or not finite.
template <class Float>
__device__ bool read_query(const Search& s, int64_t row, Query& query, double& norm) {
  const int dimension = static_cast<int>(s.layout.dimension);
  if (threadIdx.x == 0) {
    query.largest = query.best = query.close = query.floor = 0;
    query.word = ~0ull;
  }
  __syncthreads();
  const bool component = threadIdx.x < dimension;
  const Pair<Float> z =
      component ? static_cast<const Pair<Float>*>(s.h)[row * dimension + threadIdx.x] : Pair<Float>{0, 0};
  atomicMax(&query.largest, static_cast<unsigned long long>(magnitude<Float>(z)));
  __syncthreads();
  const Scale<Float> scale(static_cast<Magnitude<Float>>(query.largest));
  double re, im;  // float64 holds a row of float32 scaled by 2^149, too
  if constexpr (sizeof(Float) == 8) {
    re = scale(z.x);
    im = scale(z.y);
  } else {
    const double power = power_of_two<double>(-scale.exponent);
    re = z.x * power;
    im = z.y * power;
  }
  if (component) {
    query.wide[threadIdx.x] = {re, im};
    query.narrow[threadIdx.x] = {static_cast<float>(re), static_cast<float>(im)};
  }
  norm = sqrt(sum_of_block(re * re + im * im, query.squares));
  return scale.usable;
}

// What is to be scored for a query.
struct Candidates {
  Candidate* list;
  int64_t count;
  bool all;  // the words of the book in place of a list

  // use(i, word, active) by whole warps, for each that can reach `floor`; the words of a book all can.
  template <class Use>
  __device__ void each(const Layout& layout, float floor, const Use& use) const {
    for (int64_t first = 0; first < count; first += kGroups) {
      const int64_t i = first + threadIdx.x / kLanes;
      const bool active = i < count && (all || list[i].upper >= floor);
      if (!__any_sync(kAllLanes, active)) continue;
      use(i, !active ? 0 : all ? i : layout.word_at(list[i].position), active);
    }
    __syncthreads();
  }
};

template <class Float, class Word, bool exact>
__global__ void __launch_bounds__(kThreads, 4) rescore_kernel(const Search s) {
  __shared__ Query query;
  const int64_t place = blockIdx.x, row = s.order ? s.order[s.first + place] : s.first + place;
  const bool leads = threadIdx.x % kLanes == 0;
  double norm;
  if (!read_query<Float>(s, row, query, norm)) {
    if (threadIdx.x == 0) {
      s.index[row] = -1;
      s.similarity[row] = __int_as_float(0x7fc00000);
    }
    return;
  }
  const int64_t first_word = (s.environment ? s.environment[s.first + place] : 0) * s.layout.words;
  const Book<Word> book{query, static_cast<const Pair<Word>*>(s.words) + first_word * s.layout.dimension,
                        s.factors + first_word, static_cast<int>(s.layout.dimension)};
  const uint32_t listed = s.count[place];
  const bool all = listed > s.capacity;
  const Candidates candidates{s.list + place * s.capacity, all ? s.layout.words : listed, all};

  const float error = static_cast<float>(norm) * kScoreError, bound = __uint_as_float(s.best[place]);
  candidates.each(s.layout, bound, [&](int64_t i, int64_t word, bool active) {
    const float score = book.score_float32(word, active);
    if (!active || !leads) return;
    if (!all) candidates.list[i].upper = score + error;  // takes the place of what it could reach by bf16
    atomicMax(&query.floor, __float_as_uint(fmaxf(score - error, 0.0f)));
    const auto key = static_cast<unsigned long long>(__float_as_uint(score)) << 32;
    if (!exact) atomicMax(&query.best, key | (0xffffffffu - static_cast<uint32_t>(word)));  // the lower word of equals
  });
  if (exact) {
    const float floor = fmaxf(bound, __uint_as_float(query.floor));
    const auto is_close = [&](int64_t word, bool active) {
      return all ? book.score_float32(word, active) + error >= floor && active : active;
    };
    candidates.each(s.layout, floor, [&](int64_t, int64_t word, bool active) {
      active = is_close(word, active);
      const Score score = book.score_float64(word, active);
      if (!active || !leads) return;
      atomicMax(&query.best, static_cast<unsigned long long>(__double_as_longlong(score.low())));
      atomicAdd(&query.close, 1u);
    });
    const double highest = __longlong_as_double(static_cast<long long>(query.best));
    const bool alone = query.close == 1;
    candidates.each(s.layout, floor, [&](int64_t, int64_t word, bool active) {
      active = is_close(word, active);
      const bool wins = alone || book.score_float64(word, active).high() >= highest;
      if (active && leads && wins) atomicMin(&query.word, static_cast<unsigned long long>(word));
    });
  }
  if (threadIdx.x >= 32) return;
  const int64_t word = exact ? query.word : 0xffffffffu - static_cast<uint32_t>(query.best);
  const double score = book.score_float64(word, true).value;
  if (threadIdx.x == 0) {
    s.index[row] = word;
    s.similarity[row] = static_cast<float>(score / norm);
  }
}

}  // namespace

cudaError_t rescore(const Search& s, cudaStream_t stream) {
  const auto run = [&]<class Float, class Word>(Float, Word) {
    const auto blocks = static_cast<unsigned>(s.rows);
    if (s.exact) {
      rescore_kernel<Float, Word, true><<<blocks, kThreads, 0, stream>>>(s);
    } else {
      rescore_kernel<Float, Word, false><<<blocks, kThreads, 0, stream>>>(s);
    }
    return cudaGetLastError();
  };
  const auto with_words = [&]<class Float>(Float h) { return s.words_are_double ? run(h, double()) : run(h, float()); };
  return s.h_is_double ? with_words(double()) : with_words(float());
}

}  // namespace csikernels::cuda::codebook
