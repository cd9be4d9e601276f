// What this processor *and its operating system* can run, read once.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace csikernels::cpu {

// Each level includes the ones before it. No processor has avx512_bf16 without avx512_vnni.
enum class Capability : int {
  scalar,
  avx2,         // avx2, fma, f16c
  avx512,       // avx512 f, bw, dq, vl
  avx512_vnni,  // int8 dot products
  avx512_bf16,  // bfloat16 dot products
};

// The level in force: what the machine has, lowered by CSIKERNELS_CPU_CAPABILITY (which never raises it).
// Throws std::invalid_argument when that variable names no level.
Capability capability();

// Lowers the level in force for this process (for tests), or lifts it again, to where it started at most.
void set_capability(std::string_view name);

std::string_view capability_name(Capability level);

// The names of all levels that set_capability can put in force, lowest first.
std::vector<std::string> available_capabilities();

}  // namespace csikernels::cpu
