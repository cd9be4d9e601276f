#include "cpu/self_information_select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <type_traits>

#include "neighbourhood.h"

namespace csikernels::cpu {
namespace {

constexpr int64_t kTermsInCache = 1024;  // floats of each of the five planes of a strip

float margin_of(float sum) {
  const int binades = kBinadeOfEight - (std::bit_cast<int32_t>(sum) >> 23);
  return kMarginOfSum * sum + kMarginOfSpread * std::min(8.0f - sum, kLn2 * (sum * static_cast<float>(binades)));
}

// Whether float32 leaves open which of two elements, lower key first, has the lower true sum.
bool close(int32_t key, int32_t next) {
  if (next == kAllEqual) return false;
  if (next < kSmallestCertain) return true;
  const float sum = std::bit_cast<float>(key), above = std::bit_cast<float>(next);
  return !(above - sum > margin_of(above));
}

}  // namespace

int64_t strip_rows(const PaddedImage& layout) {
  return std::clamp<int64_t>(2 * kTermsInCache / layout.stride, std::max<int64_t>(1, 2 * layout.pad_rows),
                             std::max<int64_t>(1, layout.height));
}

int64_t terms_size(const PaddedImage& layout) {
  const int64_t halo = layout.pad_rows * layout.stride + layout.pad_columns;
  return 5 * (halo + strip_rows(layout) * layout.stride + 2 * kSlack) + 2 * kSlack;
}

// PaddedImage::inside for a whole strip.
std::vector<uint16_t> places_inside(const PaddedImage& layout) {
  const int64_t rows = strip_rows(layout);
  std::vector<uint16_t> inside(rows * layout.stride / 16 + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t end = row * layout.stride + layout.width;
    for (int64_t from = row * layout.stride, to; from < end; from = to) {
      to = std::min(end, (from / 16 + 1) * 16);
      inside[from / 16] |= static_cast<uint16_t>(((1u << (to - from)) - 1) << from % 16);
    }
  }
  return inside;
}

// Neighbourhood ------------------------------------------------------------------------------------------------------

Neighbourhood::Neighbourhood(int64_t channels, int64_t height, int64_t width, double b,
                             std::span<const int64_t> offsets)
    : count(static_cast<int64_t>(offsets.size()) / 2), centres(0) {
  layout = {.channels = channels,
            .height = height,
            .width = width,
            .pad_rows = 0,
            .pad_columns = 0,
            .stride = 0,
            .plane = 0,
            .origin = 0,
            .size = 0,
            .inside = nullptr};
  const Neighbours neighbours = neighbours_of(offsets, height, width);
  centres = neighbours.centres;
  layout.pad_rows = neighbours.rows;
  layout.pad_columns = neighbours.columns;
  layout.stride = width + layout.pad_columns;
  layout.plane = (height + layout.pad_rows) * layout.stride;
  layout.origin = layout.pad_rows * layout.stride + layout.pad_columns;
  layout.size = layout.origin + channels * layout.plane + layout.pad_columns;
  inside = places_inside(layout);
  layout.inside = inside.data();

  for (const auto& [row, column] : neighbours.other) shifts.push_back(row * layout.stride + column);
  const int exponent = std::ilogb(b);
  fast = neighbours.is_grid && std::abs(exponent) <= 100 && layout.numel() < INT32_MAX;
  scale = std::ldexp(1.0, -exponent);
  bandwidth = std::ldexp(b, -exponent);
  log2_norm = std::log2(static_cast<double>(count)) + 0.5 * std::log2(2 * std::numbers::pi) + std::log2(b);
}

// Informer -----------------------------------------------------------------------------------------------------------

Informer::Informer(const Neighbourhood& neighbourhood, int64_t m)
    : hood_(neighbourhood),
      ranking_(neighbourhood.fast ? neighbourhood.layout.numel() : 0, m, 0, kAllEqual),
      padded_(neighbourhood.fast ? with_slack(neighbourhood.layout.size) : 0),
      terms_(neighbourhood.fast ? terms_size(neighbourhood.layout) : 0) {
  if (hood_.fast) std::memset(padded_.get(), 0, with_slack(hood_.layout.size) * sizeof(float));
}

// The float32 sums as keys; false where the sample needs float64 (its size is extreme, or not finite).
bool Informer::sums(const float* image) {
  if (!hood_.fast) return false;
  const float largest = ranking_.kernels.pad(image, hood_.layout, static_cast<float>(hood_.scale), padded_.get());
  if (!(largest <= 0x1p60f)) return false;
  const double coefficient = -std::numbers::log2e / (2 * hood_.bandwidth * hood_.bandwidth);
  ranking_.kernels.neighbour_sums(padded_.get(), hood_.layout, static_cast<float>(coefficient), terms_.get(),
                                  ranking_.keys());
  return true;
}

void Informer::select(const float* image, int64_t* indices) {
  if (!sums(image)) {
    pad_exactly(image);
    return select_exactly(indices);
  }
  Ranking& r = ranking_;
  auto [count, threshold] = r.candidates();
  bool certain = false, complete = false;
  int32_t mth_key = threshold;
  if (count > 0) {
    r.sort_coarsely(r.kept, r.positions, count);
    certain = r.kernels.certain(r.sorted_keys, count);  // and therefore in order
    if (!certain) r.repair(r.kept, r.positions, count);
    mth_key = r.sorted_keys[r.m - 1];
    complete = count == r.n || !close(mth_key, threshold);
  }
  if (!complete) {
    count = settle_boundary(mth_key);
    certain = r.kernels.certain(r.sorted_keys, count);
  }
  if (!certain) settle_order(count);
  std::copy(r.sorted_positions, r.sorted_positions + r.m, indices);
}

// Exactly the m right elements, where float32 leaves open who is the last of them: those that are certain, and of those
// whose float32 sum is close to the m-th the best in float64.
int64_t Informer::settle_boundary(int32_t mth_key) {
  Ranking& r = ranking_;
  int32_t low = 0, high = kSmallestCertain;
  if (mth_key >= kSmallestCertain) {
    const float sum = std::bit_cast<float>(mth_key);
    low = std::bit_cast<int32_t>(sum - margin_of(sum));
    high = std::bit_cast<int32_t>(sum + 1.01f * margin_of(sum));
    if (low < kSmallestCertain) low = 0;
  }
  high = std::min(high, kAllEqual - 1);
  const int64_t certain = low == 0 ? 0 : r.kernels.keep(r.keys(), r.n, 0, low - 1, r.kept, r.positions);
  int32_t* const keys = r.kept + certain;
  int32_t* const elements = r.positions + certain;
  const int64_t open = r.kernels.keep(r.keys(), r.n, low, high, keys, elements), wanted = r.m - certain;
  if (open <= wanted) {  // the rest have equal neighbours
    if (open < wanted) r.kernels.keep(r.keys(), r.n, kAllEqual, kAllEqual, keys + open, elements + open);
    r.sort(r.kept, r.positions, r.m);
    return r.m;
  }
  exact_log_sums(elements, open);
  std::vector<int64_t> order(open);
  std::iota(order.begin(), order.end(), 0);
  // Elements stand by position, so that the place among them breaks ties.
  std::nth_element(order.begin(), order.begin() + wanted - 1, order.end(), [&](int64_t a, int64_t b) {
    return log_sums_[a] != log_sums_[b] ? log_sums_[a] < log_sums_[b] : a < b;
  });
  std::sort(order.begin(), order.begin() + wanted);
  for (int64_t i = 0; i < wanted; ++i) {
    keys[i] = keys[order[i]];
    elements[i] = elements[order[i]];
  }
  r.sort(r.kept, r.positions, r.m);
  return r.m;
}

// Sorts runs of elements whose float32 sums are too close to tell by their float64 sums, all of them found at once.
void Informer::settle_order(int64_t count) {
  const int32_t* const keys = ranking_.sorted_keys;
  int32_t* const elements = ranking_.sorted_positions;
  runs_.clear();
  open_.clear();
  for (int64_t begin = 0, end; begin < std::min(count, ranking_.m); begin = end) {
    for (end = begin + 1; end < count && close(keys[end - 1], keys[end]);) ++end;
    if (end - begin == 1) continue;
    runs_.push_back({begin, end - begin});
    open_.insert(open_.end(), elements + begin, elements + end);
  }
  exact_log_sums(open_.data(), static_cast<int64_t>(open_.size()));
  const double* log_sum = log_sums_.data();
  for (const auto& [begin, length] : runs_) {
    ordered_.clear();
    for (int64_t i = 0; i < length; ++i) ordered_.emplace_back(log_sum[i], elements[begin + i]);
    std::sort(ordered_.begin(), ordered_.end());
    for (int64_t i = 0; i < length; ++i) elements[begin + i] = ordered_[i].second;
    log_sum += length;
  }
}

int64_t Informer::padded_position(int64_t element) const {
  const PaddedImage& layout = hood_.layout;
  const int64_t row = element / layout.width, channel = row / layout.height;
  return layout.origin + channel * layout.plane + (row - channel * layout.height) * layout.stride +
         (element - row * layout.width);
}

// log2 of the neighbour sums, in float64, of some elements of the float32 image.
void Informer::exact_log_sums(const int32_t* elements, int64_t count) {
  exact_positions_.resize(count);
  for (int64_t i = 0; i < count; ++i) exact_positions_[i] = padded_position(elements[i]);
  exact_sums(padded_.get());
  log_sums_.resize(count);
  for (int64_t i = 0; i < count; ++i) log_sums_[i] = std::log2(total_[i]) - nearest_[i] * std::numbers::log2e;
}

// nearest_ and total_ of the elements at exact_positions_.
template <class Float>
void Informer::exact_sums(const Float* padded) {
  const auto shifts = static_cast<int64_t>(hood_.shifts.size()), count = static_cast<int64_t>(exact_positions_.size());
  const ExactTerms terms{
      .shifts = hood_.shifts.data(),
      .count = shifts,
      .inverse_bandwidth = 1 / hood_.bandwidth,
      .rounder = 1.5 * static_cast<double>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, shifts)))),
  };
  scratch_.resize(8 * std::max<int64_t>(1, shifts));
  nearest_.resize(count);
  total_.resize(count);
  const InformationKernels& kernels = ranking_.kernels;
  if constexpr (std::is_same_v<Float, float>) {
    kernels.exact_sums_of_floats(padded, exact_positions_.data(), count, terms, scratch_.data(), nearest_.data(),
                                 total_.data());
  } else {
    kernels.exact_sums_of_doubles(padded, exact_positions_.data(), count, terms, scratch_.data(), nearest_.data(),
                                  total_.data());
  }
}

// Scales by the same power of two as the fast path, so that the exponent of the bandwidth is out of the way.
template <class Float>
void Informer::pad_exactly(const Float* image) {
  const PaddedImage& layout = hood_.layout;
  padded_exactly_.assign(layout.size + kSlack, 0.0);
  exact_positions_.resize(layout.numel());
  for (int64_t i = 0; i < layout.numel(); ++i) {
    exact_positions_[i] = padded_position(i);
    padded_exactly_[exact_positions_[i]] = static_cast<double>(image[i]) * hood_.scale;
  }
  exact_sums(padded_exactly_.data());
}

void Informer::select(const double* image, int64_t* indices) {
  pad_exactly(image);
  select_exactly(indices);
}

// After pad_exactly.
void Informer::select_exactly(int64_t* indices) {
  const auto n = hood_.layout.numel();
  candidates_.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    candidates_[i] = {ascending_key(std::log2(total_[i]) - nearest_[i] * std::numbers::log2e), i};
  }
  smallest(candidates_, ranking_.m, indices);
}

void Informer::information(const float* image, float* bits) {
  // Without a centre the logarithm needs the sums that underflow, too.
  if (hood_.centres > 0 && sums(image)) {
    ranking_.kernels.information(ranking_.keys(), ranking_.n, static_cast<float>(hood_.centres),
                                 static_cast<float>(hood_.log2_norm), bits);
    return;
  }
  pad_exactly(image);
  for (int64_t i = 0; i < hood_.layout.numel(); ++i) bits[i] = static_cast<float>(exact_bits(i));
}

void Informer::information(const double* image, double* bits) {
  pad_exactly(image);
  for (int64_t i = 0; i < hood_.layout.numel(); ++i) bits[i] = exact_bits(i);
}

// After pad_exactly. The logarithm of the sum is kept finite where the sum underflows.
double Informer::exact_bits(int64_t element) const {
  const double nearest = nearest_[element], total = total_[element];
  if (hood_.centres == 0) return hood_.log2_norm - (std::log2(total) - nearest * std::numbers::log2e);
  return hood_.log2_norm - std::log2(static_cast<double>(hood_.centres) + total * std::exp(-nearest));
}

}  // namespace csikernels::cpu
