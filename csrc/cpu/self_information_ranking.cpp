#include "cpu/self_information_ranking.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu/capability.h"

namespace csikernels::cpu {
namespace {

constexpr int64_t kSample = 256;

}  // namespace

const InformationKernels& information_kernels() {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512) return avx512::information_kernels;
  if (capability() >= Capability::avx2) return avx2::information_kernels;
#endif
  return scalar::information_kernels;
}

// float64 ------------------------------------------------------------------------------------------------------------

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

void LargestDoubles::find(const double* scores, int64_t* indices) {
  for (size_t i = 0; i < candidates_.size(); ++i) candidates_[i] = {ascending_key(-scores[i]), static_cast<int64_t>(i)};
  smallest(candidates_, m_, indices);
}

// Ranking ------------------------------------------------------------------------------------------------------------

Ranking::Ranking(int64_t n, int64_t m, int32_t lowest, int32_t highest)
    : n(n), m(m), kernels(information_kernels()), lowest_(lowest), highest_(highest), memory_(5 * with_slack(n)) {
  const int64_t part = with_slack(n);
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
  sort_coarsely(kept, positions, taken);
  const int64_t rank = (m + most()) / 2 * taken / n;
  const auto at = [&](int64_t place) { return sorted_keys[std::clamp<int64_t>(place, 0, taken - 1)]; };
  // If many elements share the key looked for, the two in the middle end the search at once.
  thresholds[0] = at(rank - 6);
  thresholds[1] = static_cast<int32_t>(std::max<int64_t>(lowest_, int64_t{at(rank)} - 1));
  thresholds[2] = at(rank);
  thresholds[3] = at(rank + 6);
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
    if (sharp_) {
      const Candidates found = narrowed(thresholds);
      if (found.count > 0) return found;
      sharp_ = false;
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
        sharp_ = guessed_ && pass == 0;
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

// Of guessed thresholds, those of the last if they are not too many, or what is left of them under one of the others:
// one pass over all keys instead of two. None where no threshold fits.
Ranking::Candidates Ranking::narrowed(const int32_t* thresholds) {
  constexpr int32_t lowest = std::numeric_limits<int32_t>::min();
  const int64_t most = this->most(), aim = (m + most) / 2;
  int32_t threshold = thresholds[kThresholds - 1];
  int64_t count = kernels.keep(keys_, n, lowest, threshold, kept, positions);
  if (count > most && count < 2 * most) {
    int64_t counts[kThresholds];
    kernels.count(kept, count, thresholds, counts);
    for (int64_t t = kThresholds - 2; t >= 0 && count > most; --t) {
      if (counts[t] > most) continue;
      threshold = thresholds[t];
      count = counts[t] < m ? 0 : kernels.narrow(kept, positions, count, threshold);
    }
  }
  if (count < m || count > most) return {0, 0};
  // The same images' next one differs by chance: follow slowly.
  guess_ += 0.25 * (threshold + keys_per_element_ * static_cast<double>(aim - count) - guess_);
  return {count, threshold};
}

void Ranking::sort_coarsely(const int32_t* keys, const int32_t* places, int64_t count) {
  if (kernels.sort == nullptr || count > kNetwork) return radix_sort(keys, places, count);
  kernels.sort(keys, places, count, sorted_keys, sorted_positions);
}

void Ranking::sort(const int32_t* keys, const int32_t* places, int64_t count) {
  sort_coarsely(keys, places, count);
  repair(keys, places, count);
}

// Insertion, as long as that is quick.
void Ranking::repair(const int32_t* keys, const int32_t* places, int64_t count) {
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

}  // namespace csikernels::cpu
