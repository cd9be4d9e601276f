// self_information for processors without AVX2.
#include "cpu/self_information_kernel.h"

#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
#include "cpu/self_information_body.h"

namespace {

void count(const int32_t* keys, int64_t n, const int32_t* thresholds, int64_t* counts) {
  int64_t at_most[kThresholds] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t t = 0; t < kThresholds; ++t) at_most[t] += keys[i] <= thresholds[t];
  }
  for (int64_t t = 0; t < kThresholds; ++t) counts[t] = at_most[t];
}

int64_t keep(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* kept, int32_t* positions) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    kept[count] = keys[i];
    positions[count] = static_cast<int32_t>(i);
    count += low <= keys[i] && keys[i] <= high;
  }
  return count;
}

}  // namespace

const InformationKernels information_kernels = with_own(neighbour_sums, count, keep, narrow_one_by_one, nullptr);

}  // namespace csikernels::cpu::scalar
