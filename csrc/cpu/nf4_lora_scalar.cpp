// nf4_lora in portable C++, four floats at a time.
#include "cpu/nf4_lora_kernel.h"
#include "cpu/nf4_lora_levels.h"
#include "cpu/vec_scalar.h"

namespace csikernels::cpu::scalar {
namespace {

struct Decoder {
  CSIKERNELS_INLINE void operator()(const uint8_t* codes, F32 out[8]) const {
    for (int v = 0; v < 8; ++v) {
      const int first = codes[2 * v], second = codes[2 * v + 1];
      out[v] = {FloatLanes{kLevels[first >> 4], kLevels[first & 15], kLevels[second >> 4], kLevels[second & 15]}};
    }
  }
};

}  // namespace

#include "cpu/nf4_lora_body.h"
#include "cpu/nf4_lora_plain.h"

}  // namespace csikernels::cpu::scalar
