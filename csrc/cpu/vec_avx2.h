// Vectors of eight floats: AVX2 with FMA and F16C.
//
// Included once, first, by an instruction-set file, which then uses the common interface of vec_common.h. What the
// pragma covers must not be an inline function with external linkage: the linker would keep one copy of it for all.
#pragma once

#include <cstdint>

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace csikernels::cpu {
namespace {

constexpr int kLanes = 8;
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

inline FloatLanes lanes_fma(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm256_fmadd_ps(a, b, c); }
inline FloatLanes lanes_fnma(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm256_fnmadd_ps(a, b, c); }
inline FloatLanes lanes_min(FloatLanes a, FloatLanes b) { return _mm256_min_ps(a, b); }
inline FloatLanes lanes_max(FloatLanes a, FloatLanes b) { return _mm256_max_ps(a, b); }
inline FloatLanes lanes_sqrt(FloatLanes a) { return _mm256_sqrt_ps(a); }

inline FloatLanes lanes_round(FloatLanes a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// a * 2^n for integral n in -252..252, in two steps because 2^n alone need not be a float.
inline FloatLanes lanes_scale(FloatLanes a, FloatLanes n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  return a * first * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}

// Products of 16-bit integers, neighbours added.
inline IntLanes lanes_multiply_add_16(IntLanes a, IntLanes b) {
  return (IntLanes)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline FloatLanes lanes_load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void lanes_store_first(float* p, FloatLanes a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }

}  // namespace
}  // namespace csikernels::cpu

#include "cpu/vec_common.h"
