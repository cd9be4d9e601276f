// nf4_lora with float32 elements on F32, once per instruction set; included by nf4_lora_<isa>.cpp inside its namespace,
// after the primitive that it needs:
//
//   struct Decoder { void operator()(const uint8_t* codes, F32 out[32 / F32::lanes]) const; }   32 levels, in order
#pragma once

#include "cpu/nf4_lora_product.h"

namespace {

constexpr int kRun = 32;  // elements decoded at once: no block is smaller
constexpr int kRunVectors = kRun / F32::lanes;

struct One {
  using Vector = F32;
  static CSIKERNELS_INLINE Vector load(const float* p) { return cpu::load(p); }
  static CSIKERNELS_INLINE Vector broadcast(const float* p) { return cpu::broadcast(*p); }
  static CSIKERNELS_INLINE F32 multiply_add(Vector w, Vector x, F32 sum) { return fma(w, x, sum); }
};

float element(const NF4Matrix& weight, int64_t e) {
  const int byte = weight.packed[e / 2];
  return kLevels[e % 2 == 0 ? byte >> 4 : byte & 15] * weight.absmax[e >> weight.log_block];
}

// store_run(position, values[kRunVectors]) for whole runs of 32, store_one(position, value) for what is left.
template <class StoreRun, class StoreOne>
CSIKERNELS_INLINE void for_each_run(const NF4Matrix& weight, int64_t first, int64_t count, StoreRun store_run,
                                    StoreOne store_one) {
  const Decoder decode;
  const int64_t end = first + count;
  int64_t e = first;
  for (; e < end && e % kRun != 0; ++e) store_one(e - first, element(weight, e));
  for (; e + kRun <= end; e += kRun) {
    F32 value[kRunVectors];
    decode(weight.packed + e / 2, value);
    const F32 scale = broadcast(weight.absmax[e >> weight.log_block]);
    for (int v = 0; v < kRunVectors; ++v) value[v] = value[v] * scale;
    store_run(e - first, value);
  }
  for (; e < end; ++e) store_one(e - first, element(weight, e));
}

// Thresholds between neighbouring levels, as bitsandbytes has them; a value on one takes the lower level.
CSIKERNELS_INLINE IntLanes codes_of(F32 relative) {
  IntLanes code = {};
  for (int i = 0; i < 15; ++i) code -= less(broadcast((kLevels[i] + kLevels[i + 1]) / 2), relative).v;
  return code;
}

CSIKERNELS_INLINE F32 clamp(F32 a) { return max(min(a, broadcast(1.0f)), broadcast(-1.0f)); }

// The largest magnitude, or a NaN or infinity where there is one.
CSIKERNELS_INLINE float largest_magnitude(const float* p, int64_t count) {
  typedef IntLanes Bits;  // magnitudes order like their bits, and all that is not finite comes last
  Bits largest = {};
  int64_t i = 0;
  for (; i + F32::lanes <= count; i += F32::lanes) {
    const Bits bits = (Bits)abs(load(p + i)).v;
    largest = bits > largest ? bits : largest;
  }
  if (i < count) {
    const Bits bits = (Bits)abs(load_first(p + i, static_cast<int>(count - i))).v;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int lane = 0; lane < F32::lanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  float magnitude;
  __builtin_memcpy(&magnitude, &most, sizeof(magnitude));
  return magnitude;
}

// T tokens, rows n .. n + R of W.
template <int T, int R>
CSIKERNELS_INLINE void few_rows(const FewTokens& job, int64_t n, int64_t token, const Decoder& decode) {
  const int64_t k = job.weight.k;
  const float* x = static_cast<const float*>(job.x) + token * k;
  const float* b = static_cast<const float*>(job.lora_b) + n * job.rank;
  const uint8_t* codes = job.weight.packed + n * k / 2;
  F32 sum[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      sum[r][t] = broadcast(0.0f);
      for (int64_t j = 0; j < job.rank; j += F32::lanes) {
        const int left = job.rank - j < F32::lanes ? static_cast<int>(job.rank - j) : F32::lanes;
        const F32 ts = load_first(job.t + (token + t) * job.rank + j, left);
        sum[r][t] = fma(load_first(b + r * job.rank + j, left), ts, sum[r][t]);
      }
    }
  }
  for (int64_t i = 0; i < k; i += kRun) {
    for (int r = 0; r < R; ++r) {
      const uint8_t* here = codes + (r * k + i) / 2;
      __builtin_prefetch(here + R * k / 2);
      F32 level[kRunVectors];
      decode(here, level);
      const F32 scale = broadcast(job.weight.absmax[((n + r) * k + i) >> job.weight.log_block]);
      for (int t = 0; t < T; ++t) {
        F32 run = level[0] * load(x + t * k + i);
        for (int v = 1; v < kRunVectors; ++v) run = fma(level[v], load(x + t * k + i + v * F32::lanes), run);
        sum[r][t] = fma(run, scale, sum[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) job.y[(token + t) * job.weight.n + n + r] = reduce_add(sum[r][t]);
  }
}

template <int T, int R>
__attribute__((noinline)) void few_tokens(const FewTokens& job, int64_t begin, int64_t end, int64_t token) {
  const Decoder decode;
  int64_t n = begin;
  for (; n + R <= end; n += R) few_rows<T, R>(job, n, token, decode);
  for (; n < end; ++n) few_rows<T, 1>(job, n, token, decode);
}

template <int R>
CSIKERNELS_INLINE void inner_rows(const float* x, int64_t k, const float* a, float scaling, float* t) {
  F32 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + F32::lanes <= k; i += F32::lanes) {
    const F32 xs = load(x + i);
    for (int r = 0; r < R; ++r) sum[r] = fma(load(a + r * k + i), xs, sum[r]);
  }
  if (i < k) {
    const int left = static_cast<int>(k - i);
    const F32 xs = load_first(x + i, left);
    for (int r = 0; r < R; ++r) sum[r] = fma(load_first(a + r * k + i, left), xs, sum[r]);
  }
  for (int r = 0; r < R; ++r) t[r] = scaling * reduce_add(sum[r]);
}

}  // namespace

void dequantize(const NF4Matrix& weight, int64_t first, int64_t count, float* out) {
  for_each_run(
      weight, first, count,
      [&](int64_t at, const F32* value) {
        for (int v = 0; v < kRunVectors; ++v) store(out + at + v * F32::lanes, value[v]);
      },
      [&](int64_t at, float value) { out[at] = value; });
}

void dequantize_bf16(const NF4Matrix& weight, int64_t first, int64_t count, uint16_t* out) {
  for_each_run(
      weight, first, count,
      [&](int64_t at, const F32* value) {
        for (int v = 0; v < kRunVectors; ++v) store_bf16(out + at + v * F32::lanes, value[v]);
      },
      [&](int64_t at, float value) {
        uint16_t half[F32::lanes];
        store_bf16(half, broadcast(value));
        out[at] = half[0];
      });
}

int64_t quantize(const float* weight, int64_t count, int64_t block, uint8_t* packed, float* absmax) {
  constexpr float smallest = 1e-38f;  // bitsandbytes' guard against division by zero
  uint8_t code[4096];
  for (int64_t begin = 0; begin < count; begin += block, ++absmax) {
    const int64_t here = count - begin < block ? count - begin : block;
    const float* from = weight + begin;
    const float largest = largest_magnitude(from, here);
    if (!(largest <= 3.4028234664e38f)) {
      for (int64_t i = 0; i < here; ++i) {
        if (!(__builtin_fabsf(from[i]) <= 3.4028234664e38f)) return begin + i;
      }
    }
    const float guarded = largest > smallest ? largest : smallest;
    if (here == block) {
      *absmax = largest;
      const F32 inverse = broadcast(1.0f / guarded);
      for (int64_t i = 0; i < here; i += F32::lanes) {
        const IntLanes lanes = codes_of(clamp(load(from + i) * inverse));
        for (int lane = 0; lane < F32::lanes; ++lane) code[i + lane] = static_cast<uint8_t>(lanes[lane]);
      }
    } else {  // in the last, shorter block bitsandbytes divides, and its scale is never below the guard
      *absmax = guarded;
      for (int64_t i = 0; i < here; i += F32::lanes) {
        const int left = here - i < F32::lanes ? static_cast<int>(here - i) : F32::lanes;
        const IntLanes lanes = codes_of(clamp(load_first(from + i, left) / broadcast(guarded)));
        for (int lane = 0; lane < left; ++lane) code[i + lane] = static_cast<uint8_t>(lanes[lane]);
      }
      if (here % 2 != 0) code[here] = 7;  // the level 0
    }
    uint8_t* to = packed + begin / 2;
    for (int64_t i = 0; i < (here + 1) / 2; ++i) to[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
  }
  return -1;
}

void panel(const NF4Matrix& weight, int64_t n0, int64_t rows, int64_t k0, int64_t columns, void* out,
           int64_t row_units) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = static_cast<float*>(out) + r * row_units;
    const int64_t first = (n0 + r) * weight.k + k0;
    dequantize(weight, first, columns, to);
    if (columns % 2 != 0) to[columns] = 0.0f;
  }
}

void inner(const void* x, int64_t tokens, int64_t k, const void* lora_a, int64_t rank, float scaling, float* t) {
  for (int64_t token = 0; token < tokens; ++token) {
    const float* xs = static_cast<const float*>(x) + token * k;
    const float* a = static_cast<const float*>(lora_a);
    int64_t r = 0;
    for (; r + 8 <= rank; r += 8) inner_rows<8>(xs, k, a + r * k, scaling, t + token * rank + r);
    for (; r < rank; ++r) inner_rows<1>(xs, k, a + r * k, scaling, t + token * rank + r);
  }
}

void multiply_few(const FewTokens& job) {
  constexpr int64_t rows = 64;  // their codes stay in the cache from one set of tokens to the next
  for (int64_t begin = job.begin; begin < job.end; begin += rows) {
    const int64_t end = begin + rows < job.end ? begin + rows : job.end;
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) few_tokens<4, 1>(job, begin, end, token);
    for (; token + 2 <= job.tokens; token += 2) few_tokens<2, 1>(job, begin, end, token);
    if (token < job.tokens) few_tokens<1, 2>(job, begin, end, token);
  }
}

void finish(const float* sums, const float* bias, int64_t count, void* out) {
  for (int64_t i = 0; i < count; i += F32::lanes) {
    const int here = count - i < F32::lanes ? static_cast<int>(count - i) : F32::lanes;
    F32 value = load_first(sums + i, here);
    if (bias != nullptr) value = value + load_first(bias + i, here);
    store_first(static_cast<float*>(out) + i, value, here);
  }
}
