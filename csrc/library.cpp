// Every op of the package on one page, and the Python module that says what was built.
//
// The same schema texts stand in csikernels/ops/<op>.py, which define the ops where this extension is missing; a test
// holds both equal. Shapes, units and errors are documented there. Kernels register themselves in csrc/cpu and
// csrc/cuda.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cpu/capability.h"
#include "cuda/build_info.h"
#include "dispatch.h"

TORCH_LIBRARY(csikernels, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // self_information
  m.def("self_information(Tensor h, float bandwidth, int[] offsets) -> Tensor", tags);
  m.def(
      "select_informative(Tensor h, SymInt m, float bandwidth, int[] offsets, Tensor? source=None) -> (Tensor, Tensor)",
      tags);
  m.def("top_m(Tensor score, SymInt m, Tensor? source=None) -> (Tensor, Tensor)", tags);
  m.def("scatter_codeword(Tensor values, Tensor indices, Tensor mean, SymInt[] shape) -> Tensor", tags);

  // codebook
  m.def("codebook_pack(Tensor codebook, str precision, bool copy=True) -> (Tensor words, Tensor packed)", tags);
  m.def(
      "codebook_search(Tensor h, Tensor words, Tensor packed, Tensor? environment, str precision)"
      " -> (Tensor index, Tensor similarity)",
      tags);

  // nf4_lora
  m.def("nf4_quantize(Tensor weight, int block_size) -> (Tensor packed, Tensor absmax)", tags);
  m.def("nf4_dequantize(Tensor packed, Tensor absmax, SymInt[] shape, int block_size, ScalarType dtype) -> Tensor",
        tags);
  m.def(
      "nf4_lora_linear(Tensor x, Tensor packed, Tensor absmax, int block_size, Tensor lora_a, Tensor lora_b,"
      " float scaling, Tensor? bias) -> Tensor",
      tags);
  m.def(
      "nf4_lora_linear_backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax, int block_size, Tensor lora_a,"
      " Tensor lora_b, float scaling, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);

  // lasco
  m.def(
      "lasco_forward(Tensor h_in, Tensor base_output, Tensor slot, Tensor alpha, Tensor[] proxies, Tensor[] reference, "
      "Tensor[] packed, int heads, str activation, bool norm_first, float eps, bool keep_shift) -> (Tensor, Tensor)",
      tags);
  m.def(
      "lasco_training_forward(Tensor h_in, Tensor base_output, Tensor slot, Tensor alpha, Tensor[] proxies, "
      "Tensor[] reference, Tensor? reference_output, int heads, str activation, bool norm_first, float eps, "
      "bool keep_shift, bool keep) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "lasco_backward(Tensor grad, Tensor h_in, Tensor slot, Tensor alpha, Tensor[] proxies, Tensor[] reference, "
      "Tensor shift, Tensor kept, int heads, str activation, bool norm_first, float eps, bool input_grad, "
      "bool weight_grad) -> (Tensor, Tensor, Tensor[])",
      tags);
  m.def(
      "lasco_squared_error(Tensor h_in, Tensor base_output, Tensor target, Tensor slot, Tensor alpha, "
      "Tensor[] proxies, Tensor[] reference, Tensor? reference_output, int heads, str activation, bool norm_first, "
      "float eps, bool alpha_grad, bool weight_grad) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "transformer_forward(Tensor h_in, Tensor[] weights, Tensor[] scales, Tensor[] packed, int heads, str activation, "
      "bool norm_first, float eps) -> Tensor",
      tags);
}

namespace csikernels {
namespace {

// What this extension itself defines and implements, taken while the module loads: Python adds its own afterwards.
struct Registered {
  std::map<std::string, std::string> schemas;             // op -> schema text
  std::set<std::pair<std::string, std::string>> kernels;  // (op, dispatch key)
};

Registered registered() {
  Registered all;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "csikernels") continue;
    const auto handle = dispatcher.findSchema(name);
    if (!handle) continue;
    const std::string op = name.name.substr(name.name.find("::") + 2);
    all.schemas[op] = c10::toString(handle->schema());
    for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
      if (handle->hasKernelForDispatchKey(key)) all.kernels.emplace(op, c10::toString(key));
    }
  }
  return all;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef CSIKERNELS_WITH_CUDA
  info["cuda"] = cuda::runtime_version();
  info["cuda_archs"] = cuda::compiled_archs();
#else
  info["cuda"] = pybind11::none();
  info["cuda_archs"] = std::vector<std::string>();
#endif
  return info;
}

}  // namespace
}  // namespace csikernels

PYBIND11_MODULE(_C, module) {
  using namespace csikernels;
  module.def("build_info", &build_info, "What the compiler saw: torch, compiler, CUDA version and architectures.");
  module.def("set_backend", &set_backend, "Force a backend for every compiled kernel; an empty name lifts it.");
  const auto all = std::make_shared<const Registered>(registered());
  module.def(
      "schema",
      [all](const std::string& op) {
        const auto found = all->schemas.find(op);
        return found == all->schemas.end() ? std::nullopt : std::optional(found->second);
      },
      "The schema text of an op that this extension defines, or None.");
  module.def(
      "has_kernel", [all](const std::string& op, const std::string& key) { return all->kernels.contains({op, key}); },
      "Whether this extension holds a kernel of the op for the dispatch key (\"CPU\" or \"CUDA\").");
  module.def("cpu_capability", [] { return cpu::capability_name(cpu::capability()); }, "The CPU capability in force.");
  module.def("cpu_capabilities", &cpu::available_capabilities,
             "The capabilities that can be put in force, lowest first.");
  module.def("set_cpu_capability", &cpu::set_capability,
             "Put a capability in force, the highest available one at most.");
}
