// Feature-major building blocks of small Transformers, on F32 vectors; included after a vector header.
//
// An activation is [feature][token], its rows padded to whole vectors, so that a vector holds one feature of F32::lanes
// tokens. A product then broadcasts the small operand and multiplies vectors; LayerNorm (over features) and softmax
// (over keys, the rows of the scores) run down the lanes without a horizontal step.
//
//   product       y[n][t] = sum_k w(n, k) x[k][t] for any strides of w: weights as they are stored, [N][K]; transposed,
//                 for a gradient W^T g; keys and values of attention; g for a weight's gradient, with x token-major
//   layer_norm, softmax, relu, gelu, transpose
//
// Each result goes to a sink, sink(row, column, Tile), which adds biases, keeps, rounds or stores it. Rows reach a sink
// in bands of an even number, the last of an odd count alone: a sink that stores rows in pairs finds them together.
//
// A tile of kTileRows x 2 vectors of sums stays in registers over all k. A step of k loads 2 vectors and broadcasts
// kTileRows weights for 2 kTileRows multiply-adds: with two loads and two multiply-adds a cycle, the loads hide. In
// L1, 8 x 2 x 16 lanes run at 98% of the float32 peak for K = 64 and 90% for K = 16, whatever the strides of w.
#pragma once

namespace csikernels::cpu {
namespace {

constexpr int kTileRows = F32::lanes >= 16 ? 8 : 4;  // 16 sums of 32 registers, or 8 of 16
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * F32::lanes;

// The length of a row, rounded up to whole vectors.
CSIKERNELS_INLINE int64_t padded(int64_t columns) { return (columns + F32::lanes - 1) / F32::lanes * F32::lanes; }

// The small operand of a product: w(n, k) = data[n * row + k * step]. A product is written on this interface, which
// PairWeights (lasco_tile_bf16.h) gives once more for pairs of bfloat16.
struct Weights {
  const float* data;
  int64_t row, step;

  static constexpr int kBytes = sizeof(float);  // of one weight
  static constexpr int kDepthStep = 1;          // k that one step covers

  CSIKERNELS_INLINE Weights from(int64_t n) const { return {data + n * row, row, step}; }
  CSIKERNELS_INLINE void next() { data += step; }
  CSIKERNELS_INLINE F32 at(int r) const { return broadcast(data[r * row]); }
  static CSIKERNELS_INLINE F32 vector(const float* x) { return load(x); }
  static CSIKERNELS_INLINE F32 multiply_add(F32 weight, F32 x, F32 sum) { return fma(weight, x, sum); }
};

// Results of rows row..row + R at V vectors from `column` on.
template <int R, int V>
struct Tile {
  F32 at[R][V];
};

// On a sink written as a lambda: a call would push its tile through memory.
#define CSIKERNELS_INLINE_LAMBDA __attribute__((always_inline))

// Calls each(r, v) for every vector of a tile, in code that is fully unrolled: the tile then stays in registers.
template <int R, int V, class Each>
CSIKERNELS_INLINE void for_tile(const Each& each) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) each(r, v);
  }
}

// What a product fetches from memory for those after it while it computes: nothing. See WeightStream.
struct NoStream {
  CSIKERNELS_INLINE const char* advance(int64_t) { return nullptr; }
  static CSIKERNELS_INLINE void fetch(const char*) {}
};

// One tile, summed over all k. w and x point at its first row and column.
template <int R, int V, class Stream, class W, class Operand>
CSIKERNELS_INLINE Tile<R, V> product_tile(W w, int64_t depth, const Operand* x, int64_t x_stride, const char* ahead) {
  Tile<R, V> sum;
  for_tile<R, V>([&](int r, int v) { sum.at[r][v] = broadcast(0.0f); });
  const auto step = [&](const auto& weight_at) CSIKERNELS_INLINE_LAMBDA {
    decltype(W::vector(x)) vector[V], weight[R];
    for_tile<1, V>([&](int, int v) { vector[v] = W::vector(x + v * F32::lanes); });
    for_tile<R, 1>([&](int r, int) { weight[r] = weight_at(r); });
    for_tile<R, V>([&](int r, int v) { sum.at[r][v] = W::multiply_add(weight[r], vector[v], sum.at[r][v]); });
  };
#pragma GCC unroll 1
  for (int64_t k = 0; k + W::kDepthStep <= depth; k += W::kDepthStep) {
    Stream::fetch(ahead);
    step([&](int r) { return w.at(r); });
    w.next();
    x += x_stride;
    ahead += R * W::kDepthStep * W::kBytes;
  }
  if constexpr (W::kDepthStep == 2) {
    if (depth % 2) step([&](int r) { return w.half_at(r); });
  }
  return sum;
}

template <int R, class Stream, class W, class Operand, class Sink>
CSIKERNELS_INLINE void product_band(W w, int64_t row, int64_t depth, const Operand* x, int64_t x_stride,
                                    int64_t columns, const char* ahead, const Sink& sink) {
  const W own = w.from(row);
  int64_t column = 0;
  for (; column + kTileColumns <= columns; column += kTileColumns) {
    sink(row, column, product_tile<R, kTileVectors, Stream>(own, depth, x + column, x_stride, ahead));
  }
  if (column < columns) sink(row, column, product_tile<R, 1, Stream>(own, depth, x + column, x_stride, ahead));
}

// w [rows][depth] times x [depth][x_stride], its first `columns` (a multiple of F32::lanes), into the sink.
template <class Stream, class W, class Operand, class Sink>
CSIKERNELS_INLINE void product(W w, int64_t rows, int64_t depth, const Operand* x, int64_t x_stride, int64_t columns,
                               Stream& stream, const Sink& sink) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    const char* ahead = stream.advance(kTileRows * depth * W::kBytes);
    product_band<kTileRows, Stream>(w, row, depth, x, x_stride, columns, ahead, sink);
  }
  for (; row + 2 <= rows; row += 2) {
    const char* ahead = stream.advance(2 * depth * W::kBytes);
    product_band<2, Stream>(w, row, depth, x, x_stride, columns, ahead, sink);
  }
  if (row < rows) product_band<1, Stream>(w, row, depth, x, x_stride, columns, stream.advance(depth * W::kBytes), sink);
}

template <class W, class Operand, class Sink>
CSIKERNELS_INLINE void product(W w, int64_t rows, int64_t depth, const Operand* x, int64_t x_stride, int64_t columns,
                               const Sink& sink) {
  NoStream nothing;
  product(w, rows, depth, x, x_stride, columns, nothing, sink);
}

// Hands the sink result(row) for all rows at one column, two rows at a time.
template <class Result, class Sink>
CSIKERNELS_INLINE void in_pairs(int64_t rows, int64_t column, const Result& result, const Sink& sink) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) sink(row, column, Tile<2, 1>{{{result(row)}, {result(row + 1)}}});
  if (row < rows) sink(row, column, Tile<1, 1>{{{result(row)}}});
}

// (x - mean) / sqrt(variance + eps) over the rows of x [features][x_stride], without weight and bias, into the sink;
// x may be overwritten by it. rstd, if given, is [columns]: 1 / sqrt(variance + eps).
template <class Sink>
CSIKERNELS_INLINE void layer_norm(const float* x, int64_t x_stride, int64_t features, int64_t columns, float eps,
                                  float* rstd, const Sink& sink) {
  const F32 share = broadcast(1.0f / static_cast<float>(features));
  for (int64_t column = 0; column < columns; column += F32::lanes) {
    F32 sum = broadcast(0.0f), squares = broadcast(0.0f);
    for (int64_t row = 0; row < features; ++row) sum = sum + load(x + row * x_stride + column);
    const F32 mean = sum * share;
    for (int64_t row = 0; row < features; ++row) {
      const F32 centred = load(x + row * x_stride + column) - mean;
      squares = fma(centred, centred, squares);
    }
    const F32 scale = broadcast(1.0f) / sqrt(fma(squares, share, broadcast(eps)));
    if (rstd != nullptr) store(rstd + column, scale);
    in_pairs(features, column, [&](int64_t row) { return (load(x + row * x_stride + column) - mean) * scale; }, sink);
  }
}

// softmax(scale * s) down the rows of s [keys][s_stride], into the sink; s is overwritten.
template <class Sink>
CSIKERNELS_INLINE void softmax(float* s, int64_t s_stride, int64_t keys, int64_t columns, float scale,
                               const Sink& sink) {
  for (int64_t column = 0; column < columns; column += F32::lanes) {
    F32 largest = load(s + column), sum = broadcast(0.0f);
    for (int64_t key = 1; key < keys; ++key) largest = max(largest, load(s + key * s_stride + column));
    for (int64_t key = 0; key < keys; ++key) {
      const F32 weight = exp((load(s + key * s_stride + column) - largest) * broadcast(scale));
      sum = sum + weight;
      store(s + key * s_stride + column, weight);
    }
    const F32 share = broadcast(1.0f) / sum;
    in_pairs(keys, column, [&](int64_t key) { return load(s + key * s_stride + column) * share; }, sink);
  }
}

CSIKERNELS_INLINE F32 relu(F32 a) { return max(broadcast(0.0f), a); }  // NaN stays NaN

CSIKERNELS_INLINE F32 gelu(F32 a) {
  const F32 half = broadcast(0.5f) * a;
  return fma(half, erf(a * broadcast(0.70710678f)), half);
}

// One round of a perfect shuffle of F32::lanes rows; after log2(lanes) rounds they are transposed.
CSIKERNELS_INLINE void interleave_rows(F32 (&row)[F32::lanes]) {
  constexpr int kHalf = F32::lanes / 2;
  IntLanes low, high;
#pragma GCC unroll 16
  for (int i = 0; i < F32::lanes; ++i) {
    low[i] = i / 2 + (i % 2) * F32::lanes;
    high[i] = low[i] + kHalf;
  }
  F32 mixed[F32::lanes];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    mixed[2 * i].v = __builtin_shuffle(row[i].v, row[i + kHalf].v, low);
    mixed[2 * i + 1].v = __builtin_shuffle(row[i].v, row[i + kHalf].v, high);
  }
#pragma GCC unroll 16
  for (int i = 0; i < F32::lanes; ++i) row[i] = mixed[i];
}

// y[c][r] = x[r][c]: squares of F32::lanes in registers, the edges one by one.
inline void transpose(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
  const int64_t square_rows = rows / F32::lanes * F32::lanes, square_columns = columns / F32::lanes * F32::lanes;
  for (int64_t top = 0; top < square_rows; top += F32::lanes) {
    for (int64_t left = 0; left < square_columns; left += F32::lanes) {
      F32 row[F32::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < F32::lanes; ++i) row[i] = load(x + (top + i) * x_stride + left);
#pragma GCC unroll 4
      for (int length = 1; length < F32::lanes; length *= 2) interleave_rows(row);
#pragma GCC unroll 16
      for (int i = 0; i < F32::lanes; ++i) store(y + (left + i) * y_stride + top, row[i]);
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t first = column < square_columns ? square_rows : 0;
    for (int64_t row = first; row < rows; ++row) y[column * y_stride + row] = x[row * x_stride + column];
  }
}

}  // namespace
}  // namespace csikernels::cpu
