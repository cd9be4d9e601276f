// Forwards of small Transformers for processors without AVX2.
#include "cpu/lasco_kernel.h"
#include "cpu/vec_scalar.h"
//
#include "cpu/lasco_forward_body.h"

namespace csikernels::cpu::scalar {
#include "cpu/lasco_widened.h"
}  // namespace csikernels::cpu::scalar
