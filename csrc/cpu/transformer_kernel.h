// The standard channel Transformer (csikernels/reference/transformer.py) on raw pointers.
//
//   x = h W_in^T + b_in + position
//   per block, norms before (norm_first) or after the sums: x += proj(attention(qkv(x))), x += down(act(up(x)))
//   y = norm(x) W_out^T + b_out
//
// Layout: token rows, features side by side; residual stream, LayerNorm and softmax in float32. A chunk of 64 rows
// walks through a whole block, so that its activations stay in L2 (the widest, 64 x 2048 float32, is half of a
// megabyte) while the block's weights pass by from L3; blocks are the outer loop, so that these come from memory once
// per 2048 rows. Each thread takes whole samples through the network and meets the others only at the end.
//
// 20 blocks of width 512, feed-forward 2048, 64 samples of 32 tokens: 258 G operations in matrices and 2.7 G in
// attention; weights of 252, 126 or 63 MB, under 7 ms of memory time. Floors at the peaks of two Zen 5 cores (float32
// 496, bfloat16 954, int8 1771 G/s, attention in float32): 525, 276 and 151 ms. Reached through Python: 560 to 600, 288
// and 164 ms, that is 88 to 94, 96 and 92 percent. What remains is LayerNorm, softmax, quantisation and epilogues.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

constexpr int64_t kPanel = 32;  // output columns of a packed matrix that lie together

// y = x W^T + bias with W [out, in]. Panels: [out/32][in/g][32][g], zeros beyond out and in: for 32 outputs the g
// inputs that one dot-product instruction takes (float32 g = 1, bfloat16 2, int8 4), so that every instruction set
// reads the same bytes in order.
struct Linear {
  const void* panels;
  const float* bias;   // [out]
  const float* scale;  // [out], int8 only: of each row of W
  const int32_t*
      shift;  // [out to the next 32], int8 only: 128 times the sum of each row of W, since x goes in as x + 128
  int64_t in, out;
};

struct Norm {
  const float* weight;  // [width]; null where there is no such norm
  const float* bias;
};

struct Block {
  Linear qkv, proj, up, down;
  Norm norm1, norm2;
};

struct Network {
  int64_t tokens, features, width, heads, feedforward, layers;
  bool gelu, norm_first;
  float eps;
  Linear input;           // matrices outside the blocks are float32 or bfloat16
  const float* position;  // [tokens, width]
  const Block* blocks;    // [layers]
  Norm norm;
  Linear output;
};

// Threads that work on one call together, between barriers: for calls with fewer samples than threads.
struct Team {
  int64_t members = 1;
  // Calls body(argument, member) for every member, at the same time, and returns when all have returned.
  void (*run)(int64_t members, void (*body)(void* argument, int64_t member), void* argument) = nullptr;
};

namespace {

// Rows of a chunk: enough for the weights to be reused, few enough for the widest activation to stay in L2.
constexpr int64_t kChunkRows = 64;
// Rows of which one call keeps the residual stream, so that weights are read from memory once for all of them.
constexpr int64_t kGroupRows = 2048;

// Elements from row to row: an odd number of cache lines, so that rows side by side fall into different sets of L1.
inline int64_t row_stride(int64_t count, int64_t size) { return (((count * size + 63) / 64) | 1) * 64 / size; }

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Buffers of one call, carved from one allocation. Sizes are those of float32; narrower operands use a part.
struct Workspace {
  int64_t group, chunk;  // samples
  float* x;              // [group * tokens][row_stride(width)], the residual stream
  char* operand;         // [chunk * tokens] rows of max(width, features): left side of a product
  float* operand_scale;  // [chunk * tokens]
  float* wide;           // [chunk * tokens] rows of max(3 width, feedforward)
  char* hidden;          // [chunk * tokens] rows of feedforward: left side of `down`
  float* hidden_scale;   // [chunk * tokens]
  float* context;        // [chunk * tokens] rows of width
  // Of each member of the team:
  float* normal;   // one row of width
  float* queries;  // [panels of tokens][width / heads][32]
  float* values;   // [panels of width / heads][tokens][32]
  float* scores;   // [tokens][32]
  int64_t normal_size, queries_size, values_size, scores_size;
  int64_t bytes;

  Workspace(const Network& net, int64_t samples, int64_t members, char* base) : bytes(0) {
    const auto rows_of = [](int64_t rows) { return rows > 0 ? rows : 1; };
    group = rows_of(kGroupRows / net.tokens) < samples ? rows_of(kGroupRows / net.tokens) : samples;
    chunk = rows_of(kChunkRows / net.tokens) < group ? rows_of(kChunkRows / net.tokens) : group;
    const int64_t rows = chunk * net.tokens, head = net.width / net.heads;
    const auto carve = [&](int64_t floats) {
      char* at = base + bytes;
      bytes += (floats * 4 + 63) / 64 * 64;
      return at;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(carve(count)); };
    const auto widest = [](int64_t a, int64_t b) { return a > b ? a : b; };
    x = floats(group * net.tokens * row_stride(net.width, 4));
    operand = carve(rows * row_stride(widest(net.width, net.features), 4));
    operand_scale = floats(rows);
    wide = floats(rows * row_stride(widest(3 * net.width, net.feedforward), 4));
    hidden = carve(rows * row_stride(net.feedforward, 4));
    hidden_scale = floats(rows);
    context = floats(rows * row_stride(net.width, 4));
    normal_size = row_stride(net.width, 4);
    queries_size = panels_of(net.tokens) * head * kPanel;
    values_size = panels_of(head) * net.tokens * kPanel;
    scores_size = net.tokens * kPanel;
    normal = floats(members * normal_size);
    queries = floats(members * queries_size);
    values = floats(members * values_size);
    scores = floats(members * scores_size);
  }
};

}  // namespace

// h [samples, tokens, features] -> y of the same shape. A sample's result depends on nothing else in the call.
// workspace: as many bytes as Workspace says, 64-byte aligned
using Transformer = void(const Network& network, const Team& team, const float* h, int64_t samples, float* y,
                         char* workspace);

namespace scalar {
Transformer transformer_float32, transformer_bfloat16, transformer_int8;
}
namespace avx2 {
Transformer transformer_float32, transformer_bfloat16, transformer_int8;
}
namespace avx512 {
Transformer transformer_float32, transformer_bfloat16, transformer_int8;
}
namespace avx512_vnni {
Transformer transformer_int8;
}
namespace avx512_bf16 {
Transformer transformer_bfloat16, transformer_int8;
}

}  // namespace csikernels::cpu
