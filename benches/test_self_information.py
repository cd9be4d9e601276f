"""Timings of the self-information family against what one would write in PyTorch.

Peers of ``select_informative``: equation 9 in float32 with ``torch.topk``, eager and through ``torch.compile``; of
``top_m``: ``torch.topk`` (which keeps no order among equal values) and a stable ``torch.sort``; of
``scatter_codeword``: ``Tensor.scatter`` into a filled array. Every result is checked before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import csikernels

BANDWIDTH, RADIUS, KEPT = 0.5, 3, 221  # 221 of 2,048 elements: a codeword a ninth of the image's size
SHAPE = (2, 32, 32)
BACKENDS = {op: devices["cpu"] for op, devices in csikernels.backends().items()}
BATCHES = [1, 256]


def images(batch: int) -> torch.Tensor:
    """Sparse images like CSI in the angle-delay domain: a few strong clusters in weak noise."""
    generator = torch.Generator().manual_seed(batch)
    envelope = torch.rand(batch, *SHAPE, generator=generator) ** 8
    return envelope * torch.randn(batch, *SHAPE, generator=generator) * 3


def information(h: torch.Tensor) -> torch.Tensor:
    padded = F.pad(h, (RADIUS,) * 4)
    height, width = h.shape[-2:]
    steps = (0, RADIUS, 2 * RADIUS)
    density = sum(
        torch.exp(-((h - padded[..., i : i + height, j : j + width]) ** 2) / (2 * BANDWIDTH**2))
        for i in steps
        for j in steps
    )
    return -torch.log2(density / 9 / (math.sqrt(2 * math.pi) * BANDWIDTH))


def eager_select(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    indices = information(h).flatten(1).topk(KEPT).indices
    return h.flatten(1).gather(1, indices), indices


def run(benchmark, name: str, function: Callable, *arguments, backend: str | None = None) -> None:
    """Time ``function`` on one backend (peers take none), warm-up included."""
    benchmark.name = name
    if backend is None:
        benchmark.pedantic(function, arguments, rounds=15, iterations=2, warmup_rounds=3)
        return
    with csikernels.use_backend(backend):
        benchmark.pedantic(function, arguments, rounds=15, iterations=2, warmup_rounds=3)


def select(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return csikernels.select_informative(h, KEPT, bandwidth=BANDWIDTH, radius=RADIUS)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("who", [*BACKENDS["select_informative"], "eager float32", "torch.compile float32"])
def test_select_informative(benchmark, batch, who):
    benchmark.group = f"select_informative [{batch}, 2, 32, 32], m = {KEPT}"
    h = images(batch)
    compiled = torch.compile(eager_select) if who.startswith("torch.compile") else eager_select
    function, backend = (select, who) if who in BACKENDS["select_informative"] else (compiled, None)
    values, indices = function(h)
    bits = information(h.double()).flatten(1)
    best = bits.sort(1, descending=True).values[:, :KEPT]
    # float32 flips neighbours: a peer is held to the information it selects, the package to the rule of its docstring.
    torch.testing.assert_close(bits.gather(1, indices), best, rtol=1e-6 if backend else 1e-4, atol=1e-6)
    assert torch.equal(values, h.flatten(1).gather(1, indices))
    run(benchmark, f"csikernels {who}" if backend else who, function, h, backend=backend)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("who", [*BACKENDS["top_m"], "torch.topk", "torch.sort stable"])
def test_top_m(benchmark, batch, who):
    benchmark.group = f"top_m [{batch}, 2048], m = {KEPT}"
    score = information(images(batch)).flatten(1)
    peers = {
        "torch.topk": lambda score: score.topk(KEPT),
        "torch.sort stable": lambda score: [part[:, :KEPT] for part in score.sort(stable=True, descending=True)],
    }
    function = peers.get(who, lambda score: csikernels.top_m(score, KEPT))
    values, indices = function(score)
    wanted, order = score.sort(stable=True, descending=True)
    assert torch.equal(values, wanted[:, :KEPT])
    assert who == "torch.topk" or torch.equal(indices, order[:, :KEPT])
    backend = None if who in peers else who
    run(benchmark, f"csikernels {who}" if backend else who, function, score, backend=backend)


@pytest.mark.parametrize("who", [*BACKENDS["scatter_codeword"], "Tensor.scatter"])
def test_scatter_codeword(benchmark, who):
    benchmark.group = f"scatter_codeword [256, {KEPT}] -> [256, 2, 32, 32]"
    h = images(256)
    values, indices = select(h)
    mean = h.mean(dim=(1, 2, 3))

    def plain(values, indices, mean):
        return mean[:, None].repeat(1, math.prod(SHAPE)).scatter(1, indices, values).reshape(-1, *SHAPE)

    backend = None if who == "Tensor.scatter" else who
    function = plain if backend is None else lambda *given: csikernels.scatter_codeword(*given, SHAPE)
    assert torch.equal(function(values, indices, mean), plain(values, indices, mean))
    run(benchmark, f"csikernels {who}" if backend else who, function, values, indices, mean, backend=backend)
