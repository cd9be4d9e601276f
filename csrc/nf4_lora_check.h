// Checks of the nf4_lora family, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <optional>

#include "check.h"

namespace csikernels {

// Whether a product of these is left to torch: in float64 it is dense.
inline bool any_double(std::initializer_list<at::ScalarType> types) {
  return std::find(types.begin(), types.end(), at::kDouble) != types.end();
}

inline void check_nf4_block_size(int64_t block_size) {
  TORCH_CHECK_VALUE(32 <= block_size && block_size <= 4096 && std::has_single_bit(static_cast<uint64_t>(block_size)),
                    "block_size: expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got ", block_size);
}

// The parts of a weight [n, k].
inline void check_nf4(const at::Tensor& packed, const at::Tensor& absmax, int64_t n, int64_t k, int64_t block_size) {
  check_nf4_block_size(block_size);
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "packed: expected uint8, got ", packed.scalar_type());
  TORCH_CHECK_TYPE(absmax.scalar_type() == at::kFloat, "absmax: expected float32, got ", absmax.scalar_type());
  const int64_t bytes = (n * k + 1) / 2, blocks = (n * k + block_size - 1) / block_size;
  TORCH_CHECK_VALUE(packed.numel() == bytes && packed.is_contiguous(), "packed: expected a contiguous tensor of ",
                    bytes, " bytes, got shape ", packed.sizes());
  TORCH_CHECK_VALUE(absmax.numel() == blocks && absmax.is_contiguous(), "absmax: expected a contiguous tensor of ",
                    blocks, " scales, got shape ", absmax.sizes());
}

[[noreturn]] inline void refuse_weight(const at::Tensor& weight, int64_t position) {
  const int64_t columns = weight.size(1), row = position / columns, column = position % columns;
  const double value = weight.select(0, row).select(0, column).item<double>();
  TORCH_CHECK_VALUE(false, "weight: expected finite float32 values, got ", value, " at index (", row, ", ", column,
                    ")");
}

// x [..., K], lora_a [r, K], lora_b [N, r]
inline void check_nf4_layer(const at::Tensor& x, const at::Tensor& lora_a, const at::Tensor& lora_b) {
  check_floating(x, "x");
  check_floating(lora_a, "lora_a");
  check_floating(lora_b, "lora_b");
  TORCH_CHECK_VALUE(x.dim() >= 1, "x: expected [..., K], got ", x.sizes());
  const int64_t k = x.size(-1);
  TORCH_CHECK_VALUE(lora_a.dim() == 2 && lora_a.size(1) == k, "lora_a: expected [r, ", k, "], got ", lora_a.sizes());
  TORCH_CHECK_VALUE(lora_b.dim() == 2 && lora_b.size(1) == lora_a.size(0), "lora_b: expected [N, ", lora_a.size(0),
                    "], got ", lora_b.sizes());
}

inline void check_nf4_bias(const std::optional<at::Tensor>& bias, int64_t n) {
  if (!bias) return;
  check_floating(*bias, "bias");
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, "bias: expected [", n, "], got ", bias->sizes());
}

// grad [..., N] of the output of x [..., K]
inline void check_nf4_gradient(const at::Tensor& grad, const at::Tensor& x, int64_t n) {
  check_floating(grad, "grad");
  TORCH_CHECK_VALUE(grad.dim() == x.dim() && grad.size(-1) == n &&
                        grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "grad: expected the leading shape of x, ", x.sizes(), ", and ", n, " columns, got ", grad.sizes());
}

}  // namespace csikernels
