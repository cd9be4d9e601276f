"""Timings of the engine against torch's forms of its base, each followed by the same correction."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, compare
from lasco_engine_peers import peers_of
from lasco_parts import check, exact, inputs, modules
from torch import Tensor

from csikernels import LascoEngine, SamBank, lasco_forward
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig


def operations(config: TransformerConfig, samples: int) -> float:
    """Of the base: all its products, attention's included."""
    matrices = config.layers * (4 * config.width**2 + 2 * config.width * config.feedforward)
    mixing = config.layers * 2 * config.tokens * config.width
    return 2 * samples * config.tokens * (matrices + mixing + 2 * config.features * config.width)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("name", "config", "samples", "rounds"),
    [
        ("20 blocks of width 512", TransformerConfig.lam_paper(), 64, 5),
        ("20 blocks of width 512", TransformerConfig.lam_paper(), 1, 9),
        ("4 blocks of width 192", TransformerConfig.lam_laptop(), 16, 15),
    ],
    ids=["paper-64", "paper-1", "laptop-16"],
)
@torch.inference_mode()
def test_engine(benchmark, precision, name, config, samples, rounds):
    parts = modules(samples)
    base = ChannelTransformer(config).eval().to(DEVICE)
    h_in, _, slot = inputs(samples)
    bank = SamBank.from_modules(*parts)
    engine = LascoEngine(base, bank, precision)
    assert engine.packed
    expected = exact(*parts, h_in, copy.deepcopy(base).double()(h_in.double()))

    def corrected(forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: lasco_forward(h_in, forward(h_in), bank, slot)

    compare(
        benchmark,
        f"LascoEngine, {precision} base of {name}, {samples} samples",
        {f"csikernels {precision}": lambda: engine(h_in, slot)},
        {peer: corrected(forward) for peer, forward in peers_of(precision, base, samples).items()},
        check=lambda who, result: check(result, expected, precision if "float32" not in who else "float32"),
        flops=operations(config, samples),
        peak=precision,
        rounds=rounds,
    )
