// The floating types of tensors on the device: conversions, and launching the kernel of a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "cuda/scalar.h"

namespace csikernels::cuda {
namespace {

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ double narrow<double>(float x) {
  return x;
}

template <class In>
struct Type {
  using type = In;
};

// call(Type<the type>())
template <class Call>
cudaError_t with_type(Scalar type, const Call& call) {
  switch (type) {
    case Scalar::float16:
      return call(Type<__half>());
    case Scalar::bfloat16:
      return call(Type<__nv_bfloat16>());
    case Scalar::float32:
      return call(Type<float>());
    default:
      return call(Type<double>());
  }
}

// More than 48 KB of dynamic shared memory must be asked for.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace
}  // namespace csikernels::cuda
