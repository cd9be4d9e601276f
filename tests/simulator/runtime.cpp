// A CUDA runtime without a GPU: what nvcc's host code calls, each launch handed to Python
// (tests/simulator/__init__.py).
//
// Only what the launchers of csrc/cuda use is here; anything else fails to link, and is then to be added.
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "simulated_launch.h"

namespace {

// Runs a kernel, or returns something else than 0.
using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared, void** args);
using BufferListener = void (*)(const void* data, size_t bytes, int writable);  // bytes 0, data null: a new call

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

Launcher launcher = nullptr;
BufferListener listener = nullptr;
Configuration configuration;
cudaError_t last_error = cudaSuccess;

std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}

cudaError_t launch(const std::string& name, dim3 grid, dim3 block, void** args, size_t shared) {
  const unsigned grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
  if (launcher(name.c_str(), grid_size, block_size, shared, args) != 0) last_error = cudaErrorLaunchFailure;
  return last_error;
}

}  // namespace

namespace csikernels::cuda {

void begin_call() { listener(nullptr, 0, 0); }
void know_buffer(const void* data, size_t bytes, bool writable) { listener(data, bytes, writable); }

}  // namespace csikernels::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void csikernels_simulate(Launcher to, BufferListener buffers) {
  launcher = to;
  listener = buffers;
}

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}

EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  kernels()[host] = name;
}

// Constants are in the PTX.
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  std::memcpy(stream, &configuration.stream, sizeof(cudaStream_t));
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                      cudaStream_t) {
  return launch(kernels().at(kernel), grid, block, args, shared);
}

EXPORT cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(kernels().at(host), grid, block, args, shared);
}

// The simulator itself refuses more shared memory than the architecture has.
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT const char* cudaGetErrorString(cudaError_t) { return "the simulator found a fault"; }

EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that grids stay small
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 99 * 1024;  // sm_86 and sm_120, the least of all targets
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
