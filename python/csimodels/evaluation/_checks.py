"""Argument checks shared by the evaluation functions: each names the argument, what was expected, what was given."""

from __future__ import annotations

import torch
from torch import Tensor

REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
INTEGER_DTYPES = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)


def check_tensor(name: str, value: Tensor, layout: str, *, min_dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse anything but a tensor of at least ``min_dim`` axes and one of ``dtypes``; ``layout`` goes in the text."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() < min_dim:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(value.shape)}")


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` must have the shape and device of ``other``."""
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    check_same_device(name, value, other_name, other)


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` must be on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def check_none(name: str, bad: Tensor, what: str) -> None:
    """Raise if any element of the boolean tensor ``bad`` is set, naming how many and where the first one is."""
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    where = f", first at index {first[0] if len(first) == 1 else first}" if first else ""
    raise ValueError(f"{name}: {int(bad.sum())} {what}{where}")


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity."""
    check_none(name, ~torch.isfinite(value.detach()), "non-finite value(s)")


def as_double(value: Tensor) -> Tensor:
    """float64 or complex128, keeping the autograd graph. A lazy conjugate is made real: it has no real view."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64).resolve_conj()


def as_positive(name: str, value: float | Tensor, batch: torch.Size, like: Tensor) -> Tensor:
    """A positive finite float64 scalar or tensor that broadcasts to ``batch``, on the device of ``like``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number or a real tensor, got {type(value).__name__}")
    if isinstance(value, Tensor):
        if value.dtype not in REAL_DTYPES + INTEGER_DTYPES:
            raise TypeError(f"{name}: expected a real dtype, got {str(value.dtype).removeprefix('torch.')}")
        if value.dim() > 0:
            check_same_device(name, value, "the channel", like)
    result = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    # The negation also catches NaN.
    check_none(name, ~((result > 0) & torch.isfinite(result)).detach(), "value(s) that are not positive and finite")
    try:
        fits = torch.broadcast_shapes(result.shape, batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a scalar or a shape that broadcasts to {tuple(batch)}, got {tuple(result.shape)}"
        )
    return result
