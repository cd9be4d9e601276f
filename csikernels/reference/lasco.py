"""LASCO on a bank of small models in plain PyTorch: the oracle of every kernel, and the fallback without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import transformer


@implement("lasco_forward", "reference")
def lasco_forward(
    h_in, base_output, slot, alpha, proxies, reference, packed, heads, activation, norm_first, eps, keep_shift
):
    hyper = transformer.Hyper(heads, activation, norm_first, eps)
    return _forward(h_in, base_output, slot, alpha, proxies, reference, None, hyper, keep_shift)


@implement("lasco_training_forward", "reference")
def lasco_training_forward(
    h_in, base_output, slot, alpha, proxies, reference, reference_output, heads, activation, norm_first, eps,
    keep_shift, keep,
):  # fmt: skip
    hyper = transformer.Hyper(heads, activation, norm_first, eps)
    output, shift = _forward(h_in, base_output, slot, alpha, proxies, reference, reference_output, hyper, keep_shift)
    # The reference computes the forward again; what it would keep is for compiled kernels alone.
    return output, shift, h_in.new_zeros(kept_shape(h_in, proxies, heads, norm_first) if keep else 0)


def kept_shape(h_in: Tensor, proxies: list[Tensor], heads: int, norm_first: bool) -> tuple[int, int]:
    """[B, floats] of what the compiled training forward keeps; csrc/cpu/lasco_backward_kernel.h lists the rows."""
    layers, rest = divmod(len(proxies) - 5, transformer.WEIGHTS_PER_BLOCK)
    tokens, width = proxies[2].shape[-2:]
    block = 6 * width + heads * tokens + proxies[7].shape[-2] + 2
    first = 0 if norm_first else width
    last = width + 1 if rest else width if norm_first else 0
    return h_in.shape[0], (first + layers * block + last) * (-(-tokens // 16) * 16)


def _forward(h_in, base_output, slot, alpha, proxies, reference, reference_output, hyper, keep_shift):
    check_slot_values(slot, alpha.shape[0])
    if reference_output is None:
        network = transformer.network_of([weight[None] for weight in reference])
        reference_output = transformer.forward(h_in[None], network, hyper)[0]
    shift = base_output - reference_output
    output = torch.empty(h_in.shape, dtype=h_in.dtype, device=h_in.device)
    for slots, rows in groups(slot):
        rows = rows.to(h_in.device)
        output[rows] = transformer.forward(h_in[rows], transformer.network_of(_take(proxies, slots)), hyper)
    output.addcmul_(alpha[slot.to(alpha.device)].view(-1, 1, 1), shift)
    return output, shift if keep_shift else h_in.new_empty(0)


@implement("lasco_backward", "reference")
def lasco_backward(
    grad, h_in, slot, alpha, proxies, reference, shift, kept, heads, activation, norm_first, eps, input_grad,
    weight_grad,
):  # fmt: skip
    hyper = transformer.Hyper(heads, activation, norm_first, eps)
    grads = [torch.zeros_like(weight) for weight in proxies] if weight_grad else []
    grad_h = torch.zeros(h_in.shape, dtype=h_in.dtype, device=h_in.device) if input_grad else h_in.new_empty(0)
    grad_alpha = alpha.new_zeros(alpha.shape if shift.ndim == 3 else 0)
    if shift.ndim == 3:
        grad_alpha.index_add_(0, slot.to(alpha.device), (grad * shift).sum((1, 2)))
    for slots, rows in groups(slot) if input_grad or weight_grad else ():
        rows = rows.to(h_in.device)
        network = transformer.network_of(_take(proxies, slots))
        group_h, group = transformer.backward(
            grad[rows], h_in[rows], network, hyper, input_grad=input_grad, weight_grad=weight_grad
        )
        for total, part in zip(grads, group, strict=weight_grad):
            total[slots.to(total.device)] = part
        if input_grad:
            grad_h[rows] = group_h
    if input_grad and reference:
        network = transformer.network_of([weight[None] for weight in reference])
        through = alpha[slot.to(alpha.device)].view(-1, 1, 1) * grad
        grad_h -= transformer.backward(through[None], h_in[None], network, hyper, input_grad=True, weight_grad=False)[
            0
        ][0]
    return grad_h, grad_alpha, grads


@implement("lasco_squared_error", "reference")
def lasco_squared_error(
    h_in, base_output, target, slot, alpha, proxies, reference, reference_output, heads, activation, norm_first, eps,
    alpha_grad, weight_grad,
):  # fmt: skip
    hyper = transformer.Hyper(heads, activation, norm_first, eps)
    output, shift = _forward(h_in, base_output, slot, alpha, proxies, reference, reference_output, hyper, alpha_grad)
    grad = 2 * (output - target)
    errors = alpha.new_zeros(alpha.shape)
    errors.index_add_(0, slot.to(alpha.device), grad.square().sum((1, 2)) / 4)
    _, grad_alpha, grads = lasco_backward(
        grad, h_in, slot, alpha, proxies, [], shift, h_in.new_empty(0), heads, activation, norm_first, eps, False,
        weight_grad,
    )  # fmt: skip
    return errors, grad_alpha, torch.cat([g.flatten() for g in grads]) if weight_grad else h_in.new_empty(0)


@implement("transformer_forward", "reference")
def transformer_forward(h_in, weights, scales, packed, heads, activation, norm_first, eps):
    network = transformer.network_of([weight[None] for weight in weights], [scale[None] for scale in scales])
    return transformer.forward(h_in[None], network, transformer.Hyper(heads, activation, norm_first, eps))[0]


def check_slot_values(slot: Tensor, slots: int) -> None:
    """Raise unless every entry is in ``0..slots - 1``. Inside the op, so that compiled graphs are checked too."""
    if slot.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(slot))
    if low < 0 or high >= slots:
        raise ValueError(f"slot: expected 0..{slots - 1} (the bank has {slots} slots), got {low if low < 0 else high}")


def groups(slot: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch by network, slots with equally many samples together, so that each set is one batched product.

    Padding is never needed, and there are at most about sqrt(2 B) sets.

    Args:
        slot: [B] int64.

    Yields:
        slots [G] ascending and rows [G, n]: the samples of each slot, in batch order; both on the CPU.
    """
    slot = slot.cpu()
    order = torch.argsort(slot, stable=True)
    slots, counts = torch.unique_consecutive(slot[order], return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    for count in torch.unique(counts).tolist():
        chosen = counts == count
        yield slots[chosen], order[first[chosen][:, None] + torch.arange(count)]


def _take(weights: list[Tensor], slots: Tensor) -> list[Tensor]:
    """The weights of some slots (ascending), without a copy for one slot and for all of them."""
    if len(slots) == 1:
        only = int(slots[0])
        return [weight[only : only + 1] for weight in weights]
    if len(slots) == weights[0].shape[0]:
        return weights
    slots = slots.to(weights[0].device)
    return [weight[slots] for weight in weights]
