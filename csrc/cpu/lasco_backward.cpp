// CPU side of lasco_backward: the gradients of a bank of small models.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/lasco_backward_plan.h"
#include "cpu/lasco_weight_gradients.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using BackwardResult = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// What one thread needs for tasks of the backward.
struct BackwardScratch {
  int64_t kept_floats, sample;
  WeightSums sums;
  Scratch<float> scratch, position, forward, kept, y, grad;

  BackwardScratch(const TrainShape& z, bool recompute, bool through_reference, bool weights)
      : kept_floats(kept_rows(z).rows * padded16(z.tokens)),
        sample(z.tokens * z.features),
        sums(z, weights),
        scratch(backward_scratch_floats(z)),
        position(z.width * padded16(z.tokens)),
        forward(recompute || through_reference ? forward_scratch_floats(z) : 0),
        kept(recompute || through_reference ? kTrainSamples * kept_floats : 0),
        y(sample),
        grad(through_reference ? 2 * kTrainSamples * sample : 0) {}
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
  std::vector<at::Tensor> grads;
  std::vector<float*> places;
  for (int64_t i = 0; weight_grad && i < weight_count(z); ++i) {
    grads.push_back(at::empty(proxies[i].sizes(), proxies[i].options().memory_format(at::MemoryFormat::Contiguous)));
    places.push_back(grads.back().mutable_data_ptr<float>());
  }
  WeightGradients weights(z, plan, places, h.options());
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
      float* const* sums = memory.sums.cleared();
      pass.proxy(plan.tasks[i], memory, sums);
      if (weight_grad) pass.run.collect(z, sums, weights.place(plan.tasks[i]).data());
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
    for (int64_t u = first; u < last; ++u) weights.finish(u);
  });
  return {grad_h, grad_alpha, grads};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("lasco_backward", &csikernels::cpu::lasco_backward); }
