// The int8 channel Transformer with integer dot products.
#include "cpu/transformer_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_VNNI
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512_vnni {
#include "cpu/transformer_dots.h"

// After the products.
#include "cpu/transformer_body.h"

void transformer_int8(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                      char* workspace) {
  forward<WideBf16Dot, Int8Dot, true>(net, team, h, samples, y, workspace);
}

}  // namespace csikernels::cpu::avx512_vnni
#endif
