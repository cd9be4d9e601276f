"""Timings of LASCO on many small models against what one would write in PyTorch.

Peers: a loop over the modules, ``torch.func.vmap`` over their stacked parameters, and the same stacked by hand with
``baddbmm``. Every result is checked before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lasco_parts import check, exact, inputs, loop, modules, run
from torch import Tensor
from torch.nn import functional as F

import csikernels
from csikernels import SamBank, lasco_forward

BACKENDS = csikernels.backends()["lasco_forward"]["cpu"]
SLOTS = [1, 8, 64]  # one sample each
SAM_SIZES = [(2, 64), (1, 64), (4, 64), (2, 32), (2, 128)]  # layers, width


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
