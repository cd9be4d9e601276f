"""SSLCF and MSLCF between UE and BS: which codebook is searched, which is read, and what it costs to tell."""

from __future__ import annotations

import pytest
import torch

from csimodels.models.codebook_feedback import CodebookFeedback, Signalling


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def best(h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (h.to(torch.complex128) @ codebook.to(torch.complex128).mH).abs().argmax(1)


def test_single_side_searches_the_conventional_codebook_and_reads_the_enhanced_one():
    conventional, enhanced, h = words(16, 8), words(16, 8, seed=1), words(50, 8, seed=2)
    feedback = CodebookFeedback.single_side(conventional, enhanced)
    index, similarity = feedback.report_index(h)
    assert torch.equal(index, best(h, conventional))
    assert not torch.equal(index, best(h, enhanced))
    assert torch.allclose(similarity, (h.conj() * conventional[index]).sum(1).abs(), atol=1e-6)
    assert torch.equal(feedback.reconstruct(index), enhanced[index])
    assert feedback.signalling == Signalling(report_bits=4)  # nothing goes to the UE


def test_dual_side_ships_the_codebook():
    enhanced, h = words(32, 8), words(20, 8, seed=1)
    feedback = CodebookFeedback.dual_side(enhanced)
    index, _ = feedback.report_index(h)
    assert torch.equal(index, best(h, enhanced))
    assert torch.equal(feedback.reconstruct(index), enhanced[index])
    assert feedback.signalling == Signalling(report_bits=5, codebook_bytes=32 * 8 * 8)


@pytest.mark.parametrize(("types", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_multi_scenario_sends_the_index_of_the_type(types, bits):
    codebooks = words(types, 4, 6)
    feedback = CodebookFeedback.multi_scenario(codebooks)
    assert feedback.signalling == Signalling(2, environment_bits=bits, stored_bytes=types * 4 * 6 * 8)


def test_multi_scenario_uses_the_codebook_of_the_site():
    codebooks, h = words(3, 8, 6), words(30, 6, seed=1)
    feedback = CodebookFeedback.multi_scenario(codebooks)
    environment = torch.arange(30) % 3
    index, _ = feedback.report_index(h, environment)
    for kind in range(3):
        rows = environment == kind
        assert torch.equal(index[rows], best(h[rows], codebooks[kind]))
        assert torch.equal(feedback.report_index(h, kind)[0][rows], index[rows])
    assert torch.equal(feedback.reconstruct(index, environment), codebooks[environment, index])


def test_empty_and_single_reports():
    feedback = CodebookFeedback.dual_side(words(2, 4))
    index, _ = feedback.report_index(words(0, 4))
    assert feedback.reconstruct(index).shape == (0, 4)
    index, _ = feedback.report_index(words(1, 4))
    assert feedback.reconstruct(index).shape == (1, 4)


def test_a_channel_without_direction_is_reported_as_none_and_not_reconstructed():
    feedback = CodebookFeedback.dual_side(words(4, 4))
    index, _ = feedback.report_index(torch.zeros(1, 4, dtype=torch.complex64))
    assert index.tolist() == [-1]
    with pytest.raises(ValueError, match="index: expected values in 0..3, got -1 at 0"):
        feedback.reconstruct(index)


def test_what_does_not_fit_is_refused():
    one, many = CodebookFeedback.dual_side(words(4, 4)), CodebookFeedback.multi_scenario(words(3, 4, 4))
    h = words(2, 4)
    with pytest.raises(ValueError, match="environment: expected none, there is one codebook, got 1"):
        one.report_index(h, 1)
    for ends in (many.report_index, lambda h, e=None: many.reconstruct(torch.zeros(len(h), dtype=torch.int64), e)):
        with pytest.raises(ValueError, match="environment: expected the site's type, 0..2, got None"):
            ends(h)
        for wrong in (3, -1, torch.tensor([0, 3])):
            with pytest.raises(ValueError, match="environment: expected values in 0..2, got (3|-1)"):
                ends(h, wrong)
        with pytest.raises(ValueError, match=r"environment: expected int64 \[2\]"):
            ends(h, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"h: expected \[N, 4\]"):
        one.report_index(words(2, 5))
    with pytest.raises(ValueError, match="index: expected values in 0..3, got 4 at 1"):
        one.reconstruct(torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="index: expected int64"):
        one.reconstruct(torch.tensor([0.0]))
    for count in (0, 1, 3, 6):
        with pytest.raises(ValueError, match="codebook: expected 2\\^B codewords with B in 1..20"):
            CodebookFeedback.dual_side(torch.ones(count, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="B in 1..20"):
        CodebookFeedback.dual_side(torch.ones(1, 1, dtype=torch.complex64).expand(2**21, 1))
    with pytest.raises(ValueError, match=r"bs: expected a complex codebook \(4, 4\)"):
        CodebookFeedback.single_side(words(4, 4), words(8, 4))
    with pytest.raises(ValueError, match=r"enhanced: expected \[K, D\]"):
        CodebookFeedback.dual_side(words(3, 4, 4))
    with pytest.raises(ValueError, match=r"codebooks: expected a non-empty \[E, K, D\]"):
        CodebookFeedback.multi_scenario(words(4, 4))
