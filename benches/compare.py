"""Time implementations of one case against each other, round by round in one process.

Absolute times mean little on a shared machine, so every speed here is a ratio to a named peer: in each round every
implementation runs once, in an order that rotates, and the medians over the rounds are compared. Every result is
checked before anything is timed; a wrong one fails the bench.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def compare(
    benchmark,
    case: str,
    ours: dict[str, Callable[[], Any]],
    peers: dict[str, Callable[[], Any]],
    *,
    check: Callable[[str, Any], None],
    flops: float = 0,
    bytes: float = 0,
    peak: str | dict[str, str] = "float32",
    calls: int = 1,
    rounds: int = 15,
) -> None:
    """Measure ``ours`` and ``peers`` interleaved and leave the medians in ``benchmark.extra_info``.

    pytest-benchmark's own statistics are those of the first of ``ours``, for ``calls`` calls.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: the op and its size, such as ``"codebook_argmax, N=1024, B=12"``.
        ours, peers: name -> function without arguments; whatever is prepared once is prepared by the caller.
        check: called with each name and result; raises when the result is wrong.
        flops, bytes: operations of one call, and bytes that it must move at least. The bytes are compared with the
            peak of main memory when ``peak`` is "dram", the operations with the peak of that kind otherwise.
        peak: "float32", "bfloat16", "int8" or "dram"; per name of ``ours`` where they differ.
        calls: calls per round, for what takes microseconds.
        rounds: how often each implementation is timed; each timing follows as many untimed calls.
    """
    functions = {**ours, **peers}
    if len(functions) != len(ours) + len(peers):
        raise ValueError(f"{case}: an implementation of ours has the name of a peer")
    for name, function in functions.items():
        check(name, function())
    first, *rest = functions
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def warm(function: Callable[[], Any]) -> None:
        # As often as it is timed: the thread pools of other libraries spin for a while after their last call.
        for _ in range(calls):
            function()
        _wait()

    def timed(name: str) -> None:
        function = functions[name]
        warm(function)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _wait()
        seconds[name].append((time.perf_counter() - start) / calls)

    def others() -> None:
        shift = len(seconds[rest[0]]) % len(rest) if rest else 0
        for name in rest[shift:] + rest[:shift]:
            timed(name)
        warm(functions[first])

    def target() -> None:
        start = time.perf_counter()
        for _ in range(calls):
            functions[first]()
        _wait()
        seconds[first].append((time.perf_counter() - start) / calls)

    benchmark.pedantic(target, setup=others, rounds=rounds, iterations=1)
    kinds = peak if isinstance(peak, dict) else dict.fromkeys(ours, peak)
    benchmark.group = case.split(",")[0]
    benchmark.extra_info.update(
        case=case,
        calls=calls,
        flops=flops,
        bytes=bytes,
        peaks={name: (kind, measured_peak(kind)) for name, kind in kinds.items()},
        ours=list(ours),
        seconds={name: _summary(times) for name, times in seconds.items()},
    )


@functools.cache
def measured_peak(kind: str) -> float | None:
    """Operations (or bytes, for "dram") per second that this machine reaches, or None where it has no such units."""
    try:
        return torch.ops.csikernels_probe.peak(kind)
    except (AttributeError, ValueError):
        return None


def _summary(times: list[float]) -> dict[str, float]:
    """Median and the quartiles' distance."""
    if len(times) < 2:
        return {"median": times[0], "iqr": 0.0}
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "iqr": high - low}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
