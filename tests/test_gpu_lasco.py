"""lasco_forward on a GPU, or its simulator."""

from __future__ import annotations

import copy

import pytest
import simulator
import torch
from lasco_modules import ODD, ONE, PAPER, bank_of, inputs, oracle, relative, sams
from test_lasco_ops import RAGGED, STYLES, op_args
from test_lasco_sizes import drawn

import csikernels
from csikernels import SamBank, lasco_forward

pytestmark = pytest.mark.gpu("cuda")


def sized(layers: int, width: int) -> dict:
    """The sizes of Fig. 10, each of which has a kernel of its own."""
    return {**PAPER, "layers": layers, "width": width, "feedforward": 4 * width}


FIGURE = [sized(2, 64), sized(1, 64), sized(4, 64), sized(2, 32), sized(2, 128)]
# No multiple of a tile, more tokens and columns than one has, and sizes that differ from a kernel's in one place.
OTHERS = [
    ODD,
    ONE,
    {**sized(1, 64), "tokens": 31},
    {**sized(1, 32), "features": 60},
    {**sized(1, 32), "heads": 8},
    {**sized(1, 64), "feedforward": 128},
    {"tokens": 37, "features": 70, "layers": 1, "width": 66, "heads": 3, "feedforward": 131},
]
NAMES = {"ids": lambda value: "-".join(map(str, value.values())) or "post_norm"}


def call(device, bank, h_in, base_output, slot):
    return lasco_forward(h_in.to(device), base_output.to(device), copy.deepcopy(bank).to(device), slot.to(device)).cpu()


def by_reference(*args):
    with csikernels.use_backend("reference"):
        return lasco_forward(*args)


def check_float32(device, sizes, style, slot=(1, 0, 1)):
    bank, reference, proxies = bank_of(3, sizes, **style)
    h_in, base_output, slot = inputs(slot, sizes)
    actual = call(device, bank, h_in, base_output, slot)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def check_bfloat16(device, sizes, style, slot=(1, 0, 1)):
    modules = sams(3, sizes, **style)
    alpha = torch.linspace(0.2, 1.5, 3)
    bank = SamBank.from_modules(*modules, alpha, precision="bfloat16")
    args = inputs(slot, sizes)
    actual = call(device, bank, *args)
    reference = by_reference(args[0], args[1], bank, args[2])
    expected = oracle(*args, *modules, alpha)
    # Sums in another order tip single roundings, so the two differ, but by less than either from the truth.
    assert relative(actual, expected) < 1.5 * relative(reference, expected) + 1e-6
    assert relative(actual, reference) < 1.5 * relative(reference, expected) + 1e-6


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", FIGURE, **NAMES)
def test_the_sizes_of_the_figure(device, sizes):
    check_float32(device, sizes, {}, slot=(2,))
    check_bfloat16(device, sizes, {}, slot=(2, 0))


@pytest.mark.parametrize("style", STYLES[1:], **NAMES)
@pytest.mark.parametrize("sizes", [sized(2, 32), ODD], **NAMES)
def test_every_style(device, sizes, style):
    check_float32(device, sizes, style, slot=(2,))
    check_bfloat16(device, sizes, style, slot=(2,))


@pytest.mark.parametrize("width", [64, 128])
def test_a_style_of_the_other_kernels(device, width):
    check_float32(device, sized(1, width), STYLES[3], slot=(2,))
    check_bfloat16(device, sized(1, width), STYLES[3], slot=(2,))


@pytest.mark.parametrize("sizes", OTHERS, **NAMES)
def test_other_sizes(device, sizes):
    check_float32(device, sizes, {}, slot=(1,))
    check_bfloat16(device, sizes, {}, slot=(1,))


@pytest.mark.parametrize("seed", range(4))
def test_drawn_sizes(device, seed):
    sizes, style = drawn(seed)
    check_float32(device, sizes, style)
    check_bfloat16(device, sizes, style)


@pytest.mark.parametrize("layers", [6, 7, 17])  # the last kernel of Fig. 10, the first of any size, the reference
def test_more_layers_than_a_kernel_takes(device, layers):
    sizes = sized(layers, 32) if layers < 10 else {**ODD, "layers": layers}
    bank, reference, proxies = bank_of(1, sizes)
    args = inputs([0], sizes)
    actual = call(device, bank, *args)
    expected = oracle(*args, reference, proxies, bank.alpha)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_float64_bank_takes_the_reference(device):
    bank, reference, proxies = bank_of(2, ODD, torch.float64)
    args = inputs([1, 0], ODD, torch.float64)
    with torch.no_grad():
        actual = call(device, bank.requires_grad_(False), *args)
    torch.testing.assert_close(actual, oracle(*args, reference, proxies, bank.alpha), rtol=1e-12, atol=1e-12)


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [sized(1, 32), ODD], **NAMES)
def test_a_sample_has_the_same_bits_in_every_batch(device, sizes, precision):
    bank = SamBank.from_modules(*sams(5, sizes), 0.7, precision=precision)
    h_in, base_output, slot = inputs(RAGGED, sizes)
    together = call(device, bank, h_in, base_output, slot)
    assert torch.equal(call(device, bank, h_in, base_output, slot), together)
    rows = slice(4, 6)
    assert torch.equal(call(device, bank, h_in[rows], base_output[rows], slot[rows]), together[rows])


@pytest.mark.parametrize("sizes", [PAPER, ODD], **NAMES)
def test_empty_batch(device, sizes):
    bank, _, _ = bank_of(2, sizes)
    assert call(device, bank, *inputs([], sizes)).shape == (0, sizes["tokens"], sizes["features"])


@pytest.mark.parametrize("sizes", [sized(1, 64), ODD], **NAMES)
def test_the_shift_is_kept_when_asked_for(device, sizes):
    bank, reference, _ = bank_of(3, sizes)
    h_in, base_output, slot = (value.to(device) for value in inputs([0, 2], sizes))
    with torch.no_grad():
        expected = base_output.cpu() - reference(h_in.cpu())
    bank = bank.to(device)
    output, shift = torch.ops.csikernels.lasco_forward(*op_args(bank, h_in, base_output, slot, True))
    torch.testing.assert_close(shift.cpu(), expected, rtol=1e-5, atol=1e-5)
    again, nothing = torch.ops.csikernels.lasco_forward(*op_args(bank, h_in, base_output, slot, False))
    assert torch.equal(again, output) and nothing.shape == (0,)


@pytest.mark.parametrize("sizes", [sized(1, 64), ODD], **NAMES)
def test_strided_and_shifted_operands(device, sizes):
    bank, _, _ = bank_of(3, sizes)
    h_in, base_output, slot = inputs([1, 0, 2], sizes)
    expected = call(device, bank, h_in, base_output, slot)
    bank = copy.deepcopy(bank).to(device)
    for name, weight in list(bank.proxies.named_buffers()):
        shifted = weight.new_empty(weight.numel() + 1)[1:].view(weight.shape)  # not at a multiple of 16 bytes
        setattr(bank.proxies, name, shifted.copy_(weight))
    for name, weight in list(bank.reference.named_buffers()):
        setattr(bank.reference, name, torch.stack([weight, torch.full_like(weight, torch.nan)], -1)[..., 0])
    strided = [value.to(device).transpose(1, 2).contiguous().transpose(1, 2) for value in (h_in, base_output)]
    spread = torch.stack([slot, slot], 1)[:, 0].to(device)
    before = strided[0].clone()
    actual = lasco_forward(*strided, bank, spread)
    assert actual.is_contiguous() and torch.equal(strided[0], before)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [sized(1, 32), ODD], **NAMES)
def test_a_bad_sample_spoils_itself_alone(device, sizes, precision):
    bank = SamBank.from_modules(*sams(3, sizes), 0.7, precision=precision)
    h_in, base_output, slot = inputs([1, 1, 0], sizes)
    clean = call(device, bank, h_in, base_output, slot)
    h_in[1, 3, 2] = torch.nan if precision == "float32" else torch.inf
    spoiled = call(device, bank, h_in, base_output, slot)
    assert torch.equal(spoiled[1].isnan(), by_reference(h_in, base_output, bank, slot)[1].isnan())
    assert spoiled[1].isnan().any() and torch.equal(spoiled[[0, 2]], clean[[0, 2]])


# Slots and errors -----------------------------------------------------------------------------------------------------


def test_slots_on_the_cpu_are_checked(device):
    bank, _, _ = bank_of(3, ODD)
    h_in, base_output, slot = inputs([2, 0], ODD)
    expected = call(device, bank, h_in, base_output, slot)
    bank, h_in, base_output = bank.to(device), h_in.to(device), base_output.to(device)
    assert torch.equal(lasco_forward(h_in, base_output, bank, slot).cpu(), expected)
    for wrong, given in ((slot + 1, "3"), (slot - 1, "-1")):
        with pytest.raises(ValueError, match=rf"slot: expected 0..2 \(the bank has 3 slots\), got {given}"):
            lasco_forward(h_in, base_output, bank, wrong)


@pytest.mark.parametrize("sizes", [sized(1, 64), ODD], **NAMES)
def test_a_slot_beyond_the_bank_stops_the_kernel(simulated, sizes, monkeypatch):
    bank, _, _ = bank_of(3, sizes)
    h_in, base_output, slot = inputs([2, 0], sizes)
    find = simulated.find

    def spoil(kernel):  # after the wrapper, which would know the values of a tensor on the CPU
        slot[1] = 3
        return find(kernel)

    monkeypatch.setattr(simulated, "find", spoil)
    with pytest.raises(simulator.ptxsim().PtxFault, match="trap"):
        lasco_forward(h_in, base_output, bank, slot)


def test_errors_are_those_of_the_cpu(device):
    bank, _, _ = bank_of(3, ODD)
    bank = bank.to(device)
    h_in, base_output, slot = (value.to(device) for value in inputs([0, 1], ODD))
    args = op_args(bank, h_in, base_output, slot)

    def replaced(weights: list, index: int, weight: torch.Tensor) -> list:
        return [*weights[:index], weight, *weights[index + 1 :]]

    proxies, reference = args[4], args[5]
    for kind, message, at, value in [
        (ValueError, "proxies: expected at least 17 weights, got 3", 4, proxies[:3]),
        (ValueError, "reference: expected 41 weights, got 40", 5, reference[:-1]),
        (ValueError, r"proxies\[1\]: expected shape \[3, 6\], got \[3, 5\]", 4,
         replaced(proxies, 1, torch.zeros(3, 5, device=device))),
        (TypeError, r"reference\[5\]: expected Float, got Double", 5, replaced(reference, 5, reference[5].double())),
        (ValueError, "heads: expected a divisor of the width 6, got 4", 7, 4),
        (ValueError, "activation: expected relu or gelu, got tanh", 8, "tanh"),
        (ValueError, "base_output: expected the shape of h_in", 0, h_in[:1]),
        (TypeError, "alpha: expected float32, got Double", 3, args[3].double()),
        (TypeError, "slot: expected int64, got Int", 2, slot.int()),
        (ValueError, r"slot: expected shape \[2\]", 2, slot[:1]),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            torch.ops.csikernels.lasco_forward(*args[:at], value, *args[at + 1 :])


# What surrounds the op ------------------------------------------------------------------------------------------------


def test_gradients_through_the_kernel(device):
    sizes = sized(1, 64)
    bank = SamBank.from_modules(*sams(2, sizes), 0.6, trainable=True)
    args = inputs([1, 0], sizes)
    found = []
    for forward, where in (("cuda", device), ("reference", torch.device("cpu"))):
        own = copy.deepcopy(bank).to(where)
        h_in, base_output, slot = (value.to(where) for value in args)
        with csikernels.use_backend(forward):
            loss = lasco_forward(h_in.requires_grad_(), base_output, own, slot).square().sum()
        with csikernels.use_backend("reference"):
            found.append(torch.autograd.grad(loss, [h_in, *own.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_a_call_can_be_captured(device):
    if device.type != "cuda":
        pytest.skip("capturing needs a GPU")
    bank, _, _ = bank_of(3)
    bank = bank.to(device)
    h_in, base_output, slot = (value.to(device) for value in inputs([0, 2, 1]))
    expected = lasco_forward(h_in, base_output, bank, slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lasco_forward(h_in, base_output, bank, slot)
    graph.replay()
    assert torch.equal(captured, expected)


# What only the simulator shows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", FIGURE[:1] + FIGURE[3:], **NAMES)
def test_bytes_are_within_a_quarter_of_the_least(simulated, sizes, precision):
    bank = SamBank.from_modules(*sams(2, sizes), 1.0, precision=precision)
    h_in, base_output, slot = inputs([1], sizes)
    lasco_forward(h_in, base_output, bank, slot)
    (launch,) = simulated.launches
    weights = sum(weight.nbytes for weight in bank.reference.tensors())
    least = len(slot) * 2 * weights + 3 * h_in.nbytes
    assert launch["global_load_bytes"] + launch["global_store_bytes"] <= 1.25 * least


def test_a_missing_barrier_within_a_warp_is_found(simulated, tmp_path, monkeypatch):
    header = (simulator.SOURCES / "lasco_layout.cuh").read_text()
    barrier = "if constexpr (sizeof(typename C::Weight) == 4) __syncwarp();"
    assert barrier in header
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "lasco_layout.cuh").write_text(header.replace(barrier, ""))
    source = simulator.SOURCES / "lasco_tiled.cu"
    broken = simulator.ptxsim().Module(simulator.compile_ptx(source, extra=("-I", str(tmp_path))))
    kernels = {name.split("lasco_kernel")[1]: name for name in broken.kernels()}
    monkeypatch.setattr(simulated, "find", lambda kernel: (broken, kernels[kernel.split("lasco_kernel")[1]]))
    bank, _, _ = bank_of(1, sized(1, 32))
    with pytest.raises(simulator.ptxsim().PtxFault, match="race on shared memory"):
        lasco_forward(*inputs([0], sized(1, 32))[:2], bank, torch.tensor([0]))
