// Memory for the activations that a training step keeps between its forward and its backward.
#pragma once

#include <ATen/core/Tensor.h>

namespace csikernels::cpu {

// A tensor [rows, columns], not initialised. Its memory is huge pages where the system has them, and the blocks freed
// last (four) are kept for the next calls of about their size: hundreds of megabytes fresh from the system at every
// step would cost more in page faults than the step computes. While they are kept, the system may take their pages back
// (MADV_FREE).
at::Tensor activation_memory(int64_t rows, int64_t columns, const at::TensorOptions& options);

}  // namespace csikernels::cpu
