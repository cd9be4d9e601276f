"""lasco_forward in Triton: one program per sample runs its proxy, the reference and eq. 18.

Activations [T, D] stay in registers from the input to the output projection; weights pass through shared memory once
per sample, those of the reference (and of a slot with several samples) out of the L2 cache. At the paper's sizes (T 32,
F 64, d 64, ff 256, 2 blocks; 110 k weights) a sample asks for 2 x 220 KB of bfloat16 weights, 24 KB of input and output
and 15 MFLOP. A batch of 256 samples of as many slots reads 56 MB once: 17 us at 3.35 TB/s, against 4 us of tensor-core
products at 990 TFLOP/s (float32: 112 MB, 34 us, against 57 us at 67 TFLOP/s without tensor cores).

With two stages, the next slice of the weights is copied into the other half of a double buffer (cp.async) while one is
multiplied. Registers a thread, and programs that a multiprocessor of an H100 holds at once, with one and two stages:

    operands  width    4 warps, 1      2     8 warps, 1      2
    bfloat16     32    150 (3)   122 (4)    128 (2)   125 (2)
    bfloat16     64    156 (3)   168 (3)    190 (1)   177 (1)
    bfloat16    128    248 (2)   244 (2)    206 (1)   210 (1)
    float32      32    236 (2)      -       174 (1)   176 (1)
    float32      64    254 (2)      -       254 (1)   254 (1)

On sm_80 width 64 in four warps would spill 16 bytes with two stages (168 registers, as many as with one). Three stages
take 204 registers of it, which leaves room for two programs instead of three. float32 products of width 128, outside
the tensor cores, hold whole rows in registers: they spill 464 bytes in eight warps, more in four or sixteen.

Sizes beyond ``runs_small_models`` and float64 take the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import lasco as in_pytorch
from csikernels.triton import runs_small_models
from csikernels.triton.lasco_block import Sizes, encode, load_tile, operand, project, store_tile
from csikernels.triton.lasco_checks import checked_sizes, checked_weights
from csikernels.triton.launch import architecture, beside, on, tuned

# A product of 32 token rows has work for four warps; with eight a thread holds less.
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2)]


def fits(config: triton.Config, S: Sizes, arch: int) -> bool:
    """Whether a second stage leaves the registers (or takes them from nobody): see above."""
    if config.num_stages == 1:
        return True
    if not S.low:
        return config.num_warps == 8 and S.D <= 64
    return config.num_warps == 8 or S.D != 64 or arch >= 90


@tuned(CONFIGS, key=["S", "KNOWN"], fits=lambda config, given: fits(config, given["S"], architecture()))
@triton.jit
def _forward_kernel(
    h_in,  # [B, tokens, features]
    base_output,  # [B, tokens, features]
    known,  # [B, tokens, features], the reference's output where KNOWN
    slot,  # [B] int64
    alpha,  # [U]
    slots,  # U
    proxies,  # the flat list, [U, ...] each
    reference,  # the flat list
    output,  # [B, tokens, features]
    shift,  # [B, tokens, features] where KEEP_SHIFT
    S: tl.constexpr,
    KNOWN: tl.constexpr,
    KEEP_SHIFT: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * (S.tokens * S.features)
    t = tl.arange(0, S.T)
    if not KNOWN:
        x = operand(encode(h_in + sample, None, reference, 0, S, False), S.low)
    for first in range(0, S.features, S.slice):
        f = first + tl.arange(0, S.slice)
        difference = load_tile(base_output + sample, t, S.t_end, f, S.f_end, S.features)
        if KNOWN:
            difference -= load_tile(known + sample, t, S.t_end, f, S.f_end, S.features)
        else:
            difference -= project(x, reference, 0, f, S)
        if KEEP_SHIFT:
            store_tile(shift + sample, t, S.t_end, f, S.f_end, S.features, difference)
        # Registers are all in use inside a network, so the difference waits in the output.
        store_tile(output + sample, t, S.t_end, f, S.f_end, S.features, difference)
    tl.debug_barrier()
    own = tl.load(slot + tl.program_id(0))
    exists = (own >= 0) & (own < slots)
    own = tl.where(exists, own, 0)
    coefficient = tl.load(alpha + own)
    x = operand(encode(h_in + sample, None, proxies, own, S, False), S.low)
    for first in range(0, S.features, S.slice):
        f = first + tl.arange(0, S.slice)
        difference = load_tile(output + sample, t, S.t_end, f, S.f_end, S.features)
        y = project(x, proxies, own, f, S) + coefficient * difference
        store_tile(output + sample, t, S.t_end, f, S.f_end, S.features, tl.where(exists, y, float("nan")))


@implement("lasco_forward", "triton")
def lasco_forward(
    h_in, base_output, slot, alpha, proxies, reference, packed, heads, activation, norm_first, eps, keep_shift
):
    hyper = (heads, activation, norm_first, eps)
    if h_in.dtype != torch.float64:
        ours = _forward(h_in, base_output, slot, alpha, proxies, reference, None, hyper, keep_shift)
        if ours is not None:
            return ours
    return in_pytorch.lasco_forward(h_in, base_output, slot, alpha, proxies, reference, packed, *hyper, keep_shift)


@implement("lasco_training_forward", "triton")
def lasco_training_forward(
    h_in, base_output, slot, alpha, proxies, reference, reference_output, heads, activation, norm_first, eps,
    keep_shift, keep,
):  # fmt: skip
    hyper = (heads, activation, norm_first, eps)
    if h_in.dtype != torch.float64:
        ours = _forward(h_in, base_output, slot, alpha, proxies, reference, reference_output, hyper, keep_shift)
        if ours is not None:
            # The backward computes the forward again; what it would keep is for compiled kernels alone.
            return *ours, h_in.new_zeros(in_pytorch.kept_shape(h_in, proxies, heads, norm_first) if keep else 0)
    return in_pytorch.lasco_training_forward(
        h_in, base_output, slot, alpha, proxies, reference, reference_output, *hyper, keep_shift, keep
    )


def _forward(
    h_in: Tensor, base_output: Tensor, slot: Tensor, alpha: Tensor, proxies: list[Tensor], reference: list[Tensor],
    reference_output: Tensor | None, hyper: tuple, keep_shift: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Output and shift, or None where the sizes are the reference's."""
    others = {"base_output": base_output}
    if reference_output is not None:
        others["reference_output"] = reference_output
    sizes = checked_sizes(h_in, others, slot, alpha, proxies, *hyper)
    slots, device = alpha.shape[0], h_in.device
    own = checked_weights(proxies, "proxies", sizes, slots, device)
    known = reference_output is not None
    shared = own if known else checked_weights(reference, "reference", sizes, None, device)
    if not runs_small_models(sizes.tokens, sizes.width):
        return None
    h_in, base_output, alpha = h_in.contiguous(), base_output.contiguous(), alpha.contiguous()
    output = torch.empty_like(h_in)
    shift = torch.empty_like(h_in) if keep_shift else h_in.new_empty(0)
    if h_in.numel():
        with on(h_in):
            _forward_kernel[(h_in.shape[0],)](
                h_in, base_output, h_in if reference_output is None else reference_output.contiguous(),
                beside(slot, h_in), alpha, slots, own, shared, output, shift,
                S=sizes, KNOWN=known, KEEP_SHIFT=keep_shift, enable_fp_fusion=True,
            )  # fmt: skip
    return output, shift
