"""NF4 quantisation and the NF4 + LoRA linear layer in plain PyTorch: the oracle and the fallback without a compiler.

NF4 (QLoRA, Dettmers et al.) stores the flattened row-major weight in blocks. Each block keeps its largest magnitude
(absmax, float32) and, per element, the index of the nearest of 16 fixed levels in [-1, 1]; two indices share a byte,
the first in the high nibble. The arithmetic follows bitsandbytes' CPU implementation operation by operation, because
a product instead of a quotient, or a midpoint rounded elsewhere, flips codes at the decision thresholds.

On the CPU the layer's products are summed in float64 and rounded once: how MKL sums float32 depends on the number of
threads, which shows in the last bits, while results here must not depend on it.
"""

from __future__ import annotations

import torch

# Quantiles of the normal distribution, rescaled to [-1, 1] with an exact zero (QLoRA, appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST = 1e-38  # bitsandbytes' guard against division by zero
_SLAB = 2**22  # elements quantised at once; a multiple of every block size


def quantize(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 codes and scales of a weight.

    Args:
        weight: floating [N, K]; float64 is rounded to float32 first.
        block_size: elements per block of the flattened weight.

    Returns:
        packed uint8 [ceil(N*K / 2)], absmax float32 [ceil(N*K / block_size)].

    Raises:
        ValueError: an element is NaN or infinite (in float32); the message has its index.
    """
    flat = weight.reshape(-1)
    codes, scales = [], []
    for start in range(0, flat.numel(), _SLAB):
        slab = flat[start : start + _SLAB].to(torch.float32)
        finite = slab.isfinite()
        if not bool(finite.all()):
            refuse(weight, start + int((~finite).nonzero()[0]))
        code, scale = _quantize_slab(slab, block_size)
        codes.append(code)
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def _quantize_slab(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    whole = flat.numel() // block_size * block_size
    blocks = flat[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    relative = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp(-1, 1).reshape(-1)
    if whole < flat.numel():
        # bitsandbytes divides in the last, shorter block, and its scale is never below the guard.
        tail = flat[whole:].abs().amax().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, tail[None]])
        relative = torch.cat([relative, (flat[whole:] / tail).clamp(-1, 1)])
    if relative.numel() % 2:
        relative = torch.nn.functional.pad(relative, (0, 1))
    levels = torch.tensor(LEVELS, device=flat.device)
    # A value on a midpoint takes the lower level.
    code = torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return (code[::2] << 4) | code[1::2], absmax


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, shape: list[int], block_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight, level times absmax in float32, then rounded to ``dtype``; a fresh tensor of ``shape``.

    Args:
        packed: uint8 [ceil(n / 2)] with n the product of ``shape``.
        absmax: float32 [ceil(n / block_size)].
    """
    count = shape[0] * shape[1]
    levels = torch.tensor(LEVELS, device=packed.device)
    # Both levels of a byte in one 64-bit entry: a look-up yields two elements.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)
    weight = pairs.index_select(0, packed.to(torch.int32)).view(torch.float32)[:count]
    whole = count // block_size * block_size
    weight[:whole].view(-1, block_size).mul_(absmax[: whole // block_size, None])
    weight[whole:].mul_(absmax[whole // block_size :])
    return weight.view(shape).to(dtype)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x W^T + scaling (x A^T) B^T + bias``, rounded once to the dtype of ``x``.

    Args:
        x: floating [..., K].
        packed, absmax: NF4 weight W [N, K].
        lora_a: floating [r, K]; lora_b: floating [N, r]; bias: floating [N] or None.

    Returns:
        [..., N].
    """
    dtype = _product_dtype(x, lora_a, lora_b, bias)
    n, k = lora_b.shape[0], x.shape[-1]
    rows = x.reshape(-1, k).to(dtype)
    out = rows @ dequantize(packed, absmax, [n, k], block_size, dtype).T
    out.addmm_(rows @ lora_a.to(dtype).T, lora_b.to(dtype).T, alpha=scaling)
    if bias is not None:
        out += bias.to(dtype)
    return out.to(x.dtype).view(*x.shape[:-1], n)


def linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    output_mask: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`linear` for x, lora_a and lora_b in their dtypes, and for bias in float32 or wider.

    Args:
        grad: [..., N], gradient of the output.
        output_mask: which of the four are wanted; the others are returned empty.
    """
    dtype = _product_dtype(grad, x, lora_a, lora_b)
    n, k = lora_b.shape[0], x.shape[-1]
    wants_x, wants_a, wants_b, wants_bias = output_mask
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    out, rows = grad.reshape(-1, n).to(dtype), x.reshape(-1, k).to(dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    inner = out @ b  # gradient of x A^T, up to the scaling
    if wants_x:
        grad_x = out @ dequantize(packed, absmax, [n, k], block_size, dtype)
        grad_x = grad_x.addmm_(inner, a, alpha=scaling).to(x.dtype).view(x.shape)
    if wants_a:
        grad_a = (inner.T @ rows).mul_(scaling).to(lora_a.dtype)
    if wants_b:
        grad_b = (out.T @ (rows @ a.T)).mul_(scaling).to(lora_b.dtype)
    grad_bias = out.sum(dim=0) if wants_bias else out.new_empty(0)
    return grad_x, grad_a, grad_b, grad_bias.to(_wide_dtype(grad, x, lora_a, lora_b))


def _product_dtype(x: torch.Tensor, *others: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if x.device.type == "cpu" else _wide_dtype(x, *others)


def _wide_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float32, or float64 where one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_block_size(block_size: int) -> None:
    """Raise ``ValueError`` unless ``block_size`` is one that bitsandbytes has."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")


def refuse(weight: torch.Tensor, position: int) -> None:
    """Raise ``ValueError`` for the element of the flattened ``weight`` that is not finite."""
    row, column = divmod(position, weight.shape[1])
    raise ValueError(
        f"weight: expected finite float32 values, got {float(weight[row, column])} at index ({row}, {column})"
    )
