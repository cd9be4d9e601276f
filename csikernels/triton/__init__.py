"""Triton kernels: which ops have one, and where they can run. Triton itself is imported by the first call of a kernel.

Each module below registers its ops with ``implement(op, "triton")``. Kernels of networks read weights and activations
in float32 and bfloat16 (those of NF4 also in float16, and 4-bit weights); what a docstring leaves to the reference
(float64 there, sizes beyond a kernel's tiles) is handed over to it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

# op -> module of this package that implements it
KERNELS = {
    "codebook_pack": "codebook",
    "codebook_search": "codebook",
    "lasco_forward": "lasco",
    "lasco_training_forward": "lasco",
    "lasco_backward": "lasco_backward",
    "nf4_quantize": "nf4_lora_codec",
    "nf4_dequantize": "nf4_lora_codec",
    "nf4_lora_linear": "nf4_lora",
    "nf4_lora_linear_backward": "nf4_lora",
    "transformer_forward": "transformer",
    "self_information": "self_information",
    "select_informative": "self_information",
    "top_m": "self_information",
    "scatter_codeword": "self_information",
}


def runs_on(device: str) -> bool:
    """Whether Triton kernels can run on this device type: GPUs, and CPUs where Triton interprets its kernels."""
    if device == "cuda":
        return _recent_gpu() and installed()
    return interpreted() and installed()


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs kernels in NumPy, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_small_models(tokens: int, width: int) -> bool:
    """Whether a sample's token rows fit in one program's registers; larger ones take the reference."""
    rows, columns = (max(16, 1 << (size - 1).bit_length()) for size in (tokens, width))
    return rows <= 64 and rows * columns <= 32 * 128  # 32 registers a thread and tile


def load(op: str) -> None:
    """Import the kernels of ``op``, which register themselves."""
    importlib.import_module(f"{__name__}.{KERNELS[op]}")


@functools.cache
def installed() -> bool:
    """Whether triton can be imported; it is not."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _recent_gpu() -> bool:
    """Whether every GPU that torch sees has the bfloat16 tensor cores that the kernels are written for; says once where
    one has not. The CUDA kernels look at their own tensors' GPU, and hand an older one's calls over without a word."""
    old = [
        f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
        if major < 8
    ]
    if old:
        warnings.warn(
            "csikernels: CUDA kernels need a GPU of sm_80 or later, Triton kernels every visible GPU to be one, got "
            f"{', '.join(old)}: the reference runs instead",
            stacklevel=2,
        )
    return not old
