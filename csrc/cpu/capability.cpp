#include "cpu/capability.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace csikernels::cpu {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf does not exist
  return r;
}

constexpr bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// The register state that the operating system saves on a context switch. CPUID alone is not enough: a kernel or a
// hypervisor may leave AVX-512 state unsaved on a processor that has it.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

Capability detect() {
  const Registers base = cpuid(1, 0);
  const bool osxsave = bit(base.ecx, 27);
  if (!osxsave) return Capability::scalar;
  const uint64_t state = xcr0();
  constexpr uint64_t kYmm = 0x6;   // SSE, AVX
  constexpr uint64_t kZmm = 0xE6;  // and opmask, upper halves of zmm0-15, zmm16-31
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

  const bool fma = bit(base.ecx, 12), avx = bit(base.ecx, 28), f16c = bit(base.ecx, 29);
  const bool avx2 = avx && fma && f16c && bit(leaf7.ebx, 5);
  if (!avx2 || (state & kYmm) != kYmm) return Capability::scalar;
  const bool avx512 = bit(leaf7.ebx, 16) && bit(leaf7.ebx, 17) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31);
  if (!avx512 || (state & kZmm) != kZmm) return Capability::avx2;
  if (!bit(leaf7.ecx, 11)) return Capability::avx512;
  return bit(leaf7_1.eax, 5) ? Capability::avx512_bf16 : Capability::avx512_vnni;
}

#else

Capability detect() { return Capability::scalar; }

#endif

Capability parse(std::string_view name, const char* source) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) {
    std::string expected;
    for (const auto known : kNames) expected += (expected.empty() ? "" : ", ") + std::string(known);
    throw std::invalid_argument(std::string(source) + ": expected one of " + expected + ", got '" + std::string(name) +
                                "'");
  }
  return static_cast<Capability>(found - kNames.begin());
}

// The highest level of this process. Read once; an exception leaves it to be read again.
Capability highest() {
  static const Capability level = [] {
    const char* asked = std::getenv("CSIKERNELS_CPU_CAPABILITY");
    if (asked == nullptr || *asked == '\0') return detect();
    return std::min(detect(), parse(asked, "CSIKERNELS_CPU_CAPABILITY"));
  }();
  return level;
}

std::atomic<Capability>& in_force() {
  static std::atomic<Capability> level{highest()};
  return level;
}

}  // namespace

Capability capability() { return in_force().load(std::memory_order_relaxed); }

void set_capability(std::string_view name) {
  in_force().store(std::min(highest(), parse(name, "capability")), std::memory_order_relaxed);
}

std::string_view capability_name(Capability level) { return kNames[static_cast<size_t>(level)]; }

std::vector<std::string> available_capabilities() {
  return {kNames.begin(), kNames.begin() + static_cast<int>(highest()) + 1};
}

}  // namespace csikernels::cpu
