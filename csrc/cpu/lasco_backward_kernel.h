// Training of small channel Transformers on the CPU, float32: a forward that keeps what the backward reads, and the
// backward, one slot's samples at a time.
//
// Formula: y = W_out E(W_in h + b + position) + b, E the encoder blocks (post- or pre-norm, relu or gelu), and the
// gradients of sum(grad * y) for every weight and for h.
//
// Layout: activations are feature-major, [feature][tokens padded to 16], so that LayerNorm, softmax, bias and residual
// run down the lanes. Every product is one form: a scalar of the left matrix, broadcast, times lanes of the right one.
//   forward     Y = W X           left W as torch stores it, [rows][K]
//   input       dX = W^T dY       left the same W read down its columns
//   weights     dW += dY X^T      left dY, right X token-major (transposed in registers, 16 x 16 at a time)
// so weights need no packing, and dW comes out as torch stores it.
//
// Operations of the paper's SAM (2 blocks, width 64, 32 tokens): 7.3 MFLOP forward and 14.7 backward a sample. Bytes:
// 205 KB of kept activations a sample are written once and read once, fetched ahead by the products in between; all
// else stays in the L2 cache. Ordinary stores: past the caches (vmovntps) the forward takes 13% longer. Floor on the
// bench machine for 8 slots x 256 samples: 45 GFLOP at 496 GFLOP/s, 91 ms. Reached, two threads: forward 39 us a sample
// and thread (76% of the peak; 35 us, 84%, where nothing is kept), backward 71 us (83%); 124 ms for a whole step with
// loss, autograd and AdamW, the reference's output known (73%), 112 ms through lasco_squared_error (81%), which keeps
// the activations in the caches and spares the loss its passes over memory.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

// What the weights' shapes tell, and what they do not. Weights travel as pointers in the order of
// csikernels.ops.lasco_layout.weight_names: input, position, 12 for each block, final norm if any, output.
struct TrainShape {
  int64_t tokens, features, layers, width, heads, feedforward;
  bool gelu, norm_first, final_norm;
  float eps;
};

namespace {

constexpr int64_t kTrainPad = 16;     // tokens and columns are padded to the widest vector, whatever the processor has
constexpr int64_t kTrainSamples = 4;  // samples side by side in train_backward: one pass over dW serves them all
constexpr int64_t kWeightsPerBlock = 12;

constexpr int64_t padded16(int64_t n) { return (n + kTrainPad - 1) / kTrainPad * kTrainPad; }

// Rows (of padded16(tokens) floats) of what the forward keeps for one sample.
struct Kept {
  int64_t qkv, p, context, normal1, rstd1, active, normal2, rstd2, block;  // offsets inside a block, rows of a block
  int64_t first, blocks, normal, rstd, last, rows;                         // offsets in the whole
};

inline Kept kept_rows(const TrainShape& z) {
  Kept k{};
  k.p = 3 * z.width;
  k.context = k.p + z.heads * z.tokens;
  k.normal1 = k.context + z.width;
  k.rstd1 = k.normal1 + z.width;
  k.active = k.rstd1 + 1;  // relu(a), or a itself for gelu
  k.normal2 = k.active + z.feedforward;
  k.rstd2 = k.normal2 + z.width;
  k.block = k.rstd2 + 1;
  k.blocks = z.norm_first ? 0 : z.width;  // `first`, the input of a post-norm stack, comes before
  k.normal = k.blocks + z.layers * k.block;
  k.rstd = k.normal + (z.final_norm ? z.width : 0);
  k.last = k.rstd + (z.final_norm ? 1 : 0);  // the output of a pre-norm stack without final norm
  k.rows = k.last + (z.norm_first && !z.final_norm ? z.width : 0);
  return k;
}

inline int64_t weight_count(const TrainShape& z) { return 5 + kWeightsPerBlock * z.layers + (z.final_norm ? 2 : 0); }

// One weight: [rows, columns], columns 0 for a vector.
struct WeightShape {
  int64_t rows, columns;
};

inline WeightShape weight_shape(const TrainShape& z, int64_t index) {
  const int64_t d = z.width, count = weight_count(z);
  if (index == 0) return {d, z.features};
  if (index == 1) return {d, 0};
  if (index == 2) return {z.tokens, d};
  if (index == count - 2) return {z.features, d};
  if (index == count - 1) return {z.features, 0};
  if (index - 3 >= kWeightsPerBlock * z.layers) return {d, 0};
  switch ((index - 3) % kWeightsPerBlock) {
    case 0:
      return {3 * d, d};
    case 1:
      return {3 * d, 0};
    case 2:
      return {d, d};
    case 4:
      return {z.feedforward, d};
    case 5:
      return {z.feedforward, 0};
    case 6:
      return {d, z.feedforward};
    default:
      return {d, 0};
  }
}

inline int64_t weight_floats(const TrainShape& z, int64_t index) {
  const WeightShape s = weight_shape(z, index);
  return s.columns == 0 ? s.rows : s.rows * s.columns;
}

// Whether a weight's gradient is summed transposed: the position, feature-major, and the feed-forward's second matrix.
inline bool summed_transposed(const TrainShape& z, int64_t index) {
  return index == 2 || (index >= 3 && index < 3 + kWeightsPerBlock * z.layers && (index - 3) % kWeightsPerBlock == 6);
}

// Floats of one weight's gradient while it is summed: a matrix, possibly transposed, with rows padded to 16, a vector
// with 16 partial sums per entry.
inline int64_t sum_floats(const TrainShape& z, int64_t index) {
  const WeightShape s = weight_shape(z, index);
  if (summed_transposed(z, index)) return s.columns * padded16(s.rows);
  return s.rows * (s.columns == 0 ? kTrainPad : padded16(s.columns));
}

inline int64_t widest(const TrainShape& z) {
  const int64_t d = 3 * z.width > z.features ? 3 * z.width : z.features;
  return z.feedforward > d ? z.feedforward : d;
}

inline int64_t forward_scratch_floats(const TrainShape& z) {
  return padded16(z.tokens) * (2 * padded16(z.features) + 3 * z.width + z.feedforward);
}

inline int64_t backward_scratch_floats(const TrainShape& z) {
  const int64_t t = padded16(z.tokens), sample = t * (2 * z.width + widest(z) + padded16(widest(z)));
  return kTrainSamples * sample + 3 * t * t;
}

}  // namespace

// What one slot's samples share.
struct TrainNetwork {
  TrainShape shape;
  const float* const* weights;
  const float* position;  // [width][padded16(tokens)]: position transposed, input bias added, the padding finite
};

// Up to kTrainSamples samples of one slot.
struct TrainBatch {
  int64_t count;
  const float* h[kTrainSamples];     // [tokens][features]
  const float* kept[kTrainSamples];  // as train_forward left them
  // What the batch after this one reads, to be fetched meanwhile: any readable place will do.
  const float* next[kTrainSamples];  // kept
  const float *next_grad[kTrainSamples], *next_shift[kTrainSamples];
  const float* grad[kTrainSamples];  // [tokens][features]
  float* grad_h[kTrainSamples];      // [tokens][features], or null
};

// train_forward: h, y [tokens][features]; kept: kept_rows().rows rows, whose blocks lie block_rows apart (0: one place
// for all, where nothing is kept); soon: five places that the caller reads or writes next, a sample each, to be
// fetched. train_backward: adds to sums[weight] (see sum_floats), or leaves the weights' gradients out where sums is
// null. train_collect: writes what was summed as torch stores the weights; grads in the order of sums.
#define CSIKERNELS_TRAIN_KERNELS                                                                                 \
  void train_forward(const TrainNetwork& network, const float* h, float* kept, int64_t block_rows, float* y,     \
                     const float* const* soon, float* scratch);                                                  \
  void train_backward(const TrainNetwork& network, const TrainBatch& batch, float* const* sums, float* scratch); \
  void train_collect(const TrainShape& shape, float* const* sums, float* const* grads);

namespace scalar {
CSIKERNELS_TRAIN_KERNELS
}
namespace avx2 {
CSIKERNELS_TRAIN_KERNELS
}
namespace avx512 {
CSIKERNELS_TRAIN_KERNELS
}
#undef CSIKERNELS_TRAIN_KERNELS

}  // namespace csikernels::cpu
