// Memory for large intermediate values: the activations that a training step keeps between its forward and its
// backward, and tokens packed for a product.
#pragma once

#include <ATen/core/Tensor.h>

namespace csikernels::cpu {

// A tensor, not initialised. From 8 MiB on its memory is huge pages where the system has them, and the blocks freed
// last (four) are kept for the next calls of about their size: hundreds of megabytes fresh from the system at every
// step would cost more in page faults than the step computes. While they are kept, the system may take their pages back
// (MADV_FREE).
at::Tensor activation_memory(at::IntArrayRef sizes, const at::TensorOptions& options);  // float32

}  // namespace csikernels::cpu
