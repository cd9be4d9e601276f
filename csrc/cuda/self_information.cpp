// CUDA side of the self_information family: checks, allocations, launches, registration.
//
// Nothing here waits for the GPU, and all memory is torch's, so the ops can be captured in a CUDA graph. An index
// beyond the image in scatter_codeword stops the kernel, as in torch's own indexing: to name it would mean to wait.
#include "cuda/self_information.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "dispatch.h"
#include "neighbourhood.h"
#include "self_information_check.h"

namespace csikernels::cuda {
namespace {

using ValuesAndIndices = std::tuple<at::Tensor, at::Tensor>;

// The neighbourhood as the kernels take it.
Offsets offsets_of(at::IntArrayRef pairs, int64_t height, int64_t width) {
  const Neighbours neighbours = neighbours_of({pairs.data(), pairs.size()}, height, width);
  Offsets offsets{};
  offsets.count = static_cast<int>(pairs.size() / 2);
  offsets.centres = static_cast<int>(neighbours.centres);
  for (size_t k = 0; k < neighbours.other.size(); ++k) {
    offsets.row[k] = static_cast<int>(neighbours.other[k].first);
    offsets.column[k] = static_cast<int>(neighbours.other[k].second);
  }
  if (neighbours.is_grid) {
    offsets.row_step = static_cast<int>(neighbours.rows);
    offsets.column_step = static_cast<int>(neighbours.columns);
  }
  return offsets;
}

Images images_of(const at::Tensor& h) {
  return {.data = read<void>(h),
          .type = scalar_of(h.scalar_type()),
          .batch = static_cast<int>(h.size(0)),
          .channels = static_cast<int>(h.size(1)),
          .height = static_cast<int>(h.size(2)),
          .width = static_cast<int>(h.size(3))};
}

// Outputs of a selection, and what the kernel writes them through.
struct Selection {
  at::Tensor source, values, indices, workspace;
  Codeword codeword;

  Selection(const at::Tensor& from, int64_t batch, int64_t m)
      : source(from.contiguous()),
        values(at::empty({batch, m}, source.options().memory_format(at::MemoryFormat::Contiguous))),
        indices(at::empty({batch, m}, source.options().dtype(at::kLong))) {
    codeword = {.source = read<void>(source),
                .element_bytes = static_cast<int>(source.element_size()),
                .values = write<void>(values),
                .indices = write<int64_t>(indices)};
  }

  // Keys of float64 in global memory, where shared memory cannot hold them.
  uint64_t* spill(int64_t batch, int64_t n, bool exact) {
    if (!needs_workspace(static_cast<int>(n), exact, indices.get_device())) return nullptr;
    workspace = at::empty({batch, n}, indices.options());
    return write<uint64_t>(workspace);
  }
};

// h [B, C, H, W], offsets (row, column, row, column, ...) -> bits [B, C, H, W]
at::Tensor self_information_cuda(const at::Tensor& h, double bandwidth, at::IntArrayRef offsets) {
  check_image(h, bandwidth, offsets);
  const int64_t n = h.size(1) * h.size(2) * h.size(3);
  if (!is_chosen(Backend::cuda) || !runs_on(h) || n > kMaxElements || offsets.size() > 2 * kMaxOffsets) {
    return call_python<at::Tensor(const at::Tensor&, double, at::IntArrayRef)>("self_information", h, bandwidth,
                                                                               offsets);
  }
  const Launch launch(h);
  const at::Tensor image = h.contiguous();
  const bool wide = h.scalar_type() == at::kDouble;
  at::Tensor bits = at::empty(
      h.sizes(), h.options().dtype(wide ? at::kDouble : at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  if (bits.numel() == 0) return bits;
  const Offsets neighbours = offsets_of(offsets, h.size(2), h.size(3));
  check_launch(self_information(images_of(image), bandwidth, neighbours, write<void>(bits), launch.stream()),
               "self_information");
  return bits;
}

// h [B, C, H, W], source like h or nothing -> values [B, m] of the source's type, indices [B, m] int64
ValuesAndIndices select_informative_cuda(const at::Tensor& h, int64_t m, double bandwidth, at::IntArrayRef offsets,
                                         const std::optional<at::Tensor>& source) {
  check_image(h, bandwidth, offsets);
  const int64_t batch = h.size(0), n = h.size(1) * h.size(2) * h.size(3);
  check_selection(h, "h", m, n, "C*H*W", source);
  if (!is_chosen(Backend::cuda) || !runs_on(h) || n > kMaxElements || offsets.size() > 2 * kMaxOffsets) {
    return call_python<ValuesAndIndices(const at::Tensor&, c10::SymInt, double, at::IntArrayRef,
                                        const std::optional<at::Tensor>&)>("select_informative", h, m, bandwidth,
                                                                           offsets, source);
  }
  const Launch launch(h);
  const at::Tensor image = h.contiguous();
  Selection out(source.value_or(h), batch, m);
  if (batch == 0) return {out.values, out.indices};
  const Images images = images_of(image);
  const Offsets neighbours = offsets_of(offsets, h.size(2), h.size(3));
  uint64_t* const spilled = is_fast(images, bandwidth, neighbours) ? nullptr : out.spill(batch, n, true);
  check_launch(
      select_informative(images, static_cast<int>(m), bandwidth, neighbours, out.codeword, spilled, launch.stream()),
      "select_informative");
  return {out.values, out.indices};
}

// score [B, N], source [B, N] or nothing -> values [B, m] of the source's type, indices [B, m] int64
ValuesAndIndices top_m_cuda(const at::Tensor& score, int64_t m, const std::optional<at::Tensor>& source) {
  check_floating(score, "score");
  check_dim(score, "score", 2, "[B, N]");
  const int64_t batch = score.size(0), n = score.size(1);
  check_selection(score, "score", m, n, "N", source);
  if (!is_chosen(Backend::cuda) || !runs_on(score) || n > kMaxElements) {
    return call_python<ValuesAndIndices(const at::Tensor&, c10::SymInt, const std::optional<at::Tensor>&)>(
        "top_m", score, m, source);
  }
  const Launch launch(score);
  const at::Tensor scores = score.contiguous();
  Selection out(source.value_or(score), batch, m);
  if (batch == 0) return {out.values, out.indices};
  uint64_t* const spilled = out.spill(batch, n, score.scalar_type() == at::kDouble);
  check_launch(top_m(read<void>(scores), scalar_of(scores.scalar_type()), static_cast<int>(batch), static_cast<int>(n),
                     static_cast<int>(m), out.codeword, spilled, launch.stream()),
               "top_m");
  return {out.values, out.indices};
}

// values, indices [B, m], mean [B] -> [B, *shape]
at::Tensor scatter_codeword_cuda(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& mean,
                                 at::IntArrayRef shape) {
  check_codeword(values, indices, mean, shape);
  if (!is_chosen(Backend::cuda) || !runs_on(values)) {
    const std::vector<c10::SymInt> symbolic(shape.begin(), shape.end());
    return call_python<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef)>(
        "scatter_codeword", values, indices, mean, symbolic);
  }
  const Launch launch(values);
  const int64_t batch = values.size(0);
  std::vector<int64_t> sizes{batch};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  at::Tensor image = at::empty(sizes, values.options().memory_format(at::MemoryFormat::Contiguous));
  if (image.numel() == 0) return image;
  const at::Tensor from = values.contiguous(), places = indices.contiguous(), fill = mean.contiguous();
  check_launch(scatter_codeword(read<void>(from), read<int64_t>(places), read<void>(fill), static_cast<int>(batch),
                                static_cast<int>(values.size(1)), image.numel() / batch,
                                static_cast<int>(values.element_size()), write<void>(image), launch.stream()),
               "scatter_codeword");
  return image;
}

}  // namespace
}  // namespace csikernels::cuda

CSIKERNELS_CUDA_LIBRARY(m) {
  m.impl("self_information", &csikernels::cuda::self_information_cuda);
  m.impl("select_informative", &csikernels::cuda::select_informative_cuda);
  m.impl("top_m", &csikernels::cuda::top_m_cuda);
  m.impl("scatter_codeword", &csikernels::cuda::scatter_codeword_cuda);
}
