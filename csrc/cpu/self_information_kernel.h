// Kernels of the self_information family on raw pointers. The instruction-set files include this and nothing of torch.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

// Positions of the m largest of n scores, best first: value descending, equal values by position, NaN last.
//   score   [n] contiguous
//   indices [m] out, 1 <= m <= n
//   scratch n * kTopMScratchBytes bytes, 8-byte aligned
constexpr int64_t kTopMScratchBytes = 16;

namespace scalar {
void top_m(const float* score, int64_t n, int64_t m, int64_t* indices, void* scratch);
void top_m(const double* score, int64_t n, int64_t m, int64_t* indices, void* scratch);
}  // namespace scalar

}  // namespace csikernels::cpu
