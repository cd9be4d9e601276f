// CPU side of lasco_backward: the gradients of a bank of small models.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/activation_memory.h"
#include "cpu/lasco_backward_plan.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using BackwardResult = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// Samples of one slot that one task takes: about 16 tasks a batch. The sums of a weight's gradient are formed task by
// task and added in order, so that they depend on the batch alone, not on the threads.
int64_t backward_samples(int64_t batch) {
  const int64_t samples = std::clamp<int64_t>(batch / 16, 16, 128);
  return samples / kTrainSamples * kTrainSamples;
}

// What one thread needs for tasks of the backward.
struct BackwardScratch {
  const TrainShape& z;
  int64_t kept_floats, sample;
  Scratch<float> scratch, position, forward, kept, y, grad, sums;
  std::vector<float*> sum;

  BackwardScratch(const TrainShape& shape, bool recompute, bool through_reference, bool weights)
      : z(shape),
        kept_floats(kept_rows(z).rows * padded16(z.tokens)),
        sample(z.tokens * z.features),
        scratch(backward_scratch_floats(z)),
        position(z.width * padded16(z.tokens)),
        forward(recompute || through_reference ? forward_scratch_floats(z) : 0),
        kept(recompute || through_reference ? kTrainSamples * kept_floats : 0),
        y(sample),
        grad(through_reference ? 2 * kTrainSamples * sample : 0),
        sums(weights ? floats_of_sums(z) : 0) {
    int64_t offset = 0;
    for (int64_t i = 0; weights && i < weight_count(z); ++i) {
      sum.push_back(sums.get() + offset);
      offset += sum_floats(z, i);
    }
  }

  static int64_t floats_of_sums(const TrainShape& z) {
    int64_t floats = 0;
    for (int64_t i = 0; i < weight_count(z); ++i) floats += sum_floats(z, i);
    return floats;
  }

  float* const* cleared_sums() {
    if (sum.empty()) return nullptr;
    std::fill_n(sums.get(), floats_of_sums(z), 0.0f);
    return sum.data();
  }
};

// One lasco_backward call: raw pointers and the steps of a task.
struct BackwardPass {
  const TrainShape& z;
  const Plan& plan;
  const Networks &own, &shared;
  const float *h, *grad, *alpha;
  const float* kept;   // null: recompute
  float* grad_h;       // null: not wanted
  const float* shift;  // null: no gradient of alpha
  double* products;    // of each sample's gradient and shift
  TrainKernels run;

  // products[row] = sum(grad * shift) of rows[begin, end), in 16 partial sums each.
  void along(int64_t begin, int64_t end, int64_t sample) const {
    if (shift == nullptr) return;
    for (int64_t j = begin; j < end; ++j) {
      const float *a = grad + plan.rows[j] * sample, *b = shift + plan.rows[j] * sample;
      float partial[16] = {};
      int64_t i = 0;
      for (; i + 16 <= sample; i += 16) {
        for (int64_t k = 0; k < 16; ++k) partial[k] += a[i + k] * b[i + k];
      }
      double sum = 0;
      for (; i < sample; ++i) sum += static_cast<double>(a[i]) * b[i];
      for (const float part : partial) sum += part;
      products[plan.rows[j]] = sum;
    }
  }

  // Gradients of a task's proxy, summed into `sums` where not null.
  void proxy(const Task& task, BackwardScratch& memory, float* const* sums) const {
    const TrainNetwork network = own.get(task.slot, memory.position.get());
    for (int64_t j = task.begin; j < task.end; j += kTrainSamples) {
      TrainBatch batch = batch_at(task, j, memory);
      for (int64_t s = 0; s < batch.count; ++s) {
        const int64_t row = plan.rows[j + s];
        if (kept != nullptr) {
          batch.kept[s] = batch.next[s] = kept + row * memory.kept_floats;
          const int64_t later = j + kTrainSamples + s;
          if (later < task.end) batch.next[s] = kept + plan.rows[later] * memory.kept_floats;
        } else {
          recompute(network, batch, s, memory);
        }
      }
      along(j, j + batch.count, memory.sample);  // here, where it brings the gradient into the cache
      run.backward(network, batch, sums, memory.scratch.get());
    }
  }

  // grad_h += what flows through -alpha * reference(h).
  void reference(const Task& task, BackwardScratch& memory) const {
    const TrainNetwork network = shared.get(0, memory.position.get());
    float* scaled = memory.grad.get();
    float* partial = scaled + kTrainSamples * memory.sample;
    for (int64_t j = task.begin; j < task.end; j += kTrainSamples) {
      TrainBatch batch = batch_at(task, j, memory);
      for (int64_t s = 0; s < batch.count; ++s) {
        float* own_grad = scaled + s * memory.sample;
        for (int64_t i = 0; i < memory.sample; ++i) own_grad[i] = -alpha[task.slot] * batch.grad[s][i];
        batch.grad[s] = own_grad;
        batch.grad_h[s] = partial + s * memory.sample;
        recompute(network, batch, s, memory);
      }
      run.backward(network, batch, nullptr, memory.scratch.get());
      for (int64_t s = 0; s < batch.count; ++s) {
        float* to = grad_h + plan.rows[j + s] * memory.sample;
        for (int64_t i = 0; i < memory.sample; ++i) to[i] += batch.grad_h[s][i];
      }
    }
  }

 private:
  TrainBatch batch_at(const Task& task, int64_t first, const BackwardScratch& memory) const {
    TrainBatch batch{};
    batch.count = std::min(kTrainSamples, task.end - first);
    for (int64_t s = 0; s < batch.count; ++s) {
      const int64_t place = plan.rows[first + s] * memory.sample;
      batch.h[s] = h + place;
      batch.grad[s] = grad + place;
      batch.grad_h[s] = grad_h == nullptr ? nullptr : grad_h + place;
      const int64_t next = plan.rows[std::min(first + kTrainSamples + s, task.end - 1)] * memory.sample;
      batch.next_grad[s] = grad + next;
      batch.next_shift[s] = (shift == nullptr ? grad : shift) + next;
    }
    return batch;
  }

  void recompute(const TrainNetwork& network, TrainBatch& batch, int64_t s, const BackwardScratch& memory) const {
    float* to = memory.kept.get() + s * memory.kept_floats;
    const float* soon[] = {to, to, to, to, to};
    run.forward(network, batch.h[s], to, kept_rows(z).block, memory.y.get(), soon, memory.forward.get());
    batch.kept[s] = batch.next[s] = to;
  }
};

// The gradient of every weight, filled task by task. A slot of one task writes its place at once; the parts of other
// slots are kept apart and added in order.
class WeightGradients {
 public:
  WeightGradients(const TrainShape& z, const Plan& plan, at::TensorList proxies) : z_(z), plan_(plan) {
    for (int64_t i = 0; i < weight_count(z); ++i) {
      const auto [rows, columns] = weight_shape(z, i);
      floats_.push_back(rows * std::max<int64_t>(1, columns));
      grads.push_back(at::empty(proxies[i].sizes(), proxies[i].options().memory_format(at::MemoryFormat::Contiguous)));
    }
    total_ = std::accumulate(floats_.begin(), floats_.end(), int64_t{0});
    int64_t parts = 0;
    for (const int64_t count : plan.parts) {
      first_part_.push_back(parts);
      parts += count > 1 ? count : 0;
    }
    parts_ = activation_memory({parts, total_}, proxies[0].options());
  }

  std::vector<float*> place(const Task& task) {
    const bool alone = plan_.parts[task.slot] == 1;
    float* part = alone ? nullptr : parts_.mutable_data_ptr<float>() + (first_part_[task.slot] + task.part) * total_;
    std::vector<float*> to;
    for (size_t i = 0; i < floats_.size(); ++i) {
      to.push_back(alone ? grads[i].mutable_data_ptr<float>() + task.slot * floats_[i] : part);
      if (!alone) part += floats_[i];
    }
    return to;
  }

  // Adds the parts; slots without samples become zero.
  void finish(int64_t slot) {
    const int64_t parts = plan_.parts[slot];
    if (parts == 1) return;
    const float* from = parts == 0 ? nullptr : parts_.const_data_ptr<float>() + first_part_[slot] * total_;
    for (size_t i = 0; i < floats_.size(); ++i) {
      float* to = grads[i].mutable_data_ptr<float>() + slot * floats_[i];
      std::fill_n(to, floats_[i], 0.0f);
      if (parts == 0) continue;
      for (int64_t part = 0; part < parts; ++part) {
        const float* own = from + part * total_;
        for (int64_t k = 0; k < floats_[i]; ++k) to[k] += own[k];
      }
      from += floats_[i];
    }
  }

  std::vector<at::Tensor> grads;

 private:
  const TrainShape& z_;
  const Plan& plan_;
  std::vector<int64_t> floats_, first_part_;
  int64_t total_ = 0;
  at::Tensor parts_;
};

// grad, h_in [B, T, F]; slot [B]; alpha [U]; shift [B, T, F] and kept as lasco_training_forward left them, or [0]
// -> grad_h_in [B, T, F] ([0] unless input_grad), grad_alpha [U] ([0] without shift), grads of proxies [U, ...] ([]
// unless weight_grad).
BackwardResult lasco_backward(const at::Tensor& grad, const at::Tensor& h_in, const at::Tensor& slot,
                              const at::Tensor& alpha, at::TensorList proxies, at::TensorList reference,
                              const at::Tensor& shift, const at::Tensor& kept, int64_t heads,
                              c10::string_view activation, bool norm_first, double eps, bool input_grad,
                              bool weight_grad) {
  if (!is_chosen(Backend::cpp) || !is_float32(h_in, proxies, reference)) {
    return call_python<BackwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      at::TensorList, at::TensorList, const at::Tensor&, const at::Tensor&, int64_t,
                                      c10::string_view, bool, double, bool, bool)>(
        "lasco_backward", grad, h_in, slot, alpha, proxies, reference, shift, kept, heads, activation, norm_first, eps,
        input_grad, weight_grad);
  }
  const Hyper hyper{heads, {activation.data(), activation.size()}, norm_first, eps};
  check_slots(h_in, slot, alpha);
  const int64_t batch = h_in.size(0), slots = alpha.size(0);
  const TrainShape z = shape_of(h_in, proxies, "proxies", slots, hyper);
  check_like_input(grad, "grad", h_in);
  const bool through_reference = input_grad && !reference.empty();
  if (through_reference) shape_of(h_in, reference, "reference", 0, hyper);
  const int64_t kept_floats = kept_rows(z).rows * padded16(z.tokens);
  TORCH_CHECK_VALUE(kept.numel() == 0 || kept.numel() == batch * kept_floats, "kept: expected ", batch, " x ",
                    kept_floats, " floats or none, got ", kept.sizes());
  const bool along = shift.dim() == 3;
  if (along) check_like_input(shift, "shift", h_in);
  const Plan plan(z, slot, slots, backward_samples(batch));

  const at::Tensor h = h_in.contiguous(), g = grad.contiguous(), stored = kept.contiguous();
  const at::Tensor moved = shift.contiguous();
  const at::Tensor alphas = alpha.to(at::kFloat).contiguous();
  const bool recompute = kept.numel() == 0;
  const Networks own(z, proxies, slots);
  const Networks shared(z, through_reference ? reference : proxies, through_reference ? 0 : slots);
  at::Tensor grad_h = at::empty(input_grad ? h.sizes() : at::IntArrayRef{0}, h.options());
  std::optional<WeightGradients> weights;
  if (weight_grad) weights.emplace(z, plan, proxies);
  std::vector<double> products(along ? batch : 0);
  const BackwardPass pass{z,
                          plan,
                          own,
                          shared,
                          h.const_data_ptr<float>(),
                          g.const_data_ptr<float>(),
                          alphas.const_data_ptr<float>(),
                          recompute ? nullptr : stored.const_data_ptr<float>(),
                          input_grad ? grad_h.mutable_data_ptr<float>() : nullptr,
                          along ? moved.const_data_ptr<float>() : nullptr,
                          products.data(),
                          train_kernels()};
  at::parallel_for(0, static_cast<int64_t>(plan.tasks.size()), plan.grain, [&](int64_t first, int64_t last) {
    BackwardScratch memory(z, recompute, through_reference, weight_grad);
    for (int64_t i = first; i < last; ++i) {
      if (!input_grad && !weight_grad) {
        pass.along(plan.tasks[i].begin, plan.tasks[i].end, memory.sample);
        continue;
      }
      float* const* sums = memory.cleared_sums();
      pass.proxy(plan.tasks[i], memory, sums);
      if (weight_grad) pass.run.collect(z, sums, weights->place(plan.tasks[i]).data());
      if (through_reference) pass.reference(plan.tasks[i], memory);
    }
  });
  at::Tensor grad_alpha = at::zeros({along ? slots : 0}, alphas.options());
  for (const Task& task : plan.tasks) {
    double sum = 0;
    for (int64_t j = task.begin; along && j < task.end; ++j) sum += products[plan.rows[j]];
    if (along) grad_alpha.mutable_data_ptr<float>()[task.slot] += static_cast<float>(sum);
  }
  if (!weight_grad) return {grad_h, grad_alpha, {}};
  at::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) weights->finish(u);
  });
  return {grad_h, grad_alpha, weights->grads};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("lasco_backward", &csikernels::cpu::lasco_backward); }
