// The entries of an instruction set without bfloat16 dot products: bfloat16 weights are widened. Included by
// lasco_<isa>.cpp inside its namespace, after lasco_forward_body.h.
#pragma once

void sam_forward(const SamSizes& sizes, const void* const* weights, const void* const* next, const float* h, float* y,
                 void* workspace) {
  const auto run = sizes.bfloat16 ? run_network<Rounded> : run_network<Exact>;
  run(sizes, weights, next, h, y, workspace);
}

void sam_correct(float* output, const float* base, float* reference_to_shift, float alpha, int64_t n) {
  correct(output, base, reference_to_shift, alpha, n);
}
