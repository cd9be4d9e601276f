// CPU side of lasco_training_forward: the forward that keeps what lasco_backward reads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check.h"
#include "cpu/activation_memory.h"
#include "cpu/lasco_backward_plan.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using Optional = std::optional<at::Tensor>;
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Of one slot in one task, so that the weights of the proxy and then of the reference stay in the cache.
constexpr int64_t kForwardSamples = 32;

// out += alpha (base - reference); the difference goes to shifts + place, where shifts is given.
void add_shift(float* out, const float* base, const float* reference, float alpha, float* shifts, int64_t place,
               int64_t count) {
  float* shift = shifts == nullptr ? nullptr : shifts + place;
  for (int64_t i = 0; i < count; ++i) {
    const float difference = base[i] - reference[i];
    out[i] += alpha * difference;
    if (shift != nullptr) shift[i] = difference;
  }
}

// h_in, base_output [B, T, F]; slot [B]; alpha [U]; proxies [U, ...] each; reference, or its output [B, T, F]
// -> output, shift [B, T, F] ([0] unless keep_shift), kept [B, floats] ([0] unless keep).
ForwardResult lasco_training_forward(const at::Tensor& h_in, const at::Tensor& base_output, const at::Tensor& slot,
                                     const at::Tensor& alpha, at::TensorList proxies, at::TensorList reference,
                                     const Optional& reference_output, int64_t heads, c10::string_view activation,
                                     bool norm_first, double eps, bool keep_shift, bool keep) {
  if (!is_chosen(Backend::cpp) || !is_float32(h_in, proxies, reference)) {
    return call_python<ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     at::TensorList, at::TensorList, const Optional&, int64_t, c10::string_view, bool,
                                     double, bool, bool)>("lasco_training_forward", h_in, base_output, slot, alpha,
                                                          proxies, reference, reference_output, heads, activation,
                                                          norm_first, eps, keep_shift, keep);
  }
  const Hyper hyper{heads, {activation.data(), activation.size()}, norm_first, eps};
  check_slots(h_in, slot, alpha);
  const int64_t batch = h_in.size(0), slots = alpha.size(0);
  const TrainShape z = shape_of(h_in, proxies, "proxies", slots, hyper);
  check_like_input(base_output, "base_output", h_in);
  const bool runs_reference = !reference_output.has_value();
  if (runs_reference) {
    shape_of(h_in, reference, "reference", 0, hyper);
  } else {
    check_like_input(*reference_output, "reference_output", h_in);
  }
  const Plan plan(z, slot, slots, kForwardSamples);

  const at::Tensor h = h_in.contiguous(), base = base_output.contiguous();
  const at::Tensor given = runs_reference ? h : reference_output->contiguous();
  const at::Tensor alphas = alpha.to(at::kFloat).contiguous();
  const Networks own(z, proxies, slots), shared(z, runs_reference ? reference : proxies, runs_reference ? 0 : slots);
  const Kept at = kept_rows(z);
  const int64_t t = padded16(z.tokens), sample = z.tokens * z.features, kept_floats = at.rows * t;
  // Tensors that need a gradient cannot be resized, so this memory serves them as well as torch's own.
  at::Tensor output = keep ? activation_memory(h.sizes(), h.options()) : at::empty(h.sizes(), h.options());
  at::Tensor shift = at::empty({0}, h.options());
  if (keep_shift) shift = activation_memory(h.sizes(), h.options());
  at::Tensor kept = keep ? activation_memory({batch, kept_floats}, h.options()) : at::empty({0}, h.options());

  const float *hs = h.const_data_ptr<float>(), *bases = base.const_data_ptr<float>();
  const float *givens = given.const_data_ptr<float>(), *factors = alphas.const_data_ptr<float>();
  float *outs = output.mutable_data_ptr<float>(), *shifts = keep_shift ? shift.mutable_data_ptr<float>() : nullptr;
  float* keeps = keep ? kept.mutable_data_ptr<float>() : nullptr;
  const TrainKernels run = train_kernels();
  at::parallel_for(0, static_cast<int64_t>(plan.tasks.size()), plan.grain, [&](int64_t first, int64_t last) {
    const Scratch<float> scratch(forward_scratch_floats(z)), dropped(kept_floats), position(z.width * t), y(sample);
    for (int64_t i = first; i < last; ++i) {
      const Task& task = plan.tasks[i];
      const TrainNetwork proxy = own.get(task.slot, position.get());
      for (int64_t j = task.begin; j < task.end; ++j) {
        const int64_t row = plan.rows[j], place = row * sample;
        const int64_t next = plan.rows[std::min(j + 1, task.end - 1)] * sample;
        float *to = keep ? keeps + row * kept_floats : dropped.get(), *out = outs + place;
        const float* moved = keep_shift ? shifts + place : out;
        const float* soon[] = {out, hs + next, bases + place, runs_reference ? out : givens + place, moved};
        run.forward(proxy, hs + place, to, keep ? at.block : 0, out, soon, scratch.get());
        if (!runs_reference) add_shift(out, bases + place, givens + place, factors[task.slot], shifts, place, sample);
      }
      if (!runs_reference) continue;
      const TrainNetwork common = shared.get(0, position.get());
      for (int64_t j = task.begin; j < task.end; ++j) {
        const int64_t place = plan.rows[j] * sample, next = plan.rows[std::min(j + 1, task.end - 1)] * sample;
        float* out = outs + place;
        const float* soon[] = {out, hs + next, bases + place, out, keep_shift ? shifts + place : out};
        run.forward(common, hs + place, dropped.get(), 0, y.get(), soon, scratch.get());
        add_shift(out, bases + place, y.get(), factors[task.slot], shifts, place, sample);
      }
    }
  });
  return {output, shift, kept};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("lasco_training_forward", &csikernels::cpu::lasco_training_forward); }
