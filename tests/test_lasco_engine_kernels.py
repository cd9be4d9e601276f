"""The packed base of LascoEngine alone: every kernel against the reference, over sizes, rows and changes of weights."""

from __future__ import annotations

import random

import pytest
import torch
from lasco_modules import ODD, PAPER, Sam, bank_of, relative
from torch import nn

import csikernels
from csikernels import LascoEngine
from csikernels.ops.lasco_engine import PANEL, pack

pytestmark = pytest.mark.op("transformer_forward")
# Of the reference in the same precision; a sum beside a rounding boundary may fall on its other side.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "int8": 1e-2}
PRECISIONS = list(TOLERANCE)


def engine_of(sizes: dict, precision: str, seed: int = 0, **options) -> LascoEngine:
    torch.manual_seed(seed)
    base = Sam(**sizes, **options).eval()
    bank = bank_of(1, {**ODD, "tokens": sizes["tokens"], "features": sizes["features"]})[0]
    return LascoEngine(base, bank, precision)


def run(engine: LascoEngine, h_in: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return engine._base_output(h_in)


def by_reference(engine: LascoEngine, h_in: torch.Tensor) -> torch.Tensor:
    with csikernels.use_backend("reference"):
        return run(engine, h_in)


def random_sizes(generator: random.Random) -> dict:
    heads = generator.randint(1, 4)
    size = lambda top: generator.choice([generator.randint(1, top), generator.choice([1, 31, 32, 33, 64])])  # noqa: E731
    return {
        "tokens": size(130),
        "features": size(70),
        "layers": generator.randint(1, 2),
        "width": heads * generator.choice([1, 2, 3, 8, 16, 17, 31, 32, 33, 40]),
        "heads": heads,
        "feedforward": size(130),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fuzz_of_sizes_against_the_reference(backend, precision):
    generator = random.Random(4)
    for seed in range(24):
        sizes = random_sizes(generator)
        options = {name: generator.random() < 0.5 for name in ("norm_first", "final_norm")}
        options["activation"] = generator.choice(["relu", "gelu"])
        engine = engine_of(sizes, precision, seed, **options)
        h_in = torch.randn(generator.randint(1, 5), sizes["tokens"], sizes["features"])
        actual, expected = run(engine, h_in), by_reference(engine, h_in)
        if sizes["width"] == 1:  # LayerNorm of one element: its sign is a rounding error
            continue
        assert relative(actual, expected) < TOLERANCE[precision], (sizes, options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_sample_does_not_see_the_others_nor_the_threads(backend, threads, precision, norm_first):
    engine = engine_of({**PAPER, "tokens": 7, "width": 48}, precision, norm_first=norm_first)
    h_in = torch.randn(40, 7, 64)
    threads(2)
    together = run(engine, h_in)
    threads(1)
    assert torch.equal(run(engine, h_in), together)
    if backend != "reference":  # torch's products may differ in the last bit with their sizes
        for i in (0, 1, 17, 39):
            assert torch.equal(run(engine, h_in[i : i + 1])[0], together[i])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("samples", [1, 3, 5])
def test_threads_that_share_a_sample_change_nothing(backend, threads, precision, samples):
    sizes = {"tokens": 70, "features": 9, "layers": 2, "width": 120, "heads": 5, "feedforward": 1000}
    engine = engine_of(sizes, precision, norm_first=samples == 3)
    h_in = torch.randn(samples, 70, 9)
    threads(1)
    alone = run(engine, h_in)
    for count in (2, 3):
        threads(count)
        if backend == "reference":
            assert relative(run(engine, h_in), alone) < TOLERANCE[precision]
        else:
            assert torch.equal(run(engine, h_in), alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_rows_than_one_pass_keeps(backend, precision):
    engine = engine_of({**ODD, "tokens": 33}, precision)
    h_in = torch.randn(150, 33, 3)
    assert relative(run(engine, h_in), by_reference(engine, h_in)) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_in_any_order_in_memory(backend, precision):
    engine = engine_of(ODD, precision)
    h_in = torch.randn(3, 5, 4).mT.contiguous().mT[..., 1:]
    assert not h_in.is_contiguous()
    assert torch.equal(run(engine, h_in), run(engine, h_in.contiguous()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(backend, precision, spoiled):
    engine = engine_of({**PAPER, "width": 32}, precision)
    h_in = torch.randn(4, 32, 64)
    clean = run(engine, h_in)
    h_in[2, 9, 5] = spoiled
    actual = run(engine, h_in)
    assert actual[2].isnan().all()
    assert torch.equal(actual[[0, 1, 3]], clean[[0, 1, 3]])


def test_int8_rows_of_zeros_and_of_tiny_numbers(backend):
    engine = engine_of(PAPER, "int8", norm_first=False)
    engine._base.input.bias.data.zero_()
    engine._base.position.data.zero_()
    engine.refresh()
    h_in = torch.zeros(3, 32, 64)
    h_in[1] = 1e-40
    actual = run(engine, h_in)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, by_reference(engine, h_in), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "refresh"])
def test_float32_follows_the_module(backend, change):
    engine = engine_of(ODD, "float32")
    base, other = engine._base, engine_of(ODD, "float32", seed=1)
    h_in = torch.randn(2, 5, 3)
    before = run(engine, h_in)
    with torch.no_grad():
        if change == "in place":
            for own, new in zip(base.parameters(), other._base.parameters(), strict=True):
                own.copy_(new)
        elif change == "load_state_dict":
            base.load_state_dict(other._base.state_dict())
        else:
            for own, new in zip(base.parameters(), other._base.parameters(), strict=True):
                own.data = new.data.clone()
            engine.refresh()
    assert relative(run(engine, h_in), before) > 0.1
    torch.testing.assert_close(run(engine, h_in), run(other, h_in))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_low_precision_follows_on_request(backend, precision):
    engine = engine_of(ODD, precision)
    h_in = torch.randn(2, 5, 3)
    before = run(engine, h_in)
    nn.init.zeros_(engine._base.output.weight)
    nn.init.ones_(engine._base.output.bias)
    assert torch.equal(run(engine, h_in), before)
    engine.refresh()
    assert torch.equal(run(engine, h_in), torch.ones_like(h_in))


def test_a_failed_refresh_leaves_the_old_weights(backend):
    engine = engine_of(ODD, "int8")
    h_in = torch.randn(2, 5, 3)
    before = run(engine, h_in)
    engine._base.output = nn.Linear(6, 4)
    with pytest.raises(ValueError):
        engine.refresh()
    assert torch.equal(run(engine, h_in), before)


def test_a_change_of_backend_after_packing(backend):
    with csikernels.use_backend("reference"):
        engine = engine_of(ODD, "int8")
    h_in = torch.randn(2, 5, 3)
    assert relative(run(engine, h_in), by_reference(engine, h_in)) < TOLERANCE["int8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_packed_layout(dtype):
    rows, columns = 37, 9
    matrix = torch.randint(-100, 100, (rows, columns)).to(dtype)
    panels, *shift = pack([matrix])
    group = 4 // matrix.element_size()
    assert panels.shape == (2, -(-columns // group), PANEL, group) and panels.is_contiguous()
    for n in range(2 * PANEL):
        for k in range(panels.shape[1] * group):
            expected = matrix[n, k] if n < rows and k < columns else 0
            assert panels[n // PANEL, k // group, n % PANEL, k % group] == expected
    if dtype == torch.int8:
        assert shift[0][:rows].tolist() == (128 * matrix.int().sum(1)).tolist() and not shift[0][rows:].any()


def test_errors_name_the_list(backend):
    if backend == "reference":
        pytest.skip("the reference reads the plain weights")
    engine = engine_of(ODD, "int8")
    weights, scales, packed = engine._weights, engine._scales, engine._current_pack()
    hyper = engine._architecture.hyper()
    h_in = torch.randn(2, 5, 3)
    op = torch.ops.csikernels.transformer_forward
    wrong = [weights[0], weights[1].double(), *weights[2:]]
    for kind, message, args in [
        (ValueError, "weights: expected 5 \\+ 12 n tensors", (h_in, weights[:-1], scales, packed, *hyper)),
        (ValueError, "packed: expected 26 tensors .* got 0", (h_in, weights, scales, [], *hyper)),
        (ValueError, "scales: expected 12 tensors, got 0", (h_in, weights, [], packed, *hyper)),
        (TypeError, r"weights\[1\]: expected Float, got Double", (h_in, wrong, scales, packed, *hyper)),
        (ValueError, r"packed\[0\]: expected shape", (h_in, weights, scales, [packed[0][1:], *packed[1:]], *hyper)),
        (ValueError, "heads: expected a divisor of the width 6, got 4", (h_in, weights, scales, packed, 4, *hyper[1:])),
        (ValueError, "activation: expected relu or gelu, got tanh",
         (h_in, weights, scales, packed, hyper[0], "tanh", *hyper[2:])),
        (ValueError, r"h_in: expected shape \[B, 5, 3\]", (h_in[0], weights, scales, packed, *hyper)),
        (TypeError, "h_in: expected float32, got Half", (h_in.half(), weights, scales, packed, *hyper)),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            op(*args)
