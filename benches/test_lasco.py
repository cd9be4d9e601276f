"""Timings of LASCO on many small models against what one would write in PyTorch.

Peers, all in float32: a loop over the modules, ``torch.func.vmap`` over their stacked parameters, and the same stacked
by hand with ``baddbmm``. The slots come in order, one sample each, which favours the peers: they could not mix slots.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from compare import compare
from lasco_parts import check, exact, inputs, loop, modules
from torch import Tensor
from torch.nn import functional as F

from csikernels import SamBank, lasco_forward

SLOTS = [1, 8, 64]  # one sample each
OTHER_SIZES = [(1, 64), (4, 64), (2, 32), (2, 128)]  # layers, width: those around the standard size in Fig. 10
PEAKS = {"float32": "float32", "bfloat16": "bfloat16"}


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


def operations(slots: int, layers: int, width: int, tokens: int = 32, features: int = 64) -> float:
    """Of the proxies and of the reference, one sample each; feed-forward width 4 x width."""
    block = 4 * width**2 + 2 * width * (4 * width) + 2 * tokens * width
    return 2 * slots * 2 * tokens * (2 * features * width + layers * block)


def time_forward(benchmark, slots: int, layers: int, width: int) -> None:
    parts = modules(slots, layers, width)
    h_in, base_output, slot = inputs(slots)
    expected = exact(*parts, h_in, base_output)
    with torch.inference_mode():
        banks = {precision: SamBank.from_modules(*parts, precision=precision) for precision in PEAKS}
        peers = {name: functools.partial(make(*parts), h_in, base_output) for name, make in PEERS.items()}
        compare(
            benchmark,
            f"lasco_forward, {slots} slots, {layers} blocks, d={width}",
            {name: functools.partial(lasco_forward, h_in, base_output, bank, slot) for name, bank in banks.items()},
            peers,
            check=lambda name, output: check(output, expected, name if name in banks else "float32"),
            flops=operations(slots, layers, width),
            peak=PEAKS,
            calls=max(1, 16 // slots),
        )


@pytest.mark.parametrize("slots", SLOTS)
def test_forward(benchmark, slots):
    time_forward(benchmark, slots, 2, 64)


@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def test_forward_of_other_sizes(benchmark, sizes):
    time_forward(benchmark, 64, *sizes)
