"""Tokens and the random projection codec (LASCO, eqs. 9 to 11) against float64."""

import math

import numpy as np
import pytest
import torch
from tiny_training import CELL, CODEC

from csimodels.channels.environment import Environment
from csimodels.channels.rays import normalize_power
from csimodels.models.projection import CodecConfig, RandomProjectionCodec, from_tokens, to_tokens


def channels(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec() -> RandomProjectionCodec:
    return RandomProjectionCodec(CODEC)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_a_token_is_one_subcarrier():
    h = torch.tensor([[1 + 2j, 3 + 4j, 5 + 6j], [7 + 8j, 9 + 10j, 11 + 12j]])  # 2 antennas, 3 subcarriers
    expected = torch.tensor([[1.0, 7.0, 2.0, 8.0], [3.0, 9.0, 4.0, 10.0], [5.0, 11.0, 6.0, 12.0]])
    assert torch.equal(to_tokens(h), expected)


@pytest.mark.parametrize("shape", [(4, 6), (5, 4, 6), (2, 3, 1, 7), (0, 4, 6), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_tokens_round_trip(shape, dtype):
    h = channels(*shape, dtype=dtype)
    tokens = to_tokens(h)
    assert tokens.shape == (*shape[:-2], shape[-1], 2 * shape[-2])
    back = from_tokens(tokens)
    assert back.dtype == dtype
    assert torch.equal(back, h)


def test_tokens_of_a_strided_tensor():
    h = channels(6, 4, 3).mT[:, ::2]
    assert torch.equal(to_tokens(h), to_tokens(h.clone()))
    assert torch.equal(from_tokens(to_tokens(h)), h)


def test_tokens_keep_the_power():
    h = channels(5, 4, 6)
    torch.testing.assert_close(to_tokens(h).square().sum(), h.abs().square().sum())


@pytest.mark.parametrize("h", [torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(3) + 0j])
def test_tokens_refuse(h):
    with pytest.raises(TypeError, match=r"h: expected a complex tensor \[\.\.\., antenna, subcarrier\], got"):
        to_tokens(h)


def test_from_tokens_refuses():
    with pytest.raises(ValueError, match=r"tokens: expected shape .*2 \* antenna\], got \(4, 5\)"):
        from_tokens(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"tokens: .*got \(4,\)"):
        from_tokens(torch.randn(4))
    with pytest.raises(TypeError, match=r"tokens: expected a real floating-point tensor, got torch\.complex64"):
        from_tokens(channels(4, 6))


# The projection -------------------------------------------------------------------------------------------------------


def test_projection_has_variance_1_over_m():
    config = CodecConfig(codeword_length=128)
    a = RandomProjectionCodec(config).projection.double()
    assert a.shape == (128, 2048)
    entries = a.numel()
    # Of n normal draws the mean has deviation 1/sqrt(n), the variance sqrt(2/n), the kurtosis sqrt(24/n): five of each.
    normal = a.flatten() * math.sqrt(128)
    assert abs(normal.mean()) < 5 / math.sqrt(entries)
    assert abs(normal.square().mean() - 1) < 5 * math.sqrt(2 / entries)
    assert abs(normal.pow(4).mean() - 3) < 5 * math.sqrt(96 / entries)
    # Rows are independent: off the diagonal, A A^T has deviation sqrt(2048) / 128.
    gram = a @ a.T - torch.diag((a @ a.T).diagonal())
    assert gram.abs().max() < 6 * math.sqrt(2048) / 128


def test_projection_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = RandomProjectionCodec(CODEC).projection
    torch.manual_seed(2)
    torch.randn(10)
    assert torch.equal(RandomProjectionCodec(CODEC).projection, first)
    other = RandomProjectionCodec(CodecConfig(8, 8, CODEC.codeword_length, seed=1)).projection
    assert not torch.isclose(other, first).any()


def test_making_a_codec_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    RandomProjectionCodec(CODEC)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("length", [1, 32, 127, 128])
def test_pseudo_inverse(length):
    codec = RandomProjectionCodec(CodecConfig(8, 8, length))
    a, inverse = codec.projection.double(), codec.pseudo_inverse.double()
    assert inverse.shape == (128, length)
    # The four Penrose conditions; a square Gaussian matrix is the worst conditioned, and float32 storage is the error.
    tolerance = 1e-6 * torch.linalg.cond(a).item()
    torch.testing.assert_close(a @ inverse, torch.eye(length, dtype=torch.float64), rtol=0, atol=tolerance)
    projector = inverse @ a
    torch.testing.assert_close(projector, projector.T, rtol=0, atol=tolerance)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=tolerance)
    assert projector.trace().item() == pytest.approx(length, rel=1e-3)


def oracle(codec: RandomProjectionCodec, h: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Eqs. 9 and 11 in float64, sample by sample: codeword [batch, M] and H_in [batch, antenna, subcarrier]."""
    a = codec.projection.double().numpy()
    vectors = np.array(
        [
            np.concatenate([np.concatenate([sample[:, k].real, sample[:, k].imag]) for k in range(sample.shape[1])])
            for sample in h.to(torch.complex128).numpy()
        ]
    )
    codeword = vectors @ a.T
    estimate = codeword @ np.linalg.pinv(a).T
    antennas = h.shape[1]
    tokens = estimate.reshape(len(h), h.shape[2], 2 * antennas)
    return codeword, (tokens[..., :antennas] + 1j * tokens[..., antennas:]).transpose(0, 2, 1)


@pytest.mark.parametrize(
    "config", [CODEC, CodecConfig(3, 5, 7), CodecConfig(32, 32, 100, seed=4), CodecConfig(1, 1, 2)]
)
def test_codec_against_float64(config):
    codec = RandomProjectionCodec(config)
    h = normalize_power(channels(9, config.antennas, config.subcarriers))
    codeword, estimate = oracle(codec, h)
    actual = codec.encode(h)
    assert actual.dtype == torch.float32
    assert actual.shape == (9, config.codeword_length)
    np.testing.assert_allclose(actual.numpy(), codeword, rtol=0, atol=1e-5 * np.abs(codeword).max())
    h_in = codec.initial(actual)
    assert h_in.dtype == torch.float32
    assert h_in.shape == (9, config.subcarriers, 2 * config.antennas)
    gamma = 2 * config.antennas * config.subcarriers / config.codeword_length
    assert config.compression == gamma  # eq. 10
    np.testing.assert_allclose(
        codec.to_channel(h_in).numpy(), estimate * math.sqrt(gamma), rtol=0, atol=1e-4 * np.abs(estimate).max()
    )


def test_h_in_has_the_same_codeword(codec):
    """A A^+ = 1: what the BS starts from explains all that it was sent."""
    h = normalize_power(channels(20, 8, 8))
    codeword = codec.encode(h)
    again = codec.encode(codec.to_channel(codec.initial(codeword))) / math.sqrt(CODEC.compression)
    torch.testing.assert_close(again, codeword, rtol=0, atol=1e-4)


def test_full_length_codeword_loses_nothing():
    codec = RandomProjectionCodec(CodecConfig(8, 8, 128))
    h = normalize_power(channels(4, 8, 8))
    back = codec.to_channel(codec.initial(codec.encode(h)))
    condition = torch.linalg.cond(codec.projection.double()).item()
    torch.testing.assert_close(back, h, rtol=0, atol=1e-6 * condition)


def test_network_units_have_unit_variance(codec):
    h = normalize_power(Environment(CELL, 3, seed=1).sample(2000))
    target = codec.target(h)
    # Exact for every sample: power Nt Nc over 2 Nt Nc reals, times the scale's 2.
    torch.testing.assert_close(target.square().mean(dim=(1, 2)), torch.ones(2000), rtol=1e-5, atol=0)
    # H_in keeps M of 2 Nt Nc dimensions; for isotropic H the scale gives their missing energy back on average.
    isotropic = normalize_power(channels(4000, 8, 8))
    power = codec.initial(codec.encode(isotropic)).square().mean()
    # Projected energy is Beta distributed with mean M / 2NtNc: a relative deviation of 0.2 per sample here.
    assert power.item() == pytest.approx(1.0, abs=5 * 0.22 / math.sqrt(4000))


def test_target_and_channel_are_inverse(codec):
    h = normalize_power(channels(6, 8, 8))
    back = codec.to_channel(codec.target(h))
    assert back.dtype == torch.complex64
    torch.testing.assert_close(back, h, rtol=1e-6, atol=1e-7)


def test_double_precision_channels_are_taken(codec):
    h = channels(4, 8, 8, dtype=torch.complex128)
    assert codec.encode(h).dtype == torch.float32
    torch.testing.assert_close(codec.encode(h), codec.encode(h.to(torch.complex64)), rtol=1e-4, atol=1e-5)


def test_a_quantised_codeword_is_taken(codec):
    codeword = codec.encode(channels(4, 8, 8)).bfloat16()
    assert torch.equal(codec.initial(codeword), codec.initial(codeword.float()))


def test_empty_batch(codec):
    codeword = codec.encode(channels(0, 8, 8))
    assert codeword.shape == (0, 32)
    assert codec.to_channel(codec.initial(codeword)).shape == (0, 8, 8)


def test_strided_channels(codec):
    h = channels(8, 8, 6).mT.expand(-1, -1, -1)
    codec = RandomProjectionCodec(CodecConfig(6, 8, 16))
    torch.testing.assert_close(codec.encode(h), codec.encode(h.contiguous()))
    torch.testing.assert_close(codec.encode(h[::2]), codec.encode(h)[::2])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -1, 2049])
def test_codeword_length_out_of_range(length):
    with pytest.raises(ValueError, match=rf"codeword_length: expected 1 to 2048 \(2 \* 32 \* 32\), got {length}"):
        CodecConfig(codeword_length=length)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_out_of_range(sizes):
    with pytest.raises(ValueError, match=rf"antennas, subcarriers: expected at least 1, got {sizes[0]} and {sizes[1]}"):
        CodecConfig(*sizes, codeword_length=1)


@pytest.mark.parametrize("method", ["encode", "target"])
@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 9), (2, 9, 8), (1, 2, 8, 8), (8,)])
def test_channels_of_another_shape(codec, method, shape):
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 8, 8\], got \("):
        getattr(codec, method)(channels(*shape))


@pytest.mark.parametrize("method", ["encode", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_channels_that_are_not_complex(codec, method, dtype):
    with pytest.raises(TypeError, match=f"h: expected a complex tensor, got {dtype}"):
        getattr(codec, method)(torch.ones(2, 8, 8, dtype=dtype))


@pytest.mark.parametrize("shape", [(32,), (2, 31), (2, 32, 1)])
def test_codeword_of_another_shape(codec, shape):
    with pytest.raises(ValueError, match=r"codeword: expected shape \[batch, 32\], got \("):
        codec.initial(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_codeword_of_another_dtype(codec, dtype):
    with pytest.raises(TypeError, match=f"codeword: expected a real floating-point tensor, got {dtype}"):
        codec.initial(torch.ones(2, 32, dtype=dtype))
