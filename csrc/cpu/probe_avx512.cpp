// The probes for avx512.
#include "cpu/probe_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512 {
#include "cpu/probe_body.h"
}  // namespace csikernels::cpu::avx512
#endif
