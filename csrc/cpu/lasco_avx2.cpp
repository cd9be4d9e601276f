// Forwards of small Transformers for AVX2.
#include "cpu/lasco_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
//
#include "cpu/lasco_forward_body.h"

namespace csikernels::cpu::avx2 {

void sam_forward(const SamSizes& sizes, const void* const* weights, const void* const* next, const float* h, float* y,
                 void* workspace) {
  const auto run = sizes.bfloat16 ? run_network<Rounded> : run_network<Exact>;
  run(sizes, weights, next, h, y, workspace);
}

void sam_correct(float* output, const float* base, float* reference_to_shift, float alpha, int64_t n) {
  correct(output, base, reference_to_shift, alpha, n);
}

}  // namespace csikernels::cpu::avx2
#endif
