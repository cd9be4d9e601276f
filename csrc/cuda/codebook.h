// Layout of a packed codebook on a GPU, and the launchers. Raw device pointers; checks are in codebook.cpp.
//
// The packed buffer of E books of K words of D complex numbers:
//   float64 [E * K]   factors that bring each word to unit norm
//   bf16 tiles        [E][tiles][chunks] of 8 KB: 128 words by 16 complex numbers, unit words in the order in which the
//                     lanes of mma.m16n8k16 take them: [2 steps][8 groups of 16 words][32 lanes][8 numbers]
//   float32 [E * tiles]  the largest residual |w - bf16(w)| of a tile, rounded up
// Position p of a book holds word p * step mod K.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codebook_order.h"

namespace csikernels::cuda::codebook {

constexpr int kTileWords = 128;
constexpr int kChunk = 16;  // complex numbers of each word in one stage of the pipeline
constexpr int kChunkBytes = kTileWords * kChunk * 4;
constexpr int kMaxDimension = 256;     // queries of more do not fit into shared memory
constexpr int64_t kRowsAtOnce = 4096;  // queries of one launch
constexpr int64_t kListed = 1 << 22;   // words that the lists of one launch hold together: 32 MB

struct Layout {
  int64_t books, words, dimension;
  int64_t step;

  __host__ __device__ int chunks() const { return static_cast<int>((dimension + kChunk - 1) / kChunk); }
  __host__ __device__ int64_t tiles() const { return (words + kTileWords - 1) / kTileWords; }  // per book
  int64_t tiles_at() const { return (8 * books * words + 15) / 16 * 16; }
  int64_t residuals_at() const { return tiles_at() + books * tiles() * chunks() * kChunkBytes; }
  int64_t bytes() const { return residuals_at() + 4 * books * tiles(); }
  __device__ int64_t word_at(int64_t position) const { return position * step % words; }
};

inline Layout layout(int64_t books, int64_t words, int64_t dimension) {
  return {books, words, dimension, spreading_step(words)};
}

// from [E * K][D] -> words (scaled by powers of two where they are complex128; null leaves them out) and the packed
// buffer. *refused becomes the first word that is zero or not finite, and stays all ones where there is none.
struct Pack {
  const void* from;
  bool is_double;
  Layout layout;
  void* words;
  double* factors;
  void* tiles;
  float* residuals;
  unsigned long long* refused;
};
cudaError_t pack(const Pack& pack, cudaStream_t stream);

struct Candidate {
  uint32_t position;
  float upper;  // bound of its similarity, times the norm of the scaled query
};

struct Search {
  const void* h;  // [rows of the op][D]
  bool h_is_double;
  const int64_t* order;        // [rows of the op] their rows of h by environment, or null
  const int64_t* environment;  // [rows of the op] in that order, or null
  const void* words;
  bool words_are_double;
  bool exact;
  Layout layout;
  const double* factors;
  const void* tiles;
  const float* residuals;
  int64_t first, rows;  // what this launch searches, kRowsAtOnce at most
  uint32_t* best;       // [rows] zeroed: the bits of a lower bound of the best similarity, scaled as `upper`
  uint32_t* count;      // [rows] zeroed: candidates found
  Candidate* list;      // [rows][capacity]
  int64_t capacity;
  int64_t* index;     // [rows of the op]
  float* similarity;  // [rows of the op]
};
// Fills best, count and list; then index and similarity from these.
cudaError_t filter(const Search& search, cudaStream_t stream);
cudaError_t rescore(const Search& search, cudaStream_t stream);

}  // namespace csikernels::cuda::codebook
