"""The strongest forms of a large ChannelTransformer that torch offers, for the timings of the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csimodels.models.channel_transformer import ChannelTransformer

Linear = Callable[..., Tensor]  # (x, activation "none" or "relu") -> x W^T + bias


class OneDnnLinear(nn.Module):
    """A linear layer whose weight oneDNN has reordered once, ReLU fused: torch's fastest product of float32."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = bias.detach()

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")


class Int8Linear(nn.Module):
    """Rows and output channels quantised symmetrically, the product by ``torch._int_mm``; to be compiled."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int):
        super().__init__()
        scale = weight.detach().abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", torch.round(weight.detach() / scale[:, None]).to(torch.int8).t().contiguous())
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        row = flat.abs().amax(1, keepdim=True) / 127
        y = torch._int_mm(torch.round(flat / row).to(torch.int8), self.weight) * row * self.scale + self.bias
        y = y.view(*x.shape[:-1], -1)
        return F.relu(y) if activation == "relu" else y


class WithLinear(nn.Module):
    """The pre-norm ChannelTransformer with its linear layers replaced."""

    def __init__(self, base: ChannelTransformer, kind: Callable[[Tensor, Tensor, int], Linear], rows: int):
        super().__init__()
        self.base = base
        self.linears = nn.ModuleList()
        for block in base.encoder.layers:
            attention = block.self_attn
            self.linears += [
                kind(attention.in_proj_weight, attention.in_proj_bias, rows),
                *(kind(part.weight, part.bias, rows) for part in (attention.out_proj, block.linear1, block.linear2)),
            ]

    def forward(self, h_in: Tensor) -> Tensor:
        base, heads = self.base, self.base.config.heads
        x = base.input(h_in) + base.position
        for i, block in enumerate(base.encoder.layers):
            qkv, proj, up, down = self.linears[4 * i : 4 * i + 4]
            q, k, v = qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
            x = x + proj(mixed.transpose(1, 2).flatten(2))
            x = x + down(up(block.norm2(x), "relu"))
        return base.output(base.encoder.norm(x))


def eager(base: ChannelTransformer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    own = copy.deepcopy(base).to(dtype)
    return lambda h_in: own(h_in.to(dtype)).float()


def compiled(base: ChannelTransformer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    own = torch.compile(copy.deepcopy(base).to(dtype))
    return lambda h_in: own(h_in.to(dtype)).float()


def prepacked(base: ChannelTransformer, dtype: torch.dtype, rows: int) -> Callable[[Tensor], Tensor]:
    own = WithLinear(copy.deepcopy(base).to(dtype), OneDnnLinear, rows)
    return lambda h_in: own(h_in.to(dtype)).float()


def peers_of(precision: str, base: ChannelTransformer, samples: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What an engine of this precision is compared with, for batches of ``samples``."""
    rows = samples * base.config.tokens
    peers = {"eager float32": eager(base, torch.float32)}
    if precision == "int8":
        peers["torch.compile int8"] = torch.compile(WithLinear(base, Int8Linear, rows))
        return peers
    dtype = getattr(torch, precision)
    if precision == "bfloat16":
        peers["eager bfloat16"] = eager(base, dtype)
    peers[f"torch.compile {precision}"] = compiled(base, dtype)
    if next(base.parameters()).device.type == "cpu":
        peers[f"oneDNN prepacked {precision}"] = prepacked(base, dtype, rows)
    return peers
