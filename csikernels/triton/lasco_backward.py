"""lasco_backward in Triton, for adapting many slots at once (float32; a bfloat16 or float64 bank takes the reference).

Four kernels, none of which adds into memory that another program writes, so that results repeat:

1. the forward again, one program per sample, keeping what the products read: ``Sizes.row`` floats a token;
2. back through the activations, one program per sample, leaving beside it the gradients that meet those operands;
3. each matrix, one program per slot and tile, over the slot's samples in batch order: ``sum_s G_s^T X_s``, the bias
   with it. Nothing is written twice, and a slot without samples gets zeros;
4. sums over a slot's samples of what is one row per sample: LayerNorm's weights, alpha.

At the paper's sizes a sample keeps 361 KB, written once and read about twice (0.3 us of an H100's 3.35 TB/s), and asks
for 29 MFLOP beside the forward's 7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import lasco as in_pytorch
from csikernels.triton import runs_small_models
from csikernels.triton.lasco_block import (
    Sizes,
    activate,
    encode,
    load_tile,
    load_vector,
    probabilities,
    product,
    store_tile,
)
from csikernels.triton.lasco_checks import checked_sizes, checked_weights
from csikernels.triton.launch import beside, on, tuned


@triton.jit
def _keep_kernel(h_in, kept, slot, slots, weights, S: tl.constexpr, STACKED: tl.constexpr):
    """h_in [B, tokens, features] -> kept [B, tokens, row]."""
    sample = tl.program_id(0).to(tl.int64)
    own = _slot_of(slot, slots) if STACKED else 0
    encode(h_in + sample * (S.tokens * S.features), kept + sample * (S.tokens * S.row), weights, own, S, True)


@triton.jit
def _slot_of(slot, slots):
    """The sample's slot; 0 for one that does not exist, of which nothing is kept."""
    own = tl.load(slot + tl.program_id(0))
    return tl.where((own >= 0) & (own < slots), own, 0)


@triton.jit
def _normalise_backward(g, kept, column, index, weight, sums, S: tl.constexpr, WEIGHTS: tl.constexpr):
    """Through the ``index``-th LayerNorm, normalised rows at ``column``; the gradients of its weights go to sums."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    normal = load_tile(kept + column, t, S.t_end, d, S.d_end, S.row)
    rstd = load_vector(kept + S.rstd + index, t * S.row, None if S.t_end is None else S.tokens * S.row)
    if WEIGHTS:
        at = sums + 2 * index * S.width + d
        tl.store(at, tl.sum(g * normal, 0), mask=d < S.width)
        tl.store(at + S.width, tl.sum(g, 0), mask=d < S.width)
    g *= load_vector(weight, d, S.d_end)[None, :]
    along = tl.sum(g * normal, 1) / S.width
    g = g - (tl.sum(g, 1) / S.width)[:, None] - normal * along[:, None]
    if S.d_end is not None:
        g = tl.where((d < S.width)[None, :], g, 0.0)
    return rstd[:, None] * g


@triton.jit
def _feed_forward_backward(g, kept, up_weight, down_weight, S: tl.constexpr, WEIGHTS: tl.constexpr):
    """Gradient of the output [T, D] -> of the input; kept at the block's first column."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    if WEIGHTS:
        store_tile(kept + S.at_grad_down, t, S.t_end, d, S.d_end, S.row, g)
    y = tl.zeros([S.T, S.D], tl.float32)
    for first in range(0, S.feedforward, S.chunk):
        c = first + tl.arange(0, S.chunk)
        a = load_tile(kept + S.at_hidden, t, S.t_end, c, S.c_end, S.row)
        down = load_tile(down_weight, d, S.d_end, c, S.c_end, S.feedforward)
        inner = product(g, down)
        if S.gelu:
            density = tl.exp(-0.5 * a * a) * 0.3989422804014327
            inner *= 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density
        else:
            inner = tl.where(a <= 0.0, 0.0, inner)
        if WEIGHTS:
            store_tile(kept + S.at_grad_up, t, S.t_end, c, S.c_end, S.row, inner)
        up = load_tile(up_weight, c, S.c_end, d, S.d_end, S.width)
        y = product(inner, up, y)
    return y


@triton.jit
def _attention_backward(g, kept, qkv_weight, proj_weight, S: tl.constexpr, WEIGHTS: tl.constexpr):
    """Gradient of the output [T, D] -> of the input; kept at the block's first column."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    if WEIGHTS:
        store_tile(kept + S.at_grad_proj, t, S.t_end, d, S.d_end, S.row, g)
    y = tl.zeros([S.T, S.D], tl.float32)
    for head in range(S.heads):
        first = head * S.head
        at = first + tl.arange(0, S.E)
        end = None if S.head == S.E else first + S.head
        qkv, grad_qkv = kept + S.at_qkv, kept + S.at_grad_qkv
        q = load_tile(qkv, t, S.t_end, at, end, S.row)
        k = load_tile(qkv + S.width, t, S.t_end, at, end, S.row)
        p = probabilities(q, k, S)
        inner = product(g, load_tile(proj_weight, d, S.d_end, at, end, S.width))
        grad_v = product(tl.trans(p), inner)
        v = load_tile(qkv + 2 * S.width, t, S.t_end, at, end, S.row)
        grad_p = product(inner, tl.trans(v))
        score = p * (grad_p - tl.sum(grad_p * p, 1)[:, None]) * (S.head**-0.5)
        grad_q = product(score, k)
        grad_k = product(tl.trans(score), q)
        if WEIGHTS:
            store_tile(grad_qkv, t, S.t_end, at, end, S.row, grad_q)
            store_tile(grad_qkv + S.width, t, S.t_end, at, end, S.row, grad_k)
            store_tile(grad_qkv + 2 * S.width, t, S.t_end, at, end, S.row, grad_v)
        matrix = S.width * S.width
        y = product(grad_q, load_tile(qkv_weight, at, end, d, S.d_end, S.width), y)
        weight = load_tile(qkv_weight + matrix, at, end, d, S.d_end, S.width)
        y = product(grad_k, weight, y)
        weight = load_tile(qkv_weight + 2 * matrix, at, end, d, S.d_end, S.width)
        y = product(grad_v, weight, y)
    return y


@triton.jit
def _block_backward(g, kept, weights, slot, sums, LAYER: tl.constexpr, S: tl.constexpr, WEIGHTS: tl.constexpr):
    w: tl.constexpr = 3 + 12 * LAYER
    first: tl.constexpr = S.block_columns * LAYER
    own = kept + first
    n1, n2 = weights[w + 8] + slot * S.width, weights[w + 10] + slot * S.width
    qkv, proj = weights[w] + slot * (3 * S.width * S.width), weights[w + 2] + slot * (S.width * S.width)
    up, down = (
        weights[w + 4] + slot * (S.feedforward * S.width),
        weights[w + 6] + slot * (S.feedforward * S.width),
    )
    if S.norm_first:
        inner = _feed_forward_backward(g, own, up, down, S, WEIGHTS)
        g += _normalise_backward(inner, kept, first + S.at_normal2, 2 * LAYER + 1, n2, sums, S, WEIGHTS)
        inner = _attention_backward(g, own, qkv, proj, S, WEIGHTS)
        return g + _normalise_backward(inner, kept, first + S.at_normal1, 2 * LAYER, n1, sums, S, WEIGHTS)
    else:
        g = _normalise_backward(g, kept, first + S.at_normal2, 2 * LAYER + 1, n2, sums, S, WEIGHTS)
        g += _feed_forward_backward(g, own, up, down, S, WEIGHTS)
        g = _normalise_backward(g, kept, first + S.at_normal1, 2 * LAYER, n1, sums, S, WEIGHTS)
        return g + _attention_backward(g, own, qkv, proj, S, WEIGHTS)


@triton.jit
def _activation_kernel(
    grad,  # [B, tokens, features]
    kept,  # [B, tokens, row]
    slot,  # [B]
    alpha,  # [U]
    slots,  # U
    weights,  # the flat list
    grad_h,  # [B, tokens, features] where INPUT
    sums,  # [B, 2 * LayerNorms, width] where WEIGHTS
    S: tl.constexpr,
    STACKED: tl.constexpr,  # a slot's proxy; else the reference, through which -alpha * grad flows into what is there
    INPUT: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    own = _slot_of(slot, slots)
    scale = 1.0
    if not STACKED:
        scale = -tl.load(alpha + own)
        own = own * 0
    values = sample * (S.tokens * S.features)
    kept += sample * (S.tokens * S.row)
    layers: tl.constexpr = S.layers
    last: tl.constexpr = 3 + 12 * layers
    out: tl.constexpr = last + 2 if S.final_norm else last
    norms: tl.constexpr = 2 * layers + 1 if S.final_norm else 2 * layers
    sums += sample * (2 * norms * S.width)
    g = tl.zeros([S.T, S.D], tl.float32)
    for first in range(0, S.features, S.slice):
        f = first + tl.arange(0, S.slice)
        part = load_tile(grad + values, t, S.t_end, f, S.f_end, S.features) * scale
        weight = load_tile(weights[out] + own * (S.features * S.width), f, S.f_end, d, S.d_end, S.width)
        g = product(part, weight, g)
    if S.final_norm:
        g = _normalise_backward(g, kept, S.tail + S.width, 2 * layers, weights[last] + own * S.width, sums, S, WEIGHTS)
    for i in tl.static_range(layers):
        g = _block_backward(g, kept, weights, own, sums, layers - 1 - i, S, WEIGHTS)
    if WEIGHTS:
        store_tile(kept + S.tail + 2 * S.width, t, S.t_end, d, S.d_end, S.row, g)
    if INPUT:
        for first in range(0, S.features, S.slice):
            f = first + tl.arange(0, S.slice)
            weight = load_tile(weights[0] + own * (S.width * S.features), d, S.d_end, f, S.f_end, S.features)
            part = product(g, weight)
            if not STACKED:
                part += load_tile(grad_h + values, t, S.t_end, f, S.f_end, S.features)
            store_tile(grad_h + values, t, S.t_end, f, S.f_end, S.features, part)


# Few slots fill a GPU with small tiles alone; with many slots larger tiles read the operands less often.
TILES = [triton.Config({"TILE": tile}, num_warps=4, num_stages=1) for tile in (32, 64)]


@tuned(TILES, key=["S", "rows", "columns", "slots"])
@triton.jit
def _weight_kernel(
    gradient,  # of a product's output: [B, tokens, ...], its columns from here
    gradient_row,  # floats of a token
    x,  # the product's operand, likewise
    x_row,
    order,  # [B]: samples by slot
    first,  # [U + 1]: where each slot's samples begin
    weight,  # [U, rows, columns]
    bias,  # [U, rows]
    position,  # [U, tokens, rows] where POSITION
    rows,
    columns,
    slots,
    S: tl.constexpr,
    ACTIVATED: tl.constexpr,  # x is kept before its activation
    POSITION: tl.constexpr,  # the input projection: the position's gradient is that of its output
    TILE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    t, n, k = tl.arange(0, S.T), tl.arange(0, TILE), tl.arange(0, TILE)
    n += tl.program_id(1) * TILE
    k += tl.program_id(2) * TILE
    total = tl.zeros([TILE, TILE], tl.float32)
    along = tl.zeros([S.T, TILE], tl.float32)
    for i in range(tl.load(first + slot), tl.load(first + slot + 1)):
        token = tl.load(order + i) * S.tokens
        g = load_tile(gradient + token * gradient_row, t, S.t_end, n, rows, gradient_row)
        part = load_tile(x + token * x_row, t, S.t_end, k, columns, x_row)
        if ACTIVATED:
            part = activate(part, S)
        total = product(tl.trans(g), part, total)
        along += g
    store_tile(weight + slot * rows * columns, n, rows, k, columns, columns, total)
    if tl.program_id(2) == 0:
        tl.store(bias + slot * rows + n, tl.sum(along, 0), mask=n < rows)
        if POSITION:
            store_tile(position + slot * S.tokens * rows, t, S.t_end, n, rows, rows, along)


@triton.jit
def _slot_sum_kernel(values, order, first, outputs, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """values [B, len(outputs), SIZE] -> each output [U, SIZE], summed over the slot's samples in batch order."""
    slot, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    count: tl.constexpr = len(outputs)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(tl.load(first + slot), tl.load(first + slot + 1)):
        row = tl.load(order + at) * (count * SIZE) + which * SIZE
        total += tl.load(values + row + i, mask=i < SIZE, other=0.0)
    for o in tl.static_range(count):
        if which == o:
            tl.store(outputs[o] + slot * SIZE + i, total, mask=i < SIZE)


@implement("lasco_backward", "triton")
def lasco_backward(
    grad, h_in, slot, alpha, proxies, reference, shift, kept, heads, activation, norm_first, eps, input_grad,
    weight_grad,
):  # fmt: skip
    hyper = (heads, activation, norm_first, eps)
    if h_in.dtype != torch.float64 and proxies[0].dtype != torch.bfloat16:
        others = {"grad": grad, "shift": shift} if shift.ndim == 3 else {"grad": grad}
        sizes = checked_sizes(h_in, others, slot, alpha, proxies, *hyper)
        own = checked_weights(proxies, "proxies", sizes, alpha.shape[0], h_in.device)
        shared = checked_weights(reference, "reference", sizes, None, h_in.device) if reference else ()
        if runs_small_models(sizes.tokens, sizes.width):
            with on(h_in):
                return _backward(sizes, grad, h_in, slot, alpha, own, shared, shift, input_grad, weight_grad)
    return in_pytorch.lasco_backward(
        grad, h_in, slot, alpha, proxies, reference, shift, kept, *hyper, input_grad, weight_grad
    )


def _backward(
    s: Sizes, grad: Tensor, h_in: Tensor, slot: Tensor, alpha: Tensor, proxies: tuple[Tensor, ...],
    reference: tuple[Tensor, ...], shift: Tensor, input_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    grad, h_in, alpha = grad.contiguous(), h_in.contiguous(), alpha.contiguous()
    samples, slots = h_in.shape[0], alpha.shape[0]
    slot = beside(slot, h_in)
    by_slot, order = torch.sort(slot, stable=True)
    first = torch.searchsorted(by_slot, torch.arange(slots + 1, device=slot.device))
    grads = [torch.empty_like(weight) for weight in proxies] if weight_grad else []
    grad_h = torch.empty_like(h_in) if input_grad else h_in.new_empty(0)
    norms = 2 * s.layers + s.final_norm
    sums = h_in.new_empty((samples, 2 * norms, s.width) if weight_grad else 0)
    kept = h_in.new_empty((samples, s.tokens, s.row) if input_grad or weight_grad else 0)
    passes = [(proxies, True)] if input_grad or weight_grad else []
    passes += [(reference, False)] if input_grad and reference else []
    # Through the reference first would leave nothing for the weights' gradients: its pass reuses what was kept.
    for weights, stacked in passes if samples else []:
        _keep_kernel[(samples,)](h_in, kept, slot, slots, weights, S=s, STACKED=stacked, **OPTIONS)
        _activation_kernel[(samples,)](
            grad, kept, slot, alpha, slots, weights, grad_h, sums,
            S=s, STACKED=stacked, INPUT=input_grad, WEIGHTS=weight_grad and stacked, **OPTIONS,
        )  # fmt: skip
        if stacked and weight_grad:
            _weight_gradients(s, grad, h_in, kept, sums, order, first, grads)
    if weight_grad and not samples:
        for gradient in grads:
            gradient.zero_()
    if shift.ndim != 3:
        return grad_h, alpha.new_empty(0), grads
    grad_alpha = torch.zeros_like(alpha)
    if samples and slots:
        along = (grad * shift).sum((1, 2))
        _slot_sum_kernel[(slots, 1)](along, order, first, (grad_alpha,), SIZE=1, BLOCK=1, enable_fp_fusion=True)
    return grad_h, grad_alpha, grads


# Four warps would spill registers; the activation kernel adds into its output, so it cannot be tuned.
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


def _weight_gradients(
    s: Sizes, grad: Tensor, h_in: Tensor, kept: Tensor, sums: Tensor, order: Tensor, first: Tensor,
    grads: list[Tensor],
) -> None:  # fmt: skip
    """Fill ``grads`` from what the other kernels kept."""
    slots = first.shape[0] - 1

    def columns(at: int) -> Tensor:
        return kept.view(-1)[at:]

    def launch(gradient: Tensor, x: Tensor, index: int, *, activated: bool = False) -> None:
        weight, bias = grads[index], grads[index + 1]
        rows, depth = weight.shape[1:]
        position = grads[2] if index == 0 else bias
        _weight_kernel[lambda meta: (slots, triton.cdiv(rows, meta["TILE"]), triton.cdiv(depth, meta["TILE"]))](
            gradient, s.features if gradient is grad else s.row, x, s.features if x is h_in else s.row,
            order, first, weight, bias, position, rows, depth, slots,
            S=s, ACTIVATED=activated, POSITION=index == 0, enable_fp_fusion=True,
        )  # fmt: skip

    launch(columns(s.tail + 2 * s.width), h_in, 0)
    for layer in range(s.layers):
        at, index = layer * s.block_columns, 3 + 12 * layer
        launch(columns(at + s.at_grad_qkv), columns(at), index)
        launch(columns(at + s.at_grad_proj), columns(at + s.at_context), index + 2)
        launch(columns(at + s.at_grad_up), columns(at + s.at_up), index + 4)
        launch(columns(at + s.at_grad_down), columns(at + s.at_hidden), index + 6, activated=True)
    launch(grad, columns(s.tail), len(grads) - 2)
    norms = [grads[3 + 12 * layer + 8 + i] for layer in range(s.layers) for i in range(4)]
    norms += grads[-4:-2] if s.final_norm else []
    _slot_sum_kernel[(slots, len(norms))](
        sums, order, first, tuple(norms), SIZE=s.width, BLOCK=s.D, enable_fp_fusion=True
    )
