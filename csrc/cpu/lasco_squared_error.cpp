// CPU side of lasco_squared_error: the error of a bank's estimates and its gradients in one pass.
//
// The gradient of a sum of squares is known as soon as the forward is, so the backward of a few samples follows their
// forward while everything the forward kept is in the cache: of the 205 KB a sample, and of the estimate, its shift and
// its gradient, nothing goes to memory and back. Bench machine, 8 slots x 256 samples, the reference's output known:
// 0.9 of the time of lasco_training_forward, a loss in PyTorch and lasco_backward.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/lasco_backward_plan.h"
#include "cpu/lasco_weight_gradients.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using Optional = std::optional<at::Tensor>;
using ErrorResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Samples whose reference runs before their proxy, so that each network's weights stay in the cache meanwhile.
constexpr int64_t kReferenceSamples = 32;

// Of one sample.
struct Residual {
  double squares, along;  // sum(e^2), sum(2 e shift)
};

// e = y + alpha (base - reference) - target; y becomes 2 e.
Residual residual(float* y, const float* base, const float* reference, const float* target, float alpha,
                  int64_t count) {
  constexpr int64_t kLanes = 16;
  float squares[kLanes] = {}, along[kLanes] = {};
  Residual sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const float shift = base[i + k] - reference[i + k], e = y[i + k] + alpha * shift - target[i + k];
      squares[k] += e * e;
      along[k] += 2 * e * shift;
      y[i + k] = 2 * e;
    }
  }
  for (; i < count; ++i) {
    const float shift = base[i] - reference[i], e = y[i] + alpha * shift - target[i];
    sum.squares += static_cast<double>(e) * e;
    sum.along += 2.0 * e * shift;
    y[i] = 2 * e;
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    sum.squares += squares[k];
    sum.along += along[k];
  }
  return sum;
}

// One lasco_squared_error call.
struct ErrorPass {
  const TrainShape& z;
  const Plan& plan;
  const Networks &own, &shared;
  const float *h, *base, *target, *alpha;
  const float* given;  // the reference's output; null: run it
  bool weight_grad;
  Residual* residuals;  // of each sample
  TrainKernels run;

  const int64_t sample = z.tokens * z.features;
  const int64_t kept_floats = kept_rows(z).rows * padded16(z.tokens);

  // What one thread needs.
  struct Memory {
    WeightSums sums;
    Scratch<float> forward, backward, position, kept, y, reference;

    explicit Memory(const ErrorPass& pass)
        : sums(pass.z, pass.weight_grad),
          forward(forward_scratch_floats(pass.z)),
          backward(pass.weight_grad ? backward_scratch_floats(pass.z) : 0),
          position(pass.z.width * padded16(pass.z.tokens)),
          kept(kTrainSamples * pass.kept_floats),
          y(kTrainSamples * pass.sample),
          reference(pass.given == nullptr ? kReferenceSamples * pass.sample : 0) {}
  };

  void task(const Task& task, Memory& memory, float* const* sums) const {
    for (int64_t begin = task.begin; begin < task.end; begin += kReferenceSamples) {
      const int64_t end = std::min(begin + kReferenceSamples, task.end);
      if (given == nullptr) run_reference(begin, end, memory);
      const TrainNetwork proxy = own.get(task.slot, memory.position.get());
      for (int64_t j = begin; j < end; j += kTrainSamples) {
        const int64_t count = std::min(kTrainSamples, end - j);
        for (int64_t s = 0; s < count; ++s) {
          const int64_t place = place_of(j + s), next = place_of(std::min(j + s + 1, task.end - 1));
          const float* reference = given == nullptr ? memory.reference.get() + (j + s - begin) * sample : given + place;
          const float* soon[] = {target + place, base + place, reference, h + next, h + next};
          float *kept = memory.kept.get() + s * kept_floats, *y = memory.y.get() + s * sample;
          run.forward(proxy, h + place, kept, kept_rows(z).block, y, soon, memory.forward.get());
          residuals[plan.rows[j + s]] = residual(y, base + place, reference, target + place, alpha[task.slot], sample);
        }
        if (sums != nullptr) backward(proxy, j, count, memory, sums);
      }
    }
  }

 private:
  int64_t place_of(int64_t j) const { return plan.rows[j] * sample; }

  void run_reference(int64_t begin, int64_t end, Memory& memory) const {
    const TrainNetwork network = shared.get(0, memory.position.get());
    for (int64_t j = begin; j < end; ++j) {
      float* y = memory.reference.get() + (j - begin) * sample;
      const float* next = h + place_of(std::min(j + 1, end - 1));
      const float* soon[] = {y, next, next, next, next};
      run.forward(network, h + place_of(j), memory.kept.get(), 0, y, soon, memory.forward.get());
    }
  }

  void backward(const TrainNetwork& network, int64_t first, int64_t count, Memory& memory, float* const* sums) const {
    TrainBatch batch{};
    batch.count = count;
    for (int64_t s = 0; s < count; ++s) {
      batch.h[s] = h + place_of(first + s);
      batch.grad[s] = memory.y.get() + s * sample;
      batch.kept[s] = batch.next[s] = memory.kept.get() + s * kept_floats;
      batch.next_grad[s] = batch.next_shift[s] = batch.h[s];
    }
    run.backward(network, batch, sums, memory.backward.get());
  }
};

// h_in, base_output, target [B, T, F]; slot [B]; alpha [U]; proxies [U, ...] each; reference, or its output [B, T, F]
// -> errors [U], their gradients along alpha [U] ([0] unless alpha_grad) and the proxies: one weight after the other,
// [U, ...] each ([0] unless weight_grad).
ErrorResult lasco_squared_error(const at::Tensor& h_in, const at::Tensor& base_output, const at::Tensor& target,
                                const at::Tensor& slot, const at::Tensor& alpha, at::TensorList proxies,
                                at::TensorList reference, const Optional& reference_output, int64_t heads,
                                c10::string_view activation, bool norm_first, double eps, bool alpha_grad,
                                bool weight_grad) {
  if (!is_chosen(Backend::cpp) || !is_float32(h_in, proxies, reference)) {
    return call_python<ErrorResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, at::TensorList, at::TensorList, const Optional&, int64_t,
                                   c10::string_view, bool, double, bool, bool)>(
        "lasco_squared_error", h_in, base_output, target, slot, alpha, proxies, reference, reference_output, heads,
        activation, norm_first, eps, alpha_grad, weight_grad);
  }
  const Hyper hyper{heads, {activation.data(), activation.size()}, norm_first, eps};
  check_slots(h_in, slot, alpha);
  const int64_t slots = alpha.size(0);
  const TrainShape z = shape_of(h_in, proxies, "proxies", slots, hyper);
  check_like_input(base_output, "base_output", h_in);
  check_like_input(target, "target", h_in);
  const bool runs_reference = !reference_output.has_value();
  if (runs_reference) {
    shape_of(h_in, reference, "reference", 0, hyper);
  } else {
    check_like_input(*reference_output, "reference_output", h_in);
  }
  const Plan plan(z, slot, slots, backward_samples(h_in.size(0)));

  const at::Tensor h = h_in.contiguous(), base = base_output.contiguous(), wanted = target.contiguous();
  const at::Tensor given = runs_reference ? h : reference_output->contiguous();
  const at::Tensor alphas = alpha.to(at::kFloat).contiguous();
  const Networks own(z, proxies, slots), shared(z, runs_reference ? reference : proxies, runs_reference ? 0 : slots);
  int64_t floats = 0;
  for (int64_t i = 0; weight_grad && i < weight_count(z); ++i) floats += slots * weight_floats(z, i);
  at::Tensor grads = at::empty({floats}, h.options());
  std::vector<float*> places;
  float* place = grads.mutable_data_ptr<float>();
  for (int64_t i = 0; weight_grad && i < weight_count(z); place += slots * weight_floats(z, i++)) {
    places.push_back(place);
  }
  WeightGradients weights(z, plan, places, h.options());
  std::vector<Residual> residuals(h.size(0));
  const ErrorPass pass{z,
                       plan,
                       own,
                       shared,
                       h.const_data_ptr<float>(),
                       base.const_data_ptr<float>(),
                       wanted.const_data_ptr<float>(),
                       alphas.const_data_ptr<float>(),
                       runs_reference ? nullptr : given.const_data_ptr<float>(),
                       weight_grad,
                       residuals.data(),
                       train_kernels()};
  at::parallel_for(0, static_cast<int64_t>(plan.tasks.size()), plan.grain, [&](int64_t first, int64_t last) {
    ErrorPass::Memory memory(pass);
    for (int64_t i = first; i < last; ++i) {
      float* const* sums = memory.sums.cleared();
      pass.task(plan.tasks[i], memory, sums);
      if (weight_grad) pass.run.collect(z, sums, weights.place(plan.tasks[i]).data());
    }
  });
  if (weight_grad) {
    at::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
      for (int64_t u = first; u < last; ++u) weights.finish(u);
    });
  }
  std::vector<Residual> totals(slots);
  for (const Task& task : plan.tasks) {
    for (int64_t j = task.begin; j < task.end; ++j) {
      totals[task.slot].squares += residuals[plan.rows[j]].squares;
      totals[task.slot].along += residuals[plan.rows[j]].along;
    }
  }
  at::Tensor errors = at::empty({slots}, h.options());
  at::Tensor grad_alpha = at::empty({alpha_grad ? slots : 0}, h.options());
  for (int64_t u = 0; u < slots; ++u) {
    errors.mutable_data_ptr<float>()[u] = static_cast<float>(totals[u].squares);
    if (alpha_grad) grad_alpha.mutable_data_ptr<float>()[u] = static_cast<float>(totals[u].along);
  }
  return {errors, grad_alpha, grads};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("lasco_squared_error", &csikernels::cpu::lasco_squared_error); }
