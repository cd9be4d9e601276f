// nf4_lora on AVX-512: levels by vpermps, which looks at 4 bits of a lane, so that a code needs no masking.
#include "cpu/nf4_lora_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
// After the target pragma:
#include "cpu/nf4_lora_avx512.h"
#include "cpu/nf4_lora_levels.h"

namespace csikernels::cpu::avx512 {
namespace {

struct Decoder {
  __m512 levels;
  __m512i first, shift;

  Decoder() {
    levels = _mm512_load_ps(kLevels);
    alignas(64) uint8_t byte[64];
    for (int i = 0; i < 64; ++i) byte[i] = i % 4 == 0 ? static_cast<uint8_t>(i / 8) : 0x80;
    first = _mm512_load_si512(byte);
    shift = _mm512_set1_epi64(4);
  }

  // 16 bytes -> 2 x 16 levels: each byte to two lanes, the high nibble brought down in the first.
  CSIKERNELS_INLINE void operator()(const uint8_t* codes, F32 out[2]) const {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i bytes = _mm512_broadcast_i32x4(sixteen);
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi32(8));
    out[0] = {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, first), shift), levels)};
    out[1] = {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, second), shift), levels)};
  }
};

}  // namespace

#include "cpu/nf4_lora_body.h"

namespace {

struct WideOne : One {
  static CSIKERNELS_INLINE F32 broadcast(const float* p) {
    int64_t step;
    __builtin_memcpy(&step, p, sizeof(step));
    return {(FloatLanes)_mm512_set1_epi64(step)};
  }
};

}  // namespace

void multiply(const Product& p) { p.wide ? product<WideOne, 8>(p) : product<One, 8>(p); }

void pack(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps, bool wide, void* out) {
  pack_words(x, row_bytes, rows, bytes, steps, wide, out, [](int64_t step) { return step; });
}

void store_transposed(const float* c, int64_t c_row, int64_t rows, int64_t tokens, const float* bias, bool wide,
                      void* out, int64_t out_row) {
  for_each_token(c, c_row, rows, tokens, bias, wide, [&](int64_t token, int64_t row, int64_t count, F32 values) {
    store_first(static_cast<float*>(out) + token * out_row + row, values, static_cast<int>(count));
  });
}

}  // namespace csikernels::cpu::avx512
#endif
