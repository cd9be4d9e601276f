// The three networks of an instruction set without dot products of its own; included by transformer_<isa>.cpp inside
// its namespace.
#pragma once

#include "cpu/transformer_dots.h"
// After the products.
#include "cpu/transformer_body.h"

void transformer_float32(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                         char* workspace) {
  forward<FloatDot, FloatDot, false>(net, team, h, samples, y, workspace);
}

void transformer_bfloat16(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                          char* workspace) {
  forward<WideBf16Dot, WideBf16Dot, true>(net, team, h, samples, y, workspace);
}

void transformer_int8(const Network& net, const Team& team, const float* h, int64_t samples, float* y,
                      char* workspace) {
  forward<WideBf16Dot, WideInt8Dot, true>(net, team, h, samples, y, workspace);
}
