"""Time implementations of one case against each other, round by round in one process.

Absolute times mean little on a shared machine, so every speed here is a ratio to a named peer: in each round every
implementation runs once, in an order that rotates, and the medians over the rounds are compared. Every result is
checked before anything is timed; a wrong one fails the bench.

On a GPU a call is timed by events, and before each the L2 cache is filled with something else: its data come from
memory, as in a pipeline that has other work in between.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Where the benches run: on a GPU if there is one. Inputs are made on the CPU and moved, so that they are the same.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BEYOND_CACHES = 256 << 20  # bytes; more than the L2 cache of any GPU


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
        warm(functions[name])
        seconds[name].append(_time(functions[name], calls))

    def others() -> None:
        shift = len(seconds[rest[0]]) % len(rest) if rest else 0
        for name in rest[shift:] + rest[:shift]:
            timed(name)
        warm(functions[first])

    def target() -> None:
        seconds[first].append(_time(functions[first], calls))

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


def _time(function: Callable[[], Any], calls: int) -> float:
    """Seconds a call takes; on a GPU by its events, with its data in memory and not in the L2 cache."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    events = []
    for _ in range(calls):
        _filler().zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / calls / 1e3


@functools.cache
def _filler() -> torch.Tensor:
    return torch.empty(BEYOND_CACHES, dtype=torch.uint8, device=DEVICE)


@functools.cache
def measured_peak(kind: str) -> float | None:
    """Operations (or bytes, for "dram") per second that this machine reaches, or None where it has no such units."""
    if DEVICE.type == "cuda":
        return _gpu_peak(kind)
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


def _gpu_peak(kind: str) -> float:
    """What cuBLAS reaches in a large product, or a large copy."""
    n = 8192
    if kind == "dram":
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        work, run = 2 * source.nbytes, functools.partial(target.copy_, source)
    elif kind == "int8":
        left, right = (torch.ones(n, n, dtype=torch.int8, device=DEVICE) for _ in range(2))
        work, run = 2 * n**3, functools.partial(torch._int_mm, left, right.T)
    else:
        left, right = (torch.ones(n, n, dtype=getattr(torch, kind), device=DEVICE) for _ in range(2))
        work, run = 2 * n**3, functools.partial(torch.mm, left, right)
    run()
    return work / min(_time(run, 1) for _ in range(5))


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
