// The codebook kernels for AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes per lane, two
// instructions a cycle. 6 queries x 2 tiles keep 24 of 32 registers as accumulators.
#include "cpu/codebook_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_VNNI
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512_vnni {
#include "cpu/codebook_avx512.h"

namespace {

constexpr int kGroup = 6, kWideTiles = 2, kQueryLevel = 127;
CSIKERNELS_INLINE IntLanes dot4(IntLanes sum, Words w, Query q) {
  return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, w, q);
}

}  // namespace

#include "cpu/codebook_body.h"
}  // namespace csikernels::cpu::avx512_vnni
#endif
