"""LLMCsiNet's UE: the codeword of one sample against the same encoder in eager PyTorch.

The paper's Fig. 6 gives 1.54 ms for it. The peer has the same weights and computes what section IV-B says with plain
operators: convolutions, equation 9 in float32 for each of the nine neighbours, and ``torch.topk``.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare

from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig

KEPT = 221
# Two convolutions of 3x3 between 2 and 64 maps of 32x32; the selection's operations are a fiftieth of that.
FLOPS = 2 * 2 * (9 * 2 * 64 * 1024)


def clusters(batch: int) -> torch.Tensor:
    """Like CSI in the angle-delay domain: a few strong clusters in weak noise."""
    generator = torch.Generator().manual_seed(batch)
    envelope = torch.rand(batch, 2, 32, 32, generator=generator) ** 8
    return (envelope * torch.randn(batch, 2, 32, 32, generator=generator) * 3).to(DEVICE)


def information(x: torch.Tensor, config: LlmCsiNetConfig) -> torch.Tensor:
    reach = config.radius
    padded = F.pad(x, (reach,) * 4)
    density = sum(
        torch.exp(-((x - padded[..., i : i + 32, j : j + 32]) ** 2) / (2 * config.bandwidth**2))
        for i in (0, reach, 2 * reach)
        for j in (0, reach, 2 * reach)
    )
    return -torch.log2(density / 9 / (math.sqrt(2 * math.pi) * config.bandwidth))


def image_and_ranking(model: LlmCsiNet, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The self-information image [B, 2048] and the positions that the mask keeps, most informative first."""
    encoder = model.encoder
    scale = h.square().mean((1, 2, 3), keepdim=True).sqrt()
    x = h / scale
    ranked = information(x, model.config).flatten(1).topk(encoder.kept).indices
    mask = torch.zeros_like(h).flatten(1).scatter(1, ranked, 1.0).view(h.shape).amax(1, keepdim=True)
    convolution, norm, activation = encoder.image
    image = F.conv2d(encoder.extract(x) * mask, convolution.weight, convolution.bias, padding=1)
    return (activation(norm(image)) * scale).flatten(1), ranked


def eager(model: LlmCsiNet, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image, ranked = image_and_ranking(model, h)
    indices = ranked[:, :KEPT]
    return image.gather(1, indices), indices, h.mean((1, 2, 3))


@pytest.mark.parametrize("batch", [1, 64])
def test_encode(benchmark, batch):
    torch.manual_seed(0)
    model = LlmCsiNet(LlmCsiNetConfig(codeword_values=KEPT, prediction=False)).to(DEVICE).eval()
    h = clusters(batch)
    with torch.inference_mode():
        bits = information((h / h.square().mean((1, 2, 3), keepdim=True).sqrt()).double(), model.config).flatten(1)
        best = bits.sort(1, descending=True).values[:, :KEPT]
        image, _ = image_and_ranking(model, h)

        def check(name, codeword):
            values, indices, mean = codeword
            torch.testing.assert_close(bits.gather(1, indices), best, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mean, h.mean((1, 2, 3)))
            # Equation 9 in float32 orders the last of the mask's elements differently, and their neighbours differ.
            close = torch.isclose(values, image.gather(1, indices), rtol=1e-3, atol=1e-4)
            assert close.float().mean() > 0.99, name

        compare(
            benchmark,
            f"LLMCsiNet encode, B={batch}, M={KEPT}",
            {"csikernels": lambda: model.encode(h)},
            {"eager float32": lambda: eager(model, h)},
            check=check,
            flops=batch * FLOPS,
            calls=20 if batch == 1 else 1,
            rounds=25,
        )
