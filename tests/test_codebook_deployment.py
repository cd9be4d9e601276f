"""SSLCF and MSLCF between UE and BS: which codebook is searched, which is read, and what it costs to tell."""

from __future__ import annotations

import pytest
import torch

from csimodels.models.codebook_deployment import CodebookDeployment, Signalling
from csimodels.models.codebook_file import FeedbackCodebook
from csimodels.models.codebooks import PortLayout

PORTS = PortLayout(2, 2, 2)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def book(*shape: int, seed: int = 0, **fields) -> FeedbackCodebook:
    names = tuple(f"type {i}" for i in range(shape[0])) if len(shape) == 2 else ()
    return FeedbackCodebook(vectors(*shape, 8, seed=seed), "test", PORTS, environments=names, **fields)


def best(h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (h.to(torch.complex128) @ codebook.to(torch.complex128).mH).abs().argmax(1)


def test_single_side_searches_the_conventional_codebook_and_reads_the_enhanced_one():
    conventional, h = book(16), vectors(50, 8, seed=2)
    enhanced = book(16, seed=1, deployment="SS", ue_digest=conventional.digest())
    deployment = CodebookDeployment.single_side(conventional, enhanced)
    index, similarity = deployment.report_index(h)
    assert torch.equal(index, best(h, conventional.words))
    assert not torch.equal(index, best(h, enhanced.words))
    assert torch.allclose(similarity, (h.conj() * conventional.words[index]).sum(1).abs(), atol=1e-6)
    assert torch.equal(deployment.reconstruct(index), enhanced.words[index])
    assert deployment.signalling == Signalling(report_bits=4)  # nothing goes to the UE
    with pytest.raises(ValueError, match="enhanced: expected a codebook for the UE's"):
        CodebookDeployment.single_side(book(16, seed=5), enhanced)
    with pytest.raises(ValueError, match="enhanced: expected a codebook for the UE's"):
        CodebookDeployment.single_side(conventional, book(16))


def test_dual_side_ships_the_codebook_and_a_standard_does_not():
    enhanced, h = book(32), vectors(20, 8, seed=1)
    deployment = CodebookDeployment.dual_side(enhanced)
    index, _ = deployment.report_index(h)
    assert torch.equal(index, best(h, enhanced.words))
    assert torch.equal(deployment.reconstruct(index), enhanced.words[index])
    assert deployment.signalling == Signalling(report_bits=5, codebook_bytes=32 * 8 * 8)
    standard = CodebookDeployment.conventional(enhanced)
    assert torch.equal(standard.report_index(h)[0], index)
    assert standard.signalling == Signalling(report_bits=5)


@pytest.mark.parametrize(("types", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_multi_scenario_sends_the_index_of_the_type(types, bits):
    deployment = CodebookDeployment.multi_scenario(book(types, 4))
    assert deployment.signalling == Signalling(2, environment_bits=bits, stored_bytes=types * 4 * 8 * 8)


def test_multi_scenario_uses_the_codebook_of_the_site():
    books, h = book(3, 16), vectors(30, 8, seed=1)
    deployment = CodebookDeployment.multi_scenario(books)
    environment = torch.arange(30) % 3
    index, _ = deployment.report_index(h, environment)
    for kind in range(3):
        rows = environment == kind
        assert torch.equal(index[rows], best(h[rows], books.words[kind]))
        assert torch.equal(deployment.report_index(h, kind)[0][rows], index[rows])
    assert torch.equal(deployment.reconstruct(index, environment), books.words[environment, index])


def test_empty_and_single_reports():
    deployment = CodebookDeployment.dual_side(book(2))
    for count in (0, 1):
        index, _ = deployment.report_index(vectors(count, 8))
        assert deployment.reconstruct(index).shape == (count, 8)


def test_a_channel_without_direction_is_reported_as_none_and_not_reconstructed():
    deployment = CodebookDeployment.dual_side(book(4))
    index, _ = deployment.report_index(torch.zeros(1, 8, dtype=torch.complex64))
    assert index.tolist() == [-1]
    with pytest.raises(ValueError, match="index: expected values in 0..3, got -1 at 0"):
        deployment.reconstruct(index)


def test_what_does_not_fit_is_refused():
    one, many = CodebookDeployment.dual_side(book(4)), CodebookDeployment.multi_scenario(book(3, 4))
    h = vectors(2, 8)
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
    with pytest.raises(ValueError, match=r"h: expected \[N, 8\]"):
        one.report_index(vectors(2, 5))
    with pytest.raises(ValueError, match="index: expected values in 0..3, got 4 at 1"):
        one.reconstruct(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"index: expected \[N\], got shape \(1, 1\)"):
        one.reconstruct(torch.tensor([[0]]))
    with pytest.raises(TypeError, match="index: expected int64"):
        one.reconstruct(torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"bs: expected a codebook \(4, 8\)"):
        CodebookDeployment(book(4), book(8), Signalling(2))
    with pytest.raises(ValueError, match="ue: expected a codebook that the UE keeps, got one of deployment SS"):
        CodebookDeployment(book(4, deployment="SS", ue_digest="0" * 64), book(4), Signalling(2))
    with pytest.raises(ValueError, match=r"enhanced: expected a codebook \[K, D\]"):
        CodebookDeployment.dual_side(book(3, 4))
    with pytest.raises(ValueError, match=r"book: expected a codebook \[K, D\]"):
        CodebookDeployment.conventional(book(3, 4))
    with pytest.raises(ValueError, match=r"books: expected a codebook \[E, K, D\]"):
        CodebookDeployment.multi_scenario(book(4))
