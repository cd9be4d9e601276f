// Forwards of small Transformers for AVX2.
#include "cpu/lasco_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
//
#include "cpu/lasco_forward_body.h"

namespace csikernels::cpu::avx2 {
#include "cpu/lasco_widened.h"
}  // namespace csikernels::cpu::avx2
#endif
