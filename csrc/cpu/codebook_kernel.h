// Kernels of the codebook search on raw pointers. The instruction-set files include this and nothing of torch.
//
// Formula. For unit rows q (query) and w (codeword) of D complex numbers, find the word with the largest |w^H q|. In
// real form a word is one row (Re, Im interleaved) of 2 D numbers and a query two, (Re, Im) for the real part of the
// product and (Im, -Re) for the imaginary part.
//
// Layout. Words lie in tiles of 16, one word per 32-bit lane:
//   int8 tile     [steps][16][4] bytes, component c of a word in step c / 4, stored as value + 128, padded with 128;
//                 then [16] float32 scale^2 and [16] float32 residual norm
//   float32 tile  [2 D][16] unit words
// A lane past the last word has scale 0 and residual -inf (int8) or zeros (float32), so that it never wins. All
// instruction sets read the same layout; only the integer range of a query differs (query_level).
//
// Bound. A word is w = s w8 + r with |r| = e exactly known, a query q = t q8 + p with |p| = E. By Cauchy-Schwarz,
//   | |w^H q| - s t |w8^H q8| | <= e (1 + E) + E,
// so a word whose upper bound lies below the lower bound of another one cannot be the best. Everything is compared in
// units of t, and rounded towards keeping a word.
//
// Cost for N queries, K words: 8 N K D operations; K (2 D + 8) bytes of tiles per group of queries, from L2, where a
// block of words stays while the queries pass. On two Zen 5 cores (1771 GOP/s in int8, 496 GFLOP/s, 39 GB/s of DRAM),
// D = 128:
//   N = 1024, K = 65536  68.7 G operations, floor 39 ms; the search takes 38 to 41 ms, 5%
//                        of it for the comparison with the best (the cores clock higher at times)
//   N = 16,   K = 65536  17.3 MB of tiles, floor 0.44 ms from DRAM and 0.61 ms for the operations; 0.67 to 0.73 ms
//   N = 1,    K = 4096   1.1 MB of tiles from L2 and L3; 11 us, of which the call through Python is 5
// float32 tiles take 4 times the bytes and, at N = 1024, K = 65536, 138 ms at the peak.
#pragma once

#include <cstdint>

namespace csikernels::cpu::codebook {

constexpr int kTileWords = 16;
constexpr int kMaxGroup = 6;      // queries that one pass over the words serves
constexpr int kBlockTiles = 32;   // words that stay in L2 while all queries pass: 128 KB of int8 at D = 128
constexpr int kSettleAbove = 24;  // words kept between blocks before they are scored one by one
constexpr int kCapacity = kSettleAbove + kBlockTiles * kTileWords;
constexpr float kRounding = 0x1p-18f;  // relative slack that covers every float32 rounding of a bound

// How long the tiles of a book with rows of 2 D components are.
constexpr int64_t int8_steps(int64_t components) { return (components + 3) / 4; }
constexpr int64_t int8_tile_bytes(int64_t components) { return (int8_steps(components) * 4 + 8) * kTileWords; }
constexpr int64_t float32_tile_bytes(int64_t components) { return components * 4 * kTileWords; }

// Up to kMaxGroup queries against one book in int8. Bounds are in units of each query's scale.
struct Int8Group {
  const int8_t* rows;  // [steps][queries][2][4]
  int queries;
  int32_t start[kMaxGroup][2];    // -128 * sum of the row: what the offset of the words adds, taken back
  float slope[kMaxGroup];         // (1 + E) / t, times a word's residual
  float error[kMaxGroup];         // E / t
  float best[kMaxGroup];          // in, out: lower bound of the best similarity / t
  int32_t count[kMaxGroup];       // in, out: words listed so far
  uint32_t* position[kMaxGroup];  // [kCapacity] where in the tiles each listed word lies
  float* upper[kMaxGroup];        // [kCapacity] its upper bound
};

// Up to kMaxGroup queries against one book in float32: the best word of each lane so far.
struct Float32Group {
  const float* rows;  // [components][queries][2]
  int queries;
  float best[kMaxGroup][kTileWords];    // in, out: squared similarity, -1 at first
  int32_t tile[kMaxGroup][kTileWords];  // in, out: the first tile that reached it
};

struct Kernels {
  int group;        // queries per pass
  int query_level;  // largest magnitude of an int8 query component
  // Keeps the words of tiles [first, last) that may beat the best, and raises the best. At most kBlockTiles tiles.
  void (*filter)(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, Int8Group& group);
  // Running maximum over tiles [first, last).
  void (*maximum)(const uint8_t* tiles, int64_t components, int64_t first, int64_t last, Float32Group& group);
  // similarity[i] = |w^H q| with w = words + index[i] * components, in float32; query [2][components].
  void (*score)(const float* query, const float* words, int64_t components, const int64_t* index, int64_t n,
                float* similarity);
};

}  // namespace csikernels::cpu::codebook

namespace csikernels::cpu {
namespace scalar {
extern const codebook::Kernels codebook_kernels;
}
namespace avx2 {
extern const codebook::Kernels codebook_kernels;
}
namespace avx512 {
extern const codebook::Kernels codebook_kernels;
}
namespace avx512_vnni {
extern const codebook::Kernels codebook_kernels;
}
}  // namespace csikernels::cpu
