// self_information for AVX2.
#include "cpu/self_information_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"

namespace csikernels::cpu::avx2 {
#include "cpu/self_information_body.h"

namespace {

void count(const int32_t* keys, int64_t n, const int32_t* thresholds, int64_t* counts) {
  __m256i threshold[kThresholds], above[kThresholds] = {};  // minus the number above, per lane
  for (int64_t t = 0; t < kThresholds; ++t) threshold[t] = _mm256_set1_epi32(thresholds[t]);
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256i key = (__m256i)load_keys(keys + i);
    for (int64_t t = 0; t < kThresholds; ++t) {
      above[t] = _mm256_add_epi32(above[t], _mm256_cmpgt_epi32(key, threshold[t]));
    }
  }
  for (int64_t t = 0; t < kThresholds; ++t) {
    int32_t lanes[8];
    store_keys(lanes, (IntLanes)above[t]);
    counts[t] = n;
    for (int lane = 0; lane < 8; ++lane) counts[t] += lanes[lane];
    for (int64_t i = whole; i < n; ++i) counts[t] -= keys[i] > thresholds[t];
  }
}

// Whole vectors without a key to keep are passed over eight at a time; that is most of them for a small codeword.
int64_t keep(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* kept, int32_t* positions) {
  const __m256i lowest = _mm256_set1_epi32(low), highest = _mm256_set1_epi32(high);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i key = (__m256i)load_keys(keys + i);
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(lowest, key), _mm256_cmpgt_epi32(key, highest));
    unsigned inside = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(outside))) & 0xFF;
    if (n - i < 8) inside &= (1u << (n - i)) - 1;
    for (; inside != 0; inside &= inside - 1, ++count) {
      const int64_t position = i + __builtin_ctz(inside);
      kept[count] = keys[position];
      positions[count] = static_cast<int32_t>(position);
    }
  }
  return count;
}

}  // namespace

const InformationKernels information_kernels = with_own(neighbour_sums, count, keep, narrow_one_by_one, nullptr);

}  // namespace csikernels::cpu::avx2
#endif
