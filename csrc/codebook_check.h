// Checks of the codebook ops, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "check.h"

namespace csikernels {

inline void check_complex(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kComplexFloat || tensor.scalar_type() == at::kComplexDouble, name,
                   ": expected complex64 or complex128, got ", tensor.scalar_type());
}

inline void check_precision(c10::string_view precision) {
  TORCH_CHECK_VALUE(precision == "exact" || precision == "float32", "precision: expected 'exact' or 'float32', got '",
                    precision, "'");
}

// complex128 words are scaled as they are copied, so their pack does not go with the words as they were.
inline void check_copy(const at::Tensor& codebook, bool copy) {
  TORCH_CHECK_VALUE(copy || codebook.scalar_type() == at::kComplexFloat, "copy: expected True for ",
                    codebook.scalar_type(), " words, got False");
}

// codebook or words, complex [K, D] or [E, K, D]
inline void check_codewords(const at::Tensor& codewords, const char* name) {
  check_complex(codewords, name);
  TORCH_CHECK_VALUE((codewords.dim() == 2 || codewords.dim() == 3) && codewords.numel() > 0, name,
                    ": expected a non-empty [K, D] or [E, K, D], got shape ", codewords.sizes());
  TORCH_CHECK_VALUE(codewords.size(-2) < (int64_t(1) << 31) && codewords.size(-1) < (int64_t(1) << 30), name,
                    ": expected fewer than 2^31 codewords of fewer than 2^30 numbers, got shape ", codewords.sizes());
}

// h complex [N, D], environment int64 [N] where the words are [E, K, D]
inline void check_queries(const at::Tensor& h, const at::Tensor& words, const std::optional<at::Tensor>& environment) {
  check_complex(h, "h");
  TORCH_CHECK_VALUE(h.dim() == 2 && h.size(1) == words.size(-1), "h: expected [N, ", words.size(-1), "], got shape ",
                    h.sizes());
  check_device(h, "h", words.device());
  TORCH_CHECK_VALUE(environment.has_value() == (words.dim() == 3),
                    "environment: expected none for a codebook [K, D], int64 [N] for a codebook [E, K, D]");
  if (!environment) return;
  TORCH_CHECK_TYPE(environment->scalar_type() == at::kLong, "environment: expected int64, got ",
                   environment->scalar_type());
  TORCH_CHECK_VALUE(environment->dim() == 1 && environment->size(0) == h.size(0), "environment: expected shape [",
                    h.size(0), "], got ", environment->sizes());
  check_device(*environment, "environment", h.device());
}

// The codeword without a direction that packing met; `word` counts through all books.
[[noreturn]] inline void refuse_codeword(const at::Tensor& codebook, int64_t word) {
  const at::Tensor row = codebook.reshape({-1, codebook.size(-1)})[word];
  std::string name = "codeword " + std::to_string(word % codebook.size(-2));
  if (codebook.dim() == 3) name += " of environment " + std::to_string(word / codebook.size(-2));
  C10_THROW_ERROR(ValueError, "codebook: expected finite, non-zero codewords, but " + name +
                                  (row.ne(0).any().item<bool>() ? " holds NaN or infinity" : " is zero"));
}

}  // namespace csikernels
