// What the sources need of a compiler, compiled by setup.py before anything else: Python's headers, C++20, and on
// x86-64 files with an instruction set of their own (gcc 10 or later).
#pragma once

#include <Python.h>

#include <version>

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bf16")
#include <immintrin.h>
inline __m512 compiler_probe(__m512 sum, __m512bh a) { return _mm512_dpbf16_ps(sum, a, a); }
#endif
