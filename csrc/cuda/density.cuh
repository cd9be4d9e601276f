// How dense the neighbourhood of each element is: the ranking of self-information, in fixed point or in float64.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cuda/exp2.cuh"
#include "cuda/scalar.cuh"
#include "cuda/select.cuh"
#include "cuda/self_information.h"

namespace csikernels::cuda {
namespace {

constexpr float kUnit = 0x1p27f;               // a term of 1, in fixed point: eight of them stay below the flag
constexpr uint32_t kNotANumber = 0x80000000u;  // flag in a sum
constexpr double kLn2 = 0.693147180559945309;

struct Shape {
  int channels, height, width;
};

// Density ------------------------------------------------------------------------------------------------------------

// keys[i] = the neighbour sum of element i in fixed point, or all ones where it is not a number.
// coefficient = -log2(e) / (2 b^2)
template <class Pixel>
__device__ void fixed_point_sums(const Pixel& pixel, Shape shape, int row_step, int column_step, float coefficient,
                                 uint32_t* keys) {
  const int plane = shape.height * shape.width, n = shape.channels * plane;
  for (int i = threadIdx.x; i < n; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const int row = i % plane / shape.width, column = i % shape.width;
    const float centre = pixel(i);
    const bool up = row >= row_step, down = row + row_step < shape.height;
    const bool left = column >= column_step, right = column + column_step < shape.width;
    uint32_t sum = isfinite(centre) ? 0 : kNotANumber;
    const auto pair = [&](bool inside, int partner) {
      if (!inside) return;
      const float difference = centre - pixel(partner);
      if (isnan(difference)) {
        sum |= kNotANumber;
        atomicOr(&keys[partner], kNotANumber);
      } else {
        const uint32_t term = __float2uint_rn(kUnit * exp2_fast(coefficient * (difference * difference)));
        sum += term;
        atomicAdd(&keys[partner], term);
      }
    };
    pair(right, i + column_step);
    pair(down && left, i + row_step * shape.width - column_step);
    pair(down, i + row_step * shape.width);
    pair(down && right, i + row_step * shape.width + column_step);
    const int rows_inside = 1 + up + down, columns_inside = 1 + left + right;
    const uint32_t outside = 9 - rows_inside * columns_inside;
    if (outside > 0) sum += outside * __float2uint_rn(kUnit * exp2_fast(coefficient * (centre * centre)));
    // The sums of terms cannot carry into the flag, and a flag is only ever set: the order of both does not matter.
    if (sum & kNotANumber) {
      atomicOr(&keys[i], kNotANumber);
    } else {
      atomicAdd(&keys[i], sum);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (keys[i] & kNotANumber) keys[i] = ~0u;
  }
  __syncthreads();
}

// log of the sum over the neighbours, in float64 and rounded as the reference does, so that equal differences tie.
template <class Pixel>
__device__ double log_neighbour_sum(const Pixel& pixel, Shape shape, const Offsets& offsets, double bandwidth, int i) {
  const int plane = shape.height * shape.width;
  const int row = i % plane / shape.width, column = i % shape.width, neighbours = offsets.count - offsets.centres;
  const double centre = pixel(i);
  const auto distance = [&](int k) {
    const int r = row + offsets.row[k], c = column + offsets.column[k];
    const bool inside = 0 <= r && r < shape.height && 0 <= c && c < shape.width;
    const double other = inside ? pixel(i + offsets.row[k] * shape.width + offsets.column[k]) : 0.0;
    const double difference = (centre - other) / bandwidth;
    return difference * difference / 2;
  };
  double nearest = DBL_MAX;
  for (int k = 0; k < neighbours; ++k) {
    const double d = distance(k);
    nearest = d < nearest || isnan(d) ? d : nearest;  // NaN is kept, unlike by fmin
  }
  double rounder = 1.5;
  for (int k = 1; k < neighbours; k *= 2) rounder *= 2;
  double total = 0;
  for (int k = 0; k < neighbours; ++k) total += (exp(nearest - distance(k)) + rounder) - rounder;
  return isfinite(centre) ? log(total) - nearest : nan("");
}

// Unsigned integers in the order of the numbers; -0 as +0, NaN behind all.
__device__ uint32_t ordered(float x) {
  if (isnan(x)) return ~0u;
  const uint32_t bits = x == 0 ? 0 : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ uint64_t ordered(double x) {
  if (isnan(x)) return ~0ull;
  const uint64_t bits = x == 0 ? 0 : __double_as_longlong(x);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}

}  // namespace
}  // namespace csikernels::cuda
