"""Fast kernels for AI-based channel state information (CSI) feedback.

Four op families, each with the same semantics on every backend (C++, CUDA, Triton, plain PyTorch): ``lasco``,
``self_information``, ``codebook`` and ``nf4_lora``. Importing this package needs torch and numpy only.
"""

from csikernels._dispatch import apply_environment_choice, backends, use_backend

__all__ = [
    "backends",
    "use_backend",
]

apply_environment_choice()
