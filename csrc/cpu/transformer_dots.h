// The products of the three precisions on F32, for instruction sets without their own, and the int8 product of those
// with VNNI. Included by transformer_<isa>.cpp inside its namespace.
//
// A Dot multiplies one element group of a row (broadcast) with 16, 8 or 4 columns of a packed panel.

#pragma once

namespace {

typedef int16_t WordLanes __attribute__((vector_size(4 * kLanes)));

// To bfloat16; with dot products, as these read it: denormals become zero.
CSIKERNELS_INLINE void narrow(uint16_t* out, F32 a) {
#if defined(CSIKERNELS_BF16)
  const __m256bh lanes = _mm512_cvtneps_pbh(a.v);
  __builtin_memcpy(out, &lanes, sizeof(lanes));
#else
  store_bf16(out, a);
#endif
}

struct FloatDot {
  using Element = float;
  using Sum = float;
  static constexpr int group = 1;
  static constexpr int rows = F32::lanes == 16 ? 13 : 6;  // times two vectors: the accumulators that registers hold
  using Operand = F32;
  using Accumulator = F32;

  static CSIKERNELS_INLINE F32 zero() { return broadcast(0.0f); }
  static CSIKERNELS_INLINE F32 columns(const float* b) { return load(b); }
  static CSIKERNELS_INLINE F32 row(const float* a) { return broadcast(*a); }
  static CSIKERNELS_INLINE F32 add(F32 sum, F32 a, F32 b) { return fma(a, b, sum); }
  static CSIKERNELS_INLINE void put(float* out, F32 sum) { store(out, sum); }
};

CSIKERNELS_INLINE IntLanes load_bits(const void* p) {
  IntLanes bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}

CSIKERNELS_INLINE IntLanes broadcast_bits(const void* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return IntLanes{} + bits;
}

// Pairs of bfloat16: exact products, each added in float32.
struct WideBf16Dot {
  using Element = uint16_t;
  using Sum = float;
  static constexpr int group = 2;
  static constexpr int rows = F32::lanes == 16 ? 12 : 4;
  struct Operand {
    F32 first, second;
  };
  using Accumulator = F32;

  static CSIKERNELS_INLINE Operand split(IntLanes bits) {
    return {{(FloatLanes)(bits << 16)}, {(FloatLanes)(bits & static_cast<int32_t>(0xFFFF0000))}};
  }
  static CSIKERNELS_INLINE F32 zero() { return broadcast(0.0f); }
  static CSIKERNELS_INLINE Operand columns(const uint16_t* b) { return split(load_bits(b)); }
  static CSIKERNELS_INLINE Operand row(const uint16_t* a) { return split(broadcast_bits(a)); }
  static CSIKERNELS_INLINE F32 add(F32 sum, const Operand& a, const Operand& b) {
    return fma(a.second, b.second, fma(a.first, b.first, sum));
  }
  static CSIKERNELS_INLINE void put(float* out, F32 sum) { store(out, sum); }
};

// Quadruples of bytes, rows unsigned (the activation + 128), columns signed: exact in int32.
struct WideInt8Dot {
  using Element = uint8_t;
  using Sum = int32_t;
  static constexpr int group = 4;
  static constexpr int rows = F32::lanes == 16 ? 12 : 4;
  struct Operand {
    IntLanes even, odd;  // 16-bit integers
  };
  using Accumulator = IntLanes;

  static CSIKERNELS_INLINE IntLanes zero() { return IntLanes{}; }
  static CSIKERNELS_INLINE Operand columns(const uint8_t* b) {
    const WordLanes bytes = (WordLanes)load_bits(b);
    return {(IntLanes)((WordLanes)(bytes << 8) >> 8), (IntLanes)(bytes >> 8)};
  }
  static CSIKERNELS_INLINE Operand row(const uint8_t* a) {
    const IntLanes bytes = broadcast_bits(a);
    return {bytes & 0x00FF00FF, (bytes >> 8) & 0x00FF00FF};
  }
  static CSIKERNELS_INLINE IntLanes add(IntLanes sum, const Operand& a, const Operand& b) {
    return sum + lanes_multiply_add_16(a.even, b.even) + lanes_multiply_add_16(a.odd, b.odd);
  }
  static CSIKERNELS_INLINE void put(int32_t* out, IntLanes sum) { __builtin_memcpy(out, &sum, sizeof(sum)); }
};

#if defined(CSIKERNELS_VNNI) || defined(CSIKERNELS_BF16)
struct Int8Dot {
  using Element = uint8_t;
  using Sum = int32_t;
  static constexpr int group = 4;
  static constexpr int rows = 13;
  using Operand = __m512i;
  using Accumulator = __m512i;

  static CSIKERNELS_INLINE __m512i zero() { return _mm512_setzero_si512(); }
  static CSIKERNELS_INLINE __m512i columns(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static CSIKERNELS_INLINE __m512i row(const uint8_t* a) { return (__m512i)broadcast_bits(a); }
  static CSIKERNELS_INLINE __m512i add(__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static CSIKERNELS_INLINE void put(int32_t* out, __m512i sum) { _mm512_storeu_si512(out, sum); }
};
#endif

}  // namespace
