// csikernels::codebook_pack on the CPU: checks, scales and quantises the codewords, and lays them out in tiles.
//
// Bytes: the codewords once in, their copy (if any) and the tiles once out; two passes over a row in L1 between them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "codebook_check.h"
#include "cpu/codebook_layout.h"
#include "cpu/codebook_rows.h"
#include "dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace csikernels::cpu {
namespace {

using namespace codebook;
using WordsAndPack = std::tuple<at::Tensor, at::Tensor>;

constexpr int64_t kComponentsPerThread = 1 << 15;  // fewer are packed faster than a thread wakes

// A tensor, not initialised, on huge pages where the system has them: the search walks through all of the pack and
// jumps about in the words, so fewer pages miss the TLB less; and a pack of about the size of the L2 cache fits into it
// only if its memory is contiguous, or by luck.
at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t page = size_t{1} << 21;
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  const size_t whole = (bytes + page - 1) / page * page;
  if (bytes >= page / 4) {
    if (void* const data = std::aligned_alloc(page, whole)) {
      madvise(data, whole, MADV_HUGEPAGE);  // only a hint
      return at::from_blob(data, sizes, [](void* memory) { std::free(memory); }, options);
    }
  }
#endif
  return at::empty(sizes, options);  // or its error, where no memory is left
}

// One codeword on its way into a tile, with the scratch that one thread reuses.
struct Row {
  explicit Row(int64_t components) : unit(components), values((components + 3) / 4 * 4) {}
  std::vector<double> unit;
  std::vector<int8_t> values;  // the padding stays 0
};

// Copies a codeword (where `word` is not null) and sets its factor; false where it has no direction. complex128 words
// are scaled by a power of two so that no factor leaves float64's range. unit = factor * word.
template <class Float>
bool take_word(const Float* from, int64_t components, Float* word, double& factor, double* unit) {
  int exponent = 0;
  if (!scale_row(from, components, unit, exponent)) return false;
  const double inverse = 1 / norm(unit, components);
  if constexpr (std::is_same_v<Float, double>) {
    std::memcpy(word, unit, components * sizeof(Float));
    factor = inverse;
  } else {
    if (word != nullptr && word != from) std::memcpy(word, from, components * sizeof(Float));
    factor = inverse * std::ldexp(1.0, -exponent);
  }
  for (int64_t c = 0; c < components; ++c) unit[c] *= inverse;
  return true;
}

void put_int8(uint8_t* tile, int lane, Row& row, int64_t components) {
  const Quantized q = quantize(row.unit.data(), components, largest_level(components), row.values.data());
  const int64_t steps = int8_steps(components);
  for (int64_t step = 0; step < steps; ++step) {
    uint8_t* four = tile + (step * kTileWords + lane) * 4;
    for (int i = 0; i < 4; ++i) four[i] = static_cast<uint8_t>(row.values[step * 4 + i] + 128);
  }
  auto* numbers = reinterpret_cast<float*>(tile + steps * 4 * kTileWords);
  numbers[lane] =
      q.scale * q.scale * (1 + 4 * kRounding);  // rounded up: what is compared with a bound may be too large
  numbers[kTileWords + lane] = q.residual;
}

void pad_int8(uint8_t* tile, int lane, int64_t components) {
  const int64_t steps = int8_steps(components);
  for (int64_t step = 0; step < steps; ++step) std::memset(tile + (step * kTileWords + lane) * 4, 128, 4);
  auto* numbers = reinterpret_cast<float*>(tile + steps * 4 * kTileWords);
  numbers[lane] = 0;
  numbers[kTileWords + lane] = -std::numeric_limits<float>::infinity();
}

void put_float32(uint8_t* tile, int lane, const double* unit, int64_t components) {
  auto* numbers = reinterpret_cast<float*>(tile) + lane;
  for (int64_t c = 0; c < components; ++c)
    numbers[c * kTileWords] = unit == nullptr ? 0.0f : static_cast<float>(unit[c]);
}

// Packs all tiles of all books, and copies the words where `words` is not null; returns the first codeword without a
// direction, or the number of codewords.
template <class Float>
int64_t pack_tiles(const Header& header, const Float* from, Float* words, uint8_t* packed) {
  const int64_t count = header.books * header.words, components = header.components;
  auto* factors = reinterpret_cast<double*>(packed + header.factors_at());
  std::atomic<int64_t> refused{count};
  const int64_t grain = std::max<int64_t>(1, kComponentsPerThread / (kTileWords * components));
  at::parallel_for(0, header.books * header.tiles, grain, [&](int64_t begin, int64_t end) {
    Row row(components);
    for (int64_t t = begin; t < end; ++t) {
      uint8_t* tile = packed + header.tiles_at() + t * header.tile_bytes;
      const int64_t book = t / header.tiles, first = t % header.tiles * kTileWords;
      for (int lane = 0; lane < kTileWords; ++lane) {
        if (first + lane >= header.words) {
          header.exact ? pad_int8(tile, lane, components) : put_float32(tile, lane, nullptr, components);
          continue;
        }
        const int64_t word = book * header.words + word_at(header, first + lane);
        Float* const copy = words == nullptr ? nullptr : words + word * components;
        if (!take_word(from + word * components, components, copy, factors[word], row.unit.data())) {
          int64_t before = refused.load();
          while (word < before && !refused.compare_exchange_weak(before, word)) {
          }
          continue;
        }
        header.exact ? put_int8(tile, lane, row, components) : put_float32(tile, lane, row.unit.data(), components);
      }
    }
  });
  return refused;
}

// codebook complex [K, D] or [E, K, D] -> words (a contiguous copy, or empty), packed uint8 (codebook_layout.h)
WordsAndPack pack(const at::Tensor& codebook, c10::string_view precision, bool copy) {
  if (!is_chosen(Backend::cpp)) {
    using Signature = WordsAndPack(const at::Tensor&, c10::string_view, bool);
    return call_python<Signature>("codebook_pack", codebook, precision, copy);
  }
  check_codewords(codebook, "codebook");
  check_precision(precision);
  check_copy(codebook, copy);
  const int64_t books = codebook.dim() == 3 ? codebook.size(0) : 1;
  const int64_t components = 2 * codebook.size(-1);
  const Header header = layout(precision == "exact", books, codebook.size(-2), components);

  const at::Tensor from = codebook.resolve_conj().resolve_neg().contiguous();
  // What had to be made contiguous is already a copy.
  const bool is_copy = !from.is_alias_of(codebook);
  at::Tensor words = !copy ? at::empty({0}, from.options()) : is_copy ? from : allocate(from.sizes(), from.options());
  at::Tensor packed = allocate({header.bytes()}, from.options().dtype(at::kByte));
  auto* bytes = packed.mutable_data_ptr<uint8_t>();
  std::memset(bytes, 0, header.tiles_at());
  std::memcpy(bytes, &header, sizeof(header));
  int64_t refused;
  if (from.scalar_type() == at::kComplexFloat) {
    refused = pack_tiles(header, static_cast<const float*>(from.const_data_ptr()),
                         copy ? static_cast<float*>(words.mutable_data_ptr()) : nullptr, bytes);
  } else {
    refused = pack_tiles(header, static_cast<const double*>(from.const_data_ptr()),
                         static_cast<double*>(words.mutable_data_ptr()), bytes);
  }
  if (refused < books * header.words) refuse_codeword(codebook, refused);
  return {words, packed};
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("codebook_pack", &csikernels::cpu::pack); }
