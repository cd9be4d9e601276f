// The codebook kernels on F32 and the int8 primitives of an instruction set; included by codebook_<isa>.cpp inside its
// namespace, after it has defined
//   Words load_words(const uint8_t*)            lanes x 4 components of words, value + 128
//   Query load_query(const int8_t*)             4 components of a query, the same in every lane
//   IntLanes dot4(IntLanes, Words, Query)       adds the four products of each lane
//   unsigned at_least(F32 a, F32 b)             bit l: a >= b in lane l
//   void prefetch(const void*)
//   kGroup, kQueryLevel, kWideTiles             queries and tiles per pass of the int8 kernel

namespace {

using codebook::Float32Group;
using codebook::Int8Group;
using codebook::kCapacity;
using codebook::kMaxGroup;
using codebook::kRounding;
using codebook::kTileWords;

constexpr int kVectors = kTileWords / F32::lanes;  // vectors per tile

F32 to_float(IntLanes a) { return {__builtin_convertvector(a, FloatLanes)}; }

CSIKERNELS_INLINE float lowered(float a) { return a - (a < 0 ? -a : a) * kRounding; }

// |w8^H q8|^2 s^2 of the words of one vector of a tile; `numbers` is what is stored with these words.
CSIKERNELS_INLINE F32 squared_product(const IntLanes& real, const IntLanes& imaginary, const float* numbers) {
  const F32 x = to_float(real), y = to_float(imaginary);
  return fma(x, x, y * y) * load(numbers);
}

// Which of the words may beat the best so far, one bit each.
CSIKERNELS_INLINE unsigned may_win(F32 squared, F32 residual, float threshold, float slope) {
  const F32 needed = max(fnma(broadcast(slope), residual, broadcast(threshold)), broadcast(0.0f));
  return at_least(squared, needed * needed);
}

// Lists the words of one vector that may beat the best. Out of line, because it is rare.
__attribute__((noinline)) void keep(const IntLanes& real, const IntLanes& imaginary, const float* numbers,
                                    int64_t position, int q, Int8Group& g) {
  const F32 squared = squared_product(real, imaginary, numbers), residual = load(numbers + kTileWords);
  unsigned hits = may_win(squared, residual, lowered(g.best[q] - g.error[q]), g.slope[q]);
  const F32 root = sqrt(squared), margin = fma(broadcast(g.slope[q]), residual, broadcast(g.error[q]));
  float low[F32::lanes], high[F32::lanes];
  store(low, fnma(root, broadcast(4 * kRounding), root - margin));  // the stored scale^2 is rounded up
  store(high, fma(root, broadcast(kRounding), root + margin));
  int count = g.count[q];
  float best = g.best[q];
  for (; hits != 0; hits &= hits - 1) {
    const int lane = __builtin_ctz(hits);
    g.position[q][count] = static_cast<uint32_t>(position + lane);
    g.upper[q][count++] = high[lane];
    best = low[lane] > best ? low[lane] : best;
  }
  g.count[q] = count;
  g.best[q] = best;
}

// The products of Q queries with T tiles: 2 Q T kVectors C accumulators, C chains of steps each.
template <int Q, int T, int C>
CSIKERNELS_INLINE void multiply(const uint8_t* tile, int64_t bytes, int64_t steps, const Int8Group& g,
                                IntLanes (*sums)[2][T * kVectors]) {
  constexpr int N = T * kVectors;
  IntLanes real[C][Q][N], imaginary[C][Q][N];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        real[c][q][n] = IntLanes{} + (c == 0 ? g.start[q][0] : 0);
        imaginary[c][q][n] = IntLanes{} + (c == 0 ? g.start[q][1] : 0);
      }
    }
  }
  const int8_t* row = g.rows;
  const auto add_step = [&](int c, const uint8_t* words, const int8_t* queries) __attribute__((always_inline)) {
    Words w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      w[n] = load_words(words + n / kVectors * bytes + n % kVectors * F32::lanes * 4);
      if (n % kVectors == 0) prefetch(words + (T + n / kVectors) * bytes);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Query a = load_query(queries + q * 8), b = load_query(queries + q * 8 + 4);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        real[c][q][n] = dot4(real[c][q][n], w[n], a);
        imaginary[c][q][n] = dot4(imaginary[c][q][n], w[n], b);
      }
    }
  };
  int64_t step = 0;
  for (; step + C <= steps; step += C) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) add_step(c, tile + (step + c) * kTileWords * 4, row + (step + c) * Q * 8);
  }
  if constexpr (C > 1) {
    for (; step < steps; ++step) add_step(0, tile + step * kTileWords * 4, row + step * Q * 8);
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int c = 1; c < C; ++c) {
        real[0][q][n] += real[c][q][n];
        imaginary[0][q][n] += imaginary[c][q][n];
      }
      sums[q][0][n] = real[0][q][n];
      sums[q][1][n] = imaginary[0][q][n];
    }
  }
  // Through memory: what follows would otherwise claim registers within the loop, and accumulators be spilled there.
  asm volatile("" : : "r"(sums) : "memory");
}

template <int Q, int T, int C>
void filter_tiles(const uint8_t* tiles, int64_t components, int64_t first, Int8Group& g) {
  constexpr int N = T * kVectors;
  const int64_t steps = codebook::int8_steps(components), bytes = codebook::int8_tile_bytes(components);
  const uint8_t* tile = tiles + first * bytes;
  const uint8_t* tail = tile + steps * 4 * kTileWords;
  IntLanes sums[Q][2][N];
  multiply<Q, T, C>(tile, bytes, steps, g, sums);
  const auto numbers = [&](int n) {
    return reinterpret_cast<const float*>(tail + n / kVectors * bytes) + n % kVectors * F32::lanes;
  };
  unsigned hits[Q][N], any = 0;
  for (int q = 0; q < Q; ++q) {
    const float threshold = lowered(g.best[q] - g.error[q]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const F32 squared = squared_product(sums[q][0][n], sums[q][1][n], numbers(n));
      hits[q][n] = may_win(squared, load(numbers(n) + kTileWords), threshold, g.slope[q]);
      any |= hits[q][n];
    }
  }
  if (any == 0) [[likely]]
    return;
  for (int q = 0; q < Q; ++q) {
    for (int n = 0; n < N; ++n) {
      if (hits[q][n] == 0) continue;
      keep(sums[q][0][n], sums[q][1][n], numbers(n), first * kTileWords + n * F32::lanes, q, g);
    }
  }
}

template <int Q>
void filter_group(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, Int8Group& g) {
  // Few queries need other accumulators to hide the latency of a product: more tiles, or for a single query, which
  // waits for memory, several chains through one tile after the other.
  constexpr int T = Q == 1 ? 1 : Q <= 3 ? (kWideTiles == 1 ? 1 : 2 * kWideTiles) : kWideTiles, C = Q == 1 ? 4 : 1;
  for (; first + T <= last; first += T) filter_tiles<Q, T, C>(tiles, components, first, g);
  for (; first < last; ++first) filter_tiles<Q, 1, C>(tiles, components, first, g);
}

constexpr int at_most_group(int queries) { return queries < kGroup ? queries : kGroup; }

void filter(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, Int8Group& g) {
  using Filter = decltype(&filter_group<1>);
  static constexpr Filter by_queries[] = {
      filter_group<at_most_group(1)>, filter_group<at_most_group(2)>, filter_group<at_most_group(3)>,
      filter_group<at_most_group(4)>, filter_group<at_most_group(5)>, filter_group<at_most_group(6)>,
  };
  by_queries[g.queries - 1](tiles, components, first, last, g);
}

// Q queries from query `from` of the group against one tile in float32.
template <int Q, int T>
CSIKERNELS_INLINE void maximum_tiles(const uint8_t* tiles, int64_t components, int64_t first, int from,
                                     Float32Group& g) {
  constexpr int N = T * kVectors;
  const auto* tile = reinterpret_cast<const float*>(tiles + first * codebook::float32_tile_bytes(components));
  const int64_t stride = components * kTileWords;
  F32 real[Q][N], imaginary[Q][N];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) real[q][n] = imaginary[q][n] = broadcast(0.0f);
  }
  const float* row = g.rows + from * 2;
  const int64_t width = g.queries * 2;
  for (int64_t c = 0; c < components; ++c, row += width) {
    F32 w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const float* p = tile + n / kVectors * stride + c * kTileWords + n % kVectors * F32::lanes;
      w[n] = load(p);
      if (n % kVectors == 0) prefetch(p + T * stride);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const F32 a = broadcast(row[q * 2]), b = broadcast(row[q * 2 + 1]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        real[q][n] = fma(w[n], a, real[q][n]);
        imaginary[q][n] = fma(w[n], b, imaginary[q][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* best = &g.best[from + q][n % kVectors * F32::lanes];
      int32_t* where = &g.tile[from + q][n % kVectors * F32::lanes];
      const F32 value = fma(real[q][n], real[q][n], imaginary[q][n] * imaginary[q][n]), old = load(best);
      const Mask above = less(old, value);
      store(best, select(above, value, old));
      IntLanes at;
      __builtin_memcpy(&at, where, sizeof(at));
      at = above.v ? IntLanes{} + static_cast<int32_t>(first + n / kVectors) : at;
      __builtin_memcpy(where, &at, sizeof(at));
    }
  }
}

template <int Q>
void maximum_group(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, int from, Float32Group& g) {
  for (; first + kWideTiles <= last; first += kWideTiles) {
    maximum_tiles<Q, kWideTiles>(tiles, components, first, from, g);
  }
  for (; first < last; ++first) maximum_tiles<Q, 1>(tiles, components, first, from, g);
}

void maximum(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, Float32Group& g) {
  constexpr int Q = kGroup;
  if (g.queries == Q) return maximum_group<Q>(tiles, components, first, last, 0, g);
  int from = 0;
  for (; from + 2 <= g.queries; from += 2) maximum_group<2>(tiles, components, first, last, from, g);
  if (from < g.queries) maximum_group<1>(tiles, components, first, last, from, g);
}

constexpr int kScored = F32::lanes / 2;  // words scored at once: two sums each fill the lanes

// Adds up the halves of every block of 2 H lanes of a and of b: the blocks of a, then those of b, H lanes each.
template <int H>
CSIKERNELS_INLINE F32 fold(F32 a, F32 b) {
  IntLanes low, high;
#pragma GCC unroll 16
  for (int lane = 0; lane < F32::lanes; ++lane) {
    low[lane] = lane / H * 2 * H + lane % H;
    high[lane] = low[lane] + H;
  }
  return {__builtin_shuffle(a.v, b.v, low) + __builtin_shuffle(a.v, b.v, high)};
}

// Lane i is the sum over all lanes of sums[i]. Neighbours are folded first, so that the order stays.
template <int H = F32::lanes / 2>
CSIKERNELS_INLINE F32 add_lanes(F32* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i) sums[i] = fold<H>(sums[2 * i], sums[2 * i + 1]);
  if constexpr (H > 1) return add_lanes<H / 2>(sums);
  return sums[0];
}

// |w^H q| of R words, kScored or one.
template <int R>
void score_words(const float* query, const float* words, int64_t components, const int64_t* index, float* similarity) {
  const float* row[R];
  F32 sums[2 * R];  // real parts, then imaginary ones
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = words + index[r] * components;
    sums[r] = sums[R + r] = broadcast(0.0f);
  }
  int64_t c = 0;
  for (; c + F32::lanes <= components; c += F32::lanes) {
    const F32 a = load(query + c), b = load(query + components + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 w = load(row[r] + c);
      sums[r] = fma(w, a, sums[r]);
      sums[R + r] = fma(w, b, sums[R + r]);
    }
  }
  if (const int rest = static_cast<int>(components - c); rest > 0) {
    const F32 a = load_first(query + c, rest), b = load_first(query + components + c, rest);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 w = load_first(row[r] + c, rest);
      sums[r] = fma(w, a, sums[r]);
      sums[R + r] = fma(w, b, sums[R + r]);
    }
  }
  float parts[F32::lanes];
  if constexpr (R == kScored) {
    store(parts, add_lanes(sums));
  } else {
    for (int i = 0; i < 2 * R; ++i) parts[i] = reduce_add(sums[i]);
  }
  for (int r = 0; r < R; ++r) similarity[r] = __builtin_sqrtf(parts[r] * parts[r] + parts[R + r] * parts[R + r]);
}

void score(const float* query, const float* words, int64_t components, const int64_t* index, int64_t n,
           float* similarity) {
  int64_t i = 0;
  for (; i + kScored <= n; i += kScored) score_words<kScored>(query, words, components, index + i, similarity + i);
  if (i + 1 == n) return score_words<1>(query, words, components, index + i, similarity + i);
  if (i == n) return;
  // The last few with the first of them in the places that are left, rather than one at a time.
  int64_t last[kScored];
  float scored[kScored];
  for (int r = 0; r < kScored; ++r) last[r] = index[i + r < n ? i + r : i];
  score_words<kScored>(query, words, components, last, scored);
  for (int64_t r = 0; i + r < n; ++r) similarity[i + r] = scored[r];
}

}  // namespace

extern const codebook::Kernels codebook_kernels = {kGroup, kQueryLevel, filter, maximum, score};
