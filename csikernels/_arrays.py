"""NumPy and CuPy arrays in, the same kind out, without a copy (DLPack).

Public functions are written for tensors; :func:`accepts_arrays` lets them take arrays as well.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch


@functools.cache  # a small op takes microseconds, of which looking at types should not be one
def _kind_of_type(given: type) -> str | None:
    if issubclass(given, np.ndarray):
        return "numpy"
    if given.__module__.split(".")[0] == "cupy" and hasattr(given, "__dlpack__"):
        return "cupy"
    if issubclass(given, torch.Tensor):
        return "torch"
    return None


def _kind(value: object) -> str | None:
    return _kind_of_type(type(value))  # type: ignore[arg-type]  # types are hashable; mypy does not see it


def to_tensor(value):
    """A tensor on the array's memory. Negative strides, which torch lacks, are the one case that copies."""
    kind = _kind(value)
    if kind == "cupy":
        return torch.from_dlpack(value)
    if kind != "numpy":
        return value
    if any(stride < 0 for stride in value.strides):
        value = value.copy()
    if not value.dtype.isnative:
        raise TypeError(f"expected an array in native byte order, got dtype {value.dtype.str}")
    with warnings.catch_warnings():
        # Inputs are never written, so a read-only array is as good as any.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value)


def _from_tensor(value, kind: str):
    if isinstance(value, torch.Tensor):
        if kind == "numpy":
            return value.detach().numpy()
        import cupy

        return cupy.from_dlpack(value.detach())
    if isinstance(value, tuple):
        return tuple(_from_tensor(item, kind) for item in value)
    return value


def accepts_arrays(function: Callable) -> Callable:
    """Let ``function`` take NumPy or CuPy arrays wherever it takes tensors, and answer in kind.

    All array arguments of one call must be of one kind: mixing raises ``TypeError``.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():  # a traced graph holds tensors only, and inspecting types would break it
            return function(*args, **kwargs)
        kinds = {kind for value in (*args, *kwargs.values()) if (kind := _kind(value)) is not None}
        if kinds <= {"torch"}:
            return function(*args, **kwargs)
        if len(kinds) > 1:
            raise TypeError(f"{function.__name__}: expected arrays of one kind, got {' and '.join(sorted(kinds))}")
        (kind,) = kinds
        result = function(
            *(to_tensor(value) for value in args), **{name: to_tensor(value) for name, value in kwargs.items()}
        )
        return _from_tensor(result, kind)

    return wrapper
