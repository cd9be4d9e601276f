#include "dispatch.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>

namespace csikernels {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"", "cpp", "cuda", "triton", "reference"};
std::atomic<Backend> chosen{Backend::best};

}  // namespace

void set_backend(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) {
      chosen.store(static_cast<Backend>(i), std::memory_order_relaxed);
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "backend: expected cpp, cuda, triton, reference or nothing, got '", name, "'");
}

Backend chosen_backend() { return chosen.load(std::memory_order_relaxed); }

}  // namespace csikernels
