// CPU side of transformer_forward: the flat weight list becomes a Network, samples are shared out to threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/capability.h"
#include "cpu/transformer_kernel.h"
#include "dispatch.h"

namespace csikernels::cpu {
namespace {

constexpr int64_t kWeightsPerBlock = 12, kMatricesPerBlock = 4;
// Below this many operations a second thread costs more to wake than it saves.
constexpr int64_t kOperationsPerThread = 1 << 20;

// Threads share each product of a block, at five barriers per block, where whole samples would leave some without work:
// batches of less than so many samples per thread, with at least so many operations in a block.
constexpr int64_t kEvenBatches = 4, kOperationsPerBarrier = 1 << 23;

void run_team(int64_t members, void (*body)(void*, int64_t), void* argument) {
  at::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t member = begin; member < end; ++member) body(argument, member);
  });
}

// Reads the lists of the op in their order, checks each entry and keeps alive what it had to make contiguous.
class Reader {
 public:
  Reader(at::TensorList weights, at::TensorList scales, at::TensorList packed)
      : weights_(weights), scales_(scales), packed_(packed) {}

  // Entry `index` of the weights: float32 of this shape.
  const float* vector(int64_t index, at::IntArrayRef shape) {
    return read(weights_[index], "weights", index, at::kFloat, shape).const_data_ptr<float>();
  }

  // Entries `index` and `index + 1` of the weights: matrix [out, in], of which the packed form is read, and bias [out].
  Linear linear(int64_t index, int64_t out, int64_t in) {
    const at::ScalarType dtype = weights_[index].scalar_type();
    const int64_t group = 4 / static_cast<int64_t>(c10::elementSize(dtype));
    const int64_t panels = panels_of(out), at = matrix_++;
    const at::Tensor& data = read(packed_[at], "packed", at, dtype, {panels, (in + group - 1) / group, kPanel, group});
    Linear linear{data.const_data_ptr(), vector(index + 1, {out}), nullptr, nullptr, in, out};
    if (dtype == at::kChar) {
      const int64_t shift = matrices() + quantised_;
      linear.scale = read(scales_[quantised_], "scales", quantised_, at::kFloat, {out}).const_data_ptr<float>();
      linear.shift = read(packed_[shift], "packed", shift, at::kInt, {panels * kPanel}).const_data_ptr<int32_t>();
      ++quantised_;
    }
    return linear;
  }

  int64_t blocks() const { return (static_cast<int64_t>(weights_.size()) - 5) / kWeightsPerBlock; }
  int64_t matrices() const { return 2 + kMatricesPerBlock * blocks(); }

 private:
  const at::Tensor& read(const at::Tensor& tensor, const char* list, int64_t index, at::ScalarType dtype,
                         at::IntArrayRef shape) {
    const std::string name = std::string(list) + "[" + std::to_string(index) + "]";
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
    check_device(tensor, name.c_str(), c10::Device(c10::kCPU));
    return kept_.emplace_back(tensor.contiguous());
  }

  at::TensorList weights_, scales_, packed_;
  int64_t matrix_ = 0, quantised_ = 0;
  std::vector<at::Tensor> kept_;
};

Norm read_norm(Reader& reader, int64_t index, int64_t width) {
  return {reader.vector(index, {width}), reader.vector(index + 1, {width})};
}

void check_lists(at::TensorList weights, at::TensorList scales, at::TensorList packed) {
  const int64_t count = weights.size(), rest = (count - 5) % kWeightsPerBlock, blocks = (count - 5) / kWeightsPerBlock;
  TORCH_CHECK_VALUE(count >= 5 + kWeightsPerBlock && (rest == 0 || rest == 2),
                    "weights: expected 5 + 12 n tensors, or 2 more with a final norm, got ", count);
  const bool int8 = weights[3].scalar_type() == at::kChar;
  const int64_t quantised = int8 ? kMatricesPerBlock * blocks : 0;
  TORCH_CHECK_VALUE(static_cast<int64_t>(scales.size()) == quantised, "scales: expected ", quantised, " tensors, got ",
                    scales.size());
  const int64_t expected = 2 + kMatricesPerBlock * blocks + quantised;
  TORCH_CHECK_VALUE(static_cast<int64_t>(packed.size()) == expected, "packed: expected ", expected,
                    " tensors (csikernels.ops.lasco_engine packs the weights), got ", packed.size());
  const at::ScalarType outer = weights[0].scalar_type(), inner = weights[3].scalar_type();
  TORCH_CHECK_TYPE((inner == outer && (outer == at::kFloat || outer == at::kBFloat16)) ||
                       (inner == at::kChar && outer == at::kBFloat16),
                   "weights: expected matrices in float32, in bfloat16, or in int8 within bfloat16, got ", inner,
                   " within ", outer);
  for (const at::Tensor& weight : {weights[0], weights[3], weights[7]}) check_dim(weight, "weights", 2, "[out, in]");
  check_dim(weights[2], "weights", 2, "[T, d]");
}

Network read_network(Reader& reader, at::TensorList weights, int64_t heads, std::string_view activation,
                     bool norm_first, double eps, std::vector<Block>& blocks) {
  Network net{};
  net.tokens = weights[2].size(0);
  net.width = weights[2].size(1);
  net.features = weights[0].size(1);
  net.feedforward = weights[7].size(0);
  net.heads = heads;
  net.layers = reader.blocks();
  TORCH_CHECK_VALUE(heads >= 1 && net.width % heads == 0, "heads: expected a divisor of the width ", net.width,
                    ", got ", heads);
  TORCH_CHECK_VALUE(activation == "relu" || activation == "gelu", "activation: expected relu or gelu, got ",
                    std::string(activation));
  net.gelu = activation == "gelu";
  net.norm_first = norm_first;
  net.eps = static_cast<float>(eps);
  const int64_t d = net.width, ff = net.feedforward;
  net.input = reader.linear(0, d, net.features);
  net.position = reader.vector(2, {net.tokens, d});
  int64_t index = 3;
  for (int64_t layer = 0; layer < net.layers; ++layer, index += kWeightsPerBlock) {
    Block block{};
    block.qkv = reader.linear(index, 3 * d, d);
    block.proj = reader.linear(index + 2, d, d);
    block.up = reader.linear(index + 4, ff, d);
    block.down = reader.linear(index + 6, d, ff);
    block.norm1 = read_norm(reader, index + 8, d);
    block.norm2 = read_norm(reader, index + 10, d);
    blocks.push_back(block);
  }
  net.blocks = blocks.data();
  if (static_cast<int64_t>(weights.size()) > index + 2) {
    net.norm = read_norm(reader, index, d);
    index += 2;
  }
  net.output = reader.linear(index, net.features, d);
  return net;
}

Transformer* kernel_in_force(at::ScalarType precision) {
  const Capability level = capability();
#if defined(__x86_64__)
  if (precision == at::kChar && level >= Capability::avx512_bf16) return avx512_bf16::transformer_int8;
  if (precision == at::kChar && level >= Capability::avx512_vnni) return avx512_vnni::transformer_int8;
  if (precision == at::kBFloat16 && level >= Capability::avx512_bf16) return avx512_bf16::transformer_bfloat16;
#define CSIKERNELS_OF(isa)                                  \
  (precision == at::kFloat      ? isa::transformer_float32  \
   : precision == at::kBFloat16 ? isa::transformer_bfloat16 \
                                : isa::transformer_int8)
  if (level >= Capability::avx512) return CSIKERNELS_OF(avx512);
  if (level >= Capability::avx2) return CSIKERNELS_OF(avx2);
#endif
  return CSIKERNELS_OF(scalar);
#undef CSIKERNELS_OF
}

// h_in [B, T, F] float32 -> [B, T, F]; float64 networks are the reference's.
at::Tensor transformer_forward(const at::Tensor& h_in, at::TensorList weights, at::TensorList scales,
                               at::TensorList packed, int64_t heads, c10::string_view activation, bool norm_first,
                               double eps) {
  if (!is_chosen(Backend::cpp) || h_in.scalar_type() == at::kDouble) {
    return call_python<at::Tensor(const at::Tensor&, at::TensorList, at::TensorList, at::TensorList, int64_t,
                                  c10::string_view, bool, double)>("transformer_forward", h_in, weights, scales, packed,
                                                                   heads, activation, norm_first, eps);
  }
  check_lists(weights, scales, packed);
  Reader reader(weights, scales, packed);
  std::vector<Block> blocks;
  const Network net = read_network(reader, weights, heads, activation, norm_first, eps, blocks);
  TORCH_CHECK_TYPE(h_in.scalar_type() == at::kFloat, "h_in: expected float32, got ", h_in.scalar_type());
  TORCH_CHECK_VALUE(h_in.dim() == 3 && h_in.size(1) == net.tokens && h_in.size(2) == net.features,
                    "h_in: expected shape [B, ", net.tokens, ", ", net.features, "], got ", h_in.sizes());
  Transformer* const forward = kernel_in_force(weights[3].scalar_type());
  const at::Tensor input = h_in.contiguous();
  at::Tensor output = at::empty(h_in.sizes(), h_in.options().memory_format(at::MemoryFormat::Contiguous));
  const float* const h = input.const_data_ptr<float>();
  float* const y = output.mutable_data_ptr<float>();
  const int64_t sample = net.tokens * net.features;
  const int64_t operations = 2 * net.tokens * net.layers * net.width * (4 * net.width + 2 * net.feedforward);
  const auto run = [&](const Team& team, int64_t begin, int64_t end) {
    const int64_t bytes = Workspace(net, end - begin, team.members, nullptr).bytes;
    const at::Tensor workspace = at::empty({bytes}, at::kByte);
    forward(net, team, h + begin * sample, end - begin, y + begin * sample,
            static_cast<char*>(workspace.mutable_data_ptr()));
  };
  const int64_t samples = h_in.size(0), threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool uneven = samples % threads != 0 && samples < kEvenBatches * threads;
  if (uneven && samples * operations / net.layers >= kOperationsPerBarrier) {
    run({threads, run_team}, 0, samples);
  } else {
    at::parallel_for(0, samples, std::max<int64_t>(1, kOperationsPerThread / operations),
                     [&](int64_t begin, int64_t end) { run({}, begin, end); });
  }
  return output;
}

}  // namespace
}  // namespace csikernels::cpu

TORCH_LIBRARY_IMPL(csikernels, CPU, m) { m.impl("transformer_forward", &csikernels::cpu::transformer_forward); }
