// Multiply (see nf4_lora_kernel.h) for any vector; included by the instruction-set files inside their namespace.
//
// Unit says what one step is: load(p) one vector of steps, broadcast(p) one step to all lanes, and
// multiply_add(w, x, sum). A tile keeps R x V sums in registers: per step V loads and R broadcasts for R * V
// multiply-adds, so 8 x 3 stays well under the two loads a cycle that feed two multiply-adds. Rows of w and steps of
// the groups stream from L2. A single group (V = 1) would be bound by its broadcasts, one a multiply-add: up to two
// groups' worth of tokens therefore come `wide`, with steps twice as long and half the tokens a group, which gives two
// groups again.
#pragma once

namespace {

constexpr int64_t kFetchSteps = 64;  // between two calls of Fetch::next

// The lines of p.ahead, a few at a time.
class Fetch {
 public:
  // For `tiles` tiles of p.
  Fetch(const Product& p, int64_t tiles) : ahead_(p.ahead), lines_(ahead_.code_lines + ahead_.scale_lines) {
    const int64_t calls = tiles * ((p.steps + kFetchSteps - 1) / kFetchSteps);
    if (ahead_.rows > 0) at_once_ = (ahead_.rows * lines_ + calls - 1) / calls;
  }

  CSIKERNELS_INLINE void next() {
    for (int64_t i = 0; i < at_once_ && ahead_.rows > 0; ++i) {
      const int64_t scale = line_ - ahead_.code_lines;
      __builtin_prefetch(scale < 0 ? static_cast<const void*>(ahead_.codes + 64 * line_) : ahead_.scales + 16 * scale,
                         0, 2);
      if (++line_ < lines_) continue;
      line_ = 0;
      --ahead_.rows;
      ahead_.codes += ahead_.codes_row;
      ahead_.scales += ahead_.scales_row;
    }
  }

 private:
  Ahead ahead_;
  int64_t lines_, line_ = 0, at_once_ = 0;
};

template <class Unit, int R, int V>
CSIKERNELS_INLINE void product_tile(const Product& p, int64_t row, int64_t group, Fetch& fetch) {
  const float* w = static_cast<const float*>(p.w) + row * p.w_row;
  const float* x = static_cast<const float*>(p.x) + group * p.x_group;
  float* c = p.c + row * p.c_row + group * p.c_group;
  const int64_t w_row = p.w_row, w_step = p.w_step, x_group = p.x_group, x_step = p.x_step;
  // Three rows a pointer, which x86 addresses by the stride and its double: 8 pointers would not fit the registers.
  constexpr int kPointers = (R + 2) / 3;
  const float* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = w + 3 * i * p.w_row;
  F32 sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sum[r][v] = p.accumulate ? load(c + r * p.c_row + v * p.c_group) : broadcast(0.0f);
    }
  }
  for (int64_t left = p.steps; left > 0; left -= kFetchSteps) {
    fetch.next();
    for (int64_t s = left < kFetchSteps ? left : kFetchSteps; s > 0; --s) {
      typename Unit::Vector xs[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) xs[v] = Unit::load(x + v * x_group);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Unit::Vector ws = Unit::broadcast(rows[r / 3] + r % 3 * w_row);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Unit::multiply_add(ws, xs[v], sum[r][v]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kPointers; ++i) {
        rows[i] += w_step;
        asm("" : "+r"(rows[i]));  // or the compiler would make them differences of one
      }
      x += x_step;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * p.c_row + v * p.c_group, sum[r][v]);
  }
}

// Out of line: inlined, the shapes would share one register allocation, and the sums would be spilled.
template <class Unit, int R, int V>
__attribute__((noinline)) void product_rows(const Product& p, int64_t group, Fetch& fetch) {
  int64_t row = 0;
  for (; row + R <= p.rows; row += R) product_tile<Unit, R, V>(p, row, group, fetch);
  for (; row < p.rows; ++row) product_tile<Unit, 1, V>(p, row, group, fetch);
}

// Groups by threes, and the last four as two and two.
template <class Unit, int R>
void product(const Product& p) {
  Fetch fetch(p, (p.groups + 2) / 3 * ((p.rows + R - 1) / R));
  int64_t group = 0;
  for (; p.groups - group == 3 || p.groups - group > 4; group += 3) product_rows<Unit, R, 3>(p, group, fetch);
  for (; p.groups - group >= 2; group += 2) product_rows<Unit, R, 2>(p, group, fetch);
  if (group < p.groups) product_rows<Unit, R, 1>(p, group, fetch);
}

}  // namespace
