"""Timings of adapting many small models at once against one module after the other, each with its own AdamW.

A step is the forward of every environment's batch, the loss of each, the backward and AdamW, alphas learned. The losses
of 20 steps are compared before anything is timed. ``lasco_squared_error`` is what ``csimodels adapt`` trains on; a loss
of one's own takes the output of ``lasco_forward``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, compare
from lasco_parts import inputs, modules
from torch import Tensor
from torch.nn import functional as F

import csikernels
from csikernels import SamBank, lasco_forward, lasco_squared_error

BACKENDS = csikernels.backends()["lasco_training_forward"][DEVICE.type]
SIZES = [(8, 256), (1, 256), (8, 64)]  # environments, samples of each
STEPS = 20
OPERATIONS = 7.34e6  # of one sample's forward; a backward has twice as many
Step = Callable[[], Tensor]


def bank_step(
    parts, known: Tensor | None, h_in: Tensor, base_output: Tensor, slot: Tensor, target: Tensor, own_loss: bool = False
) -> Step:
    bank = SamBank.from_modules(*parts, trainable=True)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad()
        if own_loss:
            estimate = lasco_forward(h_in, base_output, bank, slot, reference_output=known)
            # A norm per sample: fewer passes over the whole batch than its squared error would take.
            norms = torch.linalg.vector_norm((estimate - target).flatten(1), dim=1)
            losses = norms.square().view(bank.slots, -1).mean(1) / h_in[0].numel()
        else:
            errors = lasco_squared_error(h_in, base_output, bank, slot, target, reference_output=known)
            losses = errors / (h_in.numel() // bank.slots)
        losses.sum().backward()
        optimiser.step()
        return losses.detach()

    return step


def loop_step(
    parts, known: Tensor | None, h_in: Tensor, base_output: Tensor, slot: Tensor, target: Tensor, autocast: bool = False
) -> Step:
    reference, proxies, alpha = copy.deepcopy(parts)
    alphas = [value.clone().requires_grad_() for value in alpha]
    optimisers = [torch.optim.AdamW([*m.parameters(), a], lr=1e-3) for m, a in zip(proxies, alphas, strict=True)]
    columns = [tensor.chunk(len(proxies)) for tensor in (h_in, base_output, target, h_in if known is None else known)]

    def step() -> Tensor:
        losses = []
        for proxy, a, optimiser, h, base, wanted, own in zip(proxies, alphas, optimisers, *columns, strict=True):
            optimiser.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                if known is None:
                    with torch.no_grad():
                        own = reference(h)
                estimate = proxy(h).float()
            loss = F.mse_loss(estimate + a * (base - own.float()), wanted)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


@pytest.mark.parametrize("known", [False, True], ids=["reference run in every step", "reference output known"])
@pytest.mark.parametrize(("slots", "samples"), SIZES)
def test_adaptation_step(benchmark, slots, samples, known):
    if BACKENDS == ["reference"]:
        pytest.skip("the reference backend trains at the speed of its peers")
    parts = modules(slots)
    h_in, base_output, _ = inputs(slots, samples)
    with torch.no_grad():
        output = parts[0](h_in) if known else None
    slot = torch.arange(slots, device=DEVICE).repeat_interleave(samples)
    batch = (parts, output, h_in, base_output, slot, h_in.flip(0))
    ours, own_loss, loop = bank_step(*batch), bank_step(*batch, own_loss=True), loop_step(*batch)
    for _ in range(STEPS):
        expected = loop()
        torch.testing.assert_close(ours(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own_loss(), expected, rtol=1e-4, atol=1e-4)

    compare(
        benchmark,
        case=f"LASCO adaptation step, {slots} x {samples}, {'reference known' if known else 'reference run'}",
        ours={"lasco_squared_error": ours, "lasco_forward and a loss in PyTorch": own_loss},
        peers={
            "one after the other": loop,
            "one after the other, bfloat16 autocast": loop_step(*batch, autocast=True),
        },
        check=finite,
        flops=slots * samples * OPERATIONS * (3 if known else 4),
        rounds=9,
    )


def finite(name: str, losses: Tensor) -> None:
    """The trainers have gone different numbers of steps by now; their losses were compared before."""
    assert losses.isfinite().all(), name
