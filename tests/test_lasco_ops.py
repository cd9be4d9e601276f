"""lasco_forward: equation 18 and its gradients, on every backend."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lasco_modules import ODD, ONE, PAPER, bank_of, composite, inputs, oracle, relative, sams
from torch.nn import functional as F

import csikernels
from csikernels import SamBank, lasco_forward

pytestmark = pytest.mark.op("lasco_forward", "lasco_backward")
STYLES = [
    {},
    {"activation": "gelu"},
    {"norm_first": True},
    {"norm_first": True, "final_norm": True, "activation": "gelu"},
    {"final_norm": True, "batch_first": False},
]
RAGGED = [2, 0, 2, 2, 0, 4, 3]  # three samples of one slot, two of another, two alone, one unused


def op_args(bank, h_in, base_output, slot, keep_shift=True):
    return (
        h_in, base_output, slot, bank.alpha, bank.proxies.tensors(), bank.reference.tensors(), [],
        *bank.architecture.hyper(), keep_shift,
    )  # fmt: skip


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style)) or "post_norm")
@pytest.mark.parametrize("sizes", [PAPER, ODD, ONE], ids=["paper", "odd", "one"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_the_modules(backend, dtype, tolerance, sizes, style):
    bank, reference, proxies = bank_of(5, sizes, dtype, **style)
    h_in, base_output, slot = inputs(RAGGED, sizes, dtype)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    actual = lasco_forward(h_in, base_output, bank, slot)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_errs_no_more_than_pytorch(backend, norm_first):
    reference, proxies = sams(5, norm_first=norm_first)
    alpha = torch.linspace(0.2, 1.5, 5)
    h_in, base_output, slot = inputs(RAGGED * 4)
    expected = oracle(h_in, base_output, slot, reference, proxies, alpha)
    low = [copy.deepcopy(module).bfloat16() for module in (reference, *proxies)]
    with torch.no_grad():
        peer = composite(h_in.bfloat16(), base_output.bfloat16(), slot, low[0], low[1:], alpha.bfloat16())
    bank = SamBank.from_modules(reference, proxies, alpha, precision="bfloat16")
    actual = lasco_forward(h_in, base_output, bank, slot)
    assert actual.dtype == torch.float32
    assert 1e-4 < relative(actual, expected) < relative(peer, expected)


def test_a_sample_ignores_the_rest_of_its_batch(backend):
    bank, _, _ = bank_of(5)
    h_in, base_output, slot = inputs(RAGGED)
    together = lasco_forward(h_in, base_output, bank, slot)
    order = torch.randperm(len(slot), generator=torch.Generator().manual_seed(0))
    shuffled = lasco_forward(h_in[order], base_output[order], bank, slot[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=2e-6)
    for i in range(len(slot)):
        alone = lasco_forward(h_in[i : i + 1], base_output[i : i + 1], bank, slot[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sample_spoils_itself_alone(backend, value):
    bank, _, _ = bank_of(3)
    h_in, base_output, slot = inputs([1, 1, 0, 2])
    clean = lasco_forward(h_in, base_output, bank, slot)
    h_in[1, 7, 3] = value
    spoiled = lasco_forward(h_in, base_output, bank, slot)
    assert spoiled[1].isnan().any()
    others = [0, 2, 3]
    torch.testing.assert_close(spoiled[others], clean[others], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("sizes", [PAPER, ODD], ids=["paper", "odd"])
@pytest.mark.parametrize("slot", [[], [1], [1, 1, 1, 1], [0, 1, 2], [2, 1, 0, 2, 1, 0]])
def test_batches_of_every_kind(backend, sizes, slot):
    bank, reference, proxies = bank_of(3, sizes)
    h_in, base_output, slot = inputs(slot, sizes)
    actual = lasco_forward(h_in, base_output, bank, slot)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_more_samples_than_one_workspace_holds(backend, monkeypatch):
    bank, reference, proxies = bank_of(3, ODD, torch.float64)
    h_in, base_output, slot = inputs([0, 1, 1, 0, 2] * 9, ODD, torch.float64)
    h_in.requires_grad_()
    whole = torch.autograd.grad(lasco_forward(h_in, base_output, bank, slot).sum(), [h_in, *bank.parameters()])
    monkeypatch.setattr("csikernels.reference.transformer._WORKSPACE", 500)
    actual = lasco_forward(h_in, base_output, bank, slot)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for parts, at_once in zip(torch.autograd.grad(actual.sum(), [h_in, *bank.parameters()]), whole, strict=True):
        torch.testing.assert_close(parts, at_once, rtol=1e-11, atol=1e-11)


def test_strides_do_not_matter_and_nothing_aliases(backend):
    bank, _, _ = bank_of(3)
    h_in, base_output, slot = inputs([1, 0, 2, 1])
    expected = lasco_forward(h_in, base_output, bank, slot)
    strided = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (h_in, base_output)]
    spread = torch.stack([slot, slot], 1)[:, 0]
    actual = lasco_forward(strided[0], strided[1], bank, spread)
    assert not strided[0].is_contiguous() and not spread.is_contiguous() and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    before = [h_in.clone(), base_output.clone(), slot.clone()]
    lasco_forward(h_in, base_output, bank, slot).fill_(7)
    assert all(map(torch.equal, before, (h_in, base_output, slot)))
    zeros = SamBank.from_modules(*sams(3), 0.0)
    assert not torch.equal(lasco_forward(h_in, base_output, zeros, slot), base_output)


def test_threads_do_not_matter(backend, threads):
    bank, _, _ = bank_of(5)
    h_in, base_output, slot = inputs(RAGGED * 3)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lasco_forward(h_in, base_output, bank, slot))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_numpy_in_numpy_out(backend):
    bank, _, _ = bank_of(3)
    tensors = inputs([2, 0, 0])
    actual = lasco_forward(*(value.numpy() for value in tensors[:2]), bank, tensors[2].numpy())
    assert isinstance(actual, np.ndarray)
    assert np.array_equal(actual, lasco_forward(tensors[0], tensors[1], bank, tensors[2]).numpy())
    with pytest.raises(TypeError, match="arrays of one kind"):
        lasco_forward(tensors[0].numpy(), tensors[1], bank, tensors[2])


def test_errors_name_the_argument(backend):
    bank, _, _ = bank_of(3)
    h_in, base_output, slot = inputs([0, 1])
    bad = [
        (TypeError, "bank: expected a SamBank, got str", (h_in, base_output, "bank", slot)),
        (TypeError, "h_in: expected a tensor, got list", ([1.0], base_output, bank, slot)),
        (
            TypeError,
            "h_in: expected dtype torch.float32 .* got torch.float64",
            (h_in.double(), base_output, bank, slot),
        ),
        (TypeError, "base_output: expected dtype torch.float32", (h_in, base_output.bfloat16(), bank, slot)),
        (ValueError, r"h_in: expected shape \[B, 32, 64\], got \(32, 64\)", (h_in[0], base_output, bank, slot)),
        (ValueError, r"h_in: expected shape \[B, 32, 64\], got \(2, 64, 32\)", (h_in.mT, base_output, bank, slot)),
        (ValueError, r"base_output: expected the shape of h_in, \(2, 32, 64\)", (h_in, base_output[:1], bank, slot)),
        (ValueError, "h_in: expected a tensor on cpu .* got one on meta", (h_in.to("meta"), base_output, bank, slot)),
        (ValueError, "slot: expected a tensor on cpu or cpu", (h_in, base_output, bank, slot.to("meta"))),
        (TypeError, "slot: expected an int64 tensor, got torch.int32", (h_in, base_output, bank, slot.int())),
        (TypeError, "slot: expected an int64 tensor, got list", (h_in, base_output, bank, [0, 1])),
        (ValueError, r"slot: expected shape \[2\], .* got \(1,\)", (h_in, base_output, bank, slot[:1])),
        (ValueError, r"slot: expected 0..2 \(the bank has 3 slots\), got 3", (h_in, base_output, bank, slot + 2)),
        (ValueError, "slot: expected 0..2 .* got -1", (h_in, base_output, bank, slot - 1)),
    ]
    for kind, message, args in bad:
        with pytest.raises(kind, match=message):
            lasco_forward(*args)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style)) or "post_norm")
def test_gradcheck(backend, style):
    bank, _, _ = bank_of(3, {**ODD, "layers": 1, "tokens": 3}, torch.float64, **style)
    h_in, base_output, slot = inputs([2, 0, 2], {**ODD, "tokens": 3}, torch.float64)

    def function(h_in, base_output, alpha, *proxies):
        args = op_args(bank, h_in, base_output, slot)
        return torch.ops.csikernels.lasco_forward(*args[:3], alpha, list(proxies), *args[5:])[0]

    leaves = [value.requires_grad_() for value in (h_in, base_output)]
    assert torch.autograd.gradcheck(function, (*leaves, bank.alpha, *bank.proxies.tensors()), fast_mode=True)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style)) or "post_norm")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_gradients_equal_autograd_through_the_modules(backend, dtype, tolerance, style):
    reference, proxies = sams(5, PAPER, dtype, **style)
    alpha = torch.linspace(-0.3, 1.7, 5, dtype=dtype)
    precision = "float64" if dtype == torch.float64 else "float32"
    bank = SamBank.from_modules(reference, proxies, alpha, precision=precision, trainable=True)
    h_in, base_output, slot = inputs(RAGGED, PAPER, dtype)
    weight = inputs(RAGGED, PAPER, dtype, seed=5)[0]
    ours = [h_in.requires_grad_(), base_output.requires_grad_(), bank.alpha, *bank.proxies.tensors()]
    actual = torch.autograd.grad((lasco_forward(h_in, base_output, bank, slot) * weight).sum(), ours)

    reference, *proxies = (module.double().requires_grad_() for module in (reference, *proxies))
    leaves = [value.detach().double().requires_grad_() for value in (h_in, base_output, alpha)]
    (composite(leaves[0], leaves[1], slot, reference, proxies, leaves[2]) * weight.double()).sum().backward()
    stacked = SamBank.from_modules(reference, proxies, 1.0, precision="float64", trainable=True)
    for slot_index, module in enumerate(proxies):
        for parameter in module.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        stacked.replace(slot_index, module)
    expected = [*(leaf.grad for leaf in leaves), *stacked.proxies.tensors()]
    names = ["h_in", "base_output", "alpha", *dict(bank.proxies.named_parameters())]
    for name, ours_grad, theirs in zip(names, actual, expected, strict=True):
        assert ours_grad.dtype == dtype
        scale = max(theirs.abs().max().item(), 1.0)
        assert (ours_grad.double() - theirs).abs().max().item() <= tolerance * scale, name
    assert not any(grad[1].any() for grad in actual[2:]), "slot 1 has no sample"


def test_only_the_gradients_asked_for(backend):
    bank, _, _ = bank_of(2, ODD, torch.float64)
    h_in, base_output, slot = inputs([0, 1], ODD, torch.float64)
    bank.alpha.requires_grad_(False)
    bank.proxies.input_weight.requires_grad_(False)
    lasco_forward(h_in, base_output, bank, slot).sum().backward()
    assert bank.alpha.grad is None and bank.proxies.input_weight.grad is None
    assert bank.proxies.output_weight.grad is not None
    assert not any(buffer.requires_grad for buffer in bank.reference.buffers())
    bank.requires_grad_(False)
    assert not lasco_forward(h_in, base_output, bank, slot).requires_grad
    base_output.requires_grad_()
    lasco_forward(h_in, base_output, bank, slot).sum().backward()
    torch.testing.assert_close(base_output.grad, bank.alpha[slot].view(-1, 1, 1).expand_as(base_output))


def test_gradient_of_the_input_through_a_bfloat16_bank(backend):
    modules = sams(3)
    alpha = torch.full((3,), 0.8)
    h_in, base_output, slot = inputs([0, 1, 2, 1])

    def grad(function, dtype):
        leaf = h_in.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf, base_output.to(dtype)).square().sum(), leaf)[0]

    def through_modules(dtype):
        reference, proxies = copy.deepcopy(modules[0]).to(dtype), [copy.deepcopy(m).to(dtype) for m in modules[1]]
        return grad(lambda h, base: composite(h, base, slot, reference, proxies, alpha.to(dtype)), dtype)

    bank = SamBank.from_modules(*modules, alpha, precision="bfloat16")
    actual = grad(lambda h, base: lasco_forward(h, base, bank, slot), torch.float32)
    expected = through_modules(torch.float64)
    assert 1e-4 < relative(actual, expected) < relative(through_modules(torch.bfloat16), expected)


def test_empty_batch_has_zero_gradients(backend):
    bank, _, _ = bank_of(2, ODD, torch.float64)
    h_in, base_output, slot = inputs([], ODD, torch.float64)
    lasco_forward(h_in.requires_grad_(), base_output, bank, slot).sum().backward()
    assert h_in.grad.shape == h_in.shape
    assert all(not parameter.grad.any() for parameter in bank.parameters())


def test_a_second_derivative_is_refused(backend):
    bank, _, _ = bank_of(2, ODD, torch.float64)
    h_in, base_output, slot = inputs([0, 1], ODD, torch.float64)
    loss = lasco_forward(h_in.requires_grad_(), base_output, bank, slot).square().sum()
    (first,) = torch.autograd.grad(loss, h_in, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_opcheck(backend, opcheck):
    sizes = {**ODD, "layers": 1}
    bank, _, _ = bank_of(3, sizes, torch.float64, norm_first=True, final_norm=True)
    h_in, base_output, slot = inputs([2, 0, 2], sizes, torch.float64)
    args = op_args(bank, h_in.requires_grad_(), base_output.requires_grad_(), slot)
    opcheck("lasco_forward", args)
    frozen = copy.deepcopy(bank).requires_grad_(False)
    opcheck("lasco_forward", op_args(frozen, h_in.detach(), base_output.detach(), slot, keep_shift=False))
    weights = (slot, frozen.alpha, frozen.proxies.tensors(), frozen.reference.tensors())
    grad, h_in, none = base_output.detach(), h_in.detach(), h_in.new_empty(0)
    for shift, *wanted in ((grad, True, True), (none, True, True), (none, False, False)):
        opcheck("lasco_backward", (grad, h_in, *weights, shift, none, *bank.architecture.hyper(), *wanted))


def test_the_gradient_of_alpha_needs_the_shift(backend):
    bank, _, _ = bank_of(2, ODD, torch.float64)
    args = op_args(bank, *inputs([0, 1], ODD, torch.float64), keep_shift=False)
    with pytest.raises(RuntimeError, match="keep_shift=True"):
        torch.ops.csikernels.lasco_forward(*args)[0].sum().backward()


def test_compiles_and_exports(backend):
    bank, _, _ = bank_of(3, ODD, torch.float64)
    h_in, base_output, slot = inputs([2, 0, 2], ODD, torch.float64)

    def loss(h_in, base_output, slot):
        return lasco_forward(h_in, base_output, bank, slot).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (slot, slot[:2]):
        rows = slice(len(batch))
        actual = torch.autograd.grad(compiled(h_in[rows], base_output[rows], batch), list(bank.parameters()))
        expected = torch.autograd.grad(loss(h_in[rows], base_output[rows], batch), list(bank.parameters()))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="slot: expected 0..2"):
        compiled(h_in, base_output, slot + 1)
    program = torch.export.export(bank, (h_in, base_output, slot))
    torch.testing.assert_close(program.module()(h_in, base_output, slot), bank(h_in, base_output, slot))


def test_autocast_hands_over_low_precision(backend):
    bank, _, _ = bank_of(2)
    h_in, base_output, slot = inputs([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lasco_forward(h_in, base_output.bfloat16(), bank, slot)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, lasco_forward(h_in, base_output.bfloat16().float(), bank, slot))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_adapting_three_slots_at_once_equals_three_runs(backend, precision, tolerance):
    dtype = getattr(torch, precision)
    reference, proxies = sams(3, dtype=dtype)
    bank = SamBank.from_modules(reference, proxies, 1.0, precision=precision, trainable=True)
    optimiser = torch.optim.AdamW(bank.parameters(), lr=1e-3)
    runs = []
    for module in proxies:
        alpha = torch.nn.Parameter(torch.tensor(1.0, dtype=dtype))
        runs.append((module, alpha, torch.optim.AdamW([*module.parameters(), alpha], lr=1e-3)))

    slot = [0, 1, 2] * 4
    for step in range(20):
        h_in, base_output, index = inputs(slot, dtype=dtype, seed=step)
        target = inputs(slot, dtype=dtype, seed=1000 + step)[0]
        optimiser.zero_grad()
        per_sample = F.mse_loss(lasco_forward(h_in, base_output, bank, index), target, reduction="none").mean((1, 2))
        losses = torch.stack([per_sample[index == u].mean() for u in range(3)])
        losses.sum().backward()
        optimiser.step()
        for u, (module, alpha, own) in enumerate(runs):
            rows = index == u
            own.zero_grad()
            shift = base_output[rows] - reference(h_in[rows]).detach()
            loss = F.mse_loss(module(h_in[rows]) + alpha * shift, target[rows])
            loss.backward()
            own.step()
            torch.testing.assert_close(losses[u], loss, rtol=tolerance, atol=tolerance)
    assert (bank.alpha - 1).abs().min() > 1e-3
    for u, (module, alpha, _) in enumerate(runs):
        torch.testing.assert_close(bank.alpha[u], alpha, rtol=tolerance, atol=tolerance)
        h_in = inputs([u], dtype=dtype, seed=7)[0]
        # AdamW divides a gradient by its own size, so where that is rounding noise, weights differ by whole steps.
        assert relative(bank.export(u)(h_in), module(h_in)) < 100 * tolerance


def test_the_reference_backend_is_there():
    available = csikernels.backends()
    for op in ("lasco_forward", "lasco_backward", "transformer_forward"):
        assert available[op]["cpu"][-1] == "reference"
