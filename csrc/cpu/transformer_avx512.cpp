// The channel Transformer for AVX-512.
#include "cpu/transformer_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512 {
#include "cpu/transformer_widened.h"
}  // namespace csikernels::cpu::avx512
#endif
