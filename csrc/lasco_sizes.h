// The architecture of a small channel Transformer, as kernels of every device read it.
#pragma once

#include <cstdint>

namespace csikernels {

struct SamSizes {
  int64_t tokens, features, layers, width, heads, feedforward;
  bool gelu, norm_first, final_norm, bfloat16;
  float eps;

  int64_t weights() const { return 5 + 12 * layers + (final_norm ? 2 : 0); }  // entries of the flat weight list
};

}  // namespace csikernels
