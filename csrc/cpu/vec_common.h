// The vector interface that all instruction sets share, on the primitives that vec_{scalar,avx2,avx512}.h give: a
// kernel written on F32 compiles for each of them. Included by these headers only.
//
// Errors, measured over every exponent with 2^12 mantissas each (tests/test_vector_helpers.py holds them):
//   exp2, exp  1.0 ulp with fused multiply-add, 1.25 without; denormal results included
//   exp2_of_nonpositive  1.5 ulp; 1 for 0
//   log2       1.5 ulp with, 2.0 without; denormal arguments included; log2(0) = -inf, NaN below 0
//   erf        1.5 ulp with, 2.0 without
#pragma once

namespace csikernels::cpu {
namespace {

#define CSIKERNELS_INLINE inline __attribute__((always_inline))

typedef uint16_t ShortLanes __attribute__((vector_size(2 * kLanes)));

// One bit pattern of all ones or all zeros per lane.
struct Mask {
  IntLanes v;
};

struct F32 {
  static constexpr int lanes = kLanes;
  FloatLanes v;
};

CSIKERNELS_INLINE F32 broadcast(float a) { return {a - FloatLanes{}}; }  // a + 0 would be an addition: -0 + 0 is +0

CSIKERNELS_INLINE F32 load(const float* p) {
  F32 a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}

CSIKERNELS_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }

// The first n lanes, 0 <= n; the others are 0 and their memory is not touched.
CSIKERNELS_INLINE F32 load_first(const float* p, int n) { return {lanes_load_first(p, n)}; }
CSIKERNELS_INLINE void store_first(float* p, F32 a, int n) { lanes_store_first(p, a.v, n); }

CSIKERNELS_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
CSIKERNELS_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
CSIKERNELS_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
CSIKERNELS_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
CSIKERNELS_INLINE F32 operator-(F32 a) { return {-a.v}; }

CSIKERNELS_INLINE F32 fma(F32 a, F32 b, F32 c) { return {lanes_fma(a.v, b.v, c.v)}; }    // a * b + c
CSIKERNELS_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {lanes_fnma(a.v, b.v, c.v)}; }  // c - a * b
CSIKERNELS_INLINE F32 min(F32 a, F32 b) { return {lanes_min(a.v, b.v)}; }                // b where either is NaN
CSIKERNELS_INLINE F32 max(F32 a, F32 b) { return {lanes_max(a.v, b.v)}; }                // b where either is NaN
CSIKERNELS_INLINE F32 sqrt(F32 a) { return {lanes_sqrt(a.v)}; }
CSIKERNELS_INLINE F32 round(F32 a) { return {lanes_round(a.v)}; }  // halves to even; |a| < 2^22
CSIKERNELS_INLINE F32 abs(F32 a) { return {(FloatLanes)((IntLanes)a.v & 0x7FFFFFFF)}; }

CSIKERNELS_INLINE Mask less(F32 a, F32 b) { return {a.v < b.v}; }
CSIKERNELS_INLINE Mask equal(F32 a, F32 b) { return {a.v == b.v}; }
CSIKERNELS_INLINE Mask is_nan(F32 a) { return {a.v != a.v}; }
CSIKERNELS_INLINE F32 select(Mask mask, F32 a, F32 b) { return {mask.v ? a.v : b.v}; }

// Pairwise, so that the order of additions is the same for every caller.
CSIKERNELS_INLINE float reduce_add(F32 a) {
  float lane[kLanes];
  store(lane, a);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// The largest lane; NaNs are passed over unless all lanes are.
CSIKERNELS_INLINE float reduce_max(F32 a) {
  float lane[kLanes];
  store(lane, a);
  float largest = lane[0];
  for (int i = 1; i < kLanes; ++i) largest = lane[i] > largest || largest != largest ? lane[i] : largest;
  return largest;
}

// bfloat16 is the upper half of a float32.
CSIKERNELS_INLINE F32 load_bf16(const uint16_t* p) {
  ShortLanes bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return {(FloatLanes)(__builtin_convertvector(bits, IntLanes) << 16)};
}

// To the nearest bfloat16, halves to even; NaN stays NaN. In integers, since vcvtneps2bf16 would flush denormals.
CSIKERNELS_INLINE F32 round_bf16(F32 a) {
  const IntLanes bits = (IntLanes)a.v;
  const IntLanes rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const IntLanes chosen = a.v != a.v ? (bits | 0x400000) : rounded;
  return {(FloatLanes)(chosen & -0x10000)};
}

CSIKERNELS_INLINE void store_bf16(uint16_t* p, F32 a) {
  const ShortLanes narrow = __builtin_convertvector((IntLanes)round_bf16(a).v >> 16, ShortLanes);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

// 2^a: 2^n 2^t with n the nearest integer and |t| <= 1/2; 2^t by a minimax polynomial (relative error 2e-9).
CSIKERNELS_INLINE F32 exp2(F32 a) {
  const F32 x = max(broadcast(-151.0f), min(broadcast(129.0f), a));  // 2^129 overflows, 2^-151 rounds to 0
  const F32 n = round(x), t = x - n;
  F32 p = fma(broadcast(1.5353362e-4f), t, broadcast(1.3398875e-3f));
  p = fma(p, t, broadcast(9.618438e-3f));
  p = fma(p, t, broadcast(5.5503324e-2f));
  p = fma(p, t, broadcast(2.4022648e-1f));
  p = fma(p, t, broadcast(6.9314718e-1f));
  p = fma(p, t, broadcast(1.0f));
  return {lanes_scale(p.v, n.v)};
}

// 2^a for a <= 0. What cannot overflow needs no clamp where scaling underflows by itself: 2^floor(a) 2^t, 0 <= t <= 1,
// by a minimax polynomial (relative error 2e-9) that is right at both ends.
CSIKERNELS_INLINE F32 exp2_of_nonpositive(F32 a) {
#if defined(CSIKERNELS_FRACTION)
  const F32 t = {lanes_fraction(a.v)};
  F32 p = fma(broadcast(2.171780e-4f), t, broadcast(1.2440877e-3f));
  p = fma(p, t, broadcast(9.67806391e-3f));
  p = fma(p, t, broadcast(5.54841533e-2f));
  p = fma(p, t, broadcast(2.40229517e-1f));
  p = fma(p, t, broadcast(6.93147004e-1f));
  p = fma(p, t, broadcast(1.0f));
  return {lanes_scale(p.v, a.v)};
#else
  return exp2(a);
#endif
}

// e^a: as exp2, with a - n ln 2 in two steps (ln 2 = high + low, n * high exact).
CSIKERNELS_INLINE F32 exp(F32 a) {
  const F32 x = max(broadcast(-104.7f), min(broadcast(89.5f), a));
  const F32 n = round(x * broadcast(1.44269504f));
  const F32 t = fnma(n, broadcast(-2.12194440e-4f), fnma(n, broadcast(0.693359375f), x));
  F32 p = fma(broadcast(1.3814597e-3f), t, broadcast(8.3687167e-3f));
  p = fma(p, t, broadcast(4.1668389e-2f));
  p = fma(p, t, broadcast(1.6666521e-1f));
  p = fma(p, t, broadcast(0.49999994f));
  p = fma(p, t * t, t);
  return {lanes_scale((p + broadcast(1.0f)).v, n.v)};
}

// log2 a = e + log2 m with m in [sqrt(1/2), sqrt(2)); log2 m = 2/ln2 artanh(s), s = (m - 1) / (m + 1).
CSIKERNELS_INLINE F32 log2(F32 a) {
  const Mask tiny = less(a, broadcast(1.17549435e-38f));
  const F32 normal = select(tiny, a * broadcast(8388608.0f), a);  // denormals times 2^23
  const IntLanes above = (IntLanes)normal.v - 0x3F3504F3;         // bits of sqrt(1/2)
  const F32 m = {(FloatLanes)((above & 0x7FFFFF) + 0x3F3504F3)};
  const F32 e = F32{__builtin_convertvector(above >> 23, FloatLanes)} - select(tiny, broadcast(23.0f), broadcast(0.0f));
  const F32 f = m - broadcast(1.0f), s = f / (m + broadcast(1.0f)), z = s * s;
  F32 p = fma(broadcast(0.43095794f), z, broadcast(0.57675403f));
  p = fma(p, z, broadcast(0.96179825f));
  // 2 s = f - s f exactly enough: the leading term of log2 m keeps the bits of f, and 1/ln2 in two parts those of
  // 1/ln2.
  const F32 twice = fnma(s, f, f), high = broadcast(1.44269502f), low = broadcast(1.92596299e-8f);
  const F32 tail = fma(twice, low, p * z * s);
  F32 result = e + fma(twice, high, tail);
  result = select(equal(a, broadcast(0.0f)), broadcast(-__builtin_inff()), result);
  result = select(equal(a, broadcast(__builtin_inff())), a, result);
  return select(Mask{(a.v < 0.0f) | (a.v != a.v)}, broadcast(__builtin_nanf("")), result);
}

// erf a: a P(a^2) up to 1, above it 1 - 2^(-t Q(t)), which is 1 in float32 from 4 on.
CSIKERNELS_INLINE F32 erf(F32 a) {
  const F32 magnitude = abs(a), z = a * a;
  F32 p = fma(broadcast(7.8538607e-5f), z, broadcast(-8.0101932e-4f));
  p = fma(p, z, broadcast(5.1883277e-3f));
  p = fma(p, z, broadcast(-2.6853811e-2f));
  p = fma(p, z, broadcast(1.12835854e-1f));
  p = fma(p, z, broadcast(-3.7612626e-1f));
  p = fma(p, z, broadcast(0.128379167f));  // 2/sqrt(pi) - 1: the 1 is added last, which saves a bit
  const F32 t = min(broadcast(4.0f), magnitude);
  F32 q = fma(broadcast(5.2560417e-6f), t, broadcast(-4.2569773e-5f));
  q = fma(q, t, broadcast(-1.9212328e-4f));
  q = fma(q, t, broadcast(4.5679202e-3f));
  q = fma(q, t, broadcast(-3.3276454e-2f));
  q = fma(q, t, broadcast(1.5241149e-1f));
  q = fma(q, t, broadcast(9.1672248e-1f));
  q = fma(q, t, broadcast(1.6282207f));
  const F32 large = broadcast(1.0f) - exp2(-(t * q));
  const F32 signed_large = {(FloatLanes)((IntLanes)large.v | ((IntLanes)a.v & INT32_MIN))};
  return select(less(magnitude, broadcast(1.0f)), fma(a, p, a), select(is_nan(a), a, signed_large));
}

}  // namespace
}  // namespace csikernels::cpu
