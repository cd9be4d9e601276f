"""The sum rate of codebook feedback, against eqs. 3-5 written out."""

from __future__ import annotations

import math

import pytest
import torch

from csikernels import codebook_argmax
from csimodels.evaluation.codebook_rate import codebook_sum_rate
from csimodels.models.codebooks import rvq_codebook


def channels(count: int, dimension: int = 16, seed: int = 0) -> torch.Tensor:
    h = torch.randn(count, dimension, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    return h / torch.linalg.vector_norm(h, dim=1, keepdim=True)


def rate(h: torch.Tensor, h_hat: torch.Tensor, power: float) -> float:
    """Eqs. 3-5 for one group [K, D], noise power 1."""
    h, rows = h.to(torch.complex128), h_hat.to(torch.complex128).conj()  # rows h_hat^H
    v = rows.mH @ torch.linalg.inv(rows @ rows.mH)
    v = v * math.sqrt(power) / torch.linalg.matrix_norm(v)
    total = 0.0
    for k in range(len(h)):
        gains = [(h[k].conj() @ v[:, j]).abs().item() ** 2 for j in range(len(h))]
        total += math.log2(1 + gains[k] / (sum(gains) - gains[k] + 1))
    return total


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 20.0])
@pytest.mark.parametrize("users", [1, 2, 4])
def test_it_is_that_of_the_equations(snr_db, users):
    h = channels(4 * users + (users > 1))  # and one left over
    h_hat = h + 0.3 * channels(len(h), seed=1)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(3))[: 4 * users].view(4, users)
    expected = sum(rate(h[group], h_hat[group], 10 ** (snr_db / 10)) for group in order) / 4
    assert codebook_sum_rate(h, h_hat, snr_db, users, seed=3).item() == pytest.approx(expected, rel=1e-6)


def test_one_rate_for_each_snr_on_the_same_groups():
    h, h_hat = channels(40), channels(40, seed=1)
    curve = codebook_sum_rate(h, h_hat, [0, 10, 20])
    assert curve.shape == (3,) and curve.dtype == torch.float64
    for snr_db, value in zip((0, 10, 20), curve, strict=True):
        assert torch.equal(codebook_sum_rate(h, h_hat, snr_db), value)
    assert not torch.equal(codebook_sum_rate(h, h_hat, 10, seed=1), curve[1])


def test_perfect_feedback_does_not_saturate_and_more_bits_are_better():
    h = channels(200, 8)
    snr_db = [0, 10, 20, 30, 40]
    perfect = codebook_sum_rate(h, h, snr_db)
    gain = (perfect[1:] - perfect[:-1])[-1].item()
    assert gain == pytest.approx(4 * math.log2(10), rel=0.02)  # no interference is left
    curves = []
    for bits in (2, 6, 10):
        words = rvq_codebook(bits, 8, seed=7)
        curves.append(codebook_sum_rate(h, words[codebook_argmax(h, words)[0]], snr_db))
    assert (curves[0] < curves[1]).all() and (curves[1] < curves[2]).all() and (curves[2] < perfect).all()
    assert curves[2][-1] - curves[2][-2] < 0.2  # interference limited


def test_directions_alone_are_fed_back():
    h, h_hat = channels(12), channels(12, seed=1)
    phases = torch.exp(1j * torch.arange(12))[:, None]
    torch.testing.assert_close(codebook_sum_rate(h, h_hat * phases, 10), codebook_sum_rate(h, h_hat, 10))


def test_users_of_one_codeword_share_a_beam():
    h = channels(4)
    rates = codebook_sum_rate(h, h[:1].expand(4, -1), [0, 40])
    assert rates.isfinite().all() and rates[1] < 4 * math.log2(1 + 1 / 0.1)


def test_bad_input():
    h = channels(6, 5)
    with pytest.raises(ValueError, match=r"users: expected 1 to N and to D of h \[N, D\], got 6 for shape \(6, 5\)"):
        codebook_sum_rate(h, h, 10, users=6)
    with pytest.raises(ValueError, match="users: expected 1 to N .* got 4 for shape"):
        codebook_sum_rate(h[:3], h[:3], 10)
    with pytest.raises(ValueError, match="users: expected 1 to N .* got 0"):
        codebook_sum_rate(h, h, 10, users=0)
    with pytest.raises(ValueError, match="h_hat: expected the shape of h"):
        codebook_sum_rate(h, h[:5], 10)
    with pytest.raises(TypeError, match="h_hat: expected dtype"):
        codebook_sum_rate(h, h.real, 10)
    broken = h.clone()
    broken[0] = 0
    with pytest.raises(ValueError, match="user.s. of zero channel"):
        codebook_sum_rate(h, broken, 10, users=3)
