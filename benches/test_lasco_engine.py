"""Timings of the engine against the base module in eager float32 and bfloat16, then a loop over the small models.

Every result is checked before it is timed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from lasco_parts import check, exact, inputs, loop, modules, run
from torch import Tensor

import csikernels
from csikernels import LascoEngine, SamBank
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig


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
