// The levels of NF4 with internal linkage, for the instruction-set files.
#pragma once

#include "nf4_levels.h"

namespace csikernels::cpu {
namespace {

alignas(64) constexpr float kLevels[16] = {CSIKERNELS_NF4_LEVELS};

}  // namespace
}  // namespace csikernels::cpu
