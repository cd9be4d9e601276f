// The codebook kernels for AVX2: vpmaddubsw adds two products of unsigned and signed bytes into 16 bits, which a query
// of 7 bits (255 * 64 * 2 < 2^15) never saturates; vpmaddwd widens the pairs. 3 queries x 1 tile keep 12 of 16
// registers as accumulators.
#include "cpu/codebook_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"

namespace csikernels::cpu::avx2 {
namespace {

constexpr int kGroup = 3, kWideTiles = 1, kQueryLevel = 64;
using Words = __m256i;
using Query = __m256i;

CSIKERNELS_INLINE Words load_words(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p));
}
CSIKERNELS_INLINE Query load_query(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm256_set1_epi32(four);
}
CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return sum + (IntLanes)_mm256_madd_epi16(_mm256_maddubs_epi16(w, q), _mm256_set1_epi16(1));
}
CSIKERNELS_INLINE unsigned at_least(F32 a, F32 b) { return _mm256_movemask_ps((__m256)(a.v >= b.v)); }
CSIKERNELS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::avx2
#endif
