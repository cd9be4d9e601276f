// Single rows of the codebook ops: powers of two that keep squares in range, sums over the lanes that share a row.
#pragma once

#include <cstdint>
#include <type_traits>

namespace csikernels::cuda::codebook {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 8;  // that share a row: 64 contiguous bytes of complex64

template <class Float>
using Pair = std::conditional_t<sizeof(Float) == 4, float2, double2>;  // a complex number

template <int lanes = kLanes, class T>
__device__ T sum_of_group(T x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int lanes = kLanes, class T>
__device__ T maximum_of_group(T x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Bits of |x|. As integers they are in the order of the numbers, NaN above infinity.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ inline unsigned long long magnitude(double x) { return __double_as_longlong(x) & 0x7fffffffffffffffull; }

template <class Float>
using Magnitude = decltype(magnitude(Float()));

template <class Float>
__device__ Magnitude<Float> magnitude(Pair<Float> z) {
  const Magnitude<Float> re = magnitude(z.x), im = magnitude(z.y);
  return re > im ? re : im;
}

// 2^n for n within the exponents of normal numbers
template <class Float>
__device__ Float power_of_two(int n) {
  if constexpr (sizeof(Float) == 4) {
    return __uint_as_float(static_cast<uint32_t>(n + 127) << 23);
  } else {
    return __longlong_as_double(static_cast<long long>(n + 1023) << 52);
  }
}

// Takes the largest component of a row into [0.5, 1). In two steps: 2^149, which lifts a denormal, is beyond float32.
template <class Float>
struct Scale {
  bool usable;  // the row is finite and not zero
  int exponent;
  Float first, second;

  __device__ explicit Scale(Magnitude<Float> largest) {
    constexpr int kDigits = sizeof(Float) == 4 ? 23 : 52, kBias = sizeof(Float) == 4 ? 126 : 1022;
    constexpr int kSpecial = 2 * kBias + 3;  // the exponent field of infinity and NaN
    const int field = static_cast<int>(largest >> kDigits);
    usable = largest != 0 && field < kSpecial;
    exponent = field - kBias;
    if (field == 0) exponent = 64 - __clzll(static_cast<long long>(largest)) - kDigits - kBias;
    if (!usable) exponent = 0;
    const int half = exponent / 2;
    first = power_of_two<Float>(-half);
    second = power_of_two<Float>(half - exponent);
  }

  __device__ Float operator()(Float x) const { return x * first * second; }
};

}  // namespace
}  // namespace csikernels::cuda::codebook
