// The order of the words in a packed codebook, on every device.
#pragma once

#include <cstdint>
#include <numeric>

namespace csikernels {

// Neighbouring words of a structured book (a DFT grid) have neighbouring similarities. In order they would creep up to
// the maximum and each would pass as the best so far; a step near the golden section of K spreads them evenly.
inline int64_t spreading_step(int64_t words) {
  auto step = static_cast<int64_t>(0.6180339887498949 * static_cast<double>(words)) | 1;
  while (step > 1 && std::gcd(step, words) != 1) step -= 2;
  return step % words == 0 ? 1 : step;
}

}  // namespace csikernels
