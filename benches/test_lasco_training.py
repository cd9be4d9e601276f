"""Timings of adapting many small models at once against one module after the other, each with its own AdamW.

Every result is checked before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lasco_parts import inputs, modules, run
from torch import Tensor
from torch.nn import functional as F

import csikernels
from csikernels import SamBank, lasco_forward

BACKENDS = csikernels.backends()["lasco_forward"]["cpu"]
TRAINING_BACKENDS = [name for name in BACKENDS if name in csikernels.backends()["lasco_backward"]["cpu"]]
ADAPTED = (8, 32)  # environments, samples of each


def bank_trainer(parts, h_in: Tensor, base_output: Tensor, slot: Tensor, target: Tensor) -> Callable[[], Tensor]:
    bank = SamBank.from_modules(*parts, trainable=True)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimiser.zero_grad()
        error = (lasco_forward(h_in, base_output, bank, slot) - target).square().mean((1, 2))
        losses = torch.zeros(bank.slots).index_add(0, slot, error) / (len(slot) / bank.slots)
        losses.sum().backward()
        optimiser.step()
        return losses.detach()

    return step


def loop_trainer(parts, h_in: Tensor, base_output: Tensor, slot: Tensor, target: Tensor) -> Callable[[], Tensor]:
    reference, proxies, alpha = copy.deepcopy(parts)
    alphas = [value.clone().requires_grad_() for value in alpha]
    optimisers = [torch.optim.AdamW([*m.parameters(), a], lr=1e-3) for m, a in zip(proxies, alphas, strict=True)]
    data = [(h_in[slot == u], base_output[slot == u], target[slot == u]) for u in range(len(proxies))]

    def step() -> Tensor:
        losses = []
        for proxy, a, optimiser, (h, base, wanted) in zip(proxies, alphas, optimisers, data, strict=True):
            optimiser.zero_grad()
            with torch.no_grad():
                shift = base - reference(h)
            loss = F.mse_loss(proxy(h) + a * shift, wanted)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


@pytest.mark.parametrize("who", [*TRAINING_BACKENDS, "one module after the other"])
def test_adaptation_step(benchmark, who):
    """One AdamW step of all environments, alphas learned; the reference's output is computed in every step."""
    slots, samples = ADAPTED
    benchmark.group = f"LASCO adaptation step, {slots} environments x {samples} samples"
    parts = modules(slots)
    batch = (*inputs(slots, samples), inputs(slots, samples)[0].flip(0))
    with csikernels.use_backend(who if who in BACKENDS else "reference"):
        ours, peer = bank_trainer(parts, *batch), loop_trainer(parts, *batch)
        for _ in range(3):
            torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-4)
        name = f"csikernels {who}" if who in BACKENDS else who
        run(benchmark, name, ours if who in BACKENDS else peer, rounds=9)
