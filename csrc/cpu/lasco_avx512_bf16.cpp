// Forwards of small Transformers with bfloat16 weights, for AVX-512 with bfloat16 dot products.
#include "cpu/lasco_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"
//
#include "cpu/lasco_tile_bf16.h"
//
#include "cpu/lasco_forward_body.h"

namespace csikernels::cpu::avx512_bf16 {

void sam_forward(const SamSizes& sizes, const void* const* weights, const void* const* next, const float* h, float* y,
                 void* workspace) {
  run_network<Pairs>(sizes, weights, next, h, y, workspace);
}

}  // namespace csikernels::cpu::avx512_bf16
#endif
