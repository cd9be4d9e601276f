#include "cpu/self_information_select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <utility>

#include "cpu/capability.h"

namespace csikernels::cpu {
namespace {

constexpr int64_t kTermsInCache = 1024;  // floats of each of the five planes of a strip
constexpr int64_t kSample = 256;

int64_t rounded_up(int64_t n) { return (n + kSlack + 15) / 16 * 16; }

float margin_of(float sum) {
  const int binades = 127 - (std::bit_cast<int32_t>(sum) >> 23);
  return sum * (kMargin + kMarginPerBinade * static_cast<float>(std::max(binades, 0)));
}

// Whether float32 leaves open which of two elements, lower key first, has the lower true sum.
bool close(int32_t key, int32_t next) {
  if (next == kAllEqual) return false;
  if (next < kSmallestCertain) return true;
  const float sum = std::bit_cast<float>(key), above = std::bit_cast<float>(next);
  return !(above - sum > margin_of(above));
}

// Unsigned integers in the order of numbers, both zeros equal, NaN last.
uint64_t ascending_key(double x) {
  if (std::isnan(x)) return std::numeric_limits<uint64_t>::max();
  const auto bits = std::bit_cast<uint64_t>(x + 0.0);  // -0 + 0 is +0
  constexpr uint64_t sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}

// Positions of the m smallest keys, equal keys by position. Changes the order of `candidates`.
void smallest(std::vector<Candidate>& candidates, int64_t m, int64_t* indices) {
  const auto end = candidates.begin() + m;
  if (end < candidates.end()) std::nth_element(candidates.begin(), end, candidates.end());
  std::sort(candidates.begin(), end);
  for (int64_t i = 0; i < m; ++i) indices[i] = candidates[i].position;
}

}  // namespace

void LargestDoubles::find(const double* scores, int64_t* indices) {
  for (size_t i = 0; i < candidates_.size(); ++i) candidates_[i] = {ascending_key(-scores[i]), static_cast<int64_t>(i)};
  smallest(candidates_, m_, indices);
}

const InformationKernels& information_kernels() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return avx512::information_kernels;
  if (capability() >= Capability::avx2) return avx2::information_kernels;
#endif
  return scalar::information_kernels;
}

int64_t strip_rows(const PaddedImage& layout) {
  return std::clamp<int64_t>(2 * kTermsInCache / layout.stride, std::max<int64_t>(1, 2 * layout.pad_rows),
                             std::max<int64_t>(1, layout.height));
}

int64_t terms_size(const PaddedImage& layout) {
  const int64_t halo = layout.pad_rows * layout.stride + layout.pad_columns;
  return 5 * (halo + strip_rows(layout) * layout.stride + 2 * kSlack) + 2 * kSlack;
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
            .size = 0};
  // Whatever is further away than the array is wide is outside; no more padding than that is needed.
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (size_t k = 0; k < offsets.size(); k += 2) {
    const int64_t row = std::clamp(offsets[k], -height, height), column = std::clamp(offsets[k + 1], -width, width);
    if (offsets[k] == 0 && offsets[k + 1] == 0) {
      ++centres;
      continue;
    }
    pairs.emplace_back(row, column);
    layout.pad_rows = std::max(layout.pad_rows, std::abs(row));
    layout.pad_columns = std::max(layout.pad_columns, std::abs(column));
  }
  layout.stride = width + layout.pad_columns;
  layout.plane = (height + layout.pad_rows) * layout.stride;
  layout.origin = layout.pad_rows * layout.stride + layout.pad_columns;
  layout.size = layout.origin + channels * layout.plane + layout.pad_columns;

  unsigned seen = 0;  // cells of the 3x3 grid
  for (const auto& [row, column] : pairs) {
    shifts.push_back(row * layout.stride + column);
    const bool on_grid = std::abs(row) % std::max<int64_t>(1, layout.pad_rows) == 0 &&
                         std::abs(column) % std::max<int64_t>(1, layout.pad_columns) == 0;
    const int cell = 3 * ((row > 0) - (row < 0) + 1) + (column > 0) - (column < 0) + 1;
    seen |= on_grid ? 1u << cell : 0;
  }
  const int exponent = std::ilogb(b);
  fast = pairs.size() == 8 && seen == 0b111101111 && std::abs(exponent) <= 100 && layout.numel() < INT32_MAX;
  scale = std::ldexp(1.0, -exponent);
  bandwidth = std::ldexp(b, -exponent);
  log2_norm = std::log2(static_cast<double>(count)) + 0.5 * std::log2(2 * std::numbers::pi) + std::log2(b);
}

// Ranking ------------------------------------------------------------------------------------------------------------

Ranking::Ranking(int64_t n, int64_t m, int32_t lowest, int32_t highest)
    : n(n), m(m), kernels(information_kernels()), lowest_(lowest), highest_(highest), memory_(5 * rounded_up(n)) {
  const int64_t part = rounded_up(n);
  keys_ = memory_.get();
  kept = keys_ + part;
  positions = kept + part;
  sorted_keys = positions + part;
  sorted_positions = sorted_keys + part;
}

// Up to here, candidates beyond the m-th cost less than a better threshold would.
int64_t Ranking::most() const {
  if (m + 16 <= kNetwork) return kNetwork;
  return m + std::max<int64_t>(32, m / 8);
}

// First thresholds, from every (n / 256)-th key.
void Ranking::sample(int32_t* thresholds) {
  const int64_t step = std::max<int64_t>(1, n / kSample), taken = std::min((n + step - 1) / step, kSample);
  for (int64_t i = 0; i < taken; ++i) kept[i] = keys_[i * step];
  std::fill(positions, positions + taken, 0);
  sort(kept, positions, taken);
  const int64_t rank = (m + most()) / 2 * taken / n;
  constexpr int64_t spread[kThresholds] = {-7, -2, 2, 7};
  for (int64_t t = 0; t < kThresholds; ++t)
    thresholds[t] = sorted_keys[std::clamp<int64_t>(rank + spread[t], 0, taken - 1)];
}

Ranking::Candidates Ranking::candidates() {
  const int64_t most = this->most(), aim = (m + most) / 2;
  if (n <= most) {
    std::copy(keys_, keys_ + n, kept);
    std::iota(positions, positions + n, 0);
    return {n, std::numeric_limits<int32_t>::max()};
  }
  // At most `low` are fewer than m keys, at most `high` more than `most`.
  int64_t low = lowest_ - 1, high = highest_, count_low = 0, count_high = n;
  int32_t thresholds[kThresholds];
  int64_t counts[kThresholds];
  if (guessed_) {
    for (int64_t t = 0; t < kThresholds; ++t) {
      const double guess = guess_ + keys_per_element_ * 20.0 * (static_cast<double>(t) - 1.5);
      thresholds[t] = static_cast<int32_t>(std::clamp<double>(guess, lowest_, highest_));
    }
  } else {
    sample(thresholds);
  }
  for (int pass = 0; high - low > 1; ++pass) {
    kernels.count(keys_, n, thresholds, counts);
    for (int64_t t = 0; t < kThresholds; ++t) {
      const int64_t threshold = thresholds[t];
      if (counts[t] < m) {
        if (threshold > low) low = threshold, count_low = counts[t];
      } else if (counts[t] > most) {
        if (threshold < high) high = threshold, count_high = counts[t];
      } else {
        if (count_high > count_low) {
          keys_per_element_ = static_cast<double>(high - low) / static_cast<double>(count_high - count_low);
        }
        guess_ = static_cast<double>(threshold) + keys_per_element_ * static_cast<double>(aim - counts[t]);
        guessed_ = keys_per_element_ * 60 < static_cast<double>(threshold - lowest_);
        const int64_t count =
            kernels.keep(keys_, n, std::numeric_limits<int32_t>::min(), thresholds[t], kept, positions);
        return {count, thresholds[t]};
      }
    }
    // Between the two, where the wanted count would be if the keys were spread evenly; after some such attempts in
    // equal parts, which ends after at most 14 more.
    const double width = static_cast<double>(high - low), elements = static_cast<double>(count_high - count_low);
    for (int64_t t = 0; t < kThresholds; ++t) {
      const double even = static_cast<double>(t + 1) / (kThresholds + 1);
      const double wanted = static_cast<double>(aim - count_low) + static_cast<double>(most - m) * 1.5 * (even - 0.5);
      const double part = pass < 4 ? wanted / elements : even;
      thresholds[t] = static_cast<int32_t>(
          std::clamp<int64_t>(low + static_cast<int64_t>(part * width), low + 1, std::max(low + 1, high - 1)));
    }
  }
  guessed_ = false;
  return {0, static_cast<int32_t>(high)};
}

void Ranking::sort(const int32_t* keys, const int32_t* places, int64_t count) {
  if (kernels.sort == nullptr || count > kNetwork) return radix_sort(keys, places, count);
  kernels.sort(keys, places, count, sorted_keys, sorted_positions);
  // The network leaves out the lowest bits of widely spread keys.
  int64_t budget = 4 * kNetwork;
  for (int64_t i = 1; i < count; ++i) {
    const int32_t key = sorted_keys[i], position = sorted_positions[i];
    if (sorted_keys[i - 1] <= key) continue;
    int64_t to = i;
    for (; to > 0 && sorted_keys[to - 1] > key; --to, --budget) {
      sorted_keys[to] = sorted_keys[to - 1];
      sorted_positions[to] = sorted_positions[to - 1];
    }
    sorted_keys[to] = key;
    sorted_positions[to] = position;
    if (budget < 0) return radix_sort(keys, places, count);
  }
}

// Stable, byte by byte from the lowest; bytes that all keys share are passed over.
void Ranking::radix_sort(const int32_t* keys, const int32_t* places, int64_t count) {
  struct Pair {
    uint32_t key;
    int32_t position;
  };
  std::vector<Pair> pairs(2 * count);
  Pair *from = pairs.data(), *to = from + count;
  int64_t histogram[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;  // unsigned numbers in the order of signed ones
    from[i] = {key, places[i]};
    for (int byte = 0; byte < 4; ++byte) ++histogram[byte][(key >> (8 * byte)) & 0xFF];
  }
  for (int byte = 0; byte < 4; ++byte) {
    int64_t* const counts = histogram[byte];
    if (count == 0 || counts[(from[0].key >> (8 * byte)) & 0xFF] == count) continue;
    int64_t begin = 0;
    for (int digit = 0; digit < 256; ++digit) begin += std::exchange(counts[digit], begin);
    for (int64_t i = 0; i < count; ++i) to[counts[(from[i].key >> (8 * byte)) & 0xFF]++] = from[i];
    std::swap(from, to);
  }
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = static_cast<int32_t>(from[i].key ^ 0x80000000u);
    sorted_positions[i] = from[i].position;
  }
}

void Ranking::smallest(int64_t* indices) {
  Candidates found = candidates();
  if (found.count == 0) {  // all keys below the shared one, and the first of those that share it
    constexpr int32_t lowest = std::numeric_limits<int32_t>::min();
    const int64_t below =
        found.threshold == lowest ? 0 : kernels.keep(keys_, n, lowest, found.threshold - 1, kept, positions);
    kernels.keep(keys_, n, found.threshold, found.threshold, kept + below, positions + below);
    found.count = m;
  }
  sort(kept, positions, found.count);
  std::copy(sorted_positions, sorted_positions + m, indices);
}

// Informer -----------------------------------------------------------------------------------------------------------

Informer::Informer(const Neighbourhood& neighbourhood, int64_t m)
    : hood_(neighbourhood),
      ranking_(neighbourhood.fast ? neighbourhood.layout.numel() : 0, m, 0, kAllEqual),
      padded_(neighbourhood.fast ? rounded_up(neighbourhood.layout.size) : 0),
      terms_(neighbourhood.fast ? terms_size(neighbourhood.layout) : 0) {
  if (hood_.fast) std::memset(padded_.get(), 0, rounded_up(hood_.layout.size) * sizeof(float));
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
  auto [count, threshold] = ranking_.candidates();
  int32_t mth_key = threshold;
  bool complete = false;
  if (count > 0) {
    ranking_.sort(ranking_.kept, ranking_.positions, count);
    mth_key = ranking_.sorted_keys[ranking_.m - 1];
    const bool all = count == ranking_.n;
    complete = all || !close(mth_key, threshold);
  }
  if (!complete) count = settle_boundary(mth_key);
  if (!ranking_.kernels.certain(ranking_.sorted_keys, count)) settle_order(count);
  std::copy(ranking_.sorted_positions, ranking_.sorted_positions + ranking_.m, indices);
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
  std::vector<double> log_sums(open);
  exact_log_sums(padded_.get(), elements, open, log_sums.data());
  std::vector<int64_t> order(open);
  std::iota(order.begin(), order.end(), 0);
  // Elements stand by position, so that the place among them breaks ties.
  std::nth_element(order.begin(), order.begin() + wanted - 1, order.end(), [&](int64_t a, int64_t b) {
    return log_sums[a] != log_sums[b] ? log_sums[a] < log_sums[b] : a < b;
  });
  std::sort(order.begin(), order.begin() + wanted);
  for (int64_t i = 0; i < wanted; ++i) {
    keys[i] = keys[order[i]];
    elements[i] = elements[order[i]];
  }
  r.sort(r.kept, r.positions, r.m);
  return r.m;
}

// Sorts runs of elements whose float32 sums are too close to tell by their float64 sums.
void Informer::settle_order(int64_t count) {
  const int32_t* const keys = ranking_.sorted_keys;
  int32_t* const elements = ranking_.sorted_positions;
  std::vector<std::pair<double, int32_t>> run;
  std::vector<double> log_sums;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && close(keys[end - 1], keys[end]);) ++end;
    if (end - begin == 1) continue;
    log_sums.resize(end - begin);
    exact_log_sums(padded_.get(), elements + begin, end - begin, log_sums.data());
    run.clear();
    for (int64_t i = begin; i < end; ++i) run.emplace_back(log_sums[i - begin], elements[i]);
    std::sort(run.begin(), run.end());
    for (int64_t i = begin; i < end; ++i) elements[i] = run[i - begin].second;
  }
}

ExactTerms Informer::exact_terms() const {
  const auto count = static_cast<int64_t>(hood_.shifts.size());
  return {hood_.shifts.data(), count, 1 / hood_.bandwidth,
          1.5 * static_cast<double>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, count))))};
}

int64_t Informer::padded_position(int64_t element) const {
  const PaddedImage& layout = hood_.layout;
  const int64_t row = element / layout.width, channel = row / layout.height;
  return layout.origin + channel * layout.plane + (row - channel * layout.height) * layout.stride +
         (element - row * layout.width);
}

// log2 of the neighbour sums, in float64, of some elements of the float32 image.
void Informer::exact_log_sums(const float* padded, const int32_t* elements, int64_t count, double* log_sums) {
  const ExactTerms terms = exact_terms();
  scratch_.resize(8 * std::max<int64_t>(1, terms.count));
  nearest_.resize(count);
  total_.resize(count);
  exact_positions_.resize(count);
  for (int64_t i = 0; i < count; ++i) exact_positions_[i] = padded_position(elements[i]);
  ranking_.kernels.exact_sums_of_floats(padded, exact_positions_.data(), count, terms, scratch_.data(), nearest_.data(),
                                        total_.data());
  for (int64_t i = 0; i < count; ++i) log_sums[i] = std::log2(total_[i]) - nearest_[i] * std::numbers::log2e;
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
  const ExactTerms terms = exact_terms();
  scratch_.resize(8 * std::max<int64_t>(1, terms.count));
  nearest_.resize(layout.numel());
  total_.resize(layout.numel());
  ranking_.kernels.exact_sums_of_doubles(padded_exactly_.data(), exact_positions_.data(), layout.numel(), terms,
                                         scratch_.data(), nearest_.data(), total_.data());
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
