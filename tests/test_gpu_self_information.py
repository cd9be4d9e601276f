"""self_information, select_informative, top_m and scatter_codeword on a GPU, or its simulator."""

from __future__ import annotations

import math

import pytest
import torch
from on_reference import reference
from test_self_information import check_selection, expected_information, grid, random_image

from csikernels import scatter_codeword, select_informative, self_information, top_m

pytestmark = pytest.mark.gpu("cuda")
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
