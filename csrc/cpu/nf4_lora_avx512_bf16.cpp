// nf4_lora with bfloat16 elements: levels by vpermw, products by vdpbf16ps.
//
// vpermw looks at 5 bits of a 16-bit lane: with the 16 levels twice in its table a code needs no masking, and with the
// levels of two blocks in it the fifth bit says which. On Zen 5 look-ups and shifts run two a cycle, unpacking and
// logic four.
#include "cpu/nf4_lora_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"
// After the target pragma:
#include "cpu/nf4_lora_avx512.h"
#include "cpu/nf4_lora_levels.h"

namespace csikernels::cpu::avx512_bf16 {

#include "cpu/nf4_lora_product.h"

namespace {

struct Pair {  // two bfloat16
  using Vector = __m512i;
  static CSIKERNELS_INLINE Vector load(const float* p) { return _mm512_loadu_si512(p); }
  static CSIKERNELS_INLINE Vector broadcast(const float* p) {
    int32_t step;
    __builtin_memcpy(&step, p, sizeof(step));
    return _mm512_set1_epi32(step);
  }
  static CSIKERNELS_INLINE F32 multiply_add(Vector w, Vector x, F32 sum) {
    return {(FloatLanes)_mm512_dpbf16_ps((__m512)sum.v, (__m512bh)w, (__m512bh)x)};
  }
};

struct WidePair : Pair {  // four bfloat16
  static CSIKERNELS_INLINE Vector broadcast(const float* p) {
    int64_t step;
    __builtin_memcpy(&step, p, sizeof(step));
    return _mm512_set1_epi64(step);
  }
};

CSIKERNELS_INLINE __m512i load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }

constexpr int64_t kGroup = 128;  // elements of one vector of codes

// The order of a panel's group of 128 elements: vector j has, in its 128-bit lane l, elements 32 l + 8 j .. + 7, which
// is where unpacking leaves them. Pairs stay together, so only the order of the steps changes, and `pack` follows it.
constexpr int64_t panel_step(int64_t step) {
  return (step & ~int64_t(63)) | (step >> 2 & 3) << 4 | (step >> 4 & 3) << 2 | (step & 3);
}

struct PanelConstants {
  __m512 levels = _mm512_load_ps(kLevels);
  __m512i shift = _mm512_set1_epi32(4), nibble = _mm512_set1_epi16(15);
  __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  // Opaque, or the compiler makes them again for every group.
  PanelConstants() { asm("" : "+v"(levels), "+v"(shift), "+v"(nibble), "+v"(second)); }
};

// A group whose first half has one scale and whose second half has one: 6 unpackings give every byte two 16-bit lanes,
// `shift` brings the high nibble down in the first of them, and `second` names the table of 128-bit lanes 2 and 3.
CSIKERNELS_INLINE void panel_group(const uint8_t* packed, float scale_low, float scale_high, const PanelConstants& c,
                                   uint16_t* out) {
  const __m512i codes = load_codes(packed);
  const __m512i table =
      (__m512i)_mm512_cvtne2ps_pbh(c.levels * _mm512_set1_ps(scale_high), c.levels * _mm512_set1_ps(scale_low));
  const __m512i low = _mm512_unpacklo_epi8(codes, codes), high = _mm512_unpackhi_epi8(codes, codes);
  const __m512i bytes[4] = {_mm512_unpacklo_epi16(low, low), _mm512_unpackhi_epi16(low, low),
                            _mm512_unpacklo_epi16(high, high), _mm512_unpackhi_epi16(high, high)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i code = _mm512_ternarylogic_epi32(_mm512_srlv_epi16(bytes[j], c.shift), c.nibble, c.second, 0xEA);
    _mm512_storeu_si512(out + 32 * j, _mm512_permutexvar_epi16(code, table));
  }
}

// `groups` groups from element e, which starts a block of 64 (two scales a group) or lies at a multiple of 128 in a
// larger one (one scale). The same columns of a row to come are fetched ahead: rows lie too far apart for the processor
// to foresee them.
CSIKERNELS_INLINE void panel_row(const NF4Matrix& weight, int64_t e, int64_t groups, const PanelConstants& constants,
                                 uint16_t* out) {
  const uint8_t* codes = weight.packed + e / 2;
  const uint8_t* ahead = codes + 4 * weight.k;
  if (weight.log_block == 6) {
    const float* scale = weight.absmax + e / 64;
    for (int64_t g = 0; g < groups; ++g) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * g), _MM_HINT_T0);
      panel_group(codes + 64 * g, scale[2 * g], scale[2 * g + 1], constants, out + kGroup * g);
    }
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = weight.absmax[(e + kGroup * g) >> weight.log_block];
    _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * g), _MM_HINT_T0);
    panel_group(codes + 64 * g, scale, scale, constants, out + kGroup * g);
  }
}

// 32 rows of up to 16 tokens, a cache line a token. Neighbouring rows become one word before they are transposed.
CSIKERNELS_INLINE void store_lines(const float* c, int64_t c_row, int64_t tokens, const float* bias, uint16_t* out,
                                   int64_t out_row) {
  __m512i r[16];
  for (int64_t i = 0; i < 16; ++i) {
    F32 even = load(c + 2 * i * c_row), odd = load(c + (2 * i + 1) * c_row);
    if (bias != nullptr) even = even + broadcast(bias[2 * i]), odd = odd + broadcast(bias[2 * i + 1]);
    r[i] = _mm512_or_si512(_mm512_srli_epi32((__m512i)round_bf16(even).v, 16), (__m512i)round_bf16(odd).v);
  }
  transpose(r);
  for (int64_t i = 0; i < 16 && i < tokens; ++i) _mm512_storeu_si512(out + i * out_row, r[i]);
}

// Any other group, `count` elements of which are there; the rest becomes 0.
__attribute__((noinline)) void panel_rest(const NF4Matrix& weight, int64_t first, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < kGroup; ++i) {
    float value = 0;
    if (i < count) {
      const int64_t e = first + i;
      const int byte = weight.packed[e / 2];
      value = kLevels[e % 2 == 0 ? byte >> 4 : byte & 15] * weight.absmax[e >> weight.log_block];
    }
    uint32_t bits;  // to the nearest bfloat16; no value is infinite or NaN
    __builtin_memcpy(&bits, &value, sizeof(bits));
    out[2 * panel_step(i / 2) + i % 2] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

}  // namespace

void panel(const NF4Matrix& weight, int64_t n0, int64_t rows, int64_t k0, int64_t columns, void* out,
           int64_t row_units) {
  const PanelConstants constants;
  const int log_block = weight.log_block;
  const bool regular = log_block >= 7 ? weight.k % kGroup == 0 : log_block == 6 && weight.k % 64 == 0;
  const int64_t groups = regular ? columns / kGroup : 0;
  for (int64_t r = 0; r < rows; ++r) {
    auto* to = static_cast<uint16_t*>(out) + 2 * r * row_units;
    const int64_t first = (n0 + r) * weight.k + k0;
    panel_row(weight, first, groups, constants, to);
    for (int64_t i = groups * kGroup; i < columns; i += kGroup) {
      panel_rest(weight, first + i, columns - i < kGroup ? columns - i : kGroup, to + i);
    }
  }
}

void multiply(const Product& p) { p.wide ? product<WidePair, 8>(p) : product<Pair, 8>(p); }

void pack(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps, bool wide, void* out) {
  pack_words(x, row_bytes, rows, bytes, steps, wide, out, [](int64_t step) { return step; });
}

void pack_for_panel(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps, bool wide,
                    void* out) {
  pack_words(x, row_bytes, rows, bytes, steps, wide, out, panel_step);
}

void store_transposed(const float* c, int64_t c_row, int64_t rows, int64_t tokens, const float* bias, bool wide,
                      void* out, int64_t out_row) {
  auto* to = static_cast<uint16_t*>(out);
  const int64_t whole = wide ? 0 : rows / 32 * 32;
  for (int64_t row = 0; row < whole; row += 32) {
    for (int64_t token = 0; token < tokens; token += 16) {
      store_lines(c + row * c_row + token, c_row, tokens - token, bias == nullptr ? nullptr : bias + row,
                  to + token * out_row + row, out_row);
    }
  }
  for_each_token(c + whole * c_row, c_row, rows - whole, tokens, bias == nullptr ? nullptr : bias + whole, wide,
                 [&](int64_t token, int64_t row, int64_t count, F32 values) {
                   uint16_t half[16];
                   store_bf16(half, values);
                   __builtin_memcpy(to + token * out_row + whole + row, half, 2 * count);
                 });
}

void finish(const float* sums, const float* bias, int64_t count, void* out) {
  for (int64_t i = 0; i < count; i += F32::lanes) {
    const int here = count - i < F32::lanes ? static_cast<int>(count - i) : F32::lanes;
    F32 value = load_first(sums + i, here);
    if (bias != nullptr) value = value + load_first(bias + i, here);
    uint16_t half[16];
    store_bf16(half, value);
    __builtin_memcpy(static_cast<uint16_t*>(out) + i, half, 2 * here);
  }
}

}  // namespace csikernels::cpu::avx512_bf16
#endif
