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


def architecture() -> int:
    """Of the current GPU, as 90 for sm_90; without one that of an H100, the roofline's."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], fits: Callable[[triton.Config, dict], bool] | None = None
) -> Callable:
    """``triton.autotune``, keyed by what a kernel is compiled for. The choice is made at a kernel's first launch and
    kept on disk beside its machine code; nothing is timed, and no GPU is needed, before. Timing runs a kernel again and
    again, so it must not read what it wrote before. Of the configurations those are tried that ``fits`` takes, given a
    launch's keyword arguments."""

    def fitting(all_configs: list[triton.Config], _positional: dict, **given) -> list[triton.Config]:
        return [config for config in all_configs if fits is None or fits(config, given)]

    used = configs[:1] if interpreted() else configs
    pruning = {"early_config_prune": fitting}
    tune = triton.autotune(configs=list(used), key=list(key), prune_configs_by=pruning, cache_results=True)

    def decorate(kernel):
        tuner = tune(kernel)
        tuner.choices = list(configs)  # what a GPU would choose from, for benches/roofline.py
        return tuner

    return decorate
