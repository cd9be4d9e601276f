// The floating types of tensors, for launchers that do not know torch.
#pragma once

namespace csikernels::cuda {

enum class Scalar { float16, bfloat16, float32, float64 };

}  // namespace csikernels::cuda
