// Launchers of the self_information family. Raw device pointers; checks are in self_information.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/scalar.h"

namespace csikernels::cuda {

constexpr int kMaxElements = 16384;  // C*H*W of a sample: its keys lie in shared memory
constexpr int kMaxOffsets = 256;

// Neighbours of an element, relative to it.
struct Offsets {
  int count;                                  // all, centres included
  int centres;                                // offsets (0, 0)
  int row[kMaxOffsets], column[kMaxOffsets];  // the others, count - centres of them
  // The grid {-row_step, 0, row_step} x {-column_step, 0, column_step}, each once; row_step 0 where it is no such grid.
  int row_step, column_step;
};

struct Images {
  const void* data;  // [batch][channels][height][width]
  Scalar type;
  int batch, channels, height, width;
  __host__ __device__ int size() const { return channels * height * width; }
};

// Where selected values are read and written. Elements are moved bit for bit.
struct Codeword {
  const void* source;  // [batch][n]
  int element_bytes;   // 2, 4 or 8
  void* values;        // [batch][m]
  int64_t* indices;    // [batch][m]
};

// Whether keys of float64 must lie in `workspace`, batch * n of 8 bytes, because shared memory is too small.
bool needs_workspace(int n, bool exact, int device);

// bits [batch][n], float64 for float64 images and float32 otherwise.
cudaError_t self_information(const Images& images, double bandwidth, const Offsets& offsets, void* bits,
                             cudaStream_t stream);
cudaError_t select_informative(const Images& images, int m, double bandwidth, const Offsets& offsets,
                               const Codeword& out, uint64_t* workspace, cudaStream_t stream);
// score [batch][n]
cudaError_t top_m(const void* score, Scalar type, int batch, int n, int m, const Codeword& out, uint64_t* workspace,
                  cudaStream_t stream);
// values, indices [batch][m], mean [batch] -> image [batch][n]
cudaError_t scatter_codeword(const void* values, const int64_t* indices, const void* mean, int batch, int m, int64_t n,
                             int element_bytes, void* image, cudaStream_t stream);

// Whether float32 fixed point serves: a 3x3 grid with one centre, and a bandwidth whose inverse square is a float.
bool is_fast(const Images& images, double bandwidth, const Offsets& offsets);

}  // namespace csikernels::cuda
