// Autograd of nf4_lora_linear, for every device. In C++ because one token takes microseconds: the formula registered
// from Python costs as much again on every call, also where no gradient is wanted.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace csikernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&,
                          const at::Tensor&, double, const std::optional<at::Tensor>&);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                            const at::Tensor&, const at::Tensor&,
                                                                            int64_t, const at::Tensor&,
                                                                            const at::Tensor&, double,
                                                                            std::array<bool, 4>);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor below_autograd(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, int64_t block_size,
                          const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                          const std::optional<at::Tensor>& bias) {
  static const auto linear = op<Linear>("csikernels::nf4_lora_linear");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear.call(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias);
}

struct Layer : torch::autograd::Function<Layer> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& packed,
                            const at::Tensor& absmax, int64_t block_size, const at::Tensor& lora_a,
                            const at::Tensor& lora_b, double scaling, const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({x, packed, absmax, lora_a, lora_b});
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["scaling"] = scaling;
    if (bias) ctx->saved_data["bias_type"] = bias->scalar_type();
    return below_autograd(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto gradients = op<Backward>("csikernels::nf4_lora_linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data.count("bias_type") != 0;
    // Counted over the tensors alone: x, packed, absmax, lora_a, lora_b and the bias if there is one.
    const std::array<bool, 4> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(3), ctx->needs_input_grad(4),
                                        has_bias && ctx->needs_input_grad(5)};
    auto [x, lora_a, lora_b, bias] =
        gradients.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["block_size"].toInt(), saved[3],
                       saved[4], ctx->saved_data["scaling"].toDouble(), wanted);
    const auto given = [](const at::Tensor& gradient, bool is_wanted) { return is_wanted ? gradient : at::Tensor(); };
    if (wanted[3]) bias = bias.to(ctx->saved_data["bias_type"].toScalarType());
    return {given(x, wanted[0]),   {}, {}, {}, given(lora_a, wanted[1]), given(lora_b, wanted[2]), {},
            given(bias, wanted[3])};
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, int64_t block_size,
                  const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                  const std::optional<at::Tensor>& bias) {
  const bool wanted = at::GradMode::is_enabled() && (x.requires_grad() || lora_a.requires_grad() ||
                                                     lora_b.requires_grad() || (bias && bias->requires_grad()));
  return wanted ? Layer::apply(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias)
                : below_autograd(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias);
}

}  // namespace
}  // namespace csikernels

TORCH_LIBRARY_IMPL(csikernels, Autograd, m) { m.impl("nf4_lora_linear", &csikernels::linear); }
