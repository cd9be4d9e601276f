// The order in which a network's weights are needed, and the fetching of those to come. Included after lasco_tile.h.
#pragma once

#include "cpu/lasco_tile.h"

namespace csikernels::cpu {
namespace {

// Weights of one kind of one network, contiguous in memory.
struct Span {
  const char* data;
  int64_t bytes;
  bool matrix;
};

// Writes the spans of a network in order of use and returns their number, sizes.weights().
inline int64_t list_spans(const SamSizes& sizes, const void* const* weights, Span* spans) {
  const int64_t width = sizes.width, feedforward = sizes.feedforward, features = sizes.features;
  const int64_t element = sizes.bfloat16 ? 2 : 4;
  int64_t count = 0;
  const auto matrix = [&](int64_t index, int64_t elements) {
    spans[count++] = {static_cast<const char*>(weights[index]), elements * element, true};
  };
  const auto vector = [&](int64_t index, int64_t elements) {
    spans[count++] = {static_cast<const char*>(weights[index]), elements * 4, false};
  };
  const auto norm = [&](int64_t index) {
    vector(index, width);
    vector(index + 1, width);
  };
  const auto linear = [&](int64_t index, int64_t rows, int64_t depth) {
    vector(index + 1, rows);
    matrix(index, rows * depth);
  };
  linear(0, width, features);
  vector(2, sizes.tokens * width);
  for (int64_t block = 0; block < sizes.layers; ++block) {
    const int64_t first = 3 + 12 * block;
    linear(first, 3 * width, width);
    linear(first + 2, width, width);
    norm(first + 8);
    linear(first + 4, feedforward, width);
    linear(first + 6, width, feedforward);
    norm(first + 10);
  }
  const int64_t last = sizes.weights() - 2;
  if (sizes.final_norm) norm(last - 2);
  linear(last, features, width);
  return count;
}

// Fetches weights into the first cache level, a fixed distance ahead of the products that read them.
//
// A product asks before each band of rows for the place to fetch from, and fetches as many bytes there as it reads
// itself, a cache line every other step. Vectors on the way (biases, norms), and the start of a matrix that a band
// reaches only in part, are fetched at once.
class WeightStream {
 public:
  static constexpr int64_t kDistance = 16 << 10;

  // spans[0..count): of this network, then of the one after it.
  WeightStream(const Span* spans, int64_t count) : span_(spans), last_(spans + count - 1) {
    offset_ = kDistance;
    while (span_ < last_ && (!span_->matrix || offset_ >= span_->bytes)) {
      if (span_->matrix) offset_ -= span_->bytes;
      ++span_;
    }
  }

  CSIKERNELS_INLINE const char* advance(int64_t bytes) {
    const char* place = span_->data + offset_;
    offset_ += bytes;
    if (offset_ >= span_->bytes) cross();
    return place;
  }

  static CSIKERNELS_INLINE void fetch(const char* place) { __builtin_prefetch(place, 0, 3); }

 private:
  __attribute__((noinline)) void cross() {
    while (span_ < last_ && offset_ >= span_->bytes) {
      offset_ -= span_->bytes;
      ++span_;
      for (; span_ < last_ && !span_->matrix; ++span_) fetch_first(span_->bytes);
      fetch_first(offset_ < span_->bytes ? offset_ : span_->bytes);
    }
    if (offset_ > span_->bytes) offset_ = span_->bytes;
  }

  void fetch_first(int64_t bytes) const {
    for (int64_t line = 0; line < bytes; line += 64) fetch(span_->data + line);
  }

  const Span *span_, *last_;
  int64_t offset_;  // in *span_
};

// Fetches nothing.
struct Unfetched : NoStream {
  Unfetched(const Span*, int64_t) {}
};

}  // namespace
}  // namespace csikernels::cpu
