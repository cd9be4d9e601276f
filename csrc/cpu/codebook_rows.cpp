#include "cpu/codebook_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

namespace csikernels::cpu::codebook {
namespace {

constexpr int64_t kPairwise = 64;  // components that one chain of sums takes

// Sums and maxima run in four chains, so that a processor has four of them under way.
constexpr int kChains = 4;

// The bits of the largest magnitude; above those of infinity where a component is NaN. Integers, because their maximum
// may be taken in any order.
template <class Bits, class Float>
Bits largest_bits(const Float* row, int64_t components) {
  Bits largest = 0;
  for (int64_t c = 0; c < components; ++c) {
    const Bits magnitude = std::bit_cast<Bits>(row[c]) & std::numeric_limits<Bits>::max();
    largest = std::max(largest, magnitude);
  }
  return largest;
}

template <class Float>
bool scale(const Float* row, int64_t components, double* out, int& exponent) {
  using Bits = std::conditional_t<sizeof(Float) == 4, int32_t, int64_t>;
  const auto largest = std::bit_cast<Float>(largest_bits<Bits>(row, components));
  if (!(largest > 0) || !std::isfinite(largest)) return false;
  std::frexp(static_cast<double>(largest), &exponent);
  const int half = exponent / 2;  // in two steps: 2^1074, which lifts a denormal, is beyond float64
  const double first = std::ldexp(1.0, -half), second = std::ldexp(1.0, half - exponent);
  for (int64_t c = 0; c < components; ++c) out[c] = static_cast<double>(row[c]) * first * second;
  return true;
}

double sum_of_squares(const double* row, int64_t components) {
  if (components > kPairwise) {
    const int64_t half = (components / 2 + kPairwise - 1) / kPairwise * kPairwise;
    return sum_of_squares(row, half) + sum_of_squares(row + half, components - half);
  }
  double sum[kChains] = {};
  int64_t c = 0;
  for (; c + kChains <= components; c += kChains) {
    for (int i = 0; i < kChains; ++i) sum[i] += row[c + i] * row[c + i];
  }
  for (; c < components; ++c) sum[c % kChains] += row[c] * row[c];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Real and imaginary part of w^H q, and the sums of their terms' magnitudes.
struct Product {
  double real, imaginary, magnitude;
};

template <class Float>
Product product(const double* query, const Float* word, int64_t components) {
  if (components > kPairwise) {
    const int64_t half = (components / 2 + kPairwise - 1) / kPairwise * kPairwise;
    const Product a = product(query, word, half), b = product(query + half, word + half, components - half);
    return {a.real + b.real, a.imaginary + b.imaginary, a.magnitude + b.magnitude};
  }
  double real[2] = {}, imaginary[2] = {}, magnitude[2] = {};
  for (int64_t c = 0; c < components; c += 2) {
    const double w = word[c], v = word[c + 1], p = query[c], q = query[c + 1];
    const double wp = w * p, vq = v * q, wq = w * q, vp = v * p;
    const int chain = c / 2 % 2;
    real[chain] += wp + vq;
    imaginary[chain] += wq - vp;
    magnitude[chain] += (std::abs(wp) + std::abs(vq)) + (std::abs(wq) + std::abs(vp));
  }
  return {real[0] + real[1], imaginary[0] + imaginary[1], magnitude[0] + magnitude[1]};
}

template <class Float>
Score score_row(const double* query, const Float* word, double factor, int64_t components) {
  const Product sum = product(query, word, components);
  return {std::hypot(sum.real * factor, sum.imaginary * factor), 0x1p-49 * (sum.magnitude * factor)};
}

}  // namespace

bool scale_row(const float* row, int64_t components, double* out, int& exponent) {
  return scale(row, components, out, exponent);
}

bool scale_row(const double* row, int64_t components, double* out, int& exponent) {
  return scale(row, components, out, exponent);
}

double norm(const double* row, int64_t components) { return std::sqrt(sum_of_squares(row, components)); }

int largest_level(int64_t components) {
  return static_cast<int>(std::min(127.0, std::floor(std::sqrt(2147483647.0 / static_cast<double>(components)))));
}

Quantized quantize(const double* row, int64_t components, int level, int8_t* values) {
  const double largest = std::bit_cast<double>(largest_bits<int64_t>(row, components));
  const auto step = static_cast<float>(largest / level);  // float32 first: the residual is that of the stored scale
  const double scale = step, inverse = 1 / scale;
  // Adding 1.5 * 2^52 leaves no room for a fraction: the nearest integer without a call. |row / scale| exceeds the
  // level by the rounding of the scale at most, so it is in range.
  constexpr double magic = 6755399441055744.0;
  double squares[kChains] = {};
  const auto take = [&](int64_t c, int chain) {
    const double nearest = (row[c] * inverse + magic) - magic, rest = row[c] - scale * nearest;
    values[c] = static_cast<int8_t>(static_cast<int32_t>(nearest));
    squares[chain] += rest * rest;
  };
  int64_t c = 0;
  for (; c + kChains <= components; c += kChains) {
    for (int i = 0; i < kChains; ++i) take(c + i, i);
  }
  for (; c < components; ++c) take(c, 0);
  // 2^-20 covers the rounding of this sum of like-signed terms (up to 2^30 of them) and of the conversion.
  const double sum = (squares[0] + squares[2]) + (squares[1] + squares[3]);
  return {step, static_cast<float>(std::sqrt(sum) * (1 + 0x1p-20))};
}

Score score(const double* query, const float* word, double factor, int64_t components) {
  return score_row(query, word, factor, components);
}

Score score(const double* query, const double* word, double factor, int64_t components) {
  return score_row(query, word, factor, components);
}

}  // namespace csikernels::cpu::codebook
