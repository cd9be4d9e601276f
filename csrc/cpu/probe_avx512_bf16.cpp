// Dot products of bfloat16 pairs and of int8 quadruples in registers. No processor has the first without the second.
#include "cpu/probe_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"

namespace csikernels::cpu {
namespace {

constexpr int kChains = 12;  // two units times a latency of four or five, and registers left for the operands

}  // namespace

int64_t avx512_bf16::spin_bfloat16(int64_t rounds) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_setzero_ps();
  const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(rounds | 1)), b = a;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  return _mm512_reduce_add_ps(sum[0]) == -1.0f ? 0 : rounds * kChains * 64;
}

int64_t avx512_vnni::spin_int8(int64_t rounds) {
  __m512i sum[kChains];
  for (auto& s : sum) s = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi32(static_cast<int>(rounds)), b = a;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) sum[0] = _mm512_add_epi32(sum[0], sum[c]);
  return _mm512_reduce_add_epi32(sum[0]) == -1 ? 0 : rounds * kChains * 128;
}

}  // namespace csikernels::cpu
#endif
