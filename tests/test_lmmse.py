"""Linear MMSE reconstruction against the closed form with an explicit covariance, and against what it must recover."""

import math

import numpy as np
import pytest
import torch

from csimodels.evaluation.lmmse import LinearMmse


def environment(samples: int, dimension: int, rank: int, seed: int = 0, offset: float = 1.0) -> torch.Tensor:
    """Samples that vary in ``rank`` directions of unequal strength around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, dimension, dtype=torch.float64, generator=generator)
    strength = torch.linspace(1, 0.1, rank, dtype=torch.float64)
    mean = offset * torch.randn(dimension, dtype=torch.float64, generator=generator)
    return mean + torch.randn(samples, rank, dtype=torch.float64, generator=generator) * strength @ basis


def projection(m: int, dimension: int, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, dimension, dtype=torch.float64, generator=generator) / math.sqrt(m)


def closed_form(x, a, s, ridge: float = 0.0, noise: float = 0.0) -> np.ndarray:
    x, a, s = (value.double().numpy() for value in (x, a, s))
    covariance = np.cov(x, rowvar=False)
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    gain = covariance @ a.T @ np.linalg.pinv(a @ covariance @ a.T + noise * np.eye(len(a)), rcond=1e-12, hermitian=True)
    return x.mean(0) + (s - a @ x.mean(0)) @ gain.T


def test_by_hand():
    # Samples (0, 0), (2, 4), (1, 2): mean (1, 2), covariance [[1, 2], [2, 4]]. Seeing the first entry as 4, three above
    # its mean, puts the second at 2 + 2 * 3; with noise of variance 1 both deviations halve.
    x, a = torch.tensor([[0.0, 0.0], [2.0, 4.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    s = torch.tensor([[4.0]])
    torch.testing.assert_close(LinearMmse.fit(x, a).estimate(s), torch.tensor([[4.0, 8.0]]))
    torch.testing.assert_close(LinearMmse.fit(x, a, noise=1.0).estimate(s), torch.tensor([[2.5, 5.0]]))
    # Ridge 0.4 of the mean variance 2.5 adds 1 to the diagonal: gains (2, 2) / 2.
    torch.testing.assert_close(LinearMmse.fit(x, a, ridge=0.4).estimate(s), torch.tensor([[4.0, 5.0]]))


@pytest.mark.parametrize("samples", [5, 20, 200], ids=["fewer_than_codeword", "fewer_than_dimension", "more"])
@pytest.mark.parametrize(("ridge", "noise"), [(0.0, 0.0), (0.0, 0.3), (0.01, 0.0), (0.1, 0.2)])
def test_closed_form(samples, ridge, noise):
    x, a = environment(samples, 40, 40), projection(10, 40)
    s = environment(30, 40, 40, seed=3) @ a.T
    estimator = LinearMmse.fit(x, a, ridge=ridge, noise=noise)
    assert estimator.rank == (10 if ridge else min(10, samples - 1))
    np.testing.assert_allclose(estimator.estimate(s).numpy(), closed_form(x, a, s, ridge, noise), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_an_environment_of_few_dimensions(dtype):
    # Eight directions and a codeword of twelve: everything is determined, from 30 samples in 500 dimensions.
    h = environment(80, 500, 8).to(dtype)
    a = projection(12, 500).to(dtype)
    estimator = LinearMmse.fit(h[:30], a)
    estimate = estimator.estimate(h[30:] @ a.T)
    assert estimate.dtype == dtype
    error = (estimate - h[30:]).square().sum() / h[30:].square().sum()
    assert error < (1e-10 if dtype == torch.float32 else 1e-24)


def test_is_optimal_among_perturbed_gains():
    x, a = environment(300, 20, 20), projection(6, 20)
    noise = 0.5
    s = x @ a.T
    estimator = LinearMmse.fit(x, a, noise=noise)

    def expected_error(gain: torch.Tensor) -> float:
        residual = (x - estimator.mean) - (s - estimator.codeword_mean) @ gain.T
        return float(residual.square().sum() / (len(x) - 1) + noise * gain.square().sum())

    best = expected_error(estimator.gain)
    for seed in range(5):
        step = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert expected_error(estimator.gain + 1e-3 * step) > best
        assert expected_error(estimator.gain - 1e-3 * step) > best


def test_ridge_follows_the_codeword_where_no_sample_does():
    # Two samples along the first axis; the deviation seen along another one is lost without ridge.
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[1, 0] = 1
    a = torch.eye(6, dtype=torch.float64)[:3]
    s = torch.tensor([[0.5, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(LinearMmse.fit(x, a).estimate(s)[0], torch.tensor([0.5, 0, 0, 0, 0, 0]).double())
    torch.testing.assert_close(
        LinearMmse.fit(x, a, ridge=1e-6).estimate(s)[0], torch.tensor([0.5, 2, 0, 0, 0, 0]).double()
    )


def test_identical_samples_leave_the_mean():
    x, a = environment(1, 30, 3).repeat(7, 1), projection(5, 30)
    estimator = LinearMmse.fit(x, a)
    assert estimator.rank == 0
    s = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimator.estimate(s), x[:4])


def test_rows_are_independent_and_batches_may_be_empty():
    x, a = environment(20, 30, 30), projection(8, 30)
    estimator = LinearMmse.fit(x, a, noise=0.1)
    s = environment(5, 30, 30, seed=2) @ a.T
    whole = estimator.estimate(s)
    for row in range(5):
        torch.testing.assert_close(estimator.estimate(s[row : row + 1])[0], whole[row], rtol=1e-12, atol=1e-12)
    assert estimator.estimate(s[:0]).shape == (0, 30)
    torch.testing.assert_close(estimator.estimate(s.T.contiguous().T), whole, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_codeword():
    estimator = LinearMmse.fit(environment(20, 12, 12), projection(4, 12))
    s = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(estimator.estimate, (s,))


def test_errors():
    x, a = environment(20, 12, 12), projection(4, 12)
    with pytest.raises(ValueError, match="samples: expected at least 2 for a covariance, got 1"):
        LinearMmse.fit(x[:1], a)
    with pytest.raises(ValueError, match=r"projection: expected shape \[M, 12\] .*, got \(12, 4\)"):
        LinearMmse.fit(x, a.T)
    with pytest.raises(ValueError, match=r"samples: expected shape \[N, D\] without an empty axis, got \(20, 3, 4\)"):
        LinearMmse.fit(x.unflatten(1, (3, 4)), a)
    with pytest.raises(TypeError, match=r"samples: expected dtype .*, got complex128"):
        LinearMmse.fit(x.to(torch.complex128), a)
    with pytest.raises(ValueError, match="projection: expected the device of samples, cpu, got meta"):
        LinearMmse.fit(x, a.to("meta"))
    for name in ("ridge", "noise"):
        with pytest.raises(ValueError, match=f"{name}: expected a non-negative finite number, got -1"):
            LinearMmse.fit(x, a, **{name: -1})
        with pytest.raises(ValueError, match=f"{name}: expected a non-negative finite number, got nan"):
            LinearMmse.fit(x, a, **{name: math.nan})
        with pytest.raises(TypeError, match=f"{name}: expected a number, got str"):
            LinearMmse.fit(x, a, **{name: "1"})
    estimator = LinearMmse.fit(x, a)
    with pytest.raises(ValueError, match=r"s: expected shape \[B, 4\], got \(2, 5\)"):
        estimator.estimate(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"s: expected shape \[B, 4\], got \(4,\)"):
        estimator.estimate(torch.zeros(4))
    with pytest.raises(ValueError, match=r"s: 1 non-finite value\(s\), first at index \(1, 3\)"):
        estimator.estimate(torch.tensor([[0.0] * 4, [0, 0, 0, math.inf]]))
    x[3, 7] = math.nan
    with pytest.raises(ValueError, match=r"samples: 1 non-finite value\(s\), first at index \(3, 7\)"):
        LinearMmse.fit(x, a)
