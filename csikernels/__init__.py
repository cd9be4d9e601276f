"""Fast kernels for AI-based channel state information (CSI) feedback.

Four op families, each with the same semantics on every backend (C++, CUDA, Triton, plain PyTorch): ``lasco``,
``self_information``, ``codebook`` and ``nf4_lora``. Importing this package needs torch and numpy only.
"""

from csikernels._dispatch import apply_environment_choice, backends, use_backend
from csikernels._info import __version__, build_info
from csikernels.ops.self_information import scatter_codeword, select_informative, self_information, top_m

__all__ = [
    "__version__",
    "backends",
    "build_info",
    "scatter_codeword",
    "select_informative",
    "self_information",
    "top_m",
    "use_backend",
]

apply_environment_choice()
