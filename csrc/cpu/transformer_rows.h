// What is done row by row: LayerNorm, and rows as left sides of products. Included inside an instruction set's
// namespace, after `narrow`, which rounds a vector to bfloat16.

#pragma once

#include "cpu/transformer_product.h"

namespace {

CSIKERNELS_INLINE F32 to_bf16(F32 a) {
  const IntLanes bits = (IntLanes)a.v;
  const IntLanes rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & static_cast<int32_t>(0xFFFF0000);
  return select(is_nan(a), a, F32{(FloatLanes)rounded});
}

CSIKERNELS_INLINE F32 masked(F32 a, int64_t n) {  // the first n lanes, zeros beyond
  float lanes[F32::lanes];
  store(lanes, a);
  return load_up_to(lanes, n);
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias; out may be x
void layer_norm(const float* x, int64_t n, const Norm& norm, float eps, float* out) {
  constexpr int kSums = 4;
  const int64_t step = kSums * F32::lanes, whole = n - n % step;
  F32 sum[kSums];
  for (auto& s : sum) s = broadcast(0.0f);
  for (int64_t i = 0; i < whole; i += step) {
    for (int s = 0; s < kSums; ++s) sum[s] = sum[s] + load(x + i + s * F32::lanes);
  }
  for (int64_t i = whole; i < n; i += F32::lanes) sum[0] = sum[0] + load_up_to(x + i, n - i);
  const F32 mean = broadcast(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n));
  for (auto& s : sum) s = broadcast(0.0f);
  for (int64_t i = 0; i < whole; i += step) {
    for (int s = 0; s < kSums; ++s) {
      const F32 d = load(x + i + s * F32::lanes) - mean;
      sum[s] = fma(d, d, sum[s]);
    }
  }
  for (int64_t i = whole; i < n; i += F32::lanes) {
    const F32 d = masked(load_up_to(x + i, n - i) - mean, n - i);
    sum[0] = fma(d, d, sum[0]);
  }
  const float variance = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n);
  const F32 scale = broadcast(1.0f) / sqrt(broadcast(variance + eps));
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const F32 normal = (load_up_to(x + i, n - i) - mean) * scale;
    store_up_to(out + i, fma(normal, load_up_to(norm.weight + i, n - i), load_up_to(norm.bias + i, n - i)), n - i);
  }
}

// Up to a vector of a row as elements of a left side.
CSIKERNELS_INLINE void encode_lanes(F32 a, int64_t n, float* out) { store_up_to(out, a, n); }

CSIKERNELS_INLINE void encode_lanes(F32 a, int64_t n, uint16_t* out) {
  if (n >= F32::lanes) return narrow(out, a);
  uint16_t lanes[F32::lanes];
  narrow(lanes, a);
  for (int64_t i = 0; i < n; ++i) out[i] = lanes[i];
}

// One row as a left side, with zeros to the end of its last group. Returns its scale.
CSIKERNELS_INLINE float encode(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += F32::lanes) encode_lanes(load_up_to(x + i, n - i), n - i, out + i);
  return 1.0f;
}

CSIKERNELS_INLINE float encode(const float* x, int64_t n, uint16_t* out) {
  if (n % 2 != 0) out[n] = 0;
  for (int64_t i = 0; i < n; i += F32::lanes) encode_lanes(load_up_to(x + i, n - i), n - i, out + i);
  return 1.0f;
}

typedef uint8_t ByteLanes __attribute__((vector_size(kLanes)));

// Round(x / scale) + 128 with scale = max |x| / 127. A row of zeros has the scale 1 (so do rows whose scale would not
// be a normal float32), one that holds a NaN or an infinity the scale NaN.
CSIKERNELS_INLINE float encode(const float* x, int64_t n, uint8_t* out) {
  F32 largest = broadcast(0.0f), probe = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const F32 a = load_up_to(x + i, n - i);
    largest = max(largest, abs(a));
    probe = fma(a, broadcast(0.0f), probe);  // NaN as soon as an element is not finite
  }
  const float nothing = reduce_add(probe);
  if (nothing != nothing) return nothing;
  const float scale = reduce_max(largest) / 127.0f;
  const bool zero = !(scale >= 1.17549435e-38f);
  const F32 inverse = broadcast(zero ? 0.0f : 1.0f / scale);
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const F32 q = round(load_up_to(x + i, n - i) * inverse) + broadcast(128.0f);
    const ByteLanes bytes = __builtin_convertvector(__builtin_convertvector(q.v, IntLanes), ByteLanes);
    if (n - i >= F32::lanes) {
      __builtin_memcpy(out + i, &bytes, sizeof(bytes));
    } else {
      for (int64_t j = i; j < (n + 3) / 4 * 4; ++j) out[j] = bytes[j - i];
    }
  }
  return zero ? 1.0f : scale;
}

// Below this many elements, sharing rows costs more than it saves.
constexpr int64_t kSharedElements = 1 << 16;

// All rows as the left side of a product; `norm` (or null) is applied first, in x itself where keep is set.
template <class Dot>
Rows<Dot> encode_rows(const Team& team, float* x, int64_t stride, int64_t rows, int64_t n, const Norm* norm, float eps,
                      bool keep, char* out, float* scales, const Workspace& space) {
  using Element = typename Dot::Element;
  const Rows<Dot> side = {reinterpret_cast<Element*>(out), row_stride(n, sizeof(Element)), scales};
  share(rows * n < kSharedElements ? Team{} : team, rows, [&](int64_t first, int64_t end, int64_t member) {
    for (int64_t r = first; r < end; ++r) {
      float* row = x + r * stride;
      if (norm != nullptr) {
        float* target = keep ? row : space.normal + member * space.normal_size;
        layer_norm(row, n, *norm, eps, target);
        row = target;
      }
      scales[r] = encode(row, n, side.data + r * side.stride);
    }
  });
  return side;
}

}  // namespace
