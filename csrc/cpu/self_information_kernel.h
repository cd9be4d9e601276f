// Kernels of the self_information family on raw pointers. The instruction-set files include this and nothing of torch.
//
// Formula (K offsets o_k, bandwidth b, neighbours outside the array are 0):
//   I_j = log2(K sqrt(2 pi) b) - log2(centres + S_j),   S_j = sum over the offsets other than (0, 0) of
//   exp(-(c_j - c_jk)^2 / (2 b^2))
// S_j orders the elements exactly as I_j does, smallest first, and without the constant `centres` its float32 keeps
// apart what would round together in I_j.
//
// Fast path (the 3x3 grid of any radius, float32): exp(-(c_j - c_jk)^2 ...) is symmetric in j and k, so that four
// exponentials per element give all eight terms. Exact path (any offsets, float64): one exponential per term.
//
// Layout: a sample [C, H, W] is copied into zeros with `pad_columns` zeros after each row, `pad_rows` rows of zeros
// before each channel and after the last. A row's zeros on the right are those on the left of the next row, so every
// neighbour of every element lies at a constant distance in memory and no border needs code of its own.
//
// One sample of [2, 32, 32], radius 3, m = 221: reads 8 KB, writes m * 12 bytes; 4 * 1.2 * 2,048 exponentials of 15
// operations and 7 additions an element. Floor on the bench machine's AVX-512, where two multiplications and two
// additions a cycle leave three cycles for an exponential: 0.5 us a sample and thread for the sums, 0.9 us with
// selection and sort. Measured: 1.45 us (padding 0.1, sums 0.8, threshold and compress 0.3, sort 0.2), which is 60% of
// that floor; for 90% zeros, where tied elements are settled in float64, about twice as long.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

struct PaddedImage {
  int64_t channels, height, width;
  int64_t pad_rows, pad_columns;
  int64_t stride;          // from one row to the next: width + pad_columns
  int64_t plane;           // from one channel to the next: (height + pad_rows) * stride
  int64_t origin;          // element (0, 0, 0): pad_rows * stride + pad_columns
  int64_t size;            // everything: origin + channels * plane
  const uint16_t* inside;  // bit i of inside[j]: what lies 16 j + i after a strip's first element is one, not padding

  int64_t numel() const { return channels * height * width; }
};

// Vectors are read and written whole: every float and int32 buffer below has this many elements more than it needs.
constexpr int64_t kSlack = 64;

// Rows of one channel that the fast path takes at a time, so that the terms stay in the first-level cache; and the
// floats of scratch that it needs.
int64_t strip_rows(const PaddedImage& layout);
int64_t terms_size(const PaddedImage& layout);

// The neighbours other than (0, 0) for the exact path.
struct ExactTerms {
  const int64_t* shifts;  // [count] distances in the padded image
  int64_t count;
  double inverse_bandwidth;
  // 1.5 * 2^q with 2^q >= count. Adding and subtracting it rounds a term to a multiple of 2^(q - 52), and sums of
  // such multiples are exact: equal terms in any order give the same sum, which makes exact ties exact.
  double rounder;
};

constexpr int64_t kThresholds = 4;

struct InformationKernels {
  // image [C * H * W] times scale -> padded (whose zeros stand already). Returns the largest magnitude, NaN above all.
  float (*pad)(const float* image, const PaddedImage& layout, float scale, float* padded);

  // keys [C * H * W] out: the bits of S (which is never negative, so they order as integers); coefficient =
  // -log2(e) / (2 b^2) in the unit of the padded image, 0 < b <= 2. The grid is {-pad_rows, 0, pad_rows} x
  // {-pad_columns, 0, pad_columns}.
  void (*neighbour_sums)(const float* padded, const PaddedImage& layout, float coefficient, float* terms,
                         int32_t* keys);

  // bits = log2_norm - log2(centres + S) for n elements.
  void (*information)(const int32_t* keys, int64_t n, float centres, float log2_norm, float* bits);

  // S = total * exp(-nearest) of `count` elements at the given positions of the padded image; NaN totals for elements
  // that are not finite. `scratch` [8 * terms.count].
  void (*exact_sums_of_floats)(const float* padded, const int64_t* positions, int64_t count, const ExactTerms& terms,
                               double* scratch, double* nearest, double* total);
  void (*exact_sums_of_doubles)(const double* padded, const int64_t* positions, int64_t count, const ExactTerms& terms,
                                double* scratch, double* nearest, double* total);

  // Integers that order scores [n] as top_m wants them: largest first, both zeros equal, NaN last.
  void (*descending_keys)(const float* score, int64_t n, int32_t* keys);

  // counts[t] = number of keys at most thresholds[t].
  void (*count)(const int32_t* keys, int64_t n, const int32_t* thresholds, int64_t* counts);

  // Keys in low..high and their positions, in order of position. Returns how many.
  int64_t (*keep)(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* kept, int32_t* positions);

  // Leaves those at most `high`, in order. Returns how many.
  int64_t (*narrow)(int32_t* keys, int32_t* positions, int64_t n, int32_t high);

  // Sorts up to kNetwork pairs by key, equal keys in their given order, but for the lowest bits of keys that span more
  // than 2^24: the caller looks at neighbours anyway. Null where there is no such network.
  void (*sort)(const int32_t* keys, const int32_t* positions, int64_t count, int32_t* sorted_keys,
               int32_t* sorted_positions);

  // Whether each S is above the one before it by more than float32 may be wrong (margin_of below).
  bool (*certain)(const int32_t* keys, int64_t count);
};

constexpr int64_t kNetwork = 256;

// How far apart two float32 sums S must be for their order to be that of the true sums. With u = 2^-24, the terms'
// arguments t_k are right to 5u relative (difference, square, product, coefficient), exp2 to 3u and the sum of eight
// to 4u, so S is right to u (7 S + 5 sum_k t_k exp(-t_k)); that last sum is at most 8 - S, and at most S ln(8 / S).
// Twice this, and a tenth more:
//   margin = kMarginOfSum S + kMarginOfSpread min(8 - S, ln2 S binades),  2^-binades <= S / 8
constexpr float kMarginOfSum = 15.5f / 16777216, kMarginOfSpread = 11.0f / 16777216, kLn2 = 0.6932f;
constexpr int32_t kBinadeOfEight = 127 + 3;
// Below this S nothing is certain: terms underflow.
constexpr int32_t kSmallestCertain = (127 - 64) << 23;
// The bits of S = 8: all eight neighbours are equal, or so nearly that float32 does not tell. These elements are the
// least informative, and rank by position: what float32 leaves out is below 2e-7 bits of information.
constexpr int32_t kAllEqual = 0x41000000;

namespace scalar {
extern const InformationKernels information_kernels;
}
namespace avx2 {
extern const InformationKernels information_kernels;
}
namespace avx512 {
extern const InformationKernels information_kernels;
}

}  // namespace csikernels::cpu
