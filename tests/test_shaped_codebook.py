"""Codebooks shaped by a covariance."""

from __future__ import annotations

import pytest
import torch

from csikernels import codebook_argmax
from csimodels.models.codebooks import rvq_codebook
from csimodels.training.shaped_codebook import shaped_codebook


def test_words_go_where_the_channels_are():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 3, dtype=torch.complex64, generator=generator))[0]
    h = torch.randn(400, 3, dtype=torch.complex64, generator=generator) @ basis.mT
    words = rvq_codebook(6, 16, seed=0)
    shaped = shaped_codebook(words, h)
    assert torch.allclose(torch.linalg.vector_norm(shaped, dim=1), torch.ones(64), atol=1e-6)
    outside = shaped - (shaped @ basis.conj()) @ basis.mT
    assert torch.linalg.vector_norm(outside, dim=1).max() < 1e-3
    before, after = (codebook_argmax(h, book)[1].mean() for book in (words, shaped))
    assert before < 0.6 < 0.85 < after


def test_isotropic_channels_leave_the_words():
    words = rvq_codebook(3, 4, seed=0)
    shaped = shaped_codebook(words, 5 * torch.eye(4, dtype=torch.complex64))
    assert torch.allclose(shaped, words, atol=1e-6)


def test_only_directions_count():
    words, h = rvq_codebook(3, 4, seed=0), rvq_codebook(5, 4, seed=1)
    scale = torch.linspace(0.1, 9, 32)[:, None]
    assert torch.allclose(shaped_codebook(words, h * scale), shaped_codebook(words, h), atol=1e-6)


def test_what_does_not_fit_is_refused():
    words, h = rvq_codebook(3, 4, seed=0), rvq_codebook(2, 4, seed=1)
    for bad in (h[:0], rvq_codebook(2, 5, seed=1), h[0]):
        with pytest.raises(ValueError, match=r"words, h: expected \[K, D\] and \[N, D\]"):
            shaped_codebook(words, bad)
    h[1] = 0
    with pytest.raises(ValueError, match="h: 1 channels are zero or not finite, the first is 1"):
        shaped_codebook(words, h)
    with pytest.raises(ValueError, match="words: 1 have no part where the channels are, the first is 2"):
        shaped_codebook(torch.eye(3, dtype=torch.complex64), torch.tensor([[1, 1, 0]], dtype=torch.complex64))
