// What the AVX-512 files of nf4_lora share: transposing 16 x 16 words, and the two layouts that need it.
#pragma once

namespace csikernels::cpu {
namespace {

// r[i] lane j <-> r[j] lane i
CSIKERNELS_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {  // 2 x 2 words
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 4 x 4: r[i + q] has column q of each 128-bit lane's four
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int q = 0; q < 4; ++q) {  // 4 x 4 of 128-bit lanes
    const __m512i a = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), b = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xDD);
    t[q] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + q] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + q] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[12 + q] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// [group of 16 rows][4-byte step][row]; step s goes to place(s).
template <class Place>
CSIKERNELS_INLINE void pack_narrow(const char* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps,
                                   char* out, Place place) {
  for (int64_t group = 0; group < rows; group += 16, out += 64 * steps) {
    const int64_t here = rows - group < 16 ? rows - group : 16;
    for (int64_t s = 0; s < steps; s += 16) {
      const int64_t left = bytes - 4 * s;
      const __mmask64 mask = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const char* from = x + (group + (i < here ? i : 0)) * row_bytes + 4 * s;
        r[i] = _mm512_maskz_loadu_epi8(i < here ? mask : 0, from);
      }
      transpose(r);
      const int64_t count = steps - s < 16 ? steps - s : 16;
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(out + place(s + i) * 64, r[i]);
    }
  }
}

// [group of 8 rows][8-byte step][row]; at most two groups ever come, so plain copies will do.
template <class Place>
CSIKERNELS_INLINE void pack_wide(const char* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps,
                                 char* out, Place place) {
  const int64_t whole = bytes / 8;
  for (int64_t group = 0; group < rows; group += 8, out += 32 * steps) {
    for (int64_t i = 0; i < 8; ++i) {
      const bool there = group + i < rows;
      const char* from = x + (group + (there ? i : 0)) * row_bytes;
      for (int64_t s = 0; s < steps / 2; ++s) {
        uint64_t step = 0;
        if (there && s < whole) {
          __builtin_memcpy(&step, from + 8 * s, 8);
        } else if (there && 8 * s < bytes) {
          __builtin_memcpy(&step, from + 8 * s, bytes - 8 * s);
        }
        __builtin_memcpy(out + 64 * (place(2 * s) / 2) + 8 * i, &step, 8);
      }
    }
  }
}

template <class Place>
CSIKERNELS_INLINE void pack_words(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps,
                                  bool wide, void* out, Place place) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  wide ? pack_wide(from, row_bytes, rows, bytes, steps, to, place)
       : pack_narrow(from, row_bytes, rows, bytes, steps, to, place);
}

// store(token, row, count, values): 16 rows of one token. Transposes c 16 rows x 16 lanes at a time.
template <class Store>
CSIKERNELS_INLINE void for_each_token(const float* c, int64_t c_row, int64_t rows, int64_t tokens, const float* bias,
                                      bool wide, Store store_token) {
  const int64_t per_vector = wide ? 8 : 16;
  for (int64_t token = 0; token < tokens; token += per_vector) {
    const int64_t here = tokens - token < per_vector ? tokens - token : per_vector;
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t count = rows - row < 16 ? rows - row : 16;
      const F32 offset = bias == nullptr ? broadcast(0.0f) : load_first(bias + row, static_cast<int>(count));
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const float* from = c + (row + (i < count ? i : 0)) * c_row + token * (wide ? 2 : 1);
        r[i] = _mm512_loadu_si512(from);
      }
      transpose(r);
      for (int64_t i = 0; i < here; ++i) {
        F32 sum = {(FloatLanes)(wide ? r[2 * i] : r[i])};
        if (wide) sum = sum + F32{(FloatLanes)r[2 * i + 1]};
        if (bias != nullptr) sum = sum + offset;
        store_token(token + i, row, count, sum);
      }
    }
  }
}

}  // namespace
}  // namespace csikernels::cpu
