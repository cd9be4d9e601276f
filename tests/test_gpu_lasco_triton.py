"""The small models in Triton: forward, and the backward that adapts many slots at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lasco_modules import ODD, ONE, PAPER, bank_of, composite, inputs, oracle, relative, sams
from test_lasco_training import assert_near, in_double, smooth

import csikernels
from csikernels import SamBank, lasco_forward

pytestmark = pytest.mark.gpu("triton")
STYLES = [
    {},
    {"activation": "gelu"},
    {"norm_first": True, "final_norm": True, "activation": "gelu"},
    {"final_norm": True},
]
RAGGED = [2, 0, 2, 2, 0, 4, 3]  # three samples of one slot, two of another, two alone, one unused
# For gradients, which Triton's interpreter takes its time for.
TINY = {**ODD, "layers": 1}
MIXED = [2, 0, 2, 3]
# Beside paddings to 16, tiles of 16 and 32, and powers of two: below, at, above.
SIZES = [
    {"tokens": 15, "features": 33, "layers": 1, "width": 32, "heads": 4, "feedforward": 128},
    {"tokens": 17, "features": 16, "layers": 2, "width": 20, "heads": 4, "feedforward": 65},
    {"tokens": 33, "features": 7, "layers": 1, "width": 33, "heads": 1, "feedforward": 17},
]


def id_of(value) -> str:
    return "-".join(map(str, value)) or "post_norm"


def moved(bank: SamBank, *tensors: torch.Tensor):
    return tuple(tensor.to(bank.device) for tensor in tensors)


@pytest.mark.parametrize("style", STYLES, ids=id_of)
@pytest.mark.parametrize("sizes", [PAPER, ODD, ONE], ids=["paper", "odd", "one"])
def test_forward_equals_the_modules(device, sizes, style):
    bank, reference, proxies = bank_of(5, sizes, **style)
    h_in, base_output, slot = inputs(RAGGED, sizes)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    actual = lasco_forward(*moved(bank.to(device), h_in, base_output), bank, slot)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes.values())))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_forward_of_sizes_beside_the_tiles(device, sizes, precision):
    modules = sams(3, sizes, norm_first=sizes["tokens"] > 16)
    bank = SamBank.from_modules(*modules, 0.7, precision=precision)
    h_in, base_output, slot = inputs([2, 0, 1, 2], sizes)
    with csikernels.use_backend("reference"):
        same = lasco_forward(h_in, base_output, bank, slot)
    expected = oracle(h_in, base_output, slot, *modules, bank.alpha)
    actual = lasco_forward(*moved(bank.to(device), h_in, base_output, slot)[:2], bank, slot).cpu()
    # Sums in another order tip single roundings to bfloat16, but by less than these are from the truth.
    assert relative(actual, expected) < 1.5 * relative(same, expected) + 1e-6
    assert relative(actual, same) < 1.5 * relative(same, expected) + 1e-6


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_errs_no_more_than_pytorch(device, norm_first):
    reference, proxies = sams(5, norm_first=norm_first)
    alpha = torch.linspace(0.2, 1.5, 5)
    h_in, base_output, slot = inputs(RAGGED)
    expected = oracle(h_in, base_output, slot, reference, proxies, alpha)
    low = [copy.deepcopy(module).bfloat16() for module in (reference, *proxies)]
    with torch.no_grad():
        peer = composite(h_in.bfloat16(), base_output.bfloat16(), slot, low[0], low[1:], alpha.bfloat16())
    bank = SamBank.from_modules(reference, proxies, alpha, precision="bfloat16").to(device)
    actual = lasco_forward(*moved(bank, h_in, base_output), bank, slot).cpu()
    assert 1e-4 < relative(actual, expected) < relative(peer, expected)


def test_a_sample_has_the_same_bits_in_every_batch(device):
    bank = bank_of(4, ODD)[0].to(device)
    h_in, base_output, slot = moved(bank, *inputs([3, 1, 1, 0, 2, 1], ODD))
    together = lasco_forward(h_in, base_output, bank, slot)
    for rows in (slice(4, 5), slice(1, 4)):
        assert torch.equal(lasco_forward(h_in[rows], base_output[rows], bank, slot[rows]), together[rows])
    spoiled = h_in.clone()
    spoiled[1, 2, 1] = math.inf
    actual = lasco_forward(spoiled, base_output, bank, slot)
    others = [0, 2, 3, 4, 5]
    assert actual[1].isnan().any() and torch.equal(actual[others], together[others])


def test_empty_and_strided(device):
    bank = bank_of(3, ODD)[0].to(device)
    empty = moved(bank, *inputs([], ODD))
    assert lasco_forward(*empty[:2], bank, empty[2]).shape == empty[0].shape
    h_in, base_output, slot = moved(bank, *inputs([1, 0, 2, 1], ODD))
    expected = lasco_forward(h_in, base_output, bank, slot)
    strided = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (h_in, base_output)]
    for name, weight in list(bank.proxies.named_buffers()):
        setattr(bank.proxies, name, torch.stack([weight, torch.full_like(weight, math.nan)], -1)[..., 0])
    spread = torch.stack([slot, slot], 1)[:, 0]
    assert not strided[0].is_contiguous() and not spread.is_contiguous()
    assert torch.equal(lasco_forward(*strided, bank, spread), expected)


def test_the_shift_is_kept_when_asked_for(device):
    bank, reference, _ = bank_of(3, ODD)
    h_in, base_output, slot = inputs([0, 2, 1], ODD)
    with torch.no_grad():
        expected = base_output - reference(h_in)
    bank.to(device)
    rest = (bank.alpha, bank.proxies.tensors(), bank.reference.tensors(), [], *bank.architecture.hyper())
    given = moved(bank, h_in, base_output, slot)
    output, shift = torch.ops.csikernels.lasco_forward(*given, *rest, True)
    torch.testing.assert_close(shift.cpu(), expected, rtol=1e-5, atol=1e-5)
    again, nothing = torch.ops.csikernels.lasco_forward(*given, *rest, False)
    assert torch.equal(again, output) and nothing.shape == (0,)


def test_errors_are_those_of_the_other_backends(device):
    bank = bank_of(3, ODD)[0].to(device)
    h_in, base_output, slot = moved(bank, *inputs([0, 1], ODD))
    proxies, reference = bank.proxies.tensors(), bank.reference.tensors()

    def call(h_in=h_in, slot=slot, alpha=bank.alpha, proxies=proxies, reference=reference, heads=2):
        hyper = (heads, "relu", False, 1e-5)
        return torch.ops.csikernels.lasco_forward(h_in, base_output, slot, alpha, proxies, reference, [], *hyper, False)

    def replaced(weights: list, index: int, weight: torch.Tensor) -> list:
        return [*weights[:index], weight, *weights[index + 1 :]]

    outside = slot.cpu() + 2
    for kind, message, arguments in [
        (ValueError, "proxies: expected at least 17 weights, got 3", {"proxies": proxies[:3]}),
        (ValueError, "reference: expected 41 weights, got 40", {"reference": reference[:-1]}),
        (ValueError, r"proxies\[1\]: expected shape \[3, 6\], got \[3, 5\]",
         {"proxies": replaced(proxies, 1, proxies[1][:, :5])}),
        (TypeError, r"reference\[5\]: expected Float, got Double",
         {"reference": replaced(reference, 5, reference[5].double())}),
        (ValueError, "heads: expected a divisor of the width 6, got 4", {"heads": 4}),
        (ValueError, "base_output: expected the shape of h_in", {"h_in": h_in[:1]}),
        (TypeError, "alpha: expected float32, got Double", {"alpha": bank.alpha.double()}),
        (ValueError, r"slot: expected 0..2 \(the bank has 3 slots\), got 3", {"slot": outside}),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            call(**arguments)


@pytest.mark.parametrize("sizes", [{**ODD, "tokens": 65}, {**ODD, "width": 130}], ids=["tokens", "width"])
def test_sizes_beyond_a_program_take_the_reference(device, sizes):
    bank, reference, proxies = bank_of(2, sizes)
    h_in, base_output, slot = inputs([1, 0], sizes)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    actual = lasco_forward(*moved(bank.to(device), h_in, base_output), bank, slot)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-5)


# Backward -------------------------------------------------------------------------------------------------------------


def trainable(sizes: dict, slots: int, device: torch.device, **style) -> SamBank:
    bank = SamBank.from_modules(*sams(slots, sizes, **style), torch.linspace(-0.3, 1.7, slots), trainable=True)
    return smooth(bank).to(device)


def results(bank: SamBank, sizes: dict, slot: list[int], *, known_reference: bool = False) -> dict[str, torch.Tensor]:
    """The output and every gradient by name, on the CPU."""
    h_in, base_output, index = moved(bank, *inputs(slot, sizes, bank.dtype))
    weight, reference_output, _ = moved(bank, *inputs(slot, sizes, bank.dtype, seed=5))
    h_in.requires_grad_()
    given = {"reference_output": reference_output} if known_reference else {}
    output = lasco_forward(h_in, base_output, bank, index, **given)
    wanted = {"h_in": h_in, "alpha": bank.alpha, **dict(bank.proxies.named_parameters())}
    gradients = torch.autograd.grad((output * weight).sum(), list(wanted.values()))
    return {name: value.cpu() for name, value in zip(["output", *wanted], [output.detach(), *gradients], strict=True)}


@pytest.mark.parametrize("style", STYLES, ids=id_of)
def test_gradients_equal_those_of_float64(device, style):
    known_reference = "activation" in style
    bank = trainable(TINY, 4, device, **style)
    actual = results(bank, TINY, MIXED, known_reference=known_reference)
    with csikernels.use_backend("reference"):
        expected = results(in_double(bank.cpu()), TINY, MIXED, known_reference=known_reference)
    assert_near(actual, expected)
    assert not any(actual[name][1].any() for name in actual if name not in ("output", "h_in")), "slot 1 has no sample"


@pytest.mark.parametrize("sizes", [PAPER, *SIZES], ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_gradients_of_other_sizes(device, sizes):
    bank = trainable(sizes, 3, device, norm_first=sizes["tokens"] == 17)
    slot = [2, 0, 2]
    actual = results(bank, sizes, slot)
    with csikernels.use_backend("reference"):
        assert_near(actual, results(in_double(bank.cpu()), sizes, slot))


def test_gradients_repeat_and_an_empty_batch_has_zeros(device):
    bank = trainable(TINY, 3, device)
    first, second = (results(bank, TINY, [2, 0, 2, 2, 0]) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(value.any() for value in results(bank, TINY, []).values())


def test_a_bad_sample_spoils_its_own_slot_alone(device):
    bank = trainable(TINY, 3, device)
    h_in, base_output, slot = moved(bank, *inputs([0, 2, 2, 1, 0], TINY))
    h_in[3, 4, 2] = math.nan
    lasco_forward(h_in, base_output, bank, slot).square().sum().backward()
    for name, weight in bank.proxies.named_parameters():
        assert weight.grad[1].isnan().any(), name
        assert not weight.grad[[0, 2]].isnan().any(), name
    assert bank.alpha.grad.isnan().tolist() == [False, True, False]


def test_only_the_gradients_asked_for(device):
    bank = trainable(TINY, 2, device)
    h_in, base_output, slot = moved(bank, *inputs([0, 1], TINY))
    whole = results(bank, TINY, [0, 1])
    weight = inputs([0, 1], TINY, seed=5)[0].to(device)
    for wanted in ("h_in", "alpha", "block0_qkv_weight"):
        bank.requires_grad_(False)
        leaves = {"h_in": h_in.detach().clone(), "alpha": bank.alpha, **dict(bank.proxies.named_parameters())}
        leaf = leaves[wanted].requires_grad_()
        (lasco_forward(leaves["h_in"], base_output, bank, slot) * weight).sum().backward()
        assert torch.equal(leaf.grad.cpu(), whole[wanted]), wanted


def test_a_bfloat16_bank_has_the_reference_s_gradient(device):
    modules = sams(2, TINY)
    bank = SamBank.from_modules(*modules, 0.8, precision="bfloat16")
    h_in, base_output, slot = inputs([1, 0, 1], TINY)

    def gradient(bank):
        leaf = h_in.to(bank.device).requires_grad_()
        output = lasco_forward(leaf, base_output.to(bank.device), bank, slot)
        return torch.autograd.grad(output.square().sum(), leaf)[0].cpu()

    with csikernels.use_backend("reference"):
        expected = gradient(bank)
    assert relative(gradient(bank.to(device)), expected) < 1e-2


def test_adapting_two_slots_lowers_their_losses(device):
    bank = trainable(TINY, 2, device)
    h_in, base_output, slot = moved(bank, *inputs([0, 1, 1, 0], TINY))
    target = inputs([0, 1, 1, 0], TINY, seed=9)[0].to(device)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = (lasco_forward(h_in, base_output, bank, slot) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
