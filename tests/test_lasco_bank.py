"""SamBank: the layout it reads, what it refuses, and what it gives back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lasco_modules import ODD, PAPER, Sam, bank_of, inputs, oracle, sams
from torch import nn

from csikernels import SamBank, lasco_forward


class OtherNames(nn.Module):
    """The same computation under other names, with a position [1, T, d]."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.embed, self.blocks, self.head = sam.input, sam.encoder, sam.output
        self.where = nn.Parameter(sam.position.detach()[None].clone())

    def forward(self, h):
        return self.head(self.blocks(self.embed(h) + self.where))


class Doubled(Sam):
    """The right parts, another computation."""

    def forward(self, h):
        return 2 * super().forward(h)


def changed(change) -> nn.Module:
    module = Sam(**ODD).eval()
    change(module)
    return module


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert actual.state_dict().keys() == expected.keys()
    for name, value in actual.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_paper_sizes_have_110_thousand_parameters():
    bank, reference, _ = bank_of(3)
    per_module = sum(parameter.numel() for parameter in reference.parameters())
    assert 109_000 < per_module < 111_000
    assert bank.nbytes == 4 * (4 * per_module + 3)
    low = SamBank.from_modules(*sams(3), 1.0, precision="bfloat16")
    vectors = sum(p.numel() for name, p in reference.named_parameters() if p.ndim == 1 or name == "position")
    assert low.nbytes == 4 * (2 * (per_module - vectors) + 4 * vectors) + 4 * 3
    assert "slots=3, layers=2, width=64, heads=4, feedforward=256" in repr(bank)
    assert (bank.slots, bank.dtype, bank.device) == (3, torch.float32, torch.device("cpu"))


def test_reads_other_names_by_type():
    reference, proxies = sams(2, ODD)
    bank = SamBank.from_modules(OtherNames(reference), [proxies[0], OtherNames(proxies[1])], [0.5, 2.0])
    h_in, base_output, slot = inputs([0, 1, 1], ODD)
    expected = oracle(h_in, base_output, slot, reference, proxies, bank.alpha)
    torch.testing.assert_close(lasco_forward(h_in, base_output, bank, slot).double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_state(bank.export(1), state(OtherNames(proxies[1])))
    assert isinstance(bank.export(0), OtherNames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: delattr(m, "encoder"), "found 0 nn.TransformerEncoder"),
        (lambda m: delattr(m, "input"), "found 1 nn.Linear"),
        (lambda m: delattr(m, "position"), "found 0 parameters"),
        (lambda m: setattr(m, "position", nn.Parameter(torch.ones(2, 5, 6))), r"position \[T, d\] or \[1, T, d\]"),
        (lambda m: setattr(m, "position", nn.Parameter(torch.ones(5, 4))), r"position of shape \[5, 6\], got \[5, 4\]"),
        (lambda m: setattr(m, "input", nn.Linear(3, 8)), r"input_weight of shape \[6, 3\], got \[8, 3\]"),
        (lambda m: setattr(m, "output", nn.Linear(6, 3, bias=False)), "output: expected a weight and a bias"),
        (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1))), "no parameter beyond .* got 'scale'"),
        (lambda m: setattr(m, "output", copy.deepcopy(m.input)), r"output_weight of shape \[3, 6\]"),
        (lambda m: setattr(m.encoder.layers[1], "norm1", m.encoder.layers[0].norm1), "got tied ones"),
        (lambda m: setattr(m.encoder.layers[2], "norm_first", True), "norm_first: expected one value .* False, True"),
        (lambda m: setattr(m.encoder.layers[0].norm2, "eps", 1e-3), "eps: expected one value throughout"),
        (lambda m: setattr(m.encoder.layers[0], "activation", torch.tanh), "activation relu or .* gelu"),
        (lambda m: setattr(m.encoder.layers[0], "norm1", nn.RMSNorm(6)), "norm1: expected an nn.LayerNorm"),
        (
            lambda m: setattr(m.encoder.layers, "1", nn.Identity()),
            r"layers\[1\]: expected an nn.TransformerEncoderLayer",
        ),
        (lambda m: setattr(m.encoder, "norm", nn.RMSNorm(6)), "expected an nn.LayerNorm as final norm, got RMSNorm"),
        (lambda m: setattr(m.encoder, "layers", nn.ModuleList()), "at least one layer, got none"),
        (lambda m: m.output.double(), "dtype: expected one value throughout, got torch.float32, torch.float64"),
        (lambda m: setattr(m, "forward", lambda h: m.output(h)), "its forward failed on a tensor"),
        (lambda m: setattr(m, "forward", lambda h: h[0]), r"its forward to keep the shape \[1, 5, 3\], got \(5, 3\)"),
    ],
)
def test_refuses_what_is_not_the_layout(change, message):
    with pytest.raises(ValueError, match=f"reference.*{message}"):
        SamBank.from_modules(changed(change), [Sam(**ODD)], 1.0)


def test_refuses_another_computation():
    with pytest.raises(ValueError, match=r"proxies\[1\]: expected its forward to compute output\(encoder"):
        SamBank.from_modules(Sam(**ODD), [Sam(**ODD), Doubled(**ODD)], 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers 2 instead of 3"),
        ({"heads": 3}, "heads 3 instead of 2"),
        ({"tokens": 4, "feedforward": 9}, "tokens 4 instead of 5, feedforward 9 instead of 7"),
        ({"activation": "gelu"}, "activation gelu instead of relu"),
        ({"final_norm": True}, "final_norm True instead of False"),
    ],
)
def test_refuses_a_proxy_of_another_architecture(options, message):
    with pytest.raises(ValueError, match=rf"proxies\[0\]: expected the architecture of the reference, got {message}"):
        SamBank.from_modules(Sam(**ODD), [Sam(**{**ODD, **options})], 1.0)


def test_refuses_dropout_in_training_mode():
    reference, noisy = Sam(**ODD), Sam(**ODD, dropout=0.1)
    with pytest.raises(ValueError, match=r"proxies\[0\]: expected eval mode .* dropout 0.1 in training mode"):
        SamBank.from_modules(reference, [noisy], 1.0)
    assert SamBank.from_modules(reference, [noisy.eval()], 1.0).slots == 1


def test_refuses_other_bad_arguments():
    reference, proxies = sams(2, ODD)
    bad = [
        (TypeError, "reference: expected an nn.Module, got str", ("sam", proxies, 1.0), {}),
        (TypeError, "proxies: expected a sequence of modules, got one Sam", (reference, reference, 1.0), {}),
        (TypeError, r"proxies\[1\]: expected an nn.Module, got int", (reference, [proxies[0], 3], 1.0), {}),
        (ValueError, "proxies: expected at least one module", (reference, [], 1.0), {}),
        (ValueError, r"alpha: expected a number or 2 of them, got shape \(3,\)", (reference, proxies, [1, 2, 3]), {}),
        (ValueError, "alpha: expected finite numbers, got nan for slot 1", (reference, proxies, [1, float("nan")]), {}),
        (TypeError, "alpha: expected a number or 2 of them, got 'x'", (reference, proxies, "x"), {}),
        (ValueError, "precision: expected one of .* got 'int8'", (reference, proxies, 1.0), {"precision": "int8"}),
        (ValueError, "'float64' expects torch.float64 modules", (reference, proxies, 1.0), {"precision": "float64"}),
        (ValueError, "'float32' expects torch.float32 modules", (Sam(**ODD).bfloat16(), proxies, 1.0), {}),
        (
            ValueError,
            "trainable bank is 'float32' or 'float64', got 'bfloat16'",
            (reference, proxies, 1.0),
            {"precision": "bfloat16", "trainable": True},
        ),
        (ValueError, "dtype torch.float64 instead of torch.float32", (reference, [Sam(**ODD).double()], 1.0), {}),
    ]
    for kind, message, args, options in bad:
        with pytest.raises(kind, match=message):
            SamBank.from_modules(*args, **options)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.7, [0.7, 0.7]),
        (1, [1, 1]),
        ([0.5, 2], [0.5, 2]),
        (torch.tensor([0.5, -1]), [0.5, -1]),
        (torch.ones(()), [1, 1]),
    ],
)
def test_alpha_is_one_number_or_one_per_slot(alpha, expected):
    bank = SamBank.from_modules(*sams(2, ODD), alpha)
    assert torch.equal(bank.alpha, torch.tensor(expected, dtype=torch.float32))


def test_only_a_trainable_bank_has_parameters():
    modules = sams(3, ODD)
    frozen = SamBank.from_modules(*modules, 1.0)
    trainable = SamBank.from_modules(*modules, 1.0, trainable=True)
    assert not list(frozen.parameters())
    names = dict(trainable.named_parameters())
    assert "alpha" in names and not any(name.startswith("reference") for name in names)
    assert all(parameter.shape[0] == 3 for parameter in names.values())
    assert len(names) == 1 + len(list(modules[0].parameters()))
    assert trainable.nbytes == frozen.nbytes


def test_a_bank_is_a_copy():
    reference, proxies = sams(2, ODD)
    bank = SamBank.from_modules(reference, proxies, torch.ones(2))
    args = inputs([0, 1], ODD)
    before = lasco_forward(args[0], args[1], bank, args[2])
    for module in (reference, *proxies):
        nn.init.zeros_(module.output.weight)
    exported = bank.export(0)
    nn.init.zeros_(exported.output.weight)
    assert torch.equal(lasco_forward(args[0], args[1], bank, args[2]), before)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("trainable", [False, True])
def test_export_gives_the_bits_back(precision, trainable):
    reference, proxies = sams(3, ODD, getattr(torch, precision), norm_first=True, final_norm=True)
    bank = SamBank.from_modules(reference, proxies, 1.0, precision=precision, trainable=trainable)
    for slot, proxy in enumerate(proxies):
        assert_same_state(bank.export(slot), state(proxy))
    target = copy.deepcopy(reference)
    assert bank.export(1, target) is target
    assert_same_state(target, state(proxies[1]))
    assert all(parameter.requires_grad for parameter in bank.export(0).parameters())


def test_export_of_bfloat16_gives_rounded_matrices():
    reference, proxies = sams(2, ODD)
    exported = SamBank.from_modules(reference, proxies, 1.0, precision="bfloat16").export(1)
    for (name, actual), expected in zip(exported.state_dict().items(), proxies[1].state_dict().values(), strict=True):
        matrix = expected.ndim == 2 and name != "position"
        assert torch.equal(actual, expected.bfloat16().float() if matrix else expected), name


@pytest.mark.parametrize("trainable", [False, True])
def test_replace_changes_one_slot(trainable):
    reference, proxies = sams(3, ODD)
    new = sams(1, ODD, seed=9)[1][0]
    bank = SamBank.from_modules(reference, proxies, [0.1, 0.2, 0.3], trainable=trainable)
    bank.replace(1, new)
    assert bank.alpha.tolist() == pytest.approx([0.1, 0.2, 0.3])
    bank.replace(1, new, alpha=1.5)
    assert bank.alpha.tolist() == pytest.approx([0.1, 1.5, 0.3])
    h_in, base_output, slot = inputs([0, 1, 2], ODD)
    expected = oracle(h_in, base_output, slot, reference, [proxies[0], new, proxies[2]], bank.alpha)
    torch.testing.assert_close(lasco_forward(h_in, base_output, bank, slot).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_failed_replace_or_export_changes_nothing():
    bank, _, proxies = bank_of(2, ODD)
    before = state(bank)
    wrong = Sam(**{**ODD, "layers": 2})
    untouched = state(wrong)
    for kind, message, slot, module, alpha in [
        (ValueError, r"slot: expected 0..1 \(the bank has 2 slots\), got 2", 2, proxies[0], None),
        (ValueError, "slot: expected 0..1 .* got -1", -1, proxies[0], None),
        (TypeError, "slot: expected an int, got float", 1.0, proxies[0], None),
        (TypeError, "slot: expected an int, got bool", True, proxies[0], None),
        (ValueError, "module: expected the architecture of the reference, got layers 2 instead of 3", 0, wrong, None),
        (ValueError, "module: expected its forward to compute", 0, Doubled(**ODD), None),
        (ValueError, "alpha: expected finite numbers, got inf", 0, proxies[1], float("inf")),
    ]:
        with pytest.raises(kind, match=message):
            bank.replace(slot, module, alpha)
        if alpha is None and not isinstance(module, Doubled):
            with pytest.raises(kind, match=message):
                bank.export(slot, module)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert_same_state(wrong, untouched)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_dict_and_copies_round_trip(precision):
    modules = sams(2, ODD)
    bank = SamBank.from_modules(*modules, [0.3, 0.4], precision=precision)
    args = inputs([1, 0], ODD)
    expected = lasco_forward(args[0], args[1], bank, args[2])
    other = SamBank.from_modules(*sams(2, ODD, seed=5), 1.0, precision=precision)
    assert not torch.equal(lasco_forward(args[0], args[1], other, args[2]), expected)
    other.load_state_dict(bank.state_dict())
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    for again in (other, copy.deepcopy(bank), torch.load(file, weights_only=False)):
        assert torch.equal(lasco_forward(args[0], args[1], again, args[2]), expected)
        assert_same_state(again.export(1), state(bank.export(1)))


def test_a_state_of_another_architecture_is_refused_before_anything_is_copied():
    bank, _, _ = bank_of(2, ODD)
    before = state(bank)
    other, _, _ = bank_of(2, {**ODD, "heads": 3})
    with pytest.raises(ValueError, match=r"expected a bank with .*\[2.0, .*got \[3.0"):
        bank.load_state_dict(other.state_dict())
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_its_dtype_is_fixed_and_its_device_is_not():
    bank, _, _ = bank_of(2, ODD)
    for change in (bank.half, bank.double, bank.bfloat16):
        with pytest.raises(TypeError, match=r"SamBank: its dtype is fixed .* expected torch.float32"):
            change()
    assert bank.alpha.dtype == torch.float32
    assert bank.to("cpu").float() is bank
    assert copy.deepcopy(bank).to("meta").device == torch.device("meta")


def test_the_random_state_is_left_alone():
    modules = sams(2, PAPER)
    before = torch.get_rng_state()
    SamBank.from_modules(*modules, 1.0).export(0)
    assert torch.equal(torch.get_rng_state(), before)
