"""The channel Transformer against PyTorch's own encoder, its sizes against the paper, its errors."""

import dataclasses

import pytest
import torch

from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig, parameter_count

CONFIGS = {
    "SAM": TransformerConfig.sam(),
    "pre-norm": TransformerConfig(tokens=8, features=16, layers=3, width=24, heads=3, feedforward=40, norm_first=True),
    "post-norm": TransformerConfig(tokens=5, features=6, layers=2, width=10, heads=5, feedforward=7),
    "one token": TransformerConfig(tokens=1, features=1, layers=1, width=1, heads=1, feedforward=1),
}


def build(config: TransformerConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> ChannelTransformer:
    """A model with every parameter random, those that start at 0 or 1 too."""
    torch.manual_seed(seed)
    model = ChannelTransformer(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(config: TransformerConfig, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, config.tokens, config.features, generator=generator, dtype=dtype)


def stack(model: ChannelTransformer, h_in: torch.Tensor) -> torch.Tensor:
    """The same weights through ``nn.TransformerEncoder``'s own forward."""
    return model.output(model.encoder(model.input(h_in) + model.position))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_the_encoder_stack(name, training, dtype, tolerance):
    config = CONFIGS[name]
    model = build(config, dtype).train(training)
    h_in = tokens(config, 4, dtype)
    with torch.set_grad_enabled(training):  # without gradients PyTorch takes its fused path: another implementation
        actual, expected = model(h_in), stack(model, h_in)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_gradients_equal_the_encoder_stack(name):
    config = CONFIGS[name]
    model = build(config, torch.float64)
    h_in = tokens(config, 3, torch.float64).requires_grad_()
    weight = torch.randn(3, config.tokens, config.features, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    actual = torch.autograd.grad((model(h_in) * weight).sum(), [h_in, *parameters])
    expected = torch.autograd.grad((stack(model, h_in) * weight).sum(), [h_in, *parameters])
    for parameter, a, e in zip(("h_in", *names), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, msg=lambda text, p=parameter: f"{p}: {text}")


@pytest.mark.parametrize("norm_first", [True, False])
def test_gradcheck(norm_first):
    config = TransformerConfig(tokens=3, features=4, layers=1, width=4, heads=2, feedforward=5, norm_first=norm_first)
    model = build(config, torch.float64, seed=1)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def forward(h_in: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (h_in,))

    inputs = [tokens(config, 2, torch.float64), *(parameter.detach() for parameter in parameters)]
    assert torch.autograd.gradcheck(forward, [x.requires_grad_() for x in inputs])


def test_samples_do_not_see_each_other():
    model = build(CONFIGS["pre-norm"]).eval()
    h_in = tokens(model.config, 5)
    alone = model(h_in)
    h_in[2] = torch.nan
    together = model(h_in)
    assert together[2].isnan().all()
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(together[kept], alone[kept])


def test_empty_batch_and_strided_input():
    model = build(CONFIGS["post-norm"]).eval()
    assert model(tokens(model.config, 0)).shape == (0, 5, 6)
    h_in = tokens(model.config, 8)
    torch.testing.assert_close(model(h_in[::2]), model(h_in)[::2])
    torch.testing.assert_close(model(h_in.mT.contiguous().mT), model(h_in))


def test_autocast_to_bfloat16():
    model = build(CONFIGS["SAM"]).eval()
    h_in = tokens(model.config, 4)
    exact = model(h_in)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(h_in)
    assert rounded.dtype == torch.bfloat16
    # 2^-9 relative per rounding; a few dozen of them in a row stay within 3 percent of the output's scale.
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_start_different(norm_first):
    torch.manual_seed(0)
    config = TransformerConfig(width=16, heads=2, feedforward=32, layers=3, norm_first=norm_first)
    first, second, third = ChannelTransformer(config).encoder.layers
    for name, parameter in first.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, dict(second.named_parameters())[name]), name
            assert not torch.equal(parameter, dict(third.named_parameters())[name]), name


def test_output_starts_well_scaled():
    """Unit-variance input gives an output of comparable scale, at the paper's depth too."""
    torch.manual_seed(0)
    config = TransformerConfig(layers=20, width=64, heads=8, feedforward=256, norm_first=True)
    with torch.no_grad():
        output = ChannelTransformer(config)(torch.randn(16, 32, 64))
    assert 0.1 < output.std().item() < 3


def test_same_seed_same_weights():
    first, second = (build(CONFIGS["SAM"], seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Sizes ----------------------------------------------------------------------------------------------------------------


def parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return parameter_count(ChannelTransformer(config))


def test_lam_of_the_paper_has_63_1_million_parameters():
    assert parameters(TransformerConfig.lam_paper()) == pytest.approx(63.1e6, rel=0.005)


def test_sam_of_the_paper_has_about_110_thousand_parameters():
    assert parameters(TransformerConfig.sam()) == pytest.approx(110e3, rel=0.01)


def test_laptop_lam_has_1_8_million_parameters():
    assert parameters(TransformerConfig.lam_laptop()) == pytest.approx(1.8e6, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameter_count_by_hand(config):
    d, ff = config.width, config.feedforward
    layer = (3 * d * d + 3 * d) + (d * d + d) + (d * ff + ff) + (ff * d + d) + 4 * d
    ends = (config.features * d + d) + config.tokens * d + (d * config.features + config.features)
    assert parameters(config) == config.layers * layer + ends + (2 * d if config.norm_first else 0)


def test_sam_presets_scale_with_width():
    config = TransformerConfig.sam(layers=4, width=128)
    assert (config.layers, config.width, config.feedforward, config.norm_first) == (4, 128, 512, False)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TransformerConfig)][:-1])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got {value}"):
        TransformerConfig(**{name: value})


def test_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="width: expected a multiple of heads=4, got 66"):
        TransformerConfig(width=66)


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 5), (2, 5, 7), (1, 2, 5, 6), ()])
def test_input_of_another_shape(shape):
    model = build(CONFIGS["post-norm"])
    with pytest.raises(ValueError, match=r"h_in: expected shape \[batch, 5, 6\], got \("):
        model(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_input_of_another_dtype(dtype):
    model = build(CONFIGS["post-norm"])
    with pytest.raises(TypeError, match=f"h_in: expected a real floating-point tensor, got {dtype}"):
        model(torch.ones(2, 5, 6, dtype=dtype))
