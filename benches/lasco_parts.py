"""What the timings of LASCO share: small models, their inputs, equation 18 as a loop, and the check before timing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from compare import DEVICE
from torch import Tensor

from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 4e-2}


def modules(
    slots: int, layers: int = 2, width: int = 64
) -> tuple[ChannelTransformer, list[ChannelTransformer], Tensor]:
    torch.manual_seed(0)
    made = [ChannelTransformer(TransformerConfig.sam(layers, width)).eval().to(DEVICE) for _ in range(slots + 1)]
    return made[0], made[1:], torch.linspace(0.2, 1.2, slots, device=DEVICE)


def inputs(slots: int, samples: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    pair = torch.randn(2, slots * samples, 32, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return *pair, torch.arange(slots, device=DEVICE).repeat(samples)


def loop(reference, proxies, alpha) -> Callable:
    """Equation 18, slot by slot; the slots come in order."""

    def forward(h_in: Tensor, base_output: Tensor) -> Tensor:
        shift = base_output - reference(h_in)
        return torch.cat([proxies[u](h_in[u : u + 1]) + alpha[u] * shift[u : u + 1] for u in range(len(proxies))])

    return forward


def check(actual: Tensor, expected: Tensor, precision: str) -> None:
    assert (actual.double() - expected).norm() <= TOLERANCE[precision] * expected.norm()


def exact(reference, proxies, alpha, h_in: Tensor, base_output: Tensor) -> Tensor:
    reference, *proxies = (copy.deepcopy(module).double() for module in (reference, *proxies))
    return loop(reference, proxies, alpha.double())(h_in.double(), base_output.double())
