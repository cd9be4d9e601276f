// Float64 arithmetic on single rows of the codebook search, the same on every processor: what the answer is made of.
// A row holds `components` = 2 D numbers, Re and Im interleaved.
#pragma once

#include <cstdint>

namespace csikernels::cpu::codebook {

// out = row / 2^exponent with the largest component in [0.5, 1), so that no square over- or underflows. False where the
// row is zero or holds NaN or infinity. `out` may be `row`.
bool scale_row(const float* row, int64_t components, double* out, int& exponent);
bool scale_row(const double* row, int64_t components, double* out, int& exponent);

double norm(const double* row, int64_t components);

// A row in int8: row = scale * values + remainder, and the remainder's norm, rounded up.
struct Quantized {
  float scale;
  float residual;
};

// Values in -level..level.
Quantized quantize(const double* row, int64_t components, int level, int8_t* values);

// The largest level at which a sum of `components` products of two such values fits into 32 bits, 127 at most.
int largest_level(int64_t components);

// A similarity with the rounding it may carry: a few ulp of the sum of magnitudes, which pairwise summation leaves.
struct Score {
  double value;
  double slack;
  double low() const { return value - slack; }
  double high() const { return value + slack; }
};

// |(factor w)^H q|. Each pair is summed in one fixed order, whatever the thread and instruction set.
Score score(const double* query, const float* word, double factor, int64_t components);
Score score(const double* query, const double* word, double factor, int64_t components);

}  // namespace csikernels::cpu::codebook
