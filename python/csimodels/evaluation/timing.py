"""How long calls take on this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch


def device() -> str:
    """What is timed: the architecture and the number of threads."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def seconds(call: Callable[[], Any], repeats: int, *, warm_up: int = 3) -> torch.Tensor:
    """Seconds of each of ``repeats`` calls after ``warm_up`` that do not count, float64 ``[repeats]``."""
    times = []
    for _ in range(warm_up + repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return torch.tensor(times[warm_up:], dtype=torch.float64)
