#include "cpu/lasco_backward_plan.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "cpu/capability.h"

namespace csikernels::cpu {
namespace {

constexpr double kOperationsPerThread = 1e6;

double operations(const TrainShape& z) {
  const int64_t block = 4 * z.width * z.width + 2 * z.width * z.feedforward + 2 * z.tokens * z.width;
  return 2.0 * static_cast<double>(z.tokens * (2 * z.features * z.width + z.layers * block));
}

}  // namespace

TrainKernels train_kernels() {
#if defined(__x86_64__)
  const Capability level = capability();
  if (level >= Capability::avx512) return {&avx512::train_forward, &avx512::train_backward, &avx512::train_collect};
  if (level >= Capability::avx2) return {&avx2::train_forward, &avx2::train_backward, &avx2::train_collect};
#endif
  return {&scalar::train_forward, &scalar::train_backward, &scalar::train_collect};
}

TrainShape shape_of(const at::Tensor& h_in, at::TensorList weights, const char* name, int64_t slots,
                    const Hyper& hyper) {
  check_dim(h_in, "h_in", 3, "[B, T, F]");
  const int64_t lead = slots > 0 ? 1 : 0, count = static_cast<int64_t>(weights.size());
  const int64_t inner = (count - 5) % kWeightsPerBlock;
  TORCH_CHECK_VALUE(count >= 5 + kWeightsPerBlock && (inner == 0 || inner == 2), name,
                    ": expected 5 weights, 12 for each block and possibly 2 of a final norm, got ", count);
  TORCH_CHECK_VALUE(weights[0].dim() == 2 + lead && weights[7].dim() == 2 + lead, name, ": expected matrices [",
                    slots > 0 ? "U, " : "", "rows, columns], got ", weights[0].sizes(), " and ", weights[7].sizes());
  TrainShape z{};
  z.tokens = h_in.size(1);
  z.features = h_in.size(2);
  z.layers = (count - 5) / kWeightsPerBlock;
  z.width = weights[0].size(lead);
  z.heads = hyper.heads;
  z.feedforward = weights[7].size(lead);
  z.gelu = hyper.activation == "gelu";
  z.norm_first = hyper.norm_first;
  z.final_norm = inner == 2;
  z.eps = static_cast<float>(hyper.eps);
  TORCH_CHECK_VALUE(z.gelu || hyper.activation == "relu", "activation: expected 'relu' or 'gelu', got '",
                    hyper.activation, "'");
  TORCH_CHECK_VALUE(z.heads >= 1 && z.width % z.heads == 0, "heads: expected a divisor of the width ", z.width,
                    ", got ", z.heads);
  TORCH_CHECK_VALUE(z.tokens >= 1 && z.features >= 1, "h_in: expected at least one token and feature, got ",
                    h_in.sizes());
  for (int64_t i = 0; i < count; ++i) {
    const auto [rows, columns] = weight_shape(z, i);
    std::vector<int64_t> expected;
    if (slots > 0) expected.push_back(slots);
    expected.push_back(rows);
    if (columns > 0) expected.push_back(columns);
    TORCH_CHECK_VALUE(weights[i].sizes() == at::IntArrayRef(expected), name, "[", i, "]: expected shape ",
                      at::IntArrayRef(expected), ", got ", weights[i].sizes());
  }
  return z;
}

void check_like_input(const at::Tensor& tensor, const char* name, const at::Tensor& h_in) {
  check_same_shape(tensor, name, h_in, "h_in");
  check_device(tensor, name, h_in.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == h_in.scalar_type(), name, ": expected dtype ", h_in.scalar_type(), ", got ",
                   tensor.scalar_type());
}

void check_slots(const at::Tensor& h_in, const at::Tensor& slot, const at::Tensor& alpha) {
  TORCH_CHECK_TYPE(slot.scalar_type() == at::kLong, "slot: expected int64, got ", slot.scalar_type());
  TORCH_CHECK_VALUE(slot.dim() == 1 && slot.size(0) == h_in.size(0), "slot: expected shape [", h_in.size(0),
                    "], one per sample of h_in, got ", slot.sizes());
  check_dim(alpha, "alpha", 1, "[U]");
}

bool is_float32(const at::Tensor& h_in, at::TensorList proxies, at::TensorList reference) {
  const auto all = [](at::TensorList list) {
    return std::all_of(list.begin(), list.end(), [](const auto& t) { return t.scalar_type() == at::kFloat; });
  };
  return h_in.scalar_type() == at::kFloat && all(proxies) && all(reference);
}

Networks::Networks(const TrainShape& shape, at::TensorList weights, int64_t slots) : shape_(shape) {
  for (const auto& weight : weights) held_.push_back(weight.contiguous());
  for (int64_t slot = 0; slot < std::max<int64_t>(1, slots); ++slot) {
    for (const auto& weight : held_) {
      pointers_.push_back(weight.const_data_ptr<float>() + (slots > 0 ? slot * weight.stride(0) : 0));
    }
  }
}

TrainNetwork Networks::get(int64_t slot, float* position) const {
  const float* const* weights = pointers_.data() + slot * static_cast<int64_t>(held_.size());
  const int64_t t = padded16(shape_.tokens), d = shape_.width;
  for (int64_t i = 0; i < d; ++i) {
    std::fill_n(position + i * t, t, weights[1][i]);
    for (int64_t token = 0; token < shape_.tokens; ++token) position[i * t + token] += weights[2][token * d + i];
  }
  return {shape_, weights, position};
}

int64_t backward_samples(int64_t batch) {
  // About 16 tasks a batch: their sums of a weight's gradient are added task by task.
  const int64_t samples = std::clamp<int64_t>(batch / 16, 16, 128);
  return samples / kTrainSamples * kTrainSamples;
}

Plan::Plan(const TrainShape& shape, const at::Tensor& slot, int64_t slots, int64_t samples)
    : rows(slot.size(0)), parts(slots, 0) {
  const int64_t batch = slot.size(0);
  const at::Tensor on_cpu = slot.cpu().contiguous();
  const int64_t* of = on_cpu.const_data_ptr<int64_t>();
  if (batch > 0) {
    const auto [low, high] = std::minmax_element(of, of + batch);
    TORCH_CHECK_VALUE(*low >= 0 && *high < slots, "slot: expected 0..", slots - 1, " (the bank has ", slots,
                      " slots), got ", *low < 0 ? *low : *high);
  }
  std::vector<int64_t> first(slots + 1, 0);
  for (int64_t i = 0; i < batch; ++i) ++first[of[i] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < batch; ++i) rows[next[of[i]]++] = i;
  for (int64_t u = 0; u < slots; ++u) {
    for (int64_t begin = first[u]; begin < first[u + 1]; begin += samples) {
      tasks.push_back({u, begin, std::min(first[u + 1], begin + samples), parts[u]++});
    }
  }
  const double task = operations(shape) * static_cast<double>(batch) / std::max<double>(1, tasks.size());
  grain = std::max<int64_t>(1, static_cast<int64_t>(kOperationsPerThread / std::max(1.0, task)));
}

}  // namespace csikernels::cpu
