// The m best of a row: float32 scores (as integer keys) and float64 ones.
#pragma once

#include <compare>
#include <cstdint>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/self_information_kernel.h"

namespace csikernels::cpu {

const InformationKernels& information_kernels();  // of the capability in force

// Elements of a buffer for n numbers that whole vectors may touch.
inline int64_t with_slack(int64_t n) { return (n + kSlack + 15) / 16 * 16; }

// Finds the m smallest of a row of integer keys. Holds one thread's scratch, and the last row's threshold as the first
// guess for the next; results do not depend on the rows before.
class Ranking {
 public:
  Ranking(int64_t n, int64_t m, int32_t lowest, int32_t highest);

  int32_t* keys() const { return keys_; }

  // Fills `kept` and `positions` with every key at most a threshold, at least m and hardly more.
  struct Candidates {
    int64_t count;  // 0, and nothing kept: too many keys tie at the threshold, which is the m-th smallest key
    int32_t threshold;
  };
  Candidates candidates();

  // Fills `sorted_keys` and `sorted_positions`, equal keys as given. The first leaves keys that span widely in disorder
  // among close ones, which the second repairs.
  void sort_coarsely(const int32_t* keys, const int32_t* positions, int64_t count);
  void repair(const int32_t* keys, const int32_t* positions, int64_t count);
  void sort(const int32_t* keys, const int32_t* positions, int64_t count);  // both
  // Positions of the m smallest, equal keys by position.
  void smallest(int64_t* indices);

  int64_t n, m;
  const InformationKernels& kernels;
  int32_t* kept;
  int32_t* positions;
  int32_t* sorted_keys;
  int32_t* sorted_positions;

 private:
  int64_t most() const;
  Candidates narrowed(const int32_t* thresholds);
  void sample(int32_t* thresholds);
  void radix_sort(const int32_t* keys, const int32_t* positions, int64_t count);

  int64_t lowest_, highest_;
  double guess_ = 0, keys_per_element_ = 0;
  bool guessed_ = false, sharp_ = false;  // whether there is a guess, and whether it was right at once
  int32_t* keys_;
  Scratch<int32_t> memory_;
};

struct Candidate {
  uint64_t key;
  int64_t position;
  auto operator<=>(const Candidate&) const = default;
};

// Unsigned integers in the order of numbers, both zeros equal, NaN last.
uint64_t ascending_key(double x);
// Positions of the m smallest keys, equal keys by position. Changes the order of `candidates`.
void smallest(std::vector<Candidate>& candidates, int64_t m, int64_t* indices);

// top_m for a row of float64.
class LargestDoubles {
 public:
  LargestDoubles(int64_t n, int64_t m) : m_(m), candidates_(n) {}
  void find(const double* scores, int64_t* indices);

 private:
  int64_t m_;
  std::vector<Candidate> candidates_;
};

}  // namespace csikernels::cpu
