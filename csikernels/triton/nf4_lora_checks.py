"""The boundary of the NF4 kernels: the checks and messages of the C++ kernels (``csrc/nf4_lora_check.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csikernels.reference.nf4_lora import check_block_size


def has_kernel_for(n: int, k: int, rank: int = 0) -> bool:
    """Whether the kernels' 32-bit counts and grids hold these sizes."""
    most = 65535 * 128
    return 0 < n < most and 0 < k < most and rank < most


def check_weight(weight: Tensor, block_size: int) -> None:
    _check_floating(weight, "weight")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    check_block_size(block_size)


def check_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int, dtype: torch.dtype) -> None:
    if len(shape) != 2:
        raise ValueError(f"shape: expected [N, K], got {list(shape)}")
    if not _is_floating(dtype):
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {_name(dtype)}")
    n, k = shape
    _check_nf4(packed, absmax, n, k, block_size)
    _check_device(absmax, "absmax", packed.device)


def check_layer(
    x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, lora_a: Tensor, lora_b: Tensor,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    for name, tensor in {"x": x, "lora_a": lora_a, "lora_b": lora_b}.items():
        _check_floating(tensor, name)
    if x.ndim < 1:
        raise ValueError(f"x: expected [..., K], got {list(x.shape)}")
    k = x.shape[-1]
    if lora_a.ndim != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: expected [r, {k}], got {list(lora_a.shape)}")
    rank = lora_a.shape[0]
    if lora_b.ndim != 2 or lora_b.shape[1] != rank:
        raise ValueError(f"lora_b: expected [N, {rank}], got {list(lora_b.shape)}")
    n = lora_b.shape[0]
    if bias is not None:
        _check_floating(bias, "bias")
        if bias.shape != (n,):
            raise ValueError(f"bias: expected [{n}], got {list(bias.shape)}")
    _check_nf4(packed, absmax, n, k, block_size)
    others = {"packed": packed, "absmax": absmax, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    for name, other in others.items():
        if other is not None:
            _check_device(other, name, x.device)


def check_gradient(grad: Tensor, x: Tensor, n: int) -> None:
    _check_floating(grad, "grad")
    if grad.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"grad: expected the leading shape of x, {list(x.shape)}, and {n} columns, got {list(grad.shape)}"
        )
    _check_device(grad, "grad", x.device)


def _check_nf4(packed: Tensor, absmax: Tensor, n: int, k: int, block_size: int) -> None:
    check_block_size(block_size)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {_name(packed.dtype)}")
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax: expected float32, got {_name(absmax.dtype)}")
    count = n * k
    for name, tensor, wanted, of in (
        ("packed", packed, (count + 1) // 2, "bytes"),
        ("absmax", absmax, -(-count // block_size), "scales"),
    ):
        if tensor.numel() != wanted or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor of {wanted} {of}, got shape {list(tensor.shape)}")


def _check_floating(tensor: Tensor, name: str) -> None:
    if not _is_floating(tensor.dtype):
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {_name(tensor.dtype)}")


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2  # not the 8-bit types


def _check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _name(dtype: torch.dtype) -> str:
    """As C++ prints it: Float, BFloat16, ..."""
    return torch.empty(0, dtype=dtype).type().rpartition(".")[2].removesuffix("Tensor")
