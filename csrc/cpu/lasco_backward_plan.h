// What the training ops share: checks, one pointer list per network, the split of a batch into tasks.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "cpu/lasco_backward_kernel.h"
#include "cpu/scratch.h"

namespace csikernels::cpu {

struct TrainKernels {
  decltype(&scalar::train_forward) forward;
  decltype(&scalar::train_backward) backward;
  decltype(&scalar::train_collect) collect;
};

// For the capability in force.
TrainKernels train_kernels();

struct Hyper {
  int64_t heads;
  std::string_view activation;
  bool norm_first;
  double eps;
};

// The architecture that h_in [B, T, F] and weights [U, ...] (or [...] where slots is 0) have; every shape is checked.
TrainShape shape_of(const at::Tensor& h_in, at::TensorList weights, const char* name, int64_t slots,
                    const Hyper& hyper);

// slot [B] int64, alpha [U].
void check_slots(const at::Tensor& h_in, const at::Tensor& slot, const at::Tensor& alpha);

// Shape, device and dtype of h_in.
void check_like_input(const at::Tensor& tensor, const char* name, const at::Tensor& h_in);

// Other dtypes are the reference's: the kernels compute in float32.
bool is_float32(const at::Tensor& h_in, at::TensorList proxies, at::TensorList reference);

// Contiguous weights that live as long as this object, as one pointer list per network.
class Networks {
 public:
  // weights [U, ...], or [...] where slots is 0.
  Networks(const TrainShape& shape, at::TensorList weights, int64_t slots);

  // `position` takes width * padded16(tokens) floats.
  TrainNetwork get(int64_t slot, float* position) const;

 private:
  TrainShape shape_;
  std::vector<at::Tensor> held_;
  std::vector<const float*> pointers_;
};

// Samples of one slot that a task of the backward takes.
int64_t backward_samples(int64_t batch);

// Samples rows[begin, end) of one slot.
struct Task {
  int64_t slot, begin, end;
  int64_t part;  // of the slot's tasks
};

// The batch sorted by slot, batch order kept, and cut into tasks of at most `samples`.
struct Plan {
  std::vector<int64_t> rows;
  std::vector<Task> tasks;
  std::vector<int64_t> parts;  // tasks of each slot
  int64_t grain;               // tasks below which a second thread costs more to wake than it saves

  // Raises where a slot is out of range.
  Plan(const TrainShape& shape, const at::Tensor& slot, int64_t slots, int64_t samples);
};

}  // namespace csikernels::cpu
