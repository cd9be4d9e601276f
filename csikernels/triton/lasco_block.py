"""Device functions of the small models: one sample's token rows, held in registers from input to output projection.

A tile is [T, D] with the token rows and columns padded to powers of two of at least 16, the least that a tensor-core
product takes. Rows and columns beyond the real sizes load as 0 and stay harmless: padded columns stay 0 (weights and
biases load as 0 there), padded tokens are kept out of the softmax and never stored.

Weights are read in slices of a head or of ``chunk`` hidden units, straight from the ``[U, N, K]`` storage of the bank;
each slice feeds a product, so that Triton copies the next one into shared memory meanwhile.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from csikernels.triton import interpreted


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that a kernel is compiled for. Upper case: padded."""

    tokens: int
    features: int
    width: int
    heads: int
    feedforward: int
    layers: int
    gelu: bool
    norm_first: bool
    final_norm: bool
    low: bool  # operands of products in bfloat16
    eps: float
    T: int
    D: int
    E: int  # of a head
    chunk: int  # hidden units at a time
    slice: int  # features at a time

    @property
    def head(self) -> int:
        """Columns of a head."""
        return self.width // self.heads

    # Where a tile's rows or columns end, None where that is at the tile's own end: no masks then.
    @property
    def t_end(self) -> int | None:
        return None if self.tokens == self.T else self.tokens

    @property
    def d_end(self) -> int | None:
        return None if self.width == self.D else self.width

    @property
    def c_end(self) -> int | None:
        return self.feedforward if self.feedforward % self.chunk else None

    @property
    def f_end(self) -> int | None:
        return self.features if self.features % self.slice else None

    # What a training pass keeps of a sample: rows of tokens, these columns. Of each block first the operands of its
    # products and the normalised rows, then the gradients that meet those operands in the weights' gradients.
    @property
    def block_columns(self) -> int:
        return 13 * self.width + 2 * self.feedforward

    @property
    def tail(self) -> int:
        """After the blocks: input of the output projection, final normalised rows, gradient of the embedding."""
        return self.layers * self.block_columns

    @property
    def rstd(self) -> int:
        """Last: 1 / deviation of each LayerNorm."""
        return self.tail + 3 * self.width

    @property
    def row(self) -> int:
        """Columns in all, a multiple of a 16-byte load."""
        return -(-(self.rstd + 2 * self.layers + 1) // 4) * 4

    @property
    def at_qkv(self) -> int:
        return self.width

    @property
    def at_context(self) -> int:
        return 4 * self.width

    @property
    def at_normal1(self) -> int:
        return 5 * self.width

    @property
    def at_up(self) -> int:
        return 6 * self.width

    @property
    def at_normal2(self) -> int:
        return 7 * self.width

    @property
    def at_hidden(self) -> int:
        return 8 * self.width

    @property
    def at_grad_qkv(self) -> int:
        return 8 * self.width + self.feedforward

    @property
    def at_grad_proj(self) -> int:
        return 11 * self.width + self.feedforward

    @property
    def at_grad_down(self) -> int:
        return 12 * self.width + self.feedforward

    @property
    def at_grad_up(self) -> int:
        return 13 * self.width + self.feedforward


def sizes_of(h_in, proxies, heads: int, activation: str, norm_first: bool, eps: float, low: bool) -> Sizes:
    """From h_in [B, T, F] and the flat weight list of stacked proxies."""
    tokens, features = h_in.shape[1:]
    width, feedforward = proxies[0].shape[1], proxies[7].shape[1]
    layers, rest = divmod(len(proxies) - 5, 12)
    # Products of float32 run outside the tensor cores, where each thread holds whole rows and columns of its operands.
    most = 32 if low else 16
    return Sizes(
        tokens, features, width, heads, feedforward, layers, activation == "gelu", norm_first, rest != 0, low, eps,
        T=_padded(tokens), D=_padded(width), E=_padded(width // heads),
        chunk=min(most, _padded(feedforward)), slice=min(most, _padded(features)),
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@triton.jit
def load_tile(matrix, row, rows, column, columns, stride):
    """matrix[row, column] as [R, C], 0 from ``rows`` and ``columns`` on (None: there is nothing beyond)."""
    at = matrix + row[:, None] * stride + column[None, :]
    if rows is None and columns is None:
        return tl.load(at)
    elif rows is None:
        return tl.load(at, mask=(column < columns)[None, :], other=0.0)
    elif columns is None:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store_tile(matrix, row, rows, column, columns, stride, value):
    at = matrix + row[:, None] * stride + column[None, :]
    if rows is None and columns is None:
        tl.store(at, value)
    elif rows is None:
        tl.store(at, value, mask=(column < columns)[None, :])
    elif columns is None:
        tl.store(at, value, mask=(row < rows)[:, None])
    else:
        tl.store(at, value, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def load_vector(vector, at, size):
    if size is None:
        return tl.load(vector + at)
    else:
        return tl.load(vector + at, mask=at < size, other=0.0)


# Triton's interpreter truncates to bfloat16 and takes its bits for integers in a product. There, operands are rounded
# and stay float32, which gives the same products.
WIDENED = tl.constexpr(interpreted())


@triton.jit
def operand(x, LOW: tl.constexpr):
    """Of a product: rounded beside bfloat16 weights."""
    if not LOW:
        return x
    elif WIDENED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    else:
        return x.to(tl.bfloat16)


@triton.jit
def product(a, b, total=None):
    """a @ b + total, accumulated in float32."""
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def linear(x, weight, n, rows, k, columns, stride):
    """x [T, K] by weight[n, k] -> [T, N], without bias."""
    return product(x, tl.trans(load_tile(weight, n, rows, k, columns, stride)))


@triton.jit
def normalise(x, S: tl.constexpr):
    """LayerNorm without its affine part: rows [T, D], 0 beyond the width, and 1 / deviation [T]."""
    centred = x - (tl.sum(x, 1) / S.width)[:, None]
    if S.d_end is not None:
        centred = tl.where((tl.arange(0, S.D) < S.width)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / S.width + S.eps)
    return centred * rstd[:, None], rstd


@triton.jit
def affine(normal, weight, bias, S: tl.constexpr):
    d = tl.arange(0, S.D)
    return normal * load_vector(weight, d, S.d_end)[None, :] + load_vector(bias, d, S.d_end)[None, :]


@triton.jit
def activate(a, S: tl.constexpr):
    if S.gelu:
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    return tl.where(a < 0.0, 0.0, a)  # lets NaN through


@triton.jit
def probabilities(q, k, S: tl.constexpr):
    """softmax(q k^T / sqrt(head)) over the real tokens."""
    score = product(q, tl.trans(k)) * (S.head**-0.5)
    if S.t_end is not None:
        score = tl.where((tl.arange(0, S.T) < S.tokens)[None, :], score, float("-inf"))
    p = tl.exp(score - tl.max(score, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def attention(x, kept, qkv_weight, qkv_bias, proj_weight, proj_bias, S: tl.constexpr, KEEP: tl.constexpr):
    """x [T, D], kept at the block's first column -> [T, D]."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    x = operand(x, S.low)
    y = tl.zeros([S.T, S.D], tl.float32)
    for head in range(S.heads):
        first = head * S.head
        at = first + tl.arange(0, S.E)
        end = None if S.head == S.E else first + S.head
        q = linear(x, qkv_weight, at, end, d, S.d_end, S.width)
        k = linear(x, qkv_weight + S.width * S.width, at, end, d, S.d_end, S.width)
        q += load_vector(qkv_bias, at, end)[None, :]
        k += load_vector(qkv_bias + S.width, at, end)[None, :]
        p = probabilities(operand(q, S.low), operand(k, S.low), S)
        # After the scores: registers for q and k are free again.
        v = linear(x, qkv_weight + 2 * S.width * S.width, at, end, d, S.d_end, S.width)
        v += load_vector(qkv_bias + 2 * S.width, at, end)[None, :]
        context = product(operand(p, S.low), operand(v, S.low))
        if KEEP:
            store_tile(kept + S.at_qkv, t, S.t_end, at, end, S.row, q)
            store_tile(kept + S.at_qkv + S.width, t, S.t_end, at, end, S.row, k)
            store_tile(kept + S.at_qkv + 2 * S.width, t, S.t_end, at, end, S.row, v)
            store_tile(kept + S.at_context, t, S.t_end, at, end, S.row, context)
        projected = tl.trans(load_tile(proj_weight, d, S.d_end, at, end, S.width))
        y = product(operand(context, S.low), projected, y)
    return y + load_vector(proj_bias, d, S.d_end)[None, :]


@triton.jit
def feed_forward(x, kept, up_weight, up_bias, down_weight, down_bias, S: tl.constexpr, KEEP: tl.constexpr):
    """x [T, D], kept at the block's first column -> [T, D]."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    x = operand(x, S.low)
    y = tl.zeros([S.T, S.D], tl.float32)
    for first in range(0, S.feedforward, S.chunk):
        c = first + tl.arange(0, S.chunk)
        a = linear(x, up_weight, c, S.c_end, d, S.d_end, S.width)
        a += load_vector(up_bias, c, S.c_end)[None, :]
        if KEEP:
            store_tile(kept + S.at_hidden, t, S.t_end, c, S.c_end, S.row, a)
        down = tl.trans(load_tile(down_weight, d, S.d_end, c, S.c_end, S.feedforward))
        y = product(operand(activate(a, S), S.low), down, y)
    return y + load_vector(down_bias, d, S.d_end)[None, :]


@triton.jit
def keep_norm(kept, column, index, normal, rstd, S: tl.constexpr):
    """The ``index``-th LayerNorm of the sample."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    store_tile(kept + column, t, S.t_end, d, S.d_end, S.row, normal)
    tl.store(kept + S.rstd + index + t * S.row, rstd, mask=t < S.tokens)


@triton.jit
def encoder_block(x, kept, weights, slot, LAYER: tl.constexpr, S: tl.constexpr, KEEP: tl.constexpr):
    """x [T, D] -> [T, D]."""
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    w: tl.constexpr = 3 + 12 * LAYER
    first: tl.constexpr = S.block_columns * LAYER
    own = kept + first if KEEP else kept
    n1, b1 = weights[w + 8] + slot * S.width, weights[w + 9] + slot * S.width
    n2, b2 = weights[w + 10] + slot * S.width, weights[w + 11] + slot * S.width
    u = x
    if S.norm_first:
        normal, rstd = normalise(x, S)
        if KEEP:
            keep_norm(kept, first + S.at_normal1, 2 * LAYER, normal, rstd, S)
        u = affine(normal, n1, b1, S)
    if KEEP:
        store_tile(own, t, S.t_end, d, S.d_end, S.row, u)
    x += attention(
        u, own,
        weights[w] + slot * (3 * S.width * S.width), weights[w + 1] + slot * (3 * S.width),
        weights[w + 2] + slot * (S.width * S.width), weights[w + 3] + slot * S.width, S, KEEP,
    )  # fmt: skip
    normal, rstd = normalise(x, S)
    if S.norm_first:
        if KEEP:
            keep_norm(kept, first + S.at_normal2, 2 * LAYER + 1, normal, rstd, S)
        u = affine(normal, n2, b2, S)
    else:
        if KEEP:
            keep_norm(kept, first + S.at_normal1, 2 * LAYER, normal, rstd, S)
        x = affine(normal, n1, b1, S)
        u = x
    if KEEP:
        store_tile(own + S.at_up, t, S.t_end, d, S.d_end, S.row, u)
    x += feed_forward(
        u, own,
        weights[w + 4] + slot * (S.feedforward * S.width), weights[w + 5] + slot * S.feedforward,
        weights[w + 6] + slot * (S.feedforward * S.width), weights[w + 7] + slot * S.width, S, KEEP,
    )  # fmt: skip
    if not S.norm_first:
        normal, rstd = normalise(x, S)
        if KEEP:
            keep_norm(kept, first + S.at_normal2, 2 * LAYER + 1, normal, rstd, S)
        x = affine(normal, n2, b2, S)
    return x


@triton.jit
def encode(h, kept, weights, slot, S: tl.constexpr, KEEP: tl.constexpr):
    """``encoder(input(h) + position)`` of one sample.

    h [tokens, features]; kept [tokens, row] (read by the backward kernels) where KEEP; weights: the flat list, each
    stacked [U, ...], of which ``slot`` is taken. -> [T, D]
    """
    t, d = tl.arange(0, S.T), tl.arange(0, S.D)
    x = load_tile(weights[2] + slot * (S.tokens * S.width), t, S.t_end, d, S.d_end, S.width)
    for first in range(0, S.features, S.slice):
        f = first + tl.arange(0, S.slice)
        part = operand(load_tile(h, t, S.t_end, f, S.f_end, S.features), S.low)
        weight = load_tile(weights[0] + slot * (S.width * S.features), d, S.d_end, f, S.f_end, S.features)
        x = product(part, tl.trans(weight), x)
    x += load_vector(weights[1] + slot * S.width, d, S.d_end)[None, :]
    layers: tl.constexpr = S.layers
    for layer in tl.static_range(layers):
        x = encoder_block(x, kept, weights, slot, layer, S, KEEP)
    last: tl.constexpr = 3 + 12 * layers
    if S.final_norm:
        normal, rstd = normalise(x, S)
        if KEEP:
            keep_norm(kept, S.tail + S.width, 2 * layers, normal, rstd, S)
        x = affine(normal, weights[last] + slot * S.width, weights[last + 1] + slot * S.width, S)
    if KEEP:
        store_tile(kept + S.tail, t, S.t_end, d, S.d_end, S.row, x)
    return x


@triton.jit
def project(x, weights, slot, f, S: tl.constexpr):
    """Columns ``f`` of ``output(x)``, x [T, D] an operand."""
    d = tl.arange(0, S.D)
    out: tl.constexpr = 3 + 12 * S.layers + 2 if S.final_norm else 3 + 12 * S.layers
    y = linear(x, weights[out] + slot * (S.features * S.width), f, S.f_end, d, S.d_end, S.width)
    return y + load_vector(weights[out + 1] + slot * S.features, f, S.f_end)[None, :]
