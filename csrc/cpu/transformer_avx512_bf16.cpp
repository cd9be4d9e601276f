// The bfloat16 and int8 channel Transformers with the dot products of both.
#include "cpu/transformer_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512_bf16 {
#include "cpu/transformer_dots.h"

namespace {

struct Bf16Dot {
  using Element = uint16_t;
  using Sum = float;
  static constexpr int group = 2;
  static constexpr int rows = 13;
  using Operand = __m512bh;
  using Accumulator = __m512;

  static CSIKERNELS_INLINE __m512 zero() { return _mm512_setzero_ps(); }
  static CSIKERNELS_INLINE __m512bh columns(const uint16_t* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static CSIKERNELS_INLINE __m512bh row(const uint16_t* a) { return (__m512bh)broadcast_bits(a); }
  static CSIKERNELS_INLINE __m512 add(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
  static CSIKERNELS_INLINE void put(float* out, __m512 sum) { _mm512_storeu_ps(out, sum); }
};

}  // namespace

#include "cpu/transformer_body.h"

void transformer_bfloat16(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                          char* workspace) {
  forward<Bf16Dot, Bf16Dot, true>(net, team, h, samples, y, workspace);
}

void transformer_int8(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                      char* workspace) {
  forward<Bf16Dot, Int8Dot, true>(net, team, h, samples, y, workspace);
}

}  // namespace csikernels::cpu::avx512_bf16
#endif
