"""LLMCsiNet against its equations written out, the paper's tables, its ablations, and input at the edge of sense."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_llmcsinet import BACKBONE, CONFIG, build, csi
from torch.nn import functional as F

import csikernels
from csimodels.models.llmcsinet import (
    PAPER_CODEWORD_VALUES,
    BackboneConfig,
    Codeword,
    LlmCsiNet,
    LlmCsiNetConfig,
    codeword_bits,
    compression_ratio,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_models")

# The paper's tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "millions"), [("S", 19.85), ("M", 59.21), ("L", 118.24)])
def test_parameters_of_table_iv(variant, millions):
    with torch.device("meta"):
        model = LlmCsiNet(LlmCsiNetConfig(backbone=BackboneConfig.gpt2_large(6)).variant(variant))
    assert model.bs_parameters() == pytest.approx(millions * 1e6, rel=0.005)
    assert model.ue_parameters() == pytest.approx(3160, rel=0.25)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.ue_parameters() + model.bs_parameters()
    assert model.ue_parameters() == (18 * 64 + 64) + 2 * 64 + (9 * 64 * 2 + 2) + 2 * 2


def test_preliminary_decoder_has_the_3_36_thousand_parameters_of_table_iv():
    assert sum(parameter.numel() for parameter in build().preliminary_decoder.parameters()) == 3362


@pytest.mark.parametrize(("inverse", "bits"), [(8, 16_418), (16, 8_278), (32, 4_208), (64, 2_136)])
def test_bits_of_table_ii(inverse, bits):
    m = PAPER_CODEWORD_VALUES[inverse]
    assert codeword_bits(m) == bits
    assert compression_ratio(m) == bits / (64 * 2048)
    assert compression_ratio(m) == pytest.approx(1 / inverse, rel=0.05)


def test_compression_ratio_of_other_sizes():
    assert compression_ratio(10, 4, 8, value_bits=32, index_bits=6) == (32 * 11 + 6 * 10) / (32 * 64)


@pytest.mark.parametrize("arguments", [(0, 64, 10), (1, 0, 10), (1, 64, -1)])
def test_bits_of_nothing(arguments):
    with pytest.raises(ValueError, match="m, value_bits, index_bits: expected at least 1, 1 and 0, got"):
        codeword_bits(*arguments)


# Encoder --------------------------------------------------------------------------------------------------------------


def image_written_out(model: LlmCsiNet, h: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The self-information image [B, 2, Nc, Nt] and the order of all elements [B, 2 Nc Nt], float64."""
    encoder, config = model.encoder, model.config
    scale = h.square().mean((1, 2, 3), keepdim=True).sqrt()
    x = h / scale
    information = csikernels.self_information(x, bandwidth=config.bandwidth, radius=config.radius).flatten(1)
    order = information.sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(information).scatter(1, order[:, :kept], 1).view(h.shape)
    mask = mask[:, :1].maximum(mask[:, 1:])

    def layer(part: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        convolution, norm, _ = part
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return torch.where(x >= 0, x, 0.3 * x)

    return layer(encoder.image, layer(encoder.extract, x) * mask) * scale, order


@pytest.mark.parametrize("m", [1, 20, 48, 100, 192])
def test_codeword_is_the_masked_image_at_the_most_informative_elements(m):
    model = build(dtype=torch.float64)
    h = csi(5, dtype=torch.float64)
    image, order = image_written_out(model, h, max(m, 48))  # a quarter of 192 elements is kept
    values, indices, mean = model.encode(h, m)
    assert torch.equal(indices, order[:, :m])
    torch.testing.assert_close(values, image.flatten(1).gather(1, indices), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, h.mean((1, 2, 3)))


def test_a_mask_by_magnitude_sends_the_largest_elements_themselves():
    model = build(mask="magnitude")
    h = csi(5)
    values, indices, mean = model.encode(h)
    expected = h.flatten(1).abs().sort(dim=1, descending=True, stable=True).indices[:, :20]
    assert torch.equal(indices, expected)
    assert torch.equal(values, h.flatten(1).gather(1, indices))
    torch.testing.assert_close(mean, h.mean((1, 2, 3)))
    assert model.ue_parameters() == 0


def test_without_any_network_the_mean_surrounds_what_was_sent():
    model = build(mask="magnitude", preliminary=False, prediction=False)
    h = csi(3)
    codeword = model.encode(h)
    filled = h.mean((1, 2, 3))[:, None].expand(-1, 192).scatter(1, codeword.indices, codeword.values)
    torch.testing.assert_close(model(h).flatten(1), filled)
    assert not list(model.parameters())
    with pytest.raises(TypeError, match=r"h: expected torch\.float32, got torch\.float64"):
        model.encode(h.double())
    assert model.double()(h.double()).dtype == torch.float64


def test_started_as_the_identity_the_image_is_the_masked_channel():
    torch.manual_seed(0)
    model = LlmCsiNet(dataclasses.replace(CONFIG, keep_fraction=1.0, prediction=False)).double()
    model.start_as_identity()
    h = csi(64, dtype=torch.float64)
    x = h / h.square().mean((1, 2, 3), keepdim=True).sqrt()
    image = model.encoder.image(model.encoder.extract(x))  # in training: batch statistics
    whitened = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(image, F.leaky_relu(whitened, 0.3), atol=0.02, rtol=0.02)


def test_started_as_the_identity_the_preliminary_decoder_hands_on_what_was_filled_in():
    torch.manual_seed(0)
    model = LlmCsiNet(dataclasses.replace(CONFIG, mask="magnitude", prediction=False))
    model.start_as_identity()
    h = csi(4)
    plain = LlmCsiNet(dataclasses.replace(CONFIG, mask="magnitude", preliminary=False, prediction=False))
    torch.testing.assert_close(model(h), plain(h), atol=1e-5, rtol=1e-5)
    loss = (model(h) - h).square().sum()
    loss.backward()
    gradients = [parameter.grad.abs().sum() for parameter in model.preliminary_decoder.refine.parameters()]
    assert sum(bool(gradient > 0) for gradient in gradients) >= 4  # the last normalisations open the way for the rest


def test_selection_by_the_image_takes_its_largest_values():
    model = build(dtype=torch.float64, selection="image")
    h = csi(5, dtype=torch.float64)
    image, _ = image_written_out(model, h, 48)
    values, indices, _ = model.encode(h)
    largest = image.flatten(1).abs().sort(1, descending=True).values[:, :20]
    torch.testing.assert_close(values.abs(), largest, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, image.flatten(1).gather(1, indices), rtol=1e-10, atol=1e-12)


def test_encoder_trains_through_the_values():
    """The gradient against finite differences, in float64 and away from changes of the selection."""
    model = build(dtype=torch.float64, features=2)
    h = csi(2, dtype=torch.float64)
    parameters = dict(model.encoder.named_parameters())

    def values(*tensors: torch.Tensor) -> torch.Tensor:
        replaced = {f"encoder.{name}": tensor for name, tensor in zip(parameters, tensors, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(model, replaced):
            return model.encode(h, 5).values

    assert torch.autograd.gradcheck(values, [p.detach().clone().requires_grad_() for p in parameters.values()])


def test_every_parameter_gets_a_gradient():
    model = build().train()
    model(csi(3)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_number_of_elements_per_sample_gives_what_each_alone_gives():
    model = build()
    h = csi(4)
    m = torch.tensor([20, 3, 150, 1])
    together = model.encode(h, m)
    reconstruction = model.decode(together)
    assert together.values.shape == (4, 150)
    for i, count in enumerate(m.tolist()):
        alone = model.encode(h[i : i + 1], count)
        torch.testing.assert_close(together.values[i, :count], alone.values[0])
        assert torch.equal(together.indices[i, :count], alone.indices[0])
        assert (together.values[i, count:] == together.values[i, 0]).all()
        torch.testing.assert_close(reconstruction[i], model.decode(alone)[0], rtol=1e-4, atol=1e-5)


def test_random_neighbours_are_nine_others_within_the_radius_and_depend_on_the_seed():
    first, same, other = (build(neighbours="random", seed=seed).encoder.offsets for seed in (1, 1, 2))
    model = LlmCsiNet(dataclasses.replace(CONFIG, neighbours="random", seed=9))
    assert model.encoder.offsets != first
    assert first == same
    for offsets in (first, other):
        assert len(set(offsets)) == 9
        assert (0, 0) not in offsets
        assert all(max(abs(row), abs(column)) <= 2 for row, column in offsets)
    h = csi(2)
    expected = csikernels.select_informative(
        h / h.square().mean((1, 2, 3), keepdim=True).sqrt(), 20, bandwidth=1.0, offsets=model.encoder.offsets
    )[1]
    assert torch.equal(model.eval().encode(h).indices, expected)


# Decoder --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_decoder_written_out(causal, residual):
    backbone = dataclasses.replace(BACKBONE, attention="causal" if causal else "bidirectional")
    model = build(dtype=torch.float64, backbone=backbone, residual=residual)
    codeword = model.encode(csi(3, dtype=torch.float64), 11)
    scale = codeword.values.square().mean(1).sqrt()[:, None, None, None]
    filled = codeword.mean[:, None].repeat(1, 192).scatter(1, codeword.indices, codeword.values).view(3, 2, 8, 12)
    x = filled / scale
    for network in model.preliminary_decoder.refine:
        x = F.leaky_relu(x + network.convolutions(x), 0.3)
    preliminary = model.preliminary_decoder.output(x)
    torch.testing.assert_close(model.preliminary(codeword), preliminary * scale)

    part = model.prediction
    mean, deviation = preliminary.mean((1, 2, 3), keepdim=True), preliminary.std((1, 2, 3), correction=0, keepdim=True)
    x = (preliminary - mean) / deviation
    patches = [x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1) for i in range(2) for j in range(3)]
    tokens = torch.stack(patches, 1) @ part.tokenise.weight.flatten(1).T + part.tokenise.bias + part.position
    extra = part.class_token.expand(3, 1, -1)
    tokens = part.backbone(torch.cat([tokens, extra] if causal else [extra, tokens], 1))
    tokens = part.output(tokens[:, :-1] if causal else tokens[:, 1:]).view(3, 6, 2, 4, 4)
    rows = [torch.cat([tokens[:, 3 * i + j] for j in range(3)], 3) for i in range(2)]
    expected = torch.cat(rows, 2) * deviation + (preliminary if residual else mean)
    torch.testing.assert_close(model.decode(codeword), expected * scale, rtol=1e-8, atol=1e-10)


def test_forward_decodes_what_encode_gives():
    model, h = build(), csi(3)
    assert torch.equal(model(h, 7), model.decode(model.encode(h, 7)))
    assert torch.equal(model(h), model.decode(model.encode(h, 20)))


@pytest.mark.parametrize("factor", [1e-12, 3e-3, 1e7])
def test_scaling_the_channel_scales_the_reconstruction(factor):
    model, h = build(), csi(3)
    torch.testing.assert_close(model(factor * h) / factor, model(h), rtol=1e-4, atol=1e-5)


def test_without_scale_invariance_the_scale_matters():
    model, h = build(scale_invariant=False), csi(3)
    assert (model(10 * h) / 10 - model(h)).abs().max() > 1e-3


def test_autocast_to_bfloat16():
    model, h = build(), csi(3)
    exact = model(h)
    with torch.autocast("cpu", torch.bfloat16):
        codeword = model.encode(h)
        rounded = model.decode(codeword)
    assert codeword.values.dtype == codeword.mean.dtype == torch.float32
    assert torch.equal(codeword.indices, model.encode(h).indices)  # the ranking is not rounded
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_samples_do_not_see_each_other():
    model, h = build(), csi(4)
    alone = torch.cat([model(h[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(h), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("delays", "antennas"), [(9, 13), (3, 4), (8, 5), (33, 7)])
def test_sizes_that_patches_do_not_divide(delays, antennas):
    model = build(delays=delays, antennas=antennas)
    h = csi(2, model.config)
    output = model(h)
    assert output.shape == h.shape
    assert output.isfinite().all()
    grid = math.ceil(delays / 4), math.ceil(antennas / 4)
    assert model.prediction.position.shape == (grid[0] * grid[1], 16)


def test_narrow_convolution_equals_the_plain_one():
    model = build(dtype=torch.float64)
    convolution = model.encoder.image[0]
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    inputs = [x, convolution.weight, convolution.bias]
    actual, expected = convolution(x), F.conv2d(x, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(actual, expected)
    for got, wanted in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


# Ablations and training switches --------------------------------------------------------------------------------------


def test_random_mask_sends_elements_of_the_channel_itself():
    model, h = build(mask="random"), csi(3)
    values, indices, _ = model.encode(h)
    assert torch.equal(values, h.flatten(1).gather(1, indices))
    assert all(len(set(row.tolist())) == 20 for row in indices)
    assert not torch.equal(indices[0], indices[1])
    assert model.ue_parameters() == 0
    assert model.stage1_modules() == [model.preliminary_decoder]


def test_random_mask_repeats_in_evaluation_and_not_in_training():
    model, h = build(mask="random"), csi(3)
    assert torch.equal(model.encode(h).indices, model.encode(h).indices)
    assert torch.equal(model.encode(h).indices[:1], model.encode(h[:1]).indices)
    model.train()
    assert not torch.equal(model.encode(h).indices, model.encode(h).indices)
    seeded = [model.encode(h, generator=torch.Generator().manual_seed(4)).indices for _ in range(2)]
    assert torch.equal(*seeded)


def test_without_preliminary_decoder_the_filled_matrix_is_predicted_from():
    model, h = build(preliminary=False), csi(2)
    codeword = model.encode(h)
    filled = csikernels.scatter_codeword(*codeword, (2, 8, 12))
    torch.testing.assert_close(model.preliminary(codeword), filled)
    assert model.bs_parameters() == sum(p.numel() for p in model.prediction.parameters())
    assert model.stage1_modules() == [model.encoder]


def test_without_prediction_the_preliminary_reconstruction_is_the_last():
    model, h = build(prediction=False), csi(2)
    assert torch.equal(model(h), model.preliminary(model.encode(h)))
    assert model.bs_parameters() == 3362


def test_freezing_stage_1_stops_its_gradients_and_its_statistics():
    model, h = build(), csi(6)
    model.freeze_stage1(True)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(h).square().mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"prediction"}
    model.freeze_stage1(False)
    assert all(module.training for module in model.modules())
    model(h).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(model.encoder.extract[1].running_mean, before["encoder.extract.1.running_mean"])


def test_variants_differ_in_layers_only():
    for name, layers in (("S", 1), ("M", 3), ("L", 6)):
        variant = CONFIG.variant(name)
        assert variant.backbone.layers == layers
        assert dataclasses.replace(variant, backbone=BACKBONE) == CONFIG
    with pytest.raises(ValueError, match="variant: expected one of S, M, L, got 'XL'"):
        CONFIG.variant("XL")


def test_digest_tells_incompatible_configurations_apart():
    assert len(CONFIG.digest()) == 8
    same = dataclasses.replace(
        CONFIG, codeword_values=3, backbone=dataclasses.replace(BACKBONE, source="somewhere/else")
    )
    assert same.digest() == CONFIG.digest()
    for change in ({"radius": 1}, {"antennas": 16}, {"backbone": dataclasses.replace(BACKBONE, layers=2)}):
        assert dataclasses.replace(CONFIG, **change).digest() != CONFIG.digest()


def test_configuration_survives_json():
    import json

    stored = json.loads(json.dumps(dataclasses.asdict(build(quantizer_levels=8).config)))
    assert LlmCsiNetConfig.from_dict(stored) == dataclasses.replace(CONFIG, quantizer_levels=8)


def test_quantiser_travels_in_the_state_dict():
    first, second = build(quantizer_levels=8), build(quantizer_levels=8, seed=1)
    first.quantizer.fit(torch.randn(100))
    second.load_state_dict(first.state_dict())
    assert second.quantizer.fitted
    assert torch.equal(first.quantizer.levels, second.quantizer.levels)
    assert second.ue_parameters() + second.bs_parameters() == sum(p.numel() for p in second.parameters())


# Input at the edge of sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_all_zero_channel_is_reconstructed_as_zero(training):
    model = build().train(training)
    h = csi(3)
    h[1] = 0
    codeword = model.encode(h, 6)
    assert codeword.indices[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert (codeword.values[1] == 0).all()
    assert codeword.mean[1] == 0
    output = model.decode(codeword)
    assert (output[1] == 0).all()
    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [1.0, -1e-9, 1e9])
def test_constant_channel_is_defined_and_repeatable(value):
    model = build()
    h = torch.full((2, 2, 8, 12), value)
    output = model(h)
    assert output.isfinite().all()
    assert torch.equal(output[0], output[1])
    assert model.encode(h, 4).indices[0].tolist() == [0, 1, 10, 11]  # of the border, whose neighbours are padding


def test_empty_batch():
    model = build()
    codeword = model.encode(torch.zeros(0, 2, 8, 12))
    assert codeword.values.shape == codeword.indices.shape == (0, 20)
    assert model.decode(codeword).shape == (0, 2, 8, 12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", ["self_information", "random"])
def test_channel_that_is_not_finite_is_refused_with_its_sample(value, mask):
    h = csi(5)
    h[3, 1, 2, 3] = value
    with pytest.raises(ValueError, match="h: expected finite numbers, sample 3 has NaN or infinite elements"):
        build(mask=mask).encode(h)


@pytest.mark.parametrize("m", [0, -2, 193])
def test_m_out_of_range(m):
    model = build()
    with pytest.raises(ValueError, match=f"m: expected 1 to 192, the elements of a sample, got {m}"):
        model.encode(csi(2), m)
    with pytest.raises(ValueError, match=f"m: expected 1 to 192, the elements of a sample, got {m}"):
        model.encode(csi(2), torch.tensor([5, m]))
    with pytest.raises(ValueError, match=rf"codeword_values: expected 1 to 192 \(2 \* 8 \* 12\), got {m}"):
        dataclasses.replace(CONFIG, codeword_values=m)


def test_m_of_another_kind():
    model = build()
    for wrong in (2.5, "3", True):
        with pytest.raises(TypeError, match="m: expected an integer or an int64 tensor, got"):
            model.encode(csi(2), wrong)
    with pytest.raises(ValueError, match=r"m: expected int64 \[2\], one per sample, got torch.int64 \[3\]"):
        model.encode(csi(2), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(("delays", "antennas"), [(3, 32), (32, 3), (1, 1)])
def test_array_smaller_than_the_radius(delays, antennas):
    message = f"radius: expected less than the array, which has {delays} delays and {antennas} antennas, got 3"
    with pytest.raises(ValueError, match=message):
        LlmCsiNetConfig(delays=delays, antennas=antennas, codeword_values=1, radius=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delays": 0}, "delays: expected at least 1, got 0"),
        ({"patch": 0}, "patch: expected at least 1, got 0"),
        ({"bandwidth": 0.0}, "bandwidth: expected a finite positive number, got 0.0"),
        ({"bandwidth": math.nan}, "bandwidth: expected a finite positive number, got nan"),
        ({"keep_fraction": 0.0}, "keep_fraction: expected above 0 to 1, got 0.0"),
        ({"keep_fraction": 1.5}, "keep_fraction: expected above 0 to 1, got 1.5"),
        ({"neighbours": "all"}, "neighbours: expected 'grid' or 'random', got 'all'"),
        ({"selection": "best"}, "selection: expected 'information' or 'image', got 'best'"),
        ({"mask": "none"}, "mask: expected 'self_information' or 'random' or 'magnitude', got 'none'"),
        ({"preliminary": False, "prediction": False}, "expected at least one of them to be True for a self-info"),
    ],
)
def test_configuration_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("shape", [(2, 8, 12), (1, 2, 12, 8), (1, 1, 8, 12)])
def test_channel_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 2, 8, 12\], got \["):
        build().encode(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_channel_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=f"h: expected torch.float32, got {dtype}"):
        build().encode(torch.ones(1, 2, 8, 12, dtype=dtype))


def test_codeword_that_is_none():
    model = build()
    with pytest.raises(ValueError, match=r"codeword.values: expected shape \[batch, 1 to 192\], got \[2, 0\]"):
        model.decode(Codeword(torch.ones(2, 0), torch.ones(2, 0, dtype=torch.int64), torch.ones(2)))
    with pytest.raises(ValueError, match="indices: expected 0..191"):
        model.decode(Codeword(torch.ones(1, 1), torch.full((1, 1), 192), torch.ones(1)))
