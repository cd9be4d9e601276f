// Checks of the self_information family, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "check.h"

namespace csikernels {

// h [B, C, H, W], offsets (row, column, row, column, ...)
inline void check_image(const at::Tensor& h, double bandwidth, at::IntArrayRef offsets) {
  check_floating(h, "h");
  check_dim(h, "h", 4, "[B, C, H, W]");
  TORCH_CHECK_VALUE(std::isfinite(bandwidth) && bandwidth > 0, "bandwidth: expected a finite positive number, got ",
                    bandwidth);
  TORCH_CHECK_VALUE(!offsets.empty() && offsets.size() % 2 == 0,
                    "offsets: expected pairs (row, column), at least one, got ", offsets.size(), " numbers");
}

// The selection of m of `n` elements of `ranked`; `meaning` is how the documentation calls n.
inline void check_selection(const at::Tensor& ranked, const char* name, int64_t m, int64_t n, const char* meaning,
                            const std::optional<at::Tensor>& source) {
  TORCH_CHECK_VALUE(1 <= m && m <= n, "m: expected 1..", meaning, " = 1..", n, ", got ", m);
  if (!source) return;
  check_floating(*source, "source");
  check_same_shape(*source, "source", ranked, name);
  check_device(*source, "source", ranked.device());
}

// values, indices [B, m], mean [B]
inline void check_codeword(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& mean,
                           at::IntArrayRef shape) {
  check_floating(values, "values");
  check_dim(values, "values", 2, "[B, m]");
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "indices: expected int64, got ", indices.scalar_type());
  check_same_shape(indices, "indices", values, "values");
  TORCH_CHECK_TYPE(mean.scalar_type() == values.scalar_type(), "mean: expected the dtype of values, ",
                   values.scalar_type(), ", got ", mean.scalar_type());
  TORCH_CHECK_VALUE(mean.dim() == 1 && mean.size(0) == values.size(0), "mean: expected shape [B] = [", values.size(0),
                    "], got ", mean.sizes());
  TORCH_CHECK_VALUE(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size >= 0; }),
                    "shape: expected sizes of at least 0, got ", shape);
  check_device(indices, "indices", values.device());
  check_device(mean, "mean", values.device());
}

}  // namespace csikernels
