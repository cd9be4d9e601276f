// CPU side of nf4_lora: checks, the kernels of the capability in force, quantising and dequantising, registration.
#include "cpu/nf4_lora.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "cpu/capability.h"
#include "dispatch.h"
#include "nf4_lora_check.h"

namespace csikernels::cpu {
namespace nf4_lora {
namespace {

// Below this many elements a second thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

#define CSIKERNELS_FLOAT_LAYER(isa, lanes, wide)                                                 \
  Layer {                                                                                        \
    at::kFloat, lanes, 1, 2, wide, 32, nullptr, isa::panel, isa::pack, isa::pack, isa::multiply, \
        isa::store_transposed, isa::finish, isa::inner, isa::multiply_few                        \
  }

template <class Convert>
void for_each_chunk(const NF4Matrix& weight, Convert convert) {
  const int64_t count = weight.n * weight.k;
  constexpr int64_t chunk = 4096;  // a multiple of every block
  at::parallel_for(0, ceil_div(count, chunk), kElementsPerThread / chunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) convert(i * chunk, std::min(chunk, count - i * chunk));
  });
}

}  // namespace

Codec codec_in_force() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return {avx512::dequantize, avx512::dequantize_bf16, avx512::quantize};
  if (capability() >= Capability::avx2) return {avx2::dequantize, avx2::dequantize_bf16, avx2::quantize};
#endif
  return {scalar::dequantize, scalar::dequantize_bf16, scalar::quantize};
}

Layer float_layer() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return CSIKERNELS_FLOAT_LAYER(avx512, 16, true);
  if (capability() >= Capability::avx2) return CSIKERNELS_FLOAT_LAYER(avx2, 8, false);
#endif
  return CSIKERNELS_FLOAT_LAYER(scalar, 4, false);
}

Layer layer_for(at::ScalarType x) {
#if defined(__x86_64__)
  if (x == at::kBFloat16 && capability() >= Capability::avx512_bf16) {
    using namespace avx512_bf16;
    return Layer{at::kBFloat16,
                 16,
                 2,
                 128,
                 true,
                 8,
                 permute,
                 panel,
                 pack,
                 pack_for_panel,
                 multiply,
                 store_transposed,
                 finish,
                 inner,
                 multiply_few,
                 pack_for_rows,
                 multiply_by_rows};
  }
#endif
  return float_layer();
}

NF4Matrix matrix(const at::Tensor& packed, const at::Tensor& absmax, int64_t n, int64_t k, int64_t block_size) {
  check_nf4(packed, absmax, n, k, block_size);
  return {packed.const_data_ptr<uint8_t>(), absmax.const_data_ptr<float>(), n, k,
          std::countr_zero(static_cast<uint64_t>(block_size))};
}

at::Tensor dequantize(const NF4Matrix& weight, at::ScalarType type) {
  const Codec codec = codec_in_force();
  if (type == at::kHalf) return dequantize(weight, at::kFloat).to(at::kHalf);
  at::Tensor out = at::empty({weight.n, weight.k}, at::TensorOptions().dtype(type));
  if (type == at::kFloat) {
    auto* to = out.mutable_data_ptr<float>();
    for_each_chunk(weight, [&](int64_t first, int64_t count) { codec.dequantize(weight, first, count, to + first); });
  } else if (type == at::kBFloat16) {
    auto* to = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<at::BFloat16>());
    for_each_chunk(weight,
                   [&](int64_t first, int64_t count) { codec.dequantize_bf16(weight, first, count, to + first); });
  } else {
    auto* to = out.mutable_data_ptr<double>();
    for_each_chunk(weight, [&](int64_t first, int64_t count) {
      float chunk[4096];
      codec.dequantize(weight, first, count, chunk);
      std::copy(chunk, chunk + count, to + first);
    });
  }
  return out;
}

namespace {

using PackedAndScales = std::tuple<at::Tensor, at::Tensor>;

// weight floating [N, K] -> packed uint8 [ceil(N K / 2)], absmax float32 [ceil(N K / block_size)]
PackedAndScales quantize_op(const at::Tensor& weight, int64_t block_size) {
  if (!is_chosen(Backend::cpp)) {
    return call_python<PackedAndScales(const at::Tensor&, int64_t)>("nf4_quantize", weight, block_size);
  }
  check_floating(weight, "weight");
  check_dim(weight, "weight", 2, "[N, K]");
  const int64_t count = weight.numel();
  at::Tensor packed = at::empty({ceil_div(count, 2)}, weight.options().dtype(at::kByte));
  at::Tensor absmax = at::empty({ceil_div(count, block_size)}, weight.options().dtype(at::kFloat));
  const at::Tensor dense = weight.to(at::kFloat).contiguous();
  matrix(packed, absmax, weight.size(0), weight.size(1), block_size);  // checks block_size
  const float* from = dense.const_data_ptr<float>();
  auto* codes = packed.mutable_data_ptr<uint8_t>();
  auto* scales = absmax.mutable_data_ptr<float>();
  constexpr int64_t chunk = 4096;  // a multiple of every block
  std::atomic<int64_t> refused{count};
  at::parallel_for(0, ceil_div(count, chunk), kElementsPerThread / 2 / chunk, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * chunk, here = std::min(end * chunk, count) - first;
    const int64_t bad =
        codec_in_force().quantize(from + first, here, block_size, codes + first / 2, scales + first / block_size);
    if (bad < 0) return;
    int64_t earliest = refused.load();
    while (first + bad < earliest && !refused.compare_exchange_weak(earliest, first + bad)) continue;
  });
  if (refused < count) refuse_weight(weight, refused);
  return {packed, absmax};
}

// packed uint8, absmax float32 -> [N, K] of `type`
at::Tensor dequantize_op(const at::Tensor& packed, const at::Tensor& absmax, c10::SymIntArrayRef shape,
                         int64_t block_size, at::ScalarType type) {
  if (!is_chosen(Backend::cpp)) {
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, int64_t, at::ScalarType)>(
        "nf4_dequantize", packed, absmax, shape, block_size, type);
  }
  const auto sizes = C10_AS_INTARRAYREF_SLOW(shape);
  TORCH_CHECK_VALUE(sizes.size() == 2, "shape: expected [N, K], got ", sizes);
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble,
                   "dtype: expected float16, bfloat16, float32 or float64, got ", type);
  return dequantize(matrix(packed, absmax, sizes[0], sizes[1], block_size), type);
}

// x [..., K], packed uint8, absmax float32, lora_a [r, K], lora_b [N, r], bias [N] or nothing -> [..., N]
at::Tensor linear_op(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, int64_t block_size,
                     const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                     const std::optional<at::Tensor>& bias) {
  // Checked also where the call is handed over: the public function leaves plain tensors to these checks.
  check_nf4_layer(x, lora_a, lora_b);
  const int64_t n = lora_b.size(0);
  check_nf4_bias(bias, n);
  const NF4Matrix weight = matrix(packed, absmax, n, x.size(-1), block_size);
  if (!is_chosen(Backend::cpp)) {
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&,
                                  const at::Tensor&, double, const std::optional<at::Tensor>&)>(
        "nf4_lora_linear", x, packed, absmax, block_size, lora_a, lora_b, scaling, bias);
  }
  return linear(x, weight, lora_a, lora_b, scaling, bias);
}

// grad [..., N], the rest as in linear_op -> gradients of x, lora_a and lora_b in their types, of bias in float32 or
// wider; empty where not wanted
Gradients backward_op(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                      int64_t block_size, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                      std::array<bool, 4> wanted) {
  if (!is_chosen(Backend::cpp)) {
    return call_python<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                 const at::Tensor&, const at::Tensor&, double, std::array<bool, 4>)>(
        "nf4_lora_linear_backward", grad, x, packed, absmax, block_size, lora_a, lora_b, scaling, wanted);
  }
  check_nf4_layer(x, lora_a, lora_b);
  const int64_t n = lora_b.size(0), k = x.size(-1);
  check_nf4_gradient(grad, x, n);
  return linear_backward(grad, x, matrix(packed, absmax, n, k, block_size), lora_a, lora_b, scaling, wanted);
}

}  // namespace
}  // namespace nf4_lora
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) {
  using namespace csikernels::cpu::nf4_lora;
  m.impl("nf4_quantize", &quantize_op);
  m.impl("nf4_dequantize", &dequantize_op);
  m.impl("nf4_lora_linear", &linear_op);
  m.impl("nf4_lora_linear_backward", &backward_op);
}
