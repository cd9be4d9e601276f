// The channel Transformer for AVX2.
#include "cpu/transformer_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"

namespace csikernels::cpu::avx2 {
#include "cpu/transformer_widened.h"
}  // namespace csikernels::cpu::avx2
#endif
