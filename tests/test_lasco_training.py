"""Training on a bank: the forward that keeps and its backward, on every backend and CPU capability."""

from __future__ import annotations

import pytest
import torch
from lasco_modules import ODD, ONE, PAPER, inputs, sams
from torch.nn import functional as F

import csikernels
from csikernels import SamBank, lasco_forward, lasco_squared_error

pytestmark = pytest.mark.op("lasco_training_forward", "lasco_backward", "lasco_squared_error")
STYLES = [
    {},
    {"activation": "gelu"},
    {"norm_first": True},
    {"norm_first": True, "final_norm": True, "activation": "gelu"},
    {"final_norm": True},
]
# Of vectors, tiles and paddings: one below, at and one above.
FUZZ = [
    {"tokens": 15, "features": 8, "layers": 1, "width": 8, "heads": 1, "feedforward": 17},
    {"tokens": 16, "features": 9, "layers": 2, "width": 12, "heads": 3, "feedforward": 16},
    {"tokens": 17, "features": 31, "layers": 1, "width": 20, "heads": 4, "feedforward": 65},
    {"tokens": 33, "features": 130, "layers": 1, "width": 33, "heads": 1, "feedforward": 64},
    {"tokens": 49, "features": 7, "layers": 2, "width": 48, "heads": 2, "feedforward": 130},
    {"tokens": 130, "features": 16, "layers": 1, "width": 15, "heads": 5, "feedforward": 15},
]
# More than one task of one slot, one sample of another, one slot unused, in mixed order.
MIXED = [2, 0, 2, 4, 0, 2, 3] * 6 + [2] * 20


def bank_of(sizes: dict = PAPER, slots: int = 5, *, double: bool = False, **style) -> SamBank:
    dtype = torch.float64 if double else torch.float32
    reference, proxies = sams(slots, sizes, dtype, **style)
    alpha = torch.linspace(-0.3, 1.7, slots)
    return SamBank.from_modules(reference, proxies, alpha, precision="float64" if double else "float32", trainable=True)


def smooth(bank: SamBank) -> SamBank:
    """Moves what relu sees away from 0: a rounding error there would turn a whole gradient on or off."""
    with torch.no_grad():
        for name, weight in bank.proxies.named_parameters():
            if name.endswith("up_bias"):
                weight.copy_(torch.where(torch.arange(weight.shape[-1]) % 2 == 0, 9.0, -9.0))
    return bank


def in_double(bank: SamBank) -> SamBank:
    modules = [bank.export(slot).double() for slot in range(bank.slots)]
    return SamBank.from_modules(
        bank._template[0].double(), modules, bank.alpha.tolist(), precision="float64", trainable=True
    )


def results(bank: SamBank, sizes: dict, slot: list[int], *, known_reference: bool = False) -> dict[str, torch.Tensor]:
    """The output and every gradient by name."""
    h_in, base_output, index = inputs(slot, sizes, bank.dtype)
    weight, reference_output, _ = inputs(slot, sizes, bank.dtype, seed=5)
    h_in.requires_grad_()
    given = {"reference_output": reference_output} if known_reference else {}
    output = lasco_forward(h_in, base_output, bank, index, **given)
    wanted = {"h_in": h_in, "alpha": bank.alpha, **dict(bank.proxies.named_parameters())}
    gradients = torch.autograd.grad((output * weight).sum(), list(wanted.values()))
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)
        assert (actual[name].double() - value.double()).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("known_reference", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style)) or "post_norm")
@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=["paper", "odd"])
def test_gradients_equal_those_of_float64(backend, sizes, style, known_reference):
    bank = smooth(bank_of(sizes, **style))
    slot = MIXED if sizes is ODD else [2, 0, 2, 4, 0, 2, 3]
    actual = results(bank, sizes, slot, known_reference=known_reference)
    with csikernels.use_backend("reference"):
        expected = results(in_double(bank), sizes, slot, known_reference=known_reference)
    assert_near(actual, expected)
    assert not any(actual[name][1].any() for name in actual if name not in ("output", "h_in")), "slot 1 has no sample"


@pytest.mark.parametrize("sizes", FUZZ, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_sizes_around_vectors_and_tiles(backend, sizes):
    bank = smooth(bank_of(sizes, 3, norm_first=sizes["tokens"] % 2 == 0))
    slot = [2, 0, 2, 2, 2, 2]
    with csikernels.use_backend("reference"):
        expected = results(in_double(bank), sizes, slot)
    assert_near(results(bank, sizes, slot), expected)


def test_one_token_of_one_feature_has_the_gradients_of_its_biases(backend):
    """A LayerNorm over one feature is constant: 0 times a large scale, not what is left of a cancellation."""
    bank = bank_of(ONE, 2)
    actual = results(bank, ONE, [0, 1, 1])
    for name in ("block0_qkv_weight", "block0_up_weight", "input_weight", "position"):
        if name != "block0_up_weight":
            assert not actual[name].any(), name
    weight = inputs([0, 1, 1], ONE, seed=5)[0]
    torch.testing.assert_close(actual["output_bias"][:, 0], torch.stack([weight[0].sum(), weight[1:].sum()]))


def test_gradients_do_not_depend_on_threads_and_repeat(backend, threads):
    bank = bank_of()
    runs = []
    for count in (1, 2, 3, 2):
        threads(count)
        runs.append(results(bank, PAPER, MIXED))
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name


def test_a_bad_sample_spoils_its_own_slot_alone(backend):
    bank, slot = bank_of(slots=3), [0, 2, 2, 1, 0]
    h_in, base_output, index = inputs(slot)
    h_in[3, 4, 5] = float("nan")
    output = lasco_forward(h_in, base_output, bank, index)
    output.square().sum().backward()
    assert output[3].isnan().any() and not output[[0, 1, 2, 4]].isnan().any()
    for name, weight in bank.proxies.named_parameters():
        assert weight.grad[1].isnan().any(), name
        assert not weight.grad[[0, 2]].isnan().any(), name
    assert bank.alpha.grad.isnan().tolist() == [False, True, False]


def test_strided_gradients_and_inputs(backend):
    bank = bank_of(ODD, 3)
    h_in, base_output, index = inputs([2, 0, 0, 1], ODD)
    weight = inputs([2, 0, 0, 1], ODD, seed=5)[0]
    expected = torch.autograd.grad((lasco_forward(h_in, base_output, bank, index) * weight).sum(), bank.parameters())
    turned = [value.transpose(0, 2).contiguous().transpose(0, 2) for value in (h_in, base_output, weight)]
    output = lasco_forward(turned[0], turned[1], bank, torch.stack([index, index], 1)[:, 0])
    actual = torch.autograd.grad(output, bank.parameters(), turned[2])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_what_was_kept_the_forward_is_computed_again(backend):
    bank = bank_of(ODD, 3)
    h_in, base_output, index = inputs([2, 0, 0, 1], ODD)
    ops, proxies, reference = torch.ops.csikernels, bank.proxies.tensors(), bank.reference.tensors()
    hyper = bank.architecture.hyper()
    with torch.no_grad():
        _, shift, kept = ops.lasco_training_forward(
            h_in, base_output, index, bank.alpha, proxies, reference, None, *hyper, True, True
        )
        arguments = (base_output, h_in, index, bank.alpha, proxies, reference, shift)
        with_kept = ops.lasco_backward(*arguments, kept, *hyper, True, True)
        without = ops.lasco_backward(*arguments, kept.new_empty(0), *hyper, True, True)
    for ours, theirs in zip((*with_kept[:2], *with_kept[2]), (*without[:2], *without[2]), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_kept_where_no_gradient_is_wanted(backend):
    bank = bank_of(ODD, 2)
    h_in, base_output, index = inputs([0, 1], ODD)
    with torch.no_grad():
        expected = lasco_forward(h_in, base_output, bank, index)
        reference = lasco_forward(
            h_in, h_in, SamBank.from_modules(bank._template[0], [bank._template[0]], 0.0), 0 * index
        )
    bank.requires_grad_(False)
    assert not lasco_forward(h_in, base_output, bank, index).requires_grad
    actual = lasco_forward(h_in, base_output, bank, index, reference_output=reference)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_opcheck(backend, opcheck):
    bank = bank_of({**ODD, "layers": 1}, 3, double=True)
    h_in, base_output, index = inputs([2, 0, 2], ODD, torch.float64)
    weights = bank.proxies.tensors(), bank.reference.tensors()
    hyper = bank.architecture.hyper()
    opcheck("lasco_training_forward", (h_in, base_output, index, bank.alpha, *weights, None, *hyper, True, False))
    known = (h_in, base_output, index, bank.alpha, weights[0], [], base_output, *hyper, True, True)
    opcheck("lasco_training_forward", known)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reference_output": 7}, TypeError, "reference_output: expected a tensor, got int"),
        ({"reference_output": torch.zeros(2, 5, 4)}, ValueError, r"reference_output: expected shape \[B, 5, 3\]"),
        ({"reference_output": torch.zeros(1, 5, 3)}, ValueError, r"expected the shape of h_in, \(2, 5, 3\), got \(1"),
        (
            {"reference_output": torch.zeros(2, 5, 3).double()},
            TypeError,
            "reference_output: expected dtype torch.float3",
        ),
        (
            {"reference_output": torch.zeros(2, 5, 3, requires_grad=True)},
            ValueError,
            "reference_output: expected a constant",
        ),
        ({"slot": torch.tensor([0, 3])}, ValueError, r"slot: expected 0..1 \(the bank has 2 slots\), got 3"),
        ({"slot": torch.tensor([-1, 0])}, ValueError, "slot: expected 0..1 .* got -1"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    bank = bank_of(ODD, 2)
    h_in, base_output, slot = inputs([0, 1], ODD)
    with pytest.raises(error, match=message):
        lasco_forward(h_in, base_output, bank, **{"slot": slot, **change})


def test_empty_batches_have_zero_gradients(backend):
    bank = bank_of(ODD, 2)
    h_in, base_output, slot = inputs([], ODD)
    lasco_forward(h_in, base_output, bank, slot).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in bank.parameters())


@pytest.mark.parametrize("own_loss", [False, True])
def test_slots_at_once_train_as_one_after_the_other(backend, own_loss):
    """20 AdamW steps of the stack and of each module alone."""
    sizes = {**PAPER, "tokens": 8, "features": 16, "width": 16, "feedforward": 32}
    reference, proxies = sams(3, sizes)
    bank = SamBank.from_modules(reference, proxies, 1.0, trainable=True)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-3, fused=True)
    runs = []
    for module in proxies:
        alpha = torch.nn.Parameter(torch.tensor(1.0))
        runs.append((module, alpha, torch.optim.AdamW([*module.parameters(), alpha], lr=1e-3)))
    for step in range(20):
        h_in, base_output, index = inputs([0, 1, 2] * 8, sizes, seed=step)
        target = inputs([0, 1, 2] * 8, sizes, seed=1000 + step)[0]
        with torch.no_grad():
            known = reference(h_in)
        optimiser.zero_grad()
        if own_loss:
            estimate = lasco_forward(h_in, base_output, bank, index, reference_output=known)
            per_sample = F.mse_loss(estimate, target, reduction="none").mean((1, 2))
            losses = torch.stack([per_sample[index == u].mean() for u in range(3)])
        else:
            losses = lasco_squared_error(h_in, base_output, bank, index, target, reference_output=known)
            losses = losses / target[index == 0].numel()
        losses.sum().backward()
        optimiser.step()
        for u, (module, alpha, own) in enumerate(runs):
            rows = index == u
            own.zero_grad()
            loss = F.mse_loss(module(h_in[rows]) + alpha * (base_output[rows] - known[rows]), target[rows])
            loss.backward()
            own.step()
            torch.testing.assert_close(losses[u], loss, rtol=1e-4, atol=1e-4)
    assert (bank.alpha - 1).abs().min() > 1e-3


def errors_and_gradients(bank: SamBank, sizes: dict, slot: list[int], known_reference: bool) -> dict[str, torch.Tensor]:
    """Each slot's squared error, and the gradients of a weighted sum of them."""
    h_in, base_output, index = inputs(slot, sizes, bank.dtype)
    target, reference_output, _ = inputs(slot, sizes, bank.dtype, seed=5)
    given = {"reference_output": reference_output} if known_reference else {}
    errors = lasco_squared_error(h_in, base_output, bank, index, target, **given)
    wanted = {"alpha": bank.alpha, **dict(bank.proxies.named_parameters())}
    weights = torch.linspace(0.1, -0.2, bank.slots, dtype=bank.dtype)
    gradients = torch.autograd.grad((errors * weights).sum(), list(wanted.values()))
    return {"errors": errors.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.mark.parametrize("known_reference", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style)) or "post_norm")
@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=["paper", "odd"])
def test_squared_errors_equal_those_of_float64(backend, sizes, style, known_reference):
    bank = smooth(bank_of(sizes, **style))
    slot = MIXED if sizes is ODD else [2, 0, 2, 4, 0, 2, 3]
    actual = errors_and_gradients(bank, sizes, slot, known_reference)
    with csikernels.use_backend("reference"):
        expected = errors_and_gradients(in_double(bank), sizes, slot, known_reference)
    assert_near(actual, expected)
    assert not any(value[1].any() for value in actual.values()), "slot 1 has no sample"


def test_squared_errors_do_not_depend_on_threads_and_repeat(backend, threads):
    bank = bank_of()
    runs = []
    for count in (1, 2, 3, 2):
        threads(count)
        runs.append(errors_and_gradients(bank, PAPER, MIXED, False))
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name


@pytest.mark.parametrize("wanted", ["alpha", "proxies", "h_in", "target", "nothing"])
def test_squared_errors_of_other_leaves(backend, wanted):
    """Each leaf alone, whichever way it takes through the kernels, as through the output of lasco_forward."""
    bank = bank_of(ODD, 3)
    h_in, base_output, index = inputs([2, 0, 0, 2], ODD)
    target = inputs([2, 0, 0, 2], ODD, seed=5)[0]
    bank.requires_grad_(False)
    leaves = {"alpha": [bank.alpha], "proxies": bank.proxies.tensors(), "h_in": [h_in], "target": [target]}
    leaves = [leaf.requires_grad_() for leaf in leaves.get(wanted, [])]
    errors = lasco_squared_error(h_in, base_output, bank, index, target)
    squares = (lasco_forward(h_in, base_output, bank, index) - target).square().sum((1, 2))
    expected = squares.new_zeros(3).index_add(0, index, squares)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=0)
    assert errors.requires_grad == bool(leaves)
    for ours, theirs in zip(
        torch.autograd.grad(errors.sum(), leaves) if leaves else (),
        torch.autograd.grad(expected.sum(), leaves) if leaves else (),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_squared_errors_of_strided_and_empty_batches(backend):
    bank = bank_of(ODD, 3)
    h_in, base_output, index = inputs([2, 0, 0, 1], ODD)
    target = inputs([2, 0, 0, 1], ODD, seed=5)[0]
    expected = lasco_squared_error(h_in, base_output, bank, index, target)
    turned = [value.transpose(0, 2).contiguous().transpose(0, 2) for value in (h_in, base_output, target)]
    actual = lasco_squared_error(turned[0], turned[1], bank, torch.stack([index, index], 1)[:, 0], turned[2])
    assert torch.equal(actual, expected)
    nothing = lasco_squared_error(h_in[:0], base_output[:0], bank, index[:0], target[:0])
    assert not nothing.any()
    nothing.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in bank.parameters())


def test_squared_errors_add_up_in_grad_and_repeat_a_backward(backend):
    bank = bank_of(ODD, 2)
    h_in, base_output, index = inputs([0, 1, 1], ODD)
    errors = lasco_squared_error(h_in, base_output, bank, index, base_output).sum()
    errors.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in bank.parameters()]
    errors.backward()
    assert all(torch.equal(2 * first, p.grad) for first, p in zip(once, bank.parameters(), strict=True))


def test_a_bad_sample_spoils_the_error_of_its_own_slot_alone(backend):
    bank = bank_of(slots=3)
    h_in, base_output, index = inputs([0, 2, 2, 1, 0])
    h_in[3, 4, 5] = float("nan")
    errors = lasco_squared_error(h_in, base_output, bank, index, base_output)
    errors.sum().backward()
    assert errors.isnan().tolist() == [False, True, False]
    for name, weight in bank.proxies.named_parameters():
        assert weight.grad[1].isnan().any() and not weight.grad[[0, 2]].isnan().any(), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": 7}, TypeError, "target: expected a tensor, got int"),
        ({"target": torch.zeros(1, 5, 3)}, ValueError, r"target: expected the shape of h_in, \(2, 5, 3\), got \(1"),
        ({"target": torch.zeros(2, 5, 3).double()}, TypeError, "target: expected dtype torch.float32"),
        ({"slot": torch.tensor([0, 3])}, ValueError, r"slot: expected 0..1 \(the bank has 2 slots\), got 3"),
        ({"reference_output": torch.zeros(2, 5, 4)}, ValueError, r"reference_output: expected shape \[B, 5, 3\]"),
    ],
)
def test_errors_of_squared_errors_name_the_argument(backend, change, error, message):
    bank = bank_of(ODD, 2)
    h_in, base_output, slot = inputs([0, 1], ODD)
    arguments = {"h_in": h_in, "base_output": base_output, "bank": bank, "slot": slot, "target": h_in, **change}
    with pytest.raises(error, match=message):
        lasco_squared_error(**arguments)


def test_opcheck_of_squared_errors(backend, opcheck):
    bank = bank_of({**ODD, "layers": 1}, 3, double=True)
    h_in, base_output, index = inputs([2, 0, 2], ODD, torch.float64)
    proxies, reference, hyper = bank.proxies.tensors(), bank.reference.tensors(), bank.architecture.hyper()
    arguments = (h_in, base_output, base_output, index, bank.alpha, proxies)
    opcheck("lasco_squared_error", (*arguments, reference, None, *hyper, True, True))
    opcheck("lasco_squared_error", (*arguments, [], base_output, *hyper, True, True))
