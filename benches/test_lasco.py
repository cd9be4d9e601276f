"""Timings of LASCO on many small models, of adapting them, and of the engine, against what one would write in PyTorch.

Peers of ``lasco_forward``: a loop over the modules, ``torch.func.vmap`` over their stacked parameters, and the same
stacked by hand with ``baddbmm``; of adaptation: one module after the other, each with its own AdamW; of the engine: the
base module in eager float32 and bfloat16, then ``lasco_forward``. Every result is checked before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import csikernels
from csikernels import LascoEngine, SamBank, lasco_forward
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig

BACKENDS = csikernels.backends()["lasco_forward"]["cpu"]
TRAINING_BACKENDS = [name for name in BACKENDS if name in csikernels.backends()["lasco_backward"]["cpu"]]
SLOTS = [1, 8, 64]  # one sample each
SAM_SIZES = [(2, 64), (1, 64), (4, 64), (2, 32), (2, 128)]  # layers, width
ADAPTED = (8, 32)  # environments, samples of each
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 4e-2}


def modules(
    slots: int, layers: int = 2, width: int = 64
) -> tuple[ChannelTransformer, list[ChannelTransformer], Tensor]:
    torch.manual_seed(0)
    reference, *proxies = (ChannelTransformer(TransformerConfig.sam(layers, width)).eval() for _ in range(slots + 1))
    return reference, proxies, torch.linspace(0.2, 1.2, slots)


def inputs(slots: int, samples: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    h_in, base_output = torch.randn(2, slots * samples, 32, 64, generator=torch.Generator().manual_seed(1))
    return h_in, base_output, torch.arange(slots).repeat(samples)


def loop(reference, proxies, alpha) -> Callable:
    """Equation 18, slot by slot; the slots come in order."""

    def forward(h_in: Tensor, base_output: Tensor) -> Tensor:
        shift = base_output - reference(h_in)
        return torch.cat([proxies[u](h_in[u : u + 1]) + alpha[u] * shift[u : u + 1] for u in range(len(proxies))])

    return forward


def vmapped(reference, proxies, alpha) -> Callable:
    parameters, buffers = torch.func.stack_module_state(proxies)
    skeleton = copy.deepcopy(reference).to("meta")

    def one(parameters: dict, buffers: dict, h: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (parameters, buffers), (h,))

    def forward(h_in: Tensor, base_output: Tensor) -> Tensor:
        own = torch.func.vmap(one)(parameters, buffers, h_in[:, None])[:, 0]
        return own + alpha[:, None, None] * (base_output - reference(h_in))

    return forward


def stacked(reference, proxies, alpha) -> Callable:
    """Every product of the proxies as one ``baddbmm``: what a careful user writes by hand."""
    weights = {name: torch.stack([dict(p.named_parameters())[name].detach() for p in proxies]) for name in
               dict(reference.named_parameters())}  # fmt: skip
    heads, layers = reference.config.heads, reference.config.layers
    prepared = {name: (w.mT.contiguous() if w.ndim == 3 else w[:, None]) for name, w in weights.items()}

    def linear(x: Tensor, name: str, weight: str = "weight", bias: str = "bias") -> Tensor:
        return torch.baddbmm(prepared[name + bias], x, prepared[name + weight])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * prepared[name + "weight"] + prepared[name + "bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, name, "in_proj_weight", "in_proj_bias").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        return linear(mixed.transpose(1, 2).flatten(2), name + "out_proj.")

    def proxies_forward(h: Tensor) -> Tensor:
        x = linear(h, "input.") + weights["position"]
        for i in range(layers):
            block = f"encoder.layers.{i}."
            x = norm(x + attention(x, block + "self_attn."), block + "norm1.")
            x = norm(x + linear(F.relu(linear(x, block + "linear1.")), block + "linear2."), block + "norm2.")
        return linear(x, "output.")

    return lambda h_in, base_output: proxies_forward(h_in) + alpha[:, None, None] * (base_output - reference(h_in))


PEERS = {"loop over modules": loop, "torch.func.vmap": vmapped, "torch.baddbmm by hand": stacked}


def check(actual: Tensor, expected: Tensor, precision: str) -> None:
    assert (actual.double() - expected).norm() <= TOLERANCE[precision] * expected.norm()


def exact(reference, proxies, alpha, h_in: Tensor, base_output: Tensor) -> Tensor:
    reference, *proxies = (copy.deepcopy(module).double() for module in (reference, *proxies))
    return loop(reference, proxies, alpha.double())(h_in.double(), base_output.double())


def run(benchmark, name: str, function: Callable, *arguments, rounds: int = 15) -> None:
    benchmark.name = name
    benchmark.pedantic(function, arguments, rounds=rounds, iterations=1, warmup_rounds=3)


def time_bank(benchmark, slots: int, precision: str, backend: str, sizes: tuple[int, int]) -> None:
    parts = modules(slots, *sizes)
    h_in, base_output, slot = inputs(slots)
    with csikernels.use_backend(backend), torch.inference_mode():
        bank = SamBank.from_modules(*parts, precision=precision)
        check(lasco_forward(h_in, base_output, bank, slot), exact(*parts, h_in, base_output), precision)
        run(benchmark, f"csikernels {backend} {precision}", lasco_forward, h_in, base_output, bank, slot)


def time_peer(benchmark, slots: int, peer: str, sizes: tuple[int, int]) -> None:
    parts = modules(slots, *sizes)
    h_in, base_output, _ = inputs(slots)
    with torch.inference_mode():
        forward = PEERS[peer](*parts)
        check(forward(h_in, base_output), exact(*parts, h_in, base_output), "float32")
        run(benchmark, peer, forward, h_in, base_output)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(benchmark, slots, precision, backend):
    benchmark.group = f"lasco_forward, {slots} slots with one sample each"
    time_bank(benchmark, slots, precision, backend, SAM_SIZES[0])


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("peer", PEERS)
def test_forward_peers(benchmark, slots, peer):
    benchmark.group = f"lasco_forward, {slots} slots with one sample each"
    time_peer(benchmark, slots, peer, SAM_SIZES[0])


@pytest.mark.parametrize("sizes", SAM_SIZES[1:], ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
@pytest.mark.parametrize("who", [*BACKENDS, *PEERS])
def test_forward_of_other_sizes(benchmark, sizes, who):
    """SAM sizes around those of Fig. 10."""
    benchmark.group = f"lasco_forward, 8 slots, {sizes[0]} blocks of width {sizes[1]}"
    if who in PEERS:
        time_peer(benchmark, 8, who, sizes)
    else:
        time_bank(benchmark, 8, "float32", who, sizes)


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", csikernels.backends()["transformer_forward"]["cpu"])
def test_engine(benchmark, precision, backend):
    base, parts, (h_in, _, slot) = engine_parts(benchmark)
    with csikernels.use_backend(backend), torch.inference_mode():
        engine = LascoEngine(base, SamBank.from_modules(*parts), precision)
        assert engine.packed
        check(engine(h_in, slot), exact(*parts, h_in, copy.deepcopy(base).double()(h_in.double())), precision)
        run(benchmark, f"csikernels {backend} {precision}", engine, h_in, slot, rounds=7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_engine_peers(benchmark, precision):
    base, parts, (h_in, _, _) = engine_parts(benchmark)
    dtype = getattr(torch, precision)
    own = copy.deepcopy(base).to(dtype)
    correct = loop(*parts)

    def forward(h: Tensor) -> Tensor:
        return correct(h, own(h.to(dtype)).float())

    with torch.inference_mode():
        check(forward(h_in), exact(*parts, h_in, copy.deepcopy(base).double()(h_in.double())), precision)
        run(benchmark, f"eager {precision} base, loop over modules", forward, h_in, rounds=7)


def engine_parts(benchmark):
    benchmark.group = "LascoEngine, 4 blocks of width 192, 16 samples of 16 slots"
    parts = modules(16)
    return ChannelTransformer(TransformerConfig.lam_laptop()).eval(), parts, inputs(16)
