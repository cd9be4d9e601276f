// What nvcc built into this binary. No torch headers, so that build_info.cu compiles with nvcc alone.
#pragma once

#include <string>
#include <vector>

namespace csikernels::cuda {

// CUDA runtime that the kernels are linked against, as "13.0".
std::string runtime_version();

// Architectures with machine code in this binary, as "sm_80", lowest first.
std::vector<std::string> compiled_archs();

}  // namespace csikernels::cuda
