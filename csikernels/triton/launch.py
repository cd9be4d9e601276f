"""How kernels are launched: on the tensors' device and stream, tuned where there is something to tune on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from csikernels.triton import interpreted


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch where ``tensor`` is: Triton takes the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def beside(value: Tensor, tensor: Tensor) -> Tensor:
    """``value`` contiguous on the device of ``tensor``, without waiting for it."""
    if value.device == tensor.device:
        return value.contiguous()
    return value.contiguous().pin_memory().to(tensor.device, non_blocking=True)


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable:
    """``triton.autotune``, keyed by what a kernel is compiled for. The choice is made at a kernel's first launch and
    kept on disk beside its machine code; nothing is timed, and no GPU is needed, before. Timing runs a kernel again and
    again, so it must not read what it wrote before."""
    configs = configs[:1] if interpreted() else configs
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)
