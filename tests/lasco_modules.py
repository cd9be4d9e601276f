"""Small models of the standard layout, and LASCO computed from them by its formula."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from csikernels import SamBank

PAPER = {"tokens": 32, "features": 64, "layers": 2, "width": 64, "heads": 4, "feedforward": 256}
# Odd everywhere: no size is a multiple of a vector, a tile or another size.
ODD = {"tokens": 5, "features": 3, "layers": 3, "width": 6, "heads": 2, "feedforward": 7}
ONE = {"tokens": 1, "features": 1, "layers": 1, "width": 1, "heads": 1, "feedforward": 1}


class Sam(nn.Module):
    """The layout in PyTorch's own modules, every parameter random (the default biases of 0 would hide mistakes)."""

    def __init__(
        self, tokens, features, layers, width, heads, feedforward, *,
        norm_first=False, final_norm=False, activation="relu", dropout=0.0, batch_first=True,
    ):  # fmt: skip
        super().__init__()
        self.batch_first = batch_first
        self.input = nn.Linear(features, width)
        self.position = nn.Parameter(torch.empty(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, feedforward, dropout, activation, batch_first=batch_first, norm_first=norm_first
        )
        norm = nn.LayerNorm(width) if final_norm else None
        self.encoder = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)
        self.output = nn.Linear(width, features)
        for name, parameter in self.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            nn.init.normal_(parameter, centre, 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)

    def forward(self, h: Tensor) -> Tensor:
        x = self.input(h) + self.position
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.output(x)


def sams(slots: int, sizes: dict = PAPER, dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    """A reference and ``slots`` proxies, in eval mode."""
    torch.manual_seed(seed)
    reference, *proxies = (Sam(**sizes, **options).to(dtype).eval() for _ in range(slots + 1))
    return reference, proxies


def bank_of(slots: int, sizes: dict = PAPER, dtype: torch.dtype = torch.float32, **options):
    """A trainable float64 or frozen float32 bank with its modules and alphas around 1."""
    reference, proxies = sams(slots, sizes, dtype, **options)
    alpha = torch.linspace(-0.3, 1.7, slots, dtype=dtype)
    double = dtype == torch.float64
    precision = "float64" if double else "float32"
    return SamBank.from_modules(reference, proxies, alpha, precision=precision, trainable=double), reference, proxies


def inputs(
    slot, sizes: dict = PAPER, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """h_in, base_output and slot for the given slots."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(slot), sizes["tokens"], sizes["features"])
    h_in, base_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return h_in, base_output, torch.tensor(slot, dtype=torch.int64)


def composite(h_in, base_output, slot, reference, proxies, alpha) -> Tensor:
    """Equation 18, one sample at a time, through the modules themselves."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        samples = [
            proxies[u](h_in[i : i + 1]) + alpha[u] * (base_output[i : i + 1] - reference(h_in[i : i + 1]))
            for i, u in enumerate(slot.tolist())
        ]
    return torch.cat(samples) if samples else torch.empty_like(h_in)


def oracle(h_in, base_output, slot, reference, proxies, alpha) -> Tensor:
    """:func:`composite` in float64, whatever the modules' dtype."""
    reference, *proxies = (copy.deepcopy(module).double() for module in (reference, *proxies))
    with torch.no_grad():
        return composite(h_in.double(), base_output.double(), slot, reference, proxies, alpha.double())


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what was expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
