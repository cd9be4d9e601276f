// nf4_lora for 9 to 16 bfloat16 tokens: rows of W along the lanes.
//
// A dword of codes holds 8 of one row. Shifted by 0, 4, 8 and 12 in its 16-bit halves it names 4 pairs of levels, two
// elements 4 apart, for vdpbf16ps with the same pair of a token, broadcast: decoding is one shift and one look-up for
// the products of 8 tokens, runs on ports that the products leave free, and needs no table per block, because a
// block's scale multiplies its sum (one operation in 33). What is left is to bring the dwords of 16 rows side by side.
#include "cpu/nf4_lora_kernel.h"

#if defined(__x86_64__)
#define CSIKERNELS_BF16
#include "cpu/vec_avx512.h"
// After the target pragma:
#include "cpu/nf4_lora_avx512.h"
#include "cpu/nf4_lora_levels.h"

namespace csikernels::cpu::avx512_bf16 {
namespace {

constexpr int kVectors = 3;            // of 16 rows
constexpr int kEight = kTokensAtOnce;  // tokens that are multiplied at a time: 3 x 8 sums
constexpr int kChunk = 128;            // elements of 64 bytes of codes
constexpr int kBlock = 64;             // elements under one scale
constexpr int64_t kAhead = 512;        // elements
constexpr int kSpan = 16 * kBlock;     // elements whose scales are brought side by side at once

struct Tile {
  alignas(64) float total[kTokensByRows / kEight][kVectors][kEight][16];
  alignas(64) uint32_t words[2][kVectors][16][16];  // [dword][row], of this chunk and the next
  alignas(64) float scales[2][kVectors][16][16];    // [block][row], of this span and the next
};

// 16 dwords of each of `here` rows, `row_bytes` apart, to words[dword][row]; `mask` says which bytes are there.
CSIKERNELS_INLINE void load_words(const uint8_t* from, int64_t row_bytes, int64_t here, __mmask64 mask,
                                  uint32_t (&words)[16][16]) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi8(mask, from + (i < here ? i : 0) * row_bytes);
  transpose(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(words[i], r[i]);
}

// The scales of elements e, e + 64, ... of `here` rows, `blocks` of them.
CSIKERNELS_INLINE void load_scales(const NF4Matrix& weight, int64_t e, int64_t here, int64_t blocks,
                                   float (&scales)[16][16]) {
  const __m512i block = _mm512_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960);
  const __m128i shift = _mm_cvtsi32_si128(weight.log_block);
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t first = e + (i < here ? i : 0) * weight.k;
    const int64_t inside = first & ((int64_t(1) << weight.log_block) - 1);
    const int64_t count = ((inside + kBlock * (blocks - 1)) >> weight.log_block) + 1;
    const __m512 some =
        _mm512_maskz_loadu_ps(first_lanes(static_cast<int>(count)), weight.absmax + (first >> weight.log_block));
    const __m512i which = _mm512_srl_epi32(_mm512_add_epi32(block, _mm512_set1_epi32(static_cast<int>(inside))), shift);
    r[i] = (__m512i)_mm512_permutexvar_ps(which, some);
  }
  transpose(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(scales[i], r[i]);
}

CSIKERNELS_INLINE __m512 dot(__m512i w, __m512i x, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

CSIKERNELS_INLINE __m512i broadcast_pair(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }

// sum[v][t] += words of a block with 8 tokens.
template <int V>
CSIKERNELS_INLINE void multiply_block(const uint32_t* words, const uint32_t* x, __m512i table, const uint8_t* ahead,
                                      int64_t row_bytes, __m512 (&sum)[V][kEight]) {
  for (int d = 0; d < kBlock / 8; ++d, words += 16, x += 4 * kEight) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + row_bytes), _MM_HINT_T1);
    ahead += 2 * row_bytes;
    __m512i codes[V];
    for (int v = 0; v < V; ++v) codes[v] = _mm512_load_si512(words + v * 256);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m512i level[V];
      for (int v = 0; v < V; ++v) {
        level[v] = _mm512_permutexvar_epi16(q == 0 ? codes[v] : _mm512_srli_epi16(codes[v], 4 * q), table);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kEight; ++t) {
        const __m512i pair = broadcast_pair(x + q * kEight + t);
        for (int v = 0; v < V; ++v) sum[v][t] = dot(level[v], pair, sum[v][t]);
      }
    }
  }
}

// Rows n .. n + 16 V as far as they are below `end`, in vectors of `here` rows from `first`.
template <int V>
struct TileRows {
  int64_t n, end, first[V], here[V];

  TileRows(int64_t n, int64_t end) : n(n), end(end) {
    for (int v = 0; v < V; ++v) {
      first[v] = n + 16 * v < end ? n + 16 * v : end - 1;
      here[v] = end - first[v] < 16 ? end - first[v] : 16;
    }
  }
};

// total = B t
template <int V>
CSIKERNELS_INLINE void start_tile(const RowLanes& job, const TileRows<V>& rows, int64_t eights, Tile& tile) {
  for (int64_t eight = 0; eight < eights; ++eight) {
    for (int v = 0; v < V; ++v) {
      for (int t = 0; t < kEight; ++t) _mm512_store_ps(tile.total[eight][v][t], _mm512_setzero_ps());
    }
  }
  const int64_t pairs = job.rank / 2, rank_bytes = 2 * job.rank;
  for (int64_t pair = 0; pair < pairs; pair += 16) {
    const int64_t left = rank_bytes - 4 * pair;
    for (int v = 0; v < V; ++v) {
      load_words(static_cast<const uint8_t*>(job.lora_b) + rows.first[v] * rank_bytes + 4 * pair, rank_bytes,
                 rows.here[v], left >= 64 ? ~0ull : (1ull << left) - 1, tile.words[0][v]);
    }
    for (int64_t eight = 0; eight < eights; ++eight) {
      const uint32_t* t_pairs = job.t + (eight * pairs + pair) * kEight;
      for (int64_t i = 0; i < (pairs - pair < 16 ? pairs - pair : 16); ++i) {
        for (int v = 0; v < V; ++v) {
          const __m512i b = _mm512_load_si512(tile.words[0][v][i]);
          for (int t = 0; t < kEight; ++t) {
            float* total = tile.total[eight][v][t];
            _mm512_store_ps(total, dot(b, broadcast_pair(t_pairs + i * kEight + t), _mm512_load_ps(total)));
          }
        }
      }
    }
  }
}

// y = total + bias
template <int V>
CSIKERNELS_INLINE void store_tile(const RowLanes& job, const TileRows<V>& rows, const Tile& tile) {
  for (int64_t token = 0; token < job.tokens; ++token) {
    for (int v = 0; v < V && rows.n + 16 * v < rows.end; ++v) {
      F32 value = load(tile.total[token / kEight][v][token % kEight]);
      if (job.bias != nullptr) value = value + load_first(job.bias + rows.n + 16 * v, static_cast<int>(rows.here[v]));
      uint16_t half[16];
      store_bf16(half, value);
      __builtin_memcpy(static_cast<uint16_t*>(job.y) + token * job.weight.n + rows.n + 16 * v, half, 2 * rows.here[v]);
    }
  }
}

template <int V>
__attribute__((noinline)) void multiply_tile(const RowLanes& job, int64_t n, int64_t end, __m512i table, Tile& tile) {
  const int64_t k = job.weight.k, eights = (job.tokens + kEight - 1) / kEight, x_eight = k / 2 * kEight;
  const TileRows<V> rows(n, end);
  start_tile(job, rows, eights, tile);
  // Words of the chunk at i, and scales of the span at i.
  const auto fetch_words = [&](int64_t i, int v) {
    load_words(job.weight.packed + (rows.first[v] * k + i) / 2, k / 2, rows.here[v],
               k - i >= kChunk ? ~0ull : ~0ull >> 32, tile.words[i / kChunk % 2][v]);
  };
  const auto fetch_scales = [&](int64_t i, int v) {
    load_scales(job.weight, rows.first[v] * k + i, rows.here[v], (k - i < kSpan ? k - i : kSpan) / kBlock,
                tile.scales[i / kSpan % 2][v]);
  };
  for (int v = 0; v < V; ++v) {
    fetch_words(0, v);
    fetch_scales(0, v);
  }
  for (int64_t i = 0; i < k; i += kChunk) {
    const uint8_t* ahead =
        job.weight.packed + (rows.n * k + i + (i + kAhead < k ? kAhead : 16 * V * k + kAhead - k)) / 2;
    const int64_t next = i + kChunk, next_span = i / kSpan * kSpan + kSpan;
    int fetched = next < k ? 0 : V;
    for (int64_t block = 0; block < (k - i >= kChunk ? 2 : 1); ++block) {
      const uint32_t* words = tile.words[i / kChunk % 2][0][8 * block];
      const uint32_t* x = job.x + (i + kBlock * block) / 2 * kEight;
      const int64_t at = i % kSpan / kBlock + block;  // among the span's blocks
      for (int64_t eight = 0; eight < eights; ++eight) {
        __m512 sum[V][kEight];
        for (int v = 0; v < V; ++v) {
          for (int t = 0; t < kEight; ++t) sum[v][t] = _mm512_setzero_ps();
        }
        multiply_block(words, x + eight * x_eight, table, ahead, k / 2, sum);
        ahead += 8 * k;
        for (int v = 0; v < V; ++v) {
          const __m512 scale = _mm512_load_ps(tile.scales[i / kSpan % 2][v][at]);
          for (int t = 0; t < kEight; ++t) {
            float* total = tile.total[eight][v][t];
            _mm512_store_ps(total, _mm512_fmadd_ps(sum[v][t], scale, _mm512_load_ps(total)));
          }
        }
        // A part at a time between the products, which do not wait for it.
        if (fetched < V) {
          fetch_words(next, fetched++);
        } else if (i % kSpan / kChunk < V && next_span < k && block == 1 && eight == eights - 1) {
          fetch_scales(next_span, i % kSpan / kChunk);
        }
      }
    }
    while (fetched < V) fetch_words(next, fetched++);
  }
  store_tile(job, rows, tile);
}

}  // namespace

void multiply_by_rows(const RowLanes& job) {
  const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(kLevels)));
  Tile tile;
  int64_t n = job.begin;
  for (; job.end - n > 32; n += 48) multiply_tile<3>(job, n, job.end, table, tile);
  if (job.end - n > 16) {
    multiply_tile<2>(job, n, job.end, table, tile);
  } else if (n < job.end) {
    multiply_tile<1>(job, n, job.end, table, tile);
  }
}

// Within 8 elements the pairs are (1, 5), (0, 4), (3, 7), (2, 6): the order of the nibbles from the low end.
void pack_for_rows(const void* x, int64_t tokens, int64_t k, uint32_t* out) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 8 * 8 + (i / 2 % 4 ^ 1) + i % 2 * 4);
  const __m512i pairs = _mm512_load_si512(order);
  const auto* from = static_cast<const uint16_t*>(x);
  for (int64_t i = 0; i < k; i += 64) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t t = 0; t < 16; ++t) {
      const bool there = t % kEight < tokens;
      r[t] = _mm512_maskz_loadu_epi16(there ? ~0u : 0, from + (there ? t % kEight : 0) * k + i + t / kEight * 32);
      r[t] = _mm512_permutexvar_epi16(pairs, r[t]);
    }
    transpose(r);
    for (int64_t s = 0; s < 16; ++s) {
      uint32_t* step = out + (i / 2 + s) * kEight;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(step), _mm512_castsi512_si256(r[s]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(step + 16 * kEight), _mm512_extracti64x4_epi64(r[s], 1));
    }
  }
}

}  // namespace csikernels::cpu::avx512_bf16
#endif
