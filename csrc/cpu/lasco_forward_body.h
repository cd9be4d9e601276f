// sam_forward of lasco_kernel.h on F32 vectors, for one of the arithmetics of lasco_operands.h. Included after a vector
// header; nothing here has linkage.
#pragma once

#include "cpu/lasco_operands.h"

namespace csikernels::cpu {
namespace {

// gelu in place. Out of line: sixteen copies of erf in every tile would fill the instruction cache.
template <int N>
__attribute__((noinline)) void gelu_all(F32 (&a)[N]) {
#pragma GCC unroll 1
  for (int i = 0; i < N; ++i) a[i] = gelu(a[i]);
}

template <class Arithmetic>
class SamNetwork {
  using Operand = typename Arithmetic::Operand;
  using Value = typename Arithmetic::Value;

 public:
  SamNetwork(const SamSizes& sizes, const void* const* weights, const Span* spans, int64_t span_count, void* workspace)
      : sizes_(sizes),
        weights_(weights),
        stride_(padded(sizes.tokens)),
        head_width_(sizes.width / sizes.heads),
        free_(static_cast<char*>(workspace)),
        stream_(spans, span_count) {
    const int64_t activation = sizes.width * stride_;
    x_ = take<float>(activation);
    // After a post-norm block the residual stream is itself what the next product takes.
    operand_ = Arithmetic::kSame && !sizes.norm_first ? reinterpret_cast<Operand*>(x_) : take<Operand>(activation);
    query_ = take<Operand>(activation);
    key_ = take<Operand>(activation);
    value_ = take<Value>(activation);
    score_ = take<float>(sizes.tokens * kTileColumns);
    mixed_ = take<Operand>(activation);
    edge_ = take<float>(sizes.features * stride_);
    hidden_ = take<Operand>((sizes.feedforward > sizes.features ? sizes.feedforward : sizes.features) * stride_);
    loose_ = take<float>(splits_pairs() ? activation : 0);
    wide_ = reinterpret_cast<float*>(free_);
  }

  void run(const float* h, float* y) {
    read_input(h);
    for (int64_t block = 0; block < sizes_.layers; ++block) {
      const int64_t first = 3 + 12 * block;
      if (sizes_.norm_first) normalise(first + 8, nullptr);
      attention(first);
      if (!sizes_.norm_first) normalise(first + 8, x_);
      if (sizes_.norm_first) normalise(first + 10, nullptr);
      feed_forward(first + 4);
      if (!sizes_.norm_first) normalise(first + 10, x_);
    }
    write_output(y);
  }

 private:
  template <class T>
  T* take(int64_t count) {
    void* start = free_;
    free_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return static_cast<T*>(start);
  }

  const float* vector(int64_t index) const { return static_cast<const float*>(weights_[index]); }

  // Rows first..first + rows of the linear layer at weights[index], weights[index + 1], into the sink.
  template <class Sink>
  CSIKERNELS_INLINE void linear(int64_t index, int64_t first, int64_t rows, int64_t depth, const Operand* x,
                                const Sink& sink) {
    const float* bias = vector(index + 1) + first;
    const auto weights = Arithmetic::matrix(weights_[index], first, rows, depth, wide_);
    product(weights, rows, depth, x, stride_, stride_, stream_, sink, FromBias{bias});
  }

  // As `linear`, added to the residual stream.
  CSIKERNELS_INLINE void add_linear(int64_t index, int64_t depth, const Operand* x) {
    linear(index, 0, sizes_.width, depth, x,
           [this]<int R, int V>(int64_t row, int64_t column, Tile<R, V> tile) CSIKERNELS_INLINE_LAMBDA {
             const float* before = x_ + row * stride_ + column;
             for_tile<R, V>(
                 [&](int r, int v) { tile.at[r][v] = tile.at[r][v] + load(before + r * stride_ + v * F32::lanes); });
             store_tile(x_, stride_, row, column, tile);
           });
  }

  template <int R, int V>
  CSIKERNELS_INLINE void keep(float* x, int64_t row, int64_t column, const Tile<R, V>& tile) {
    if (x != nullptr) store_tile(x, stride_, row, column, tile);
    if (static_cast<void*>(operand_) != x) Arithmetic::store_operand(operand_, stride_, row, column, tile);
  }

  // LayerNorm of the residual stream into the next operand, and into x unless null.
  __attribute__((noinline)) void normalise(int64_t index, float* x) {
    const float *scale = vector(index), *shift = vector(index + 1);
    layer_norm(x_, stride_, sizes_.width, stride_, sizes_.eps, nullptr,
               [&]<int R, int V>(int64_t row, int64_t column, Tile<R, V> tile) CSIKERNELS_INLINE_LAMBDA {
                 for_tile<R, V>([&](int r, int v) {
                   tile.at[r][v] = fma(tile.at[r][v], broadcast(scale[row + r]), broadcast(shift[row + r]));
                 });
                 keep(x, row, column, tile);
               });
  }

  // Rows of float32 as operand.
  const Operand* as_operand(const float* x, int64_t rows, Operand* y) {
    if constexpr (Arithmetic::kSame) {
      return x;
    } else {
      for (int64_t column = 0; column < stride_; column += F32::lanes) {
        in_pairs<1>(
            rows, column, [&](int64_t row, int) { return load(x + row * stride_ + column); },
            [&]<int R, int V>(int64_t row, int64_t at, Tile<R, V> tile)
                CSIKERNELS_INLINE_LAMBDA { Arithmetic::store_operand(y, stride_, row, at, tile); });
      }
      return y;
    }
  }

  // [T][columns] to [columns][stride], the padding a copy of the last token.
  void read_tokens(const float* from, int64_t columns, float* to) const {
    transpose(from, columns, sizes_.tokens, columns, to, stride_);
    for (int64_t token = sizes_.tokens; token < stride_; ++token) {
      for (int64_t row = 0; row < columns; ++row) to[row * stride_ + token] = to[row * stride_ + sizes_.tokens - 1];
    }
  }

  // [T][F] as an operand. Adjacent features are pairs as they lie, which leaves half as much to transpose.
  const Operand* read_features(const float* h) {
    if constexpr (Arithmetic::kPairs) {
      if (sizes_.features % 2 == 0) {
        Arithmetic::round(h, sizes_.tokens * sizes_.features, reinterpret_cast<uint16_t*>(edge_));
        read_tokens(edge_, sizes_.features / 2, reinterpret_cast<float*>(hidden_));
        return hidden_;
      }
    }
    read_tokens(h, sizes_.features, edge_);
    return as_operand(edge_, sizes_.features, hidden_);
  }

  __attribute__((noinline)) void read_input(const float* h) {
    const Operand* input = read_features(h);
    read_tokens(vector(2), sizes_.width, x_);
    linear(0, 0, sizes_.width, sizes_.features, input,
           [this]<int R, int V>(int64_t row, int64_t column, Tile<R, V> tile) CSIKERNELS_INLINE_LAMBDA {
             const float* position = x_ + row * stride_ + column;
             for_tile<R, V>(
                 [&](int r, int v) { tile.at[r][v] = tile.at[r][v] + load(position + r * stride_ + v * F32::lanes); });
             keep(x_, row, column, tile);
           });
  }

  __attribute__((noinline)) void attention(int64_t index) {
    const int64_t width = sizes_.width;
    project_heads(index, 0, query_);
    project_heads(index, width, key_);
    linear(index, 2 * width, width, width, operand_,
           [this]<int R, int V>(int64_t row, int64_t column, const Tile<R, V>& tile)
               CSIKERNELS_INLINE_LAMBDA { Arithmetic::store_values(value_, stride_, row, column, tile); });
    for (int64_t head = 0; head < sizes_.heads; ++head) {
      int64_t column = 0;
      for (; column + kTileColumns <= stride_; column += kTileColumns) attend<kTileVectors>(head, column);
      if (column < stride_) attend<1>(head, column);
    }
    if (splits_pairs()) as_operand(loose_, width, mixed_);
    add_linear(index + 2, width, mixed_);
  }

  // Queries or keys: each head's features start an operand row of their own.
  CSIKERNELS_INLINE void project_heads(int64_t index, int64_t first, Operand* to) {
    const int64_t together = splits_pairs() ? head_width_ : sizes_.width;
    for (int64_t row = 0; row < sizes_.width; row += together) {
      Operand* heads = to + row / head_width_ * head_rows() * stride_;
      linear(index, first + row, together, sizes_.width, operand_,
             [this, heads]<int R, int V>(int64_t own, int64_t column, const Tile<R, V>& tile)
                 CSIKERNELS_INLINE_LAMBDA { Arithmetic::store_operand(heads, stride_, own, column, tile); });
    }
  }

  // One head at the queries of one tile, V vectors.
  template <int V>
  __attribute__((noinline)) void attend(int64_t head, int64_t column) {
    constexpr int64_t columns = V * F32::lanes;
    const int64_t tokens = sizes_.tokens, first = head * head_width_;
    const Operand* query = query_ + head * head_rows() * stride_ + column;
    const auto keys = Arithmetic::keys(key_ + head * head_rows() * stride_, stride_);
    product(keys, tokens, head_width_, query, stride_, columns,
            [this]<int R, int C>(int64_t key, int64_t at, const Tile<R, C>& tile)
                CSIKERNELS_INLINE_LAMBDA { store_tile(score_, kTileColumns, key, at, tile); });
    // In place: an operand row takes no more room than the scores it comes from.
    Operand* weights = reinterpret_cast<Operand*>(score_);
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(head_width_)));
    F32 share[V];
    softmax_weights<V>(
        score_, kTileColumns, tokens, 0, broadcast(scale * kBinaryExponent), share,
        [weights]<int R, int C>(int64_t key, int64_t at, const Tile<R, C>& tile)
            CSIKERNELS_INLINE_LAMBDA { Arithmetic::store_operand(weights, kTileColumns, key, at, tile); });
    const auto values = Arithmetic::values(value_ + first * stride_, stride_);
    // Divided by the sums of weights afterwards: a head has fewer features than there are keys.
    product(values, head_width_, tokens, weights, kTileColumns, columns,
            [=, this]<int R, int C>(int64_t row, int64_t at, Tile<R, C> tile) CSIKERNELS_INLINE_LAMBDA {
              for_tile<R, C>([&](int r, int v) { tile.at[r][v] = tile.at[r][v] * share[v]; });
              if (splits_pairs()) {
                store_tile(loose_, stride_, first + row, column + at, tile);
              } else {
                Arithmetic::store_operand(mixed_, stride_, first + row, column + at, tile);
              }
            });
  }

  __attribute__((noinline)) void feed_forward(int64_t index) {
    const bool smooth = sizes_.gelu;
    linear(index, 0, sizes_.feedforward, sizes_.width, operand_,
           [=, this]<int R, int V>(int64_t row, int64_t column, Tile<R, V> tile) CSIKERNELS_INLINE_LAMBDA {
             if (smooth) {
               F32 all[R * V];
               for_tile<R, V>([&](int r, int v) { all[r * V + v] = tile.at[r][v]; });
               gelu_all(all);
               for_tile<R, V>([&](int r, int v) { tile.at[r][v] = all[r * V + v]; });
             } else {
               for_tile<R, V>([&](int r, int v) { tile.at[r][v] = relu(tile.at[r][v]); });
             }
             Arithmetic::store_operand(hidden_, stride_, row, column, tile);
           });
    add_linear(index + 2, sizes_.feedforward, hidden_);
  }

  __attribute__((noinline)) void write_output(float* y) {
    const int64_t last = sizes_.weights() - 2;
    const Operand* operand = operand_;
    if (sizes_.final_norm) {
      normalise(last - 2, nullptr);
    } else if (sizes_.norm_first) {
      operand = as_operand(x_, sizes_.width, operand_);
    }
    linear(last, 0, sizes_.features, sizes_.width, operand,
           [this]<int R, int V>(int64_t row, int64_t column, const Tile<R, V>& tile)
               CSIKERNELS_INLINE_LAMBDA { store_tile(edge_, stride_, row, column, tile); });
    transpose(edge_, stride_, sizes_.features, sizes_.tokens, y, sizes_.features);
  }

  // Whether a pair of adjacent features may belong to two heads.
  bool splits_pairs() const { return Arithmetic::kPairs && head_width_ % 2; }

  // Operand rows of one head.
  int64_t head_rows() const { return Arithmetic::kPairs ? (head_width_ + 1) / 2 : head_width_; }

  const SamSizes& sizes_;
  const void* const* weights_;
  const int64_t stride_;  // of a row: tokens padded to whole vectors
  const int64_t head_width_;
  char* free_;
  typename Arithmetic::Stream stream_;
  float* x_;          // [width][stride] the residual stream
  Operand* operand_;  // [width] what the next linear layer takes
  Operand* query_;    // [heads][head rows]
  Operand* key_;      // [heads][head rows]
  Value* value_;      // [width]
  float* score_;      // [tokens][tile columns] of one head, later its softmax as operand
  Operand* mixed_;    // [width] attention's result
  float* loose_;      // [width] the same before pairing, where pairs are split
  float* edge_;       // [features] input, then output
  Operand* hidden_;   // [feedforward]
  float* wide_;       // a matrix widened to float32
};

// The workspace begins with the spans.
template <class Arithmetic>
void run_network(const SamSizes& sizes, const void* const* weights, const void* const* next, const float* h, float* y,
                 void* workspace) {
  Span* spans = static_cast<Span*>(workspace);
  int64_t count = list_spans(sizes, weights, spans);
  count += list_spans(sizes, next, spans + count);
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(Span)) + 63) / 64 * 64;
  SamNetwork<Arithmetic>(sizes, weights, spans, count, static_cast<char*>(workspace) + bytes).run(h, y);
}

// Replaces the reference's output by the shift, and adds alpha times it to the proxy's output.
inline void correct(float* output, const float* base, float* reference_to_shift, float alpha, int64_t n) {
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const int left = n - i < F32::lanes ? static_cast<int>(n - i) : F32::lanes;
    const F32 shift = load_first(base + i, left) - load_first(reference_to_shift + i, left);
    store_first(reference_to_shift + i, shift, left);
    store_first(output + i, fma(broadcast(alpha), shift, load_first(output + i, left)), left);
  }
}

}  // namespace
}  // namespace csikernels::cpu
