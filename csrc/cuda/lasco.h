// Launchers of lasco_forward. Raw device pointers; checks are in lasco.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lasco_sizes.h"

namespace csikernels::cuda {

constexpr int kMaxLayers = 16;                    // the weights' pointers are arguments of a kernel, 4 KB at most
constexpr int kMaxWeights = 7 + 12 * kMaxLayers;  // entries of the flat weight list
enum SamKind : int { kReferenceSam, kProxySam, kSamKinds };

struct LascoCall {
  SamSizes sizes;
  const float* h_in;                            // [samples][T][F]
  const float* base_output;                     // [samples][T][F]
  const int64_t* slot;                          // [samples]
  const float* alpha;                           // [slots]
  const void* weights[kSamKinds][kMaxWeights];  // one reference; the proxies stacked over slots; 16-byte aligned
  float* output;                                // [samples][T][F]
  float* shift;                                 // [samples][T][F], base_output - reference; null: not wanted
  int64_t samples, slots;
  int64_t entries;  // of the flat weight list
};

// Whether the sizes are those of Fig. 10's SAMs, for which there are kernels that keep all activations on chip.
bool is_tiled(const SamSizes& sizes);
cudaError_t lasco_tiled(const LascoCall& call, cudaStream_t stream);

// Any sizes. `workspace` holds `blocks` times general_workspace() floats.
int64_t general_workspace(const SamSizes& sizes);
cudaError_t lasco_general(const LascoCall& call, float* workspace, int blocks, cudaStream_t stream);

}  // namespace csikernels::cuda
