"""Scores of detection and precoding against closed forms and the functions they are built on."""

import math

import pytest
import torch

from csimodels.evaluation.detection import qam_modulate
from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.multitask_scores import detection_scores, precoding_rate
from csimodels.evaluation.precoding import wmmse, wmmse_parameters


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_detection_scores_by_hand():
    # Amplitudes 1 and 3 over sqrt(10): indices 0 and 0b0011 have |x|^2 = 0.2 and 1.8.
    symbols = torch.tensor([[[0, 3]]])
    x = qam_modulate(symbols, 16)
    assert x.abs().square().flatten().tolist() == pytest.approx([0.2, 1.8])
    scores = detection_scores(x + torch.tensor([0.1, 0.3j]), symbols, 16)
    assert scores["nmse"] == pytest.approx((0.01 + 0.09) / 2.0) and scores["ser"] == 0
    assert detection_scores(x, symbols, 16) == {"nmse": 0.0, "ser": 0.0}
    assert detection_scores(torch.zeros_like(x), symbols, 16)["nmse"] == pytest.approx(1.0)
    assert detection_scores(x * torch.tensor([-1, 1]), symbols, 16)["ser"] == 0.5
    assert all(type(score) is float for score in scores.values())


def test_detection_scores_take_strided_estimates_that_require_gradients():
    symbols = torch.randint(16, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    estimate = (qam_modulate(symbols, 16) + 0.2 * random_complex(3, 5, 4)).requires_grad_()
    expected = detection_scores(estimate, symbols, 16)
    assert 0 < expected["ser"] < 1
    strided = estimate.mT.contiguous().mT
    assert detection_scores(strided, symbols, 16) == pytest.approx(expected)


def test_detection_score_errors():
    symbols, estimate = torch.zeros(2, 3, 4, dtype=torch.int64), random_complex(2, 3, 4)
    with pytest.raises(ValueError, match=r"symbols: expected the shape of estimate, \(2, 3, 4\), got \(2, 3, 3\)"):
        detection_scores(estimate, symbols[..., :3], 16)
    with pytest.raises(TypeError, match="symbols: expected dtype .*, got float32"):
        detection_scores(estimate, symbols.float(), 16)
    with pytest.raises(TypeError, match="estimate: expected dtype complex64, complex128, got float32"):
        detection_scores(estimate.real, symbols, 16)
    with pytest.raises(ValueError, match="order: expected one of 4, 16, 64, 256, got 8"):
        detection_scores(estimate, symbols, 8)
    with pytest.raises(ValueError, match="symbols: expected at least one, got none"):
        detection_scores(estimate[:0], symbols[:0], 16)


def test_precoding_rate_of_one_user_is_the_capacity():
    h = random_complex(5, 8, 1)
    power = torch.full((5, 1), 2.0)
    expected = sum(math.log2(1 + 2 * float(gain) / 0.1) for gain in h.abs().square().sum((1, 2))) / 5
    rate = precoding_rate(h, power, power, 0.1)
    assert rate.dtype == torch.float64 and rate.item() == pytest.approx(expected, rel=1e-5)


def test_precoding_rate_of_wmmse_parameters_is_that_of_wmmse():
    h = random_complex(6, 8, 4, dtype=torch.complex128)
    noise = torch.linspace(0.05, 1, 6)
    rate = precoding_rate(h, *wmmse_parameters(h, 1.0, noise), noise)
    assert rate.item() == pytest.approx(sum_rate(h, wmmse(h, 1.0, noise), noise).mean().item())


def test_precoding_rate_differentiates():
    h = random_complex(3, 5, 2, dtype=torch.complex128)
    lambdas, p = torch.rand(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.autograd.gradcheck(
        lambda *parameters: precoding_rate(h, *parameters, 0.3), (lambdas.requires_grad_(), p.requires_grad_())
    )
    with pytest.raises(ValueError, match="h: expected at least one sample to average over, got none"):
        precoding_rate(h[:0], lambdas[:0], p[:0], 0.3)
    with pytest.raises(ValueError, match=r"p: expected shape \(3, 2\)"):
        precoding_rate(h, lambdas, p[:2], 0.3)
