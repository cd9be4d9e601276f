"""top_m: exact, deterministic selection on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csikernels
from csikernels import top_m

pytestmark = pytest.mark.op("top_m")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected_indices(row: list[float], m: int) -> list[int]:
    """The rule itself, on Python's float64 numbers: value descending, then index; NaN last."""
    return sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))[:m]


def check(score: torch.Tensor, m: int, source: torch.Tensor | None = None) -> None:
    values, indices = top_m(score, m, source=source)
    wanted = torch.tensor([expected_indices(row, m) for row in score.double().tolist()]).reshape(len(score), m)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, wanted)
    given_values = score if source is None else source
    assert values.dtype == given_values.dtype
    assert torch.equal(bits(values), bits(given_values).gather(1, wanted))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN payloads and the sign of zero count."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "n", "m"), [(3, 2048, 221), (5, 17, 16), (2, 33, 33), (4, 31, 1), (1, 1, 1)])
def test_matches_the_rule(backend, dtype, rows, n, m):
    torch.manual_seed(n)
    check(torch.randn(rows, n).to(dtype), m)


def test_ties_go_by_index(backend):
    check(torch.zeros(2, 100), 40)
    check(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 2.0]]), 4)
    torch.manual_seed(0)
    check(torch.randint(0, 3, (4, 500)).float(), 300)


@pytest.mark.parametrize("kind", ["noise", "ties", "one outlier", "sorted", "constant"])
@pytest.mark.parametrize("n", [255, 256, 257, 1000, 5000])
def test_long_rows(backend, kind, n):
    torch.manual_seed(n)
    row = torch.randn(n)
    score = {
        "noise": row,
        "ties": (row * 2).round(),
        "one outlier": torch.cat([row[1:] * 1e-6 + 1, torch.tensor([3e38])]),
        "sorted": row.sort().values,
        "constant": torch.full((n,), 0.5),
    }[kind]
    for m in (1, 221, n // 2, n):
        if m <= n:
            check(torch.stack([score, score.flip(0)]), m)


def test_both_zeros_are_equal(backend):
    check(torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]]), 4)
    values, _ = top_m(torch.tensor([[-0.0, 0.0]]), 2)
    assert values.signbit().tolist() == [[True, False]]


def test_nan_sorts_last(backend):
    nan, inf = math.nan, math.inf
    check(torch.tensor([[nan, -inf, 1.0, nan, inf, -inf]]), 6)
    check(torch.full((2, 5), nan), 5)
    negative_nan = torch.tensor([[-nan, 0.0, -inf]]).copysign(torch.tensor(-1.0))
    _, indices = top_m(negative_nan, 3)
    assert indices.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values(backend, dtype):
    info = torch.finfo(dtype)
    row = [
        info.max,
        info.min,
        info.tiny,
        -info.tiny,
        info.smallest_normal / 4,
        math.inf,
        -math.inf,
        0.0,
        1.0,
        1.0 + info.eps,
    ]
    check(torch.tensor([row], dtype=dtype), len(row))


@pytest.mark.parametrize("dtype", FLOATS)
def test_source_gives_the_values(backend, dtype):
    torch.manual_seed(1)
    source = torch.randn(3, 50).to(dtype)
    source[0, 0] = math.nan
    check(torch.randn(3, 50), 50, source)
    check(torch.randn(3, 50, dtype=torch.float64), 7, source)


def test_empty_batch(backend):
    values, indices = top_m(torch.empty(0, 9), 4)
    assert values.shape == indices.shape == (0, 4)
    assert indices.dtype == torch.int64


def test_any_strides(backend):
    torch.manual_seed(2)
    wide = torch.randn(40, 6)
    check(wide.T, 5)
    check(wide.T[::2, 3::5], 3, torch.randn(8, 3).T)
    check(torch.randn(1, 30).expand(4, 30), 6)


def test_outputs_own_their_memory(backend):
    score = torch.tensor([[3.0, 2.0, 1.0]])
    source = torch.tensor([[1.0, 2.0, 3.0]])
    for values, indices in (top_m(score, 3), top_m(score, 3, source=source)):
        memory = {tensor.untyped_storage().data_ptr() for tensor in (score, source, values, indices)}
        assert len(memory) == 4
        assert values.is_contiguous() and indices.is_contiguous()


def test_inputs_stay_as_they_are(backend):
    score = torch.tensor([[0.0, math.nan, 2.0]])
    before = score.clone()
    top_m(score, 2)
    assert torch.equal(bits(score), bits(before))


def test_threads_do_not_matter(backend, threads):
    torch.manual_seed(3)
    score = torch.randint(0, 50, (64, 300)).float()
    threads(1)
    alone = top_m(score, 99)
    for count in (2, 3, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(alone, top_m(score, 99), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (ValueError, r"m: expected 1\.\.N = 1\.\.4, got 0", (torch.zeros(2, 4), 0), {}),
        (ValueError, r"m: expected 1\.\.N = 1\.\.4, got 5", (torch.zeros(2, 4), 5), {}),
        (ValueError, r"m: expected 1\.\.N = 1\.\.0, got 1", (torch.zeros(2, 0), 1), {}),
        (TypeError, "m: expected an integer, got 1.0", (torch.zeros(2, 4), 1.0), {}),
        (TypeError, "m: expected an integer, got True", (torch.zeros(2, 4), True), {}),
        (ValueError, r"score: expected shape \[B, N\], got \[4\]", (torch.zeros(4), 1), {}),
        (TypeError, "score: expected float16, .* got torch.int64", (torch.zeros(2, 4, dtype=torch.int64), 1), {}),
        (
            TypeError,
            "score: expected float16, .* got torch.complex64",
            (torch.zeros(2, 4, dtype=torch.complex64), 1),
            {},
        ),
        (TypeError, "score: expected a tensor or an array, got list", ([[1.0]], 1), {}),
        (
            ValueError,
            r"source: expected the shape of score, \[2, 4\]",
            (torch.zeros(2, 4), 1),
            {"source": torch.zeros(2, 3)},
        ),
        (TypeError, "source: expected float16", (torch.zeros(2, 4), 1), {"source": torch.zeros(2, 4).int()}),
        (
            ValueError,
            "source: expected a tensor on cpu",
            (torch.zeros(2, 4), 1),
            {"source": torch.zeros(2, 4, device="meta")},
        ),
    ],
)
def test_errors_name_the_argument(backend, error, message, arguments, keywords):
    with pytest.raises(error, match=message):
        top_m(*arguments, **keywords)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"m: expected 1\.\.N = 1\.\.4, got 5", (torch.zeros(2, 4), 5)),
        (ValueError, r"score: expected shape \[B, N\], got \[4\]", (torch.zeros(4), 1)),
        (TypeError, "score: expected float16", (torch.zeros(2, 4).long(), 1)),
        (ValueError, "source: expected the shape of score", (torch.zeros(2, 4), 1, torch.zeros(2, 3))),
    ],
)
@pytest.mark.skipif("cpp" not in csikernels.backends()["top_m"]["cpu"], reason="the extension was not built")
def test_the_compiled_op_checks_by_itself(error, message, arguments):
    with csikernels.use_backend("cpp"), pytest.raises(error, match=message):
        torch.ops.csikernels.top_m(*arguments)


def test_numpy_in_numpy_out(backend):
    score = np.array([[0.5, 2.5, 1.5]], dtype=np.float32)
    values, indices = top_m(score, 2)
    assert isinstance(values, np.ndarray) and isinstance(indices, np.ndarray)
    assert values.dtype == np.float32 and indices.dtype == np.int64
    assert values.tolist() == [[2.5, 1.5]] and indices.tolist() == [[1, 2]]
    values, _ = top_m(score, np.int64(1), source=score[:, ::-1])
    assert values.tolist() == [[2.5]]
    with pytest.raises(TypeError, match="arrays of one kind"):
        top_m(score, 1, source=torch.from_numpy(score))


def test_dlpack_round_trip(backend):
    score = np.array([[0.5, 2.5, 1.5]], dtype=np.float64)
    values, indices = top_m(torch.from_dlpack(score), 2)
    assert np.from_dlpack(values).tolist() == [[2.5, 1.5]]
    assert np.from_dlpack(indices).tolist() == [[1, 2]]


@pytest.mark.parametrize("with_source", [False, True])
def test_gradient(backend, with_source):
    torch.manual_seed(4)
    score = torch.randn(3, 8, dtype=torch.float64)
    source = torch.randn(3, 8, dtype=torch.float64)
    if with_source:
        assert torch.autograd.gradcheck(lambda source: top_m(score, 5, source=source)[0], source.requires_grad_())
        values, _ = top_m(score.requires_grad_(), 5, source=source)
        values.sum().backward()
        assert score.grad is None
    else:
        assert torch.autograd.gradcheck(lambda score: top_m(score, 5)[0], score.requires_grad_())


def test_opcheck(backend, opcheck):
    torch.manual_seed(5)
    score = torch.randn(3, 20)
    opcheck("top_m", (score, 4))
    opcheck("top_m", (score.clone().requires_grad_(), 4))
    opcheck("top_m", (score, 4, torch.randn(3, 20, dtype=torch.float64).requires_grad_()))
    opcheck("top_m", (torch.empty(0, 5), 2))


def test_compile_and_export(backend):
    class Select(torch.nn.Module):
        def forward(self, score):
            values, indices = top_m(score * 2, score.shape[1] // 4)
            return values + 1, indices

    torch.manual_seed(6)
    score = torch.randn(5, 40)
    eager = Select()(score)
    compiled = torch.compile(Select(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Select(), (score,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    for run in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(eager, run(score), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(Select()(score[:3]), exported(score[:3]), strict=True))


numbers = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]), st.just(2.0)
)


@given(data=st.data(), n=st.integers(1, 70), rows=st.integers(0, 3), double=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_row_against_a_sort(data, n, rows, double):
    # Hypothesis runs many examples per test, so the backends are walked inside it.
    m = data.draw(st.integers(1, n))
    row = st.lists(numbers, min_size=n, max_size=n)
    score = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64).reshape(rows, n)
    for name in ("cpp", "reference"):
        if name not in csikernels.backends()["top_m"]["cpu"]:
            continue
        with csikernels.use_backend(name):
            check(score if double else score.float(), m)
