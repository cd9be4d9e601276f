// Checks of lasco_forward, the same for every device.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "lasco_sizes.h"

namespace csikernels {

// One entry of the flat weight list: whether it is the matrix of a product, and its shape without the slot.
struct SamWeight {
  bool matrix;
  at::DimVector shape;
};

inline std::vector<SamWeight> sam_weights(const SamSizes& s) {
  std::vector<SamWeight> all;
  all.reserve(s.weights());
  const auto vectors = [&](int count) {
    for (int i = 0; i < count; ++i) all.push_back({false, {s.width}});
  };
  const auto linear = [&](int64_t rows, int64_t depth) {
    all.push_back({true, {rows, depth}});
    all.push_back({false, {rows}});
  };
  linear(s.width, s.features);
  all.push_back({false, {s.tokens, s.width}});
  for (int64_t block = 0; block < s.layers; ++block) {
    linear(3 * s.width, s.width);
    linear(s.width, s.width);
    linear(s.feedforward, s.width);
    linear(s.width, s.feedforward);
    vectors(4);
  }
  vectors(s.final_norm ? 2 : 0);
  linear(s.features, s.width);
  return all;
}

// h_in, base_output [B, T, F], alpha [U], all float32
inline void check_lasco_inputs(const at::Tensor& h_in, const at::Tensor& base_output, const at::Tensor& alpha) {
  check_dim(h_in, "h_in", 3, "[B, T, F]");
  check_same_shape(base_output, "base_output", h_in, "h_in");
  for (const auto& [tensor, name] : {std::pair(&h_in, "h_in"), {&base_output, "base_output"}, {&alpha, "alpha"}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, name, ": expected float32, got ", tensor->scalar_type());
    check_device(*tensor, name, h_in.device());
  }
}

// The sizes, from the inputs and the proxies' weights; the weights' shapes are for check_sam_weights().
inline SamSizes sam_sizes(const at::Tensor& h_in, const at::Tensor& alpha, at::TensorList proxies, int64_t heads,
                          std::string_view activation, bool norm_first, double eps) {
  TORCH_CHECK_VALUE(activation == "relu" || activation == "gelu", "activation: expected relu or gelu, got ",
                    activation);
  TORCH_CHECK_VALUE(proxies.size() >= 17, "proxies: expected at least 17 weights, got ", proxies.size());
  check_dim(proxies[0], "proxies[0]", 3, "[U, d, F]");
  check_dim(proxies[7], "proxies[7]", 3, "[U, ff, d]");
  const auto rest = static_cast<int64_t>(proxies.size()) - 5;
  SamSizes s{};
  s.tokens = h_in.size(1);
  s.features = h_in.size(2);
  s.layers = rest / 12;
  s.width = proxies[0].size(1);
  s.heads = heads;
  s.feedforward = proxies[7].size(1);
  s.gelu = activation == "gelu";
  s.norm_first = norm_first;
  s.final_norm = rest % 12 != 0;
  s.bfloat16 = proxies[0].scalar_type() == at::kBFloat16;
  s.eps = static_cast<float>(eps);
  TORCH_CHECK_VALUE(heads > 0 && s.width % heads == 0, "heads: expected a divisor of the width ", s.width, ", got ",
                    heads);
  check_dim(alpha, "alpha", 1, "[U]");
  return s;
}

// The flat list of one network, or of `count` networks stacked along the first dimension; `expected` by sam_weights().
inline void check_sam_weights(at::TensorList weights, const char* name, const std::vector<SamWeight>& expected,
                              bool bfloat16, int64_t count, bool stacked, c10::Device device) {
  TORCH_CHECK_VALUE(weights.size() == expected.size(), name, ": expected ", expected.size(), " weights, got ",
                    weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    at::DimVector shape = expected[i].shape;
    if (stacked) shape.insert(shape.begin(), count);
    TORCH_CHECK_VALUE(weights[i].sizes() == at::IntArrayRef(shape), name, "[", i, "]: expected shape ",
                      at::IntArrayRef(shape), ", got ", weights[i].sizes());
    const at::ScalarType type = bfloat16 && expected[i].matrix ? at::kBFloat16 : at::kFloat;
    TORCH_CHECK_TYPE(weights[i].scalar_type() == type, name, "[", i, "]: expected ", type, ", got ",
                     weights[i].scalar_type());
    check_device(weights[i], name, device);
  }
}

// slot [samples]
inline void check_slot_shape(const at::Tensor& slot, int64_t samples) {
  check_dim(slot, "slot", 1, "[B]");
  TORCH_CHECK_TYPE(slot.scalar_type() == at::kLong, "slot: expected int64, got ", slot.scalar_type());
  TORCH_CHECK_VALUE(slot.size(0) == samples, "slot: expected shape [", samples, "], one per sample of h_in, got ",
                    slot.sizes());
}

// The values of a slot tensor [B], contiguous and on the CPU.
inline void check_slot_values(const at::Tensor& slot, int64_t slots) {
  const int64_t* value = slot.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < slot.size(0); ++i) {
    TORCH_CHECK_VALUE(0 <= value[i] && value[i] < slots, "slot: expected 0..", slots - 1, " (the bank has ", slots,
                      " slots), got ", value[i]);
  }
}

}  // namespace csikernels
