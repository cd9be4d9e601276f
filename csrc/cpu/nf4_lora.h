// What the CPU files of nf4_lora share: the kernels of the capability in force, and the checks of a weight's parts.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/nf4_lora_kernel.h"
#include "cpu/scratch.h"

namespace csikernels::cpu::nf4_lora {

// Quantising and dequantising.
struct Codec {
  Dequantize* dequantize;
  DequantizeBF16* dequantize_bf16;
  Quantize* quantize;
};
Codec codec_in_force();

// The product for one element type.
struct Layer {
  at::ScalarType type;     // float32 or bfloat16
  int64_t lanes;           // tokens per group
  int64_t step;            // elements per step of 4 bytes
  int64_t panel_multiple;  // a panel's columns are filled up to a multiple of this
  bool wide;               // whether `wide` products exist
  int64_t few_multiple;    // MultiplyFew needs k to be a multiple of this
  Permute* permute;        // or nothing, where MultiplyFew takes x as it is
  Panel* panel;
  Pack *pack, *pack_for_panel;
  Multiply* multiply;
  StoreTransposed* store_transposed;
  Finish* finish;
  Inner* inner;
  MultiplyFew* multiply_few;
  PackForRows* pack_for_rows = nullptr;  // this and the next, or nothing
  MultiplyByRows* multiply_by_rows = nullptr;

  int64_t element_bytes() const { return 4 / step; }
};
Layer float_layer();
// The layer for elements of x's type: bfloat16 where the capability has it, float32 for everything else.
Layer layer_for(at::ScalarType x);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The raw weight [n, k], after checking its parts; keeps no reference to them.
NF4Matrix matrix(const at::Tensor& packed, const at::Tensor& absmax, int64_t n, int64_t k, int64_t block_size);

at::Tensor dequantize(const NF4Matrix& weight, at::ScalarType type);

at::Tensor linear(const at::Tensor& x, const NF4Matrix& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                  double scaling, const std::optional<at::Tensor>& bias);

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Gradients linear_backward(const at::Tensor& grad, const at::Tensor& x, const NF4Matrix& weight,
                          const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
                          std::array<bool, 4> wanted);

}  // namespace csikernels::cpu::nf4_lora
