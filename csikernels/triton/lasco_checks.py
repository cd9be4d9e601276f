"""The boundary of the small models' Triton kernels: the checks and messages of the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csikernels.reference.lasco import check_slot_values
from csikernels.triton.lasco_block import Sizes, sizes_of

_NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float64: "Double", torch.float16: "Half"}


def checked_sizes(
    h_in: Tensor, others: dict[str, Tensor], slot: Tensor, alpha: Tensor, proxies: list[Tensor], heads: int,
    activation: str, norm_first: bool, eps: float,
) -> Sizes:  # fmt: skip
    """What to compile for, after everything but the weights' shapes has been checked."""
    if h_in.ndim != 3:
        raise ValueError(f"h_in: expected shape [B, T, F], got {list(h_in.shape)}")
    for name, value in others.items():
        if value.shape != h_in.shape:
            raise ValueError(f"{name}: expected the shape of h_in, {list(h_in.shape)}, got {list(value.shape)}")
    for name, value in {"h_in": h_in, **others, "alpha": alpha}.items():
        if value.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {_name(value.dtype)}")
        if value.device != h_in.device:
            raise ValueError(f"{name}: expected a tensor on {h_in.device}, got one on {value.device}")
    if len(proxies) < 17:
        raise ValueError(f"proxies: expected at least 17 weights, got {len(proxies)}")
    for index, shape in ((0, "[U, d, F]"), (7, "[U, ff, d]")):
        if proxies[index].ndim != 3:
            raise ValueError(f"proxies[{index}]: expected shape {shape}, got {list(proxies[index].shape)}")
    _check_hyper(proxies[0].shape[1], heads, activation)
    if alpha.ndim != 1:
        raise ValueError(f"alpha: expected shape [U], got {list(alpha.shape)}")
    if slot.dtype != torch.int64:
        raise TypeError(f"slot: expected int64, got {_name(slot.dtype)}")
    if slot.shape != h_in.shape[:1]:
        raise ValueError(f"slot: expected shape [{h_in.shape[0]}], one per sample of h_in, got {list(slot.shape)}")
    if slot.device.type == "cpu":
        check_slot_values(slot, alpha.shape[0])
    elif slot.device != h_in.device:
        raise ValueError(f"slot: expected a tensor on {h_in.device}, got one on {slot.device}")
    else:  # without waiting for the GPU: it stops there, as torch's own indexing would
        torch._assert_async(((slot >= 0) & (slot < alpha.shape[0])).all(), f"slot: expected 0..{alpha.shape[0] - 1}")
    low = proxies[0].dtype == torch.bfloat16
    return sizes_of(h_in, proxies, heads, activation, norm_first, eps, low)


def checked_network(
    h_in: Tensor, weights: list[Tensor], heads: int, activation: str, norm_first: bool, eps: float
) -> Sizes:
    """As :func:`checked_sizes`, of one network."""
    if h_in.ndim != 3:
        raise ValueError(f"h_in: expected shape [B, T, F], got {list(h_in.shape)}")
    if len(weights) < 17 or (len(weights) - 5) % 12 not in (0, 2):
        raise ValueError(f"weights: expected 5 + 12 n tensors (+ 2 with a final norm), got {len(weights)}")
    _check_hyper(weights[0].shape[0], heads, activation)
    low = weights[0].dtype == torch.bfloat16
    return sizes_of(h_in, [weight[None] for weight in weights], heads, activation, norm_first, eps, low)


def _check_hyper(width: int, heads: int, activation: str) -> None:
    if heads <= 0 or width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
    if activation not in ("relu", "gelu"):
        raise ValueError(f"activation: expected relu or gelu, got {activation}")


def checked_weights(
    weights: Sequence[Tensor], name: str, sizes: Sizes, slots: int | None, device: torch.device
) -> tuple[Tensor, ...]:
    """The flat weight list, contiguous, as [slots, ...] or (None) of one network."""
    expected = _shapes(sizes)
    if len(weights) != len(expected):
        raise ValueError(f"{name}: expected {len(expected)} weights, got {len(weights)}")
    for index, (weight, (shape, matrix)) in enumerate(zip(weights, expected, strict=True)):
        shape = shape if slots is None else (slots, *shape)
        if weight.shape != shape:
            raise ValueError(f"{name}[{index}]: expected shape {list(shape)}, got {list(weight.shape)}")
        dtype = torch.bfloat16 if sizes.low and matrix else torch.float32
        if weight.dtype != dtype:
            raise TypeError(f"{name}[{index}]: expected {_name(dtype)}, got {_name(weight.dtype)}")
        if weight.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {weight.device}")
    return tuple(weight.contiguous() for weight in weights)


def _shapes(s: Sizes) -> list[tuple[tuple[int, ...], bool]]:
    """Shape of each entry of the flat weight list, and whether it is the matrix of a product."""

    def linear(rows: int, columns: int) -> list[tuple[tuple[int, ...], bool]]:
        return [((rows, columns), True), ((rows,), False)]

    block = [
        *linear(3 * s.width, s.width), *linear(s.width, s.width), *linear(s.feedforward, s.width),
        *linear(s.width, s.feedforward), *[((s.width,), False)] * 4,
    ]  # fmt: skip
    norm = [((s.width,), False)] * (2 if s.final_norm else 0)
    embedding = [*linear(s.width, s.features), ((s.tokens, s.width), False)]
    return [*embedding, *block * s.layers, *norm, *linear(s.features, s.width)]


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))
