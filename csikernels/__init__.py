"""Fast kernels for AI-based channel state information (CSI) feedback.

Four op families, each with the same semantics on every backend (C++, CUDA, Triton, plain PyTorch): ``lasco``,
``self_information``, ``codebook`` and ``nf4_lora``. Importing this package needs torch and numpy only.
"""

from csikernels._dispatch import apply_environment_choice, backends, use_backend
from csikernels._info import __version__, build_info
from csikernels.ops.codebook import Codebook, codebook_argmax
from csikernels.ops.lasco import lasco_forward, lasco_squared_error
from csikernels.ops.lasco_bank import SamBank
from csikernels.ops.lasco_engine import LascoEngine
from csikernels.ops.nf4_lora import loftq_init, nf4_lora_linear, nf4_quantize
from csikernels.ops.nf4_lora_module import NF4LoRALinear
from csikernels.ops.nf4_lora_weight import NF4Weight
from csikernels.ops.self_information import scatter_codeword, select_informative, self_information, top_m

__all__ = [
    "Codebook",
    "LascoEngine",
    "NF4LoRALinear",
    "NF4Weight",
    "SamBank",
    "__version__",
    "backends",
    "build_info",
    "codebook_argmax",
    "lasco_forward",
    "lasco_squared_error",
    "loftq_init",
    "nf4_lora_linear",
    "nf4_quantize",
    "scatter_codeword",
    "select_informative",
    "self_information",
    "top_m",
    "use_backend",
]

apply_environment_choice()
