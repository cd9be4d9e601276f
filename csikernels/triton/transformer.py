"""transformer_forward on a GPU: products by cuBLAS, attention by PyTorch's fused kernel, all between them in Triton.

Between two products stand a bias, a residual sum and a LayerNorm, or a bias and an activation; each becomes one pass
over the rows. Of a token row of the paper's base (d 512, ff 2048, 20 blocks) a block's four passes move 36 KB with
bfloat16 operands (float32: 45 KB), beside 6.3 MFLOP of products: for a batch of 64 of 32 tokens 22 us at 3.35 TB/s and
13 us at 990 TFLOP/s.

int8 and float64 take the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from csikernels._dispatch import implement
from csikernels.reference import lasco as in_pytorch
from csikernels.reference.transformer import Block, Hyper, network_of
from csikernels.triton.lasco_block import operand
from csikernels.triton.lasco_checks import checked_network, checked_weights
from csikernels.triton.launch import on

_MOST_WIDTH = 4096  # a row is held in registers
_ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2}


@triton.jit
def _add_norm_kernel(
    x,  # [M or PERIOD, width]: what is added to, of row % PERIOD where PERIOD
    y,  # [M, width], a product's output
    bias,  # [width]
    weight,  # [width] where NORM
    shift,  # [width] where NORM
    residual,  # [M, width]: the sum, or where POST its LayerNorm
    following,  # [M, width]: the next product's operand: the LayerNorm, or the sum without NORM
    rows,
    eps,
    PERIOD: tl.constexpr,
    WIDTH: tl.constexpr,
    W: tl.constexpr,  # padded
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    POST: tl.constexpr,
    LOW: tl.constexpr,  # operands are bfloat16
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, W)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    source = (row % PERIOD)[:, None] * WIDTH + column[None, :] if PERIOD else at
    total = tl.load(x + source, mask=inside, other=0.0) + tl.load(y + at, mask=inside, other=0.0)
    total += tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    if not POST:
        tl.store(residual + at, total, mask=inside)
    if NORM:
        mean = tl.sum(total, 1) / WIDTH
        centred = tl.where((column < WIDTH)[None, :], total - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
        scale = tl.load(weight + column, mask=column < WIDTH, other=0.0)
        total = centred * rstd[:, None] * scale[None, :]
        total += tl.load(shift + column, mask=column < WIDTH, other=0.0)[None, :]
    if POST:
        tl.store(residual + at, total, mask=inside)
    if LOW or (NORM and not POST):
        tl.store(following + at, operand(total, LOW), mask=inside)


@triton.jit
def _bias_activation_kernel(
    y,  # [M, width], a product's output
    bias,  # [width]
    following,  # [M, width], the next product's operand
    rows,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    a = tl.load(y + at, mask=inside, other=0.0) + tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    if ACTIVATION == 1:
        a = tl.where(a < 0.0, 0.0, a)  # lets NaN through
    if ACTIVATION == 2:
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    tl.store(following + at, operand(a, LOW), mask=inside)


@implement("transformer_forward", "triton")
def transformer_forward(h_in, weights, scales, packed, heads, activation, norm_first, eps):
    hyper = Hyper(heads, activation, norm_first, eps)
    ours = h_in.dtype == torch.float32 and not scales and h_in.numel() > 0
    if not ours or weights[0].shape[0] > _MOST_WIDTH:
        return in_pytorch.transformer_forward(h_in, weights, scales, packed, *hyper)
    sizes = checked_network(h_in, weights, *hyper)
    with on(h_in):
        return _forward(h_in, checked_weights(weights, "weights", sizes, None, h_in.device), hyper)


def _forward(h_in: Tensor, weights: Sequence[Tensor], hyper: Hyper) -> Tensor:
    network = network_of(weights)
    low = weights[0].dtype == torch.bfloat16
    samples, tokens, features = h_in.shape
    rows = _Rows(samples * tokens, weights[0].shape[0], hyper.eps, low)
    norms: list[tuple[Tensor, Tensor] | None] = [(block.norm1_weight, block.norm1_bias) for block in network.blocks]
    u = h_in.reshape(-1, features)
    y = _product(u.to(torch.bfloat16) if low else u, network.input_weight)
    norms.append(network.norm)
    before = norms if hyper.norm_first else [None] * len(norms)
    x, u = rows.add_norm(network.position, y, network.input_bias, before[0], period=tokens)
    for block, following in zip(network.blocks, before[1:], strict=True):
        y = _product(_attention(rows, u, block, hyper.heads, tokens), block.proj_weight)
        norm2 = (block.norm2_weight, block.norm2_bias)
        inner = norm2 if hyper.norm_first else (block.norm1_weight, block.norm1_bias)
        x, u = rows.add_norm(x, y, block.proj_bias, inner, post=not hyper.norm_first)
        hidden = rows.activated(_product(u, block.up_weight), block.up_bias, hyper.activation)
        y = _product(hidden, block.down_weight)
        outer = following if hyper.norm_first else norm2
        x, u = rows.add_norm(x, y, block.down_bias, outer, post=not hyper.norm_first)
    if network.norm is not None and not hyper.norm_first:
        u = F.layer_norm(x, x.shape[-1:], network.norm[0], network.norm[1], hyper.eps)
        u = u.to(torch.bfloat16) if low else u
    return (_product(u, network.output_weight) + network.output_bias).view(h_in.shape)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] by weight [N, K] -> [M, N] in float32."""
    if x.dtype == torch.float32:
        return x @ weight.t()
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


def _attention(rows: _Rows, u: Tensor, block: Block, heads: int, tokens: int) -> Tensor:
    """u [M, d] -> the output projection's operand [M, d]."""
    qkv = rows.activated(_product(u, block.qkv_weight), block.qkv_bias, "")
    width = qkv.shape[1] // 3
    q, k, v = qkv.view(-1, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)


class _Rows:
    """The passes over token rows [M, d] between products."""

    def __init__(self, count: int, width: int, eps: float, low: bool):
        self.count, self.width, self.eps, self.low = count, width, eps, low
        self.dtype = torch.bfloat16 if low else torch.float32

    def add_norm(
        self, x: Tensor, y: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None, *, period: int = 0,
        post: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x + y + bias and its LayerNorm; after it (``post``) the LayerNorm is what the next sum adds to, too."""
        residual = torch.empty_like(y)
        # Where both would be the same numbers, they are written once.
        separate = self.low or (norm is not None and not post)
        following = torch.empty_like(y, dtype=self.dtype) if separate else residual
        padded = triton.next_power_of_2(self.width)
        # 16 values a thread. Every program reads three vectors of the width beside its rows.
        block = max(1, 4096 // padded)
        weight, shift = norm if norm is not None else (bias, bias)
        _add_norm_kernel[(triton.cdiv(self.count, block),)](
            x.contiguous(), y, bias, weight, shift, residual, following, self.count, self.eps,
            PERIOD=period, WIDTH=self.width, W=padded, ROWS=block, NORM=norm is not None,
            POST=post and norm is not None, LOW=self.low, num_warps=8, enable_fp_fusion=True,
            maxnreg=64,  # said, since the compiler may spill to get below
        )  # fmt: skip
        return residual, following

    def activated(self, y: Tensor, bias: Tensor, activation: str) -> Tensor:
        """activation(y + bias) as an operand."""
        following = torch.empty_like(y, dtype=self.dtype)
        width, block, columns = y.shape[1], 8, 128  # the bias is read once for eight rows
        _bias_activation_kernel[(triton.cdiv(y.shape[0], block), triton.cdiv(width, columns))](
            y, bias, following, y.shape[0], WIDTH=width, ACTIVATION=_ACTIVATIONS[activation], LOW=self.low,
            ROWS=block, COLUMNS=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return following
