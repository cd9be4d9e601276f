// The training kernels for avx512.
#include "cpu/lasco_backward_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
// After the vectors.
#include "cpu/lasco_tile.h"
// After the building blocks.
#include "cpu/lasco_backward_tile.h"

namespace csikernels::cpu::avx512 {
#include "cpu/lasco_backward_body.h"
}  // namespace csikernels::cpu::avx512

#endif
