// The gradients of a bank's weights while the tasks of a Plan sum them.
#pragma once

#include <vector>

#include "cpu/lasco_backward_plan.h"

namespace csikernels::cpu {

// One task's sums, a piece for each weight (sum_floats).
class WeightSums {
 public:
  // Empty unless wanted.
  WeightSums(const TrainShape& z, bool wanted);

  // Zeros to sum into; null where no weight's gradient is wanted.
  float* const* cleared();

 private:
  int64_t floats_;
  Scratch<float> memory_;
  std::vector<float*> pieces_;
};

// The gradient of every weight, filled task by task. A slot of one task writes its place at once; the parts of other
// slots are kept apart and added in order, so that the sums depend on the batch alone, not on the threads.
class WeightGradients {
 public:
  // grads: where each weight's [U, ...] goes; empty where no weight's gradient is wanted.
  WeightGradients(const TrainShape& z, const Plan& plan, const std::vector<float*>& grads,
                  const at::TensorOptions& options);

  // Where a task's gradients go, weight by weight.
  std::vector<float*> place(const Task& task);

  // Adds the parts of a slot; a slot without samples becomes zero.
  void finish(int64_t slot);

 private:
  const Plan& plan_;
  std::vector<float*> grads_;
  std::vector<int64_t> floats_, first_part_;
  int64_t total_ = 0;
  at::Tensor parts_;
};

}  // namespace csikernels::cpu
