// The offsets of self-information's neighbours, as every device reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <utility>
#include <vector>

namespace csikernels {

struct Neighbours {
  int64_t centres = 0;                             // offsets (0, 0)
  std::vector<std::pair<int64_t, int64_t>> other;  // (row, column), in the order given
  int64_t rows = 0, columns = 0;                   // the furthest of them
  bool is_grid = false;  // whether they are {-rows, 0, rows} x {-columns, 0, columns} without the centre, each once
};

// offsets (row, column, row, column, ...). What is further away than the image is large is outside, wherever it is.
inline Neighbours neighbours_of(std::span<const int64_t> offsets, int64_t height, int64_t width) {
  Neighbours all;
  for (size_t k = 0; k < offsets.size(); k += 2) {
    if (offsets[k] == 0 && offsets[k + 1] == 0) {
      ++all.centres;
      continue;
    }
    const int64_t row = std::clamp(offsets[k], -height, height), column = std::clamp(offsets[k + 1], -width, width);
    all.other.emplace_back(row, column);
    all.rows = std::max(all.rows, std::abs(row));
    all.columns = std::max(all.columns, std::abs(column));
  }
  unsigned seen = 0;  // cells of the 3x3 grid
  for (const auto& [row, column] : all.other) {
    const bool on_grid = std::abs(row) % std::max<int64_t>(1, all.rows) == 0 &&
                         std::abs(column) % std::max<int64_t>(1, all.columns) == 0;
    const int cell = 3 * ((row > 0) - (row < 0) + 1) + (column > 0) - (column < 0) + 1;
    seen |= on_grid ? 1u << cell : 0;
  }
  all.is_grid = all.other.size() == 8 && seen == 0b111101111;
  return all;
}

}  // namespace csikernels
