"""The vector helpers that the C++ kernels share, on every CPU capability, against float64.

Arguments: every float32 exponent with 256 mantissas and both signs, zeros, infinities and NaN. The bounds are those
that csrc/cpu/vec_common.h states.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from csikernels import _load

pytestmark = pytest.mark.skipif(_load.extension is None, reason=f"no extension: {_load.missing_reason}")

# helper -> its bound in ulp, with a fused multiply-add and without
BOUNDS = {"exp2": (1.0, 1.25), "exp": (1.0, 1.25), "log2": (1.5, 2.0), "erf": (1.5, 2.0), "sqrt": (0.5, 0.5)}


@pytest.fixture(params=_load.extension.cpu_capabilities() if _load.extension is not None else [])
def capability(request):
    before = _load.extension.cpu_capability()
    _load.extension.set_cpu_capability(request.param)
    yield request.param
    _load.extension.set_cpu_capability(before)


def every_exponent() -> Tensor:
    mantissas = np.random.default_rng(0).integers(0, 1 << 23, 256, dtype=np.uint32)
    mantissas[:3] = 0, 1, (1 << 23) - 1
    positive = ((np.arange(256, dtype=np.uint32)[:, None] << 23) | mantissas).ravel()
    return torch.from_numpy(np.concatenate([positive, positive | 0x80000000]).view(np.float32))


def helper(name: str, x: Tensor) -> Tensor:
    return torch.ops.csikernels_probe.vector_helper(name, x)


def ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """Distance in units of the last place that float32 has at ``exact`` [float64]; denormals have one unit."""
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126)))
    return (actual.double() - exact).abs() / torch.exp2(exponent - 23)


@pytest.mark.parametrize("name", BOUNDS)
def test_error_in_ulp_over_all_exponents(name, capability):
    x = every_exponent()
    actual, exact = helper(name, x), getattr(torch, name)(x.double())
    finite = torch.isfinite(exact.float())
    assert finite.sum() > x.numel() // 4
    assert ulps(actual[finite], exact[finite]).max() <= BOUNDS[name][capability == "scalar"]
    # Overflow, poles and arguments outside the domain: infinity or NaN, as float32 arithmetic has it.
    torch.testing.assert_close(actual[~finite], exact.float()[~finite], rtol=0, atol=0, equal_nan=True)


def test_exp2_of_nonpositive(capability):
    x = every_exponent()
    x = x[torch.signbit(x)]
    actual, exact = helper("exp2_of_nonpositive", x), torch.exp2(x.double())
    number = ~torch.isnan(x)
    assert ulps(actual[number], exact[number]).max() <= 1.5
    assert torch.isnan(actual[~number]).all()
    # Where equal elements are looked for, no argument near 0 may look different, and none above 1.
    assert (actual[x > -(2.0**-25)] == 1).all() and actual[number].max() == 1
    assert torch.equal(helper("exp2_of_nonpositive", -torch.arange(200.0)), torch.exp2(-torch.arange(200.0)))


def test_special_values(capability):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1.0, 2.0**-149])
    expected = {
        "exp2": [1, 1, inf, 0, nan, 2, 1],
        "exp": [1, 1, inf, 0, nan, np.float32(np.e), 1],
        "log2": [-inf, -inf, inf, nan, nan, 0, -149],
        "erf": [0, -0.0, 1, -1, nan, 0.84270079, 2.0**-149],
    }
    for name, values in expected.items():
        torch.testing.assert_close(helper(name, x), torch.tensor(values), rtol=2e-7, atol=0, equal_nan=True)
    assert torch.signbit(helper("erf", x))[1]


def test_round_takes_halves_to_even(capability):
    x = torch.cat([torch.arange(-40, 41) / 4, torch.tensor([4194303.5, -4194303.5, 0.49999997])])
    assert torch.equal(helper("round", x), torch.round(x))


def test_bfloat16_rounds_as_torch_does(capability):
    x = every_exponent()
    expected = x.bfloat16().float()
    nan = torch.isnan(x)
    assert torch.equal(helper("bfloat16", x)[~nan], expected[~nan])
    assert torch.isnan(helper("bfloat16", x)[nan]).all()


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 130])
def test_parts_of_a_vector(n, capability):
    """Loads and stores of the first lanes: the last, incomplete vector is right as well."""
    x = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 1
    assert torch.equal(helper("sqrt", x), x.double().sqrt().float())


def test_horizontal_operations(capability):
    lanes = {"scalar": 4, "avx2": 8}.get(capability, 16)
    x = torch.randn(8 * lanes, generator=torch.Generator().manual_seed(0))
    groups = x.view(8, lanes)
    torch.testing.assert_close(helper("reduce_add", x).view(8, lanes), groups.sum(1, keepdim=True).expand(8, lanes))
    assert torch.equal(helper("reduce_max", x).view(8, lanes), groups.amax(1, keepdim=True).expand(8, lanes))
    with_nan = groups.clone()
    with_nan[:, ::2] = float("nan")
    expected = groups[:, 1::2].amax(1, keepdim=True).expand(8, lanes)
    assert torch.equal(helper("reduce_max", with_nan.view(-1)).view(8, lanes), expected)


def test_unknown_helper_is_named(capability):
    with pytest.raises(ValueError, match="name: no vector helper is called 'cosh'"):
        helper("cosh", torch.zeros(4))


def test_peaks_follow_the_capability(capability):
    assert torch.ops.csikernels_probe.peak("float32") > 1e9
    kinds = {"int8": ("avx512_vnni", "avx512_bf16"), "bfloat16": ("avx512_bf16",)}
    for kind, levels in kinds.items():
        if capability in levels:
            assert torch.ops.csikernels_probe.peak(kind) > 1e9
        else:
            with pytest.raises(ValueError, match=f"kind: '{kind}' has no peak at the capability {capability}"):
                torch.ops.csikernels_probe.peak(kind)
