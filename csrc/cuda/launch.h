// What stands around every launch: the device and stream of the inputs, raw pointers, and the check of the result.
//
// With CSIKERNELS_SIMULATED the same wrappers are built against tests/simulator/, which hands each launch to a PTX
// simulator: the checks, allocations and launch arguments that run on a GPU are then those the tests ran.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "cuda/scalar.h"

#ifdef CSIKERNELS_SIMULATED
#include "simulated_launch.h"
#else
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#define CSIKERNELS_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(csikernels, CUDA, m)

namespace csikernels::cuda {

// Makes the tensor's device current for the lifetime of the object, and finds torch's current stream there.
class Launch {
 public:
  explicit Launch(const at::Tensor& on) : guard_(on.device()), stream_(c10::cuda::getCurrentCUDAStream().stream()) {}
  cudaStream_t stream() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};

// Whether the kernels run on this tensor's GPU. Where they do not, Python says so as it picks the reference.
inline bool runs_on(const at::Tensor& tensor) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device());
  return major >= 8;
}

template <class T>
const T* read(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace csikernels::cuda
#endif

namespace csikernels::cuda {

// `type` is one of the four.
inline Scalar scalar_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Scalar::float16;
    case at::kBFloat16:
      return Scalar::bfloat16;
    case at::kFloat:
      return Scalar::float32;
    default:
      return Scalar::float64;
  }
}

inline void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

}  // namespace csikernels::cuda
