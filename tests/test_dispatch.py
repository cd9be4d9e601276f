"""Choosing a backend: what is available, what is forced, what is refused."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from lasco_modules import ODD, inputs, sams

import csikernels
from csikernels import _dispatch, _load, triton

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(_load.extension is None, reason="the extension was not built")
SCORE = torch.tensor([[1.0, 3.0, 2.0]])


@pytest.fixture
def spy(monkeypatch):
    """Notes the calls of top_m's reference, which otherwise look like the compiled one's."""
    calls = []
    real = _dispatch._implementations["top_m"]["reference"]

    def reference(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setitem(_dispatch._implementations["top_m"], "reference", reference)
    return calls


def test_backends_lists_every_op_best_first():
    table = csikernels.backends()
    assert set(table) == set(_dispatch.schemas())
    for devices in table.values():
        assert set(devices) == {"cpu", "cuda"}
        assert devices["cpu"][-1] == "reference"
        for names in devices.values():
            assert names == sorted(names, key=_dispatch.BACKENDS.index)
    if not torch.cuda.is_available():
        assert all(devices["cuda"] == [] for devices in table.values())


@needs_extension
def test_the_compiled_kernel_is_the_default(spy):
    interpreted = ["triton"] if triton.runs_on("cpu") else []
    assert csikernels.backends()["top_m"]["cpu"] == ["cpp", *interpreted, "reference"]
    csikernels.top_m(SCORE, 1)
    with csikernels.use_backend("cpp"):
        csikernels.top_m(SCORE, 1)
    assert not spy


@needs_extension
def test_contexts_force_nest_and_restore(spy):
    with csikernels.use_backend("reference"):
        assert _dispatch.chosen_backend() == "reference"
        csikernels.top_m(SCORE, 1)
        with csikernels.use_backend("cpp"):
            csikernels.top_m(SCORE, 1)
        csikernels.top_m(SCORE, 1)
    assert len(spy) == 2
    assert _dispatch.chosen_backend() is None
    with pytest.raises(KeyError), csikernels.use_backend("reference"):
        raise KeyError
    assert _dispatch.chosen_backend() is None
    csikernels.top_m(SCORE, 1)
    assert len(spy) == 2


@needs_extension
def test_the_choice_reaches_other_threads(spy):
    with csikernels.use_backend("reference"):
        worker = threading.Thread(target=csikernels.top_m, args=(SCORE, 1))
        worker.start()
        worker.join()
    assert len(spy) == 1


def test_an_unknown_backend_is_a_value_error():
    with pytest.raises(ValueError, match="backend: expected one of cpp, cuda, triton, reference, got 'opencl'"):
        csikernels.use_backend("opencl").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_backend_without_its_device_says_so():
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: torch sees no CUDA device"):
        csikernels.use_backend("cuda").__enter__()


def test_an_op_without_the_backend_is_refused(monkeypatch):
    """No silent fallback: an op that lacks the forced backend raises, whatever the others have."""
    monkeypatch.delitem(_dispatch._implementations["self_information"], "reference")
    with (
        csikernels.use_backend("reference"),
        pytest.raises(
            RuntimeError, match="self_information: backend 'reference' was asked for, but on cpu this op has"
        ),
    ):
        csikernels.self_information(torch.zeros(1, 1, 2, 2), bandwidth=1.0)


def test_sparse_tensors_are_refused():
    with pytest.raises(NotImplementedError, match="csikernels::top_m"):
        csikernels.top_m(torch.ones(1, 2).to_sparse(), 1)


def test_implement_knows_python_backends_only():
    with pytest.raises(ValueError, match="expected 'reference', 'triton' or 'cuda', got 'cpp'"):
        _dispatch.implement("top_m", "cpp")


def test_an_op_is_defined_once():
    with pytest.raises(RuntimeError, match="'top_m' is defined twice"):
        _dispatch.define(_dispatch.schemas()["top_m"])


def test_the_environment_chooses(run_python):
    code = "import csikernels; from csikernels import _dispatch; print(_dispatch.chosen_backend())"
    assert run_python(code, CSIKERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code).stdout.strip() == "None"
    wrong = run_python(code, CSIKERNELS_BACKEND="opencl")
    assert wrong.returncode != 0
    assert "ValueError: CSIKERNELS_BACKEND=opencl: backend: expected one of" in wrong.stderr


def library_schemas() -> dict[str, str]:
    """The schema texts of csrc/library.cpp, adjacent string literals joined."""
    text = (ROOT / "csrc" / "library.cpp").read_text()
    found = {}
    for literals in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', text):
        schema = "".join(re.findall(r'"([^"]*)"', literals))
        found[schema.split("(", 1)[0]] = schema
    return found


def test_schemas_are_the_same_in_cpp_and_python():
    assert library_schemas() == _dispatch.schemas()


@needs_extension
def test_an_extension_of_other_sources_is_refused():
    with pytest.raises(ImportError, match="built from other sources .* install csikernels again"):
        _dispatch._extension_defines("top_m", "top_m(Tensor score, int m) -> Tensor")
    assert _dispatch._extension_defines("top_m", _dispatch.schemas()["top_m"])
    assert not _dispatch._extension_defines("no_such_op", "no_such_op(Tensor score) -> Tensor")


def test_what_runs_inside_records_no_graph(monkeypatch):
    """The op's own formula is the only one: a graph of the inner operations would be built for nothing."""
    modes = []
    real = _dispatch._implementations["select_informative"]["reference"]

    def reference(*args):
        modes.append(torch.is_grad_enabled())
        return real(*args)

    monkeypatch.setitem(_dispatch._implementations["select_informative"], "reference", reference)
    with csikernels.use_backend("reference"):
        values, _ = csikernels.select_informative(torch.randn(1, 1, 3, 3, requires_grad=True), 4, bandwidth=1.0)
    assert modes == [False]
    assert values.requires_grad


def test_autocast_leaves_the_selection_alone():
    score = torch.tensor([[1.0, 1.0 + 2**-20]])  # equal once rounded to bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices = csikernels.top_m(score, 2)
    assert values.dtype == torch.float32 and indices.tolist() == [[1, 0]]


def test_autocast_does_not_reach_inside_an_op():
    h = torch.randn(4, 32, dtype=torch.complex64)
    book = torch.randn(64, 32, dtype=torch.complex64)
    image = torch.randn(2, 2, 8, 8)
    plain = csikernels.codebook_argmax(h, book), csikernels.self_information(image, bandwidth=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = csikernels.codebook_argmax(h, book), csikernels.self_information(image, bandwidth=0.5)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_meta_tensors_beside_others_are_refused():
    """The fake would return at once, and the caller would take that for a result."""
    ops = torch.ops.csikernels
    message = "top_m: expected all tensors on one device, got score on cpu and source on meta"
    with pytest.raises(ValueError, match=message):
        ops.top_m(SCORE, 1, SCORE.to("meta"))
    assert ops.top_m(SCORE.to("meta"), 1, SCORE.to("meta"))[0].device.type == "meta"
    reference, proxies = sams(2, ODD)
    bank = csikernels.SamBank.from_modules(reference, proxies, 0.5).to("meta")
    h_in, base_output, slot = inputs([1, 0], ODD)
    rest = (bank.alpha, bank.proxies.tensors(), bank.reference.tensors(), [], *bank.architecture.hyper(), False)
    with pytest.raises(ValueError, match="lasco_forward: .* got h_in on cpu and alpha on meta"):
        ops.lasco_forward(h_in, base_output, slot, *rest)
    # Slots may lie on the CPU, whatever the rest.
    output, _ = ops.lasco_forward(h_in.to("meta"), base_output.to("meta"), slot, *rest)
    assert output.shape == h_in.shape and output.device.type == "meta"


@pytest.fixture
def old_gpu(monkeypatch):
    """torch sees a GPU that has the kernels' tensor cores, and one that has not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["NVIDIA X", "NVIDIA T"].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5)].__getitem__)
    triton._recent_gpu.cache_clear()
    yield
    triton._recent_gpu.cache_clear()


@pytest.mark.parametrize("has_triton", [True, False])
def test_a_gpu_too_old_is_named_once(old_gpu, monkeypatch, has_triton):
    monkeypatch.setattr(triton, "installed", lambda: has_triton)
    with pytest.warns(UserWarning) as said:
        for op in ("top_m", "lasco_forward", "top_m"):
            # What the CUDA kernels hand over arrives here, too.
            chosen = _dispatch._python_implementation(op, "cuda")
            assert chosen is _dispatch._implementations[op]["reference"]
    assert len(said) == 1
    assert "got NVIDIA T (sm_75): the reference runs instead" in str(said[0].message)
