// Dividing rows among torch's threads as they become free.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace csikernels::cpu {

// Hands out [0, count) in pieces; safe to call from many threads.
class Pieces {
 public:
  Pieces(int64_t count, int64_t piece) : Pieces(count, piece, 0, piece) {}

  // The last `thin_count` (or all, if less) come in pieces of `thin`.
  Pieces(int64_t count, int64_t piece, int64_t thin_count, int64_t thin)
      : count_(count), piece_(piece), thin_(thin), whole_(std::max<int64_t>(0, count - thin_count) / piece) {}

  // The next piece in begin..end; false when none is left.
  bool next(int64_t& begin, int64_t& end) {
    const int64_t i = taken_.fetch_add(1, std::memory_order_relaxed);
    begin = std::min(i, whole_) * piece_ + std::max<int64_t>(0, i - whole_) * thin_;
    end = std::min(begin + (i < whole_ ? piece_ : thin_), count_);
    return begin < count_;
  }

 private:
  const int64_t count_, piece_, thin_, whole_;
  std::atomic<int64_t> taken_{0};
};

// torch's threads, or fewer where one would get less than `grain` of `count`.
inline int64_t useful_threads(int64_t count, int64_t grain) {
  return std::clamp<int64_t>(count / std::max<int64_t>(1, grain), 1, at::get_num_threads());
}

// Calls work(pieces) once on each of `threads`, which asks for pieces until none is left. Halves fixed beforehand would
// wait for the thread that wakes last or is interrupted.
template <class Work>
void parallel_pieces(Pieces&& pieces, int64_t threads, const Work& work) {
  if (threads <= 1) return work(pieces);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(pieces);
  });
}

}  // namespace csikernels::cpu
