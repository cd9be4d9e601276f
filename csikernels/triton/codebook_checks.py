"""The boundary of the codebook's Triton kernels: the checks and messages of the C++ and CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {torch.float32: "Float", torch.float64: "Double", torch.int32: "Int", torch.complex32: "ComplexHalf"}


def check_precision(precision: str) -> None:
    if precision not in ("exact", "float32"):
        raise ValueError(f"precision: expected 'exact' or 'float32', got '{precision}'")


def check_codewords(codewords: Tensor, name: str) -> None:
    """complex [K, D] or [E, K, D]"""
    _check_complex(codewords, name)
    if codewords.dim() not in (2, 3) or codewords.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty [K, D] or [E, K, D], got shape {list(codewords.shape)}")


def check_queries(h: Tensor, words: Tensor, environment: Tensor | None) -> None:
    """h complex [N, D], environment int64 [N] where the words are [E, K, D]"""
    _check_complex(h, "h")
    if h.dim() != 2 or h.shape[1] != words.shape[-1]:
        raise ValueError(f"h: expected [N, {words.shape[-1]}], got shape {list(h.shape)}")
    _check_device(h, "h", words.device)
    if (environment is not None) != (words.dim() == 3):
        raise ValueError("environment: expected none for a codebook [K, D], int64 [N] for a codebook [E, K, D]")
    if environment is None:
        return
    if environment.dtype != torch.int64:
        raise TypeError(f"environment: expected int64, got {_name(environment.dtype)}")
    if environment.shape != h.shape[:1]:
        raise ValueError(f"environment: expected shape [{h.shape[0]}], got {list(environment.shape)}")
    _check_device(environment, "environment", h.device)


def check_packed(packed: Tensor, size: int, words: Tensor) -> None:
    """uint8, as many bytes as the layout has"""
    _check_device(packed, "packed", words.device)
    if packed.dtype != torch.uint8 or packed.numel() != size:
        raise RuntimeError(
            f"packed: expected the Triton layout of {size} bytes for codewords {list(words.shape)}, got "
            f"{packed.numel()} bytes packed from something else or by another backend"
        )


def _check_complex(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"{name}: expected complex64 or complex128, got {_name(tensor.dtype)}")


def _check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))
