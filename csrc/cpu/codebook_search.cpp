#include "cpu/codebook_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace csikernels::cpu::codebook {
namespace {

constexpr size_t kClose = 32;           // float32 candidates held before they are scored in float64
constexpr double kSafeFactor = 0x1p40;  // words within 2^+-40 of unit norm cannot leave float32's range
constexpr double kDown = 1 - 0x1p-20;   // a float64 bound times this stays a lower bound in float32
constexpr int kBatch = 8;               // words scored in float32 between two looks at the best

Score score_word(const Book& book, const double* query, int64_t word) {
  const int64_t components = book.header->components;
  if (book.is_double) {
    return score(query, static_cast<const double*>(book.words) + word * components, book.factors[word], components);
  }
  return score(query, static_cast<const float*>(book.words) + word * components, book.factors[word], components);
}

// Room for the rounding of a float64 score and its slack; added once to each int8 bound.
double float64_room(int64_t components) { return static_cast<double>(components + 64) * 0x1p-50; }

// A unit query rounded to float32 (denormals included), then both parts of the product in four chains at least, with
// one rounding per term and a few at the end.
double float32_room(int64_t components) { return 1.5 * (static_cast<double>(components) / 4 + 40) * 0x1p-24; }

// (Re, Im) of every pair to (Im, -Re).
template <class T>
void turn(const T* from, int64_t components, T* to) {
  for (int64_t c = 0; c < components; c += 2) {
    to[c] = from[c + 1];
    to[c + 1] = -from[c];
  }
}

}  // namespace

Queries::Queries(const Kernels& kernels, bool exact, const void* h, bool is_double, int64_t components,
                 const int64_t* rows, int64_t n)
    : components(components),
      group(kernels.group),
      unit(scratch<double>(n * components)),
      turned(scratch<float>(n * 2 * components)) {
  row.reserve(n);
  errors.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    double* q = unit.get() + count * components;
    int exponent;
    const bool usable = is_double
                            ? scale_row(static_cast<const double*>(h) + rows[i] * components, components, q, exponent)
                            : scale_row(static_cast<const float*>(h) + rows[i] * components, components, q, exponent);
    if (!usable) continue;
    const double inverse = 1 / norm(q, components);
    for (int64_t c = 0; c < components; ++c) q[c] *= inverse;
    float* single = turned.get() + count * 2 * components;
    for (int64_t c = 0; c < components; ++c) single[c] = static_cast<float>(q[c]);
    turn(single, components, single + components);
    errors.push_back({.float32 = float32_room(components)});
    row.push_back(rows[i]);
    ++count;
  }
  exact ? pack_int8(kernels) : pack_float32();
}

void Queries::pack_int8(const Kernels& kernels) {
  const int64_t steps = int8_steps(components), padded = steps * 4;
  const int level = std::min(kernels.query_level, largest_level(components));
  int8 = scratch<int8_t>(count * 2 * padded);
  std::vector<int8_t> values(2 * padded);  // the padding stays 0
  for (int64_t i = 0; i < count; ++i) {
    const Quantized q = quantize(unit.get() + i * components, components, level, values.data());
    turn(values.data(), components, values.data() + padded);
    errors[i].scale = q.scale;
    errors[i].int8 = q.residual + float64_room(components);
    const int64_t in_group = i % group, size = std::min<int64_t>(group, count - (i - in_group));
    for (int part = 0; part < 2; ++part) {
      const int8_t* from = values.data() + part * padded;
      int8_t* out = int8.get() + (i - in_group) * 2 * padded + in_group * 8 + part * 4;
      for (int64_t step = 0; step < steps; ++step) std::memcpy(out + step * size * 8, from + step * 4, 4);
      errors[i].sums[part] = std::accumulate(from, from + padded, int32_t(0));
    }
  }
}

void Queries::pack_float32() {
  float32 = scratch<float>(count * 2 * components);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t in_group = i % group, size = std::min<int64_t>(group, count - (i - in_group));
    for (int part = 0; part < 2; ++part) {
      const float* from = turned.get() + (2 * i + part) * components;
      float* out = float32.get() + (i - in_group) * 2 * components + in_group * 2 + part;
      for (int64_t c = 0; c < components; ++c) out[c * size * 2] = from[c];
    }
  }
}

void Candidates::add_float32(const Book& book, const double* query, int64_t word, double similarity, double error) {
  lower = std::max(lower, similarity - error);
  if (similarity + error < lower) return;
  close_.push_back({word, similarity + error});
  if (close_.size() < kClose) return;
  std::erase_if(close_, [&](const Close& c) { return c.upper < lower; });
  if (close_.size() >= kClose / 2) finish(book, query);
}

void Candidates::add_float64(const Book& book, const double* query, int64_t word) {
  insert({word, score_word(book, query, word)});
}

void Candidates::finish(const Book& book, const double* query) {
  for (const Close& c : close_) {
    if (c.upper >= lower) add_float64(book, query, c.word);
  }
  close_.clear();
}

void Candidates::insert(const Scored& scored) {
  low_ = std::max(low_, scored.score.low());
  lower = std::max(lower, low_);
  const auto beaten_by = [](const Scored& a, const Scored& b) {  // b has the lower index and reaches as high
    return b.word <= a.word && b.score.high() >= a.score.high();
  };
  if (scored.score.high() < low_) return;
  for (const Scored& other : frontier_) {
    if (beaten_by(scored, other)) return;
  }
  std::erase_if(frontier_, [&](const Scored& a) { return a.score.high() < low_ || beaten_by(a, scored); });
  frontier_.push_back(scored);
}

void Candidates::add(const Candidates& other) {
  low_ = std::max(low_, other.low_);
  for (const Scored& scored : other.frontier_) insert(scored);
}

// Of all words whose score agrees with the highest to within rounding, the lowest index.
Candidates::Best Candidates::best() const {
  const Scored* best = nullptr;
  for (const Scored& scored : frontier_) {
    if (scored.score.high() >= low_ && (best == nullptr || scored.word < best->word)) best = &scored;
  }
  return {best->word, best->score.value};
}

double similarity(const Book& book, const double* query, int64_t word) { return score_word(book, query, word).value; }

namespace {

// The state of a group's queries between the int8 kernel and the scores.
class ExactSearch {
 public:
  ExactSearch(const Kernels& kernels, const Book& book, const Queries& queries, Candidates* found)
      : kernels_(kernels), book_(book), queries_(queries), found_(found), kept_(queries.count) {
    const int64_t padded = int8_steps(queries.components) * 4;
    for (int64_t i = 0; i < queries.count; i += queries.group) {
      Int8Group& g = groups_.emplace_back();
      g.rows = queries.int8.get() + i * 2 * padded;
      g.queries = static_cast<int>(std::min<int64_t>(queries.group, queries.count - i));
      for (int q = 0; q < g.queries; ++q) {
        const Queries::Errors& e = queries.errors[i + q];
        for (int part = 0; part < 2; ++part) {
          g.start[q][part] = static_cast<int32_t>(-128 * static_cast<uint32_t>(e.sums[part]));
        }
        g.slope[q] = static_cast<float>((1 + e.int8) / e.scale * (1 + 4 * kRounding));
        g.error[q] = static_cast<float>(e.int8 / e.scale * (1 + 4 * kRounding));
        g.best[q] = static_cast<float>(-1 / e.scale);
        g.count[q] = 0;
        g.position[q] = position_[q];
        g.upper[q] = upper_[q];
      }
    }
  }

  void run(int64_t first, int64_t last) {
    // Words outside, queries inside: a block of words comes from memory once.
    const int64_t components = queries_.components;
    for (int64_t tile = first; tile < last; tile += kBlockTiles) {
      const int64_t end = std::min<int64_t>(tile + kBlockTiles, last);
      for (size_t i = 0; i < groups_.size(); ++i) {
        kernels_.filter(book_.tiles, components, tile, end, groups_[i]);
        for (int q = 0; q < groups_[i].queries; ++q) {
          const int64_t query = i * queries_.group + q;
          if (groups_[i].count[q] > 0 && !put_aside(groups_[i], q, query)) settle(groups_[i], q, query);
        }
      }
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      for (int q = 0; q < groups_[i].queries; ++q) {
        const int64_t query = i * queries_.group + q;
        take_back(groups_[i], q, query);
        settle(groups_[i], q, query);
        found_[query].finish(book_, unit(query));
      }
    }
  }

 private:
  const double* unit(int64_t query) const { return queries_.unit.get() + query * queries_.components; }

  // Empties a short list into the query's own, for the kernel's lists serve one group after the other. False where the
  // list has become long; it then holds all of the query's words.
  bool put_aside(Int8Group& g, int q, int64_t query) {
    Kept& kept = kept_[query];
    if (kept.count + g.count[q] > kSettleAbove) {
      take_back(g, q, query);
      return false;
    }
    std::copy_n(g.position[q], g.count[q], kept.position + kept.count);
    std::copy_n(g.upper[q], g.count[q], kept.upper + kept.count);
    kept.count += g.count[q];
    g.count[q] = 0;
    return true;
  }

  void take_back(Int8Group& g, int q, int64_t query) {
    Kept& kept = kept_[query];
    std::copy_n(kept.position, kept.count, g.position[q] + g.count[q]);
    std::copy_n(kept.upper, kept.count, g.upper[q] + g.count[q]);
    g.count[q] += kept.count;
    kept.count = 0;
  }

  // Scores the listed words that may still win, the one with the highest bound first: it usually rules out the rest.
  void settle(Int8Group& g, int q, int64_t query) {
    uint32_t* position = g.position[q];
    float* upper = g.upper[q];
    int n = 0, top = 0;
    for (int i = 0; i < g.count[q]; ++i) {
      if (upper[i] < g.best[q]) continue;
      position[n] = position[i];
      upper[n] = upper[i];
      if (upper[n] > upper[top]) top = n;
      ++n;
    }
    g.count[q] = 0;
    if (n == 0) return;
    std::swap(position[0], position[top]);
    std::swap(upper[0], upper[top]);
    const double scale = queries_.errors[query].scale;
    Candidates& found = found_[query];
    found.lower = std::max(found.lower, g.best[q] * scale * kDown);
    int64_t batch[kBatch];
    for (int i = 0; i < n;) {
      int filled = 0;
      for (const int most = i == 0 ? 1 : kBatch; i < n && filled < most; ++i) {
        if (upper[i] >= g.best[q]) batch[filled++] = word_at(*book_.header, position[i]);
      }
      score_batch(batch, filled, query);
      g.best[q] = std::max(g.best[q], static_cast<float>(found.lower / scale * kDown));
    }
  }

  void score_batch(const int64_t* words, int n, int64_t query) {
    int64_t safe[kBatch];
    int filled = 0;
    for (int i = 0; i < n; ++i) {
      const double factor = book_.factors[words[i]];
      if (!book_.is_double && factor > 1 / kSafeFactor && factor < kSafeFactor) {
        safe[filled++] = words[i];
      } else {
        found_[query].add_float64(book_, unit(query), words[i]);
      }
    }
    float similarity[kBatch];
    const float* turned = queries_.turned.get() + query * 2 * queries_.components;
    kernels_.score(turned, static_cast<const float*>(book_.words), queries_.components, safe, filled, similarity);
    for (int i = 0; i < filled; ++i) {
      found_[query].add_float32(book_, unit(query), safe[i], similarity[i] * book_.factors[safe[i]],
                                queries_.errors[query].float32);
    }
  }

  const Kernels& kernels_;
  const Book& book_;
  const Queries& queries_;
  Candidates* found_;
  std::vector<Int8Group> groups_;
  struct Kept {
    int count = 0;
    uint32_t position[kSettleAbove];
    float upper[kSettleAbove];
  };
  std::vector<Kept> kept_;  // of each query
  uint32_t position_[kMaxGroup][kCapacity];
  float upper_[kMaxGroup][kCapacity];
};

}  // namespace

void search_exact(const Kernels& kernels, const Book& book, const Queries& queries, int64_t first, int64_t last,
                  Candidates* found) {
  ExactSearch(kernels, book, queries, found).run(first, last);
}

void search_float32(const Kernels& kernels, const Book& book, const Queries& queries, int64_t first, int64_t last,
                    Largest* found) {
  std::vector<Float32Group> groups;
  for (int64_t i = 0; i < queries.count; i += queries.group) {
    Float32Group& g = groups.emplace_back();
    g.rows = queries.float32.get() + i * 2 * queries.components;
    g.queries = static_cast<int>(std::min<int64_t>(queries.group, queries.count - i));
    std::fill_n(&g.best[0][0], kMaxGroup * kTileWords, -1.0f);
    std::fill_n(&g.tile[0][0], kMaxGroup * kTileWords, 0);
  }
  for (int64_t tile = first; tile < last; tile += kBlockTiles) {
    for (Float32Group& g : groups) {
      kernels.maximum(book.tiles, queries.components, tile, std::min<int64_t>(tile + kBlockTiles, last), g);
    }
  }
  for (int64_t i = 0; i < queries.count; ++i) {
    const Float32Group& g = groups[i / queries.group];
    const int64_t q = i % queries.group;
    for (int lane = 0; lane < kTileWords; ++lane) {
      found[i].add({g.best[q][lane], g.tile[q][lane] * kTileWords + lane});
    }
  }
}

}  // namespace csikernels::cpu::codebook
