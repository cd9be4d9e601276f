"""self_information, select_informative, top_m and scatter_codeword on a GPU, or its simulator."""

from __future__ import annotations

import math

import pytest
import torch
from on_reference import reference
from test_self_information import check_selection, expected_information, grid, random_image

from csikernels import scatter_codeword, select_informative, self_information, top_m

pytestmark = pytest.mark.gpu("cuda", "triton")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# Information ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 2, 9, 13), (1, 1, 1, 1), (1, 3, 2, 33), (2, 2, 32, 32)])
def test_information_follows_the_formula(device, dtype, shape):
    h = random_image(*shape, dtype=dtype)
    bits = self_information(h.to(device), bandwidth=0.7).cpu()
    assert bits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(bits.double(), expected_information(h, 0.7, grid(3)), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    "offsets", [[(0, 0)], [(1, -2)], [(0, 1), (0, 1), (-1, 0)], [(40, 40), (0, 0)], grid(1), grid(2)[:-1], grid(6)]
)
def test_information_of_any_neighbourhood(device, offsets):
    h = random_image(2, 2, 6, 7)
    bits = self_information(h.to(device), bandwidth=0.9, offsets=offsets).cpu()
    torch.testing.assert_close(bits.double(), expected_information(h, 0.9, offsets), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_information_of_non_finite_elements(device, bad):
    h = random_image(2, 2, 9, 9)
    h[0, 0, 4, 4] = bad
    h[0, 0, 4, 7] = bad
    bits = self_information(h.to(device), bandwidth=1.0).cpu()
    wanted = reference(self_information, h, bandwidth=1.0)
    assert torch.equal(bits.isnan(), wanted.isnan()) and bits.isnan().any()
    torch.testing.assert_close(bits, wanted, equal_nan=True, rtol=1e-6, atol=1e-6)


# Selection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "m"),
    [((3, 2, 32, 32), 221), ((2, 2, 9, 13), 234), ((2, 1, 7, 5), 1), ((1, 1, 1, 1), 1), ((1, 1, 23, 61), 1000)],
)
def test_selection_is_right_at_every_rank(device, dtype, shape, m):
    h = random_image(*shape, dtype=dtype)
    values, indices = select_informative(h.to(device), m, bandwidth=0.8)
    check_selection(h, m, 0.8, selected=(values.cpu(), indices.cpu()))


def test_selection_with_source_and_offsets(device):
    h, source = random_image(2, 2, 8, 9), random_image(2, 2, 8, 9, dtype=torch.float16, seed=1)
    offsets = [(0, 0), (1, 1), (-2, 0)]
    selected = select_informative(h.to(device), 50, bandwidth=0.6, offsets=offsets, source=source.to(device))
    check_selection(h, 50, 0.6, offsets, source, selected=tuple(part.cpu() for part in selected))


@pytest.mark.parametrize("m", [1, 100, 221, 2048])
@pytest.mark.parametrize("kind", ["zeros", "constant", "sparse", "repeated"])
def test_ties_go_to_the_lower_index(device, kind, m):
    h = random_image(2, 2, 32, 32)
    if kind == "zeros":
        h.zero_()
    elif kind == "constant":
        h.fill_(0.5)
    elif kind == "sparse":
        h *= torch.rand(h.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    else:
        h = h[:, :, :8, :8].repeat(1, 1, 4, 4).contiguous()
    # Powers of two keep the differences exact: what ties in float64 ties in float32.
    h = (h * 64).round() / 64
    _, indices = select_informative(h.to(device), m, bandwidth=0.5)
    assert torch.equal(indices.cpu(), reference(select_informative, h, m, bandwidth=0.5)[1])


@pytest.mark.parametrize("m", [1, 40, 198])
@pytest.mark.parametrize("offsets", [grid(3), [(0, 1), (0, 0)]], ids=["grid", "pair"])
def test_elements_without_information_come_last(device, offsets, m):
    # Multiples of 1/2, so that much ties in float32 as in float64, both zeros among them.
    h = (random_image(1, 2, 9, 11) * 2).round() / 2
    h[h == 0] *= -1
    h[0, 0, 4, 5], h[0, 0, 8, 10], h[0, 1, 2, 3], h[0, 1, 0, 0] = math.nan, math.inf, -math.inf, -0.0
    values, indices = select_informative(h.to(device), m, bandwidth=2.0, offsets=offsets)
    wanted_values, wanted_indices = reference(select_informative, h, m, bandwidth=2.0, offsets=offsets)
    assert torch.equal(indices.cpu(), wanted_indices)
    assert torch.equal(values.cpu().view(torch.int32), wanted_values.view(torch.int32))


@pytest.mark.parametrize("n", [16384, 12289])
def test_the_largest_samples(device, n):
    h = random_image(1, 1, 1, n)
    _, indices = select_informative(h.to(device), n, bandwidth=0.5)
    check_selection(h, n, 0.5, selected=(h.flatten(1).gather(1, indices.cpu()), indices.cpu()))
    assert sorted(indices[0].tolist()) == list(range(n))


def test_a_sample_beyond_the_largest_takes_the_reference(device):
    h = random_image(1, 1, 128, 129)
    _, indices = select_informative(h.to(device), 10, bandwidth=0.5)
    assert torch.equal(indices.cpu(), reference(select_informative, h, 10, bandwidth=0.5)[1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_top_m_orders_any_scores(device, dtype):
    score = random_image(3, 1, 1, 700).flatten(1).to(dtype)
    score[0, ::7] = math.nan
    score[1] = (score[1] * 2).round()  # ties, and both zeros
    score[2, 3:9] = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.inf, 0.0], dtype=dtype)
    for m in (1, 64, 699, 700):
        values, indices = top_m(score.to(device), m)
        wanted_values, wanted_indices = reference(top_m, score, m)
        assert torch.equal(indices.cpu(), wanted_indices)
        torch.testing.assert_close(values.cpu(), wanted_values, rtol=0, atol=0, equal_nan=True)


def test_keys_of_float64_that_exceed_shared_memory(device):
    score = random_image(2, 1, 1, 16384, dtype=torch.float64).flatten(1)
    _, indices = top_m(score.to(device), 16384)
    assert torch.equal(indices.cpu(), reference(top_m, score, 16384)[1])


# Scatter, and what holds for all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 9, 13), (1,), (3, 8192), (0, 4)])
def test_scatter_fills_and_the_last_writer_wins(device, dtype, shape):
    size = math.prod(shape)
    m = min(size, 50)
    values = random_image(2, 1, 1, m, dtype=dtype).reshape(2, m)
    indices = torch.randint(0, max(1, size), (2, m), generator=torch.Generator().manual_seed(3))
    mean = torch.tensor([0.25, -1.0], dtype=dtype)
    image = scatter_codeword(values.to(device), indices.to(device), mean.to(device), shape)
    assert torch.equal(image.cpu(), reference(scatter_codeword, values, indices, mean, shape))


def test_empty_and_strided_inputs(device):
    assert self_information(torch.zeros(0, 2, 4, 4, device=device), bandwidth=1.0).shape == (0, 2, 4, 4)
    values, indices = select_informative(torch.zeros(0, 2, 4, 4, device=device), 3, bandwidth=1.0)
    assert values.shape == indices.shape == (0, 3)
    h = random_image(2, 9, 13, 4).permute(0, 3, 2, 1)[:, 1:3]
    _, indices = select_informative(h.to(device), 40, bandwidth=0.5)
    assert torch.equal(indices.cpu(), select_informative(h.contiguous().to(device), 40, bandwidth=0.5)[1].cpu())


def test_errors_are_those_of_the_other_backends(device):
    h = torch.zeros(2, 2, 4, 4, device=device)
    values, indices, mean = h[:, 0, 0], torch.zeros(2, 4, dtype=torch.int64, device=device), h[:, 0, 0, 0]
    for kind, message, call in [
        (ValueError, r"h: expected shape \[B, C, H, W\]", lambda: self_information(h[0], bandwidth=1.0)),
        (ValueError, "bandwidth: .* got nan", lambda: select_informative(h, 1, bandwidth=math.nan)),
        (ValueError, r"m: expected 1\.\.C\*H\*W = 1\.\.32, got 33", lambda: select_informative(h, 33, bandwidth=1.0)),
        (ValueError, r"m: expected 1\.\.N = 1\.\.4, got 0", lambda: top_m(values, 0)),
        (TypeError, "score: expected float16, .* got torch.int64", lambda: top_m(indices, 1)),
        (ValueError, "source: expected the shape of score", lambda: top_m(values, 1, source=values[:, :2])),
        (ValueError, "indices: expected the shape", lambda: scatter_codeword(values, indices[:, :2], mean, (4,))),
        (TypeError, "mean: expected the dtype", lambda: scatter_codeword(values, indices, mean.double(), (4,))),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_opcheck(device, opcheck):
    h, offsets = random_image(2, 2, 6, 5).to(device), [-1, 0, 0, 0, 2, 1]
    opcheck("self_information", (h, 0.5, offsets))
    opcheck("select_informative", (h, 7, 0.5, offsets, h.double().requires_grad_()))
    opcheck("top_m", (h.flatten(1).clone().requires_grad_(), 4))
    values, mean = h[:, 0, 0, :4].clone().requires_grad_(), h[:, 1, 1, 1].clone().requires_grad_()
    opcheck("scatter_codeword", (values, torch.tensor([[0, 3, 5, 1], [2, 2, 0, 4]], device=device), mean, [2, 3]))


def test_gradient_of_a_scattered_codeword(device):
    values = random_image(2, 1, 1, 5, dtype=torch.float64).reshape(2, 5).to(device).requires_grad_()
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64, device=device).requires_grad_()
    indices = torch.tensor([[4, 0, 7, 1, 11], [3, 9, 3, 3, 2]], device=device)  # one twice in the second row
    scatter_codeword(values, indices, mean, (3, 4)).sum().backward()
    assert values.grad.tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]] and mean.grad.tolist() == [7, 9]


def test_gradient_reaches_the_selected_values(device):
    h = random_image(2, 2, 6, 6).to(device).requires_grad_()
    values, indices = select_informative(h, 10, bandwidth=0.5)
    values.sum().backward()
    assert torch.equal(h.grad.flatten(1).nonzero()[:, 1].view(2, 10), indices.sort(1).values)


def test_bytes_are_within_a_quarter_of_the_least(simulated):
    h, m = random_image(4, 2, 32, 32), 221
    select_informative(h, m, bandwidth=0.5)
    (launch,) = simulated.launches
    least = 4 * h.numel() + 4 * m * (4 + 4 + 8)  # image, values read and written, indices
    assert launch["global_load_bytes"] + launch["global_store_bytes"] <= 1.25 * least
