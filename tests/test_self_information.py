"""self_information, select_informative and scatter_codeword on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import csikernels
from csikernels import scatter_codeword, select_informative, self_information, top_m

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
information = pytest.mark.op("self_information")
selection = pytest.mark.op("select_informative")
scattering = pytest.mark.op("scatter_codeword")


def grid(radius: int) -> list[tuple[int, int]]:
    return [(row, column) for row in (-radius, 0, radius) for column in (-radius, 0, radius)]


def expected_information(h: torch.Tensor, bandwidth: float, offsets: list[tuple[int, int]]) -> torch.Tensor:
    """Equation 9, term by term in float64, zero outside the array."""
    images = h.double().numpy()
    out = np.empty_like(images)
    for b, c, i, j in np.ndindex(*images.shape):
        density = 0.0
        for row, column in offsets:
            inside = 0 <= i + row < images.shape[2] and 0 <= j + column < images.shape[3]
            neighbour = images[b, c, i + row, j + column] if inside else 0.0
            density += math.exp(-((images[b, c, i, j] - neighbour) ** 2) / (2 * bandwidth**2))
        out[b, c, i, j] = -math.log2(density / len(offsets) / (math.sqrt(2 * math.pi) * bandwidth))
    return torch.from_numpy(out)


def random_image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# self_information -----------------------------------------------------------------------------------------------------


@information
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 2, 9, 13), (1, 1, 1, 1), (1, 3, 2, 33), (1, 2, 32, 32)])
def test_information_follows_the_formula(backend, dtype, shape):
    h = random_image(*shape, dtype=dtype)
    bits = self_information(h, bandwidth=0.7)
    assert bits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        bits.double(), expected_information(h, 0.7, grid(3)), rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-6
    )


@information
@pytest.mark.parametrize("offsets", [[(0, 0)], [(1, -2)], [(0, 1), (0, 1), (-1, 0)], [(40, 40), (0, 0)], grid(1)])
def test_information_of_any_neighbourhood(backend, offsets):
    h = random_image(2, 2, 6, 7)
    wanted = expected_information(h, 0.9, offsets)
    torch.testing.assert_close(
        self_information(h, bandwidth=0.9, offsets=offsets).double(), wanted, rtol=1e-6, atol=1e-6
    )


@information
def test_information_by_hand(backend):
    # One element of value 1 and bandwidth 1: the centre and eight zeros of the padding.
    bits = self_information(torch.ones(1, 1, 1, 1), bandwidth=1.0)
    by_hand = -math.log2((1 + 8 * math.exp(-0.5)) / 9 / math.sqrt(2 * math.pi))
    assert bits.item() == pytest.approx(by_hand, rel=1e-6)
    # A constant image of zeros is a constant density 1 / (sqrt(2 pi) b) everywhere, padding included.
    zeros = self_information(torch.zeros(1, 2, 5, 5, dtype=torch.float64), bandwidth=0.25)
    torch.testing.assert_close(zeros, torch.full_like(zeros, math.log2(math.sqrt(2 * math.pi) * 0.25)))


@information
def test_information_is_finite_far_from_all_neighbours(backend):
    h = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    h[0, 0, 1, 1] = 100.0
    # exp(-100^2 / 2) underflows; with a single neighbour the information is the exponent itself.
    bits = self_information(h, bandwidth=1.0, offsets=[(0, 1)])[0, 0, 1, 1].item()
    assert bits == pytest.approx((100.0**2 / 2 + 0.5 * math.log(2 * math.pi)) / math.log(2), rel=1e-6)


@information
def test_information_of_non_finite_elements(backend):
    h = random_image(1, 1, 9, 9)
    h[0, 0, 4, 4] = math.nan
    bits = self_information(h, bandwidth=1.0)
    touched = torch.zeros(9, 9, dtype=torch.bool)
    touched[1::3, 1::3] = True  # the elements whose 3x3 grid of step 3 holds (4, 4)
    assert torch.equal(bits[0, 0].isnan(), touched)

    h[0, 0, 4, 4] = math.inf
    bits = self_information(h, bandwidth=1.0)
    assert bits.isnan().nonzero().tolist() == [[0, 0, 4, 4]]
    h[0, 0, 4, 4] = 1e30  # as far as infinity, but a number
    far = self_information(h, bandwidth=1.0)
    assert torch.equal(bits[~bits.isnan()], far[~bits.isnan()]) and not far.isnan().any()


@information
def test_information_carries_no_gradient(backend):
    h = random_image(1, 1, 4, 4).requires_grad_()
    assert not self_information(h, bandwidth=1.0).requires_grad


# select_informative ---------------------------------------------------------------------------------------------------


def check_selection(h, m, bandwidth, offsets=None, source=None, selected=None):
    """Right to 1e-6 relative at every rank, ties by index, values bit for bit. `selected` was computed elsewhere."""
    values, indices = selected or select_informative(h, m, bandwidth=bandwidth, offsets=offsets, source=source)
    true = expected_information(h, bandwidth, offsets or grid(3)).flatten(1)
    assert indices.dtype == torch.int64 and indices.shape == (len(h), m)
    assert all(len(set(row)) == m for row in indices.tolist())
    chosen, best = true.gather(1, indices), true.sort(1, descending=True).values[:, :m]
    torch.testing.assert_close(chosen, best, rtol=1e-6, atol=1e-6)
    given = (h if source is None else source).flatten(1)
    assert values.dtype == given.dtype
    assert torch.equal(values, given.gather(1, indices))


@selection
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "m"), [((3, 2, 32, 32), 221), ((2, 2, 9, 13), 234), ((2, 1, 7, 5), 1), ((1, 1, 1, 1), 1)]
)
def test_selection_is_right_at_every_rank(backend, dtype, shape, m):
    check_selection(random_image(*shape, dtype=dtype), m, 0.8)


@selection
def test_selection_with_source_and_offsets(backend):
    h, source = random_image(2, 2, 8, 8), random_image(2, 2, 8, 8, dtype=torch.float64, seed=1)
    check_selection(h, 50, 0.5, source=source)
    check_selection(h, 50, 0.5, offsets=[(0, 1), (2, -1)], source=source.bfloat16())


@selection
@pytest.mark.op("select_informative", "self_information", "top_m")
def test_selection_is_top_m_of_the_information(backend):
    h = random_image(4, 2, 32, 32, dtype=torch.float64)
    bits = self_information(h, bandwidth=0.6).flatten(1)
    assert same(select_informative(h, 221, bandwidth=0.6), top_m(bits, 221, source=h.flatten(1)))


@selection
def test_equal_information_goes_by_index(backend):
    values, indices = select_informative(torch.zeros(2, 2, 8, 8), 100, bandwidth=1.0)
    assert torch.equal(indices, torch.arange(100).expand(2, 100))
    # Two equal peaks far apart in a field of zeros: equal information, the first comes first.
    h = torch.zeros(1, 1, 20, 20)
    h[0, 0, 10, 10] = h[0, 0, 3, 3] = 5.0
    values, indices = select_informative(h, 3, bandwidth=1.0)
    assert indices[0, :2].tolist() == [63, 210]
    assert values[0, :2].tolist() == [5.0, 5.0]


@selection
@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_neighbourhoods_in_another_order_tie(backend, dtype):
    # An element of a symmetric image and its mirror image have the same differences, met in another order: rounding
    # must not decide between them.
    x = random_image(2, 1, 24, 24, dtype=dtype, seed=7)
    h = x + x.transpose(2, 3)
    _, indices = select_informative(h, 24 * 24, bandwidth=0.7)
    for order in indices.tolist():
        mirrored = [index % 24 * 24 + index // 24 for index in order]
        rank = {index: place for place, index in enumerate(order)}
        for place, (index, mirror) in enumerate(zip(order, mirrored, strict=True)):
            assert index == mirror or rank[mirror] == place + (1 if index < mirror else -1)


IMAGES = {
    "noise": lambda shape: random_image(*shape, seed=3),
    "clusters": lambda shape: random_image(*shape, seed=3) ** 5,
    "sparse": lambda shape: random_image(*shape, seed=3) * (random_image(*shape, seed=4) > 1.3),
    "very sparse": lambda shape: random_image(*shape, seed=3) * (random_image(*shape, seed=4) > 2.5),
    "zeros": lambda shape: torch.zeros(shape),
    "quantised": lambda shape: random_image(*shape, seed=3).round(),
    "nearly constant": lambda shape: 1 + 1e-6 * random_image(*shape, seed=3),
    "tiny": lambda shape: 1e-30 * random_image(*shape, seed=3),
    "huge": lambda shape: 1e30 * random_image(*shape, seed=3),
}


@selection
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("bandwidth", [0.02, 0.5, 20.0])
def test_selection_of_any_image(backend, image, bandwidth):
    # What float32 cannot tell apart: ties, near ties, sums that underflow; around the m-th element, too.
    h = IMAGES[image]((2, 2, 16, 20))
    log_density = float64_log_density(h, bandwidth, 3)
    for m in (1, 40, 221, 400, 640):
        _, indices = select_informative(h, m, bandwidth=bandwidth)
        best = log_density.sort(1).values[:, :m]
        torch.testing.assert_close(log_density.gather(1, indices), best, rtol=1e-9, atol=2e-7)


def float64_log_density(h: torch.Tensor, bandwidth: float, radius: int) -> torch.Tensor:
    """log of the sum over the eight neighbours, which ranks the elements, smallest first."""
    padded = torch.nn.functional.pad(h.double(), (radius,) * 4)
    neighbours = torch.stack(
        [
            padded[..., radius + row : radius + row + h.shape[2], radius + column : radius + column + h.shape[3]]
            for row, column in grid(radius)
            if (row, column) != (0, 0)
        ]
    )
    return (-(((h.double() - neighbours) / bandwidth) ** 2) / 2).logsumexp(0).flatten(1)


@pytest.mark.op("self_information", "select_informative")
@pytest.mark.parametrize("seed", range(12))
def test_any_size_and_radius(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    channels, height, width, radius = (
        int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 4), (1, 131), (1, 131), (1, 24))
    )
    wide = random_image(2, channels, height, 2 * width, seed=seed)
    h = wide[..., ::2] if seed % 2 else wide[..., :width].contiguous()
    log_density = float64_log_density(h, 0.6, radius)
    m = int(torch.randint(1, channels * height * width + 1, (), generator=generator))
    values, indices = select_informative(h, m, bandwidth=0.6, radius=radius)
    assert torch.equal(values, h.flatten(1).gather(1, indices))
    assert all(len(set(row)) == m for row in indices.tolist())
    best = log_density.sort(1).values[:, :m]
    torch.testing.assert_close(log_density.gather(1, indices), best, rtol=1e-9, atol=2e-7)
    bits = self_information(h, bandwidth=0.6, radius=radius)
    wanted = math.log2(9 * math.sqrt(2 * math.pi) * 0.6) - (1 + log_density.exp()).log2()
    torch.testing.assert_close(bits.double().flatten(1), wanted, rtol=1e-6, atol=1e-6)


@selection
def test_selection_does_not_depend_on_the_samples_before(backend):
    # Each sample's threshold starts from the last one's.
    h = torch.cat([image((2, 2, 16, 20)) for image in IMAGES.values()])
    together = select_informative(h, 99, bandwidth=0.5)
    for i in range(len(h)):
        assert same(select_informative(h[i : i + 1], 99, bandwidth=0.5), tuple(part[i : i + 1] for part in together))


@selection
def test_elements_without_information_come_last(backend):
    h = random_image(1, 1, 4, 4)
    h[0, 0, 1, 2] = math.nan
    _, indices = select_informative(h, 16, bandwidth=1.0, offsets=[(0, 0), (0, 1)])
    assert sorted(indices[0, -2:].tolist()) == indices[0, -2:].tolist() == [5, 6]  # the NaN and the one left of it


@selection
def test_selection_gradient(backend):
    h, source = random_image(2, 1, 4, 5, dtype=torch.float64), random_image(2, 1, 4, 5, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(
        lambda source: select_informative(h, 7, bandwidth=1.0, source=source)[0], source.clone().requires_grad_()
    )
    h.requires_grad_()
    assert not select_informative(h, 7, bandwidth=1.0, source=source)[0].requires_grad  # the ranking carries none
    values, indices = select_informative(h, 7, bandwidth=1.0)
    values.sum().backward()
    assert torch.equal(h.grad.flatten(1), torch.zeros(2, 20, dtype=torch.float64).scatter(1, indices, 1.0))


# scatter_codeword -----------------------------------------------------------------------------------------------------


@scattering
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_fills_and_inserts(backend, dtype):
    values = torch.tensor([[1.5, -2.0], [math.nan, 4.0]], dtype=dtype)
    indices = torch.tensor([[5, 0], [1, 2]])
    out = scatter_codeword(values, indices, torch.tensor([0.25, -0.5], dtype=dtype), (1, 2, 3))
    wanted = torch.full((2, 6), 0.25, dtype=dtype)
    wanted[1] = -0.5
    wanted[0, 5], wanted[0, 0], wanted[1, 1], wanted[1, 2] = 1.5, -2.0, math.nan, 4.0
    torch.testing.assert_close(out, wanted.reshape(2, 1, 2, 3), rtol=0, atol=0, equal_nan=True)
    assert out.is_contiguous()


@pytest.mark.op("select_informative", "scatter_codeword")
def test_scatter_inverts_a_full_selection(backend):
    h = random_image(3, 2, 5, 7)
    values, indices = select_informative(h, 70, bandwidth=0.5)
    assert torch.equal(scatter_codeword(values, indices, torch.zeros(3), (2, 5, 7)), h)


@scattering
def test_scatter_of_a_repeated_position_keeps_the_last(backend):
    values = torch.arange(1.0, 7.0, dtype=torch.float64)[None]
    out = scatter_codeword(values, torch.tensor([[3, 1, 3, 1, 3, 0]]), torch.zeros(1, dtype=torch.float64), (4,))
    assert out.tolist() == [[6.0, 4.0, 0.0, 5.0]]


@scattering
def test_scatter_gradient(backend):
    values = random_image(2, 5, dtype=torch.float64).requires_grad_()
    mean = random_image(2, dtype=torch.float64, seed=1).requires_grad_()
    indices = torch.tensor([[4, 0, 7, 1, 11], [3, 9, 3, 3, 2]])  # with a repeated position in the second row
    assert torch.autograd.gradcheck(lambda v, c: scatter_codeword(v, indices, c, (3, 4)), (values, mean))
    assert torch.autograd.gradgradcheck(lambda v, c: scatter_codeword(v, indices, c, (3, 4)), (values, mean))


@scattering
def test_scatter_edges(backend):
    empty = torch.zeros(2, 0, dtype=torch.int64)
    out = scatter_codeword(torch.zeros(2, 0), empty, torch.tensor([1.0, 2.0]), (2, 2))
    assert out.tolist() == [[[1.0, 1.0], [1.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    assert scatter_codeword(torch.zeros(0, 3), torch.zeros(0, 3).long(), torch.zeros(0), (2, 3)).shape == (0, 2, 3)
    assert scatter_codeword(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.zeros(1), (1,)).tolist() == [[1.0]]
    assert scatter_codeword(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.zeros(1), ()).tolist() == [1.0]


# All three ------------------------------------------------------------------------------------------------------------

FAMILY = {
    "self_information": lambda h: (self_information(h, bandwidth=0.7),),
    "select_informative": lambda h: select_informative(h, 11, bandwidth=0.7),
    "scatter_codeword": lambda h: (
        scatter_codeword(
            h.flatten(1), torch.arange(h.shape[1:].numel()).flip(0).expand(len(h), -1), h[:, 0, 0, 0], h.shape[1:]
        ),
    ),
}
every_op = pytest.mark.parametrize("call", [pytest.param(FAMILY[op], id=op) for op in FAMILY])
whole_family = pytest.mark.op(*FAMILY)


@whole_family
@every_op
def test_empty_batch(backend, call):
    for result in call(torch.empty(0, 2, 4, 5)):
        assert result.shape[0] == 0


@whole_family
@every_op
def test_any_strides(backend, call):
    wide = random_image(2, 12, 10, 4)
    for view in (wide.permute(0, 3, 2, 1), wide[:, ::3, 1:8:2], wide[:1].expand(3, -1, -1, -1), wide.transpose(0, 1)):
        assert same(call(view), call(view.contiguous()))


@whole_family
@every_op
def test_outputs_own_their_memory(backend, call):
    h = random_image(2, 2, 4, 5)
    before = h.clone()
    memory = [h.untyped_storage().data_ptr(), *(result.untyped_storage().data_ptr() for result in call(h))]
    assert len(set(memory)) == len(memory)
    assert torch.equal(h, before)


@whole_family
@every_op
def test_threads_do_not_matter(backend, call, threads):
    h = random_image(16, 2, 32, 32)
    threads(1)
    alone = call(h)
    for count in (2, 3):
        threads(count)
        assert same(alone, call(h))


@whole_family
def test_opcheck(backend, opcheck):
    h, offsets = random_image(2, 2, 6, 5), [-1, 0, 0, 0, 2, 1]
    opcheck("self_information", (h, 0.5, offsets))
    opcheck("self_information", (h.half(), 0.5, offsets))
    opcheck("select_informative", (h, 7, 0.5, offsets))
    opcheck("select_informative", (h, 7, 0.5, offsets, h.double().requires_grad_()))
    opcheck("select_informative", (h.clone().requires_grad_(), 7, 0.5, offsets))
    values, mean = random_image(2, 4).requires_grad_(), random_image(2).requires_grad_()
    opcheck("scatter_codeword", (values, torch.tensor([[0, 3, 5, 1], [2, 2, 0, 4]]), mean, [2, 3]))


class Codec(torch.nn.Module):
    """Encoder and first decoder step, as a model would call them."""

    def forward(self, h):
        values, indices = select_informative(h, 9, bandwidth=0.7, source=h * 2)
        rebuilt = scatter_codeword(values, indices, h.mean(dim=(1, 2, 3)), h.shape[1:])
        return rebuilt, self_information(rebuilt, bandwidth=0.7)


@whole_family
def test_compile_and_export(backend):
    h = random_image(3, 2, 6, 6)
    eager = Codec()(h)
    compiled = torch.compile(Codec(), fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(Codec(), (h,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert same(eager, compiled(h)) and same(eager, exported(h))
    assert same(Codec()(h[:2]), exported(h[:2]))


def test_compile_with_inductor():
    h = random_image(3, 2, 6, 6)
    torch.testing.assert_close(torch.compile(Codec(), fullgraph=True)(h), Codec()(h))


@whole_family
def test_numpy_in_numpy_out(backend):
    h = random_image(2, 2, 5, 6)
    values, indices = select_informative(h.numpy(), np.int64(4), bandwidth=np.float32(0.5), radius=np.int64(1))
    assert isinstance(values, np.ndarray) and isinstance(indices, np.ndarray)
    wanted = select_informative(h, 4, bandwidth=0.5, radius=1)
    assert same((torch.from_numpy(values), torch.from_numpy(indices)), wanted)
    rebuilt = scatter_codeword(values, indices, h.numpy().mean(axis=(1, 2, 3)), h.shape[1:])
    assert isinstance(rebuilt, np.ndarray) and rebuilt.shape == h.shape
    bits = self_information(h.numpy(), bandwidth=0.5)
    assert torch.equal(torch.from_numpy(bits), self_information(torch.from_dlpack(h.numpy()), bandwidth=0.5))


H = torch.zeros(2, 2, 4, 4)
VALUES, INDICES, MEAN = torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"h: expected shape \[B, C, H, W\]", lambda: self_information(H[0], bandwidth=1.0)),
        (TypeError, "h: expected float16, .* got torch.complex64", lambda: self_information(H + 0j, bandwidth=1.0)),
        (TypeError, "h: expected a tensor or an array", lambda: self_information(3, bandwidth=1.0)),
        (ValueError, "bandwidth: .* got 0.0", lambda: self_information(H, bandwidth=0)),
        (ValueError, "bandwidth: .* got nan", lambda: self_information(H, bandwidth=math.nan)),
        (ValueError, "bandwidth: .* got inf", lambda: select_informative(H, 1, bandwidth=math.inf)),
        (ValueError, "radius: expected at least 1, got 0", lambda: self_information(H, bandwidth=1.0, radius=0)),
        (TypeError, "radius: expected an integer, got 1.5", lambda: self_information(H, bandwidth=1.0, radius=1.5)),
        (ValueError, "offsets: expected at least one", lambda: self_information(H, bandwidth=1.0, offsets=[])),
        (ValueError, "offsets: expected pairs", lambda: self_information(H, bandwidth=1.0, offsets=[(1, 2, 3)])),
        (TypeError, "offsets: .* integers", lambda: self_information(H, bandwidth=1.0, offsets=[(1, 0.5)])),
        (ValueError, r"m: expected 1\.\.C\*H\*W = 1\.\.32, got 33", lambda: select_informative(H, 33, bandwidth=1.0)),
        (ValueError, "m: .* got 0", lambda: select_informative(H, 0, bandwidth=1.0)),
        (TypeError, "m: expected an integer", lambda: select_informative(H, "2", bandwidth=1.0)),
        (
            ValueError,
            "source: expected the shape of h",
            lambda: select_informative(H, 2, bandwidth=1.0, source=H.flatten(1)),
        ),
        (
            ValueError,
            "source: expected a tensor on cpu, got one on meta",
            lambda: select_informative(H, 2, bandwidth=1.0, source=H.to("meta")),
        ),
        (ValueError, r"values: expected shape \[B, m\]", lambda: scatter_codeword(MEAN, INDICES, MEAN, (4,))),
        (TypeError, "indices: expected int64", lambda: scatter_codeword(VALUES, INDICES.int(), MEAN, (4,))),
        (ValueError, "indices: expected the shape", lambda: scatter_codeword(VALUES, INDICES[:, :2], MEAN, (4,))),
        (TypeError, "mean: expected the dtype", lambda: scatter_codeword(VALUES, INDICES, MEAN.double(), (4,))),
        (ValueError, r"mean: expected shape \[B\]", lambda: scatter_codeword(VALUES, INDICES, MEAN[:1], (4,))),
        (ValueError, "shape: expected sizes", lambda: scatter_codeword(VALUES, INDICES, MEAN, (-1, 4))),
        (ValueError, r"indices: expected 0\.\.3.* got 4", lambda: scatter_codeword(VALUES, INDICES + 4, MEAN, (2, 2))),
        (ValueError, "indices: .* got -1", lambda: scatter_codeword(VALUES, INDICES - 1, MEAN, (2, 2))),
        (ValueError, "indices: ", lambda: scatter_codeword(VALUES, INDICES, MEAN, (2, 0))),
        (
            ValueError,
            "mean: expected a tensor on cpu",
            lambda: scatter_codeword(VALUES, INDICES, MEAN.to("meta"), (4,)),
        ),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_every_op_of_the_family_has_the_reference():
    for op in (*FAMILY, "top_m"):
        assert csikernels.backends()[op]["cpu"][-1] == "reference"
