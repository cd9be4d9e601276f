// CPU side of the self_information family: checks, the parallel loop over samples, registration.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/self_information_kernel.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using ValuesAndIndices = std::tuple<at::Tensor, at::Tensor>;

// Below this many scores a second thread costs more to wake than it saves.
constexpr int64_t kScoresPerThread = 4096;

// values[i] = row[indices[i]], bit for bit, whatever the type.
template <class Bits>
void gather(const void* row, const int64_t* indices, int64_t m, void* values) {
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(static_cast<Bits*>(values) + i, static_cast<const Bits*>(row) + indices[i], sizeof(Bits));
  }
}

void gather_row(const void* row, const int64_t* indices, int64_t m, int64_t element_size, void* values) {
  switch (element_size) {
    case 2:
      return gather<uint16_t>(row, indices, m, values);
    case 4:
      return gather<uint32_t>(row, indices, m, values);
    default:
      return gather<uint64_t>(row, indices, m, values);
  }
}

template <class Float>
void top_m_rows(const at::Tensor& score, int64_t m, const at::Tensor& source, at::Tensor& values, at::Tensor& indices) {
  const int64_t rows = score.size(0), n = score.size(1), element = source.element_size();
  const Float* scores = score.const_data_ptr<Float>();
  const auto* sources = static_cast<const char*>(source.const_data_ptr());
  auto* out = static_cast<char*>(values.mutable_data_ptr());
  auto* positions = indices.mutable_data_ptr<int64_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kScoresPerThread / n), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch(n * kTopMScratchBytes / sizeof(uint64_t));
    for (int64_t row = begin; row < end; ++row) {
      scalar::top_m(scores + row * n, n, m, positions + row * m, scratch.data());
      gather_row(sources + row * n * element, positions + row * m, m, element, out + row * m * element);
    }
  });
}

// score [B, N], source [B, N] or nothing -> values [B, m] of the source's type, indices [B, m] int64
ValuesAndIndices top_m(const at::Tensor& score, int64_t m, const std::optional<at::Tensor>& source) {
  if (!is_chosen(Backend::cpp)) {
    return call_python<ValuesAndIndices(const at::Tensor&, c10::SymInt, const std::optional<at::Tensor>&)>(
        "top_m", score, m, source);
  }
  check_floating(score, "score");
  check_dim(score, "score", 2, "[B, N]");
  check_range(m, "m", 1, score.size(1));
  const at::Tensor& from = source ? *source : score;
  check_floating(from, "source");
  check_same_shape(from, "source", score, "score");
  check_device(from, "source", score.device());

  at::Tensor values = at::empty({score.size(0), m}, from.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor indices = at::empty({score.size(0), m}, score.options().dtype(at::kLong));
  if (score.scalar_type() == at::kDouble) {
    top_m_rows<double>(score.contiguous(), m, from.contiguous(), values, indices);
  } else {
    top_m_rows<float>(score.to(at::kFloat).contiguous(), m, from.contiguous(), values,
                      indices);  // widening keeps order
  }
  return {values, indices};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("top_m", &csikernels::cpu::top_m); }
