#include <cuda_runtime_api.h>

#include "cuda/build_info.h"

namespace csikernels::cuda {

std::string runtime_version() {
  int version = 0;
  if (cudaRuntimeGetVersion(&version) != cudaSuccess) return "unknown";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<std::string> compiled_archs() {
  // nvcc's own list, so it cannot disagree with the machine code. It has no suffix: sm_90 and sm_90a are both 900.
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  std::vector<std::string> names;
  for (const int arch : kArchs) names.push_back("sm_" + std::to_string(arch / 10));
  return names;
}

}  // namespace csikernels::cuda
