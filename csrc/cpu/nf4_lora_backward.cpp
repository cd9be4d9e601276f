// Gradients of the NF4 + LoRA layer, in float32, from the same 4-bit weight. With G the gradient of the output,
// u = scaling * G B and t = scaling * x A^T:
//
//   x: G W + u A      A: u^T x      B: G^T t      bias: the sum of G over the tokens
//
// All are Products without packing: rows of one operand are broadcast where they lie, rows of the other are loaded
// along the lanes. Only operands whose rows are no whole vectors are copied, filled up with zeros.
// Operations: 2 M N K for x, 2 M r (2 K + 2 N) for the adapter.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/nf4_lora.h"
#include "nf4_lora_check.h"

namespace csikernels::cpu::nf4_lora {
namespace {

constexpr int64_t kWorkPerThread = 1 << 16;  // multiply-adds below which a second thread is not worth waking
constexpr int64_t kColumns = 256;            // of a panel; times kRows * 4 bytes: 128 KB of L2
constexpr int64_t kRows = 128;               // of a panel, and steps of its product: three vectors of each fit L1
constexpr int64_t kRowPadding = 16;
constexpr int64_t kChunk = 512;  // tokens whose sums for one panel fit L2

// Columns filled up with zeros to a multiple of the vector.
at::Tensor whole_vectors(const at::Tensor& a, int64_t lanes) {
  const int64_t missing = round_up(a.size(1), lanes) - a.size(1);
  return missing == 0 ? a : at::constant_pad_nd(a, {0, missing});
}

// A float32 matrix as an operand: element (i, j) at data + i * row + j * column.
struct View {
  const float* data;
  int64_t row, column;
};

View rows_of(const at::Tensor& a) { return {a.const_data_ptr<float>(), a.size(1), 1}; }
View columns_of(const at::Tensor& a) { return {a.const_data_ptr<float>(), 1, a.size(1)}; }

// out [rows, columns of b] = a [rows, steps] b [steps, columns], parallel over blocks of the larger side.
at::Tensor product(const Layer& layer, View a, int64_t rows, const at::Tensor& b) {
  const int64_t steps = b.size(0), columns = b.size(1);
  at::Tensor out = at::empty({rows, columns}, b.options());
  float* to = out.mutable_data_ptr<float>();
  const float* from = b.const_data_ptr<float>();
  constexpr int64_t block = 64;
  const bool by_rows = rows > columns;
  const int64_t blocks = ceil_div(by_rows ? rows : columns, block);
  const int64_t work = block * (by_rows ? columns : rows) * std::max<int64_t>(1, steps);
  at::parallel_for(
      0, blocks, std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t r0 = by_rows ? i * block : 0, c0 = by_rows ? 0 : i * block;
          const int64_t here = by_rows ? std::min(block, rows - r0) : rows;
          const int64_t wide = by_rows ? columns : std::min(block, columns - c0);
          layer.multiply({a.data + r0 * a.row, a.row, a.column, from + c0, layer.lanes, columns, to + r0 * columns + c0,
                          columns, layer.lanes, here, wide / layer.lanes, steps, false, false});
        }
      });
  return out;
}

// out [tokens, k] = G W + u A for the columns first .. first + columns of W.
void input_columns(const Layer& layer, const NF4Matrix& weight, const at::Tensor& grad, const at::Tensor& u,
                   const at::Tensor& a, int64_t first, int64_t columns, float* panel, float* c, float* out) {
  const int64_t tokens = grad.size(0), n = weight.n, lanes = layer.lanes, row_units = kColumns + kRowPadding;
  const int64_t groups = ceil_div(columns, lanes), c_row = groups * lanes;
  const float* g = grad.const_data_ptr<float>();
  for (int64_t token = 0; token < tokens; token += kChunk) {
    const int64_t here = std::min(kChunk, tokens - token);
    layer.multiply({u.const_data_ptr<float>() + token * u.size(1), u.size(1), 1, a.const_data_ptr<float>() + first,
                    lanes, a.size(1), c, c_row, lanes, here, groups, a.size(0), false, false});
    for (int64_t row = 0; row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row);
      layer.panel(weight, row, rows, first, columns, panel, row_units);
      if (columns % lanes != 0) {
        for (int64_t r = 0; r < rows; ++r)
          std::fill(panel + r * row_units + columns, panel + r * row_units + c_row, 0.0f);
      }
      layer.multiply(
          {g + token * n + row, n, 1, panel, lanes, row_units, c, c_row, lanes, here, groups, rows, true, false});
    }
    for (int64_t i = 0; i < here; ++i) {
      std::copy(c + i * c_row, c + i * c_row + columns, out + (token + i) * weight.k + first);
    }
  }
}

// u and a have whole vectors as rows, and a as many rows as u has columns of the rank.
at::Tensor input_gradient(const Layer& layer, const NF4Matrix& weight, const at::Tensor& grad, const at::Tensor& u,
                          const at::Tensor& a) {
  const int64_t tokens = grad.size(0);
  at::Tensor out = at::empty({tokens, weight.k}, grad.options());
  float* to = out.mutable_data_ptr<float>();
  // Thinner panels where there would be fewer than threads: a column's sum does not depend on its panel.
  const int64_t share = round_up(ceil_div(weight.k, at::get_num_threads()), layer.lanes);
  const int64_t width = std::min(kColumns, share);
  at::parallel_for(0, ceil_div(weight.k, width), 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> panel(kRows * (kColumns + kRowPadding)), c(std::min(kChunk, tokens) * kColumns);
    for (int64_t i = begin; i < end; ++i) {
      input_columns(layer, weight, grad, u, a, i * width, std::min(width, weight.k - i * width), panel.get(), c.get(),
                    to);
    }
  });
  return out;
}

at::Tensor sum_over_tokens(const at::Tensor& grad) {
  const int64_t tokens = grad.size(0), n = grad.size(1);
  at::Tensor out = at::zeros({n}, grad.options());
  const float* g = grad.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, n, std::max<int64_t>(64, kWorkPerThread / std::max<int64_t>(1, tokens)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t token = 0; token < tokens; ++token) {
                       for (int64_t i = begin; i < end; ++i) to[i] += g[token * n + i];
                     }
                   });
  return out;
}

Gradients backward_double(const at::Tensor& grad, const at::Tensor& x, const NF4Matrix& weight,
                          const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                          std::array<bool, 4> wanted) {
  const at::Tensor g = grad.reshape({-1, weight.n}).to(at::kDouble), rows = x.reshape({-1, weight.k}).to(at::kDouble);
  const at::Tensor a = lora_a.to(at::kDouble), b = lora_b.to(at::kDouble), u = at::mm(g, b) * scaling;
  Gradients out;
  if (wanted[0]) std::get<0>(out) = at::mm(g, dequantize(weight, at::kDouble)) + at::mm(u, a);
  if (wanted[1]) std::get<1>(out) = at::mm(u.t(), rows);
  if (wanted[2]) std::get<2>(out) = at::mm(g.t(), at::mm(rows, a.t())) * scaling;
  if (wanted[3]) std::get<3>(out) = g.sum(0);
  return out;
}

Gradients backward_float(const at::Tensor& grad, const at::Tensor& x, const NF4Matrix& weight, const at::Tensor& lora_a,
                         const at::Tensor& lora_b, double scaling, std::array<bool, 4> wanted) {
  const Layer layer = float_layer();
  const auto ready = [&](const at::Tensor& a, int64_t columns) {
    return a.reshape({-1, columns}).to(at::kFloat).contiguous();
  };
  const int64_t rank = lora_a.size(0), n = weight.n, k = weight.k;
  const at::Tensor g = grad.reshape({-1, n}).to(at::kFloat).contiguous();
  const at::Tensor a = ready(lora_a, k), b = ready(lora_b, std::max<int64_t>(1, rank));
  const int64_t tokens = g.size(0);
  at::Tensor u;
  if (rank > 0 && (wanted[0] || wanted[1])) {
    u = product(layer, rows_of(g), tokens, whole_vectors(b, layer.lanes)).mul_(scaling);
  }
  Gradients out;
  if (wanted[0]) {
    const at::Tensor none = at::zeros({tokens, 1}, g.options());
    std::get<0>(out) = input_gradient(
        layer, weight, g, rank > 0 ? u : none,
        rank > 0 ? whole_vectors(a, layer.lanes) : at::zeros({1, round_up(k, layer.lanes)}, g.options()));
  }
  if (wanted[1] && rank > 0) {
    const at::Tensor rows = whole_vectors(ready(x, k), layer.lanes);
    std::get<1>(out) = product(layer, columns_of(u), rank, rows).slice(1, 0, k);
  }
  if (wanted[2] && rank > 0) {
    at::Tensor t = at::zeros({tokens, round_up(rank, layer.lanes)}, g.options());
    const at::Tensor rows = ready(x, k), narrow = at::empty({tokens, rank}, g.options());
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (k * rank));
    at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      layer.inner(rows.const_data_ptr<float>() + begin * k, end - begin, k, a.const_data_ptr<float>(), rank,
                  static_cast<float>(scaling), narrow.mutable_data_ptr<float>() + begin * rank);
    });
    t.slice(1, 0, rank).copy_(narrow);
    std::get<2>(out) = product(layer, columns_of(g), n, t).slice(1, 0, rank);
  }
  if (wanted[3]) std::get<3>(out) = sum_over_tokens(g);
  return out;
}

}  // namespace

Gradients linear_backward(const at::Tensor& grad, const at::Tensor& x, const NF4Matrix& weight,
                          const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                          std::array<bool, 4> wanted) {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const bool wide = any_double({grad.scalar_type(), x.scalar_type(), lora_a.scalar_type(), lora_b.scalar_type()});
  const auto backward = wide ? backward_double : backward_float;
  Gradients sums = backward(grad, x, weight, lora_a, lora_b, scaling, wanted);
  const auto finish = [](const at::Tensor& sum, bool is_wanted, at::IntArrayRef shape, const at::TensorOptions& like) {
    if (!is_wanted) return at::empty({0}, like);
    if (!sum.defined()) return at::zeros(shape, like);  // of an adapter of rank 0
    return sum.to(like.dtype()).reshape(shape).contiguous();
  };
  const int64_t n = weight.n;
  return {finish(std::get<0>(sums), wanted[0], x.sizes(), x.options()),
          finish(std::get<1>(sums), wanted[1], lora_a.sizes(), lora_a.options()),
          finish(std::get<2>(sums), wanted[2], lora_b.sizes(), lora_b.options()),
          finish(std::get<3>(sums), wanted[3], {n}, x.options().dtype(wide ? at::kDouble : at::kFloat))};
}

}  // namespace csikernels::cpu::nf4_lora
