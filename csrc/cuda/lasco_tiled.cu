// lasco_forward at the sizes of Fig. 10's SAMs; one block per sample, which goes through the whole of both networks.
//
// Formula: output = proxy(h) + alpha (base - reference(h)), each network
//     y = output(encoder(input(h) + position)), L blocks of attention, feed-forward, two LayerNorms and residuals,
//   with 32 tokens of 64 features, width d = 32, 64 or 128, 4 heads, feed-forward 4 d. float32 banks compute in
//   float32; of bfloat16 banks, operands of products (attention's too) are rounded to bfloat16 and go through the
//   tensor cores with float32 sums, everything else is float32.
// Layout: activations stay in shared memory, the residual stream in float32, operands of products in the weights' type
//   (lasco_layout.cuh). Weights are read as they are stored, [rows][depth], each 16 bytes by the lane that multiplies
//   them (bfloat16) or by its warp (float32): cp.async rings that no barrier stops. All 32 tokens meet a weight when it
//   comes, so it comes once.
// Tiling: a warp holds the sums of its 8-row tiles of a matrix for all tokens, up to 48 registers a lane, so that an
//   operand is read from shared memory once for all of them. Where both networks fit into 99 KB they run side by side
//   in lock step, which halves the way through 7 L + 4 barriers, and doubles the warps that fill the gaps. Otherwise
//   the reference goes first, the rings running on.
// Bytes of a sample at L = 2, d = 64: both networks, 457 KB in bfloat16 and 883 KB in float32, and 25 KB of inputs and
//   output. The reference, and a proxy that several samples use, come from memory once and then from the L2 cache.
//   Operations: 14.7 M.
// Floor on an H100 (3.35 TB/s, 990 bf16 and 67 float32 TFLOP/s) for 64 slots, one sample each: memory 16.4 MB, 4.9 us,
//   in bfloat16 and 30.5 MB, 9.1 us, in float32; operations 1 us and 14 us, on 64 of 132 multiprocessors 29 us. What a
//   launch of fewer samples than multiprocessors takes is the time of one block: in bfloat16 4.3 us for the L2 cache at
//   64 bytes a clock, 11 us for 2.4 MB of shared memory, and as much for its instructions.
//
//   d    type      warps  shared memory  registers (sm_90a)  blocks on a multiprocessor of 227 KB
//   32   bfloat16  2 x 4      66.9 KB      114                 2
//   64   bfloat16  2 x 8     100.2 KB      118                 1
//   128  bfloat16      8      84.9 KB      128                 2
//   32   float32   2 x 4      75.1 KB      204                 1
//   64   float32       8      83.3 KB      214                 1
//   128  float32       8     100.5 KB      254                 1
#include <cuda_bf16.h>

#include "cuda/lasco_layout.cuh"
#include "cuda/lasco_sam.cuh"

namespace csikernels::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared_memory[];

// Requests what the network will read into the L2 cache: all of a proxy, which usually comes from memory, and of the
// reference what is no matrix. The rings then run ahead of the L2 cache only, and biases, which are read just before
// they are needed, cost less.
template <class C>
__device__ void prefetch(const LascoCall& call, int network, int64_t slot, int warp, int lane) {
  constexpr int d = C::kWidth, ff = C::kFeedforward, kLine = 128;
  const int entries = static_cast<int>(call.entries);
  for (int entry = warp; entry < entries; entry += C::kWarps) {
    const int part = entry < 3 || entry >= entries - 2 ? -1 : (entry - 3) % 12;
    const bool matrix = entry == 0 || entry == entries - 2 || part == 0 || part == 2 || part == 4 || part == 6;
    if (matrix && network == kReferenceSam) continue;
    const int rows = entry == 2               ? kTokens
                     : entry >= entries - 2   ? kFeatures
                     : part == 0 || part == 1 ? 3 * d
                     : part == 4 || part == 5 ? ff
                                              : d;
    const int depth = entry == 0 ? kFeatures : part == 6 ? ff : matrix || entry == 2 ? d : 1;
    const int bytes = rows * depth * (matrix ? static_cast<int>(sizeof(typename C::Weight)) : 4);
    const char* const first =
        static_cast<const char*>(call.weights[network][entry]) + (network == kProxySam ? slot * bytes : 0);
    for (int at = lane * kLine; at < bytes; at += 32 * kLine) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(first + at));
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) lasco_kernel(const __grid_constant__ LascoCall call) {
  const int64_t sample = blockIdx.x, slot = call.slot[sample];
  if (slot < 0 || slot >= call.slots) __trap();  // as torch's own indexing does
  const int lane = threadIdx.x % 32, of_block = threadIdx.x / 32;
  const int warp = of_block % C::kWarps, side = of_block / C::kWarps;
  unsigned char* const own = shared_memory + side * C::kNetwork;
  unsigned char* const rings = shared_memory + C::kAtOnce * C::kNetwork;
  const int first = C::kAtOnce == 2 ? side : kReferenceSam, last = C::kAtOnce == 2 ? side : kProxySam;
  const int products = (2 + static_cast<int>(call.sizes.layers) * C::kProductsOfBlock) * (last - first + 1);
  Matrix* const list = reinterpret_cast<Matrix*>(rings + C::kRings) + side * products;
  list_matrices<C>(call, first, last, slot, 32 * warp + lane, list);
  __syncthreads();
  Sam<C> sam{.call = call,
             .sample = sample,
             .slot = slot,
             .warp = warp,
             .lane = lane,
             .affine = reinterpret_cast<float*>(own),
             .residual = own + C::kAffine,
             .operand = own + C::kAffine + C::kResidual,
             .wide = own + C::kAffine + C::kResidual + C::kOperand,
             .stream = Stream<C>(list, list + products, warp, lane, rings + of_block * C::kStages * kStageBytes),
             .network = first};
  for (int network = first; network <= last; ++network) prefetch<C>(call, network, slot, warp, lane);
#pragma unroll 1
  for (;; ++sam.network) {
    sam.stage();
    __syncthreads();
    sam.embed();
    __syncthreads();
    sam.encode();
    sam.project();
    if (sam.network == last) return;
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

// weights' type, width, warps of a network, networks at once, parts of the hidden layer, stages, blocks wanted on an SM
using Float32 = Config<float, 32, 4, 2, 1, 6, 1>;
using Float64 = Config<float, 64, 8, 1, 1, 8, 1>;
using Float128 = Config<float, 128, 8, 1, 2, 4, 1>;
using Half32 = Config<__nv_bfloat16, 32, 4, 2, 1, 8, 2>;
using Half64 = Config<__nv_bfloat16, 64, 8, 2, 1, 5, 1>;
using Half128 = Config<__nv_bfloat16, 128, 8, 1, 4, 8, 2>;

template <class C>
cudaError_t launch(const LascoCall& call, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(lasco_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  if (error != cudaSuccess) return error;
  lasco_kernel<C><<<static_cast<unsigned>(call.samples), C::kThreads, C::kShared, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

bool is_tiled(const SamSizes& s) {
  const bool width = s.width == 32 || s.width == 64 || s.width == 128;
  return width && s.tokens == kTokens && s.features == kFeatures && s.heads == kHeads && s.feedforward == 4 * s.width &&
         s.layers >= 1 && s.layers <= kTiledLayers;
}

cudaError_t lasco_tiled(const LascoCall& call, cudaStream_t stream) {
  const bool half = call.sizes.bfloat16;
  switch (call.sizes.width) {
    case 32:
      return half ? launch<Half32>(call, stream) : launch<Float32>(call, stream);
    case 64:
      return half ? launch<Half64>(call, stream) : launch<Float64>(call, stream);
    default:
      return half ? launch<Half128>(call, stream) : launch<Float128>(call, stream);
  }
}

}  // namespace csikernels::cuda
