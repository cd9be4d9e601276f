// The codebook kernels for AVX-512 without VNNI: vpmaddubsw adds two products of unsigned and signed bytes into 16
// bits, which a query of 7 bits (255 * 64 * 2 < 2^15) never saturates; vpmaddwd widens the pairs.
#include "cpu/codebook_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512 {
#include "cpu/codebook_avx512.h"

namespace {

constexpr int kGroup = 6, kWideTiles = 2, kQueryLevel = 64;
CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return sum + (IntLanes)_mm512_madd_epi16(_mm512_maddubs_epi16(w, q), _mm512_set1_epi16(1));
}

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::avx512
#endif
