// The codebook kernels for AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes per lane, two
// instructions a cycle. 6 queries x 2 tiles keep 24 of 32 registers as accumulators.
#include "cpu/codebook_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_VNNI
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512_vnni {
namespace {

constexpr int kGroup = 6, kWideTiles = 2, kQueryLevel = 127;
using Words = __m512i;
using Query = __m512i;

CSIKERNELS_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
CSIKERNELS_INLINE Query load_query(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, w, q);
}
CSIKERNELS_INLINE unsigned at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
CSIKERNELS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::avx512_vnni
#endif
