// The search of some queries through some tiles of one book, on raw pointers: the steps between the kernels.
//
// exact: the int8 kernel lists the words whose upper bound reaches the best lower bound so far. When a list grows, and
// at the end, its words are scored in float32, the most promising first; what float32 cannot tell from the best is
// scored in float64. Every bound is certified, so the words scored in float64 include each that float64 arithmetic
// could call the best, whatever the order, the number of threads and the instruction set; these alone decide.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/codebook_kernel.h"
#include "cpu/codebook_layout.h"
#include "cpu/codebook_rows.h"

namespace csikernels::cpu::codebook {

// One codebook [K, D] as packed.
struct Book {
  const Header* header;
  const void* words;  // [K][components] float or double
  bool is_double;
  const double* factors;  // [K]
  const uint8_t* tiles;
};

// Uninitialised memory for n numbers.
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Unit rows of `h`, in the forms that the kernels read.
struct Queries {
  // rows[i] is the row of h [.][components] that query i is taken from; rows without a direction are left out.
  Queries(const Kernels& kernels, bool exact, const void* h, bool is_double, int64_t components, const int64_t* rows,
          int64_t n);

  int64_t count = 0;
  int64_t components;
  int group;                         // queries per group of the packed rows
  std::vector<int64_t> row;          // [count] of h
  std::unique_ptr<double[]> unit;    // [count][components]
  std::unique_ptr<float[]> turned;   // [count][2][components]: q, then -j q
  std::unique_ptr<int8_t[]> int8;    // groups of [steps][queries][2][4]
  std::unique_ptr<float[]> float32;  // groups of [components][queries][2]
  struct Errors {
    double scale;     // t of int8
    double int8;      // E: norm of what int8 leaves out, with room for the rounding of float64
    double float32;   // bound on a similarity scored in float32
    int32_t sums[2];  // of the int8 rows
  };
  std::vector<Errors> errors;

 private:
  void pack_int8(const Kernels& kernels);
  void pack_float32();
};

// What may be the best word of one query.
class Candidates {
 public:
  double lower = -1;  // some word's score in float64 is at least this

  void add_float32(const Book& book, const double* query, int64_t word, double similarity, double error);
  void add_float64(const Book& book, const double* query, int64_t word);
  void finish(const Book& book, const double* query);  // scores in float64 what is left
  void add(const Candidates& other);                   // both finished

  struct Best {
    int64_t word;
    double similarity;
  };
  Best best() const;  // after finish()

 private:
  struct Close {
    int64_t word;
    double upper;
  };
  struct Scored {
    int64_t word;
    Score score;
  };
  void insert(const Scored& scored);

  std::vector<Close> close_;      // scored in float32
  std::vector<Scored> frontier_;  // scored in float64; none with a higher index reaches less
  double low_ = -1;               // highest lower end of a float64 score
};

// The best word of one query in float32.
struct Largest {
  float squared = -1;
  int64_t word = 0;
  void add(const Largest& other) {
    if (other.squared > squared || (other.squared == squared && other.word < word)) *this = other;
  }
};

// found[i] takes what tiles [first, last) hold for query i.
void search_exact(const Kernels& kernels, const Book& book, const Queries& queries, int64_t first, int64_t last,
                  Candidates* found);
void search_float32(const Kernels& kernels, const Book& book, const Queries& queries, int64_t first, int64_t last,
                    Largest* found);

// Similarity of a query and a word in float64.
double similarity(const Book& book, const double* query, int64_t word);

}  // namespace csikernels::cpu::codebook
