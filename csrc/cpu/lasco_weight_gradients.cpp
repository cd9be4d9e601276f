#include "cpu/lasco_weight_gradients.h"

#include <algorithm>

#include "cpu/activation_memory.h"

namespace csikernels::cpu {
namespace {

int64_t floats_of_sums(const TrainShape& z) {
  int64_t floats = 0;
  for (int64_t i = 0; i < weight_count(z); ++i) floats += sum_floats(z, i);
  return floats;
}

}  // namespace

WeightSums::WeightSums(const TrainShape& z, bool wanted) : floats_(wanted ? floats_of_sums(z) : 0), memory_(floats_) {
  int64_t offset = 0;
  for (int64_t i = 0; wanted && i < weight_count(z); ++i) {
    pieces_.push_back(memory_.get() + offset);
    offset += sum_floats(z, i);
  }
}

float* const* WeightSums::cleared() {
  if (pieces_.empty()) return nullptr;
  std::fill_n(memory_.get(), floats_, 0.0f);
  return pieces_.data();
}

WeightGradients::WeightGradients(const TrainShape& z, const Plan& plan, const std::vector<float*>& grads,
                                 const at::TensorOptions& options)
    : plan_(plan), grads_(grads) {
  if (grads.empty()) return;
  for (int64_t i = 0; i < weight_count(z); ++i) {
    floats_.push_back(weight_floats(z, i));
    total_ += floats_.back();
  }
  int64_t parts = 0;
  for (const int64_t count : plan.parts) {
    first_part_.push_back(parts);
    parts += count > 1 ? count : 0;
  }
  parts_ = activation_memory({parts, total_}, options);
}

std::vector<float*> WeightGradients::place(const Task& task) {
  const bool alone = plan_.parts[task.slot] == 1;
  float* part = alone ? nullptr : parts_.mutable_data_ptr<float>() + (first_part_[task.slot] + task.part) * total_;
  std::vector<float*> to;
  for (size_t i = 0; i < floats_.size(); ++i) {
    to.push_back(alone ? grads_[i] + task.slot * floats_[i] : part);
    if (!alone) part += floats_[i];
  }
  return to;
}

void WeightGradients::finish(int64_t slot) {
  const int64_t parts = plan_.parts[slot];
  if (parts == 1) return;
  const float* from = parts == 0 ? nullptr : parts_.const_data_ptr<float>() + first_part_[slot] * total_;
  for (size_t i = 0; i < floats_.size(); ++i) {
    float* to = grads_[i] + slot * floats_[i];
    std::fill_n(to, floats_[i], 0.0f);
    if (parts == 0) continue;
    for (int64_t part = 0; part < parts; ++part) {
      const float* own = from + part * total_;
      for (int64_t k = 0; k < floats_[i]; ++k) to[k] += own[k];
    }
    from += floats_[i];
  }
}

}  // namespace csikernels::cpu
