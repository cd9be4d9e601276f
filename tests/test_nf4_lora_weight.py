"""nf4_quantize and NF4Weight: bit-identical to bitsandbytes, in and out of files."""

from __future__ import annotations

import pytest
import torch

from csikernels import NF4Weight, nf4_quantize
from csikernels.reference.nf4_lora import LEVELS

pytestmark = pytest.mark.op("nf4_quantize", "nf4_dequantize")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(64, 64), (7, 13), (1, 1), (3, 43), (33, 100), (2, 5000)]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def golden() -> torch.Tensor:
    """A weight [3, 23] from exact arithmetic: growing blocks, zeros and both signs."""
    values = torch.tensor([((37 * i) % 101 - 50) / 50 * (1 + i // 32) for i in range(69)])
    values[32:64] *= torch.arange(32) % 3 - 1
    return values.view(3, 23)


@pytest.mark.parametrize(
    ("block_size", "packed", "absmax"),
    [
        (
            32,
            "04c16e29f3b05d17e29f3c05d18e2af427617907bf7de7ed7fb70971772474376e18f7",
            [1.0, 1.9199999570846558, 2.5199999809265137],
        ),
        (
            64,
            "26a37b48c5926a37b48c5a36b37c49d527617907bf7de7ed7fb70971772474376e18f7",
            [1.9199999570846558, 2.5199999809265137],
        ),
    ],
)
def test_codes_written_by_bitsandbytes(backend, block_size, packed, absmax):
    # bitsandbytes 0.50.2, quantize_4bit(golden(), quant_type="nf4", compress_statistics=False) on a CPU.
    weight = nf4_quantize(golden(), block_size)
    assert bytes(weight.packed.tolist()).hex() == packed
    assert weight.absmax.tolist() == absmax


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bit_identical_to_bitsandbytes(backend, shape, block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in FLOATS[:3]:
        dense_weight = gaussian(*shape, dtype=dtype, seed=block_size)
        dense_weight.view(-1)[block_size : 2 * block_size] = 0
        packed, state = functional.quantize_4bit(dense_weight, blocksize=block_size, quant_type="nf4")
        weight = nf4_quantize(dense_weight, block_size)
        assert torch.equal(weight.packed, packed.view(-1))
        assert torch.equal(weight.absmax, state.absmax)
        again = NF4Weight.from_bitsandbytes(state, packed)
        assert torch.equal(again.dequantize(), weight.dequantize())
        if shape[1] % block_size == 0:  # its CPU kernel takes the wrong scale where a block spans rows
            assert torch.equal(weight.dequantize(), functional.dequantize_4bit(packed, state))


def test_thresholds_and_denormals_like_bitsandbytes(backend):
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = torch.tensor(LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    around = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
    rows = [scale * torch.cat([around, torch.ones(67)]) for scale in (1.0, 0.3, 1e-30, 3e-39, 1e-44, 1e38)]
    dense_weight = torch.stack([*rows, torch.zeros(128)])
    for part in (dense_weight, dense_weight[:, :101].contiguous(), dense_weight.view(1, -1)[:, :-31].contiguous()):
        packed, state = functional.quantize_4bit(part, blocksize=64, quant_type="nf4")
        weight = nf4_quantize(part)
        assert torch.equal(weight.packed, packed.view(-1))
        assert torch.equal(weight.absmax, state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_level_times_scale(backend, shape, dtype):
    weight = nf4_quantize(gaussian(*shape, dtype=dtype), 32)
    nibbles = [nibble for byte in weight.packed.tolist() for nibble in (byte >> 4, byte & 15)]
    count = shape[0] * shape[1]
    scales = weight.absmax.repeat_interleave(32)[:count]
    wanted = torch.tensor([LEVELS[nibble] for nibble in nibbles[:count]]) * scales
    result = weight.dequantize()
    assert result.dtype == dtype and result.shape == shape
    assert torch.equal(result, wanted.view(shape).to(dtype))
    assert torch.equal(weight.dequantize(torch.float32), wanted.view(shape))


def test_every_element_gets_its_nearest_level(backend):
    dense_weight = gaussian(40, 96)
    weight = nf4_quantize(dense_weight, 32)
    relative = dense_weight.view(-1, 32).double() / weight.absmax[:, None].double()
    distance = (relative[..., None] - torch.tensor(LEVELS).double()).abs()
    error = (weight.dequantize(torch.float64).view(-1, 32) / weight.absmax[:, None].double() - relative).abs()
    torch.testing.assert_close(error, distance.amin(dim=-1), rtol=0, atol=2e-7)


def test_zero_weight(backend):
    weight = nf4_quantize(torch.zeros(5, 64))
    assert torch.all(weight.packed == 0x77) and torch.all(weight.absmax == 0)
    assert torch.equal(weight.dequantize(), torch.zeros(5, 64))


def test_quantize_non_contiguous_and_float64(backend):
    dense_weight = gaussian(30, 40)
    wanted = nf4_quantize(dense_weight.T.contiguous())
    for same in (dense_weight.T, dense_weight.T.double()):
        weight = nf4_quantize(same)
        assert torch.equal(weight.packed, wanted.packed) and torch.equal(weight.absmax, wanted.absmax)
    assert weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "nan"), (float("-inf"), "-inf"), (1e300, r"1e\+300")], ids=["nan", "inf", "huge"]
)
def test_non_finite_weights_are_refused(backend, value, text):
    dense_weight = gaussian(6, 50, dtype=torch.float64)
    dense_weight[4, 7] = value
    dense_weight[5, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"weight: expected finite float32 values, got {text} at index \(4, 7\)"):
        nf4_quantize(dense_weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 4, dtype=torch.int32),), TypeError, "weight: expected a float16, .*, got torch.int32"),
        (([[1.0]],), TypeError, "weight: .* got list"),
        ((torch.zeros(4),), ValueError, r"weight: expected a non-empty \[N, K\], got shape \(4,\)"),
        ((torch.zeros(0, 4),), ValueError, r"weight: .* got shape \(0, 4\)"),
        ((torch.zeros(4, 4), 48), ValueError, "block_size: expected one of 32, 64, .*, got 48"),
        ((torch.zeros(4, 4), 8192), ValueError, "block_size"),
    ],
)
def test_quantize_errors(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        nf4_quantize(*arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_survive_a_file(backend, tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    weight = nf4_quantize(gaussian(33, 50, dtype=dtype), 128)
    safetensors.save_file(weight.to_tensors("layer."), tmp_path / "weight.safetensors")
    again = NF4Weight.from_tensors(safetensors.load_file(tmp_path / "weight.safetensors"), "layer.")
    assert torch.equal(again.packed, weight.packed) and torch.equal(again.absmax, weight.absmax)
    assert (again.shape, again.block_size, again.dtype) == ((33, 50), 128, dtype)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("absmax"), "missing absmax"),
        (lambda tensors: tensors["header"].__setitem__(0, 2), r"header: expected \[1, N, K, .* got \[2, "),
        (lambda tensors: tensors["header"].__setitem__(4, 9), "header"),
        (lambda tensors: tensors["header"].__setitem__(1, 34), r"packed: expected .* shape \(850,\), got \(825,\)"),
        (lambda tensors: tensors["header"].__setitem__(3, 128), r"absmax: expected .* shape \(13,\), got \(26,\)"),
        (lambda tensors: tensors["header"].__setitem__(3, 100), "block_size: expected one of .* got 100"),
        (lambda tensors: tensors["header"].__setitem__(2, 0), "shape: expected"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors = nf4_quantize(gaussian(33, 50)).to_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_tensors(tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(32)}, TypeError, "packed: expected a torch.uint8 tensor, got torch.float32"),
        ({"absmax": torch.zeros(1, dtype=torch.float64)}, TypeError, "absmax: expected a torch.float32 tensor"),
        ({"absmax": torch.zeros(1, 1)}, ValueError, r"absmax: expected .* shape \(1,\), got \(1, 1\)"),
        ({"absmax": torch.zeros(1, device="meta")}, ValueError, "absmax: expected a tensor on cpu, got one on meta"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of .*, got torch.int8"),
        ({"shape": (64,)}, ValueError, "shape: expected"),
    ],
)
def test_weight_errors(change, error, message):
    parts = {"packed": torch.zeros(32, dtype=torch.uint8), "absmax": torch.zeros(1), "shape": (8, 8)}
    NF4Weight(**parts)
    with pytest.raises(error, match=message):
        NF4Weight(**(parts | change))


def test_size_device_and_dtype(backend):
    weight = nf4_quantize(gaussian(128, 256))
    assert weight.nbytes == 128 * 256 * 9 // 16  # 4.5 bits per element
    assert weight.device == torch.device("cpu")
    assert weight.to("meta").device == torch.device("meta")
    assert torch.equal(weight.to("cpu").packed, weight.packed)
    with pytest.raises(TypeError, match=r"dtype: expected one of .* got torch.int32"):
        weight.dequantize(torch.int32)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_from_bitsandbytes(backend, storage, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = gaussian(96, 128, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    weight = NF4Weight.from_bitsandbytes(state, packed)
    assert (weight.shape, weight.block_size, weight.dtype) == ((96, 128), 64, torch.bfloat16)
    assert torch.equal(weight.packed, nf4_quantize(dense).packed)
    wanted = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    assert torch.equal(weight.absmax, wanted)
    assert torch.equal(weight.dequantize(), functional.dequantize_4bit(packed, state))
    packed.view(torch.uint8).zero_()  # the parts are copies
    assert torch.equal(weight.packed, nf4_quantize(dense).packed)


def test_from_bitsandbytes_errors():
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(gaussian(8, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="quant_state: expected quant_type 'nf4', got 'fp4'"):
        NF4Weight.from_bitsandbytes(state, packed)
    with pytest.raises(TypeError, match="not quantised yet"):
        NF4Weight.from_bitsandbytes(None, packed)
    packed, state = functional.quantize_4bit(gaussian(2, 3, 64), quant_type="nf4")
    with pytest.raises(ValueError, match=r"shape: expected \(N, K\)"):
        NF4Weight.from_bitsandbytes(state, packed)
