// The simulator's side of csrc/cuda/launch.h: tensors lie in host memory, and every buffer that a kernel may touch is
// made known with its size, so that an access one byte beyond it is found.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

// The ops are defined from Python (see tests/simulator/__init__.py) with the schemas of csikernels.
#define CSIKERNELS_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(csikernels_simulated, CPU, m)

namespace csikernels::cuda {

void begin_call();
void know_buffer(const void* data, size_t bytes, bool writable);

class Launch {
 public:
  explicit Launch(const at::Tensor&) { begin_call(); }
  cudaStream_t stream() const { return nullptr; }
};

inline bool runs_on(const at::Tensor&) { return true; }

template <class T>
const T* read(const at::Tensor& tensor) {
  know_buffer(tensor.const_data_ptr(), tensor.nbytes(), false);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const at::Tensor& tensor) {
  know_buffer(tensor.mutable_data_ptr(), tensor.nbytes(), true);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace csikernels::cuda
