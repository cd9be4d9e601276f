// The codebook kernels for any processor. Bytes are multiplied as 16-bit pairs, even and odd components apart; SSE2,
// which every x86-64 has, adds two such products per lane in one instruction.
#include "cpu/codebook_kernel.h"

#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
namespace {

constexpr int kGroup = 1, kWideTiles = 1, kQueryLevel = 127;

// Components 0 and 2 of a lane, then 1 and 3, as two 16-bit numbers each.
struct Words {
  IntLanes even, odd;
};
using Query = Words;

CSIKERNELS_INLINE Words load_words(const uint8_t* p) {
  IntLanes four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {four & 0x00FF00FF, (four >> 8) & 0x00FF00FF};
}

CSIKERNELS_INLINE Query load_query(const int8_t* p) {
  const auto pair = [](int low, int high) {
    return IntLanes{} +
           static_cast<int32_t>((static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xFFFF));
  };
  return {pair(p[0], p[2]), pair(p[1], p[3])};
}

CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return sum + lanes_multiply_add_16(w.even, q.even) + lanes_multiply_add_16(w.odd, q.odd);
}

CSIKERNELS_INLINE unsigned at_least(F32 a, F32 b) {
  const IntLanes mask = a.v >= b.v;
#if defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#else
  return (mask[0] & 1u) | (mask[1] & 2u) | (mask[2] & 4u) | (mask[3] & 8u);
#endif
}

CSIKERNELS_INLINE void prefetch(const void*) {}

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::scalar
