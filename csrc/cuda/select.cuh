// Exact selection of the m smallest of n keys by one thread block: radix select, compaction, sort of the survivors.
//
// Keys are unsigned integers in the order wanted, smallest first; equal keys go by the lower position, so the result is
// deterministic. All functions are called by the whole block.
#pragma once

#include <cstdint>

namespace csikernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 256;  // of one digit of 8 bits
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint16_t kNobody = 0xffff;  // fills the sort up to a power of two, behind every element

struct SelectState {
  int histogram[kBins];
  int bin, below, inside;  // the digit chosen, the keys below it, the keys with it
  int survivors;           // taken so far
  int warp_counts[kThreads / 32];
};

// The bin in which the remaining-th smallest key lies. One warp, 8 bins a lane.
__device__ inline void find_bin(SelectState& state, int remaining) {
  const int lane = threadIdx.x;
  int counts[kBins / 32], sum = 0;
#pragma unroll
  for (int k = 0; k < kBins / 32; ++k) {
    counts[k] = state.histogram[lane * (kBins / 32) + k];
    sum += counts[k];
  }
  int before = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  before -= sum;
  if (before < remaining && remaining <= before + sum) {
#pragma unroll
    for (int k = 0; k < kBins / 32; ++k) {
      if (before < remaining && remaining <= before + counts[k]) {
        state.bin = lane * (kBins / 32) + k;
        state.below = before;
        state.inside = counts[k];
      }
      before += counts[k];
    }
  }
}

// The m-th smallest key; `ties` of those equal to it are among the m smallest, `all_ties` says whether all are.
template <class Key>
__device__ Key mth_smallest(const Key* keys, int n, int m, SelectState& state, int& ties, bool& all_ties) {
  Key prefix = 0;
  int remaining = m;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) state.histogram[bin] = 0;
    __syncthreads();
    const Key known = shift == 8 * sizeof(Key) - 8 ? Key(0) : ~Key(0) << (shift + 8);
    for (int first = 0; first < n; first += kThreads) {
      const int i = first + threadIdx.x;
      const bool counts = i < n && ((keys[i] ^ prefix) & known) == 0;
      const int bin = counts ? static_cast<int>(keys[i] >> shift & 0xff) : -1;
      // Zero-filled CSI gives one key to most elements: a warp of them adds once, not 32 times to one address.
      int same;
      __match_all_sync(kAllLanes, bin, &same);
      if (same) {
        if (counts && threadIdx.x % 32 == 0) atomicAdd(&state.histogram[bin], 32);
      } else if (counts) {
        atomicAdd(&state.histogram[bin], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) find_bin(state, remaining);
    __syncthreads();
    prefix |= Key(state.bin) << shift;
    remaining -= state.below;
    all_ties = remaining == state.inside;
    // Nobody writes the state again before the barrier behind the next clearing of the histogram.
  }
  ties = remaining;
  return prefix;
}

// Positions of the m smallest keys, in no particular order, in order[0..m).
template <class Key>
__device__ void compact(const Key* keys, int n, Key threshold, int ties, bool all_ties, SelectState& state,
                        uint16_t* order) {
  if (threadIdx.x == 0) state.survivors = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int ties_before = 0;
  for (int first = 0; first < n; first += kThreads) {
    const int i = first + threadIdx.x;
    const Key key = i < n ? keys[i] : ~Key(0);
    bool taken = i < n && (key < threshold || (all_ties && key == threshold));
    if (!all_ties) {  // of the ties, the lowest positions
      const bool tie = i < n && key == threshold;
      const unsigned votes = __ballot_sync(kAllLanes, tie);
      if (lane == 0) state.warp_counts[warp] = __popc(votes);
      __syncthreads();
      int before = ties_before + __popc(votes & ((1u << lane) - 1)), total = 0;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) {
        const int count = state.warp_counts[w];
        before += w < warp ? count : 0;
        total += count;
      }
      ties_before += total;
      taken = taken || (tie && before < ties);
      __syncthreads();
    }
    const unsigned votes = __ballot_sync(kAllLanes, taken);
    int slot = 0;
    if (lane == 0 && votes != 0) slot = atomicAdd(&state.survivors, __popc(votes));
    slot = __shfl_sync(kAllLanes, slot, 0) + __popc(votes & ((1u << lane) - 1));
    if (taken) order[slot] = static_cast<uint16_t>(i);
  }
  __syncthreads();
}

// A survivor, as it is compared.
template <class Key>
struct Entry {
  Key key;
  int position;

  __device__ Entry(const Key* keys, uint16_t at) : key(at == kNobody ? ~Key(0) : keys[at]), position(at) {}
  __device__ bool before(const Entry& other) const {
    return key < other.key || (key == other.key && position < other.position);
  }
  // Member by member: a choice between two objects would put both into local memory.
  __device__ void become(const Entry& other, bool really) {
    key = really ? other.key : key;
    position = really ? other.position : position;
  }
  // The entry of the lane whose number differs in the bits of `distance`.
  __device__ Entry across(int distance) const {
    Entry other = *this;
    other.key = __shfl_xor_sync(kAllLanes, key, distance);
    other.position = __shfl_xor_sync(kAllLanes, position, distance);
    return other;
  }
};

// Entries of `order` that sorting m of them needs: a power of two, at least two a lane.
__host__ __device__ constexpr int sort_size(int m) {
  int size = 64;
  while (size < m) size *= 2;
  return size;
}

// The steps of the bitonic sort at distances of up to 32, for runs first_run..last_run: 64 entries stay in a warp's
// registers, two a lane, 32 apart.
template <class Key>
__device__ void sort_in_warps(const Key* keys, int size, int first_run, int last_run, uint16_t* order) {
  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32 * 64; first < size; first += 2 * kThreads) {
    Entry<Key> low(keys, order[first + lane]), high(keys, order[first + 32 + lane]);
    for (int run = first_run; run <= last_run; run *= 2) {
      if (run > 32) {
        const bool ascending = (first & run) == 0;
        const bool swap = high.before(low) == ascending;
        const Entry<Key> before = low;
        low.become(high, swap);
        high.become(before, swap);
      }
      for (int distance = min(run / 2, 16); distance > 0; distance /= 2) {
        const auto exchange = [&](Entry<Key>& mine, int index) {
          const Entry<Key> other = mine.across(distance);
          const bool keep_smaller = ((index & distance) == 0) == ((index & run) == 0);
          mine.become(other, other.before(mine) == keep_smaller);
        };
        exchange(low, first + lane);
        exchange(high, first + 32 + lane);
      }
    }
    order[first + lane] = static_cast<uint16_t>(low.position);
    order[first + 32 + lane] = static_cast<uint16_t>(high.position);
  }
  __syncthreads();
}

// Bitonic sort of positions by (key, position).
template <class Key>
__device__ void sort_survivors(const Key* keys, int m, uint16_t* order) {
  const int size = sort_size(m);
  for (int i = m + threadIdx.x; i < size; i += kThreads) order[i] = kNobody;
  __syncthreads();
  sort_in_warps(keys, size, 2, 64, order);
  for (int run = 128; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 32; distance /= 2) {
#pragma unroll 1  // one step, unless more than 1,024 survive
      for (int t = threadIdx.x; t < size / 2; t += kThreads) {
        const int low = 2 * t - (t & (distance - 1)), high = low + distance;
        const uint16_t a = order[low], b = order[high];
        if (Entry<Key>(keys, b).before(Entry<Key>(keys, a)) == ((low & run) == 0)) {
          order[low] = b;
          order[high] = a;
        }
      }
      __syncthreads();
    }
    sort_in_warps(keys, size, run, run, order);
  }
}

// order[0..m) = positions of the m smallest keys, in order.
template <class Key>
__device__ void select_smallest(const Key* keys, int n, int m, SelectState& state, uint16_t* order) {
  int ties;
  bool all_ties;
  const Key threshold = mth_smallest(keys, n, m, state, ties, all_ties);
  compact(keys, n, threshold, ties, all_ties, state, order);
  sort_survivors(keys, m, order);
}

}  // namespace
}  // namespace csikernels::cuda
