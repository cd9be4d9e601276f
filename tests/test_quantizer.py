"""The Lloyd-Max quantiser against Max's table, against exhaustive search, and on input at the edge of sense."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from csimodels.files import load_tensors, save_tensors
from csimodels.models.quantizer import LloydMax

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.mark.parametrize(
    ("levels", "distortion", "positive"),
    # Max, "Quantizing for minimum distortion", 1960, table I: unit Gaussian.
    [(2, 0.3634, [0.7980]), (4, 0.1175, [0.4528, 1.510]), (8, 0.03454, [0.2451, 0.7560, 1.344, 2.152])],
)
def test_gaussian_levels_are_those_of_max(levels, distortion, positive):
    quantiles = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    samples = torch.special.ndtri(quantiles)
    quantizer = LloydMax(levels)
    assert quantizer.fit(samples, 200) == pytest.approx(distortion, rel=0.002)
    expected = torch.tensor([-x for x in reversed(positive)] + positive)
    torch.testing.assert_close(quantizer.levels, expected, rtol=0.005, atol=0.001)


def test_uniform_levels_are_equally_spaced():
    quantizer = LloydMax(5)
    quantizer.fit(torch.linspace(0, 1, 2001), 300)
    torch.testing.assert_close(quantizer.levels, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), rtol=0, atol=1e-3)
    torch.testing.assert_close(quantizer.thresholds, torch.tensor([0.2, 0.4, 0.6, 0.8]), rtol=0, atol=1e-3)


def test_levels_are_centroids_and_thresholds_are_midways():
    samples = torch.randn(2000, generator=torch.Generator().manual_seed(0)) ** 3
    quantizer = LloydMax(6)
    error = quantizer.fit(samples, 1000)
    codes = quantizer.encode(samples)
    centroids = torch.stack([samples[codes == code].mean() for code in range(6)])
    torch.testing.assert_close(quantizer.levels, centroids, rtol=1e-4, atol=1e-5)
    assert error == pytest.approx((quantizer.decode(codes) - samples).square().mean().item(), rel=1e-5)


def test_two_levels_of_few_samples_are_the_best_split():
    samples = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.3])
    quantizer = LloydMax(2)
    error = quantizer.fit(samples, 50)
    best = min(
        (samples[:cut] - samples[:cut].mean()).square().sum() + (samples[cut:] - samples[cut:].mean()).square().sum()
        for cut in range(1, 5)
    )
    assert error == pytest.approx(best.item() / 5, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 257, 1000])
def test_codes_are_the_nearest_levels(levels):
    samples = torch.randn(3000, generator=torch.Generator().manual_seed(levels))
    quantizer = LloydMax(levels)
    quantizer.fit(samples, 20)
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)) * 2
    codes = quantizer.encode(values)
    assert codes.dtype == (torch.uint8 if levels <= 256 else torch.int16)
    assert codes.shape == values.shape
    nearest = (values[..., None] - quantizer.levels).abs().amin(-1)
    torch.testing.assert_close((quantizer.decode(codes) - values).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_more_iterations_never_increase_the_error():
    samples = torch.randn(500, generator=torch.Generator().manual_seed(2)) ** 5
    errors = [LloydMax(8).fit(samples, iterations) for iterations in (1, 2, 4, 8, 16, 64)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_bits_of_a_code():
    assert [LloydMax(levels).bits for levels in (2, 3, 4, 5, 256, 257)] == [1, 2, 2, 3, 8, 9]


def test_more_levels_than_different_samples():
    quantizer = LloydMax(8)
    assert quantizer.fit(torch.tensor([1.0, 1.0, 2.0]), 10) == 0
    assert quantizer.fitted
    assert quantizer.decode(quantizer.encode(torch.tensor([1.0, 2.0]))).tolist() == [1.0, 2.0]


def test_infinite_values_get_the_outermost_levels():
    quantizer = LloydMax(4)
    quantizer.fit(torch.randn(100))
    assert quantizer.encode(torch.tensor([-math.inf, math.inf])).tolist() == [0, 3]


def test_stored_and_loaded_as_safetensors(tmp_path):
    quantizer, loaded = LloydMax(9), LloydMax(9)
    quantizer.fit(torch.randn(300))
    save_tensors(tmp_path / "q.safetensors", quantizer.state_dict(), {})
    loaded.load_state_dict(load_tensors(tmp_path / "q.safetensors")[0])
    assert torch.equal(loaded.levels, quantizer.levels)
    values = torch.randn(50)
    assert torch.equal(loaded.encode(values), quantizer.encode(values))


def test_empty_values():
    quantizer = LloydMax(4)
    quantizer.fit(torch.randn(10))
    codes = quantizer.encode(torch.empty(3, 0))
    assert codes.shape == quantizer.decode(codes).shape == (3, 0)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [-1, 0, 1, 32_769])
def test_levels_out_of_range(levels):
    with pytest.raises(ValueError, match=f"levels: expected 2 to 32768, got {levels}"):
        LloydMax(levels)


def test_quantiser_that_has_not_been_fitted():
    quantizer = LloydMax(4)
    assert not quantizer.fitted
    for use in (lambda: quantizer.encode(torch.ones(1)), lambda: quantizer.decode(torch.zeros(1, dtype=torch.uint8))):
        with pytest.raises(RuntimeError, match="LloydMax: expected fitted levels; call fit"):
            use()


@pytest.mark.parametrize(("samples", "found"), [([], "none"), ([1.0, math.nan], "NaN"), ([math.inf], "NaN or inf")])
def test_samples_that_cannot_be_fitted(samples, found):
    quantizer = LloydMax(4)
    with pytest.raises(ValueError, match=f"samples: expected at least one, all finite, got {found}"):
        quantizer.fit(torch.tensor(samples))
    assert not quantizer.fitted


def test_no_iterations():
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        LloydMax(4).fit(torch.ones(3), 0)


def test_nan_is_refused_with_its_place():
    quantizer = LloydMax(4)
    quantizer.fit(torch.randn(10))
    with pytest.raises(ValueError, match=r"values: expected numbers, got NaN at \[1, 0\]"):
        quantizer.encode(torch.tensor([[0.0, 1.0], [math.nan, 2.0]]))


def test_codes_of_no_level():
    quantizer = LloydMax(4)
    quantizer.fit(torch.randn(10))
    with pytest.raises(ValueError, match="codes: expected 0 to 3, got 0 to 4"):
        quantizer.decode(torch.tensor([0, 4]))
