// Packing of codebooks: factors to unit norm, and the unit words in bf16, in the order of the tensor cores' lanes.
//
// Layout: see codebook.h. One block packs a tile of 128 words, 8 lanes a word, in float64 throughout: what bf16 leaves
//   out of a word is known exactly, up to the rounding of the bound.
// Bytes for K words of D complex64: 8 D in (twice more from L1), 8 D + 8 + 4 D out. K = 65536, D = 128: 168 MB, 50 us
//   on an H100 (3.35 TB/s). Without the copy of the words 8 D less: 101 MB, 30 us.
#include <cuda_bf16.h>

#include "cuda/codebook.h"
#include "cuda/codebook_rows.cuh"

namespace csikernels::cuda::codebook {
namespace {

constexpr int kThreads = 256;

template <class Float>
__global__ void __launch_bounds__(kThreads, 4) pack_kernel(const Pack pack) {
  __shared__ uint32_t largest_residual;
  if (threadIdx.x == 0) largest_residual = 0;
  __syncthreads();
  const Layout& layout = pack.layout;
  const int64_t tiles = layout.tiles(), book = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int lane = threadIdx.x % kLanes, dimension = static_cast<int>(layout.dimension), chunks = layout.chunks();
  uint32_t* const out =
      static_cast<uint32_t*>(pack.tiles) + static_cast<int64_t>(blockIdx.x) * chunks * (kChunkBytes / 4);
#pragma unroll 1
  for (int place = threadIdx.x / kLanes; place < kTileWords; place += kThreads / kLanes) {
    const int64_t position = tile * kTileWords + place;
    const bool is_word = position < layout.words;
    const int64_t word = book * layout.words + layout.word_at(position);
    const auto* from = static_cast<const Pair<Float>*>(pack.from) + word * dimension;
    auto* const words = static_cast<Pair<Float>*>(pack.words);
    auto* const copy = words == nullptr ? nullptr : words + word * dimension;
    Magnitude<Float> largest = 0;
    for (int c = lane; is_word && c < dimension; c += kLanes) {
      const Magnitude<Float> m = magnitude<Float>(from[c]);
      largest = m > largest ? m : largest;
    }
    const Scale<Float> range(maximum_of_group(largest));
    if (is_word && !range.usable && lane == 0) atomicMin(pack.refused, static_cast<unsigned long long>(word));
    const bool usable = is_word && range.usable;
    const auto scaled = [&](Float x) {
      if constexpr (sizeof(Float) == 8) {
        return range(x);
      } else {
        return static_cast<double>(x) * power_of_two<double>(-range.exponent);
      }
    };
    double squares = 0, more_squares = 0;
    for (int c = lane; usable && c < dimension; c += kLanes) {
      const Pair<Float> z = from[c];
      const double re = scaled(z.x), im = scaled(z.y);
      squares += re * re;
      more_squares += im * im;
      if constexpr (sizeof(Float) == 8) {
        copy[c] = {re, im};
      } else if (copy != nullptr) {
        copy[c] = z;
      }
    }
    const double norm2 = sum_of_group(squares + more_squares), inverse = usable ? 1 / sqrt(norm2) : 0;
    if (usable && lane == 0) {
      pack.factors[word] = sizeof(Float) == 8 ? inverse : inverse * power_of_two<double>(-range.exponent);
    }
    double left_out = 0;
    for (int c = lane; c < chunks * kChunk; c += kLanes) {
      const Pair<Float> z = usable && c < dimension ? from[c] : Pair<Float>{0, 0};
      const double re = scaled(z.x) * inverse, im = scaled(z.y) * inverse;
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(static_cast<float>(re), static_cast<float>(im));
      const double rest_re = re - __low2float(rounded), rest_im = im - __high2float(rounded);
      left_out += rest_re * rest_re + rest_im * rest_im;
      // Lane 4 (row % 8) + c % 4 of the warp that reads these 16 words holds (row, c), (row + 8, c), (row, c + 4), ...
      const int step = c / 8, group = place / 16, row = place % 16;
      const int reader = row % 8 * 4 + c % 4, number = row / 8 + c % 8 / 4 * 2;
      out[((step * (kTileWords / 16) + group) * 32 + reader) * 4 + number] =
          *reinterpret_cast<const uint32_t*>(&rounded);
    }
    left_out = sqrt(sum_of_group(left_out)) * (1 + 0x1p-40);
    if (lane == 0) atomicMax(&largest_residual, __float_as_uint(__double2float_ru(left_out)));
  }
  __syncthreads();
  if (threadIdx.x == 0) pack.residuals[blockIdx.x] = __uint_as_float(largest_residual);
}

}  // namespace

cudaError_t pack(const Pack& pack, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(pack.layout.books * pack.layout.tiles());
  if (pack.is_double) {
    pack_kernel<double><<<blocks, kThreads, 0, stream>>>(pack);
  } else {
    pack_kernel<float><<<blocks, kThreads, 0, stream>>>(pack);
  }
  return cudaGetLastError();
}

}  // namespace csikernels::cuda::codebook
