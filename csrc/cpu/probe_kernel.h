// What the tests and benches ask of the machine itself: the vector helpers one by one, and how fast a loop of nothing
// but multiply-adds, dot products or reads can run here.
#pragma once

#include <cstdint>

namespace csikernels::cpu {

// out[i] = helper(x[i]) for i < n; false when no helper has this name.
using VectorHelper = bool(const char* name, const float* x, int64_t n, float* out);
// Runs `rounds` of independent operations in registers and returns how many were done (a multiply-add counts two).
using Spin = int64_t(int64_t rounds);
// The sum of p[0..n), n a multiple of 128: as fast as memory gives it.
using Sum = float(const float* p, int64_t n);

namespace scalar {
VectorHelper vector_helper;
Spin spin_float32;
Sum sum;
}  // namespace scalar

namespace avx2 {
VectorHelper vector_helper;
Spin spin_float32;
Sum sum;
}  // namespace avx2

namespace avx512 {
VectorHelper vector_helper;
Spin spin_float32;
Sum sum;
}  // namespace avx512

namespace avx512_vnni {
Spin spin_int8;
}
namespace avx512_bf16 {
Spin spin_bfloat16;
}

}  // namespace csikernels::cpu
