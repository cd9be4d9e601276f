// csikernels::codebook_search on the CPU: checks, the division of the work among threads, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "codebook_check.h"
#include "cpu/capability.h"
#include "cpu/codebook_layout.h"
#include "cpu/codebook_search.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

using namespace codebook;
using IndexAndSimilarity = std::tuple<at::Tensor, at::Tensor>;

constexpr int64_t kProductsPerThread = 1 << 18;  // complex products below which another thread costs more than it saves
constexpr int64_t kGroupsPerThread = 8;          // with fewer groups of queries, threads divide the words instead
constexpr int64_t kRowsAtOnce = 258;  // queries that one thread holds prepared, and takes through the words at once

const Kernels& kernels_in_force() {
#if defined(__x86_64__)
  const Capability level = capability();
  if (level >= Capability::avx512_vnni) return avx512_vnni::codebook_kernels;
  if (level >= Capability::avx512) return avx512::codebook_kernels;
  if (level >= Capability::avx2) return avx2::codebook_kernels;
#endif
  return scalar::codebook_kernels;
}

// One call of the op, its tensors checked and taken apart.
struct Call {
  const Kernels& kernels;
  Header header;
  const void* h;
  bool h_is_double;
  const void* words;
  bool words_are_double;
  const uint8_t* packed;
  int64_t* index;
  float* similarity;

  Book book(int64_t e) const {
    const int64_t element = words_are_double ? sizeof(double) : sizeof(float);
    return {&header, static_cast<const char*>(words) + e * header.words * header.components * element, words_are_double,
            reinterpret_cast<const double*>(packed + header.factors_at()) + e * header.words,
            packed + header.tiles_at() + e * header.tiles * header.tile_bytes};
  }

  void put(int64_t row, int64_t word, double value) const {
    index[row] = word;
    similarity[row] = static_cast<float>(value);
  }
};

// Rows of h that use one book.
struct Share {
  int64_t book;
  const int64_t* rows;
  int64_t count;
};

// Runs task(0) .. task(count - 1), each on whichever thread is free.
template <class Task>
void run_tasks(int64_t count, int64_t threads, const Task& task) {
  parallel_pieces({count, 1}, std::min(count, threads), [&](Pieces& pieces) {
    for (int64_t i, end; pieces.next(i, end);) task(i);
  });
}

// What a query's search through some of the words finds, and how the index follows from it.
struct Exact {
  using Found = Candidates;
  static constexpr auto search = search_exact;
  static void put(const Call& call, const Book&, const Queries& queries, int64_t query, const Found& found) {
    const Candidates::Best best = found.best();
    call.put(queries.row[query], best.word, best.similarity);
  }
};

struct Single {
  using Found = Largest;
  static constexpr auto search = search_float32;
  static void put(const Call& call, const Book& book, const Queries& queries, int64_t query, const Found& found) {
    call.put(queries.row[query], found.word,
             similarity(book, queries.unit.get() + query * queries.components, found.word));
  }
};

Queries prepare(const Call& call, const Share& share, int64_t from, int64_t count) {
  return Queries(call.kernels, call.header.exact, call.h, call.h_is_double, call.header.components, share.rows + from,
                 count);
}

// Many queries: each task takes some through all words.
template <class Mode>
void divide_queries(const Call& call, const std::vector<Share>& shares, int64_t rows_per_task, int64_t threads) {
  std::vector<Share> tasks;
  for (const Share& share : shares) {
    for (int64_t from = 0; from < share.count; from += rows_per_task) {
      tasks.push_back({share.book, share.rows + from, std::min(rows_per_task, share.count - from)});
    }
  }
  run_tasks(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    const Book book = call.book(tasks[i].book);
    const Queries queries = prepare(call, tasks[i], 0, tasks[i].count);
    std::vector<typename Mode::Found> found(queries.count);
    Mode::search(call.kernels, book, queries, 0, call.header.tiles, found.data());
    for (int64_t q = 0; q < queries.count; ++q) Mode::put(call, book, queries, q, found[q]);
  });
}

// Few queries: each task takes all of a book's through some words; what they found is merged.
template <class Mode>
void divide_words(const Call& call, const std::vector<Share>& shares, int64_t threads) {
  const int64_t tiles = call.header.tiles, parts = std::min(threads, tiles);
  std::vector<Queries> queries;
  for (const Share& share : shares) queries.push_back(prepare(call, share, 0, share.count));
  const auto books = static_cast<int64_t>(shares.size());
  std::vector<std::vector<typename Mode::Found>> found(books * parts);
  run_tasks(books * parts, threads, [&](int64_t i) {
    const int64_t share = i / parts, part = i % parts;
    found[i].resize(queries[share].count);
    Mode::search(call.kernels, call.book(shares[share].book), queries[share], tiles * part / parts,
                 tiles * (part + 1) / parts, found[i].data());
  });
  for (int64_t share = 0; share < books; ++share) {
    const Book book = call.book(shares[share].book);
    for (int64_t q = 0; q < queries[share].count; ++q) {
      auto& merged = found[share * parts][q];
      for (int64_t part = 1; part < parts; ++part) merged.add(found[share * parts + part][q]);
      Mode::put(call, book, queries[share], q, merged);
    }
  }
}

template <class Mode>
void divide(const Call& call, const std::vector<Share>& shares, int64_t n) {
  const int64_t products = n * call.header.words * call.header.components / 2;
  const int64_t threads = useful_threads(products, kProductsPerThread);
  const int64_t group = call.kernels.group, groups = (n + group - 1) / group;
  if (threads > 1 && groups < kGroupsPerThread * threads) return divide_words<Mode>(call, shares, threads);
  const int64_t fair = (groups + threads - 1) / threads * group;
  divide_queries<Mode>(call, shares, std::min(fair, kRowsAtOnce / group * group), threads);
}

// The rows of each book that is used, in order; `rows` keeps them.
std::vector<Share> share_rows(const std::optional<at::Tensor>& environment, int64_t n, int64_t books,
                              std::vector<int64_t>& rows) {
  rows.resize(n);
  std::vector<int64_t> end(books + 1, 0);
  const int64_t* book = environment ? environment->const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t e = book == nullptr ? 0 : book[i];
    TORCH_CHECK_VALUE(0 <= e && e < books, "environment: expected values in 0..", books - 1, ", got ", e, " at row ",
                      i);
    ++end[e + 1];
  }
  for (int64_t e = 0; e < books; ++e) end[e + 1] += end[e];
  std::vector<Share> shares;
  for (int64_t e = 0; e < books; ++e) {
    if (end[e + 1] > end[e]) shares.push_back({e, rows.data() + end[e], end[e + 1] - end[e]});
  }
  for (int64_t i = 0; i < n; ++i) rows[end[book == nullptr ? 0 : book[i]]++] = i;
  return shares;
}

Header check_pack(const at::Tensor& words, const at::Tensor& packed, bool exact) {
  const int64_t books = words.dim() == 3 ? words.size(0) : 1;
  const Header expected = layout(exact, books, words.size(-2), 2 * words.size(-1));
  Header found{};
  const bool fits = packed.scalar_type() == at::kByte && packed.numel() == expected.bytes();
  if (fits) std::memcpy(&found, packed.const_data_ptr<uint8_t>(), sizeof(found));
  TORCH_CHECK(fits && found == expected, "packed: expected the C++ layout of ", expected.bytes(),
              " bytes for codewords ", words.sizes(), " in precision '", exact ? "exact" : "float32", "', got ",
              packed.numel(), " bytes packed from something else or by another backend");
  return expected;
}

// h complex [N, D], words and packed from codebook_pack, environment int64 [N] -> index int64 [N], similarity float [N]
IndexAndSimilarity search(const at::Tensor& h, const at::Tensor& words, const at::Tensor& packed,
                          const std::optional<at::Tensor>& environment, c10::string_view precision) {
  if (!is_chosen(Backend::cpp)) {
    using Signature = IndexAndSimilarity(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const std::optional<at::Tensor>&, c10::string_view);
    return call_python<Signature>("codebook_search", h, words, packed, environment, precision);
  }
  check_codewords(words, "words");
  check_queries(h, words, environment);
  check_precision(precision);
  const bool exact = precision == "exact";
  at::Tensor pack = packed.contiguous();
  if (reinterpret_cast<uintptr_t>(pack.const_data_ptr()) % alignof(double) != 0) pack = pack.clone();  // a slice
  const Header header = check_pack(words, pack, exact);

  const int64_t n = h.size(0);
  std::vector<int64_t> rows;
  const auto books = environment ? std::optional(environment->contiguous()) : std::nullopt;
  const std::vector<Share> shares = share_rows(books, n, header.books, rows);
  const at::Tensor queries = h.resolve_conj().resolve_neg().contiguous();
  const at::Tensor codewords = words.resolve_conj().resolve_neg().contiguous();
  at::Tensor index = at::empty({n}, h.options().dtype(at::kLong));
  at::Tensor similarity = at::empty({n}, h.options().dtype(at::kFloat));
  const Call call{kernels_in_force(),
                  header,
                  queries.const_data_ptr(),
                  queries.scalar_type() == at::kComplexDouble,
                  codewords.const_data_ptr(),
                  codewords.scalar_type() == at::kComplexDouble,
                  pack.const_data_ptr<uint8_t>(),
                  index.mutable_data_ptr<int64_t>(),
                  similarity.mutable_data_ptr<float>()};
  std::fill_n(call.index, n, -1);
  std::fill_n(call.similarity, n, std::numeric_limits<float>::quiet_NaN());
  if (n > 0) exact ? divide<Exact>(call, shares, n) : divide<Single>(call, shares, n);
  return {index, similarity};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("codebook_search", &csikernels::cpu::search); }
