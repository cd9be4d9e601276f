// nf4_lora on AVX2: a level is looked up in two halves of the table, and the code's top bit chooses.
#include "cpu/nf4_lora_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
// After the target pragma:
#include "cpu/nf4_lora_levels.h"

namespace csikernels::cpu::avx2 {
namespace {

struct Decoder {
  __m256 low, high;

  // Written out: a constructor that the compiler writes does not have the pragma's target.
  Decoder() {
    low = _mm256_load_ps(kLevels);
    high = _mm256_load_ps(kLevels + 8);
  }

  // 4 bytes -> 8 levels: each byte to two lanes, the high nibble brought down in the first.
  CSIKERNELS_INLINE F32 eight(const uint8_t* codes) const {
    const __m256i spread = _mm256_setr_epi8(0, -1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1,  //
                                            2, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1);
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof(four));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(four), spread);
    const __m256i code = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0));
    const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), top)};
  }

  CSIKERNELS_INLINE void operator()(const uint8_t* codes, F32 out[4]) const {
    for (int v = 0; v < 4; ++v) out[v] = eight(codes + 4 * v);
  }
};

}  // namespace

#include "cpu/nf4_lora_body.h"
#include "cpu/nf4_lora_plain.h"

}  // namespace csikernels::cpu::avx2
#endif
