// Vectors for processors without AVX2: four floats, which every x86-64 (SSE2) and AArch64 (NEON) holds in a register.
//
// Included once, first, by an instruction-set file, which then uses the common interface of vec_common.h. Without a
// fused multiply-add, fma() rounds twice.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace csikernels::cpu {
namespace {

constexpr int kLanes = 4;
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

inline FloatLanes lanes_fma(FloatLanes a, FloatLanes b, FloatLanes c) { return a * b + c; }
inline FloatLanes lanes_fnma(FloatLanes a, FloatLanes b, FloatLanes c) { return c - a * b; }
inline FloatLanes lanes_min(FloatLanes a, FloatLanes b) { return a < b ? a : b; }
inline FloatLanes lanes_max(FloatLanes a, FloatLanes b) { return a > b ? a : b; }

inline FloatLanes lanes_sqrt(FloatLanes a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

// To the nearest integer, halves to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline FloatLanes lanes_round(FloatLanes a) {
  const FloatLanes magic = FloatLanes{} + 12582912.0f;
  return (a + magic) - magic;
}

// a * 2^n for integral n in -252..252, in two steps because 2^n alone need not be a float.
inline FloatLanes lanes_scale(FloatLanes a, FloatLanes n) {
  const IntLanes whole = __builtin_convertvector(n, IntLanes), half = whole >> 1, rest = whole - half;
  return a * (FloatLanes)((half + 127) << 23) * (FloatLanes)((rest + 127) << 23);
}

// Products of 16-bit integers, neighbours added.
inline IntLanes lanes_multiply_add_16(IntLanes a, IntLanes b) {
#if defined(__SSE2__)
  return (IntLanes)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

inline FloatLanes lanes_load_first(const float* p, int n) {
  FloatLanes a = {};
  for (int i = 0; i < kLanes && i < n; ++i) a[i] = p[i];
  return a;
}

inline void lanes_store_first(float* p, FloatLanes a, int n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = a[i];
}

}  // namespace
}  // namespace csikernels::cpu

#include "cpu/vec_common.h"
