// The packed buffer: a header that says what it was packed from, the factors that bring each codeword to unit norm, and
// one run of tiles per book. Offsets are multiples of 64 bytes.
//
// There is one layout whatever the CPU capability: a buffer packed on one machine is searched on any other. The header
// is compared whole with the one that the search expects.
#pragma once

#include <cstdint>

#include "codebook_order.h"
#include "cpu/codebook_kernel.h"

namespace csikernels::cpu::codebook {

struct Header {
  char magic[8] = {'c', 's', 'i', 'b', 'o', 'o', 'k', '1'};
  int64_t exact;       // 1: int8 tiles of permuted words; 0: float32 tiles in order
  int64_t books;       // E
  int64_t words;       // K of each book
  int64_t components;  // 2 D
  int64_t step;        // position p of a book holds word p * step mod K
  int64_t tile_bytes;
  int64_t tiles;  // per book

  bool operator==(const Header&) const = default;

  int64_t factors_at() const { return 64; }  // float64 [E * K], by word
  int64_t tiles_at() const { return (factors_at() + 8 * books * words + 63) / 64 * 64; }
  int64_t bytes() const { return tiles_at() + books * tiles * tile_bytes; }
};
static_assert(sizeof(Header) == 64);

inline Header layout(bool exact, int64_t books, int64_t words, int64_t components) {
  Header header{};
  header.exact = exact;
  header.books = books;
  header.words = words;
  header.components = components;
  header.step = exact ? spreading_step(words) : 1;
  header.tile_bytes = exact ? int8_tile_bytes(components) : float32_tile_bytes(components);
  header.tiles = (words + kTileWords - 1) / kTileWords;
  return header;
}

inline int64_t word_at(const Header& header, int64_t position) {
  return static_cast<int64_t>(static_cast<uint64_t>(position) * static_cast<uint64_t>(header.step) %
                              static_cast<uint64_t>(header.words));
}

}  // namespace csikernels::cpu::codebook
