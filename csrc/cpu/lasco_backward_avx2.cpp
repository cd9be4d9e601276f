// The training kernels for avx2.
#include "cpu/lasco_backward_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
// After the vectors.
#include "cpu/lasco_tile.h"
// After the building blocks.
#include "cpu/lasco_backward_tile.h"

namespace csikernels::cpu::avx2 {
#include "cpu/lasco_backward_body.h"
}  // namespace csikernels::cpu::avx2

#endif
