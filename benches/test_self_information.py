"""Timings of the self-information family against what one would write in PyTorch.

Peers of ``select_informative``: equation 9 in float32 with ``torch.topk``, eager and through ``torch.compile``; of
``top_m``: ``torch.topk`` (which keeps no order among equal values) and a stable ``torch.sort``; of
``scatter_codeword``: ``Tensor.scatter`` into a filled array.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare

import csikernels

BANDWIDTH, RADIUS, KEPT = 0.5, 3, 221  # 221 of 2,048 elements: a codeword a ninth of the image's size
SHAPE = (2, 32, 32)
# Four exponentials an element (13 operations and 3 for the argument each) and the sum of eight terms.
FLOPS = 2048 * (4 * 16 + 7)
BATCHES = [1, 256]


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch)).to(DEVICE)


def clusters(batch: int) -> torch.Tensor:
    """Like CSI in the angle-delay domain: a few strong clusters in weak noise."""
    generator = torch.Generator().manual_seed(batch)
    envelope = torch.rand(batch, *SHAPE, generator=generator) ** 8
    return (envelope * torch.randn(batch, *SHAPE, generator=generator) * 3).to(DEVICE)


def sparse(batch: int) -> torch.Tensor:
    """90% zeros."""
    kept = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(batch + 1)) > 0.9
    return noise(batch) * kept.to(DEVICE)


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


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("image", [noise, clusters, sparse], ids=lambda image: image.__name__)
def test_select_informative(benchmark, batch, image):
    h = image(batch)
    best = information(h.double()).flatten(1).sort(1, descending=True).values[:, :KEPT]
    compiled = torch.compile(eager_select)

    def check(name, result):
        values, indices = result
        # float32 flips neighbours: a peer is held to the information it selects, the package to its docstring's rule.
        chosen = information(h.double()).flatten(1).gather(1, indices)
        torch.testing.assert_close(chosen, best, rtol=1e-6 if name == "csikernels" else 1e-4, atol=1e-6)
        assert torch.equal(values, h.flatten(1).gather(1, indices))

    compare(
        benchmark,
        case=f"select_informative, {image.__name__}, B={batch}",
        ours={"csikernels": lambda: csikernels.select_informative(h, KEPT, bandwidth=BANDWIDTH, radius=RADIUS)},
        peers={"eager float32": lambda: eager_select(h), "torch.compile": lambda: compiled(h)},
        check=check,
        flops=batch * FLOPS,
        calls=20 if batch == 1 else 5,
        rounds=25,
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_self_information(benchmark, batch):
    h = noise(batch)
    wanted = information(h.double())
    compiled = torch.compile(information)

    compare(
        benchmark,
        case=f"self_information, B={batch}",
        ours={"csikernels": lambda: csikernels.self_information(h, bandwidth=BANDWIDTH, radius=RADIUS)},
        peers={"eager float32": lambda: information(h), "torch.compile": lambda: compiled(h)},
        check=lambda name, bits: torch.testing.assert_close(bits.double(), wanted, rtol=1e-6, atol=3e-6),
        flops=batch * FLOPS,
        calls=20 if batch == 1 else 5,
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_top_m(benchmark, batch):
    score = information(noise(batch)).flatten(1)
    wanted, order = score.sort(stable=True, descending=True)

    def check(name, result):
        assert torch.equal(result[0], wanted[:, :KEPT])
        assert name == "torch.topk" or torch.equal(result[1], order[:, :KEPT])

    compare(
        benchmark,
        case=f"top_m, B={batch}",
        ours={"csikernels": lambda: csikernels.top_m(score, KEPT)},
        peers={
            "torch.topk": lambda: score.topk(KEPT),
            "torch.sort stable": lambda: [part[:, :KEPT] for part in score.sort(stable=True, descending=True)],
        },
        check=check,
        bytes=batch * (2048 * 4 + KEPT * 12),
        peak="dram",
        calls=20 if batch == 1 else 5,
    )


def test_scatter_codeword(benchmark):
    h = clusters(256)
    values, indices = csikernels.select_informative(h, KEPT, bandwidth=BANDWIDTH, radius=RADIUS)
    mean = h.mean(dim=(1, 2, 3))

    def plain():
        return mean[:, None].repeat(1, math.prod(SHAPE)).scatter(1, indices, values).reshape(-1, *SHAPE)

    wanted = plain()
    compare(
        benchmark,
        case="scatter_codeword, B=256",
        ours={"csikernels": lambda: csikernels.scatter_codeword(values, indices, mean, SHAPE)},
        peers={"Tensor.scatter": plain},
        check=lambda name, result: torch.testing.assert_close(result, wanted, rtol=0, atol=0),
        bytes=256 * (2048 * 4 + KEPT * 12),
        peak="dram",
    )
