// Internal ops for tests and benches: `csikernels_probe::vector_helper` and `csikernels_probe::peak`.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/capability.h"
#include "cpu/probe_kernel.h"

namespace csikernels::cpu {
namespace {

VectorHelper* vector_helper_in_force() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return avx512::vector_helper;
  if (capability() >= Capability::avx2) return avx2::vector_helper;
#endif
  return scalar::vector_helper;
}

// x float32, contiguous, any shape -> the helper of the capability in force on each element
at::Tensor vector_helper(const std::string& name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x: expected float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(), "x: expected a contiguous tensor");
  at::Tensor out = at::empty_like(x);
  const bool known =
      vector_helper_in_force()(name.c_str(), x.const_data_ptr<float>(), x.numel(), out.mutable_data_ptr<float>());
  TORCH_CHECK_VALUE(known, "name: no vector helper is called '", name, "'");
  return out;
}

Spin* spin_in_force(const std::string& kind) {
#if defined(__x86_64__)
  if (kind == "int8" && capability() >= Capability::avx512_vnni) return avx512_vnni::spin_int8;
  if (kind == "bfloat16" && capability() >= Capability::avx512_bf16) return avx512_bf16::spin_bfloat16;
  if (kind == "float32" && capability() >= Capability::avx512) return avx512::spin_float32;
  if (kind == "float32" && capability() >= Capability::avx2) return avx2::spin_float32;
#endif
  return kind == "float32" ? scalar::spin_float32 : nullptr;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Operations per second of all of torch's threads together: best of several rounds, since the machine is shared.
double peak_of(Spin* spin) {
  constexpr int64_t rounds = 1 << 21;
  double best = 0;
  for (int attempt = 0; attempt < 24; ++attempt) {
    std::atomic<int64_t> done{0};
    const auto start = std::chrono::steady_clock::now();
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) done += spin(rounds);
    });
    best = std::max(best, static_cast<double>(done) / seconds_since(start));
  }
  return best;
}

Sum* sum_in_force() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return avx512::sum;
  if (capability() >= Capability::avx2) return avx2::sum;
#endif
  return scalar::sum;
}

// Bytes per second that all threads together read from 512 MiB, more than any cache holds.
double read_bandwidth() {
  constexpr int64_t chunk = 1 << 16, chunks = 1 << 11;
  const std::vector<float> memory(chunk * chunks, 1.0f);
  std::vector<float> sums(chunks);
  Sum* const sum = sum_in_force();
  double best = 0;
  for (int attempt = 0; attempt < 4; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) sums[c] = sum(memory.data() + c * chunk, chunk);
    });
    best = std::max(best, static_cast<double>(memory.size() * sizeof(float)) / seconds_since(start));
  }
  TORCH_INTERNAL_ASSERT(sums[0] == static_cast<float>(chunk));
  return best;
}

// Measured peak of this machine at the capability in force: operations ("float32", "bfloat16", "int8") or bytes read
// from memory ("dram") per second.
double peak(const std::string& kind) {
  if (kind == "dram") return read_bandwidth();
  Spin* spin = spin_in_force(kind);
  TORCH_CHECK_VALUE(spin != nullptr, "kind: '", kind, "' has no peak at the capability ",
                    capability_name(capability()));
  return peak_of(spin);
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY(csikernels_probe, m) {
  m.def("vector_helper(str name, Tensor x) -> Tensor", &csikernels::cpu::vector_helper);
  m.def("peak(str kind) -> float", &csikernels::cpu::peak);
}
