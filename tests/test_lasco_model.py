"""LASCO (Cui et al.), eqs. 15 to 20, against sums written out in float64, and what the proxy trains and what not."""

from __future__ import annotations

import math

import pytest
import torch

from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig
from csimodels.models.lasco import (
    ADAPTED_METHODS,
    LABELS,
    METHODS,
    Proxy,
    ProxyConfig,
    collaborate,
    shift,
    squared_error,
)

SAM = TransformerConfig(tokens=3, features=4, layers=1, width=8, heads=2, feedforward=16)


@pytest.fixture
def outputs() -> dict[str, torch.Tensor]:
    """Truth and the three models' outputs, float64 ``[2, 3, 4]``."""
    generator = torch.Generator().manual_seed(1)
    names = ("truth", "base", "proxy", "reference", "h_in")
    return {name: torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for name in names}


@pytest.fixture
def reference() -> ChannelTransformer:
    torch.manual_seed(3)
    return ChannelTransformer(SAM).double().eval()


def entries(outputs: dict[str, torch.Tensor], *names: str):
    """The named outputs' entries as Python floats, in step."""
    return zip(*(outputs[name].flatten().tolist() for name in names), strict=True)


def mean_square(values) -> float:
    values = list(values)
    return math.fsum(value * value for value in values) / len(values)


def test_eq_15_adds_the_environment_specific_variation_to_the_base(outputs):
    expected = [b + (p - r) for b, p, r in entries(outputs, "base", "proxy", "reference")]
    got = shift(outputs["base"], outputs["proxy"], outputs["reference"], 1.0)
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_eq_16_is_the_squared_error_of_eq_15(outputs):
    expected = mean_square(t - (b + p - r) for t, b, p, r in entries(outputs, "truth", "base", "proxy", "reference"))
    estimate = shift(outputs["base"], outputs["proxy"], outputs["reference"], 1.0)
    assert squared_error(outputs["truth"], estimate).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0, -0.3])
def test_eq_17_scales_the_shift(outputs, alpha):
    expected = mean_square(
        t - (b + alpha * (p - r)) for t, b, p, r in entries(outputs, "truth", "base", "proxy", "reference")
    )
    estimate = shift(outputs["base"], outputs["proxy"], outputs["reference"], alpha)
    assert squared_error(outputs["truth"], estimate).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0, -0.3])
def test_eqs_18_and_19_scale_what_the_large_model_knows_beyond_the_reference(outputs, alpha):
    expected = [p + alpha * (b - r) for b, p, r in entries(outputs, "base", "proxy", "reference")]
    got = collaborate(outputs["base"], outputs["proxy"], outputs["reference"], alpha)
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-13)
    error = mean_square(t - e for (t,), e in zip(entries(outputs, "truth"), expected, strict=True))
    assert squared_error(outputs["truth"], got).item() == pytest.approx(error, rel=1e-13)


def test_shift_and_collaborate_agree_at_one_and_differ_elsewhere(outputs):
    parts = outputs["base"], outputs["proxy"], outputs["reference"]
    torch.testing.assert_close(shift(*parts, 1.0), collaborate(*parts, 1.0), rtol=1e-13, atol=1e-13)
    assert (shift(*parts, 0.5) - collaborate(*parts, 0.5)).abs().max() > 0.1


def test_alpha_zero_is_the_plain_base_or_the_plain_fine_tuned_proxy(outputs):
    parts = outputs["base"], outputs["proxy"], outputs["reference"]
    assert torch.equal(shift(*parts, 0.0), outputs["base"])
    assert torch.equal(collaborate(*parts, 0.0), outputs["proxy"])


def test_eq_20_differentiates_by_alpha_and_by_the_proxy(outputs):
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    proxy = outputs["proxy"].clone().requires_grad_(True)
    squared_error(outputs["truth"], collaborate(outputs["base"], proxy, outputs["reference"], alpha)).backward()
    errors, by_alpha = [], []
    for t, b, p, r in entries(outputs, "truth", "base", "proxy", "reference"):
        errors.append(2 * (p + 0.4 * (b - r) - t) / 24)
        by_alpha.append(errors[-1] * (b - r))
    assert proxy.grad.flatten().tolist() == pytest.approx(errors, rel=1e-12)
    assert alpha.grad.item() == pytest.approx(math.fsum(by_alpha), rel=1e-12)


def test_the_error_is_not_rounded_to_the_precision_of_the_estimate():
    target = torch.tensor([1.001], dtype=torch.float32)
    estimate = torch.tensor([1.0], dtype=torch.bfloat16)
    assert squared_error(target, estimate).item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("form", ["collaborate", "shift"])
@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_each_method_combines_as_its_row_in_the_table_says(outputs, reference, method, form):
    proxy = Proxy(ProxyConfig(method, 0.3, form), reference).double()
    base, ref = outputs["base"], outputs["reference"]
    sam = proxy.sam(outputs["h_in"])
    lasco = sam + 0.3 * (base - ref) if form == "collaborate" else base + 0.3 * (sam - ref)
    expected = {"finetuned_sam": sam, "baseline_a": base + sam, "lasco_no_reference": base + sam}.get(method, lasco)
    got = proxy(outputs["h_in"], base, ref)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # alpha is 0.3 in float32


@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_gradients_reach_the_proxy_and_in_e_lasco_alpha_and_nothing_else(outputs, reference, method):
    proxy = Proxy(ProxyConfig(method), reference).double()
    proxy(outputs["h_in"], outputs["base"], outputs["reference"]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in proxy.sam.parameters())
    assert proxy.sam.output.weight.grad.abs().max() > 0
    assert (proxy.alpha.grad is not None) == (method == "e_lasco")
    assert proxy.alpha.requires_grad == (method == "e_lasco")
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert not outputs["base"].requires_grad
    assert not outputs["reference"].requires_grad


@pytest.mark.parametrize("method", [name for name in ADAPTED_METHODS if name != "baseline_a"])
def test_the_proxy_starts_as_the_reference_and_trains_apart_from_it(reference, method):
    reference.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    proxy = Proxy(ProxyConfig(method), reference)
    assert all(torch.equal(tensor, before[name]) for name, tensor in proxy.sam.state_dict().items())
    assert all(parameter.requires_grad for parameter in proxy.sam.parameters())
    with torch.no_grad():
        for parameter in proxy.sam.parameters():
            parameter += 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_baseline_a_starts_at_random_by_its_seed_alone(reference):
    def weights(seed: int) -> torch.Tensor:
        return Proxy(ProxyConfig("baseline_a"), reference, seed=seed).sam.input.weight

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = weights(5)
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers go on as before
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)
    assert not torch.equal(first.double(), reference.input.weight)


def test_e_lasco_starts_at_the_configured_alpha(reference):
    assert Proxy(ProxyConfig("e_lasco", 0.25), reference).alpha.item() == 0.25
    assert Proxy(ProxyConfig("e_lasco"), reference).alpha.item() == 1.0


def test_every_method_has_a_label():
    assert set(LABELS) == set(METHODS)
    assert set(ADAPTED_METHODS) < set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrained_lam",), "method: expected one of finetuned_sam, baseline_a.*got 'pretrained_lam'"),
        (("lasco", 1.0, "sum"), "form: expected 'collaborate' or 'shift', got 'sum'"),
        (("lasco", float("nan")), "alpha: expected a finite number, got nan"),
        (("e_lasco", float("inf")), "alpha: expected a finite number, got inf"),
    ],
)
def test_bad_configurations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProxyConfig(*arguments)
