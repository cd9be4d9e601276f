// CUDA side of nf4_lora: checks, allocations, launches, registration.
//
// Products with the 4-bit weight are this package's kernels; those of the adapter alone are torch's (cuBLAS), in the
// type of the layer's product. Nothing here waits for the GPU but nf4_quantize, which names an element it refuses.
#include "cuda/nf4_lora.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <bit>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "dispatch.h"
#include "nf4_lora_check.h"

namespace csikernels::cuda {
namespace {

using PackedAndScales = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What runs within must not record a graph, nor be cast by autocast: the types are this op's own.
struct Plain {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

NF4 nf4_of(const at::Tensor& packed, const at::Tensor& absmax, int64_t n, int64_t k, int64_t block_size) {
  return {.packed = read<uint8_t>(packed),
          .absmax = read<float>(absmax),
          .n = static_cast<int>(n),
          .k = static_cast<int>(k),
          .block_shift = std::countr_zero(static_cast<uint64_t>(block_size))};
}

Dense dense_of(const at::Tensor& tensor) {
  return {.data = tensor.numel() == 0 ? nullptr : read<void>(tensor), .type = scalar_of(tensor.scalar_type())};
}

// Sizes that the kernels count in 32 bits, and the grid's limit of 65,535 tiles of outputs.
bool has_kernel_for(int64_t n, int64_t k, int64_t rank) {
  constexpr int64_t most = 65535 * int64_t{128};
  return 0 < n && n < most && 0 < k && k < most && rank < most;
}

// weight floating [N, K] -> packed uint8 [ceil(N K / 2)], absmax float32 [ceil(N K / block_size)]
PackedAndScales quantize_cuda(const at::Tensor& weight, int64_t block_size) {
  if (!is_chosen(Backend::cuda) || !runs_on(weight)) {
    return call_python<PackedAndScales(const at::Tensor&, int64_t)>("nf4_quantize", weight, block_size);
  }
  check_floating(weight, "weight");
  check_dim(weight, "weight", 2, "[N, K]");
  check_nf4_block_size(block_size);
  const Launch launch(weight);
  const int64_t count = weight.numel();
  at::Tensor packed = at::empty({(count + 1) / 2}, weight.options().dtype(at::kByte));
  at::Tensor absmax = at::empty({(count + block_size - 1) / block_size}, weight.options().dtype(at::kFloat));
  if (count == 0) return {packed, absmax};
  const at::Tensor dense = weight.contiguous();
  at::Tensor refused = at::full({1}, std::numeric_limits<int64_t>::max(), weight.options().dtype(at::kLong));
  check_launch(
      nf4_quantize(read<void>(dense), scalar_of(dense.scalar_type()), count, static_cast<int>(block_size),
                   write<uint8_t>(packed), write<float>(absmax), write<unsigned long long>(refused), launch.stream()),
      "nf4_quantize");
  const int64_t first = refused.item<int64_t>();
  if (first < count) refuse_weight(weight, first);
  return {packed, absmax};
}

// packed uint8, absmax float32 -> [N, K] of `type`
at::Tensor dequantize_cuda(const at::Tensor& packed, const at::Tensor& absmax, c10::SymIntArrayRef shape,
                           int64_t block_size, at::ScalarType type) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(shape);
  TORCH_CHECK_VALUE(sizes.size() == 2, "shape: expected [N, K], got ", sizes);
  if (!is_chosen(Backend::cuda) || !runs_on(packed) || !has_kernel_for(sizes[0], sizes[1], 0)) {
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, int64_t, at::ScalarType)>(
        "nf4_dequantize", packed, absmax, shape, block_size, type);
  }
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble,
                   "dtype: expected float16, bfloat16, float32 or float64, got ", type);
  check_nf4(packed, absmax, sizes[0], sizes[1], block_size);
  check_device(absmax, "absmax", packed.device());
  const Launch launch(packed);
  at::Tensor out = at::empty(sizes, packed.options().dtype(type));
  check_launch(nf4_dequantize(nf4_of(packed, absmax, sizes[0], sizes[1], block_size), write<void>(out), scalar_of(type),
                              launch.stream()),
               "nf4_dequantize");
  return out;
}

void check_devices(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, const at::Tensor& lora_a,
                   const at::Tensor& lora_b) {
  check_device(packed, "packed", x.device());
  check_device(absmax, "absmax", x.device());
  check_device(lora_a, "lora_a", x.device());
  check_device(lora_b, "lora_b", x.device());
}

at::Tensor contiguous_as(const at::Tensor& tensor, at::ScalarType type) { return tensor.to(type).contiguous(); }

// scaling * a b, rounded once to the type of both
at::Tensor scaled_product(const at::Tensor& a, const at::Tensor& b, double scaling) {
  return at::addmm(at::empty({1}, a.options()), a, b, 0, scaling);  // the first is not read where its factor is 0
}

// out = left W' + inner right + bias, see NF4Product; left, inner and right of one type
at::Tensor product(const at::Tensor& left, const NF4& weight, bool transposed, const at::Tensor& inner,
                   const at::Tensor& right, const at::Tensor& bias, const Launch& launch) {
  at::Tensor out = at::empty({left.size(0), transposed ? weight.k : weight.n}, left.options());
  const Dense through = dense_of(inner), adapter = dense_of(right);
  NF4Product job{.left = read<void>(left),
                 .type = scalar_of(left.scalar_type()),
                 .rows = static_cast<int>(left.size(0)),
                 .weight = weight,
                 .transposed = transposed,
                 .rank = through.data ? static_cast<int>(inner.size(1)) : 0,
                 .inner = through.data,
                 .right = adapter.data,
                 .bias = dense_of(bias),
                 .out = write<void>(out),
                 .splits = 1,
                 .partial = nullptr};
  job.splits = nf4_splits(job, left.get_device());
  at::Tensor partial;
  if (job.splits > 1) {
    partial = at::empty({job.splits, out.size(0), out.size(1)}, left.options().dtype(at::kFloat));
    job.partial = write<float>(partial);
  }
  check_launch(nf4_product(job, launch.stream()), "nf4_lora_linear");
  return out;
}

at::Tensor few_tokens(const at::Tensor& x, const NF4& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                      double scaling, const at::Tensor& bias, const Launch& launch) {
  const int64_t tokens = x.size(0), rank = lora_a.size(0);
  at::Tensor out = at::empty({tokens, weight.n}, x.options());
  const at::Tensor a = lora_a.contiguous(), b = lora_b.contiguous();
  at::Tensor t = at::empty({tokens, rank}, x.options().dtype(at::kFloat));
  const FewTokens layer{.x = read<void>(x),
                        .type = scalar_of(x.scalar_type()),
                        .tokens = static_cast<int>(tokens),
                        .weight = weight,
                        .rank = static_cast<int>(rank),
                        .lora_a = dense_of(a),
                        .lora_b = dense_of(b),
                        .bias = dense_of(bias),
                        .scaling = static_cast<float>(scaling),
                        .t = rank > 0 ? write<float>(t) : nullptr,
                        .out = write<void>(out)};
  check_launch(nf4_few_tokens(layer, launch.stream()), "nf4_lora_linear");
  return out;
}

// x [..., K], packed uint8, absmax float32, lora_a [r, K], lora_b [N, r], bias [N] or nothing -> [..., N]
at::Tensor linear_cuda(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, int64_t block_size,
                       const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                       const std::optional<at::Tensor>& bias) {
  check_nf4_layer(x, lora_a, lora_b);
  const int64_t n = lora_b.size(0), k = x.size(-1);
  check_nf4_bias(bias, n);
  check_nf4(packed, absmax, n, k, block_size);
  check_devices(x, packed, absmax, lora_a, lora_b);
  if (bias) check_device(*bias, "bias", x.device());
  const bool wide = any_double(
      {x.scalar_type(), lora_a.scalar_type(), lora_b.scalar_type(), bias ? bias->scalar_type() : at::kFloat});
  const int64_t tokens = k > 0 ? x.numel() / k : 0;
  if (!is_chosen(Backend::cuda) || !runs_on(x) || wide || !has_kernel_for(n, k, lora_a.size(0)) ||
      tokens > std::numeric_limits<int>::max()) {
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&,
                                  const at::Tensor&, double, const std::optional<at::Tensor>&)>(
        "nf4_lora_linear", x, packed, absmax, block_size, lora_a, lora_b, scaling, bias);
  }
  const Plain plain;
  const Launch launch(x);
  auto shape = x.sizes().vec();
  shape.back() = n;
  if (tokens == 0) return at::empty(shape, x.options());
  const NF4 weight = nf4_of(packed, absmax, n, k, block_size);
  const at::Tensor rows = x.reshape({-1, k}).contiguous();
  const at::Tensor offset = bias ? bias->contiguous() : at::empty({0}, rows.options());
  if (tokens <= kFewTokens) return few_tokens(rows, weight, lora_a, lora_b, scaling, offset, launch).view(shape);
  at::Tensor t = at::empty({tokens, 0}, rows.options());
  const at::Tensor b = contiguous_as(lora_b, rows.scalar_type());
  if (lora_a.size(0) > 0) t = scaled_product(rows, contiguous_as(lora_a, rows.scalar_type()).t(), scaling);
  return product(rows, weight, false, t, b, offset, launch).view(shape);
}

// grad [..., N], the rest as in linear_cuda -> gradients of x, lora_a and lora_b in their types, of bias in float32 or
// wider; empty where not wanted
Gradients backward_cuda(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                        int64_t block_size, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                        std::array<bool, 4> wanted) {
  check_nf4_layer(x, lora_a, lora_b);
  const int64_t n = lora_b.size(0), k = x.size(-1), rank = lora_a.size(0);
  check_nf4_gradient(grad, x, n);
  check_nf4(packed, absmax, n, k, block_size);
  check_devices(x, packed, absmax, lora_a, lora_b);
  check_device(grad, "grad", x.device());
  const int64_t tokens = k > 0 ? x.numel() / k : 0;
  if (!is_chosen(Backend::cuda) || !runs_on(x) || !has_kernel_for(n, k, rank) ||
      tokens > std::numeric_limits<int>::max() ||
      any_double({grad.scalar_type(), x.scalar_type(), lora_a.scalar_type(), lora_b.scalar_type()})) {
    return call_python<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                 const at::Tensor&, const at::Tensor&, double, std::array<bool, 4>)>(
        "nf4_lora_linear_backward", grad, x, packed, absmax, block_size, lora_a, lora_b, scaling, wanted);
  }
  const Plain plain;
  const Launch launch(x);
  const at::Tensor g = grad.reshape({tokens, n}), rows = x.reshape({tokens, k});
  // Gradients are those of float32 products unless all that goes into one is of the same half precision.
  const at::ScalarType given = x.scalar_type();
  const at::ScalarType type = grad.scalar_type() == given ? given : at::kFloat;
  const bool same = lora_a.scalar_type() == type && lora_b.scalar_type() == type;
  const at::ScalarType adapter_type = same ? type : at::kFloat;
  at::Tensor for_x = at::empty({0}, x.options()), for_a = at::empty({0}, lora_a.options());
  at::Tensor for_b = at::empty({0}, lora_b.options()), for_bias = at::empty({0}, x.options().dtype(at::kFloat));
  at::Tensor u;  // scaling * g B in `type`
  if (wanted[0] && tokens == 0) for_x = at::empty(x.sizes(), x.options());
  if (wanted[0] && tokens > 0) {
    const at::Tensor left = contiguous_as(g, type), a = contiguous_as(lora_a, type);
    u = rank > 0 ? scaled_product(left, contiguous_as(lora_b, type), scaling) : at::empty({tokens, 0}, left.options());
    const NF4 weight = nf4_of(packed, absmax, n, k, block_size);
    const at::Tensor no_bias = at::empty({0}, left.options());
    for_x = product(left, weight, true, u, a, no_bias, launch).to(given).view(x.sizes());
  }
  if (wanted[1] || wanted[2]) {
    const at::Tensor left = contiguous_as(g, adapter_type), right = contiguous_as(rows, adapter_type);
    if (wanted[1]) {
      if (!u.defined() || adapter_type != type) {
        u = scaled_product(left, contiguous_as(lora_b, adapter_type), scaling);
      }
      for_a = at::mm(u.t(), right).to(lora_a.scalar_type());
    }
    if (wanted[2]) {
      const at::Tensor t = scaled_product(right, contiguous_as(lora_a, adapter_type).t(), scaling);
      for_b = at::mm(left.t(), t).to(lora_b.scalar_type());
    }
  }
  if (wanted[3]) for_bias = at::sum(g, {0}, false, at::kFloat);
  return {for_x, for_a, for_b, for_bias};
}

}  // namespace
}  // namespace csikernels::cuda

CSIKERNELS_CUDA_LIBRARY(m) {
  m.impl("nf4_quantize", &csikernels::cuda::quantize_cuda);
  m.impl("nf4_dequantize", &csikernels::cuda::dequantize_cuda);
  m.impl("nf4_lora_linear", &csikernels::cuda::linear_cuda);
  m.impl("nf4_lora_linear_backward", &csikernels::cuda::backward_cuda);
}
