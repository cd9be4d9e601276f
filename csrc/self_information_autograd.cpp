// Gradients of the self_information family. In C++, because a formula registered from Python would take longer than the
// kernels do for one sample. csikernels/ops/self_information.py holds the same formulas for installations without this
// extension.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/mul.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace csikernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using ValuesAndIndices = std::tuple<Tensor, Tensor>;

using SelectInformative = ValuesAndIndices(const Tensor&, c10::SymInt, double, at::IntArrayRef,
                                           const std::optional<Tensor>&);
using TopM = ValuesAndIndices(const Tensor&, c10::SymInt, const std::optional<Tensor>&);
using ScatterCodeword = Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool differentiates(const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

// The gradient of a gather: [B, m] at `indices` of zeros shaped like the gathered tensor. Positions are distinct.
Tensor spread(const Tensor& grad, const Tensor& indices, c10::SymIntArrayRef shape) {
  const c10::SymInt rows = shape[0], n = c10::multiply_integers(shape.slice(1));
  return grad.new_zeros_symint({rows, n}).scatter(1, indices, grad).reshape_symint(shape);
}

// values = source.flatten(1).gather(1, indices), with indices that `rank` finds below autograd.
struct Gather : torch::autograd::Function<Gather> {
  using Rank = c10::function_ref<ValuesAndIndices()>;

  static variable_list forward(AutogradContext* context, const Tensor& source, Rank rank) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [values, indices] = rank();
    context->save_for_backward({indices});
    context->saved_data["shape"] = source.sym_sizes();
    context->mark_non_differentiable({indices});
    return {values, indices};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad) {
    const auto shape = context->saved_data["shape"].toSymIntVector();
    return {spread(grad[0], context->get_saved_variables()[0], shape), Tensor()};
  }
};

Tensor scatter_below(const Tensor& values, const Tensor& indices, const Tensor& mean, c10::SymIntArrayRef shape) {
  static const auto below = op<ScatterCodeword>("csikernels::scatter_codeword");
  return below.call(values, indices, mean, shape);
}

struct Scatter : torch::autograd::Function<Scatter> {
  static Tensor forward(AutogradContext* context, const Tensor& values, const Tensor& indices, const Tensor& mean,
                        c10::SymIntArrayRef shape) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({indices});
    return scatter_below(values, indices, mean, shape);
  }

  // Each element's gradient goes to the last value written there, or to the mean where none was.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Tensor indices = context->get_saved_variables()[0], grad = grads[0].flatten(1);
    const c10::SymInt m = indices.sym_size(1);
    const Tensor order = at::arange(m, indices.options());
    const Tensor winner = indices.new_full_symint({indices.sym_size(0), grad.sym_size(1)}, -1)
                              .scatter_reduce(1, indices, order.expand_as(indices), "amax");
    const Tensor stands = winner.gather(1, indices).eq(order);
    return {grad.gather(1, indices).mul(stands), Tensor(), grad.mul(winner.lt(0)).sum(1), Tensor()};
  }
};

ValuesAndIndices ranked(const Tensor& source, Gather::Rank rank) {
  if (differentiates(source)) {
    const variable_list outputs = Gather::apply(source, rank);
    return {outputs[0], outputs[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return rank();
}

ValuesAndIndices select_informative(const Tensor& h, c10::SymInt m, double bandwidth, at::IntArrayRef offsets,
                                    const std::optional<Tensor>& source) {
  static const auto below = op<SelectInformative>("csikernels::select_informative");
  return ranked(source ? *source : h, [&] { return below.call(h, m, bandwidth, offsets, source); });
}

ValuesAndIndices top_m(const Tensor& score, c10::SymInt m, const std::optional<Tensor>& source) {
  static const auto below = op<TopM>("csikernels::top_m");
  return ranked(source ? *source : score, [&] { return below.call(score, m, source); });
}

Tensor scatter_codeword(const Tensor& values, const Tensor& indices, const Tensor& mean, c10::SymIntArrayRef shape) {
  if (differentiates(values) || differentiates(mean)) return Scatter::apply(values, indices, mean, shape);
  const at::AutoDispatchBelowADInplaceOrView below;
  return scatter_below(values, indices, mean, shape);
}

}  // namespace
}  // namespace csikernels

TORCH_LIBRARY_IMPL(csikernels, Autograd, m) {
  m.impl("select_informative", &csikernels::select_informative);
  m.impl("top_m", &csikernels::top_m);
  m.impl("scatter_codeword", &csikernels::scatter_codeword);
}
