// CPU side of lasco_forward: checks, the parallel loop over samples, registration.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/lasco_kernel.h"
#include "cpu/scratch.h"
#include "dispatch.h"
#include "lasco_check.h"

namespace csikernels::cpu {
namespace {

using OutputAndShift = std::tuple<at::Tensor, at::Tensor>;

// Samples whose proxies run before the reference runs on all of them. The reference's weights stay in the second cache
// level between turns; long turns ask memory for all they need in half of the time.
constexpr int64_t kTurn = 2;
// Below this many operations a second thread costs more to wake than it saves.
constexpr double kOperationsPerThread = 1e6;

SamForward forward_kernel(bool bfloat16) {
#if defined(__x86_64__)
  const Capability level = capability();
  if (bfloat16 && level >= Capability::avx512_bf16) return avx512_bf16::sam_forward;
  if (level >= Capability::avx512) return avx512::sam_forward;
  if (level >= Capability::avx2) return avx2::sam_forward;
#endif
  return scalar::sam_forward;
}

SamCorrect correct_kernel() {
#if defined(__x86_64__)
  const Capability level = capability();
  if (level >= Capability::avx512) return avx512::sam_correct;
  if (level >= Capability::avx2) return avx2::sam_correct;
#endif
  return scalar::sam_correct;
}

double operations(const SamSizes& s) {
  const double block = 4.0 * s.width * s.width + 2.0 * s.width * s.feedforward + 2.0 * s.tokens * s.width;
  return 2.0 * s.tokens * (2.0 * s.features * s.width + s.layers * block);
}

// The weights of many networks of one architecture, and where those of one lie.
class Networks {
 public:
  // stacked: whether each tensor has the networks as its first dimension.
  Networks(at::TensorList weights, const std::vector<SamWeight>& expected, const char* name, bool bfloat16,
           int64_t count, bool stacked) {
    check_sam_weights(weights, name, expected, bfloat16, count, stacked, at::kCPU);
    kept_.reserve(weights.size());
    first_.reserve(weights.size());
    bytes_.reserve(weights.size());
    for (const at::Tensor& weight : weights) {
      kept_.push_back(weight.contiguous());
      first_.push_back(static_cast<const char*>(kept_.back().const_data_ptr()));
      bytes_.push_back(stacked && count > 0 ? static_cast<int64_t>(kept_.back().nbytes()) / count : 0);
    }
  }

  void point(int64_t network, const void** weights) const {
    for (size_t i = 0; i < first_.size(); ++i) weights[i] = first_[i] + network * bytes_[i];
  }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<const char*> first_;
  std::vector<int64_t> bytes_;
};

// What one call works on.
struct Batch {
  SamSizes sizes;
  Networks proxies, reference;
  const float *h, *base, *alpha;
  const int64_t* slot;
  std::vector<int64_t> order;  // samples by slot, so that a slot's weights are read once
  float* output;
  int64_t values;  // of one sample

  const SamForward forward = forward_kernel(sizes.bfloat16);
  const SamCorrect correct = correct_kernel();
};

// Samples order[begin..end) from start to end. shift_of(sample, turn) is where its shift goes.
template <class ShiftOf>
void run_samples(const Batch& batch, int64_t begin, int64_t end, void* workspace, const ShiftOf& shift_of) {
  const int64_t count = batch.sizes.weights();
  std::vector<const void*> lists((kTurn + 2) * count);  // of a turn's proxies, the next turn's first, the reference
  const void** const reference = lists.data() + (kTurn + 1) * count;
  batch.reference.point(0, reference);
  for (int64_t first = begin; first < end; first += kTurn) {
    const int64_t turn = std::min(kTurn, end - first);
    for (int64_t i = 0; i <= turn && first + i < end; ++i) {
      batch.proxies.point(batch.slot[batch.order[first + i]], lists.data() + i * count);
    }
    for (int64_t i = 0; i < turn; ++i) {
      const int64_t sample = batch.order[first + i];
      const void** own = lists.data() + i * count;
      batch.forward(batch.sizes, own, i + 1 < turn ? own + count : reference, batch.h + sample * batch.values,
                    batch.output + sample * batch.values, workspace);
    }
    for (int64_t i = 0; i < turn; ++i) {
      const int64_t sample = batch.order[first + i];
      const bool proxy_next = i + 1 == turn && first + turn < end;
      float* shift = shift_of(sample, i);
      batch.forward(batch.sizes, reference, proxy_next ? lists.data() + turn * count : reference,
                    batch.h + sample * batch.values, shift, workspace);
      batch.correct(batch.output + sample * batch.values, batch.base + sample * batch.values, shift,
                    batch.alpha[batch.slot[sample]], batch.values);
    }
  }
}

// Few samples: proxy and reference of a sample are two tasks.
void run_networks(const Batch& batch, int64_t grain, float* shift) {
  const int64_t samples = static_cast<int64_t>(batch.order.size()), count = batch.sizes.weights();
  at::parallel_for(0, 2 * samples, 2 * grain - 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> workspace(sam_workspace(batch.sizes));
    std::vector<const void*> list(count);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task % samples;
      const bool proxy = task < samples;
      proxy ? batch.proxies.point(batch.slot[sample], list.data()) : batch.reference.point(0, list.data());
      batch.forward(batch.sizes, list.data(), list.data(), batch.h + sample * batch.values,
                    (proxy ? batch.output : shift) + sample * batch.values, workspace.get());
    }
  });
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t at = sample * batch.values;
    batch.correct(batch.output + at, batch.base + at, shift + at, batch.alpha[batch.slot[sample]], batch.values);
  }
}

void run(const Batch& batch, float* shift) {
  const int64_t samples = static_cast<int64_t>(batch.order.size());
  const auto grain = static_cast<int64_t>(std::ceil(kOperationsPerThread / (2 * operations(batch.sizes))));
  if (shift != nullptr && samples < 2 * at::get_num_threads()) return run_networks(batch, grain, shift);
  at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    const int64_t own = shift == nullptr ? kTurn * batch.values : 0;
    const int64_t bytes = (sam_workspace(batch.sizes) + 63) / 64 * 64;
    const Scratch<char> workspace(bytes + own * static_cast<int64_t>(sizeof(float)));
    float* turns = reinterpret_cast<float*>(workspace.get() + bytes);
    run_samples(batch, begin, end, workspace.get(), [&](int64_t sample, int64_t turn) {
      return shift != nullptr ? shift + sample * batch.values : turns + turn * batch.values;
    });
  });
}

using Signature = OutputAndShift(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 at::TensorList, at::TensorList, at::TensorList, int64_t, c10::string_view, bool,
                                 double, bool);

// h_in, base_output [B, T, F], slot [B], alpha [U] -> output [B, T, F], shift [B, T, F] or [0]
OutputAndShift lasco_forward(const at::Tensor& h_in, const at::Tensor& base_output, const at::Tensor& slot,
                             const at::Tensor& alpha, at::TensorList proxies, at::TensorList reference,
                             at::TensorList packed, int64_t heads, c10::string_view activation, bool norm_first,
                             double eps, bool keep_shift) {
  if (!is_chosen(Backend::cpp) || h_in.scalar_type() == at::kDouble) {  // float64 banks are for gradient checks
    return call_python<Signature>("lasco_forward", h_in, base_output, slot, alpha, proxies, reference, packed, heads,
                                  activation, norm_first, eps, keep_shift);
  }
  check_lasco_inputs(h_in, base_output, alpha);
  const SamSizes sizes = sam_sizes(h_in, alpha, proxies, heads, activation, norm_first, eps);
  const std::vector<SamWeight> expected = sam_weights(sizes);
  const int64_t slots = alpha.size(0), samples = h_in.size(0);
  const at::Tensor h = h_in.contiguous(), base = base_output.contiguous(), coefficients = alpha.contiguous();
  const at::Tensor chosen = slot.contiguous();
  check_slot_shape(chosen, samples);
  check_device(chosen, "slot", at::kCPU);
  check_slot_values(chosen, slots);
  const bool low = sizes.bfloat16;
  const bool whole_shift = keep_shift || samples < 2 * at::get_num_threads();
  at::Tensor output = at::empty_like(h);
  at::Tensor shift = whole_shift ? at::empty_like(h) : at::Tensor();
  Batch batch{sizes,
              Networks(proxies, expected, "proxies", low, slots, true),
              Networks(reference, expected, "reference", low, 1, false),
              h.const_data_ptr<float>(),
              base.const_data_ptr<float>(),
              coefficients.const_data_ptr<float>(),
              chosen.const_data_ptr<int64_t>(),
              std::vector<int64_t>(samples),
              output.mutable_data_ptr<float>(),
              sizes.tokens * sizes.features};
  std::iota(batch.order.begin(), batch.order.end(), 0);
  std::stable_sort(batch.order.begin(), batch.order.end(),
                   [&](int64_t a, int64_t b) { return batch.slot[a] < batch.slot[b]; });
  if (h.numel() > 0) run(batch, whole_shift ? shift.mutable_data_ptr<float>() : nullptr);
  return {output, keep_shift ? shift : at::empty({0}, h.options())};
}

}  // namespace

int64_t sam_workspace(const SamSizes& s) {
  const int64_t stride = (s.tokens + 15) / 16 * 16, hidden = std::max(s.feedforward, s.features);
  const int64_t activations = (7 * s.width + s.features + hidden) * stride + 32 * s.tokens;
  const int64_t matrix = s.width * std::max({3 * s.width, s.feedforward, s.features});
  const int64_t spans = 2 * 24 * s.weights(), alignments = 64 * 12;
  return 4 * (activations + (s.bfloat16 ? matrix : 0)) + spans + alignments;
}

}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("lasco_forward", &csikernels::cpu::lasco_forward); }
