// From one sample to its most informative elements: what stands between the op and the kernels.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "cpu/self_information_kernel.h"

namespace csikernels::cpu {

const InformationKernels& information_kernels();  // of the capability in force

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Release> data_;
};

// What one call asks for, the same for all its samples.
struct Neighbourhood {
  Neighbourhood(int64_t channels, int64_t height, int64_t width, double bandwidth, std::span<const int64_t> offsets);

  PaddedImage layout;
  int64_t count;                // offsets
  int64_t centres;              // how many of them are (0, 0)
  std::vector<int64_t> shifts;  // the others, as distances in the padded image
  bool fast;                    // the others are a 3x3 grid's, and the bandwidth is one that float32 can scale by
  double scale;                 // a power of two that brings the bandwidth into 1..2, exact to multiply with
  double bandwidth;             // after scaling
  double log2_norm;             // log2(K sqrt(2 pi) b)
};

// Finds the m smallest of a row of integer keys. Holds one thread's scratch, and the last row's threshold as the first
// guess for the next; results do not depend on the rows before.
class Ranking {
 public:
  Ranking(int64_t n, int64_t m, int32_t lowest, int32_t highest);

  int32_t* keys() const { return keys_; }

  // Candidates with at least the m smallest keys among them, all that are at most `threshold`; more than `most()`, or
  // none at all, where more elements share the m-th key than that.
  struct Candidates {
    int64_t count;      // 0: keys tie heavily at the threshold, which is the m-th smallest key
    int32_t threshold;  // every key at most this is a candidate
  };
  Candidates candidates();

  // Sorted by key, equal keys as given; positions beside them. Valid until the next call.
  void sort(const int32_t* keys, const int32_t* positions, int64_t count);
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
  void sample(int32_t* thresholds);
  void radix_sort(const int32_t* keys, const int32_t* positions, int64_t count);

  int64_t lowest_, highest_;
  double guess_ = 0, keys_per_element_ = 0;
  bool guessed_ = false;
  int32_t* keys_;
  Buffer<int32_t> memory_;
};

struct Candidate {
  uint64_t key;
  int64_t position;
  auto operator<=>(const Candidate&) const = default;
};

// top_m for a row of float64.
class LargestDoubles {
 public:
  LargestDoubles(int64_t n, int64_t m) : m_(m), candidates_(n) {}
  void find(const double* scores, int64_t* indices);

 private:
  int64_t m_;
  std::vector<Candidate> candidates_;
};

// select_informative and self_information for samples of float32 or float64, one thread's part of a batch.
class Informer {
 public:
  Informer(const Neighbourhood& neighbourhood, int64_t m);

  void select(const float* image, int64_t* indices);
  void select(const double* image, int64_t* indices);
  void information(const float* image, float* bits);
  void information(const double* image, double* bits);

 private:
  bool sums(const float* image);
  ExactTerms exact_terms() const;
  int64_t padded_position(int64_t element) const;
  double exact_bits(int64_t element) const;
  void select_exactly(int64_t* indices);
  template <class Float>
  void pad_exactly(const Float* image);
  void exact_log_sums(const float* padded, const int32_t* elements, int64_t count, double* log_sums);
  int64_t settle_boundary(int32_t mth_key);
  void settle_order(int64_t count);

  const Neighbourhood& hood_;
  Ranking ranking_;
  Buffer<float> padded_;
  Buffer<float> terms_;
  // For the exact path only, empty until it is needed.
  std::vector<double> padded_exactly_, scratch_, nearest_, total_;
  std::vector<int64_t> exact_positions_;
  std::vector<Candidate> candidates_;
};

}  // namespace csikernels::cpu
