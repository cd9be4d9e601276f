// The probes for avx2.
#include "cpu/probe_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"

namespace csikernels::cpu::avx2 {
#include "cpu/probe_body.h"
}  // namespace csikernels::cpu::avx2

#endif
