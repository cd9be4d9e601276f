// The channel Transformer for processors without AVX2.
#include "cpu/transformer_kernel.h"

#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
#include "cpu/transformer_widened.h"
}  // namespace csikernels::cpu::scalar
