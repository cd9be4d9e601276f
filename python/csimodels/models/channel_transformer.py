"""The Transformer of LASCO's large and small models (section III-E).

One token per subcarrier; an input projection, learned positions, a stack of encoder blocks, an output projection. The
large model (LAM) is deep and pre-norm, the small ones (SAM) are shallow and post-norm.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a :class:`ChannelTransformer`.

    Attributes:
        tokens, features: sequence length (subcarriers) and reals per token (twice the antennas).
        layers, width, heads, feedforward: depth, ``d_model``, attention heads, feed-forward width.
        norm_first: pre-norm (LAM) or post-norm (SAM).

    The papers leave heads and activation open: 8 heads for the LAM, 4 for the SAM, and ReLU are this project's choice.
    """

    tokens: int = 32
    features: int = 64
    layers: int = 2
    width: int = 64
    heads: int = 4
    feedforward: int = 256
    norm_first: bool = False

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "norm_first" and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")

    @classmethod
    def lam_paper(cls) -> TransformerConfig:
        """The base LAM of LASCO: 20 pre-norm blocks of width 512 (63.1 M parameters)."""
        return cls(layers=20, width=512, heads=8, feedforward=2048, norm_first=True)

    @classmethod
    def lam_laptop(cls) -> TransformerConfig:
        """A base LAM that two CPU cores can pre-train: 4 pre-norm blocks of width 192 (1.8 M parameters)."""
        return cls(layers=4, width=192, heads=8, feedforward=768, norm_first=True)

    @classmethod
    def sam(cls, layers: int = 2, width: int = 64) -> TransformerConfig:
        """Reference and proxy SAM: 2 post-norm blocks of width 64 (110 k parameters); Fig. 10 varies the size."""
        return cls(layers=layers, width=width, heads=4, feedforward=4 * width, norm_first=False)


class ChannelTransformer(nn.Module):
    """Maps ``H_in`` to ``H``, both in network units, float ``[batch, tokens, features]`` (LASCO, eq. 12).

    The layout (``input``, ``position``, ``encoder``, ``output``) is the one that ``csikernels.SamBank`` and
    ``csikernels.LascoEngine`` read.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.features, config.width)
        self.position = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.feedforward,
            dropout=0.0,
            activation="relu",
            batch_first=True,
            norm_first=config.norm_first,
        )
        # A pre-norm stack ends un-normalised; the final norm is what makes its output projection well scaled.
        norm = nn.LayerNorm(config.width) if config.norm_first else None
        self.encoder = nn.TransformerEncoder(layer, config.layers, norm=norm, enable_nested_tensor=False)
        self.output = nn.Linear(config.width, config.features)
        self._reset()

    def _reset(self) -> None:
        # nn.TransformerEncoder deep-copies one layer, so all start equal: draw each anew.
        for layer in self.encoder.layers:
            nn.init.xavier_uniform_(layer.self_attn.in_proj_weight)
            nn.init.xavier_uniform_(layer.self_attn.out_proj.weight)
            layer.linear1.reset_parameters()
            layer.linear2.reset_parameters()

    def forward(self, h_in: torch.Tensor) -> torch.Tensor:
        expected = (self.config.tokens, self.config.features)
        if not h_in.is_floating_point():
            raise TypeError(f"h_in: expected a real floating-point tensor, got {h_in.dtype}")
        if h_in.ndim != 3 or tuple(h_in.shape[1:]) != expected:
            raise ValueError(f"h_in: expected shape [batch, {expected[0]}, {expected[1]}], got {tuple(h_in.shape)}")
        x = self.input(h_in) + self.position
        for layer in self.encoder.layers:
            x = apply_layer(layer, x)
        if self.encoder.norm is not None:
            x = self.encoder.norm(x)
        return self.output(x)


def apply_layer(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """What ``layer`` (ReLU, no dropout) makes of float ``[batch, tokens, width]``, with attention written out."""
    if layer.norm_first:
        x = x + _attention(layer.self_attn, layer.norm1(x))
        return x + layer.linear2(F.relu(layer.linear1(layer.norm2(x))))
    x = layer.norm1(x + _attention(layer.self_attn, x))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


def _attention(module: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Self-attention with the module's weights, written out: SDPA's CPU kernels take 2 to 3 times as long."""
    batch, tokens, width = x.shape
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = qkv.view(batch, tokens, 3, module.num_heads, width // module.num_heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return module.out_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters and buffers are; the CPU for one that has none."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
