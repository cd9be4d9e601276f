"""Conventional codebooks: statistics of RVQ, and beams against the formulas of their sources, word by word."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.models.codebooks import (
    PortLayout,
    dft_codebook,
    dft_oversampling,
    rvq_codebook,
    type1_codebook,
)


def norms(words: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(words.to(torch.complex128), dim=-1)


def turn(numerator: float, denominator: float) -> complex:
    return cmath.exp(2j * math.pi * numerator / denominator)


# RVQ ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10), st.integers(1, 40), st.integers(0, 2**31))
def test_rvq_words_have_unit_norm_and_follow_from_the_seed(bits, dimension, seed):
    words = rvq_codebook(bits, dimension, seed=seed)
    assert words.shape == (2**bits, dimension) and words.dtype == torch.complex64
    torch.testing.assert_close(norms(words), torch.ones(2**bits, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(rvq_codebook(bits, dimension, seed=seed), words)
    assert not torch.equal(rvq_codebook(bits, dimension, seed=seed + 1), words)


def test_rvq_is_isotropic():
    words = rvq_codebook(15, 8, seed=1).to(torch.complex128)
    covariance = words.T @ words.conj() / len(words)
    assert (covariance - torch.eye(8) / 8).abs().max() < 4 / 8 / math.sqrt(len(words))
    # |<c, e>|^2 of an isotropic word is Beta(1, D - 1): its survival function is (1 - x)^(D - 1).
    squared = words[:, 3].abs().square()
    for x in (0.05, 0.1, 0.3):
        expected = (1 - x) ** 7
        deviation = math.sqrt(expected * (1 - expected) / len(words))
        assert abs((squared > x).double().mean() - expected) < 4 * deviation


def test_rvq_does_not_draw_blocks_twice():
    words = rvq_codebook(15, 2, seed=0)  # two blocks
    assert len(torch.view_as_real(words).flatten(1).unique(dim=0)) == len(words)
    before = torch.random.get_rng_state()
    rvq_codebook(3, 2, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# Beams ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "oversampling", "cophases"),
    [
        (PortLayout(2, 2, 4), (2, 1), 4),
        (PortLayout(1, 4, 2), (1, 4), 4),
        (PortLayout(2, 1, 2), (1, 2), 1),
        (PortLayout(2, 2, 1), (4, 1), 8),
    ],
)
def test_dft_words_are_those_of_the_formula(ports, oversampling, cophases):
    words = dft_codebook(ports, oversampling, cophases)
    phases = cophases if ports.polarisations == 2 else 1
    rows, columns = ports.rows * oversampling[0], ports.columns * oversampling[1]
    assert words.shape == (rows * columns * phases, len(ports))
    for index in range(len(words)):
        l, m, n = index // (columns * phases), index // phases % columns, index % phases  # noqa: E741
        for port in range(len(ports)):
            p, r, c = port // (ports.rows * ports.columns), port // ports.columns % ports.rows, port % ports.columns
            expected = turn(l * r, rows) * turn(m * c, columns) * turn(n * p, phases) / math.sqrt(len(ports))
            assert abs(words[index, port].item() - expected) < 1e-6


def test_critically_sampled_dft_words_are_an_orthonormal_basis():
    words = dft_codebook(PortLayout(2, 4, 8), (1, 1), 2).to(torch.complex128)
    torch.testing.assert_close(words @ words.mH, torch.eye(64, dtype=torch.complex128), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "expected"), [(8, (1, 1)), (9, (1, 2)), (12, (4, 4)), (20, (64, 64))])
def test_oversampling_of_a_number_of_bits(bits, expected):
    ports = PortLayout()
    assert dft_oversampling(bits, ports) == expected
    if bits < 13:
        assert len(dft_codebook(ports, expected)) == 2**bits


def test_a_dimension_of_one_port_is_not_oversampled():
    assert dft_oversampling(7, PortLayout(2, 1, 8)) == (1, 4)
    assert dft_oversampling(7, PortLayout(2, 8, 1)) == (4, 1)


def test_bits_that_no_oversampling_reaches_are_refused():
    with pytest.raises(ValueError, match="bits: expected at least 8 and .* for 2 x 8 x 8 .* got 7"):
        dft_oversampling(7, PortLayout())
    with pytest.raises(ValueError, match="a power of two of words for 2 x 3 x 8"):
        dft_oversampling(12, PortLayout(2, 3, 8))
    with pytest.raises(ValueError, match="expected a power of two .* got 1536 from 24 x 16 beams and 4 co-phases"):
        dft_codebook(PortLayout(2, 6, 4))
    with pytest.raises(ValueError, match="oversampling, cophases: expected at least 1 each"):
        dft_codebook(PortLayout(), (0, 1))


# Type I ---------------------------------------------------------------------------------------------------------------


def type1_word(n1: int, n2: int, o1: int, o2: int, l: int, m: int, n: int) -> list[complex]:  # noqa: E741
    """W_{l,m,n} in the standard's own port order: u_m inside, the first dimension outside."""
    u = [turn(m * i, o2 * n2) for i in range(n2)]
    v = [turn(l * i, o1 * n1) * element for i in range(n1) for element in u]
    phase = (1, 1j, -1, -1j)[n]
    return [element / math.sqrt(2 * n1 * n2) for element in [*v, *(phase * element for element in v)]]


def standard_order(word: torch.Tensor, n1: int, n2: int) -> torch.Tensor:
    """From rows (n2) outside, columns (n1) inside."""
    return word.view(2, n2, n1).mT.flatten()


@pytest.mark.parametrize(("n1", "n2", "o1", "o2"), [(2, 1, 4, 1), (2, 2, 4, 4), (4, 2, 4, 4), (1, 1, 1, 1)])
def test_type1_words_are_the_standards_in_its_order(n1, n2, o1, o2):
    words = type1_codebook(n1, n2, o1, o2)
    indices = [(i11, i12, i2) for i11 in range(n1 * o1) for i12 in range(n2 * o2) for i2 in range(4)]
    assert len(words) == len(indices)
    for word, index in zip(words, indices, strict=True):
        expected = torch.tensor(type1_word(n1, n2, o1, o2, *index), dtype=torch.complex64)
        torch.testing.assert_close(standard_order(word, n1, n2), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n1", "n2", "o1", "o2"), [(2, 1, 4, 1), (2, 2, 4, 4), (4, 2, 4, 4)])
def test_type1_mode_2_refines_the_beam_with_i2(n1, n2, o1, o2):
    words = type1_codebook(n1, n2, o1, o2, codebook_mode=2)
    offsets = [(0, 0), (1, 0), (0, 1), (1, 1)] if n2 > 1 else [(0, 0), (1, 0), (2, 0), (3, 0)]
    expected = [
        type1_word(n1, n2, o1, o2, 2 * i11 + offsets[i2 // 4][0], 2 * i12 + offsets[i2 // 4][1], i2 % 4)
        for i11 in range(n1 * o1 // 2)
        for i12 in range(max(1, n2 * o2 // 2))
        for i2 in range(16)
    ]
    assert len(words) == len(expected)
    for word, values in zip(words, expected, strict=True):
        torch.testing.assert_close(
            standard_order(word, n1, n2), torch.tensor(values, dtype=torch.complex64), atol=1e-6, rtol=0
        )


def test_type1_of_the_papers_array_is_the_dft_book_with_its_dimensions_swapped():
    words = type1_codebook()
    assert words.shape == (2**12, 128)
    torch.testing.assert_close(norms(words), torch.ones(2**12, dtype=torch.float64), atol=1e-6, rtol=0)
    dft = dft_codebook(PortLayout(), (4, 4), 4).view(32, 32, 4, 128)
    assert torch.equal(words.view(32, 32, 4, 128), dft.transpose(0, 1))
    # Both modes hold the same words.
    other = type1_codebook(codebook_mode=2).view(16, 16, 2, 2, 4, 128)
    assert torch.equal(words.view(16, 2, 16, 2, 4, 128), other.permute(0, 3, 1, 2, 4, 5))


def test_cophases_are_exact():
    words = type1_codebook(2, 1, 4, 1).view(8, 4, 4)
    for n, phase in enumerate((1, 1j, -1, -1j)):
        assert torch.equal(words[:, n, 2:], words[:, n, :2] * phase)


def test_type1_arguments_out_of_range():
    with pytest.raises(ValueError, match="n2: expected at least 1, got 0"):
        type1_codebook(4, 0)
    with pytest.raises(ValueError, match="codebook_mode: expected 1 or 2, got 3"):
        type1_codebook(codebook_mode=3)
    with pytest.raises(ValueError, match="codebook_mode: expected 1 for an odd number of beams, 5 x 1, got 2"):
        type1_codebook(5, 1, 1, 1, codebook_mode=2)
    with pytest.raises(ValueError, match="expected a power of two .* got 768 from 24 x 8 beams in mode 1"):
        type1_codebook(6, 2)


def test_layout_and_bits_out_of_range():
    with pytest.raises(ValueError, match="polarisations: expected 1 or 2, got 3"):
        PortLayout(3)
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        PortLayout(2, 8, 0)
    for bits in (0, 21, True, 1.0):
        with pytest.raises(ValueError, match="bits: expected 1 to 20, got"):
            rvq_codebook(bits, seed=0)
    with pytest.raises(ValueError, match="dimension: expected at least 1, got 0"):
        rvq_codebook(3, 0, seed=0)
    assert len(PortLayout()) == 128
