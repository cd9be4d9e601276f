// self_information for AVX-512.
#include "cpu/self_information_kernel.h"

#if defined(__x86_64__)
#include "cpu/vec_avx512.h"

namespace csikernels::cpu::avx512 {
#include "cpu/self_information_body.h"

namespace {

// 2^(i / 32)
alignas(64) constexpr float kPowers[32] = {
    1.0f,        1.02189720f, 1.04427373f, 1.06714046f, 1.09050775f, 1.11438680f, 1.13878858f, 1.16372490f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.57598090f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.83400810f, 1.87416768f, 1.91520655f, 1.95714414f,
};

// terms[i] = 2^(coefficient * differences[i]^2), coefficient <= 0; 1 for 0, and 0 where it underflows. N at a time, one
// step after the other: in the order of the terms, a processor's window would hold too few of them to fill its pipes.
//
// The exponent is n / 32 + t with whole n and |t| <= 1/64: 2^(n / 32) from the table and 2^t by a polynomial of
// degree 2. Relative error in units of 2^-24: table 1, polynomial 0.9, last addition 1, so less than 3.
template <int N>
CSIKERNELS_INLINE void squared_terms(const F32 (&differences)[N], F32 coefficient, F32 (&terms)[N]) {
  const F32 to_whole = broadcast(393216.0f);  // 1.5 * 2^23 / 32: the lowest bits of the sum are n
  const __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  F32 square[N], shifted[N], nearest[N], power[N], rest[N], slope[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) square[i] = differences[i] * differences[i];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) shifted[i] = fma(square[i], coefficient, to_whole);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) nearest[i] = shifted[i] - to_whole;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) power[i] = {_mm512_permutex2var_ps(low, _mm512_castps_si512(shifted[i].v), high)};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) power[i] = {lanes_scale(power[i].v, nearest[i].v)};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) rest[i] = fma(square[i], coefficient, -nearest[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) slope[i] = fma(broadcast(0.24022827f), rest[i], broadcast(0.6931573f));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) rest[i] = rest[i] * power[i];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) terms[i] = fma(slope[i], rest[i], power[i]);
}

// As strip_sums, without planes of terms, for neighbours at most a vector to the right: x of four corners makes all
// terms between them, and the term of the pair that lies `across` to the left comes from the vector before.
//   beside p   (p, p + across)           straight  (p, p + down)
//   falling p  (p, p + down + across)    rising    (p + across, p + down)
// Every element gets the terms with the row below and its own, and what the element `down` above it has given.
void strip_sums_in_registers(const float* x, int64_t rows, const PaddedImage& layout, F32 coefficient, float* terms,
                             int32_t* keys) {
  const int64_t across = layout.pad_columns, down = layout.pad_rows * layout.stride, n = rows * layout.stride;
  float* const given = terms + (down + 15) / 16 * 16;  // [-down, n): what p gives to p + down
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i shift = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(16 - across)));
  const __m512i turn = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(across)));
  const auto before = [&](F32 previous, F32 current) __attribute__((always_inline)) {
    return F32{_mm512_permutex2var_ps(previous.v, shift, current.v)};
  };
  // The vector before the first, from one whose lane 0 lies `across` to the left.
  const auto at_end = [&](F32 a) __attribute__((always_inline)) { return F32{_mm512_permutexvar_ps(turn, a.v)}; };

  F32 outside[1];
  squared_terms<1>({load(x - down - across) - load(x)}, coefficient, outside);
  F32 last_falling = at_end(outside[0]);
  for (int64_t p = -down; p < 0; p += 16) {  // above the strip
    const F32 centre = load(x + p), below = load(x + p + down);
    F32 term[3];
    squared_terms<3>({centre - load(x + p + down + across), load(x + p + across) - below, centre - below}, coefficient,
                     term);
    const auto [falling, rising, straight] = term;
    store(given + p, (before(last_falling, falling) + rising) + straight);
    last_falling = falling;
  }
  F32 left[3];
  const F32 low_left = load(x + down - across);
  squared_terms<3>({load(x - across) - load(x), load(x) - low_left, load(x - across) - load(x + down)}, coefficient,
                   left);
  F32 last_pair = at_end(left[0] + left[1]);
  last_falling = at_end(left[2]);
  for (int64_t p = 0; p < n; p += 16) {
    const F32 centre = load(x + p), right = load(x + p + across), below = load(x + p + down);
    F32 term[4];
    squared_terms<4>({centre - right, right - below, centre - load(x + p + down + across), centre - below}, coefficient,
                     term);
    const auto [beside, rising, falling, straight] = term;
    const F32 pair = beside + rising, from_above = load(given + p - down);
    store(given + p, (before(last_falling, falling) + rising) + straight);
    const F32 sum = (before(last_pair, pair) + (beside + falling)) + (straight + from_above);
    last_pair = pair, last_falling = falling;
    const __mmask16 inside = layout.inside[p / 16];
    _mm512_storeu_si512(keys, _mm512_maskz_compress_epi32(inside, _mm512_castps_si512(sum.v)));
    keys += __builtin_popcount(inside);
  }
}

void neighbour_sums_in_registers(const float* padded, const PaddedImage& layout, float coefficient, float* terms,
                                 int32_t* keys) {
  const bool in_registers = layout.pad_columns <= kVector && layout.pad_rows * layout.stride >= kVector;
  neighbour_sums_by_strips(padded, layout, coefficient, terms, keys,
                           in_registers ? strip_sums_in_registers : strip_sums);
}

void count(const int32_t* keys, int64_t n, const int32_t* thresholds, int64_t* counts) {
  __m512i threshold[kThresholds], at_most[kThresholds];
  const __m512i one = _mm512_set1_epi32(1);
#pragma GCC unroll 4
  for (int64_t t = 0; t < kThresholds; ++t) {
    threshold[t] = _mm512_set1_epi32(thresholds[t]);
    at_most[t] = _mm512_setzero_si512();
  }
  const auto add = [&](__m512i key, __mmask16 there) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < kThresholds; ++t) {
      const __mmask16 low = _mm512_mask_cmple_epi32_mask(there, key, threshold[t]);
      at_most[t] = _mm512_mask_add_epi32(at_most[t], low, at_most[t], one);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) add(_mm512_loadu_si512(keys + i), 0xFFFF);
  if (i < n) add(_mm512_loadu_si512(keys + i), first_lanes(static_cast<int>(n - i)));
#pragma GCC unroll 4
  for (int64_t t = 0; t < kThresholds; ++t) counts[t] = _mm512_reduce_add_epi32(at_most[t]);
}

// Compressed in a register first: compressing into memory is microcoded on some processors.
int64_t keep(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* kept, int32_t* positions) {
  const __m512i lowest = _mm512_set1_epi32(low), highest = _mm512_set1_epi32(high);
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0, i = 0;
  const auto add = [&](__mmask16 there) __attribute__((always_inline)) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 inside =
        _mm512_mask_cmple_epi32_mask(_mm512_mask_cmpge_epi32_mask(there, key, lowest), key, highest);
    _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(inside, key));
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(inside, position));
    count += __builtin_popcount(inside);
    position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  };
  for (; i + 16 <= n; i += 16) add(0xFFFF);
  if (i < n) add(first_lanes(static_cast<int>(n - i)));
  return count;
}

int64_t narrow(int32_t* keys, int32_t* positions, int64_t n, int32_t high) {
  const __m512i highest = _mm512_set1_epi32(high);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i), position = _mm512_loadu_si512(positions + i);
    const __mmask16 there = n - i < 16 ? first_lanes(static_cast<int>(n - i)) : 0xFFFF;
    const __mmask16 inside = _mm512_mask_cmple_epi32_mask(there, key, highest);
    _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(inside, key));
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(inside, position));
    count += __builtin_popcount(inside);
  }
  return count;
}

// A sorting network for 256 unsigned integers in 16 registers. Element (register r, lane l) has the place 16 l + r, so
// that most comparisons are between registers: sorting 16 elements needs no shuffle at all, and of the steps that
// merge two runs of 2^k only those between lanes do.

CSIKERNELS_INLINE void order(__m512i& a, __m512i& b) {
  const __m512i low = _mm512_min_epu32(a, b);
  b = _mm512_max_epu32(a, b);
  a = low;
}

// Comparisons of places 8, 4, 2 and 1 apart.
template <int kApart = 8>
CSIKERNELS_INLINE void merge_within_lanes(__m512i* r) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & kApart) == 0) order(r[i], r[i + kApart]);
  }
  if constexpr (kApart > 1) merge_within_lanes<kApart / 2>(r);
}

// Each lane compares with lane ^ kFlip; lanes with a bit of kUpper keep the larger.
template <int kFlip>
CSIKERNELS_INLINE __m512i partner(__m512i a) {
  if constexpr (kFlip < 4)
    return _mm512_shuffle_epi32(
        a, static_cast<_MM_PERM_ENUM>((0 ^ kFlip) | ((1 ^ kFlip) << 2) | ((2 ^ kFlip) << 4) | ((3 ^ kFlip) << 6)));
  if constexpr (kFlip == 4) return _mm512_shuffle_i32x4(a, a, 0xB1);
  if constexpr (kFlip == 8) return _mm512_shuffle_i32x4(a, a, 0x4E);
  // 7 and 15: the lanes of 128 bits as well as what is in them
  if constexpr (kFlip == 7) return partner<3>(_mm512_shuffle_i32x4(a, a, 0xB1));
  return partner<3>(_mm512_shuffle_i32x4(a, a, 0x1B));
}

template <int kFlip, __mmask16 kUpper>
CSIKERNELS_INLINE void merge_between_lanes(__m512i* r) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i other = partner<kFlip>(r[i]);
    r[i] = _mm512_mask_max_epu32(_mm512_min_epu32(r[i], other), kUpper, r[i], other);
  }
}

// The first step of merging two sorted runs: place p with the place as far from the other run's end.
template <int kFlip, __mmask16 kUpper>
CSIKERNELS_INLINE void merge_runs(__m512i* r) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i low = r[i], high = r[15 - i], low_partner = partner<kFlip>(high), high_partner = partner<kFlip>(low);
    r[i] = _mm512_mask_max_epu32(_mm512_min_epu32(low, low_partner), kUpper, low, low_partner);
    r[15 - i] = _mm512_mask_max_epu32(_mm512_min_epu32(high, high_partner), kUpper, high, high_partner);
  }
}

// Compares i with i + kApart where both lie in the same block of 2 kRun, from kApart % kRun on in steps of 2 kApart.
// (Parameters of the template, since the compiler unrolls no loop that halves or doubles its counter.)
template <int kRun, int kApart>
CSIKERNELS_INLINE void merge_odd_even(__m512i* r) {
#pragma GCC unroll 16
  for (int i = kApart % kRun; i + kApart < 16; ++i) {
    if ((i - kApart % kRun) / kApart % 2 == 0 && i / (2 * kRun) == (i + kApart) / (2 * kRun))
      order(r[i], r[i + kApart]);
  }
  if constexpr (kApart > 1) merge_odd_even<kRun, kApart / 2>(r);
}

// Batcher's odd-even merge sort of 16: 63 comparisons.
CSIKERNELS_INLINE void sort_within_lanes(__m512i* r) {
  merge_odd_even<1, 1>(r);
  merge_odd_even<2, 2>(r);
  merge_odd_even<4, 4>(r);
  merge_odd_even<8, 8>(r);
}

CSIKERNELS_INLINE void sort_network(__m512i* r) {
  sort_within_lanes(r);
  merge_runs<1, 0xAAAA>(r);
  merge_within_lanes(r);
  merge_runs<3, 0xCCCC>(r);
  merge_between_lanes<1, 0xAAAA>(r);
  merge_within_lanes(r);
  merge_runs<7, 0xF0F0>(r);
  merge_between_lanes<2, 0xCCCC>(r);
  merge_between_lanes<1, 0xAAAA>(r);
  merge_within_lanes(r);
  merge_runs<15, 0xFF00>(r);
  merge_between_lanes<4, 0xF0F0>(r);
  merge_between_lanes<2, 0xCCCC>(r);
  merge_between_lanes<1, 0xAAAA>(r);
  merge_within_lanes(r);
}

// One word each: 24 bits of the key's distance to the smallest one above the 8 bits of its place.
void sort(const int32_t* keys, const int32_t* positions, int64_t count, int32_t* sorted_keys,
          int32_t* sorted_positions) {
  __m512i r[16], smallest = _mm512_set1_epi32(INT32_MAX), largest = _mm512_set1_epi32(INT32_MIN);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = first_lanes(count - i < 16 ? static_cast<int>(count - i) : 16);
    const __m512i key = _mm512_loadu_si512(keys + i);
    smallest = _mm512_mask_min_epi32(smallest, there, smallest, key);
    largest = _mm512_mask_max_epi32(largest, there, largest, key);
  }
  const int32_t base = _mm512_reduce_min_epi32(smallest);
  const uint32_t span = static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)) - static_cast<uint32_t>(base);
  const int bits = span == 0 ? 0 : 32 - __builtin_clz(span);
  const __m128i shift = _mm_cvtsi32_si128(bits > 24 ? bits - 24 : 0);
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t rest = count - 16 * i;
    const __mmask16 there = first_lanes(rest < 16 ? (rest < 0 ? 0 : static_cast<int>(rest)) : 16);
    const __m512i key = _mm512_maskz_loadu_epi32(there, keys + 16 * i);
    const __m512i distance = _mm512_srl_epi32(_mm512_sub_epi32(key, _mm512_set1_epi32(base)), shift);
    // Empty places sort last, whatever the key: no word is larger, and place 255 is the only one that can be equal.
    r[i] = _mm512_mask_or_epi32(_mm512_set1_epi32(-1), there, _mm512_slli_epi32(distance, 8), place);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  }
  sort_network(r);
  uint32_t words[16][16];  // [register][lane]
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(words[i], r[i]);
  const auto look_up = [&](int64_t lane, int64_t k) __attribute__((always_inline)) {
    const uint32_t from = words[k][lane] & 0xFF;
    sorted_keys[16 * lane + k] = keys[from];
    sorted_positions[16 * lane + k] = positions[from];
  };
  const int64_t whole = count / 16;
  for (int64_t lane = 0; lane < whole; ++lane) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < 16; ++k) look_up(lane, k);
  }
  for (int64_t k = 0; k < count % 16; ++k) look_up(whole, k);
}

}  // namespace

const InformationKernels information_kernels = with_own(neighbour_sums_in_registers, count, keep, narrow, sort);

}  // namespace csikernels::cpu::avx512
#endif
