"""lasco_forward over drawn sizes, batches and strides: no size is special to a kernel, none reads or writes beyond."""

from __future__ import annotations

import random

import pytest
import torch
from lasco_modules import ODD, PAPER, bank_of, inputs, oracle, relative, sams

import csikernels
from csikernels import SamBank, lasco_forward

pytestmark = pytest.mark.op("lasco_forward")


def drawn(seed: int) -> tuple[dict, dict]:
    """Sizes in 1..130, small ones as likely as large ones, and a style."""
    rng = random.Random(seed)

    def size(limit: int = 130) -> int:
        return rng.randint(1, rng.choice([4, 20, limit]))

    heads = rng.randint(1, 5)
    sizes = {
        "tokens": size(), "features": size(), "layers": rng.randint(1, 2), "heads": heads,
        "width": heads * size(130 // heads), "feedforward": size(),
    }  # fmt: skip
    style = {
        "norm_first": rng.random() < 0.5,
        "final_norm": rng.random() < 0.5,
        "activation": rng.choice(["relu", "gelu"]),
    }
    return sizes, style


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values amid NaN, at an address that is no multiple of a vector."""
    whole = torch.full((tensor.numel() + 64,), float("nan"))
    whole[17 : 17 + tensor.numel()] = tensor.flatten()
    return whole[17 : 17 + tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("seed", range(24))
def test_any_size(backend, seed):
    sizes, style = drawn(seed)
    bank, reference, proxies = bank_of(3, sizes, **style)
    h_in, base_output, slot = inputs([1, 0, 1], sizes)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    actual = lasco_forward(fenced(h_in), fenced(base_output), bank, slot)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(24))
def test_any_size_in_bfloat16_rounds_as_the_reference(backend, seed):
    sizes, style = drawn(seed)
    modules = sams(3, sizes, **style)
    alpha = torch.linspace(-0.3, 1.7, 3)
    h_in, base_output, slot = inputs([1, 0, 1], sizes)
    bank = SamBank.from_modules(*modules, alpha, precision="bfloat16")
    actual = lasco_forward(fenced(h_in), fenced(base_output), bank, slot)
    with csikernels.use_backend("reference"):
        reference = lasco_forward(h_in, base_output, bank, slot)
    expected = oracle(h_in, base_output, slot, *modules, alpha)
    # Sums in another order tip single roundings, so the two differ, but by less than either from the truth.
    assert relative(actual, expected) < 1.5 * relative(reference, expected) + 1e-6
    assert relative(actual, reference) < 1.5 * relative(reference, expected) + 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=["paper", "odd"])
def test_a_kernel_gives_a_sample_the_same_bits_in_every_batch(backend, threads, sizes, precision):
    if backend == "reference":
        pytest.skip("the reference's products depend on how many samples share a slot")
    modules = sams(4, sizes)
    bank = SamBank.from_modules(*modules, 0.7, precision=precision)
    h_in, base_output, slot = inputs([3, 1, 1, 0, 2, 1, 3, 0, 0, 1, 2] * 2, sizes)
    threads(1)
    together = lasco_forward(h_in, base_output, bank, slot)
    for count in (2, 3):
        threads(count)
        assert torch.equal(lasco_forward(h_in, base_output, bank, slot), together)
        for rows in (slice(4, 5), slice(2, 5), slice(5, 18)):
            assert torch.equal(lasco_forward(h_in[rows], base_output[rows], bank, slot[rows]), together[rows])


@pytest.mark.parametrize("samples", [1, 40])
def test_the_shift_is_kept_when_asked_for(backend, samples):
    bank, reference, _ = bank_of(3, ODD)
    h_in, base_output, slot = inputs([i % 3 for i in range(samples)], ODD)
    rest = (bank.alpha, bank.proxies.tensors(), bank.reference.tensors(), [], *bank.architecture.hyper())
    output, shift = torch.ops.csikernels.lasco_forward(h_in, base_output, slot, *rest, True)
    with torch.no_grad():
        torch.testing.assert_close(shift, base_output - reference(h_in), rtol=1e-5, atol=1e-5)
    again, nothing = torch.ops.csikernels.lasco_forward(h_in, base_output, slot, *rest, False)
    assert torch.equal(again, output) and nothing.shape == (0,)


def test_a_kernel_refuses_weights_that_do_not_fit(backend):
    if backend == "reference":
        pytest.skip("its own products refuse them")
    bank, _, _ = bank_of(3, ODD)
    h_in, base_output, slot = inputs([0, 1], ODD)
    proxies, reference = bank.proxies.tensors(), bank.reference.tensors()

    def call(h_in=h_in, alpha=bank.alpha, proxies=proxies, reference=reference, heads=2):
        hyper = (heads, "relu", False, 1e-5)
        return torch.ops.csikernels.lasco_forward(h_in, base_output, slot, alpha, proxies, reference, [], *hyper, False)

    def replaced(weights: list, index: int, weight: torch.Tensor) -> list:
        return [*weights[:index], weight, *weights[index + 1 :]]

    for kind, message, arguments in [
        (ValueError, "proxies: expected at least 17 weights, got 3", {"proxies": proxies[:3]}),
        (ValueError, "reference: expected 41 weights, got 40", {"reference": reference[:-1]}),
        (ValueError, r"proxies\[1\]: expected shape \[3, 6\], got \[3, 5\]",
         {"proxies": replaced(proxies, 1, torch.zeros(3, 5))}),
        (ValueError, r"proxies\[2\]: expected shape \[3, 5, 6\]", {"proxies": replaced(proxies, 2, proxies[2].mT)}),
        (TypeError, r"reference\[5\]: expected Float, got Double",
         {"reference": replaced(reference, 5, reference[5].double())}),
        (ValueError, "heads: expected a divisor of the width 6, got 4", {"heads": 4}),
        (ValueError, "base_output: expected the shape of h_in", {"h_in": h_in[:1]}),
        (TypeError, "alpha: expected float32, got Double", {"alpha": bank.alpha.double()}),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            call(**arguments)


def test_strided_weights_are_read_as_they_are_meant(backend):
    bank, _, _ = bank_of(3, ODD)
    args = inputs([2, 0, 1], ODD)
    expected = lasco_forward(args[0], args[1], bank, args[2])
    for name, weight in list(bank.proxies.named_buffers()):
        spread = torch.stack([weight, torch.full_like(weight, float("nan"))], -1)[..., 0]
        setattr(bank.proxies, name, spread)
    # The reference's library sums in another order where strides differ; a wrong element would be NaN or far off.
    torch.testing.assert_close(lasco_forward(args[0], args[1], bank, args[2]), expected, rtol=1e-5, atol=1e-5)
