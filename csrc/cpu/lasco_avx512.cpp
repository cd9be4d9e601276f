// Forwards of small Transformers for AVX-512.
#include "cpu/lasco_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
//
#include "cpu/lasco_forward_body.h"

namespace csikernels::cpu::avx512 {
#include "cpu/lasco_widened.h"
}  // namespace csikernels::cpu::avx512
#endif
