// top_m in portable C++: select the m best candidates (expected n steps), then sort these (m log m).
//
// Each score becomes an unsigned key whose order is the wanted one, so that a single comparison of (key, position) is
// the total order and the result does not depend on the selection algorithm.
#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "cpu/self_information_kernel.h"

namespace csikernels::cpu::scalar {
namespace {

// Smaller key = better score. IEEE numbers order like sign-magnitude integers: negative ones reversed, positive ones
// above.
template <class Float>
auto key_of(Float score) {
  using Bits = std::conditional_t<sizeof(Float) == 4, uint32_t, uint64_t>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  if (score != score) return std::numeric_limits<Bits>::max();
  const Bits bits = std::bit_cast<Bits>(score + Float(0));  // -0 + 0 is +0, which makes the two zeros equal
  const Bits ascending = bits & sign ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | sign);
  return static_cast<Bits>(~ascending);
}

template <class Float>
struct Candidate {
  decltype(key_of(Float())) key;
  int64_t index;

  bool operator<(const Candidate& other) const { return key != other.key ? key < other.key : index < other.index; }
};

template <class Float>
void top_m_row(const Float* score, int64_t n, int64_t m, int64_t* indices, void* scratch) {
  static_assert(sizeof(Candidate<Float>) <= kTopMScratchBytes, "the scratch of one candidate is too small");
  auto* candidates = static_cast<Candidate<Float>*>(scratch);
  for (int64_t i = 0; i < n; ++i) candidates[i] = {key_of(score[i]), i};
  if (m < n) std::nth_element(candidates, candidates + m, candidates + n);
  std::sort(candidates, candidates + m);
  for (int64_t i = 0; i < m; ++i) indices[i] = candidates[i].index;
}

}  // namespace

void top_m(const float* score, int64_t n, int64_t m, int64_t* indices, void* scratch) {
  top_m_row(score, n, m, indices, scratch);
}

void top_m(const double* score, int64_t n, int64_t m, int64_t* indices, void* scratch) {
  top_m_row(score, n, m, indices, scratch);
}

}  // namespace csikernels::cpu::scalar
