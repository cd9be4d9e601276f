// What the codebook kernels for AVX-512 share, with VNNI and without; included inside their namespace.
#pragma once

namespace {

using Words = __m512i;
using Query = __m512i;

CSIKERNELS_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
CSIKERNELS_INLINE Query load_query(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
CSIKERNELS_INLINE unsigned at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
CSIKERNELS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
