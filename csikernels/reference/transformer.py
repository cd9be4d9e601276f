"""The standard channel Transformer and its gradients in plain PyTorch: the arithmetic that every kernel must match.

``G`` networks of one architecture run at once, each with its own weights and its own ``n`` samples (``G = 1`` for a
single network). Activations are ``[G, n*T, width]``: token rows of a batched matrix product. Attention is written out
as two products and a softmax, which at 32 tokens is 2 to 3 times faster on a CPU than the fused attention of PyTorch.

Arithmetic follows the dtype of the weight matrices:

- float32, float64: everything in that dtype.
- bfloat16: both operands of every product, attention's included, are rounded to bfloat16 and accumulated in float32;
  biases, LayerNorm, softmax and residuals stay float32.
- int8 (with scales): the four products of each block take integers, activations scaled per row at run time, weights
  per output channel; the integer sums are formed in float32, exact below 2^24. Everything else is as in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHTS_PER_BLOCK = 12
SCALES_PER_BLOCK = 4
_WORKSPACE = 1 << 20  # elements of the largest activation held at a time


class Hyper(NamedTuple):
    """What the weights' shapes do not tell."""

    heads: int
    activation: str  # "relu" or "gelu" (exact)
    norm_first: bool
    eps: float


class Block(NamedTuple):
    """One encoder block's weights, each stacked over ``G`` networks."""

    scales: Sequence[Tensor | None]  # of qkv, proj, up, down, each [G, rows]; None but for int8
    qkv_weight: Tensor  # [G, 3d, d]
    qkv_bias: Tensor  # [G, 3d]
    proj_weight: Tensor  # [G, d, d]
    proj_bias: Tensor  # [G, d]
    up_weight: Tensor  # [G, ff, d]
    up_bias: Tensor  # [G, ff]
    down_weight: Tensor  # [G, d, ff]
    down_bias: Tensor  # [G, d]
    norm1_weight: Tensor  # [G, d]
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class Network(NamedTuple):
    """All weights of ``G`` networks of one architecture."""

    input_weight: Tensor  # [G, d, F]
    input_bias: Tensor  # [G, d]
    position: Tensor  # [G, T, d]
    blocks: list[Block]
    norm: tuple[Tensor, Tensor] | None  # [G, d] each
    output_weight: Tensor  # [G, F, d]
    output_bias: Tensor  # [G, F]


def network_of(weights: Sequence[Tensor], scales: Sequence[Tensor] = ()) -> Network:
    """Name the entries of the flat weight list that the ops carry; the final norm is there when the length says so."""
    count, rest = divmod(len(weights) - 5, WEIGHTS_PER_BLOCK)
    blocks = []
    for index in range(count):
        first = 3 + index * WEIGHTS_PER_BLOCK
        own = scales[index * SCALES_PER_BLOCK : (index + 1) * SCALES_PER_BLOCK] or (None,) * SCALES_PER_BLOCK
        blocks.append(Block(own, *weights[first : first + WEIGHTS_PER_BLOCK]))
    norm = (weights[-4], weights[-3]) if rest else None
    return Network(weights[0], weights[1], weights[2], blocks, norm, weights[-2], weights[-1])


def forward(h: Tensor, network: Network, hyper: Hyper) -> Tensor:
    """``output(encoder(input(h) + position))`` of ``G`` networks.

    Args:
        h: [G, n, T, F], float32 or float64.

    Returns:
        [G, n, T, F], fresh, in the dtype of ``h``.
    """
    with torch.autocast(h.device.type, enabled=False):  # it reaches into ops and would compute in bfloat16
        parts = [_forward(part, network, hyper, None) for part in _chunks(h, network, hyper)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def backward(
    grad: Tensor, h: Tensor, network: Network, hyper: Hyper, *, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``sum(grad * forward(h))``, the forward recomputed part by part so that memory stays bounded.

    Rounding to bfloat16 counts as the identity. int8 networks have no gradient.

    Args:
        grad, h: [G, n, T, F].
        input_grad, weight_grad: what is wanted.

    Returns:
        The gradient of ``h`` (empty unless ``input_grad``), and those of the weights in the order of the flat list
        (none unless ``weight_grad``).
    """
    grads_h: list[Tensor] = []
    total: list[Tensor] = []
    for part, grad_part in zip(_chunks(h, network, hyper), _chunks(grad, network, hyper), strict=True):
        saved: list = []
        with torch.autocast(h.device.type, enabled=False):
            _forward(part, network, hyper, saved)
            grad_x, grads = _backward(grad_part, saved, network, hyper, weight_grad)
            if input_grad:
                grads_h.append((grad_x @ network.input_weight.to(grad_x.dtype)).view(part.shape))
        total = [a.add_(b) for a, b in zip(total, grads, strict=True)] if total else grads
    return (torch.cat(grads_h, dim=1) if input_grad else h.new_empty(0)), total


def _chunks(h: Tensor, network: Network, hyper: Hyper) -> Sequence[Tensor]:
    """Split [G, n, T, F] along ``n`` so that the widest activation of a part stays near the workspace."""
    count, _, tokens, _ = h.shape
    width = network.position.shape[-1]
    widest = max(3 * width, hyper.heads * tokens, *(block.up_weight.shape[-2] for block in network.blocks))
    return torch.split(h, max(1, _WORKSPACE // (count * tokens * widest)), dim=1)


def _forward(h: Tensor, network: Network, hyper: Hyper, saved: list | None) -> Tensor:
    """One part; appends to ``saved`` what :func:`_backward` pops."""
    keep = (lambda _: None) if saved is None else saved.append
    count, samples, tokens, features = h.shape
    h = h.reshape(count, samples * tokens, features)
    x, saved_input = _linear(h, network.input_weight, network.input_bias)
    keep(saved_input)
    x = (x.view(count, samples, tokens, x.shape[-1]) + network.position.unsqueeze(1)).view(x.shape)
    for block in network.blocks:
        x, saved_block = _block(x, block, hyper, tokens)
        keep(saved_block)
    if network.norm is not None:
        x, saved_norm = _layer_norm(x, *network.norm, hyper.eps)
        keep(saved_norm)
    y, saved_output = _linear(x, network.output_weight, network.output_bias)
    keep(saved_output)
    return y.view(count, samples, tokens, features)


def _backward(
    grad: Tensor, saved: list, network: Network, hyper: Hyper, weight_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of one part with respect to the input projection's result [G, n*T, d] and the weights."""
    count, samples, tokens, features = grad.shape
    grad = grad.reshape(count, samples * tokens, features)
    grad, tail = _linear_backward(grad, saved.pop(), network.output_weight, weight_grad)
    if network.norm is not None:
        grad, grads_norm = _layer_norm_backward(grad, saved.pop(), network.norm[0], weight_grad)
        tail = grads_norm + tail
    for block in reversed(network.blocks):
        grad, grads_block = _block_backward(grad, saved.pop(), block, hyper, tokens, weight_grad)
        tail = grads_block + tail
    if not weight_grad:
        return grad, []
    grad_position = grad.view(count, samples, tokens, grad.shape[-1]).sum(1)
    return grad, [grad.mT @ saved.pop(), grad.sum(1), grad_position, *tail]


def _block(x: Tensor, block: Block, hyper: Hyper, tokens: int) -> tuple[Tensor, tuple]:
    if hyper.norm_first:
        u, norm1 = _layer_norm(x, block.norm1_weight, block.norm1_bias, hyper.eps)
        a, attention = _attention(u, block, hyper.heads, tokens)
        x = x + a
        v, norm2 = _layer_norm(x, block.norm2_weight, block.norm2_bias, hyper.eps)
        f, feed_forward = _feed_forward(v, block, hyper.activation)
        return x + f, (norm1, attention, norm2, feed_forward)
    a, attention = _attention(x, block, hyper.heads, tokens)
    x, norm1 = _layer_norm(x + a, block.norm1_weight, block.norm1_bias, hyper.eps)
    f, feed_forward = _feed_forward(x, block, hyper.activation)
    x, norm2 = _layer_norm(x + f, block.norm2_weight, block.norm2_bias, hyper.eps)
    return x, (norm1, attention, norm2, feed_forward)


def _block_backward(
    grad: Tensor, saved: tuple, block: Block, hyper: Hyper, tokens: int, weight_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    norm1, attention, norm2, feed_forward = saved
    if not hyper.norm_first:
        grad, grads_norm2 = _layer_norm_backward(grad, norm2, block.norm2_weight, weight_grad)
    inner, grads_ff = _feed_forward_backward(grad, feed_forward, block, hyper.activation, weight_grad)
    if hyper.norm_first:
        inner, grads_norm2 = _layer_norm_backward(inner, norm2, block.norm2_weight, weight_grad)
    grad = grad + inner
    if not hyper.norm_first:
        grad, grads_norm1 = _layer_norm_backward(grad, norm1, block.norm1_weight, weight_grad)
    inner, grads_attention = _attention_backward(grad, attention, block, hyper.heads, tokens, weight_grad)
    if hyper.norm_first:
        inner, grads_norm1 = _layer_norm_backward(inner, norm1, block.norm1_weight, weight_grad)
    return grad + inner, grads_attention + grads_ff + grads_norm1 + grads_norm2


def _attention(x: Tensor, block: Block, heads: int, tokens: int) -> tuple[Tensor, tuple]:
    qkv, saved_qkv = _linear(x, block.qkv_weight, block.qkv_bias, block.scales[0])
    dtype = block.qkv_weight.dtype
    q, k, v = (_operand(part, dtype) for part in _split_heads(qkv, tokens, 3, heads))
    p = torch.softmax(q @ k.mT * (1 / math.sqrt(q.shape[-1])), dim=-1)
    rounded = _operand(p, dtype)
    context = (rounded @ v).transpose(1, 2).reshape(x.shape)
    y, saved_proj = _linear(context, block.proj_weight, block.proj_bias, block.scales[1])
    return y, (saved_qkv, q, k, v, p, rounded, saved_proj)


def _attention_backward(
    grad: Tensor, saved: tuple, block: Block, heads: int, tokens: int, weight_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    saved_qkv, q, k, v, p, rounded, saved_proj = saved
    grad, grads_proj = _linear_backward(grad, saved_proj, block.proj_weight, weight_grad)
    (grad_context,) = _split_heads(grad, tokens, 1, heads)
    grad_v = rounded.mT @ grad_context
    grad_p = grad_context @ v.mT
    grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype) * (1 / math.sqrt(q.shape[-1]))
    grad_qkv = grad.new_empty(*grad.shape[:2], 3 * grad.shape[2])
    for part, value in zip(_split_heads(grad_qkv, tokens, 3, heads), (grad_s @ k, grad_s.mT @ q, grad_v), strict=True):
        part.copy_(value)
    grad, grads_qkv = _linear_backward(grad_qkv, saved_qkv, block.qkv_weight, weight_grad)
    return grad, grads_qkv + grads_proj


def _split_heads(x: Tensor, tokens: int, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[G, n*T, parts*d] -> ``parts`` views [G*n, heads, T, d/heads]."""
    rows, width = x.shape[0] * x.shape[1], x.shape[2] // parts
    return x.view(rows // tokens, tokens, parts, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)


def _feed_forward(x: Tensor, block: Block, activation: str) -> tuple[Tensor, tuple]:
    a, saved_up = _linear(x, block.up_weight, block.up_bias, block.scales[2])
    r = F.relu(a) if activation == "relu" else F.gelu(a)
    y, saved_down = _linear(r, block.down_weight, block.down_bias, block.scales[3])
    return y, (saved_up, a, saved_down)


def _feed_forward_backward(
    grad: Tensor, saved: tuple, block: Block, activation: str, weight_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    saved_up, a, saved_down = saved
    grad, grads_down = _linear_backward(grad, saved_down, block.down_weight, weight_grad)
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, a, 0)
    else:
        density = torch.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi))
        grad = grad * (0.5 * (1 + torch.erf(a * math.sqrt(0.5))) + a * density)
    grad, grads_up = _linear_backward(grad, saved_up, block.up_weight, weight_grad)
    return grad, grads_up + grads_down


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple]:
    normal, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.addcmul(bias.unsqueeze(1), normal, weight.unsqueeze(1)), (normal, rstd)


def _layer_norm_backward(grad: Tensor, saved: tuple, weight: Tensor, weight_grad: bool) -> tuple[Tensor, list[Tensor]]:
    normal, rstd = saved
    product = grad * normal
    grads = [product.sum(1), grad.sum(1)] if weight_grad else []
    scaled = grad * weight.unsqueeze(1)
    along = (product * weight.unsqueeze(1)).mean(-1, keepdim=True)
    return rstd * (scaled - scaled.mean(-1, keepdim=True) - normal * along), grads


def _linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [G, M, K] by weight [G, N, K] -> [G, M, N], and the operand that the weights' gradient needs."""
    if scale is not None:
        x, rows = _quantize_rows(x)
        return torch.addcmul(bias.unsqueeze(1), (x @ weight.to(x.dtype).mT) * rows, scale.unsqueeze(1)), x
    x = _operand(x, weight.dtype)
    weight = weight.to(x.dtype)
    if weight.shape[0] == 1:
        return F.linear(x[0], weight[0], bias[0]).unsqueeze(0), x
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT), x


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, weight_grad: bool) -> tuple[Tensor, list[Tensor]]:
    grads = [grad.mT @ x, grad.sum(1)] if weight_grad else []
    return grad @ weight.to(grad.dtype), grads


def _operand(x: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """``x`` as an operand of a product: rounded to bfloat16 beside low-precision weights, kept in its dtype always."""
    return x if weight_dtype == x.dtype else x.to(torch.bfloat16).to(x.dtype)


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in -127..127 held in the dtype of ``x``, and the scale of each row.

    The scale is 1 for a row of zeros, and for one so small that its scale would not be a normal float32: all zeros.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return torch.round(x / scale), scale
