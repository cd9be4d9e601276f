"""What only a real GPU can show: streams, capture in a CUDA graph, several devices, the same bits twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import csikernels
from csikernels import Codebook, SamBank
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

Call = Callable[[torch.Tensor], Any]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def selection(device: torch.device) -> tuple[Call, torch.Tensor]:
    return lambda h: csikernels.select_informative(h, 221, bandwidth=0.5), noise(16, 2, 32, 32).to(device)


def information(device: torch.device) -> tuple[Call, torch.Tensor]:
    return lambda h: csikernels.self_information(h, bandwidth=0.5), noise(16, 2, 32, 32).to(device)


def scatter(device: torch.device) -> tuple[Call, torch.Tensor]:
    indices = torch.stack([torch.randperm(2048, generator=torch.Generator().manual_seed(i))[:221] for i in range(16)])
    indices, mean = indices.to(device), noise(16).to(device)
    return lambda values: csikernels.scatter_codeword(values, indices, mean, (2, 32, 32)), noise(16, 221).to(device)


def search(device: torch.device) -> tuple[Call, torch.Tensor]:
    book = Codebook(noise(4096, 64, dtype=torch.complex64).to(device))
    return book.search, noise(100, 64, dtype=torch.complex64, seed=1).to(device)


def linear(tokens: int, dtype: torch.dtype) -> Callable[[torch.device], tuple[Call, torch.Tensor]]:
    def make(device: torch.device) -> tuple[Call, torch.Tensor]:
        weight = csikernels.nf4_quantize(noise(256, 512).to(device))
        lora_a, lora_b = noise(16, 512, seed=1).to(device, dtype), noise(256, 16, seed=2).to(device, dtype)
        call = lambda x: csikernels.nf4_lora_linear(x, weight, lora_a, lora_b)  # noqa: E731
        return call, noise(tokens, 512, seed=3).to(device, dtype)

    return make


def lasco(precision: str) -> Callable[[torch.device], tuple[Call, torch.Tensor]]:
    def make(device: torch.device) -> tuple[Call, torch.Tensor]:
        torch.manual_seed(0)
        reference, *proxies = (ChannelTransformer(TransformerConfig.sam()).eval().to(device) for _ in range(4))
        bank = SamBank.from_modules(reference, proxies, 0.7, precision=precision)
        base, slot = noise(9, 32, 64, seed=1).to(device), (torch.arange(9) % 3).to(device)
        return lambda h: csikernels.lasco_forward(h, base, bank, slot), noise(9, 32, 64).to(device)

    return make


CASES = {
    "select_informative": selection,
    "self_information": information,
    "scatter_codeword": scatter,
    "codebook_search": search,
    "nf4_lora_linear, 1 token": linear(1, torch.bfloat16),
    "nf4_lora_linear, 100 tokens": linear(100, torch.bfloat16),
    "nf4_lora_linear, float32": linear(100, torch.float32),
    "lasco_forward, float32": lasco("float32"),
    "lasco_forward, bfloat16": lasco("bfloat16"),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    try:
        with csikernels.use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        pytest.skip(str(error))


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def run(call: Call, x: torch.Tensor) -> list[torch.Tensor]:
    """The result, or a skip where the backend in force lacks the op."""
    try:
        with torch.inference_mode():
            return tensors(call(x))
    except RuntimeError as error:
        if "was asked for" in str(error):
            pytest.skip(str(error))
        raise


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


@every_case
def test_the_same_bits_twice(gpu_backend, make):
    call, x = make(torch.device("cuda"))
    assert same(run(call, x), run(call, x))


@every_case
def test_the_current_stream_is_used(gpu_backend, make):
    call, x = make(torch.device("cuda"))
    wanted, late = run(call, x), torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what ran on another stream would see zeros
        late.copy_(x)
        result = run(call, late)
    stream.synchronize()
    assert same(result, wanted)


@every_case
def test_capture_in_a_graph(gpu_backend, make):
    call, x = make(torch.device("cuda"))
    other = x.flip(0).contiguous()
    wanted = run(call, other)
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(call, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(call, static)
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert same(result, wanted)


@every_case
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current(gpu_backend, make):
    call, x = make(torch.device("cuda", 0))
    other_call, other = make(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    result = run(other_call, other)
    assert all(part.device == other.device for part in result) and torch.cuda.current_device() == 0
    assert same(result, run(call, x))


def test_tensors_on_different_devices_are_named():
    h = noise(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"source: expected a tensor on cuda:0, got one on cpu"):
        csikernels.select_informative(h.cuda(), 3, bandwidth=1.0, source=h)
    book = Codebook(noise(8, 4, dtype=torch.complex64).cuda())
    with pytest.raises(ValueError, match="cuda:0"):
        book.search(noise(2, 4, dtype=torch.complex64))
