// Launchers of the nf4_lora family. Raw device pointers; checks are in nf4_lora.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/scalar.h"

namespace csikernels::cuda {

constexpr int kFewTokens = 16;  // up to these the weight is read as in a product with a vector

// A weight [n, k]: 4-bit codes of the flattened row-major elements, the first of a byte in its high nibble, and a
// scale for every 2^block_shift of them.
struct NF4 {
  const uint8_t* packed;  // [(n * k + 1) / 2]
  const float* absmax;    // [ceil(n * k / 2^block_shift)]
  int n, k, block_shift;
};

// A vector or matrix of any floating type.
struct Dense {
  const void* data;  // null: nothing
  Scalar type;
};

// weight [count] -> packed [(count + 1) / 2], absmax [ceil(count / block)]. first_refused becomes the least of its
// value before and the position of the first element that is not finite.
cudaError_t nf4_quantize(const void* weight, Scalar type, int64_t count, int block, uint8_t* packed, float* absmax,
                         unsigned long long* first_refused, cudaStream_t stream);
// out [n, k]
cudaError_t nf4_dequantize(const NF4& weight, void* out, Scalar type, cudaStream_t stream);

// out [tokens, n] = x W^T + t B^T + bias with t = scaling * x A^T, for 1..kFewTokens tokens.
struct FewTokens {
  const void* x;  // [tokens, k]
  Scalar type;    // of x and out: not float64
  int tokens;
  NF4 weight;
  int rank;
  Dense lora_a, lora_b, bias;  // [rank, k], [n, rank], [n] or nothing
  float scaling;
  float* t;   // [tokens, rank], scratch; null if rank is 0
  void* out;  // [tokens, n]
};
cudaError_t nf4_few_tokens(const FewTokens& layer, cudaStream_t stream);

// out [rows, outputs] = left W' + inner right + bias, where W' is W^T [k, n], or W [n, k] if `transposed`.
struct NF4Product {
  const void* left;  // [rows, reduction]
  Scalar type;       // of left, inner, right and out: not float64
  int rows;
  NF4 weight;
  bool transposed;
  int rank;
  const void* inner;  // [rows, rank]; null if rank is 0
  const void* right;  // [outputs, rank], or [rank, outputs] if `transposed`
  Dense bias;         // [outputs] or nothing
  void* out;
  int splits;      // of the reduction, from nf4_splits
  float* partial;  // [splits, rows, outputs], scratch; null if splits is 1
  __host__ __device__ int reduction() const { return transposed ? weight.n : weight.k; }
  __host__ __device__ int outputs() const { return transposed ? weight.k : weight.n; }
};
// Into how many parts the reduction is cut so that few rows still fill the GPU.
int nf4_splits(const NF4Product& product, int device);
cudaError_t nf4_product(const NF4Product& product, cudaStream_t stream);

// The parts of nf4_product, by type.
cudaError_t nf4_product_half(const NF4Product& product, cudaStream_t stream);
cudaError_t nf4_product_float(const NF4Product& product, cudaStream_t stream);

}  // namespace csikernels::cuda
