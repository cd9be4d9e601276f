// What the training kernels add to the building blocks of lasco_tile.h, on F32: sinks, products of weights summed over
// samples, transposes in registers, LayerNorm's backward. Included by lasco_backward_<isa>.cpp. Rows are padded to 16
// floats, so vectors at the end of a row are whole.
#pragma once

namespace csikernels::cpu {
namespace {

// Sinks: row of the first result, its column, a tile of results. The result goes to c [rows][row] in each.

struct Stored {
  float* c;
  int64_t row;
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) { store(c + (m + r) * row + j + v * F32::lanes, tile.at[r][v]); });
  }
};

struct WithBias {
  float* c;
  int64_t row;
  const float* bias;
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>(
        [&](int r, int v) { store(c + (m + r) * row + j + v * F32::lanes, tile.at[r][v] + broadcast(bias[m + r])); });
  }
};

struct WithBiasRelu {
  float* c;
  int64_t row;
  const float* bias;
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) {
      store(c + (m + r) * row + j + v * F32::lanes, relu(tile.at[r][v] + broadcast(bias[m + r])));
    });
  }
};

struct WithBiasAndRest {
  float* c;
  int64_t row;
  const float* bias;
  const float* rest;  // the residual, laid out as c; may be c
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) {
      const int64_t i = (m + r) * row + j + v * F32::lanes;
      store(c + i, (tile.at[r][v] + broadcast(bias[m + r])) + load(rest + i));
    });
  }
};

struct WithRest {
  float* c;
  int64_t row;
  const float* rest;  // laid out as c; may be c
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) {
      const int64_t i = (m + r) * row + j + v * F32::lanes;
      store(c + i, tile.at[r][v] + load(rest + i));
    });
  }
};

// The gradient passes where relu let its argument through, NaN included.
struct ThroughRelu {
  float* c;
  int64_t row;
  const float* active;
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) {
      const int64_t i = (m + r) * row + j + v * F32::lanes;
      store(c + i, select(equal(load(active + i), broadcast(0.0f)), broadcast(0.0f), tile.at[r][v]));
    });
  }
};

// LayerNorm: the normalised values are kept, x goes on.
struct Normalised {
  float *kept, *x;
  int64_t row;
  const float *weight, *bias;
  template <int R, int V>
  CSIKERNELS_INLINE void operator()(int64_t m, int64_t j, const Tile<R, V>& tile) const {
    for_tile<R, V>([&](int r, int v) {
      const int64_t i = (m + r) * row + j + v * F32::lanes;
      store(kept + i, tile.at[r][v]);
      store(x + i, fma(tile.at[r][v], broadcast(weight[m + r]), broadcast(bias[m + r])));
    });
  }
};

CSIKERNELS_INLINE Weights rows_of(const float* data, int64_t row) { return {data, row, 1}; }
CSIKERNELS_INLINE Weights columns_of(const float* data, int64_t row) { return {data, 1, row}; }

// Fetches memory that comes next while a product computes: `step` bytes for each of its bands of rows, at most.
struct Ahead {
  const char* place = nullptr;
  int64_t step = 0;

  CSIKERNELS_INLINE const char* advance(int64_t) {
    const char* now = place;
    place += step;
    return now;
  }
  static CSIKERNELS_INLINE void fetch(const char* place) { __builtin_prefetch(place, 0, 2); }
};

// The rows of c that the bands after the present one fill.
CSIKERNELS_INLINE Ahead ahead_in(const float* c, int64_t row) {
  const int64_t band = kTileRows * row * static_cast<int64_t>(sizeof(float));
  return {reinterpret_cast<const char*>(c) + band, band};
}

// As many bytes of `data` as a product of this depth can fetch.
CSIKERNELS_INLINE Ahead ahead_of(const float* data, int64_t depth) {
  return {reinterpret_cast<const char*>(data), kTileRows * depth * static_cast<int64_t>(sizeof(float))};
}

// Fetches one of these places for each band, the last for all that follow.
struct Places {
  const float* at[8];
  int next = 0;

  CSIKERNELS_INLINE const char* advance(int64_t) {
    const float* now = at[next];
    next += next < 7;
    return reinterpret_cast<const char*>(now);
  }
  static CSIKERNELS_INLINE void fetch(const char* place) { __builtin_prefetch(place, 0, 2); }
};

// One copy of the product per sink: inlined at every call they would not stay in the instruction cache.
template <class Sink, class Stream = NoStream>
__attribute__((noinline)) void multiply(Weights w, const float* x, int64_t rows, int64_t depth, int64_t columns,
                                        const Sink& sink, Stream stream = {}) {
  product(w, rows, depth, x, columns, columns, stream, sink);
}

// The same matrix of each of `count` samples.
struct Samples {
  const float* at[kTrainSamples];
};

template <int R, int V>
CSIKERNELS_INLINE void outer_tile(const Samples& y, int64_t y_from, int64_t y_row, const Samples& x, int64_t x_from,
                                  int64_t x_row, int64_t count, int64_t tokens, float* c) {
  Tile<R, V> sum;
  for_tile<R, V>([&](int r, int v) { sum.at[r][v] = load(c + r * x_row + v * F32::lanes); });
  for (int64_t s = 0; s < count; ++s) {
    const float *a = y.at[s] + y_from, *b = x.at[s] + x_from;
#pragma GCC unroll 1
    for (int64_t token = 0; token < tokens; ++token) {
      F32 vector[V], weight[R];
      for_tile<1, V>([&](int, int v) { vector[v] = load(b + v * F32::lanes); });
      for_tile<R, 1>([&](int r, int) { weight[r] = broadcast(a[r * y_row]); });
      for_tile<R, V>([&](int r, int v) { sum.at[r][v] = fma(weight[r], vector[v], sum.at[r][v]); });
      ++a;
      b += x_row;
    }
  }
  for_tile<R, V>([&](int r, int v) { store(c + r * x_row + v * F32::lanes, sum.at[r][v]); });
}

template <int R>
CSIKERNELS_INLINE void outer_band(const Samples& y, int64_t row, int64_t y_row, const Samples& x, int64_t x_row,
                                  int64_t count, int64_t tokens, float* c) {
  int64_t j = 0;
  for (; j + kTileColumns <= x_row; j += kTileColumns) {
    outer_tile<R, kTileVectors>(y, row * y_row, y_row, x, j, x_row, count, tokens, c + row * x_row + j);
  }
  if (j < x_row) outer_tile<R, 1>(y, row * y_row, y_row, x, j, x_row, count, tokens, c + row * x_row + j);
}

// c[n][k] += sum over samples and tokens of y[n][token] x[token][k]; y [rows][y_row], x [tokens][x_row], c
// [rows][x_row]. A tile of sums is fetched and stored once for all samples.
__attribute__((noinline)) void add_outer(const Samples& y, int64_t y_row, const Samples& x, int64_t x_row,
                                         int64_t count, int64_t rows, int64_t tokens, float* c) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) outer_band<kTileRows>(y, m, y_row, x, x_row, count, tokens, c);
  for (; m < rows; ++m) outer_band<1>(y, m, y_row, x, x_row, count, tokens, c);
}

struct Unchanged {
  CSIKERNELS_INLINE F32 operator()(F32 a, int64_t, int64_t) const { return a; }
};

// What LayerNorm's weight and bias make of normalised values once these lie token-major.
struct Affine {
  const float *weight, *bias;
  CSIKERNELS_INLINE F32 operator()(F32 a, int64_t column, int64_t left) const {
    if (left >= F32::lanes) return fma(a, load(weight + column), load(bias + column));
    const int n = left < 0 ? 0 : static_cast<int>(left);
    return fma(a, load_first(weight + column, n), load_first(bias + column, n));
  }
};

// to[c][r] = change(from[r][c]) for r < rows, c < columns; columns rows .. width of `to` become change(0).
template <class Change = Unchanged>
__attribute__((noinline)) void turn(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                                    int64_t to_row, int64_t width, const Change& change = {}) {
  constexpr int n = F32::lanes;
  for (int64_t r = 0; r < width; r += n) {
    const int filled = static_cast<int>(width - r < n ? width - r : n);
    for (int64_t c = 0; c < columns; c += 4) {
      F32 column[4];
      if (r + n <= rows && c + 4 <= columns) {
        load_columns(from + r * from_row + c, from_row, column);
      } else {
        float corner[n * 4] = {};
        for (int64_t i = r; i < rows && i < r + n; ++i) {
          for (int64_t k = c; k < columns && k < c + 4; ++k) corner[(i - r) * 4 + k - c] = from[i * from_row + k];
        }
        load_columns(corner, 4, column);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (c + i >= columns) break;
        float* out = to + (c + i) * to_row + r;
        if (filled == n) {
          store(out, change(column[i], r, rows - r));
        } else {
          store_first(out, change(column[i], r, rows - r), filled);
        }
      }
    }
  }
}

// sums[n][16] += the partial sums of row n over all samples.
void add_row_sums(const Samples& y, int64_t count, int64_t rows, int64_t columns, float* sums) {
  for (int64_t n = 0; n < rows; ++n) {
    F32 sum = load(sums + n * kTrainPad);
    for (int64_t s = 0; s < count; ++s) {
      const float* row = y.at[s] + n * columns;
      for (int64_t j = 0; j < columns; j += F32::lanes) sum = sum + load(row + j);
    }
    store(sums + n * kTrainPad, sum);
  }
}

// g <- gradient before the LayerNorm, plus rest where there is one; weight_sums, bias_sums [width][16] or both null.
void norm_backward(float* g, const float* normal, const float* rstd, const float* weight, const float* rest,
                   int64_t width, int64_t columns, float* weight_sums, float* bias_sums) {
  const F32 share = broadcast(1.0f / static_cast<float>(width));
  for (int64_t j = 0; j < columns; j += F32::lanes) {
    F32 plain = broadcast(0.0f), along = broadcast(0.0f);
    for (int64_t f = 0; f < width; ++f) {
      const F32 value = load(g + f * columns + j), product = value * load(normal + f * columns + j);
      const F32 w = broadcast(weight[f]);
      plain = fma(value, w, plain);
      along = fma(product, w, along);
      if (weight_sums != nullptr) {
        store(weight_sums + f * kTrainPad, load(weight_sums + f * kTrainPad) + product);
        store(bias_sums + f * kTrainPad, load(bias_sums + f * kTrainPad) + value);
      }
    }
    const F32 scale = load(rstd + j);
    plain = plain * share;
    along = along * share;
    for (int64_t f = 0; f < width; ++f) {
      // Not fused: at width 1 the difference is exactly 0, and rstd is large.
      const F32 centred = load(g + f * columns + j) * broadcast(weight[f]) - plain;
      F32 value = fnma(load(normal + f * columns + j), along, centred) * scale;
      if (rest != nullptr) value = value + load(rest + f * columns + j);
      store(g + f * columns + j, value);
    }
  }
}

}  // namespace
}  // namespace csikernels::cpu
