// Checks at the boundary of an op. Each names the argument, what was expected and what was given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace csikernels {

inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, ": expected shape ", shape, ", got ", tensor.sizes());
}

inline void check_same_shape(const at::Tensor& tensor, const char* name, const at::Tensor& other,
                             const char* other_name) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), name, ": expected the shape of ", other_name, ", ", other.sizes(),
                    ", got ", tensor.sizes());
}

inline void check_floating(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()) && tensor.element_size() >= 2, name,
                   ": expected float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
}

inline void check_device(const at::Tensor& tensor, const char* name, c10::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": expected a tensor on ", device, ", got one on ",
                    tensor.device());
}

inline void check_range(int64_t value, const char* name, int64_t low, int64_t high) {
  TORCH_CHECK_VALUE(low <= value && value <= high, name, ": expected ", low, "..", high, ", got ", value);
}

}  // namespace csikernels
