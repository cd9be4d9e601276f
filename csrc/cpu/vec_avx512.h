// Vectors of sixteen floats: AVX-512 F, BW, DQ, VL; with CSIKERNELS_VNNI or CSIKERNELS_BF16 defined also the integer or
// bfloat16 dot products.
//
// Included once, first, by an instruction-set file, which then uses the common interface of vec_common.h. What the
// pragma covers must not be an inline function with external linkage: the linker would keep one copy of it for all.
#pragma once

#include <cstdint>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#if defined(CSIKERNELS_VNNI) || defined(CSIKERNELS_BF16)
#pragma GCC target("avx512vnni")
#endif
#if defined(CSIKERNELS_BF16)
#pragma GCC target("avx512bf16")
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // false alarms of gcc 12 on the "undefined" operands in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace csikernels::cpu {
namespace {

constexpr int kLanes = 16;
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

inline FloatLanes lanes_fma(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm512_fmadd_ps(a, b, c); }
inline FloatLanes lanes_fnma(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm512_fnmadd_ps(a, b, c); }
inline FloatLanes lanes_min(FloatLanes a, FloatLanes b) { return _mm512_min_ps(a, b); }
inline FloatLanes lanes_max(FloatLanes a, FloatLanes b) { return _mm512_max_ps(a, b); }
inline FloatLanes lanes_sqrt(FloatLanes a) { return _mm512_sqrt_ps(a); }

inline FloatLanes lanes_round(FloatLanes a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline FloatLanes lanes_scale(FloatLanes a, FloatLanes n) { return _mm512_scalef_ps(a, n); }  // 2^floor(n) a, any n

#define CSIKERNELS_FRACTION  // one instruction gives a - floor(a)
inline FloatLanes lanes_fraction(FloatLanes a) {
  return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// Products of 16-bit integers, neighbours added.
inline IntLanes lanes_multiply_add_16(IntLanes a, IntLanes b) {
  return (IntLanes)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

inline __mmask16 first_lanes(int n) { return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }
inline FloatLanes lanes_load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void lanes_store_first(float* p, FloatLanes a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

}  // namespace
}  // namespace csikernels::cpu

#include "cpu/vec_common.h"
