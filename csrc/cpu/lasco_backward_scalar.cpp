// The training kernels for scalar.
#include "cpu/lasco_backward_kernel.h"

#include "cpu/vec_scalar.h"
// After the vectors.
#include "cpu/lasco_tile.h"
// After the building blocks.
#include "cpu/lasco_backward_tile.h"

namespace csikernels::cpu::scalar {
#include "cpu/lasco_backward_body.h"
}  // namespace csikernels::cpu::scalar
