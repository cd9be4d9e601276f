"""LASCO: the ops behind the shared small models, and the public ``lasco_forward``.

The schemas carry weights as one flat list, each entry stacked over the slots ``[U, ...]`` (order:
``csikernels.ops.lasco_layout.weight_names``). ``packed`` holds the same weights once more in the chosen backend's own
layout; it is empty for a backend that reads the stacked ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csikernels._arrays import accepts_arrays
from csikernels._dispatch import define
from csikernels.ops.lasco_bank import SamBank
from csikernels.reference import lasco as _reference  # noqa: F401  (registers the backend)

# h_in, base_output [B,T,F]; slot [B]; alpha [U] -> output [B,T,F], shift = base_output - reference(h_in) [B,T,F].
# The shift is what the gradient of alpha needs; it is [0] unless keep_shift.
define(
    "lasco_forward(Tensor h_in, Tensor base_output, Tensor slot, Tensor alpha, Tensor[] proxies, Tensor[] reference, "
    "Tensor[] packed, int heads, str activation, bool norm_first, float eps, bool keep_shift) -> (Tensor, Tensor)"
)
# grad [B,T,F] -> grad_h_in [B,T,F] ([0] unless input_grad), grads of proxies [U, ...] ([] unless weight_grad).
define(
    "lasco_backward(Tensor grad, Tensor h_in, Tensor slot, Tensor alpha, Tensor[] proxies, Tensor[] reference, "
    "int heads, str activation, bool norm_first, float eps, bool input_grad, bool weight_grad) -> (Tensor, Tensor[])"
)
# h_in [B,T,F] -> [B,T,F], one network; scales (int8 only): of qkv, proj, up, down per block.
define(
    "transformer_forward(Tensor h_in, Tensor[] weights, Tensor[] scales, Tensor[] packed, int heads, str activation, "
    "bool norm_first, float eps) -> Tensor"
)


@accepts_arrays
def lasco_forward(h_in: Tensor, base_output: Tensor, bank: SamBank, slot: Tensor) -> Tensor:
    """Correct a large model's reconstruction with each sample's own small model (LASCO, eq. 18).

    ``proxy[slot](h_in) + alpha[slot] * (base_output - reference(h_in))``, for a batch that mixes any slots. A sample's
    result does not depend on the rest of the batch.

    Differentiable once with respect to ``h_in``, ``base_output`` and, in a bank built with ``trainable=True``, the
    proxies' weights and ``bank.alpha``. A slot that the batch does not use gets zero gradients, not None.

    Args:
        h_in: [B, T, F] in the bank's dtype (float32; float64 for a float64 bank), the pseudo-inverse reconstruction in
            network units. Under autocast any floating dtype is taken and cast.
        base_output: [B, T, F], same dtype and device: the large model's output for ``h_in``.
        bank: the small models.
        slot: [B] int64 in ``0..bank.slots - 1``, on the CPU or beside ``h_in``. On the CPU its values are checked
            without waiting for the GPU.

    Returns:
        [B, T, F] in the bank's dtype. NumPy or CuPy arrays give the same kind back.

    Raises:
        TypeError: ``bank`` is no :class:`SamBank`, or a dtype differs from the above.
        ValueError: a shape, a device or a slot is wrong.
    """
    if not isinstance(bank, SamBank):
        raise TypeError(f"bank: expected a SamBank, got {type(bank).__name__}")
    h_in = _input(h_in, "h_in", bank)
    base_output = _input(base_output, "base_output", bank)
    check_input(h_in, "h_in", bank)
    check_input(base_output, "base_output", bank)
    if base_output.shape != h_in.shape:
        raise ValueError(
            f"base_output: expected the shape of h_in, {tuple(h_in.shape)}, got {tuple(base_output.shape)}"
        )
    check_slot(slot, h_in)
    output, _ = torch.ops.csikernels.lasco_forward(
        h_in,
        base_output,
        slot,
        bank.alpha,
        bank.proxies.tensors(),
        bank.reference.tensors(),
        [],
        *bank.architecture.hyper(),
        torch.is_grad_enabled() and bank.alpha.requires_grad,
    )
    return output


def _input(value: Tensor, name: str, bank: SamBank) -> Tensor:
    """Autocast may hand over low precision; the bank computes in its own dtype either way."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != bank.dtype and value.is_floating_point() and torch.is_autocast_enabled(value.device.type):
        return value.to(bank.dtype)
    return value


def check_input(value: Tensor, name: str, bank: SamBank) -> None:
    """Raise unless ``value`` is [B, T, F] as the bank takes it."""
    tokens, features = bank.architecture.tokens, bank.architecture.features
    if value.ndim != 3 or value.shape[1] != tokens or value.shape[2] != features:
        raise ValueError(f"{name}: expected shape [B, {tokens}, {features}], got {tuple(value.shape)}")
    if value.dtype != bank.dtype:
        raise TypeError(f"{name}: expected dtype {bank.dtype} (that of the bank), got {value.dtype}")
    if value.device != bank.device:
        raise ValueError(f"{name}: expected a tensor on {bank.device} (where the bank is), got one on {value.device}")


def check_slot(slot: Tensor, h_in: Tensor) -> None:
    """Raise unless ``slot`` is [B] int64 in reach of ``h_in``; its values are the op's to check."""
    if not isinstance(slot, Tensor) or slot.dtype != torch.int64:
        raise TypeError(f"slot: expected an int64 tensor, got {getattr(slot, 'dtype', type(slot).__name__)}")
    if slot.ndim != 1 or slot.shape[0] != h_in.shape[0]:
        raise ValueError(f"slot: expected shape [{h_in.shape[0]}], one per sample of h_in, got {tuple(slot.shape)}")
    if slot.device != h_in.device and slot.device.type != "cpu":
        raise ValueError(f"slot: expected a tensor on cpu or {h_in.device} (where h_in is), got one on {slot.device}")


@torch.library.register_fake("csikernels::lasco_forward")
def _lasco_forward_fake(
    h_in, base_output, slot, alpha, proxies, reference, packed, heads, activation, norm_first, eps, keep_shift
):
    return h_in.new_empty(h_in.shape), h_in.new_empty(h_in.shape if keep_shift else (0,))


@torch.library.register_fake("csikernels::lasco_backward")
def _lasco_backward_fake(
    grad, h_in, slot, alpha, proxies, reference, heads, activation, norm_first, eps, input_grad, weight_grad
):
    grads = [weight.new_empty(weight.shape) for weight in proxies] if weight_grad else []
    return h_in.new_empty(h_in.shape if input_grad else (0,)), grads


@torch.library.register_fake("csikernels::transformer_forward")
def _transformer_forward_fake(h_in, weights, scales, packed, heads, activation, norm_first, eps):
    return h_in.new_empty(h_in.shape)


def _setup_context(ctx, inputs, output):
    h_in, _, slot, alpha, proxies, reference_weights, packed, *ctx.hyper, _ = inputs
    ctx.count = len(proxies)
    ctx.packed = len(packed)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(h_in, slot, alpha, output[1], *proxies, *reference_weights)


def _backward(ctx, grad, _):
    h_in, slot, alpha, shift, *weights = ctx.saved_tensors
    proxies, reference_weights = weights[: ctx.count], weights[ctx.count :]
    need_h, need_base, _, need_alpha, need_proxies, *_ = ctx.needs_input_grad
    grad_h = grad_base = grad_alpha = None
    grads = [None] * len(proxies)
    index = slot.to(alpha.device)
    if need_base:
        grad_base = alpha[index].view(-1, 1, 1) * grad
    if need_alpha:
        if shift.shape != h_in.shape:
            raise RuntimeError("lasco_forward: the gradient of alpha needs keep_shift=True")
        grad_alpha = torch.zeros_like(alpha).index_add(0, index, (grad * shift).sum((1, 2)))
    if need_h or any(need_proxies):
        computed, stacked = torch.ops.csikernels.lasco_backward(
            grad, h_in, slot, alpha, proxies, reference_weights, *ctx.hyper, need_h, any(need_proxies)
        )
        grad_h = computed if need_h else None
        grads = [g if need else None for g, need in zip(stacked or grads, need_proxies, strict=True)]
    rest = (None,) * (len(ctx.hyper) + 1)
    return grad_h, grad_base, None, grad_alpha, grads, [None] * len(reference_weights), [None] * ctx.packed, *rest


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError("lasco_forward: differentiable once, a second derivative was asked for")


torch.library.register_autograd("csikernels::lasco_forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("csikernels::lasco_backward", _refuse_second_derivative)
