// The codebook kernels for AVX-512 without VNNI: vpmaddubsw adds two products of unsigned and signed bytes into 16
// bits, which a query of 7 bits (255 * 64 * 2 < 2^15) never saturates; vpmaddwd widens the pairs.
#include "cpu/codebook_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512 {
namespace {

constexpr int kGroup = 6, kWideTiles = 2, kQueryLevel = 64;
using Words = __m512i;
using Query = __m512i;

CSIKERNELS_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
CSIKERNELS_INLINE Query load_query(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return sum + (IntLanes)_mm512_madd_epi16(_mm512_maddubs_epi16(w, q), _mm512_set1_epi16(1));
}
CSIKERNELS_INLINE unsigned at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
CSIKERNELS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::avx512
#endif
