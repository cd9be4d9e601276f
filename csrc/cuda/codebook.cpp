// CUDA side of the codebook ops: checks, allocations, launches, registration.
//
// The search waits for nothing, and all memory is torch's, so it can be captured in a CUDA graph; an environment out of
// range stops the kernel, since to name it would mean to wait. Packing waits once, to refuse words without a direction.
#include "cuda/codebook.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "codebook_check.h"
#include "cuda/launch.h"
#include "dispatch.h"

namespace csikernels::cuda {
namespace {

using codebook::Layout;
using IndexAndSimilarity = std::tuple<at::Tensor, at::Tensor>;
using WordsAndPack = std::tuple<at::Tensor, at::Tensor>;

bool is_double(const at::Tensor& tensor) { return tensor.scalar_type() == at::kComplexDouble; }

// [K, D] or [E, K, D]
Layout layout_of(const at::Tensor& codewords) {
  return codebook::layout(codewords.dim() == 3 ? codewords.size(0) : 1, codewords.size(-2), codewords.size(-1));
}

at::Tensor plain(const at::Tensor& tensor) { return tensor.resolve_conj().resolve_neg().contiguous(); }

// codebook complex [K, D] or [E, K, D] -> words (a contiguous copy, or empty), packed uint8 (codebook.h)
WordsAndPack pack_cuda(const at::Tensor& codewords, c10::string_view precision, bool copy) {
  check_codewords(codewords, "codebook");
  check_precision(precision);
  check_copy(codewords, copy);
  if (!is_chosen(Backend::cuda) || !runs_on(codewords) || codewords.size(-1) > codebook::kMaxDimension) {
    using Signature = WordsAndPack(const at::Tensor&, c10::string_view, bool);
    return call_python<Signature>("codebook_pack", codewords, precision, copy);
  }
  const Launch launch(codewords);
  const Layout layout = layout_of(codewords);
  const at::Tensor from = plain(codewords);
  at::Tensor words = copy ? at::empty(from.sizes(), from.options()) : at::empty({0}, from.options());
  at::Tensor packed = at::empty({layout.bytes()}, from.options().dtype(at::kByte));
  at::Tensor refused = at::full({1}, -1, from.options().dtype(at::kLong));
  auto* bytes = write<char>(packed);
  const codebook::Pack pack{read<void>(from),
                            is_double(from),
                            layout,
                            copy ? write<void>(words) : nullptr,
                            reinterpret_cast<double*>(bytes),
                            bytes + layout.tiles_at(),
                            reinterpret_cast<float*>(bytes + layout.residuals_at()),
                            write<unsigned long long>(refused)};
  check_launch(codebook::pack(pack, launch.stream()), "codebook_pack");
  const int64_t word = refused.item<int64_t>();
  if (word >= 0) refuse_codeword(codewords, word);
  return {words, packed};
}

// h complex [N, D], words and packed from codebook_pack, environment int64 [N] -> index int64 [N], similarity float [N]
IndexAndSimilarity search_cuda(const at::Tensor& h, const at::Tensor& words, const at::Tensor& packed,
                               const std::optional<at::Tensor>& environment, c10::string_view precision) {
  check_codewords(words, "words");
  check_queries(h, words, environment);
  check_precision(precision);
  check_device(packed, "packed", words.device());
  if (!is_chosen(Backend::cuda) || !runs_on(h) || h.size(1) > codebook::kMaxDimension) {
    using Signature = IndexAndSimilarity(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const std::optional<at::Tensor>&, c10::string_view);
    return call_python<Signature>("codebook_search", h, words, packed, environment, precision);
  }
  const Layout layout = layout_of(words);
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.numel() == layout.bytes(),
              "packed: expected the CUDA layout of ", layout.bytes(), " bytes for codewords ", words.sizes(), ", got ",
              packed.numel(), " bytes packed from something else or by another backend");
  const Launch launch(h);
  const int64_t n = h.size(0), at_once = std::min(n, codebook::kRowsAtOnce);
  at::Tensor index = at::empty({n}, h.options().dtype(at::kLong));
  at::Tensor similarity = at::empty({n}, h.options().dtype(at::kFloat));
  if (n == 0) return {index, similarity};
  const at::Tensor queries = plain(h), codewords = plain(words);
  at::Tensor pack = packed.contiguous();
  if (reinterpret_cast<uintptr_t>(pack.const_data_ptr()) % 16 != 0) pack = pack.clone();  // a slice

  codebook::Search search{};
  search.h = read<void>(queries);
  search.h_is_double = is_double(queries);
  at::Tensor sorted, order;
  if (environment) {  // queries of one environment side by side: a block reads each of its books once
    std::tie(sorted, order) = at::sort(*environment, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    search.order = read<int64_t>(order);
    search.environment = read<int64_t>(sorted);
  }
  search.words = read<void>(codewords);
  search.words_are_double = is_double(codewords);
  search.exact = precision == "exact";
  search.layout = layout;
  const auto* bytes = read<char>(pack);
  search.factors = reinterpret_cast<const double*>(bytes);
  search.tiles = bytes + layout.tiles_at();
  search.residuals = reinterpret_cast<const float*>(bytes + layout.residuals_at());
  search.capacity = std::min(layout.words, codebook::kListed / at_once);
  at::Tensor bounds = at::empty({2, at_once}, h.options().dtype(at::kInt));
  at::Tensor list = at::empty({at_once, search.capacity}, h.options().dtype(at::kLong));
  search.best = write<uint32_t>(bounds);
  search.count = search.best + at_once;
  search.list = write<codebook::Candidate>(list);
  search.index = write<int64_t>(index);
  search.similarity = write<float>(similarity);
  for (; search.first < n; search.first += at_once) {
    search.rows = std::min(at_once, n - search.first);
    check_launch(cudaMemsetAsync(search.best, 0, bounds.nbytes(), launch.stream()), "codebook_search");
    check_launch(codebook::filter(search, launch.stream()), "codebook_search");
    check_launch(codebook::rescore(search, launch.stream()), "codebook_search");
  }
  return {index, similarity};
}

}  // namespace
}  // namespace csikernels::cuda

CSIKERNELS_CUDA_LIBRARY(m) {
  m.impl("codebook_pack", &csikernels::cuda::pack_cuda);
  m.impl("codebook_search", &csikernels::cuda::search_cuda);
}
