// Self-information, selection of the most informative elements, and scattering of codewords; one block per sample.
//
// Formula: I = -log2( (1 + sum_k exp(-(c - c_k)^2 / (2 b^2))) / K / (sqrt(2 pi) b) ); ranked by the neighbour sum,
// which
//   is monotone in I. K(c, c_k) is symmetric and the centre constant, so a 3x3 grid takes 4 exponentials an element
//   instead of 9: each goes to the element and to its partner.
// Exactness: terms are added in fixed point of 2^-27, so that sums do not depend on their order: elements with equal
//   differences tie, and go by position. ex2.approx errs by 2^-22 at most, eight terms by 2e-6 of a density of at least
//   1: 3e-7 bits. Other neighbourhoods and float64 go through float64, as the reference computes them.
// Layout: image [C][H][W] staged in shared memory as float32, read once; keys beside it; positions of the survivors in
//   the image's place afterwards. More than 12,288 elements of float32 are not staged: the L1 cache serves neighbours.
// Bytes of [B, 2, 32, 32] float32, m = 221: 8,192 read, 221 * (4 + 4 + 8) read and written: 11.7 kB a sample.
// Floor on an H100 (3.35 TB/s): 0.9 us for B = 256; by the count of its steps a block takes about 5 us, and 264 or more
//   run at once, so a launch is bound by latency.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/density.cuh"
#include "cuda/select.cuh"
#include "cuda/self_information.h"

namespace csikernels::cuda {
namespace {

constexpr int kTile = 8192;  // elements of an image that one block scatters into

// Kernels ------------------------------------------------------------------------------------------------------------

extern __shared__ __align__(16) unsigned char shared_memory[];

// Shared memory: state | keys [n] unless they spill | the staged image [n], later the survivors' positions.
template <class Key>
struct Shared {
  SelectState* state;
  Key* keys;
  float* image;
  uint16_t* order;

  __device__ Shared(int n, Key* spilled) {
    state = reinterpret_cast<SelectState*>(shared_memory);
    unsigned char* next = shared_memory + sizeof(SelectState);
    keys = spilled;
    if (!spilled) {
      keys = reinterpret_cast<Key*>(next);
      next += (n * sizeof(Key) + 15) / 16 * 16;
    }
    image = reinterpret_cast<float*>(next);
    order = reinterpret_cast<uint16_t*>(next);
  }
};
static_assert(sizeof(SelectState) % 16 == 0);

template <class In>
__device__ void stage(const In* image, int n, float* staged) {
  for (int i = threadIdx.x; i < n; i += kThreads) staged[i] = widen(image[i]);
  __syncthreads();
}

// Keys of a sample by fixed point, from a staged or an unstaged image.
template <class In>
__device__ void fast_keys(const In* image, Shape shape, bool staged, const Offsets& offsets, float coefficient,
                          const Shared<uint32_t>& memory) {
  const auto sums = [&](const auto& pixel) {
    fixed_point_sums(pixel, shape, offsets.row_step, offsets.column_step, coefficient, memory.keys);
  };
  if (staged) {
    stage(image, shape.channels * shape.height * shape.width, memory.image);
    sums([&](int i) { return memory.image[i]; });
  } else {
    sums([&](int i) { return widen(image[i]); });
  }
}

template <class Bits>
__device__ void move(const void* source, void* target, const uint16_t* order, int m) {
  for (int i = threadIdx.x; i < m; i += kThreads) {
    static_cast<Bits*>(target)[i] = static_cast<const Bits*>(source)[order[i]];
  }
}

__device__ void write_codeword(const Codeword& out, int n, int m, const uint16_t* order) {
  const size_t sample = blockIdx.x, bytes = out.element_bytes;
  const void* source = static_cast<const char*>(out.source) + sample * n * bytes;
  void* values = static_cast<char*>(out.values) + sample * m * bytes;
  for (int i = threadIdx.x; i < m; i += kThreads) out.indices[sample * m + i] = order[i];
  switch (out.element_bytes) {
    case 2:
      return move<uint16_t>(source, values, order, m);
    case 4:
      return move<uint32_t>(source, values, order, m);
    default:
      return move<uint64_t>(source, values, order, m);
  }
}

template <class In>
__global__ void __launch_bounds__(kThreads, 2) select_fast(const In* images, Shape shape, int m, bool staged,
                                                           float coefficient, const Offsets offsets, Codeword out) {
  const int n = shape.channels * shape.height * shape.width;
  const Shared<uint32_t> memory(n, nullptr);
  fast_keys(images + static_cast<size_t>(blockIdx.x) * n, shape, staged, offsets, coefficient, memory);
  select_smallest(memory.keys, n, m, *memory.state, memory.order);
  write_codeword(out, n, m, memory.order);
}

template <class In>
__global__ void __launch_bounds__(kThreads, 2) select_exact(const In* images, Shape shape, int m, double bandwidth,
                                                            const Offsets offsets, uint64_t* spilled, Codeword out) {
  const int n = shape.channels * shape.height * shape.width;
  const size_t first = static_cast<size_t>(blockIdx.x) * n;
  const Shared<uint64_t> memory(n, spilled ? spilled + first : nullptr);
  const In* image = images + first;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const auto pixel = [&](int j) { return static_cast<double>(widen(image[j])); };
    memory.keys[i] = ordered(log_neighbour_sum(pixel, shape, offsets, bandwidth, i));
  }
  __syncthreads();
  select_smallest(memory.keys, n, m, *memory.state, memory.order);
  write_codeword(out, n, m, memory.order);
}

// bits = constant - log2(1 + sum)
template <class In>
__global__ void __launch_bounds__(kThreads, 2)
    information_fast(const In* images, Shape shape, bool staged, float coefficient, const Offsets offsets,
                     float constant, float* bits) {
  const int n = shape.channels * shape.height * shape.width;
  const Shared<uint32_t> memory(n, nullptr);
  const size_t first = static_cast<size_t>(blockIdx.x) * n;
  fast_keys(images + first, shape, staged, offsets, coefficient, memory);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const uint32_t sum = memory.keys[i];
    bits[first + i] = sum == ~0u ? nanf("") : constant - log2f(1 + sum * (1 / kUnit));
  }
}

template <class In, class Bits>
__global__ void __launch_bounds__(kThreads, 2) information_exact(const In* images, Shape shape, double bandwidth,
                                                                 const Offsets offsets, double constant, Bits* bits) {
  const int n = shape.channels * shape.height * shape.width;
  const size_t first = static_cast<size_t>(blockIdx.x) * n;
  const int i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= n) return;
  const auto pixel = [&](int j) { return static_cast<double>(widen(images[first + j])); };
  double log_sum = log_neighbour_sum(pixel, shape, offsets, bandwidth, i);
  if (offsets.centres > 0) {
    const double centre = log(static_cast<double>(offsets.centres));
    const double high = fmax(log_sum, centre), low = fmin(log_sum, centre);
    log_sum = isnan(log_sum) ? log_sum : high + log1p(exp(low - high));
  }
  bits[first + i] = static_cast<Bits>(constant - log_sum / kLn2);
}

template <class In, class Key>
__global__ void __launch_bounds__(kThreads, 2) top_m_kernel(const In* score, int n, int m, Key* spilled, Codeword out) {
  const size_t first = static_cast<size_t>(blockIdx.x) * n;
  const Shared<Key> memory(n, spilled ? spilled + first : nullptr);
  for (int i = threadIdx.x; i < n; i += kThreads) memory.keys[i] = ordered(-widen(score[first + i]));
  __syncthreads();
  select_smallest(memory.keys, n, m, *memory.state, memory.order);
  write_codeword(out, n, m, memory.order);
}

// One block per tile of an image: whoever points at an element last in the codeword owns it.
template <class Bits>
__global__ void __launch_bounds__(kThreads, 2)
    scatter_kernel(const Bits* values, const int64_t* indices, const Bits* mean, int m, int64_t n, Bits* image) {
  __shared__ int owner[kTile];
  const size_t sample = blockIdx.x;
  const int64_t first = int64_t(blockIdx.y) * kTile;
  const int size = static_cast<int>(min(int64_t(kTile), n - first));
  for (int i = threadIdx.x; i < size; i += kThreads) owner[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < m; i += kThreads) {
    const int64_t place = indices[sample * m + i];
    if (place < 0 || place >= n) __trap();  // as torch's own indexing does
    if (place >= first && place < first + size) atomicMax(&owner[place - first], i);
  }
  __syncthreads();
  const Bits background = mean[sample];
  for (int i = threadIdx.x; i < size; i += kThreads) {
    image[sample * n + first + i] = owner[i] < 0 ? background : values[sample * m + owner[i]];
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

int shared_limit(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// The constant of the information, without the neighbour sum.
double constant_bits(const Offsets& offsets, double bandwidth) {
  return std::log2(static_cast<double>(offsets.count)) + std::log2(std::sqrt(2 * M_PI)) + std::log2(bandwidth);
}

float coefficient_of(double bandwidth) { return static_cast<float>(-1 / (kLn2 * 2 * bandwidth * bandwidth)); }

constexpr size_t kStagedBytes = 96 * 1024;  // keys and image together, on every target

}  // namespace

bool is_fast(const Images& images, double bandwidth, const Offsets& offsets) {
  return images.type != Scalar::float64 && offsets.row_step > 0 && offsets.centres == 1 &&
         std::abs(std::log2(bandwidth)) < 60;
}

bool needs_workspace(int n, bool exact, int device) {
  const size_t key = exact ? 8 : 4;
  return sizeof(SelectState) + padded(n * key) + 2 * sort_size(n) > static_cast<size_t>(shared_limit(device));
}

cudaError_t self_information(const Images& images, double bandwidth, const Offsets& offsets, void* bits,
                             cudaStream_t stream) {
  const Shape shape{images.channels, images.height, images.width};
  const int n = images.size();
  const double constant = constant_bits(offsets, bandwidth);
  return with_type(images.type, [&]<class In>(Type<In>) {
    const In* data = static_cast<const In*>(images.data);
    if constexpr (sizeof(In) < 8) {
      if (is_fast(images, bandwidth, offsets)) {
        const bool staged = size_t(n) * 8 <= kStagedBytes;
        const size_t bytes = sizeof(SelectState) + padded(size_t(n) * 4) + (staged ? size_t(n) * 4 : 0);
        if (const cudaError_t error = allow_shared(information_fast<In>, bytes)) return error;
        information_fast<In><<<images.batch, kThreads, bytes, stream>>>(data, shape, staged, coefficient_of(bandwidth),
                                                                        offsets, static_cast<float>(constant),
                                                                        static_cast<float*>(bits));
        return cudaGetLastError();
      }
    }
    using Bits = std::conditional_t<sizeof(In) == 8, double, float>;
    const dim3 grid(images.batch, (n + kThreads - 1) / kThreads);  // the first may exceed 65,535
    information_exact<In, Bits>
        <<<grid, kThreads, 0, stream>>>(data, shape, bandwidth, offsets, constant, static_cast<Bits*>(bits));
    return cudaGetLastError();
  });
}

cudaError_t select_informative(const Images& images, int m, double bandwidth, const Offsets& offsets,
                               const Codeword& out, uint64_t* workspace, cudaStream_t stream) {
  const Shape shape{images.channels, images.height, images.width};
  const size_t n = images.size(), order = 2 * sort_size(m);
  return with_type(images.type, [&]<class In>(Type<In>) {
    const In* data = static_cast<const In*>(images.data);
    if constexpr (sizeof(In) < 8) {
      if (is_fast(images, bandwidth, offsets)) {
        const bool staged = n * 8 <= kStagedBytes;
        const size_t bytes = sizeof(SelectState) + padded(n * 4) + std::max(staged ? n * 4 : 0, order);
        if (const cudaError_t error = allow_shared(select_fast<In>, bytes)) return error;
        select_fast<In><<<images.batch, kThreads, bytes, stream>>>(data, shape, m, staged, coefficient_of(bandwidth),
                                                                   offsets, out);
        return cudaGetLastError();
      }
    }
    const size_t bytes = sizeof(SelectState) + (workspace ? 0 : padded(n * 8)) + order;
    if (const cudaError_t error = allow_shared(select_exact<In>, bytes)) return error;
    select_exact<In><<<images.batch, kThreads, bytes, stream>>>(data, shape, m, bandwidth, offsets, workspace, out);
    return cudaGetLastError();
  });
}

cudaError_t top_m(const void* score, Scalar type, int batch, int n, int m, const Codeword& out, uint64_t* workspace,
                  cudaStream_t stream) {
  return with_type(type, [&]<class In>(Type<In>) {
    using Key = std::conditional_t<sizeof(In) == 8, uint64_t, uint32_t>;
    const size_t bytes = sizeof(SelectState) + (workspace ? 0 : padded(n * sizeof(Key))) + 2 * sort_size(m);
    if (const cudaError_t error = allow_shared(top_m_kernel<In, Key>, bytes)) return error;
    top_m_kernel<In, Key><<<batch, kThreads, bytes, stream>>>(static_cast<const In*>(score), n, m,
                                                              reinterpret_cast<Key*>(workspace), out);
    return cudaGetLastError();
  });
}

cudaError_t scatter_codeword(const void* values, const int64_t* indices, const void* mean, int batch, int m, int64_t n,
                             int element_bytes, void* image, cudaStream_t stream) {
  const auto run = [&]<class Bits>(Type<Bits>) {
    const dim3 grid(batch, static_cast<unsigned>((n + kTile - 1) / kTile));  // the first may exceed 65,535
    scatter_kernel<Bits><<<grid, kThreads, 0, stream>>>(
        static_cast<const Bits*>(values), indices, static_cast<const Bits*>(mean), m, n, static_cast<Bits*>(image));
    return cudaGetLastError();
  };
  switch (element_bytes) {
    case 2:
      return run(Type<uint16_t>());
    case 4:
      return run(Type<uint32_t>());
    default:
      return run(Type<uint64_t>());
  }
}

}  // namespace csikernels::cuda
