// nf4_lora for few bfloat16 tokens: every code is looked up once, where it lies, and multiplied with the tokens there.
//
// A group is 128 elements of a row: 16-bit lane j of its 64 bytes holds the codes of 4j .. 4j + 3, so four
// shifts and look-ups give four vectors, of which vector q holds the elements 4j + q; x is permuted to match. Both
// halves of a 32-bit lane then belong to 8 consecutive elements and so to one block, whose scale multiplies the group's
// sum.
#include "cpu/nf4_lora_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"
// After the target pragma:
#include "cpu/nf4_lora_levels.h"

namespace csikernels::cpu::avx512_bf16 {
namespace {

constexpr int64_t kGroup = 128;  // elements of one vector of codes

CSIKERNELS_INLINE F32 dot(__m512i a, __m512i b, F32 sum) {
  return {(FloatLanes)_mm512_dpbf16_ps((__m512)sum.v, (__m512bh)a, (__m512bh)b)};
}

// The table of one scale, rounded once; all 16 levels twice.
CSIKERNELS_INLINE __m512i scaled_levels(__m512 levels, float scale) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(levels * _mm512_set1_ps(scale));
  return _mm512_broadcast_i64x4(half);
}

// The scale of each 32-bit lane's 8 elements, for the group that begins at element e.
struct Scales {
  const float* absmax;
  int log_block;
  __m512i lane_element, lane_block;  // where a lane's elements are in a group, and in which of its blocks
  __mmask16 blocks;                  // those that a group at the start of a block has

  explicit Scales(const NF4Matrix& weight) : absmax(weight.absmax), log_block(weight.log_block) {
    lane_element = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    lane_block = _mm512_srl_epi32(lane_element, _mm_cvtsi32_si128(log_block));
    blocks = first_lanes(log_block >= 7 ? 1 : 128 >> log_block);
  }

  CSIKERNELS_INLINE F32 aligned(int64_t e) const {
    const __m512 some = _mm512_maskz_loadu_ps(blocks, absmax + (e >> log_block));
    return {_mm512_permutexvar_ps(lane_block, some)};
  }

  // Any e, of which the first `count` elements are wanted.
  CSIKERNELS_INLINE F32 anywhere(int64_t e, int64_t count) const {
    const int inside = static_cast<int>(e & ((1 << log_block) - 1));
    const int last = (inside + static_cast<int>(count) - 1) >> log_block;
    const __m512 some = _mm512_maskz_loadu_ps(first_lanes(last + 1), absmax + (e >> log_block));
    const __m512i position = _mm512_add_epi32(lane_element, _mm512_set1_epi32(inside));
    return {_mm512_permutexvar_ps(_mm512_srl_epi32(position, _mm_cvtsi32_si128(log_block)), some)};
  }
};

// B t of T tokens for R rows of B.
template <int T, int R>
CSIKERNELS_INLINE void adapter_rows(const FewTokens& job, int64_t n, int64_t token, F32 (&sum)[R][T]) {
  const uint16_t* b = static_cast<const uint16_t*>(job.lora_b) + n * job.rank;
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) sum[r][t] = broadcast(0.0f);
  }
  for (int64_t j = 0; j < job.rank; j += 16) {
    const __mmask16 mask = first_lanes(static_cast<int>(job.rank - j < 16 ? job.rank - j : 16));
    for (int r = 0; r < R; ++r) {
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + r * job.rank + j));
      const F32 bs = {(FloatLanes)_mm512_slli_epi32(bits, 16)};
      for (int t = 0; t < T; ++t) {
        const F32 ts = {_mm512_maskz_loadu_ps(mask, job.t + (token + t) * job.rank + j)};
        sum[r][t] = fma(bs, ts, sum[r][t]);
      }
    }
  }
}

// The levels of a group: vector q has those of the elements 4j + q.
CSIKERNELS_INLINE void group_levels(__m512i words, __m512i table, __m512i (&level)[4]) {
  level[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
  level[1] = _mm512_permutexvar_epi16(words, table);
  level[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
  level[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
}

// One token, rows n .. n + R in blocks of 64, k a multiple of the group. Instructions count here as much as ports: the
// rows are addressed by one pointer and multiples of their stride, and two scales come by loads alone.
template <int R>
CSIKERNELS_INLINE void regular_rows(const FewTokens& job, int64_t n, const uint16_t* x, __m512i table,
                                    F32 (&sum)[R][1]) {
  const int64_t k = job.weight.k;
  const uint8_t* codes = job.weight.packed + n * k / 2;
  const float* absmax = job.weight.absmax + n * k / 64;
  int64_t code_row[2 * R], scale_row[R];
  for (int r = 0; r < 2 * R; ++r) code_row[r] = r * k / 2;
  for (int r = 0; r < R; ++r) scale_row[r] = r * k / 64;
  for (int64_t left = k; left > 0; left -= kGroup) {
    __m512i level[R][4];
    F32 scale[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + code_row[R + r]), _MM_HINT_T0);
      const float* two = absmax + scale_row[r];
      scale[r] = {_mm512_mask_mov_ps(_mm512_set1_ps(two[0]), 0xFF00, _mm512_set1_ps(two[1]))};
      group_levels(_mm512_loadu_si512(codes + code_row[r]), table, level[r]);
    }
    F32 group[R];
    for (int r = 0; r < R; ++r) group[r] = broadcast(0.0f);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i xs = _mm512_loadu_si512(x + 32 * q);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) group[r] = dot(level[r][q], xs, group[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][0] = fma(group[r], scale[r], sum[r][0]);
    codes += kGroup / 2, absmax += kGroup / 64, x += kGroup;
    asm("" : "+r"(codes), "+r"(absmax));  // one pointer each, not one for every row
  }
}

// Any rows; Aligned when k is a multiple of the group.
template <int T, int R, bool Aligned>
CSIKERNELS_INLINE void any_rows(const FewTokens& job, int64_t n, const uint16_t* x, const Scales& scales, __m512i table,
                                F32 (&sum)[R][T]) {
  const int64_t k = job.weight.k, x_row = permuted_k(k);
  const uint8_t* codes = job.weight.packed + n * k / 2;
  for (int64_t i = 0; i < k; i += kGroup) {
    const int64_t count = Aligned || k - i >= kGroup ? kGroup : k - i;
    __m512i level[R][4];
    F32 scale[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* here = codes + (r * k + i) / 2;
      _mm_prefetch(reinterpret_cast<const char*>(here + R * k / 2), _MM_HINT_T0);
      const __mmask64 mask = count == kGroup ? ~0ull : (1ull << count / 2) - 1;
      const int64_t e = (n + r) * k + i;
      scale[r] = Aligned ? scales.aligned(e) : scales.anywhere(e, count);
      group_levels(Aligned ? _mm512_loadu_si512(here) : _mm512_maskz_loadu_epi8(mask, here), table, level[r]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      F32 group[R];
      for (int r = 0; r < R; ++r) group[r] = broadcast(0.0f);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512i xs = _mm512_loadu_si512(x + t * x_row + i + 32 * q);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) group[r] = dot(level[r][q], xs, group[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][t] = fma(group[r], scale[r], sum[r][t]);
    }
  }
}

// T tokens, rows n .. n + R of W.
template <int T, int R, bool Aligned>
CSIKERNELS_INLINE void few_rows(const FewTokens& job, int64_t n, int64_t token, const Scales& scales, __m512i table) {
  const uint16_t* x = static_cast<const uint16_t*>(job.x) + token * permuted_k(job.weight.k);
  F32 sum[R][T];
  adapter_rows<T, R>(job, n, token, sum);
  bool regular = false;
  if constexpr (T == 1 && Aligned) {
    regular = job.weight.log_block == 6;
    if (regular) regular_rows<R>(job, n, x, table, sum);
  }
  if (!regular) any_rows<T, R, Aligned>(job, n, x, scales, table, sum);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) job.y[(token + t) * job.weight.n + n + r] = _mm512_reduce_add_ps(sum[r][t].v);
  }
}

template <int T, int R, bool Aligned>
__attribute__((noinline)) void few_tokens(const FewTokens& job, int64_t begin, int64_t end, int64_t token) {
  const Scales scales(job.weight);
  const __m512i table = scaled_levels(_mm512_load_ps(kLevels), 1.0f);
  int64_t n = begin;
  for (; n + R <= end; n += R) few_rows<T, R, Aligned>(job, n, token, scales, table);
  for (; n < end; ++n) few_rows<T, 1, Aligned>(job, n, token, scales, table);
}

template <bool Aligned>
void few(const FewTokens& job) {
  constexpr int64_t rows = 64;  // their codes stay in the cache from one set of tokens to the next
  for (int64_t begin = job.begin; begin < job.end; begin += rows) {
    const int64_t end = begin + rows < job.end ? begin + rows : job.end;
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) few_tokens<4, 2, Aligned>(job, begin, end, token);
    if (job.tokens - token == 3) few_tokens<3, 2, Aligned>(job, begin, end, token);
    if (job.tokens - token == 2) few_tokens<2, 2, Aligned>(job, begin, end, token);
    if (job.tokens - token == 1) few_tokens<1, 4, Aligned>(job, begin, end, token);
  }
}

// t of T tokens and R rows of A.
template <int T, int R>
CSIKERNELS_INLINE void inner_tile(const uint16_t* x, int64_t k, const uint16_t* a, float scaling, float* t,
                                  int64_t rank) {
  F32 sum[R][T];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < T; ++i) sum[r][i] = broadcast(0.0f);
  }
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask = k - i >= 32 ? ~0u : (1u << (k - i)) - 1;
    __m512i xs[T];
    for (int j = 0; j < T; ++j) xs[j] = _mm512_maskz_loadu_epi16(mask, x + j * k + i);
    for (int r = 0; r < R; ++r) {
      const __m512i as = _mm512_maskz_loadu_epi16(mask, a + r * k + i);
      for (int j = 0; j < T; ++j) sum[r][j] = dot(as, xs[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < T; ++j) t[j * rank + r] = scaling * _mm512_reduce_add_ps(sum[r][j].v);
  }
}

template <int T>
void inner_tokens(const uint16_t* x, int64_t k, const uint16_t* a, int64_t rank, float scaling, float* t) {
  int64_t r = 0;
  for (; r + 8 <= rank; r += 8) inner_tile<T, 8>(x, k, a + r * k, scaling, t + r, rank);
  for (; r < rank; ++r) inner_tile<T, 1>(x, k, a + r * k, scaling, t + r, rank);
}

}  // namespace

void inner(const void* x, int64_t tokens, int64_t k, const void* lora_a, int64_t rank, float scaling, float* t) {
  const auto* from = static_cast<const uint16_t*>(x);
  const auto* a = static_cast<const uint16_t*>(lora_a);
  int64_t token = 0;
  for (; token + 2 <= tokens; token += 2) inner_tokens<2>(from + token * k, k, a, rank, scaling, t + token * rank);
  if (token < tokens) inner_tokens<1>(from + token * k, k, a, rank, scaling, t + token * rank);
}

void multiply_few(const FewTokens& job) { job.weight.k % kGroup == 0 ? few<true>(job) : few<false>(job); }

// Four vectors of 32 elements each -> vector q has the elements 4j + q.
void permute(const void* x, int64_t tokens, int64_t k, void* out) {
  alignas(64) uint16_t at[4][32];
  for (int q = 0; q < 4; ++q) {
    for (int j = 0; j < 32; ++j) at[q][j] = static_cast<uint16_t>((4 * j + q) % 64);
  }
  auto* to = static_cast<uint16_t*>(out);
  for (int64_t token = 0; token < tokens; ++token) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + token * k;
    for (int64_t i = 0; i < k; i += kGroup, to += kGroup) {
      __m512i v[4];
      for (int q = 0; q < 4; ++q) {
        const int64_t left = k - i - 32 * q;
        v[q] = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1, from + i + 32 * q);
      }
      for (int q = 0; q < 4; ++q) {
        const __m512i where = _mm512_load_si512(at[q]);
        const __m512i low = _mm512_permutex2var_epi16(v[0], where, v[1]);  // its lower half counts
        const __m512i high = _mm512_permutex2var_epi16(v[2], where, v[3]);
        _mm512_storeu_si512(to + 32 * q, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
      }
    }
  }
}

}  // namespace csikernels::cpu::avx512_bf16
#endif
