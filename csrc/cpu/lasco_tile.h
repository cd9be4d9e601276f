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

// What the sums of a row start from: nothing, or the row's bias.
struct FromZero {
  CSIKERNELS_INLINE FromZero from(int64_t) const { return {}; }
  CSIKERNELS_INLINE F32 at(int) const { return broadcast(0.0f); }
};
struct FromBias {
  const float* bias;
  CSIKERNELS_INLINE FromBias from(int64_t row) const { return {bias + row}; }
  CSIKERNELS_INLINE F32 at(int r) const { return broadcast(bias[r]); }
};

// One tile, summed over all k. w, start and x point at its first row and column.
template <int R, int V, class Stream, class W, class Start, class Operand>
CSIKERNELS_INLINE Tile<R, V> product_tile(W w, const Start& start, int64_t depth, const Operand* x, int64_t x_stride,
                                          const char* ahead) {
  Tile<R, V> sum;
  for_tile<R, V>([&](int r, int v) { sum.at[r][v] = start.at(r); });
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

template <int R, class Stream, class W, class Start, class Operand, class Sink>
CSIKERNELS_INLINE void product_band(W w, const Start& first, int64_t row, int64_t depth, const Operand* x,
                                    int64_t x_stride, int64_t columns, const char* ahead, const Sink& sink) {
  const W own = w.from(row);
  const Start start = first.from(row);
  int64_t column = 0;
  for (; column + kTileColumns <= columns; column += kTileColumns) {
    sink(row, column, product_tile<R, kTileVectors, Stream>(own, start, depth, x + column, x_stride, ahead));
  }
  if (column < columns) sink(row, column, product_tile<R, 1, Stream>(own, start, depth, x + column, x_stride, ahead));
}

// w [rows][depth] times x [depth][x_stride], its first `columns` (a multiple of F32::lanes), into the sink.
template <class Stream, class W, class Operand, class Sink, class Start = FromZero>
CSIKERNELS_INLINE void product(W w, int64_t rows, int64_t depth, const Operand* x, int64_t x_stride, int64_t columns,
                               Stream& stream, const Sink& sink, const Start& start = {}) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    const char* ahead = stream.advance(kTileRows * depth * W::kBytes);
    product_band<kTileRows, Stream>(w, start, row, depth, x, x_stride, columns, ahead, sink);
  }
  for (; row + 2 <= rows; row += 2) {
    const char* ahead = stream.advance(2 * depth * W::kBytes);
    product_band<2, Stream>(w, start, row, depth, x, x_stride, columns, ahead, sink);
  }
  if (row < rows)
    product_band<1, Stream>(w, start, row, depth, x, x_stride, columns, stream.advance(depth * W::kBytes), sink);
}

template <class W, class Operand, class Sink>
CSIKERNELS_INLINE void product(W w, int64_t rows, int64_t depth, const Operand* x, int64_t x_stride, int64_t columns,
                               const Sink& sink) {
  NoStream nothing;
  product(w, rows, depth, x, x_stride, columns, nothing, sink);
}

// Hands the sink result(row, v) for all rows of V columns, two rows at a time.
template <int V, class Result, class Sink>
CSIKERNELS_INLINE void in_pairs(int64_t rows, int64_t column, const Result& result, const Sink& sink) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    Tile<2, V> pair;
    for_tile<2, V>([&](int r, int v) { pair.at[r][v] = result(row + r, v); });
    sink(row, column, pair);
  }
  if (row < rows) {
    Tile<1, V> last;
    for_tile<1, V>([&](int, int v) { last.at[0][v] = result(row, v); });
    sink(row, column, last);
  }
}

// total[v] = the sum (or, with another `join`, the maximum) of what term(row, v, so_far) builds up over the rows. In
// four strands: one alone would wait for each addition.
template <int V, class Term, class Join>
CSIKERNELS_INLINE void down_rows(int64_t rows, F32 start, F32 (&total)[V], const Term& term, const Join& join) {
  F32 strand[4][V];
  for_tile<4, V>([&](int r, int v) { strand[r][v] = start; });
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    for_tile<4, V>([&](int r, int v) { strand[r][v] = term(row + r, v, strand[r][v]); });
  }
  for (; row < rows; ++row) for_tile<1, V>([&](int, int v) { strand[0][v] = term(row, v, strand[0][v]); });
  for_tile<1, V>(
      [&](int, int v) { total[v] = join(join(strand[0][v], strand[1][v]), join(strand[2][v], strand[3][v])); });
}

CSIKERNELS_INLINE F32 add(F32 a, F32 b) { return a + b; }

template <int V, class Sink>
CSIKERNELS_INLINE void layer_norm_columns(const float* x, int64_t x_stride, int64_t features, int64_t column, float eps,
                                          float* rstd, const Sink& sink) {
  const auto at = [=](int64_t row, int v) { return load(x + row * x_stride + column + v * F32::lanes); };
  const F32 share = broadcast(1.0f / static_cast<float>(features)), zero = broadcast(0.0f);
  F32 mean[V], scale[V];
  down_rows<V>(features, zero, mean, [&](int64_t row, int v, F32 sum) { return sum + at(row, v); }, add);
  for_tile<1, V>([&](int, int v) { mean[v] = mean[v] * share; });
  const auto squares = [&](int64_t row, int v, F32 sum) {
    const F32 centred = at(row, v) - mean[v];
    return fma(centred, centred, sum);
  };
  down_rows<V>(features, zero, scale, squares, add);
  for_tile<1, V>([&](int, int v) {
    scale[v] = broadcast(1.0f) / sqrt(fma(scale[v], share, broadcast(eps)));
    if (rstd != nullptr) store(rstd + column + v * F32::lanes, scale[v]);
  });
  in_pairs<V>(features, column, [&](int64_t row, int v) { return (at(row, v) - mean[v]) * scale[v]; }, sink);
}

// (x - mean) / sqrt(variance + eps) over the rows of x [features][x_stride], without weight and bias, into the sink;
// x may be overwritten by it. rstd, if given, is [columns]: 1 / sqrt(variance + eps).
template <class Sink>
CSIKERNELS_INLINE void layer_norm(const float* x, int64_t x_stride, int64_t features, int64_t columns, float eps,
                                  float* rstd, const Sink& sink) {
  int64_t column = 0;
  for (; column + kTileColumns <= columns; column += kTileColumns) {
    layer_norm_columns<kTileVectors>(x, x_stride, features, column, eps, rstd, sink);
  }
  if (column < columns) layer_norm_columns<1>(x, x_stride, features, column, eps, rstd, sink);
}

// The weights of a softmax before their division: e^(x - maximum) down V columns of s [keys][s_stride], with scale in
// units of ln 2, go to the sink, which may overwrite s; returns 1 / their sums in share.
template <int V, class Sink>
CSIKERNELS_INLINE void softmax_weights(const float* s, int64_t s_stride, int64_t keys, int64_t column, F32 scale,
                                       F32 (&share)[V], const Sink& sink) {
  const auto at = [=](int64_t key, int v) { return load(s + key * s_stride + column + v * F32::lanes); };
  F32 largest[V], sum[2][V];
  const auto larger = [&](int64_t key, int v, F32 so_far) { return max(so_far, at(key, v)); };
  down_rows<V>(keys, broadcast(-__builtin_inff()), largest, larger, [](F32 a, F32 b) { return max(a, b); });
  for_tile<2, V>([&](int r, int v) { sum[r][v] = broadcast(0.0f); });
  // Rounding the maximum's product moves all weights by one factor, which the division takes out.
  for_tile<1, V>([&](int, int v) { largest[v] = largest[v] * scale; });
  in_pairs<V>(
      keys, column, [&](int64_t key, int v) { return exp2_of_nonpositive(fma(at(key, v), scale, -largest[v])); },
      [&]<int R, int C>(int64_t key, int64_t to, const Tile<R, C>& tile) CSIKERNELS_INLINE_LAMBDA {
        for_tile<R, C>([&](int r, int v) { sum[r][v] = sum[r][v] + tile.at[r][v]; });
        sink(key, to, tile);
      });
  for_tile<1, V>([&](int, int v) { share[v] = broadcast(1.0f) / (sum[0][v] + sum[1][v]); });
}

template <int V, class Sink>
CSIKERNELS_INLINE void softmax_columns(float* s, int64_t s_stride, int64_t keys, int64_t column, F32 scale,
                                       const Sink& sink) {
  const auto place = [=](int64_t key, int64_t at, int v) { return s + key * s_stride + at + v * F32::lanes; };
  F32 share[V];
  softmax_weights<V>(s, s_stride, keys, column, scale, share,
                     [&]<int R, int C>(int64_t key, int64_t at, const Tile<R, C>& tile) CSIKERNELS_INLINE_LAMBDA {
                       for_tile<R, C>([&](int r, int v) { store(place(key + r, at, v), tile.at[r][v]); });
                     });
  in_pairs<V>(keys, column, [&](int64_t key, int v) { return load(place(key, column, v)) * share[v]; }, sink);
}

constexpr float kBinaryExponent = 1.44269504f;  // e^a = 2^(a / ln 2)

// softmax(scale * s) down the rows of s [keys][s_stride], into the sink; s is overwritten.
template <class Sink>
CSIKERNELS_INLINE void softmax(float* s, int64_t s_stride, int64_t keys, int64_t columns, float scale,
                               const Sink& sink) {
  const F32 binary = broadcast(scale * kBinaryExponent);
  int64_t column = 0;
  for (; column + kTileColumns <= columns; column += kTileColumns) {
    softmax_columns<kTileVectors>(s, s_stride, keys, column, binary, sink);
  }
  if (column < columns) softmax_columns<1>(s, s_stride, keys, column, binary, sink);
}

CSIKERNELS_INLINE F32 relu(F32 a) { return max(broadcast(0.0f), a); }  // NaN stays NaN

CSIKERNELS_INLINE F32 gelu(F32 a) {
  const F32 half = broadcast(0.5f) * a;
  return fma(half, erf(a * broadcast(0.70710678f)), half);
}

typedef float Quad __attribute__((vector_size(16)));

CSIKERNELS_INLINE Quad load_quad(const float* p) {
  Quad a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}

// Four floats from each of p, p + 4 row, p + 8 row ...: one quarter of a vector for each.
template <int Lanes>
CSIKERNELS_INLINE auto load_quads(const float* p, int64_t row) {
  if constexpr (Lanes == 4) {
    return load_quad(p);
  } else {
    const auto low = load_quads<Lanes / 2>(p, row), high = load_quads<Lanes / 2>(p + Lanes / 2 * row, row);
    if constexpr (Lanes == 8) {
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    } else {
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }
}

// Result i, i < 4, holds column i of F32::lanes rows. Rows come in quarters of vectors, so that all shuffles stay
// within these: four rows of each quarter are a 4 x 4 transpose.
CSIKERNELS_INLINE void load_columns(const float* from, int64_t row, F32 (&column)[4]) {
  constexpr int n = F32::lanes;
  IntLanes low, high, first, second;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const int quad = i / 4 * 4, place = i % 4;
    low[i] = quad + place / 2 + place % 2 * n;
    high[i] = low[i] + 2;
    first[i] = quad + place % 2 + place / 2 * n;
    second[i] = first[i] + 2;
  }
  F32 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i].v = load_quads<n>(from + i * row, row);
  const FloatLanes a = __builtin_shuffle(r[0].v, r[1].v, low), b = __builtin_shuffle(r[2].v, r[3].v, low);
  const FloatLanes c = __builtin_shuffle(r[0].v, r[1].v, high), d = __builtin_shuffle(r[2].v, r[3].v, high);
  column[0].v = __builtin_shuffle(a, b, first);
  column[1].v = __builtin_shuffle(a, b, second);
  column[2].v = __builtin_shuffle(c, d, first);
  column[3].v = __builtin_shuffle(c, d, second);
}

// y[c][r] = x[r][c]: four columns of F32::lanes rows in registers, the edges one by one.
inline void transpose(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
  const int64_t whole_rows = rows / F32::lanes * F32::lanes, whole_columns = columns / 4 * 4;
  for (int64_t top = 0; top < whole_rows; top += F32::lanes) {
    for (int64_t left = 0; left < whole_columns; left += 4) {
      F32 column[4];
      load_columns(x + top * x_stride + left, x_stride, column);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(y + (left + i) * y_stride + top, column[i]);
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t first = column < whole_columns ? whole_rows : 0;
    for (int64_t row = first; row < rows; ++row) y[column * y_stride + row] = x[row * x_stride + column];
  }
}

}  // namespace
}  // namespace csikernels::cpu
