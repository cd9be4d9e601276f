// CUDA side of lasco_forward: checks, allocations, launches, registration.
//
// Nothing here waits for the GPU, and all memory is torch's, so the op can be captured in a CUDA graph. A slot beyond
// the bank in a tensor on the GPU stops the kernel, as in torch's own indexing: to name it would mean to wait. One on
// the CPU is checked here, and copied through pinned memory; a graph would copy it from there at every replay, when the
// memory may be another's, so what is captured must have its slots on the GPU.
#include "cuda/lasco.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <string_view>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "dispatch.h"
#include "lasco_check.h"

namespace csikernels::cuda {
namespace {

using OutputAndShift = std::tuple<at::Tensor, at::Tensor>;
using Signature = OutputAndShift(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 at::TensorList, at::TensorList, at::TensorList, int64_t, c10::string_view, bool,
                                 double, bool);

constexpr int kGeneralBlocks = 512;  // each has a workspace

// Contiguous and at a multiple of 16 bytes, the unit of the kernels' copies.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

// slot beside h_in
at::Tensor slots_on_device(const at::Tensor& slot, const at::Tensor& h_in, int64_t slots) {
  check_slot_shape(slot, h_in.size(0));
  if (!slot.is_cpu()) {
    check_device(slot, "slot", h_in.device());
    return slot.contiguous();
  }
  const at::Tensor values = slot.contiguous();
  check_slot_values(values, slots);
  return h_in.is_cpu() || values.numel() == 0 ? values : values.pin_memory().to(h_in.device(), /*non_blocking=*/true);
}

// Puts one network's weights, or those of all slots, into a call.
std::vector<at::Tensor> point_to(at::TensorList weights, const void** pointers) {
  std::vector<at::Tensor> kept;
  for (const at::Tensor& weight : weights) {
    kept.push_back(aligned(weight));
    pointers[kept.size() - 1] = read<void>(kept.back());
  }
  return kept;
}

// h_in, base_output [B, T, F], slot [B], alpha [U] -> output [B, T, F], shift [B, T, F] or [0]
OutputAndShift lasco_forward(const at::Tensor& h_in, const at::Tensor& base_output, const at::Tensor& slot,
                             const at::Tensor& alpha, at::TensorList proxies, at::TensorList reference,
                             at::TensorList packed, int64_t heads, c10::string_view activation, bool norm_first,
                             double eps, bool keep_shift) {
  const auto by_python = [&] {
    return call_python<Signature>("lasco_forward", h_in, base_output, slot, alpha, proxies, reference, packed, heads,
                                  activation, norm_first, eps, keep_shift);
  };
  if (!is_chosen(Backend::cuda) || !runs_on(h_in) || h_in.scalar_type() == at::kDouble) return by_python();
  check_lasco_inputs(h_in, base_output, alpha);
  const SamSizes sizes = sam_sizes(h_in, alpha, proxies, heads, activation, norm_first, eps);
  const int64_t slots = alpha.size(0), samples = h_in.size(0);
  const std::vector<SamWeight> expected = sam_weights(sizes);
  check_sam_weights(proxies, "proxies", expected, sizes.bfloat16, slots, true, h_in.device());
  check_sam_weights(reference, "reference", expected, sizes.bfloat16, 1, false, h_in.device());
  const bool small = h_in.numel() / std::max<int64_t>(1, samples) <= std::numeric_limits<int>::max() / 4 &&
                     samples <= std::numeric_limits<int>::max();
  if (sizes.layers > kMaxLayers || !small) return by_python();

  const Launch launch(h_in);
  const at::Tensor chosen = slots_on_device(slot, h_in, slots);
  const at::Tensor h = aligned(h_in), base = aligned(base_output), coefficients = alpha.contiguous();
  at::Tensor output = at::empty(h.sizes(), h.options());
  at::Tensor shift = keep_shift ? at::empty(h.sizes(), h.options()) : at::empty({0}, h.options());
  if (h.numel() == 0) return {output, shift};
  LascoCall call{.sizes = sizes,
                 .h_in = read<float>(h),
                 .base_output = read<float>(base),
                 .slot = read<int64_t>(chosen),
                 .alpha = read<float>(coefficients),
                 .weights = {},
                 .output = write<float>(output),
                 .shift = keep_shift ? write<float>(shift) : nullptr,
                 .samples = samples,
                 .slots = slots,
                 .entries = sizes.weights()};
  const std::vector<at::Tensor> own = point_to(proxies, call.weights[kProxySam]);
  const std::vector<at::Tensor> shared = point_to(reference, call.weights[kReferenceSam]);
  if (is_tiled(sizes)) {
    check_launch(lasco_tiled(call, launch.stream()), "lasco_forward");
  } else {
    const int blocks = static_cast<int>(std::min<int64_t>(samples, kGeneralBlocks));
    at::Tensor workspace = at::empty({blocks, general_workspace(sizes)}, h.options());
    check_launch(lasco_general(call, write<float>(workspace), blocks, launch.stream()), "lasco_forward");
  }
  return {output, shift};
}

}  // namespace
}  // namespace csikernels::cuda

CSIKERNELS_CUDA_LIBRARY(m) { m.impl("lasco_forward", &csikernels::cuda::lasco_forward); }
