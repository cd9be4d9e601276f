"""LascoEngine's base in Triton, and the CUDA graphs of whole steps."""

from __future__ import annotations

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from lasco_modules import ODD, PAPER, Sam, bank_of, inputs, relative
from test_lasco_engine import LAM, PRE_NORM, low_precision_oracle

import csikernels
from csikernels import LascoEngine
from csikernels.ops.lasco_graph import StepGraphs

STYLES = [PRE_NORM, {"norm_first": True}, {"activation": "gelu"}, {"final_norm": True}]
SMALL = {**LAM, "layers": 2}


def base_of(sizes: dict, **style) -> Sam:
    torch.manual_seed(3)
    return Sam(**sizes, **style).eval()


def engine_of(sizes: dict, precision: str, device: torch.device, **style) -> LascoEngine:
    bank = bank_of(3, {**ODD, "tokens": sizes["tokens"], "features": sizes["features"]})[0]
    return LascoEngine(base_of(sizes, **style).to(device), bank.to(device), precision)


def base_output(engine: LascoEngine, h_in: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return engine._base_output(h_in.to(engine.bank.device)).cpu()


@pytest.mark.gpu("triton")
@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(style))
@pytest.mark.parametrize("sizes", [SMALL, ODD, {**ODD, "width": 130, "heads": 2}], ids=["lam", "odd", "wide"])
def test_float32_equals_the_module(device, sizes, style):
    engine = engine_of(sizes, "float32", device, **style)
    h_in = inputs([0] * 3, sizes)[0]
    with torch.no_grad():
        expected = copy.deepcopy(engine._base).cpu().double()(h_in.double())
    torch.testing.assert_close(base_output(engine, h_in).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu("triton")
@pytest.mark.parametrize("style", [PRE_NORM, {"activation": "gelu"}], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_low_precision_is_the_documented_arithmetic(device, precision, style):
    sizes = {**LAM, "layers": 1}
    engine = engine_of(sizes, precision, device, **style)
    h_in = inputs([0] * 4, sizes)[0]
    module = copy.deepcopy(engine._base).cpu()
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(h_in.double())
    defined = low_precision_oracle(module, h_in, precision)
    actual, error = base_output(engine, h_in), relative(defined, exact)
    # Fused attention rounds the softmax elsewhere (with attention written out, measured 0.14 of the error itself).
    assert relative(actual, defined) < 0.9 * error and relative(actual, exact) < 1.1 * error


@pytest.mark.gpu("triton")
def test_a_whole_step_and_its_errors(device):
    engine = engine_of(SMALL, "float32", device, **PRE_NORM)
    h_in, _, slot = inputs([2, 0, 1, 1], SMALL)
    steps = [engine(h_in.to(device), slot.to(device)).cpu() for _ in range(4)]  # as is, captured, replayed
    cpu = LascoEngine(engine._base.cpu(), engine.bank.cpu())
    with csikernels.use_backend("reference"):
        expected = cpu(h_in, slot)
    for step in steps:
        torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5)
    weights, hyper = engine._weights, engine._architecture.hyper()
    op = torch.ops.csikernels.transformer_forward
    given = h_in.to(weights[0].device)
    for kind, message, args in [
        (ValueError, r"weights: expected 5 \+ 12 n tensors", (given, weights[:-1], [], [], *hyper)),
        (TypeError, r"weights\[1\]: expected Float, got Double",
         (given, [weights[0], weights[1].double(), *weights[2:]], [], [], *hyper)),
        (ValueError, "heads: expected a divisor of the width 96, got 7", (given, weights, [], [], 7, *hyper[1:])),
        (ValueError, r"h_in: expected shape \[B, T, F\]", (given[0], weights, [], [], *hyper)),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            op(*args)


class PretendedGraph:
    """A CUDA graph on the CPU: replaying it computes the step anew, from and into the same memory."""

    def replay(self):
        self.output.copy_(self.step(self.h_in, self.slot))


@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda as far as StepGraphs calls it. -> (the step's calls, graphs captured so far)"""
    calls, graphs = [], []

    def step(h_in, slot):
        calls.append((h_in, slot))
        output = h_in * 2 + slot.view(-1, 1, 1)
        if graphs and graphs[-1].capturing:
            graphs[-1].h_in, graphs[-1].slot, graphs[-1].step, graphs[-1].output = h_in, slot, plain, output
        return output

    def plain(h_in, slot):
        return h_in * 2 + slot.view(-1, 1, 1)

    @contextlib.contextmanager
    def capture(graph):
        graph.capturing = True
        graphs.append(graph)
        yield
        graph.capturing = False

    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return step, calls, graphs, stream


def test_graphs_are_captured_at_the_second_call_of_a_size(pretended):
    step, calls, graphs, stream = pretended
    run = StepGraphs(step)
    outputs = []
    for seed in range(4):
        h_in, _, slot = inputs([seed, 1], ODD, seed=seed)
        outputs.append((run(h_in, slot, "state"), h_in * 2 + slot.view(-1, 1, 1)))
    assert len(calls) == 2 and len(graphs) == 1
    assert all(torch.equal(output, expected) for output, expected in outputs), "replays share no output"
    run(*inputs([0], ODD)[::2], "state")
    assert len(graphs) == 1
    run(h_in, slot, "another state")
    run(h_in, slot, "another state")
    assert len(graphs) == 2
    stream.cuda_stream = 8
    run(h_in, slot, "state")
    assert len(graphs) == 2 and len(calls) == 6
    run.clear()
    run(h_in, slot, "state")
    assert len(graphs) == 2 and len(calls) == 7


def test_graphs_of_old_sizes_are_dropped(pretended):
    step, _, graphs, _ = pretended
    run = StepGraphs(step)
    for size in [*range(1, 18), *range(2, 18)]:
        run(torch.zeros(size, 5, 3), torch.zeros(size, dtype=torch.int64), None)
    assert len(run._graphs) == 16 and len(graphs) == 16
    run(torch.zeros(1, 5, 3), torch.zeros(1, dtype=torch.int64), None)
    assert len(graphs) == 16, "the first size runs as it is again"


def test_only_steps_of_kernels_are_captured(monkeypatch):
    engine = engine_of(ODD, "float32", torch.device("cpu"))
    wide = engine_of({**ODD, "tokens": 65}, "float32", torch.device("cpu"))
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), numel=lambda: 1)
    for backend, capturing, expected in [
        ("cuda", False, (True, True)),
        ("cuda", True, (False, False)),
        ("triton", False, (True, False)),
        ("reference", False, (False, False)),
    ]:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        monkeypatch.setattr("csikernels.ops.lasco_engine.best_backend", lambda *_, name=backend: name)
        assert (engine._capturable(on_gpu), wide._capturable(on_gpu)) == expected, backend
    assert not engine._capturable(torch.zeros(1, 5, 3))


def test_an_engine_can_be_copied():
    engine = engine_of(ODD, "float32", torch.device("cpu"))
    h_in, _, slot = inputs([1, 0], ODD)
    expected = engine(h_in, slot)
    for twin in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(twin(h_in, slot), expected) and twin._graphs._step.__self__ is twin


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_follows_weights_and_slots(precision):
    device = torch.device("cuda")
    engine = LascoEngine(base_of(SMALL, **PRE_NORM).to(device), bank_of(3, PAPER)[0].to(device), precision)
    h_in, _, slot = (value.to(device) for value in inputs([2, 0, 1], PAPER))
    for change in ("nothing", "slots", "a proxy", "the base", "alpha"):
        if change == "slots":
            slot = slot.flip(0)
        elif change == "a proxy":
            engine.bank.replace(0, engine.bank.export(1))
        elif change == "the base":
            with torch.no_grad():
                engine._base.output.weight.mul_(1.5)
            engine.refresh()
        elif change == "alpha":
            engine.bank.alpha.mul_(0.5)
        replayed = [engine(h_in, slot) for _ in range(3)][-1]
        with torch.inference_mode():
            assert torch.equal(replayed, engine._step(h_in, slot)), change
    assert engine._graphs._graphs, "nothing was captured"
