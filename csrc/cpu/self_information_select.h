// From one sample to its most informative elements: what stands between the op and the kernels.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "cpu/self_information_kernel.h"
#include "cpu/self_information_ranking.h"

namespace csikernels::cpu {

// What one call asks for, the same for all its samples.
struct Neighbourhood {
  Neighbourhood(int64_t channels, int64_t height, int64_t width, double bandwidth, std::span<const int64_t> offsets);
  Neighbourhood(const Neighbourhood&) = delete;  // `layout` points into it

  PaddedImage layout;
  std::vector<uint16_t> inside;  // that of `layout`
  int64_t count;                 // offsets
  int64_t centres;               // how many of them are (0, 0)
  std::vector<int64_t> shifts;   // the others, as distances in the padded image
  bool fast;                     // the others are a 3x3 grid's, and the bandwidth is one that float32 can scale by
  double scale;                  // a power of two that brings the bandwidth into 1..2, exact to multiply with
  double bandwidth;              // after scaling
  double log2_norm;              // log2(K sqrt(2 pi) b)
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
  int64_t settle_boundary(int32_t mth_key);
  void settle_order(int64_t count);
  int64_t padded_position(int64_t element) const;
  void exact_log_sums(const int32_t* elements, int64_t count);
  template <class Float>
  void exact_sums(const Float* padded);
  template <class Float>
  void pad_exactly(const Float* image);
  void select_exactly(int64_t* indices);
  double exact_bits(int64_t element) const;

  struct Run {
    int64_t begin, length;
  };

  const Neighbourhood& hood_;
  Ranking ranking_;
  Scratch<float> padded_;
  Scratch<float> terms_;
  // For what needs float64, empty until then.
  std::vector<double> padded_exactly_, scratch_, nearest_, total_, log_sums_;
  std::vector<int64_t> exact_positions_;
  std::vector<Candidate> candidates_;
  std::vector<Run> runs_;
  std::vector<int32_t> open_;
  std::vector<std::pair<double, int32_t>> ordered_;
};

}  // namespace csikernels::cpu
