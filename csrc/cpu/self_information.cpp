// CPU side of the self_information family: checks, the parallel loop over samples, registration.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/self_information_select.h"
#include "dispatch.h"
#include "self_information_check.h"

namespace csikernels::cpu {
namespace {

using ValuesAndIndices = std::tuple<at::Tensor, at::Tensor>;

// Below this many elements a second thread costs more to wake than it saves: they take about 4 us.
constexpr int64_t kElementsPerThread = 8192;

int64_t rows_per_thread(int64_t elements) {
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements));
}

// Calls `work(bits type)` with the unsigned integer as wide as an element, for moving values bit for bit.
template <class Work>
void with_bits(int64_t element_size, const Work& work) {
  switch (element_size) {
    case 2:
      return work(uint16_t());
    case 4:
      return work(uint32_t());
    default:
      return work(uint64_t());
  }
}

// values[i] = row[indices[i]], bit for bit, whatever the type.
void gather_row(const char* row, const int64_t* indices, int64_t m, int64_t element_size, char* values) {
  with_bits(element_size, [&](auto bits) {
    for (int64_t i = 0; i < m; ++i) {
      std::memcpy(values + i * sizeof(bits), row + indices[i] * sizeof(bits), sizeof(bits));
    }
  });
}

// For each row: make a worker per thread, let it rank the row, and gather the values from `source`.
template <class MakeWorker>
ValuesAndIndices rank_rows(int64_t rows, int64_t n, int64_t m, const at::Tensor& source, const MakeWorker& make) {
  const at::Tensor from = source.contiguous();
  at::Tensor values = at::empty({rows, m}, from.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor indices = at::empty({rows, m}, from.options().dtype(at::kLong));
  const int64_t element = from.element_size();
  const auto* sources = static_cast<const char*>(from.const_data_ptr());
  auto* out = static_cast<char*>(values.mutable_data_ptr());
  auto* positions = indices.mutable_data_ptr<int64_t>();
  const int64_t piece = rows_per_thread(n);
  parallel_pieces({rows, piece}, useful_threads(rows, piece), [&](Pieces& pieces) {
    auto worker = make();
    for (int64_t begin, end; pieces.next(begin, end);) {
      for (int64_t row = begin; row < end; ++row) {
        worker(row, positions + row * m);
        gather_row(sources + row * n * element, positions + row * m, m, element, out + row * m * element);
      }
    }
  });
  return {values, indices};
}

// float16 and bfloat16 as float32, which keeps their order and differences.
at::Tensor widened(const at::Tensor& h) { return (h.element_size() < 4 ? h.to(at::kFloat) : h).contiguous(); }

Neighbourhood neighbourhood_of(const at::Tensor& h, double bandwidth, at::IntArrayRef offsets) {
  return {h.size(1), h.size(2), h.size(3), bandwidth, {offsets.data(), offsets.size()}};
}

// h [B, C, H, W], offsets (row, column, row, column, ...) -> bits [B, C, H, W]
at::Tensor self_information(const at::Tensor& h, double bandwidth, at::IntArrayRef offsets) {
  check_image(h, bandwidth, offsets);
  if (!is_chosen(Backend::cpp)) {
    return call_python<at::Tensor(const at::Tensor&, double, at::IntArrayRef)>("self_information", h, bandwidth,
                                                                               offsets);
  }
  const at::Tensor images = widened(h);
  at::Tensor bits = at::empty(h.sizes(), images.options());
  const int64_t n = h.numel() / std::max<int64_t>(1, h.size(0));
  if (n == 0) return bits;
  const Neighbourhood neighbourhood = neighbourhood_of(h, bandwidth, offsets);
  const auto run = [&]<class Float>(Float) {
    const Float* from = images.const_data_ptr<Float>();
    Float* to = bits.mutable_data_ptr<Float>();
    at::parallel_for(0, h.size(0), rows_per_thread(n), [&](int64_t begin, int64_t end) {
      Informer informer(neighbourhood, 1);
      for (int64_t b = begin; b < end; ++b) informer.information(from + b * n, to + b * n);
    });
  };
  images.scalar_type() == at::kDouble ? run(double()) : run(float());
  return bits;
}

// h [B, C, H, W], source like h or nothing -> values [B, m] of the source's type, indices [B, m] int64
ValuesAndIndices select_informative(const at::Tensor& h, int64_t m, double bandwidth, at::IntArrayRef offsets,
                                    const std::optional<at::Tensor>& source) {
  check_image(h, bandwidth, offsets);
  const int64_t n = h.size(1) * h.size(2) * h.size(3);
  check_selection(h, "h", m, n, "C*H*W", source);
  const at::Tensor& from = source ? *source : h;
  if (!is_chosen(Backend::cpp)) {
    return call_python<ValuesAndIndices(const at::Tensor&, c10::SymInt, double, at::IntArrayRef,
                                        const std::optional<at::Tensor>&)>("select_informative", h, m, bandwidth,
                                                                           offsets, source);
  }
  const at::Tensor images = widened(h);
  const Neighbourhood neighbourhood = neighbourhood_of(h, bandwidth, offsets);
  const auto run = [&]<class Float>(Float) {
    const Float* samples = images.const_data_ptr<Float>();
    return rank_rows(h.size(0), n, m, from, [&] {
      return [&, informer = Informer(neighbourhood, m)](int64_t row, int64_t* indices) mutable {
        informer.select(samples + row * n, indices);
      };
    });
  };
  return images.scalar_type() == at::kDouble ? run(double()) : run(float());
}

// score [B, N], source [B, N] or nothing -> values [B, m] of the source's type, indices [B, m] int64
ValuesAndIndices top_m(const at::Tensor& score, int64_t m, const std::optional<at::Tensor>& source) {
  check_floating(score, "score");
  check_dim(score, "score", 2, "[B, N]");
  const int64_t n = score.size(1);
  check_selection(score, "score", m, n, "N", source);
  const at::Tensor& from = source ? *source : score;
  if (!is_chosen(Backend::cpp)) {
    return call_python<ValuesAndIndices(const at::Tensor&, c10::SymInt, const std::optional<at::Tensor>&)>(
        "top_m", score, m, source);
  }
  const at::Tensor scores = widened(score);
  if (scores.scalar_type() == at::kDouble) {
    const double* rows = scores.const_data_ptr<double>();
    return rank_rows(score.size(0), n, m, from, [&] {
      return [&, largest = LargestDoubles(n, m)](int64_t row, int64_t* indices) mutable {
        largest.find(rows + row * n, indices);
      };
    });
  }
  const float* rows = scores.const_data_ptr<float>();
  return rank_rows(score.size(0), n, m, from, [&] {
    return [&, ranking = Ranking(n, m, INT32_MIN, INT32_MAX)](int64_t row, int64_t* indices) mutable {
      ranking.kernels.descending_keys(rows + row * n, n, ranking.keys());
      ranking.smallest(indices);
    };
  });
}

// values, indices [B, m], mean [B] -> [B, *shape]
at::Tensor scatter_codeword(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& mean,
                            at::IntArrayRef shape) {
  check_codeword(values, indices, mean, shape);
  if (!is_chosen(Backend::cpp)) {
    const std::vector<c10::SymInt> symbolic(shape.begin(), shape.end());
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef)>(
        "scatter_codeword", values, indices, mean, symbolic);
  }
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  const int64_t batch = values.size(0), m = values.size(1);
  const at::Tensor from = values.contiguous(), places = indices.contiguous(), fill = mean.contiguous();
  const int64_t* const where = places.const_data_ptr<int64_t>();
  uint64_t furthest = 0;  // as unsigned numbers, negative ones are far out
  for (int64_t i = 0; i < batch * m; ++i) furthest = std::max(furthest, static_cast<uint64_t>(where[i]));
  if (batch * m > 0 && furthest >= static_cast<uint64_t>(n)) {
    const int64_t wrong = *std::find_if(where, where + batch * m, [&](int64_t i) { return i < 0 || i >= n; });
    TORCH_CHECK_VALUE(false, "indices: expected 0..", n - 1, ", the elements of ", shape, ", got ", wrong);
  }
  std::vector<int64_t> sizes{batch};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  at::Tensor out = at::empty(sizes, values.options().memory_format(at::MemoryFormat::Contiguous));
  with_bits(values.element_size(), [&]<class Bits>(Bits) {
    const auto* codeword = static_cast<const Bits*>(from.const_data_ptr());
    const auto* background = static_cast<const Bits*>(fill.const_data_ptr());
    auto* image = static_cast<Bits*>(out.mutable_data_ptr());
    at::parallel_for(0, batch, rows_per_thread(n), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::fill_n(image + b * n, n, background[b]);
        for (int64_t i = b * m; i < (b + 1) * m; ++i) image[b * n + where[i]] = codeword[i];
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) {
  m.impl("self_information", &csikernels::cpu::self_information);
  m.impl("select_informative", &csikernels::cpu::select_informative);
  m.impl("top_m", &csikernels::cpu::top_m);
  m.impl("scatter_codeword", &csikernels::cpu::scatter_codeword);
}
