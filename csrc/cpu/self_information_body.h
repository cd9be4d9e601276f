// The kernels of self_information on F32, once per instruction set; included by self_information_<isa>.cpp inside its
// namespace. The including file adds count, keep and sort.

namespace {

constexpr int64_t kVector = F32::lanes;

CSIKERNELS_INLINE IntLanes load_keys(const int32_t* p) {
  IntLanes keys;
  __builtin_memcpy(&keys, p, sizeof(keys));
  return keys;
}

CSIKERNELS_INLINE void store_keys(int32_t* p, IntLanes keys) { __builtin_memcpy(p, &keys, sizeof(keys)); }

float pad(const float* image, const PaddedImage& layout, float scale, float* padded) {
  const F32 factor = broadcast(scale);
  IntLanes largest = {};  // bits of magnitudes: as integers, NaN is above infinity
  const auto add = [&](F32 x) __attribute__((always_inline)) {
    const IntLanes bits = (IntLanes)abs(x).v;
    largest = bits > largest ? bits : largest;
  };
  const int64_t height = layout.height, stride = layout.stride, width = layout.width, whole = width / kVector * kVector;
  const int rest = static_cast<int>(width - whole);
  for (int64_t c = 0; c < layout.channels; ++c) {
    float* row = padded + layout.origin + c * layout.plane;
    for (int64_t i = 0; i < height; ++i, row += stride, image += width) {
      for (int64_t j = 0; j < whole; j += kVector) {
        const F32 x = load(image + j) * factor;
        store(row + j, x);
        add(x);
      }
      if (rest > 0) {
        const F32 x = load_first(image + whole, rest) * factor;
        store_first(row + whole, x, rest);
        add(x);
      }
    }
  }
  int32_t all = 0;
  for (int lane = 0; lane < kVector; ++lane) all = largest[lane] > all ? largest[lane] : all;
  float magnitude;
  __builtin_memcpy(&magnitude, &all, sizeof(magnitude));
  return magnitude;
}

// exp(-(a - b)^2 / (2 b^2)) for the vector at p and the one `shift` after it
CSIKERNELS_INLINE F32 term(const float* p, int64_t shift, F32 coefficient) {
  const F32 difference = load(p) - load(p + shift);
  return exp2_of_nonpositive(difference * difference * coefficient);
}

// S of `rows` rows of one channel from x on, one of each pair's two elements computing the pair's term for both.
// Four planes of terms: with the element to the right, and those to the left, straight and right below.
void strip_sums(const float* x, int64_t rows, const PaddedImage& layout, F32 coefficient, float* terms, int32_t* keys) {
  const int64_t across = layout.pad_columns, down = layout.pad_rows * layout.stride, far = down + across;
  const int64_t n = rows * layout.stride, plane = (far + n + kSlack / 2) / 16 * 16 + 16;
  float* const right = terms + far + (16 - far % 16) % 16;  // element (0, 0), on a vector's boundary
  float* const below = right + plane;
  float* const below_left = below + plane;
  float* const below_right = below_left + plane;
  float* const sums = below_right + plane;

  const auto downward = [&](int64_t p) __attribute__((always_inline)) {
    store(below_left + p, term(x + p, down - across, coefficient));
    store(below + p, term(x + p, down, coefficient));
    store(below_right + p, term(x + p, far, coefficient));
  };
  const auto add = [&](int64_t p) __attribute__((always_inline)) {
    const F32 beside = load(right + p) + load(right + p - across);
    const F32 straight = load(below + p) + load(below + p - down);
    const F32 falling = load(below_right + p) + load(below_right + p - far);
    const F32 rising = load(below_left + p) + load(below_left + p - down + across);
    store(sums + p, (beside + straight) + (falling + rising));
  };

  for (int64_t p = -far; p < 0; p += kVector) downward(p);  // what the elements above the strip give to it
  store(right - across, term(x - across, across, coefficient));
  for (int64_t p = -across + kVector; p < 0; p += kVector) store(right + p, term(x + p, across, coefficient));
  for (int64_t p = 0; p < n; p += kVector) store(right + p, term(x + p, across, coefficient));
  if (down - across >= kVector) {  // what add() reads was stored by earlier rounds
    for (int64_t p = 0; p < n; p += kVector) downward(p), add(p);
  } else {
    for (int64_t p = 0; p < n; p += kVector) downward(p);
    for (int64_t p = 0; p < n; p += kVector) add(p);
  }
  for (int64_t i = 0; i < rows; ++i) {  // without the padding; what a row writes too much, the next one overwrites
    for (int64_t j = 0; j < layout.width; j += kVector) {
      store_keys(keys + i * layout.width + j, (IntLanes)load(sums + i * layout.stride + j).v);
    }
  }
}

CSIKERNELS_INLINE void neighbour_sums_by_strips(const float* padded, const PaddedImage& layout, float coefficient,
                                                float* terms, int32_t* keys, decltype(strip_sums)* sums_of_strip) {
  const int64_t strip = strip_rows(layout);
  for (int64_t c = 0; c < layout.channels; ++c) {
    for (int64_t i = 0; i < layout.height; i += strip) {
      const int64_t rows = layout.height - i < strip ? layout.height - i : strip;
      sums_of_strip(padded + layout.origin + c * layout.plane + i * layout.stride, rows, layout, broadcast(coefficient),
                    terms, keys + (c * layout.height + i) * layout.width);
    }
  }
}

[[maybe_unused]] void neighbour_sums(const float* padded, const PaddedImage& layout, float coefficient, float* terms,
                                     int32_t* keys) {
  neighbour_sums_by_strips(padded, layout, coefficient, terms, keys, strip_sums);
}

void information(const int32_t* keys, int64_t n, float centres, float log2_norm, float* bits) {
  for (int64_t i = 0; i < n; i += kVector) {
    const F32 sum = {(FloatLanes)load_keys(keys + i)};
    const F32 result = broadcast(log2_norm) - log2(broadcast(centres) + sum);
    if (n - i >= kVector) {
      store(bits + i, result);
    } else {
      store_first(bits + i, result, static_cast<int>(n - i));
    }
  }
}

void descending_keys(const float* score, int64_t n, int32_t* keys) {
  for (int64_t i = 0; i < n; i += kVector) {
    F32 x = n - i >= kVector ? load(score + i) : load_first(score + i, static_cast<int>(n - i));
    x = x + broadcast(0.0f);  // -0 + 0 is +0
    const IntLanes bits = (IntLanes)x.v;
    const IntLanes ascending = bits ^ ((bits >> 31) & INT32_MAX);  // negative numbers order the other way round
    store_keys(keys + i, is_nan(x).v ? IntLanes{} + INT32_MAX : ~ascending);
  }
}

bool certain(const int32_t* keys, int64_t count) {
  IntLanes doubtful = {};
  if (count > 1 && keys[0] < kSmallestCertain && keys[1] < kSmallestCertain) return false;
  for (int64_t i = 0; i + 1 < count; i += kVector) {
    const IntLanes bits = load_keys(keys + i + 1);
    const F32 sum = {(FloatLanes)load_keys(keys + i)}, next = {(FloatLanes)bits};
    const F32 binades = {__builtin_convertvector(kBinadeOfEight - (bits >> 23), FloatLanes)};
    const F32 spread = min(broadcast(8.0f) - next, broadcast(kLn2) * (next * binades));
    const F32 margin = broadcast(kMarginOfSum) * next + broadcast(kMarginOfSpread) * spread;
    IntLanes doubt = ~(next.v - sum.v > margin.v) & (bits != kAllEqual);
    const int64_t pairs = count - 1 - i;
    for (int lane = 0; pairs < kVector && lane < kVector; ++lane) doubt[lane] = lane < pairs ? doubt[lane] : 0;
    doubtful |= doubt;
  }
  int32_t any = 0;
  for (int lane = 0; lane < kVector; ++lane) any |= doubtful[lane];
  return any == 0;
}

// Eight float64 numbers, in as many registers as the instruction set needs.
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));

// 2^x for x in -1000..0, to 6e-16. Not one multiply-add is fused, so all instruction sets give the same bits.
CSIKERNELS_INLINE void exp2_of_eight(const Doubles& x, Doubles& y) {
  constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
  // 2^t = 1 + t P(t) for |t| <= 1/2, interpolated at Chebyshev points
  constexpr double c[] = {0.6931471805599462,     0.24022650695910075,    0.05550410866465167,
                          0.009618129107618665,   0.0013333558200794592,  0.00015403530424776529,
                          1.5252672924850737e-05, 1.3215451633221434e-06, 1.0205905413765595e-07,
                          7.070977866508138e-09};
  const Doubles shifted = x + to_integer, t = x - (shifted - to_integer);
  Doubles p = Doubles{} + c[9];
#pragma GCC unroll 9
  for (int k = 8; k >= 0; --k) p = p * t + c[k];
  y = (p * t + 1.0) * (Doubles)(((Longs)shifted + 1023) << 52);  // the lowest bits of `shifted` are the integer
}

// Eight elements at a time, one per lane. `distances` [count][8]: first the neighbours, then t_k.
template <class Float>
CSIKERNELS_INLINE void exact_sums(const Float* padded, const int64_t* positions, int64_t count, const ExactTerms& terms,
                                  double* distances, double* nearest, double* total) {
  constexpr double log2_e = 1.4426950408889634074;
  for (int64_t begin = 0; begin < count; begin += 8) {
    const int rest = count - begin < 8 ? static_cast<int>(count - begin) : 8;
    Doubles centre = {}, closest = Doubles{} + __DBL_MAX__, sum = {};
    for (int lane = 0; lane < 8; ++lane) {
      const Float* at = padded + positions[begin + (lane < rest ? lane : 0)];
      centre[lane] = *at;
      for (int64_t k = 0; k < terms.count; ++k) distances[8 * k + lane] = at[terms.shifts[k]];
    }
    for (int64_t k = 0; k < terms.count; ++k) {
      Doubles distance;
      __builtin_memcpy(&distance, distances + 8 * k, sizeof(distance));
      distance = (centre - distance) * terms.inverse_bandwidth;
      distance = 0.5 * (distance * distance);
      __builtin_memcpy(distances + 8 * k, &distance, sizeof(distance));
      closest = distance < closest ? distance : closest;
    }
    for (int64_t k = 0; k < terms.count; ++k) {
      Doubles x, term;
      __builtin_memcpy(&x, distances + 8 * k, sizeof(x));
      x = (closest - x) * log2_e;
      exp2_of_eight(x < -200.0 ? Doubles{} - 200.0 : x, term);  // NaN stays; 2^-200 is rounded to 0
      sum += (term + terms.rounder) - terms.rounder;
    }
    for (int lane = 0; lane < rest; ++lane) {
      const bool finite = centre[lane] - centre[lane] == 0;
      nearest[begin + lane] = closest[lane];
      total[begin + lane] = finite ? sum[lane] : __builtin_nan("");
    }
  }
}

void exact_sums_of_floats(const float* padded, const int64_t* positions, int64_t count, const ExactTerms& terms,
                          double* scratch, double* nearest, double* total) {
  exact_sums(padded, positions, count, terms, scratch, nearest, total);
}

void exact_sums_of_doubles(const double* padded, const int64_t* positions, int64_t count, const ExactTerms& terms,
                           double* scratch, double* nearest, double* total) {
  exact_sums(padded, positions, count, terms, scratch, nearest, total);
}

[[maybe_unused]] int64_t narrow_one_by_one(int32_t* keys, int32_t* positions, int64_t n, int32_t high) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    keys[count] = key;
    positions[count] = positions[i];
    count += key <= high;
  }
  return count;
}

// The table of an instruction set: these, and what each has of its own. `sort` may be missing.
constexpr InformationKernels with_own(decltype(InformationKernels::neighbour_sums) own_sums,
                                      decltype(InformationKernels::count) count,
                                      decltype(InformationKernels::keep) keep,
                                      decltype(InformationKernels::narrow) narrow,
                                      decltype(InformationKernels::sort) sort) {
  return {
      .pad = pad,
      .neighbour_sums = own_sums,
      .information = information,
      .exact_sums_of_floats = exact_sums_of_floats,
      .exact_sums_of_doubles = exact_sums_of_doubles,
      .descending_keys = descending_keys,
      .count = count,
      .keep = keep,
      .narrow = narrow,
      .sort = sort,
      .certain = certain,
  };
}

}  // namespace
