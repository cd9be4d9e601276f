// Kernels of the NF4 + LoRA layer on raw pointers. The instruction-set files include this and nothing of torch.
//
//   y = x W^T + scaling (x A^T) B^T + bias      x [M, K], W [N, K] in NF4, A [r, K], B [N, r]
//
// Layout of W: bitsandbytes' blocks over the flattened row-major elements; element e is the high (e even) or low nibble
// of byte e / 2, its scale absmax[e / block]. 4.5 bits per weight at 64 elements a block.
//
// Few tokens (M <= kFewTokens): every code is read once, its level looked up in a register and multiplied with the
//   tokens' elements there; a block's scale multiplies the partial sums.
//   Bytes: N K (1/2 + 4 / block) + the adapter. Operations per 64 weights, bfloat16: 6 for the levels, 3 per token.
// 9 to 16 tokens, bfloat16: rows of W along the lanes, decoded in registers between the products, see
//   nf4_lora_avx512_bf16_rows.cpp. Operations per 64 weights: 2.1 per token (products and scales), 3.5 per 8 tokens for
//   the levels, 2 to bring rows side by side.
// More: a panel of W is dequantised into L2 and multiplied with x packed as [step][token], tokens along the lanes.
//   t = x A^T is taken while x is packed, and the sums start from B t.
//   Operations: 2 M N (K + r); per panel and 1,024 tokens 9 more vector operations for 64 weights.
//
// On 2 cores of a Zen 5 (peaks: bfloat16 954 GFLOP/s, float32 496, DRAM 39 GB/s) the floor is the codes' bytes over the
// bandwidth of the cache that holds them for few tokens, and the operations over the peak for many. Reached through the
// public call, bfloat16, rank 16:
//   M = 1: 85 to 95 GB/s of codes and scales out of L3, three quarters of what the look-ups' ports allow (4.2 cycles
//     for 64 bytes of codes where 13 operations on 4 ports take 3.25; fixed costs of a call are 5 microseconds).
//   M = 16, 4096 x 4096: 0.84 of the peak. M = 128, 1280 x 5120: 0.95. M = 1024, 4096 x 4096: 0.97 (these two measured
//     before panels were made longer, codes fetched ahead and rows addressed by few pointers).
// On 2 cores of a Zen 4 (bfloat16 471 GFLOP/s: one 512-bit product a cycle): M = 16: 0.83, M = 128: 0.90, M = 1024:
//   0.92 to 0.95, of which the product is 95 % of the time.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

// An NF4 weight [n, k].
struct NF4Matrix {
  const uint8_t* packed;  // [ceil(n k / 2)]
  const float* absmax;    // [ceil(n k / block)]
  int64_t n, k;
  int log_block;  // log2 of the elements per block, 5..12
};

// What the next panel is decoded from: `rows` rows of codes and scales.
struct Ahead {
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  int64_t codes_row = 0, scales_row = 0;    // bytes and floats from one row to the next
  int64_t code_lines = 0, scale_lines = 0;  // cache lines of a row
  int64_t rows = 0;
};

// c[row][token] = or += sum over steps of w[row][step] * x[step][token], tokens along the lanes of a vector.
// A step is 4 bytes of both operands: one float32, or two bfloat16 that are multiplied and added in pairs. With `wide`
// it is 8 bytes and a lane holds half of a token's sum: the token's lanes 2i, 2i + 1 are to be added at the end.
struct Product {
  const void* w;  // row r, step s at w + r * w_row + s * w_step; these strides and the next in units of 4 bytes
  int64_t w_row, w_step;
  const void* x;  // group g (one vector of tokens), step s at x + g * x_group + s * x_step
  int64_t x_group, x_step;
  float* c;  // row r, group g at c + r * c_row + g * c_group
  int64_t c_row, c_group;
  int64_t rows, groups, steps;
  bool accumulate, wide;
  Ahead ahead = {};  // brought into L2 between the steps: decoding would wait for it, the products do not
};

// y [tokens, n] = x W^T + B t for rows begin..end of W. x and B have the kernel's element type (float32 or bfloat16).
struct FewTokens {
  NF4Matrix weight;  // k a multiple of 8
  int64_t tokens;    // 1..kFewTokens
  const void* x;     // [tokens, permuted_k(k)], see Permute
  const float* t;    // [tokens, rank]: scaling * x A^T
  const void* lora_b;
  int64_t rank;
  float* y;
  int64_t begin, end;
};

// y [tokens, n] = x W^T + B t + bias for rows begin..end of W, all operands bfloat16, rows of W along the lanes.
struct RowLanes {
  NF4Matrix weight;    // k and the block multiples of 64
  int64_t tokens;      // 1..kTokensByRows
  const uint32_t* x;   // [eight tokens][k / 2][8], see PackForRows
  const uint32_t* t;   // scaling * x A^T as pairs of neighbours, [eight tokens][rank / 2][8]
  const void* lora_b;  // [n, rank]
  int64_t rank;        // even
  const float* bias;   // [n] or nothing
  void* y;
  int64_t begin, end;
};

constexpr int64_t kFewTokens = 8;
constexpr int64_t kTokensByRows = 16;
constexpr int64_t kTokensAtOnce = 8;
constexpr int64_t kMaxLanes = 16;

// Elements of one permuted token: whole groups of 128.
static inline int64_t permuted_k(int64_t k) { return (k + 127) / 128 * 128; }

// Elements first .. first + count of the flattened weight: level times absmax in float32, or that rounded to bfloat16.
using Dequantize = void(const NF4Matrix& weight, int64_t first, int64_t count, float* out);
using DequantizeBF16 = void(const NF4Matrix& weight, int64_t first, int64_t count, uint16_t* out);
// Codes and scales of `count` floats in blocks of `block` (the last may be shorter); the position of the first value
// that is NaN or infinite, or -1.
using Quantize = int64_t(const float* weight, int64_t count, int64_t block, uint8_t* packed, float* absmax);

// Rows n0 .. n0 + rows, columns k0 .. k0 + columns, rows row_units apart (in units of 4 bytes); filled up with zeros to
// a multiple of the kernel's panel_multiple. The order of the steps is the kernel's, the same for all panels.
using Panel = void(const NF4Matrix& weight, int64_t n0, int64_t rows, int64_t k0, int64_t columns, void* out,
                   int64_t row_units);
// Rows of `bytes` bytes, row_bytes apart -> x of a Product with `steps` steps of 4 bytes, [group][step][lane]; rows and
// bytes that are missing are 0. pack_for_panel puts the steps into the order of a panel.
using Pack = void(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps, bool wide, void* out);
using Multiply = void(const Product& product);
// c [rows][c_row] (tokens along c_row) -> out [tokens][out_row], elements of the kernel's type, plus bias [rows] if
// any.
using StoreTransposed = void(const float* c, int64_t c_row, int64_t rows, int64_t tokens, const float* bias, bool wide,
                             void* out, int64_t out_row);
// sums + bias (if any), elements of the kernel's type.
using Finish = void(const float* sums, const float* bias, int64_t count, void* out);
// t [tokens, rank] = scaling * x A^T; x [tokens, k] and A [rank, k] of the kernel's element type.
using Inner = void(const void* x, int64_t tokens, int64_t k, const void* lora_a, int64_t rank, float scaling, float* t);
// x [tokens, k] in the order in which MultiplyFew looks levels up, filled up with zeros to permuted_k(k).
using Permute = void(const void* x, int64_t tokens, int64_t k, void* out);
using MultiplyFew = void(const FewTokens& job);
// Up to 8 tokens, x [tokens, k], as pairs in the order in which MultiplyByRows looks levels up, [k / 2][8]; tokens that
// are missing are 0.
using PackForRows = void(const void* x, int64_t tokens, int64_t k, uint32_t* out);
using MultiplyByRows = void(const RowLanes& job);

#define CSIKERNELS_NF4_FLOAT32      \
  Dequantize dequantize;            \
  DequantizeBF16 dequantize_bf16;   \
  Quantize quantize;                \
  Panel panel;                      \
  Pack pack;                        \
  Multiply multiply;                \
  StoreTransposed store_transposed; \
  Finish finish;                    \
  Inner inner;                      \
  MultiplyFew multiply_few;

namespace scalar {
CSIKERNELS_NF4_FLOAT32
}
namespace avx2 {
CSIKERNELS_NF4_FLOAT32
}
namespace avx512 {
CSIKERNELS_NF4_FLOAT32
}
#undef CSIKERNELS_NF4_FLOAT32

namespace avx512_bf16 {
Panel panel;
Pack pack, pack_for_panel;
Multiply multiply;
StoreTransposed store_transposed;
Finish finish;
Inner inner;
Permute permute;
MultiplyFew multiply_few;
PackForRows pack_for_rows;
MultiplyByRows multiply_by_rows;
}  // namespace avx512_bf16

}  // namespace csikernels::cpu
