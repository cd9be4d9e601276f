// The whole forward of a small channel Transformer on one sample, on raw pointers. The instruction-set files include
// this and nothing of torch.
//
//   y = output(encoder(input(h) + position)), L encoder blocks (attention, feed-forward, two LayerNorms, residuals)
//
// Layout. Activations are [feature][token], tokens padded to whole vectors (lasco_tile.h); the padding repeats the last
// token and is never a key. A product broadcasts its weights, so these are read as they are stored, [N][K] row by row:
// nothing is packed, and a bank whose weights change needs no other path. bfloat16 weights meet activations rounded to
// bfloat16: as pairs of features for vdpbf16ps where the machine has it (a pair of k is 4 adjacent bytes of a stored
// row), as float32 values elsewhere (the matrix is widened first). Sums, biases, residuals, LayerNorm and softmax are
// float32.
//
// Operations per sample: 2 T (2 F d + L (4 d^2 + 2 d ff + 2 T d)), 7.3 M at the standard size (T = 32, F = d = 64, L =
// 2, ff = 256). Bytes: the network's weights once, 440 KB in float32 and 225 KB in bfloat16; everything else stays in
// the first two cache levels. The weights to come are fetched while a product runs, across products and into the next
// network (WeightStream): without that, a pass over weights in the third cache level takes 1.6 times as long.
//
// 64 slots, one sample each, on two Zen 5 cores (float32 496 GFLOP/s, bfloat16 954): 940 MFLOP, so at best 1.9 and
// 1.0 ms, 29.6 and 15.4 us a network and core. One thread takes 33.9 and 18.5 us with the weights in the third cache
// level (87% and 83%), 31.8 and 17.1 us on the same weights over and over (93% and 90%). What is left is memory, and
// softmax and LayerNorm.
#pragma once

#include <cstdint>

#include "lasco_sizes.h"

namespace csikernels::cpu {

// Bytes that one forward needs for its activations, whatever the instruction set.
int64_t sam_workspace(const SamSizes& sizes);

//   weights   the flat list of one network in the order of csikernels.ops.lasco_layout.weight_names, each contiguous
//   next      that of the network to run after this one (its first weights are fetched towards the end)
//   h         [T][F]
//   y         [T][F], out
//   workspace sam_workspace(sizes) bytes, aligned to 64
using SamForward = void (*)(const SamSizes& sizes, const void* const* weights, const void* const* next, const float* h,
                            float* y, void* workspace);

// output += alpha * shift with shift = base - reference_output, which it replaces; all [n].
using SamCorrect = void (*)(float* output, const float* base, float* reference_to_shift, float alpha, int64_t n);

namespace scalar {
void sam_forward(const SamSizes&, const void* const*, const void* const*, const float*, float*, void*);
void sam_correct(float*, const float*, float*, float, int64_t);
}  // namespace scalar
namespace avx2 {
void sam_forward(const SamSizes&, const void* const*, const void* const*, const float*, float*, void*);
void sam_correct(float*, const float*, float*, float, int64_t);
}  // namespace avx2
namespace avx512 {
void sam_forward(const SamSizes&, const void* const*, const void* const*, const float*, float*, void*);
void sam_correct(float*, const float*, float*, float, int64_t);
}  // namespace avx512
namespace avx512_bf16 {
void sam_forward(const SamSizes&, const void* const*, const void* const*, const float*, float*, void*);  // bfloat16
}  // namespace avx512_bf16

}  // namespace csikernels::cpu
