"""Linear layers with a 4-bit NormalFloat weight and a low-rank adapter: schemas, fakes, autograd, public functions."""

from __future__ import annotations

import math

import torch

from csikernels import _dispatch
from csikernels._arrays import accepts_arrays
from csikernels.ops.nf4_lora_weight import DTYPES, NF4Weight
from csikernels.reference import nf4_lora as reference
from csikernels.reference.nf4_lora import check_block_size

QUANTIZE = _dispatch.define("nf4_quantize(Tensor weight, int block_size) -> (Tensor packed, Tensor absmax)")
DEQUANTIZE = _dispatch.define(
    "nf4_dequantize(Tensor packed, Tensor absmax, SymInt[] shape, int block_size, ScalarType dtype) -> Tensor"
)
LINEAR = _dispatch.define(
    "nf4_lora_linear(Tensor x, Tensor packed, Tensor absmax, int block_size, Tensor lora_a, Tensor lora_b,"
    " float scaling, Tensor? bias) -> Tensor"
)
BACKWARD = _dispatch.define(
    "nf4_lora_linear_backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax, int block_size, Tensor lora_a,"
    " Tensor lora_b, float scaling, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
)

_linear = torch.ops.csikernels.nf4_lora_linear.default
# Plain tensors go straight to the compiled op, which checks them by itself: for one token, checks in Python would take
# as long as the kernel.
_COMPILED = _dispatch.has_compiled_kernel(LINEAR, "cpu")
_COMPILED_CUDA = _dispatch.has_compiled_kernel(LINEAR, "cuda")
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_dispatch.implement(QUANTIZE, "reference")(reference.quantize)
_dispatch.implement(DEQUANTIZE, "reference")(reference.dequantize)
_dispatch.implement(LINEAR, "reference")(reference.linear)
_dispatch.implement(BACKWARD, "reference")(reference.linear_backward)


@_dispatch.register_fake(QUANTIZE)
def _(weight, block_size):
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((count + block_size - 1) // block_size, dtype=torch.float32)


@_dispatch.register_fake(DEQUANTIZE)
def _(packed, absmax, shape, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@_dispatch.register_fake(LINEAR)
def _(x, packed, absmax, block_size, lora_a, lora_b, scaling, bias):
    return x.new_empty((*x.shape[:-1], lora_b.shape[0]))


@_dispatch.register_fake(BACKWARD)
def _(grad, x, packed, absmax, block_size, lora_a, lora_b, scaling, output_mask):
    wide = torch.float32
    for tensor in (grad, x, lora_a, lora_b):
        wide = torch.promote_types(wide, tensor.dtype)
    shapes = (x.shape, lora_a.shape, lora_b.shape, (lora_b.shape[0],))
    dtypes = (x.dtype, lora_a.dtype, lora_b.dtype, wide)
    return tuple(
        x.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, output_mask, strict=True)
    )


def _save(ctx, inputs, output):
    x, packed, absmax, ctx.block_size, lora_a, lora_b, ctx.scaling, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, packed, absmax, lora_a, lora_b)


def _differentiate(ctx, grad):
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[4], needs[5], needs[7]]
    x, packed, absmax, lora_a, lora_b = ctx.saved_tensors
    grads = torch.ops.csikernels.nf4_lora_linear_backward(
        grad, x, packed, absmax, ctx.block_size, lora_a, lora_b, ctx.scaling, mask
    )
    for_x, for_a, for_b, for_bias = (value if wanted else None for value, wanted in zip(grads, mask, strict=True))
    if for_bias is not None:
        for_bias = for_bias.to(ctx.bias_dtype)
    return for_x, None, None, None, for_a, for_b, None, for_bias


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("nf4_lora_linear has no second derivative")


if not torch._C._dispatch_has_kernel_for_dispatch_key(f"csikernels::{LINEAR}", "Autograd"):
    # The extension brings its own, in C++: at one token a formula in Python costs as much as the layer.
    torch.library.register_autograd(f"csikernels::{LINEAR}", _differentiate, setup_context=_save)
torch.library.register_autograd(f"csikernels::{BACKWARD}", _refuse_second_derivative)


def _register_autocast(device: str, key: str) -> None:
    """Under autocast ``x`` is cast as for ``F.linear``; the scales and the adapter keep their dtypes."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_x(x, *args):
        with torch._C._ExcludeDispatchKeyGuard(below):
            if x.dtype != torch.float64:  # like PyTorch, which leaves float64 alone
                x = x.to(torch.get_autocast_dtype(device))
            return torch.ops.csikernels.nf4_lora_linear(x, *args)

    _dispatch._public.impl(LINEAR, cast_x, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


@accepts_arrays
def nf4_quantize(weight, block_size: int = 64) -> NF4Weight:
    """Quantise a weight to NF4 blocks, bit-identical to bitsandbytes' (``quant_type="nf4"``, no nested statistics).

    On a GPU the default backend is ``cuda`` where it is built, else ``triton``. Both wait for the result, to name an
    element that is not finite, so this cannot be captured in a CUDA graph; :func:`nf4_lora_linear`, its gradients and
    ``dequantize`` can (in Triton once a call of the same kind has compiled and tuned the kernel).

    Args:
        weight: float16, bfloat16, float32 or float64 [N, K]; tensor or array. float64 is rounded to float32 first.
        block_size: elements of the flattened weight that share a scale: 32, 64, 128, ..., 4096.

    Raises:
        TypeError: ``weight`` is no floating tensor or array.
        ValueError: not two-dimensional, empty, an unknown block size, or an element that is NaN or infinite (the
            message names the first).
    """
    _check_weight(weight)
    check_block_size(block_size)
    packed, absmax = torch.ops.csikernels.nf4_quantize(weight.detach(), block_size)
    return NF4Weight(packed, absmax, weight.shape, block_size, weight.dtype)


def nf4_lora_linear(x, weight: NF4Weight, lora_a, lora_b, *, scaling: float = 1.0, bias=None):
    """Linear layer with a 4-bit weight and a low-rank adapter: ``x W^T + scaling (x A^T) B^T + bias``.

    This is the adapted layer of the multi-task LLM (Zheng and Dai, eq. 28) on the quantised backbone of eq. 30. Sums
    are float32 or wider, and the result is rounded once to the dtype of ``x``. A bfloat16 ``x`` is multiplied in
    bfloat16 where the CPU can: the weight's elements (or levels), the adapter and ``x A^T`` are then rounded to
    bfloat16 first, as ``F.linear`` rounds them; every other dtype is multiplied in float32, and where one of the
    arguments is float64, in float64 by torch. Gradients flow to ``x``, ``lora_a``, ``lora_b`` and ``bias``, in float32
    or wider; the 4-bit weight is constant. Under autocast ``x`` is cast as for ``F.linear``.

    On a GPU of compute capability 8.0 or later the default backend is ``cuda`` where it is built, else ``triton``, on
    every architecture: float32 by fused multiply-adds, never TF32; a bfloat16 or float16 ``x`` on tensor cores with
    float32 sums, the weight's elements rounded to that dtype once. The adapter and ``x A^T`` are rounded to it too: in
    ``triton`` always, in ``cuda`` beyond 16 tokens. Gradients of ``x`` are products in its dtype, and those of the
    adapter too where it has that dtype, else in float32. Products of the adapter alone are cuBLAS's in gradients, and
    beyond 16 tokens (``cuda``) or a rank of 32 (``triton``), so that torch's settings for TF32 hold for them. float64,
    and sizes of more than 8 million rows or columns, take the reference.

    Neither backend has run on a GPU yet; the order rests on their machine code. Up to 16 tokens ``cuda`` multiplies
    what it decodes from registers, while ``triton`` passes it through shared memory once more. Beyond, ``cuda`` has
    Ampere's instructions, which reach about 60 % of an H100's tensor cores, while ``triton`` compiles to those of
    sm_90 (HGMMA) and sm_100 (tcgen05): with some hundred bfloat16 tokens on these, try ``use_backend("triton")``.

    Args:
        x: float16, bfloat16, float32 or float64 [..., K].
        weight: NF4 weight W [N, K].
        lora_a: A, floating [r, K]; lora_b: B, floating [N, r]. Their dtype may differ from that of ``x``; r may be 0.
        scaling: alpha / r in LoRA's terms.
        bias: floating [N], or None.

    Returns:
        [..., N] in the dtype of ``x`` (of autocast, where it is on).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, or ``scaling`` is not finite.
    """
    if _is_plain(x, weight, lora_a, lora_b, scaling, bias):
        try:
            return _linear(x, weight.packed, weight.absmax, weight.block_size, lora_a, lora_b, scaling, bias)
        except (TypeError, ValueError):
            pass  # said again below, in Python's words
    return _nf4_lora_linear(x, weight, lora_a, lora_b, scaling=scaling, bias=bias)


def _is_plain(x, weight, lora_a, lora_b, scaling, bias) -> bool:
    """Whether the compiled op's own checks are enough; it does not know the weight's shape, only its size."""
    return (
        type(weight) is NF4Weight
        and type(x) in _PLAIN
        and type(lora_a) in _PLAIN
        and type(lora_b) in _PLAIN
        and type(scaling) is float
        and math.isfinite(scaling)
        and (bias is None or type(bias) in _PLAIN)
        and (
            (_COMPILED and x.is_cpu and weight.packed.is_cpu and lora_a.is_cpu and lora_b.is_cpu)
            or (_COMPILED_CUDA and x.is_cuda and x.device == weight.packed.device == lora_a.device == lora_b.device)
        )
        and (bias is None or bias.device == x.device)
        and (lora_b.shape[:1] + x.shape[-1:]) == weight.shape
    )


@accepts_arrays
def _nf4_lora_linear(x, weight, lora_a, lora_b, *, scaling, bias):
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight: expected an NF4Weight, got {type(weight).__name__}")
    check_linear(x, weight.shape, weight.device, lora_a, lora_b, scaling, bias)
    return _linear(x, weight.packed, weight.absmax, weight.block_size, lora_a, lora_b, float(scaling), bias)


@accepts_arrays
def loftq_init(weight, rank: int, *, iterations: int = 5, block_size: int = 64):
    """Quantise a weight and fit a low-rank adapter to what is lost (LoftQ; Zheng and Dai, Algorithm 1, eqs. 30-35).

    Each iteration quantises ``W - B A`` and then takes the best rank-r approximation of the new residual from its
    singular value decomposition, singular values split evenly between A and B. The alternation is not guaranteed to
    improve at every step; the iterate with the smallest ``|W - Q - B A|_F`` is returned, so that more iterations never
    give a worse start.

    Args:
        weight: float16, bfloat16, float32 or float64 [N, K]; tensor or array.
        rank: r, 1..min(N, K).
        iterations: at least 1.
        block_size: see :func:`nf4_quantize`.

    Returns:
        The NF4Weight, lora_a [r, K] and lora_b [N, r], for ``scaling`` 1; the adapter is float32 (float64 for a float64
        weight).

    Raises:
        TypeError: ``weight`` is no floating tensor or array.
        ValueError: ``rank`` or ``iterations`` is out of range, or what :func:`nf4_quantize` refuses.
    """
    _check_weight(weight)
    check_block_size(block_size)
    limit = min(weight.shape)
    if not isinstance(rank, int) or not 1 <= rank <= limit:
        raise ValueError(f"rank: expected an integer in 1..{limit} for shape {tuple(weight.shape)}, got {rank!r}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    with torch.no_grad():
        return _loftq(weight, rank, iterations, block_size)


def _loftq(weight: torch.Tensor, rank: int, iterations: int, block_size: int):
    kept = torch.promote_types(weight.dtype, torch.float32)
    # float64 throughout, so that the codes do not hang on the last bits of a float32 decomposition.
    dense = weight.to(torch.float64)
    target, best, smallest = dense, None, math.inf
    for _ in range(iterations):
        # The original's dtype is recorded, not that of the residual.
        packed, absmax = torch.ops.csikernels.nf4_quantize(target, block_size)
        quantised = NF4Weight(packed, absmax, weight.shape, block_size, weight.dtype)
        residual = dense - quantised.dequantize(torch.float64)
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        root = s[:rank].sqrt()
        lora_a, lora_b = (root[:, None] * v[:rank]).to(kept), (u[:, :rank] * root).to(kept)
        lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()  # LAPACK's factors are column-major
        low_rank = lora_b.to(torch.float64) @ lora_a.to(torch.float64)
        norm = float(torch.linalg.matrix_norm(residual - low_rank))
        if norm < smallest:
            best, smallest = (quantised, lora_a, lora_b), norm
        target = dense - low_rank
    return best


def _check_weight(weight) -> None:
    if not isinstance(weight, torch.Tensor) or weight.dtype not in DTYPES:
        given = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a float16, bfloat16, float32 or float64 tensor or array, got {given}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [N, K], got shape {tuple(weight.shape)}")


def check_linear(x, shape, device, lora_a, lora_b, scaling, bias) -> None:
    """Raise unless the arguments of :func:`nf4_lora_linear` fit a weight of ``shape`` (N, K) on ``device``."""
    n, k = shape
    _check_tensor("x", x, device)
    _check_tensor("lora_a", lora_a, device)
    _check_tensor("lora_b", lora_b, device)
    if bias is not None:
        _check_tensor("bias", bias, device)
    x_shape, a_shape, b_shape = x.shape, lora_a.shape, lora_b.shape
    if len(x_shape) < 1 or x_shape[-1] != k:
        raise ValueError(f"x: expected [..., {k}] for a weight of shape ({n}, {k}), got {tuple(x_shape)}")
    if len(a_shape) != 2 or a_shape[1] != k:
        raise ValueError(f"lora_a: expected [r, {k}] for a weight of shape ({n}, {k}), got {tuple(a_shape)}")
    if b_shape != (n, a_shape[0]):
        raise ValueError(f"lora_b: expected ({n}, {a_shape[0]}), got {tuple(b_shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: expected ({n},), got {tuple(bias.shape)}")
    if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling!r}")


def _check_tensor(name: str, value, device: torch.device) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a float16, bfloat16, float32 or float64 tensor or array, got {given}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where the weight is, got one on {value.device}")
