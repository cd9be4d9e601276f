"""The baselines of LLMCsiNet: sizes against its Table IV, what public weights compute, and that all of them learn."""

import math

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from csimodels.models.baselines import BASELINES, CLASSICAL, LABELS, codeword_length, codeword_values
from csimodels.models.crnet import CRNet, load_checkpoint
from csimodels.models.csinet import CsiNet
from csimodels.models.gcrnet import GCRNet
from csimodels.models.idasnet import IdasNet
from csimodels.models.largest_elements import LargestElements
from csimodels.models.llmcsinet import Codeword, compression_ratio
from csimodels.models.principal_components import PrincipalComponents
from csimodels.models.transindecnet import TransInDecNet

RATIOS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)
SMALL = {"delays": 8, "antennas": 8}
MAKERS = {
    "csinet": lambda: CsiNet(16, **SMALL),
    "crnet": lambda: CRNet(16, **SMALL),
    "idasnet": lambda: IdasNet(16, **SMALL),
    "transindecnet": lambda: TransInDecNet(16, feedforward=32, **SMALL),
    "gcrnet": lambda: GCRNet(16, patch=4, width=16, **SMALL),
    "pca": lambda: PrincipalComponents(16, **SMALL),
    "largest": lambda: LargestElements(16, **SMALL),
}
every = pytest.mark.parametrize("name", MAKERS)
learning = pytest.mark.parametrize("name", [name for name in MAKERS if name not in CLASSICAL])
autoencoders = pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("idasnet", "largest")])


def make(name, seed=0):
    torch.manual_seed(seed)
    return MAKERS[name]()


def samples(count=6, delays=8, antennas=8):
    h = torch.randn(count, 2, delays, antennas, generator=torch.Generator().manual_seed(1))
    return h * (delays * antennas / h.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()


# Sizes ----------------------------------------------------------------------------------------------------------------

# UE and BS, millions (Table IV). TransInDecNet's first pair is exchanged in the table, and its numbers are cut off.
TABLE_IV = {
    "crnet": [(0.52, 0.53), (0.26, 0.27), (0.13, 0.14), (0.07, 0.07)],
    "transindecnet": [(0.52, 0.80), (0.26, 0.54), (0.13, 0.41), (0.06, 0.34)],
    "gcrnet": [(0.52, 2.18), (0.26, 1.92), (0.13, 1.79), (0.07, 1.72)],
}


@pytest.mark.parametrize("ratio", range(4))
@pytest.mark.parametrize("name", TABLE_IV)
def test_sizes_are_those_of_table_4(name, ratio):
    model = BASELINES[name](RATIOS[ratio])
    sizes = (model.ue_parameters(), model.bs_parameters())
    for size, expected in zip(sizes, TABLE_IV[name][ratio], strict=True):
        if name == "transindecnet":
            assert math.floor(size / 1e4) / 100 == expected
        else:
            assert size / 1e6 == pytest.approx(expected, abs=0.005, rel=0.006)
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("ratio", RATIOS)
def test_sizes_of_idasnet_are_those_of_table_4_at_every_ratio(ratio):
    model = BASELINES["idasnet"](ratio)
    assert model.bs_parameters() == 3362
    # Table IV counts 3.16 k, with what is fixed; within a quarter of it.
    assert model.ue_parameters() == 2502 and abs(2502 / 3160 - 1) < 0.25


def test_sizes_of_csinet():
    model = BASELINES["csinet"](1 / 8)
    dense = 2048 * 256
    refine = 2 * 8 * 9 + 8 + 16 + 8 * 16 * 9 + 16 + 32 + 16 * 2 * 9 + 2 + 4
    assert model.ue_parameters() == dense + 256 + 2 * 2 * 9 + 2 + 4
    assert model.bs_parameters() == dense + 2048 + 2 * refine + 2 * 2 * 9 + 2


def test_codeword_lengths_are_those_of_table_2():
    assert [codeword_length(ratio) for ratio in RATIOS] == [256, 128, 64, 32]
    assert [codeword_values(ratio) for ratio in RATIOS] == [221, 111, 56, 28]
    m = codeword_values(1 / 4)
    assert compression_ratio(m) <= 1 / 4 < compression_ratio(m + 1)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.1, 1e-5, math.nan])
def test_ratios_out_of_range_are_refused(ratio):
    for name in BASELINES:
        with pytest.raises(ValueError, match="ratio: expected"):
            BASELINES[name](ratio)


def test_a_ratio_with_no_room_for_a_position_is_refused():
    assert codeword_length(1 / 1024) == 2
    with pytest.raises(ValueError, match="for values with positions, got"):
        codeword_values(1 / 1024)


def test_every_baseline_has_a_label():
    assert set(LABELS) == set(BASELINES) == set(MAKERS)


# The interface --------------------------------------------------------------------------------------------------------


@every
def test_a_codeword_is_all_that_the_decoder_needs(name):
    model, h = make(name).eval(), samples()
    with torch.no_grad():
        codeword = model.encode(h)
        decoded = model.decode(codeword)
        assert decoded.shape == h.shape and decoded.dtype == torch.float32
        assert torch.equal(model(h), decoded)
        # In evaluation no sample knows of another.
        torch.testing.assert_close(model(h[2:3]), decoded[2:3], rtol=1e-4, atol=1e-5)
    if isinstance(codeword, Codeword):
        assert codeword.values.shape == codeword.indices.shape == (6, 16) and codeword.mean.shape == (6,)
    else:
        assert codeword.shape == (6, 16) and codeword.dtype == torch.float32


@every
def test_empty_batches(name):
    model = make(name).eval()
    assert model(samples(0)).shape == (0, 2, 8, 8)


@learning
def test_it_learns(name):
    model = make(name)
    # Samples of a two-dimensional space, sparse as angle-delay channels are: well within 16 numbers.
    basis = torch.zeros(2, 2, 8, 8)
    basis[0, :, 1, 2:4], basis[1, :, 2, 5] = 4.0, 4.0
    h = torch.einsum("nk,kcda->ncda", torch.randn(32, 2, generator=torch.Generator().manual_seed(2)), basis)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(h) - h).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / h.square().mean().item())
    assert losses[-1] < 0.5 and losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@autoencoders
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda model: model.encode(samples().double()), TypeError, r"h: expected torch\.float32, got torch\.float64"),
        (
            lambda model: model.encode(samples()[0]),
            ValueError,
            r"h: expected shape \[batch, 2, 8, 8\], got \[2, 8, 8\]",
        ),
        (lambda model: model.encode(samples(6, 8, 9)), ValueError, r"got \[6, 2, 8, 9\]"),
        (lambda model: model.encode(None), TypeError, "NoneType"),
        (lambda model: model.decode(torch.zeros(3, 15)), ValueError, r"codeword: expected shape \[batch, 16\], got"),
        (lambda model: model.decode(torch.zeros(3, 16, dtype=torch.int64)), TypeError, "codeword: expected"),
    ],
)
def test_bad_input_is_named(name, call, error, message):
    with pytest.raises(error, match=message):
        call(make(name))


@pytest.mark.parametrize("model", [CsiNet, CRNet, TransInDecNet, GCRNet])
@pytest.mark.parametrize("length", [0, -1, 129])
def test_codeword_lengths_out_of_range_are_refused(model, length):
    with pytest.raises(ValueError, match=rf"codeword_length: expected 1 to 128 \(2 Nc Nt\), got {length}"):
        model(length, **SMALL)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: CRNet(4, delays=0), "delays, antennas"),
        (lambda: CRNet(4, scale=0.0), "scale"),
        (lambda: CsiNet(4, scale=math.inf), "scale"),
        (lambda: GCRNet(4, patch=5, **SMALL), "patch: expected a divisor of 8 delays"),
        (lambda: GCRNet(4, width=6), "width: expected a multiple of 4"),
        (lambda: TransInDecNet(4, heads=3, **SMALL), "heads that divide 16"),
        (lambda: IdasNet(0), "codeword_values"),
    ],
)
def test_bad_architectures_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# CRNet's public weights -----------------------------------------------------------------------------------------------


def public_shapes(m=32):
    """Convolutions of the public CRNet by their names; every one has a batch normalisation beside it."""
    shapes = {
        "encoder1.conv3x3_bn": (2, 2, 3, 3),
        "encoder1.conv1x9_bn": (2, 2, 1, 9),
        "encoder1.conv9x1_bn": (2, 2, 9, 1),
        "encoder2": (2, 2, 3, 3),
        "encoder_conv.conv1x1_bn": (2, 4, 1, 1),
        "decoder_feature.conv5x5_bn": (2, 2, 5, 5),
    }
    for block in ("CRBlock1", "CRBlock2"):
        shapes |= {
            f"decoder_feature.{block}.path1.conv3x3": (7, 2, 3, 3),
            f"decoder_feature.{block}.path1.conv1x9": (7, 7, 1, 9),
            f"decoder_feature.{block}.path1.conv9x1": (7, 7, 9, 1),
            f"decoder_feature.{block}.path2.conv1x5": (7, 2, 1, 5),
            f"decoder_feature.{block}.path2.conv5x1": (7, 7, 5, 1),
            f"decoder_feature.{block}.conv1x1": (2, 14, 1, 1),
        }
    entries = {"encoder_fc.weight": (m, 2048), "encoder_fc.bias": (m,)}
    entries |= {"decoder_fc.weight": (2048, m), "decoder_fc.bias": (2048,)}
    for name, shape in shapes.items():
        entries[f"{name}.conv.weight"] = shape
        entries |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
        entries[f"{name}.bn.num_batches_tracked"] = ()
    return entries


def public_state(m=32):
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in public_shapes(m).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        else:
            state[name] = torch.randn(shape, generator=generator) * (0.02 if "fc" in name else 0.3)
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    return state


def public_crnet(state, x):
    """The public network in evaluation, on images within [0, 1]."""

    def layer(name, value):
        weight = state[f"{name}.conv.weight"]
        value = F.conv2d(value, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
        entries = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(value, *entries, eps=1e-5)

    def chain(prefix, names, value):
        for name in names:
            value = layer(f"{prefix}.{name}", value if name == names[0] else F.leaky_relu(value, 0.3))
        return value

    wide = chain("encoder1", ["conv3x3_bn", "conv1x9_bn", "conv9x1_bn"], x)
    maps = F.leaky_relu(torch.cat([wide, layer("encoder2", x)], 1), 0.3)
    maps = F.leaky_relu(layer("encoder_conv.conv1x1_bn", maps), 0.3)
    codeword = F.linear(maps.flatten(1), state["encoder_fc.weight"], state["encoder_fc.bias"])
    image = F.linear(codeword, state["decoder_fc.weight"], state["decoder_fc.bias"]).view(x.shape)
    image = F.leaky_relu(layer("decoder_feature.conv5x5_bn", image), 0.3)
    for block in ("decoder_feature.CRBlock1", "decoder_feature.CRBlock2"):
        one = chain(f"{block}.path1", ["conv3x3", "conv1x9", "conv9x1"], image)
        two = chain(f"{block}.path2", ["conv1x5", "conv5x1"], image)
        merged = layer(f"{block}.conv1x1", F.leaky_relu(torch.cat([one, two], 1), 0.3))
        image = F.leaky_relu(image + merged, 0.3)
    return codeword, image.sigmoid()


def test_names_and_shapes_are_those_of_the_public_crnet():
    assert {name: tuple(value.shape) for name, value in CRNet(32).state_dict().items()} == public_shapes()


def test_a_public_checkpoint_of_crnet_computes_the_same(tmp_path):
    state = public_state()
    extra = {"total_ops": torch.zeros(1), "encoder_fc.total_params": torch.zeros(1)}
    torch.save({"epoch": 3, "state_dict": state | extra, "best_rho": 0.9}, tmp_path / "in_64.pth")
    model = CRNet(32, scale=1.0).eval()
    load_checkpoint(model, tmp_path / "in_64.pth")
    x = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    codeword, image = public_crnet(state, x)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x - 0.5), codeword, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x - 0.5) + 0.5, image, rtol=1e-4, atol=1e-5)
        # The scale is no more than a unit: images and codewords stay the same.
        wide = CRNet(32, scale=8.0).eval()
        wide.load_state_dict(state)
        torch.testing.assert_close(wide(8 * (x - 0.5)), 8 * (image - 0.5), rtol=1e-4, atol=1e-4)


def test_a_bare_state_dict_is_taken_too(tmp_path):
    torch.save(public_state(), tmp_path / "x.pth")
    load_checkpoint(model := CRNet(32), tmp_path / "x.pth")
    assert all(torch.equal(value, public_state()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "stored, message",
    [
        (lambda: public_state(64), "size mismatch"),
        (
            lambda: {name: value for name, value in public_state().items() if "encoder_fc" not in name},
            "encoder_fc.weight",
        ),
        (lambda: public_state() | {"other": torch.zeros(1)}, "other"),
        (lambda: {"model": public_state()}, "expected a state dict"),
        (lambda: [1, 2], "expected a state dict"),
        (lambda: {"state_dict": CRNet}, "expected a checkpoint of tensors and numbers"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, stored, message):
    torch.save(stored(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(CRNet(32), tmp_path / "x.pth")


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.pth"):
        load_checkpoint(CRNet(32), tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"text")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        load_checkpoint(CRNet(32), tmp_path / "x.pth")


# CsiNet's Keras weights -----------------------------------------------------------------------------------------------


def keras_arrays(m=32):
    """Layers and their arrays in Keras' order and shapes."""
    rng = np.random.default_rng(3)
    layers = []

    def conv(inputs, outputs):
        name = f"conv2d_{1 + sum(layer.startswith('conv') for layer, _ in layers)}"
        layers.append(
            (name, [("kernel", rng.normal(0, 0.3, (3, 3, inputs, outputs))), ("bias", rng.normal(0, 0.1, outputs))])
        )

    def batch_norm(maps):
        name = f"batch_normalization_{1 + sum(layer.startswith('batch') for layer, _ in layers)}"
        parts = ("gamma", "beta", "moving_mean", "moving_variance")
        layers.append((name, [(part, rng.uniform(0.2, 1.0, maps)) for part in parts]))
        layers.append((f"leaky_re_lu_{name[-1]}", []))

    def dense(inputs, outputs):
        name = f"dense_{1 + sum(layer.startswith('dense') for layer, _ in layers)}"
        layers.append(
            (name, [("kernel", rng.normal(0, 0.03, (inputs, outputs))), ("bias", rng.normal(0, 0.1, outputs))])
        )

    conv(2, 2)
    batch_norm(2)
    dense(2048, m)
    dense(m, 2048)
    for _ in range(2):
        for inputs, outputs in ((2, 8), (8, 16), (16, 2)):
            conv(inputs, outputs)
            batch_norm(outputs)
    conv(2, 2)
    return layers


def save_keras(path, layers, group=None):
    with h5py.File(path, "w") as file:
        root = file.create_group(group) if group else file
        root.attrs["layer_names"] = [name.encode() for name, _ in layers]
        for name, arrays in layers:
            names = [f"{name}/{part}:0" for part, _ in arrays]
            root.create_group(name).attrs["weight_names"] = np.array(names, dtype="S")
            for weight, (_, array) in zip(names, arrays, strict=True):
                root[name][weight] = array.astype(np.float32)
    return path


def keras_csinet(layers, x):
    """The authors' network in evaluation, on images within [0, 1], channels first."""
    stored = iter([torch.from_numpy(array.astype(np.float32)) for _, arrays in layers for _, array in arrays])

    def conv(value):
        return F.conv2d(value, next(stored).permute(3, 2, 0, 1), next(stored), padding=1)

    def batch_norm(value):
        scale, offset, mean, variance = (next(stored)[:, None, None] for _ in range(4))
        return scale * (value - mean) / (variance + 1e-3).sqrt() + offset

    def dense(value):
        return value @ next(stored) + next(stored)

    codeword = dense(F.leaky_relu(batch_norm(conv(x)), 0.3).flatten(1))
    image = dense(codeword).view(x.shape)
    for _ in range(2):
        maps = F.leaky_relu(batch_norm(conv(image)), 0.3)
        maps = F.leaky_relu(batch_norm(conv(maps)), 0.3)
        image = F.leaky_relu(image + batch_norm(conv(maps)), 0.3)
    return codeword, conv(image).sigmoid()


@pytest.mark.parametrize("group", [None, "model_weights"])
def test_keras_weights_of_csinet_compute_the_same(tmp_path, group):
    layers = keras_arrays()
    model = CsiNet(32, scale=1.0).eval()
    model.load_keras(save_keras(tmp_path / "model.h5", layers, group))
    x = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    codeword, image = keras_csinet(layers, x)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x - 0.5), codeword, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x - 0.5) + 0.5, image, rtol=1e-4, atol=1e-5)


def test_other_keras_files_are_refused(tmp_path):
    model = CsiNet(32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="none.h5"):
        model.load_keras(tmp_path / "none.h5")
    for path in (
        save_keras(tmp_path / "long.h5", keras_arrays(64)),
        save_keras(tmp_path / "cut.h5", keras_arrays()[:-1]),
    ):
        with pytest.raises(ValueError, match="expected arrays of"):
            model.load_keras(path)
    (tmp_path / "text.h5").write_bytes(b"text" * 100)
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    for name in ("text.h5", "empty.h5"):
        with pytest.raises(ValueError, match="expected weights saved by Keras"):
            model.load_keras(tmp_path / name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The other models -----------------------------------------------------------------------------------------------------


def test_tokens_of_transindecnet_are_delays():
    model = TransInDecNet(3, feedforward=8, delays=4, antennas=6, heads=2).eval()
    with torch.no_grad():
        for layer in model.layers:
            for part in (layer.self_attn.out_proj, layer.linear2):
                part.weight.zero_()
                part.bias.zero_()
        model.decoder_fc.weight.zero_()
        model.decoder_fc.bias.copy_(torch.arange(48.0))
        decoded = model.decode(torch.zeros(1, 3))
    # Delay d, part p, antenna a at 12 d + 6 p + a.
    assert decoded[0, 1, 3, 2] == 3 * 12 + 6 + 2 and decoded[0, 0, 1, 5] == 12 + 5


def test_the_layer_of_transindecnet_is_that_of_pytorch():
    model = TransInDecNet(16, feedforward=32, layers=2, **SMALL).eval()
    codeword = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.decoder_fc(codeword).view(5, 8, 16)
        for layer in model.layers:
            tokens = layer(tokens)
        torch.testing.assert_close(
            model.decode(codeword), torch.stack(tokens.chunk(2, dim=2), dim=1), rtol=1e-4, atol=1e-5
        )


def test_gcrnet_shares_the_encoder_of_crnet():
    torch.manual_seed(0)
    gcrnet, crnet = GCRNet(16, patch=4, width=16, **SMALL).eval(), CRNet(16, **SMALL).eval()
    state = gcrnet.state_dict()
    crnet.load_state_dict(
        {name: state.get(name, value) for name, value in crnet.state_dict().items() if "feature" not in name},
        strict=False,
    )
    with torch.no_grad():
        assert torch.equal(gcrnet.encode(samples()), crnet.encode(samples()))


def test_idasnet_sends_the_largest_elements_of_its_image():
    model = make("idasnet").eval()
    with torch.no_grad():
        codeword = model.encode(samples())
    magnitude = codeword.values.abs()
    assert (magnitude[:, :-1] >= magnitude[:, 1:]).all()
    assert model.config.prediction is False and model.prediction is None


# Classical methods ----------------------------------------------------------------------------------------------------


def test_the_largest_elements_are_sent_as_they_are():
    model, h = make("largest"), samples()
    values, indices, mean = model.encode(h)
    rows = h.flatten(1)
    expected = rows.abs().topk(16).indices
    assert torch.equal(indices.sort().values, expected.sort().values)
    assert torch.equal(values, rows.gather(1, indices))
    decoded = model.decode(model.encode(h)).flatten(1)
    torch.testing.assert_close(decoded.gather(1, indices), values)
    rest = torch.ones_like(rows, dtype=torch.bool).scatter(1, indices, False)
    torch.testing.assert_close(decoded[rest], mean[:, None].expand_as(rows)[rest])
    assert model.ue_parameters() == model.bs_parameters() == 0


@pytest.mark.parametrize("count", [1, 5, 16, 127, 128, 400])
def test_principal_components_are_the_best_projection(count):
    model = PrincipalComponents(16, **SMALL)
    # Unequal variances, in a basis that is not that of the elements.
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q
    rows = torch.randn(count, 128, generator=generator) * torch.linspace(3, 0.01, 128) @ basis
    h = rows.unflatten(1, (2, 8, 8))
    model.fit(h)
    error = (model(h) - h).square().sum().item()
    singular = torch.linalg.svdvals(rows.double())
    assert error == pytest.approx(singular[16:].square().sum().item(), rel=1e-4, abs=1e-3)
    assert model.ue_parameters() == model.bs_parameters() == 16 * 128
    # Coarser codewords are the first values of finer ones.
    finer = PrincipalComponents(20, **SMALL)
    finer.fit(h)
    torch.testing.assert_close(finer.components.weight[:16], model.components.weight)


def test_principal_components_need_samples():
    with pytest.raises(ValueError, match="h: expected at least one sample, got none"):
        make("pca").fit(samples(0))
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 2, 8, 8\]"):
        make("pca").fit(samples(4, 8, 9))


@pytest.mark.parametrize("name", ["crnet", "gcrnet"])
def test_the_first_output_is_small(name):
    model, h = make(name), samples(64)
    error = (model(h) - h).square().sum() / h.square().sum()
    assert 1 < error < 1.3


@pytest.mark.parametrize("name", ["csinet", "crnet", "gcrnet"])
def test_the_gain_is_one_for_public_checkpoints_and_the_unit_of_h_otherwise(name):
    maker = {"csinet": CsiNet, "crnet": CRNet, "gcrnet": GCRNet}[name]
    assert maker(4, scale=1.0).gain == 1
    assert maker(4).gain == 4 / 64
    assert maker(4, gain=0.5).gain == 0.5
    maps = torch.tensor([0.01, -0.02])
    torch.testing.assert_close(maker(4)._from_maps(maps), maps, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="gain: expected a positive number, got 0"):
        maker(4, gain=0)
