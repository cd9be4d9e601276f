// The layouts of nf4_lora without 16 x 16 transposing: for the instruction sets below AVX-512.
#pragma once

namespace {

// A tile of 4 x 2 (or 6 x 2) sums fits the 16 registers there are.
constexpr int kTileRows = F32::lanes == 8 ? 6 : 4;

}  // namespace

void multiply(const Product& p) {
  Fetch fetch(p, (p.groups + 1) / 2 * ((p.rows + kTileRows - 1) / kTileRows));
  int64_t group = 0;
  for (; group + 2 <= p.groups; group += 2) product_rows<One, kTileRows, 2>(p, group, fetch);
  if (group < p.groups) product_rows<One, kTileRows, 1>(p, group, fetch);
}

void pack(const void* x, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps, bool, void* out) {
  float* to = static_cast<float*>(out);
  const int64_t there = bytes / 4;
  for (int64_t group = 0; group < rows; group += F32::lanes, to += steps * F32::lanes) {
    for (int64_t lane = 0; lane < F32::lanes; ++lane) {
      const auto* from = reinterpret_cast<const float*>(static_cast<const char*>(x) + (group + lane) * row_bytes);
      const int64_t filled = group + lane < rows ? there : 0;
      for (int64_t s = 0; s < filled; ++s) to[s * F32::lanes + lane] = from[s];
      for (int64_t s = filled; s < steps; ++s) to[s * F32::lanes + lane] = 0.0f;
    }
  }
}

void store_transposed(const float* c, int64_t c_row, int64_t rows, int64_t tokens, const float* bias, bool, void* out,
                      int64_t out_row) {
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = static_cast<float*>(out) + token * out_row;
    for (int64_t row = 0; row < rows; ++row) {
      const float value = c[row * c_row + token];
      to[row] = bias == nullptr ? value : value + bias[row];
    }
  }
}
