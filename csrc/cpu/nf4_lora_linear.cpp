// The NF4 + LoRA layer: blocking, the parallel loops, and where each part of the sum is taken.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "cpu/activation_memory.h"
#include "cpu/nf4_lora.h"
#include "cpu/parallel.h"
#include "nf4_lora_check.h"

namespace csikernels::cpu::nf4_lora {
namespace {

constexpr int64_t kFewWorkPerThread = 1 << 18;  // weights times tokens that one thread does in a few microseconds
// Steps of 4 bytes of a panel. The sums are written and read again for every panel, so that a few long ones are better
// than many that leave three groups of tokens in L1: L2 brings the 3 vectors of a step's 24 products in time.
constexpr int64_t kBlockUnits = 1024;
constexpr int64_t kPanelRows = 64;    // times kBlockUnits: 256 KB of L2
constexpr int64_t kLastRows = 8;      // of the last panels
constexpr int64_t kRowPadding = 16;   // units, so that the rows of a panel do not share cache sets
constexpr int64_t kChunkGroups = 64;  // of tokens, whose sums for one panel fit L2 beside it: 256 KB

// The arguments in the layer's element type, contiguous.
struct Operands {
  const Layer& layer;
  NF4Matrix weight;
  int64_t tokens, rank;
  const char* x;       // [tokens, k]
  const char* lora_a;  // [rank, k]
  const char* lora_b;  // [n, rank]
  const float* bias;   // [n] or nothing
  float scaling;
  char* out;  // [tokens, n]
};

// t = scaling x A^T in parts that threads take as they come.
class SharedInner {
 public:
  SharedInner(const Operands& o, float* t) : o_(o), t_(t), parts_(part_count(o), 1), missing_(part_count(o)) {}

  // To be called on every thread: computes parts until none is left, then waits for those of the other threads. Each
  // of these is under way, so that no thread waits for one that has not come.
  void finish() {
    for (int64_t part, end; parts_.next(part, end);) {
      o_.tokens == 1 ? rows_of_a(part * kRowsOfA) : tokens_of_x(part * kTokens);
      missing_.fetch_sub(1, std::memory_order_release);
    }
    // The others are nearly done, unless the system has put one aside: then it needs the core more.
    for (int turns = 0; missing_.load(std::memory_order_acquire) > 0; ++turns) {
      if (turns > 1000) std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kRowsOfA = 8, kTokens = 2;  // that `inner` multiplies at once

  static int64_t part_count(const Operands& o) {
    return o.tokens == 1 ? ceil_div(o.rank, kRowsOfA) : ceil_div(o.tokens, kTokens);
  }
  void rows_of_a(int64_t first) {
    const int64_t bytes = o_.layer.element_bytes(), k = o_.weight.k, here = std::min(kRowsOfA, o_.rank - first);
    o_.layer.inner(o_.x, 1, k, o_.lora_a + first * k * bytes, here, o_.scaling, t_ + first);
  }
  void tokens_of_x(int64_t first) {
    const int64_t bytes = o_.layer.element_bytes(), k = o_.weight.k, here = std::min(kTokens, o_.tokens - first);
    o_.layer.inner(o_.x + first * k * bytes, here, k, o_.lora_a, o_.rank, o_.scaling, t_ + first * o_.rank);
  }

  const Operands& o_;
  float* t_;
  Pieces parts_;
  std::atomic<int64_t> missing_;
};

// In one parallel region: waking threads twice takes a tenth of the time of a small layer.
void multiply_few_tokens(const Operands& o) {
  const Layer& layer = o.layer;
  const int64_t n = o.weight.n, k = o.weight.k;
  const Scratch<float> t(o.tokens * o.rank), sums(o.tokens * n);
  const int64_t threads = useful_threads(n, std::max<int64_t>(16, kFewWorkPerThread / (k * o.tokens)));
  SharedInner inner(o, t.get());
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const void* x = o.x;
    const Scratch<char> permuted(layer.permute != nullptr ? o.tokens * permuted_k(k) * layer.element_bytes() : 0);
    if (layer.permute != nullptr) {  // for its own thread, into its cache
      layer.permute(o.x, o.tokens, k, permuted.get());
      x = permuted.get();
    }
    inner.finish();
    const int64_t begin = n * first / threads, end = n * last / threads;
    layer.multiply_few({o.weight, o.tokens, x, t.get(), o.lora_b, o.rank, sums.get(), begin, end});
    for (int64_t token = 0; token < o.tokens; ++token) {
      const int64_t at = token * n + begin;
      layer.finish(sums.get() + at, o.bias == nullptr ? nullptr : o.bias + begin, end - begin,
                   o.out + at * layer.element_bytes());
    }
  });
}

bool by_rows(const Layer& layer, const NF4Matrix& weight, int64_t tokens) {
  return layer.multiply_by_rows != nullptr && tokens <= kTokensByRows && weight.k % 64 == 0 && weight.log_block >= 6;
}

void multiply_tokens_by_rows(const Operands& o) {
  const Layer& layer = o.layer;
  const int64_t n = o.weight.n, k = o.weight.k, eights = ceil_div(o.tokens, kTokensAtOnce), pairs = o.rank / 2;
  const int64_t x_eight = k / 2 * kTokensAtOnce, t_eight = pairs * kTokensAtOnce;
  const Scratch<uint32_t> x(eights * x_eight), t(eights * t_eight);
  at::parallel_for(0, eights, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> sums(kTokensAtOnce * o.rank);
    const Scratch<uint32_t> narrow(t_eight);
    for (int64_t eight = begin; eight < end; ++eight) {
      const int64_t first = eight * kTokensAtOnce, here = std::min(kTokensAtOnce, o.tokens - first);
      const char* from = o.x + first * k * layer.element_bytes();
      layer.pack_for_rows(from, here, k, x.get() + eight * x_eight);
      layer.inner(from, here, k, o.lora_a, o.rank, o.scaling, sums.get());
      layer.finish(sums.get(), nullptr, here * o.rank, narrow.get());
      for (int64_t i = 0; i < t_eight; ++i) {
        const int64_t pair = i / kTokensAtOnce, token = i % kTokensAtOnce;
        t.get()[eight * t_eight + i] = token < here ? narrow.get()[token * pairs + pair] : 0;
      }
    }
  });
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    layer.multiply_by_rows({o.weight, o.tokens, x.get(), t.get(), o.lora_b, o.rank, o.bias, o.out, begin, end});
  });
}

// x and t in the order of the product, one group of tokens at a time.
struct PackedTokens {
  bool wide;
  int64_t per_group, groups, x_steps, t_steps;  // steps of 4 bytes
  const at::Tensor memory;                      // every panel walks through all of x: huge pages
  float* const x;
  Scratch<float> t;

  PackedTokens(const Layer& layer, int64_t tokens, int64_t k, int64_t rank)
      : wide(layer.wide && tokens <= layer.lanes),
        per_group(wide ? layer.lanes / 2 : layer.lanes),
        groups(ceil_div(tokens, per_group)),
        x_steps(round_up(k, layer.panel_multiple) / layer.step),
        t_steps(rank / layer.step),
        memory(activation_memory({groups * vector_units(layer, x_steps)}, at::kFloat)),
        x(memory.mutable_data_ptr<float>()),
        t(groups * vector_units(layer, t_steps)) {}

  // A wide step is twice as long and has half the tokens.
  int64_t vector_units(const Layer& layer, int64_t steps) const {
    return steps * (wide ? layer.lanes / 2 : layer.lanes);
  }
};

void pack_tokens(const Operands& o, const PackedTokens& packed) {
  const Layer& layer = o.layer;
  const int64_t k = o.weight.k, bytes = layer.element_bytes();
  at::parallel_for(0, packed.groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> t(packed.per_group * o.rank);
    const Scratch<char> narrow(packed.per_group * o.rank * bytes);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * packed.per_group, here = std::min(packed.per_group, o.tokens - first);
      const char* x = o.x + first * k * bytes;
      layer.pack_for_panel(x, k * bytes, here, k * bytes, packed.x_steps, packed.wide,
                           packed.x + group * packed.vector_units(layer, packed.x_steps));
      if (o.rank == 0) continue;
      layer.inner(x, here, k, o.lora_a, o.rank, o.scaling, t.get());
      layer.finish(t.get(), nullptr, here * o.rank, narrow.get());
      layer.pack(narrow.get(), o.rank * bytes, here, o.rank * bytes, packed.t_steps, packed.wide,
                 packed.t.get() + group * packed.vector_units(layer, packed.t_steps));
    }
  });
}

struct Rows {
  int64_t begin, end;
};

// What the panel of these rows and columns is decoded from.
Ahead ahead(const NF4Matrix& weight, Rows rows, int64_t first, int64_t columns) {
  const int64_t e = rows.begin * weight.k + first;
  Ahead ahead;
  ahead.codes = weight.packed + e / 2;
  ahead.scales = weight.absmax + (e >> weight.log_block);
  ahead.codes_row = weight.k / 2;
  ahead.scales_row = weight.k >> weight.log_block;
  ahead.code_lines = ceil_div(columns, 128);
  ahead.scale_lines = ceil_div(columns >> weight.log_block, 16);
  ahead.rows = rows.end - rows.begin;
  return ahead;
}

// `rows` of W for all tokens; `then` are those of the next panel.
void multiply_panel(const Operands& o, const PackedTokens& packed, Rows rows, Rows then, float* panel, float* c) {
  const auto [begin, end] = rows;
  const Layer& layer = o.layer;
  const int64_t k = o.weight.k, n = o.weight.n, bytes = layer.element_bytes(), lanes = layer.lanes;
  constexpr int64_t block = kBlockUnits, row_units = block + kRowPadding;
  const int64_t x_units = packed.vector_units(layer, packed.x_steps);
  const int64_t t_units = packed.vector_units(layer, packed.t_steps);
  const int64_t unit = packed.wide ? 2 : 1;  // of 4 bytes per step
  const auto columns_from = [&](int64_t first) { return std::min(block * layer.step, k - first); };
  for (int64_t group = 0; group < packed.groups; group += kChunkGroups) {
    const int64_t groups = std::min(kChunkGroups, packed.groups - group), c_row = groups * lanes;
    bool accumulate = o.rank > 0;
    if (o.rank > 0) {
      layer.multiply({o.lora_b + begin * o.rank * bytes, o.rank / layer.step, unit, packed.t.get() + group * t_units,
                      t_units, lanes, c, c_row, lanes, end - begin, groups, packed.t_steps / unit, false, packed.wide});
    }
    for (int64_t step = 0; step < packed.x_steps; step += block) {
      const int64_t first = step * layer.step, columns = columns_from(first);
      const int64_t steps = std::min(block, packed.x_steps - step);
      layer.panel(o.weight, begin, end - begin, first, columns, panel, row_units);
      const bool rest = step + block < packed.x_steps, again = group + kChunkGroups < packed.groups;
      const int64_t next = rest ? first + columns : 0;
      layer.multiply({panel, row_units, unit, packed.x + group * x_units + step * lanes / unit, x_units, lanes, c,
                      c_row, lanes, end - begin, groups, steps / unit, accumulate, packed.wide,
                      ahead(o.weight, rest || again ? rows : then, next, columns_from(next))});
      accumulate = true;
    }
    const int64_t token = group * packed.per_group;
    const int64_t here = std::min(groups * packed.per_group, o.tokens - token);
    layer.store_transposed(c, c_row, end - begin, here, o.bias == nullptr ? nullptr : o.bias + begin, packed.wide,
                           o.out + (token * n + begin) * bytes, n);
  }
}

void multiply_many_tokens(const Operands& o) {
  const PackedTokens packed(o.layer, o.tokens, o.weight.k, o.rank);
  pack_tokens(o, packed);
  // Whole panels where each thread gets some, thinner ones otherwise: a row's sum does not depend on its panel.
  const int64_t threads = at::get_num_threads();
  const int64_t rows = std::min(kPanelRows, round_up(ceil_div(o.weight.n, threads), 8));
  // Thin ones at the end, where threads wait for the last; not many, since every panel walks through all tokens.
  const int64_t last = threads > 1 ? std::min(threads * rows, o.weight.n / 8) : 0;
  parallel_pieces({o.weight.n, rows, last, std::min(rows, kLastRows)}, threads, [&](Pieces& panels) {
    const Scratch<float> panel(rows * (kBlockUnits + kRowPadding));
    const Scratch<float> c(rows * std::min(packed.groups, kChunkGroups) * o.layer.lanes);
    // The next is taken before, so that its codes can be fetched.
    Rows here, then;
    for (bool more = panels.next(here.begin, here.end); more; here = then) {
      more = panels.next(then.begin, then.end);
      if (!more) then = {0, 0};
      multiply_panel(o, packed, here, then, panel.get(), c.get());
    }
  });
}

at::Tensor linear_double(const at::Tensor& x, const NF4Matrix& weight, const at::Tensor& lora_a,
                         const at::Tensor& lora_b, double scaling, const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = x.reshape({-1, weight.k}).to(at::kDouble);
  at::Tensor out = at::mm(rows, dequantize(weight, at::kDouble).t());
  out = at::addmm(out, at::mm(rows, lora_a.to(at::kDouble).t()), lora_b.to(at::kDouble).t(), 1, scaling);
  return bias ? out + bias->to(at::kDouble) : out;
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const NF4Matrix& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                  double scaling, const std::optional<at::Tensor>& bias) {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  c10::SmallVector<int64_t, 8> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.n;
  const auto bias_type = bias ? bias->scalar_type() : at::kFloat;
  if (any_double({x.scalar_type(), lora_a.scalar_type(), lora_b.scalar_type(), bias_type})) {
    return linear_double(x, weight, lora_a, lora_b, scaling, bias).to(x.scalar_type()).view(shape);
  }
  const Layer layer = layer_for(x.scalar_type());
  const int64_t tokens = x.numel() / std::max<int64_t>(1, weight.k);
  at::Tensor out = at::detail::empty_cpu(shape, layer.type);
  // Asked first: a `to` that does nothing still goes through the dispatcher.
  const auto ready = [&](const at::Tensor& tensor) {
    return (tensor.scalar_type() == layer.type ? tensor : tensor.to(layer.type)).contiguous();
  };
  const at::Tensor rows = ready(x);
  at::Tensor a = ready(lora_a), b = ready(lora_b), offset;
  int64_t rank = a.size(0);
  const bool few = tokens <= kFewTokens && weight.k % layer.few_multiple == 0;
  // The steps of the product over the rank must be whole, also when they are wide.
  if (const int64_t padded = round_up(rank, layer.wide ? 2 * layer.step : layer.step); !few && padded != rank) {
    a = at::constant_pad_nd(a, {0, 0, 0, padded - rank});
    b = at::constant_pad_nd(b, {0, padded - rank});
    rank = padded;
  }
  if (bias) offset = bias->to(at::kFloat).contiguous();
  const auto bytes = [](const at::Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const Operands operands{layer,
                          weight,
                          tokens,
                          rank,
                          bytes(rows),
                          bytes(a),
                          bytes(b),
                          bias ? offset.const_data_ptr<float>() : nullptr,
                          static_cast<float>(scaling),
                          static_cast<char*>(out.mutable_data_ptr())};
  if (tokens > 0 && weight.n > 0) {
    const auto multiply = few                              ? multiply_few_tokens
                          : by_rows(layer, weight, tokens) ? multiply_tokens_by_rows
                                                           : multiply_many_tokens;
    multiply(operands);
  }
  return out.scalar_type() == x.scalar_type() ? out : out.to(x.scalar_type());
}

}  // namespace csikernels::cpu::nf4_lora
