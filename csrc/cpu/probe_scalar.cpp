// The probes for scalar.
#include "cpu/probe_kernel.h"

#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
#include "cpu/probe_body.h"
}  // namespace csikernels::cpu::scalar
