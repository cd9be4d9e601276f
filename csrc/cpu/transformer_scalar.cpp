// The channel Transformer for processors without AVX2.
#include "cpu/transformer_kernel.h"

#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
namespace {

typedef int16_t WordLanes __attribute__((vector_size(4 * kLanes)));

// Products of 16-bit integers, neighbours added.
inline IntLanes multiply_add_16(IntLanes a, IntLanes b) {
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

inline void narrow(uint16_t* out, F32 a) { store_bf16(out, a); }

}  // namespace

#include "cpu/transformer_dots.h"

#include "cpu/transformer_body.h"

void transformer_float32(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                         char* workspace) {
  forward<FloatDot, FloatDot, false>(net, team, h, samples, y, workspace);
}

void transformer_bfloat16(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                          char* workspace) {
  forward<WideBf16Dot, WideBf16Dot, true>(net, team, h, samples, y, workspace);
}

void transformer_int8(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                      char* workspace) {
  forward<WideBf16Dot, WideInt8Dot, true>(net, team, h, samples, y, workspace);
}

}  // namespace csikernels::cpu::scalar
