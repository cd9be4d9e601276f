"""k-lines: planted lines are found, no step loses, cells are what their eigenvectors say, empty ones are refilled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csikernels import codebook_argmax
from csimodels.models.codebooks import rvq_codebook
from csimodels.training import k_lines as module
from csimodels.training.k_lines import k_lines, single_side_words, updated_words


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit(h: torch.Tensor) -> torch.Tensor:
    return h / torch.linalg.vector_norm(h, dim=-1, keepdim=True)


def quotient(h: torch.Tensor, word: torch.Tensor) -> float:
    """sum_n |c^H h_n|^2 in double precision."""
    return (h.to(torch.complex128) @ word.to(torch.complex128).conj()).abs().square().sum().item()


def test_planted_lines_are_found():
    lines = rvq_codebook(4, 12, seed=0)
    turned = gaussian(400, 1, seed=1) * lines.repeat(25, 1)  # any phase and norm
    h = turned + 0.02 * turned.abs().amax(1, keepdim=True) * gaussian(400, 12, seed=2)
    fitted = k_lines(h, 6, seed=0)  # more words than lines: with as many, two seeds on a line leave another to none
    _, similarity = codebook_argmax(lines, fitted.words)
    assert fitted.cosine > 0.99 and fitted.empty == 0
    assert (similarity > 0.99).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**31), st.booleans()
)
def test_no_iteration_loses(bits, dimension, more, directions, seed, duplicates):
    count = 2**bits + more
    h = gaussian(count, dimension, seed=seed)
    if duplicates:
        h = h[:directions][torch.arange(count) % min(directions, count)]
    fitted = k_lines(h, bits, seed=seed, tolerance=0)
    for before, after in zip(fitted.squared_cosine, fitted.squared_cosine[1:], strict=False):
        assert after >= before - 1e-6
    norms = torch.linalg.vector_norm(fitted.words, dim=1)
    torch.testing.assert_close(norms, torch.ones(2**bits), atol=1e-5, rtol=0)
    index, similarity = codebook_argmax(h, fitted.words)
    assert similarity.double().square().mean().item() == pytest.approx(fitted.squared_cosine[-1], abs=1e-6)
    assert similarity.double().mean().item() == pytest.approx(fitted.cosine, abs=1e-6)
    assert fitted.empty == 2**bits - len(index.unique())


@pytest.mark.parametrize("size", [1, 2, 3, 17, 40])
def test_words_become_the_dominant_eigenvectors_of_their_cells(size):
    cells, dimension = 12, 16
    h = unit(gaussian(cells * size, dimension, seed=3) + 2 * gaussian(cells, dimension, seed=4).repeat(size, 1))
    index = torch.arange(cells).repeat(size)
    words = unit(gaussian(cells, dimension, seed=5))
    similarity = (h * words[index].conj()).sum(1).abs()
    new = updated_words(h, words, index, similarity)
    for cell in range(cells):
        own = h[index == cell].to(torch.complex128)
        largest = torch.linalg.eigvalsh(own.T @ own.conj())[-1].item()
        assert quotient(own, new[cell]) == pytest.approx(largest, rel=1e-4)


def test_a_word_orthogonal_to_the_dominant_eigenvector_gets_there():
    h = torch.eye(4, dtype=torch.complex64)[[0, 1, 1, 1]]
    new = updated_words(h, h[:1], torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 0, 0, 0]))
    assert quotient(h, new[0]) == pytest.approx(3, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_no_cell_loses_in_an_update(count, words, seed):
    h, old = unit(gaussian(count, 6, seed=seed)), unit(gaussian(words, 6, seed=seed + 1))
    index, similarity = codebook_argmax(h, old)
    new = updated_words(h, old, index, similarity)
    for cell in index.unique().tolist():
        own = h[index == cell]
        assert quotient(own, new[cell]) >= quotient(own, old[cell]) * (1 - 1e-5)


def test_words_without_channels_move_to_those_served_worst():
    h = unit(gaussian(30, 8))
    words = h[:1].repeat(4, 1)  # ties go to the first: three cells are empty
    index, similarity = codebook_argmax(h, words)
    assert (index == 0).all()
    worst = similarity.argsort()[:3]
    new = updated_words(h, words, index, similarity)
    assert torch.equal(new[1:], h[worst])
    assert codebook_argmax(h, new)[1].square().mean() > similarity.square().mean()


def test_fewer_directions_than_words():
    lines = rvq_codebook(2, 8, seed=0)
    fitted = k_lines(lines.repeat(10, 1), 3, seed=0)
    assert fitted.cosine == pytest.approx(1, abs=1e-5)
    assert fitted.empty == 4


def test_single_side_words_are_the_best_for_the_ues_cells():
    h, ue = unit(gaussian(200, 8)), rvq_codebook(5, 8, seed=1)
    index, similarity = codebook_argmax(h, ue)
    bs = single_side_words(3 * h, ue)
    served = (h * bs[index].conj()).sum(1).abs()
    assert served.square().mean() > similarity.square().mean() + 0.02
    for cell in range(32):
        own = h[index == cell].to(torch.complex128)
        if len(own):
            largest = torch.linalg.eigvalsh(own.T @ own.conj())[-1].item()
            assert quotient(own, bs[cell]) == pytest.approx(largest, rel=1e-4)
        else:
            assert torch.equal(bs[cell], ue[cell])
    assert torch.equal(single_side_words(h[:0], ue), ue)


def test_it_is_a_function_of_the_seed_and_of_directions_alone(threads):
    h = gaussian(300, 8)
    threads(1)
    fitted = k_lines(h, 4, seed=7)
    threads(2)
    again = k_lines(h, 4, seed=7)
    assert torch.equal(fitted.words, again.words) and fitted.squared_cosine == again.squared_cosine
    assert not torch.equal(k_lines(h, 4, seed=8).words, fitted.words)
    powers = torch.tensor([2.0**-60, 2.0**60]).repeat(150)[:, None]
    assert torch.equal(k_lines(h * powers, 4, seed=7).words, fitted.words)


def test_fitted_words_serve_new_channels_better_than_random_ones():
    basis = gaussian(3, 16, seed=9)  # a site whose channels span three of sixteen dimensions
    h = gaussian(1200, 3, seed=1) @ basis
    fitted = k_lines(h[:1000], 5, seed=0)
    _, similarity = codebook_argmax(h[1000:], fitted.words)
    _, random = codebook_argmax(h[1000:], rvq_codebook(5, 16, seed=0))
    assert similarity.mean() > random.mean() + 0.2


def test_cells_are_averaged_in_parts(monkeypatch):
    h = gaussian(300, 8)
    whole = k_lines(h, 4, seed=7)
    monkeypatch.setattr(module, "_ROWS", 7)
    index = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(0))
    seen = []
    for cells, members in module._cells(index, 60):
        assert members.numel() <= max(7, members.shape[1])
        assert (index[members] == cells[:, None]).all()
        seen.append(members.flatten())
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(300))
    assert k_lines(h, 4, seed=7).squared_cosine == pytest.approx(whole.squared_cosine, rel=1e-4)


def test_it_stops_at_the_tolerance_and_reports():
    h, reported = gaussian(300, 8), []
    fitted = k_lines(h, 4, seed=0, tolerance=1e-2, on_iteration=lambda *progress: reported.append(progress))
    assert reported == list(enumerate(fitted.squared_cosine))[1:]
    gains = [b / a - 1 for a, b in zip(fitted.squared_cosine, fitted.squared_cosine[1:], strict=False)]
    assert gains[-1] <= 1e-2 and all(gain > 1e-2 for gain in gains[:-1])
    seeds = k_lines(h, 4, seed=0, iterations=0)
    assert len(seeds.squared_cosine) == 1 and codebook_argmax(seeds.words, unit(h))[1].min() > 0.999999
    assert len(k_lines(h, 4, seed=0, iterations=2, tolerance=0).squared_cosine) == 3


@pytest.mark.parametrize(
    ("h", "bits", "options", "error", "message"),
    [
        (gaussian(7, 4), 3, {}, ValueError, "h: expected at least 2^3 = 8 channels to start from, got 7"),
        (gaussian(8, 4).real, 3, {}, TypeError, "h: expected complex64, got torch.float32"),
        ([1.0], 3, {}, TypeError, "h: expected complex64, got list"),
        (gaussian(8, 4, 1), 3, {}, ValueError, "h: expected [N, D], got shape (8, 4, 1)"),
        (gaussian(8, 4), 0, {}, ValueError, "bits: expected 1 to 20, got 0"),
        (gaussian(8, 4), 3, {"iterations": -1}, ValueError, "iterations, tolerance: expected at least 0, got -1"),
        (gaussian(8, 4), 3, {"tolerance": float("nan")}, ValueError, "expected at least 0, got 100 and nan"),
    ],
)
def test_bad_input(h, bits, options, error, message):
    with pytest.raises(error) as raised:
        k_lines(h, bits, seed=0, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize("value", [0, float("nan"), float("inf")])
def test_channels_without_a_direction_are_named(value):
    h = gaussian(20, 4)
    h[[3, 9]] = value
    with pytest.raises(ValueError, match="h: 2 channels are zero or not finite, the first is 3"):
        k_lines(h, 2, seed=0)
