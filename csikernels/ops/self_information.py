"""Self-information of CSI, selection of its most informative elements, and the codeword's way back (LLMCsiNet).

On a CPU these ops run in C++, and in PyTorch where that was not built. On GPUs of compute capability 8.0 or later the
CUDA kernels are the default where they were built: they keep keys and survivors in shared memory, and evaluate each
pair of neighbours once. Where they were not, the Triton kernels are, which need no compiler when the package is
installed and select by the same rule. Older GPUs and samples of more than 16,384 elements take the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from csikernels import _load
from csikernels._arrays import accepts_arrays
from csikernels._dispatch import NAMESPACE, define, has_compiled_kernel, register_fake
from csikernels.reference import self_information as _reference

define("self_information(Tensor h, float bandwidth, int[] offsets) -> Tensor")
define(
    "select_informative(Tensor h, SymInt m, float bandwidth, int[] offsets, Tensor? source=None) -> (Tensor, Tensor)"
)
define("top_m(Tensor score, SymInt m, Tensor? source=None) -> (Tensor, Tensor)")
define("scatter_codeword(Tensor values, Tensor indices, Tensor mean, SymInt[] shape) -> Tensor")

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ops = torch.ops.csikernels
_select = _ops.select_informative.default

# Whether the compiled ops are there. They check what they are given by themselves, in C++, and on the CPU even where
# they hand the call over to another backend. Plain CPU tensors go straight to them: for one sample, checks in Python
# would take as long as the kernel.
_COMPILED = has_compiled_kernel("select_informative", "cpu")


# Public functions -----------------------------------------------------------------------------------------------------


def self_information(
    h: Tensor, *, bandwidth: float, radius: int = 3, offsets: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Information content of every element of a CSI image, estimated from a few of its neighbours.

    Equations 5 to 9 of LLMCsiNet, where the kernel density estimate runs over ``K`` neighbours ``c_jk`` of ``c_j``::

        I_j = -log2( 1/K * sum_k exp(-(c_j - c_jk)^2 / (2 b^2)) / (sqrt(2 pi) b) )

    Neighbours outside the array are 0 (zero padding). The real and imaginary channel are two images of their own. The
    paper leaves open which nine elements of the neighbourhood are taken; the default is the grid
    {-radius, 0, radius}^2, and ``offsets`` states any other choice.

    Args:
        h: ``[B, C, H, W]``, float16, bfloat16, float32 or float64.
        bandwidth: Standard deviation ``b`` of the Gaussian kernel, in the unit of ``h``; finite and positive.
        radius: Reach of the default grid, in elements; at least 1.
        offsets: ``K`` pairs (row, column) relative to the element, instead of the default grid. May repeat.

    Returns:
        Information in bits, ``[B, C, H, W]``, float64 for float64 input and float32 otherwise. An element that is not
        finite, or has a NaN among its neighbours, gets NaN; an infinite neighbour counts as infinitely far. The result
        carries no gradient: it serves to rank, and the selection is discrete.

    Backends:
        C++ on a CPU; on a GPU of sm_80 or later CUDA where it was built (it evaluates each pair of neighbours once),
        else Triton, up to 16,384 elements a sample; else the reference.

    Raises:
        TypeError: ``h`` is no floating-point tensor, or ``radius`` or an offset is no integer.
        ValueError: wrong rank, or ``bandwidth``, ``radius`` or ``offsets`` out of range.
    """
    if type(h) is Tensor and h.is_cpu and _COMPILED:
        try:
            return _ops.self_information.default(h.detach(), _bandwidth(bandwidth), _flat_offsets(radius, offsets))
        except (TypeError, ValueError):
            pass  # said again below, in Python's words
    return _self_information(h, bandwidth=bandwidth, radius=radius, offsets=offsets)


@accepts_arrays
def _self_information(h, *, bandwidth, radius, offsets):
    _check_image(h)
    return _ops.self_information(h.detach(), _bandwidth(bandwidth), _flat_offsets(radius, offsets))


def select_informative(
    h: Tensor,
    m: int,
    *,
    bandwidth: float,
    radius: int = 3,
    offsets: Sequence[tuple[int, int]] | None = None,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``m`` most informative elements of each sample: the codeword of LLMCsiNet's encoder, in one pass.

    Elements are ranked by :func:`self_information` of ``h`` as float64 arithmetic orders it: at each rank the element's
    information differs from the true one by at most 1e-6 relative, and equal information goes by the lower index.
    (On the CPU, elements within 2e-7 bits of what equal neighbours would give count as equal; all others are told apart
    in float64 wherever float32 leaves their order open.)

    Args:
        h: ``[B, C, H, W]``, float16, bfloat16, float32 or float64; decides the ranking.
        m: Elements to keep per sample, 1 to ``C*H*W``.
        bandwidth, radius, offsets: As in :func:`self_information`.
        source: ``[B, C, H, W]``, floating-point: where the values are read, ``h`` itself by default. The paper's
            encoder ranks by the channel and sends the values of its self-information image.

    Returns:
        ``values`` ``[B, m]``, bit for bit those of ``source`` and of its dtype, and ``indices`` ``[B, m]`` int64 into
        the flattened ``C*H*W``, most informative first. Elements whose information is NaN come last. ``values`` carries
        the gradient of ``source`` (of ``h`` without one); the ranking carries none.

    Backends:
        C++ on a CPU; on a GPU of sm_80 or later CUDA where it was built (its survivors stay in shared memory), else
        Triton (there they pass through the cache), up to 16,384 elements a sample; else the reference.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong rank, shape or device, ``m`` outside 1..C*H*W, or a wrong neighbourhood.
    """
    if (
        type(h) is Tensor
        and h.is_cpu
        and (source is None or (type(source) is Tensor and source.is_cpu))
        and type(m) is int
        and _COMPILED
    ):
        try:
            return _select(h, m, _bandwidth(bandwidth), _flat_offsets(radius, offsets), source)
        except (TypeError, ValueError):
            pass
    return _select_informative(h, m, bandwidth=bandwidth, radius=radius, offsets=offsets, source=source)


@accepts_arrays
def _select_informative(h, m, *, bandwidth, radius, offsets, source):
    _check_image(h)
    _check_m(m, math.prod(h.shape[1:]), "C*H*W")
    if source is not None:
        _check_like(source, "source", h, "h")
    return _select(h, m, _bandwidth(bandwidth), _flat_offsets(radius, offsets), source)


def top_m(score: Tensor, m: int, *, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``m`` largest scores of each row, in an exact and deterministic order.

    The order is total: larger scores first, equal scores (and -0 and +0) by the lower index, NaN last, these by index
    too. ``torch.topk`` promises no order among equal values.

    Args:
        score: ``[B, N]``, float16, bfloat16, float32 or float64.
        m: Elements to keep per row, 1 to ``N``.
        source: ``[B, N]``, floating-point: where the values are read, ``score`` itself by default.

    Returns:
        ``values`` ``[B, m]``, bit for bit those of ``source`` and of its dtype, and ``indices`` ``[B, m]`` int64 into
        ``N``. ``values`` carries the gradient of ``source`` (of ``score`` without one); the order carries none.

    Backends:
        As of :func:`select_informative`, up to 16,384 scores a row.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong rank, shape or device, or ``m`` outside 1..N.
    """
    if (
        type(score) is Tensor
        and score.is_cpu
        and (source is None or (type(source) is Tensor and source.is_cpu))
        and type(m) is int
        and _COMPILED
    ):
        try:
            return _ops.top_m.default(score, m, source)
        except (TypeError, ValueError):
            pass
    return _top_m(score, m, source=source)


@accepts_arrays
def _top_m(score, m, *, source):
    _check_floating(score, "score")
    if score.dim() != 2:
        raise ValueError(f"score: expected shape [B, N], got {list(score.shape)}")
    _check_m(m, score.shape[1], "N")
    if source is not None:
        _check_like(source, "source", score, "score")
    return _ops.top_m(score, m, source)


def scatter_codeword(values: Tensor, indices: Tensor, mean: Tensor, shape: Sequence[int]) -> Tensor:
    """Put a received codeword back into its place and fill all else with the mean.

    The first step of LLMCsiNet's preliminary decoder (section IV-A): an array of the sample's mean, in which the fed
    back elements are inserted at their positions.

    Args:
        values: ``[B, m]``, float16, bfloat16, float32 or float64.
        indices: ``[B, m]`` int64, positions in the flattened ``shape``. Where one occurs twice, the later value stands.
        mean: ``[B]``, of the dtype of ``values``.
        shape: Shape of one sample, such as ``(2, 32, 32)``.

    Returns:
        ``[B, *shape]`` of the dtype of ``values``, with gradients for ``values`` and ``mean``.

    Backends:
        C++ on a CPU; on a GPU of sm_80 or later CUDA where it was built (it finds the last writer in shared memory),
        else Triton (in the cache), for any shape; else the reference.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes or devices that do not fit together, or, for CPU tensors, an index outside ``shape`` (on
            CUDA, looking would stall the stream; there an index out of range is a device-side assertion).
    """
    plain = type(values) is type(indices) is type(mean) is Tensor
    if plain and values.is_cpu and indices.is_cpu and mean.is_cpu and _COMPILED:
        try:
            return _ops.scatter_codeword.default(values, indices, mean, shape)
        except (TypeError, ValueError):
            pass
    return _scatter_codeword(values, indices, mean, shape)


@accepts_arrays
def _scatter_codeword(values, indices, mean, shape):
    shape = [int(size) for size in shape]
    _check_codeword(values, indices, mean, shape)
    return _ops.scatter_codeword(values, indices, mean, shape)


# Fake kernels and autograd -------------------------------------------------------------------------------------------


@register_fake("self_information")
def _(h, bandwidth, offsets):
    return torch.empty(h.shape, dtype=h.dtype if h.dtype == torch.float64 else torch.float32, device=h.device)


@register_fake("select_informative")
def _(h, m, bandwidth, offsets, source=None):
    shape = (h.shape[0], m)
    return (h if source is None else source).new_empty(shape), h.new_empty(shape, dtype=torch.int64)


@register_fake("top_m")
def _(score, m, source=None):
    shape = (score.shape[0], m)
    return (score if source is None else source).new_empty(shape), score.new_empty(shape, dtype=torch.int64)


@register_fake("scatter_codeword")
def _(values, indices, mean, shape):
    return values.new_empty((values.shape[0], *shape))


def _spread(grad_values: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of a gather: [B,m] at ``indices`` of zeros [B,*shape]. Positions are distinct."""
    flat = grad_values.new_zeros((shape[0], math.prod(shape[1:])))
    return flat.scatter(1, indices, grad_values).reshape(shape)


def _keep_selection(ctx, inputs, output):
    ranked, source = inputs[0], inputs[-1]
    ctx.source_given = source is not None
    ctx.shape = ranked.shape
    ctx.save_for_backward(output[1])


def _top_m_backward(ctx, grad_values, _grad_indices):
    (indices,) = ctx.saved_tensors
    grad = _spread(grad_values, indices, ctx.shape)
    return (None, None, grad) if ctx.source_given else (grad, None, None)


def _select_backward(ctx, grad_values, _grad_indices):
    (indices,) = ctx.saved_tensors
    grad = _spread(grad_values, indices, ctx.shape)
    return (None, None, None, None, grad) if ctx.source_given else (grad, None, None, None, None)


def _keep_positions(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    flat = grad.flatten(1)
    winner = _reference.last_writer(indices, flat.shape[1])
    order = torch.arange(indices.shape[1], device=indices.device)
    stands = winner.gather(1, indices) == order
    return flat.gather(1, indices) * stands, None, (flat * (winner < 0)).sum(1), None


if _load.extension is None:  # csrc/self_information_autograd.cpp has the same formulas, without Python on the way
    torch.library.register_autograd(f"{NAMESPACE}::top_m", _top_m_backward, setup_context=_keep_selection)
    torch.library.register_autograd(f"{NAMESPACE}::select_informative", _select_backward, setup_context=_keep_selection)
    torch.library.register_autograd(f"{NAMESPACE}::scatter_codeword", _scatter_backward, setup_context=_keep_positions)


# Checks --------------------------------------------------------------------------------------------------------------


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_image(h: Tensor) -> None:
    _check_floating(h, "h")
    if h.dim() != 4:
        raise ValueError(f"h: expected shape [B, C, H, W], got {list(h.shape)}")


def _check_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    _check_floating(tensor, name)
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(tensor.shape)}")
    _check_device(tensor, name, other.device)


def _check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _check_m(m: int, size: int, meaning: str) -> None:
    if isinstance(m, bool) or not isinstance(m, (Integral, torch.SymInt)):
        raise TypeError(f"m: expected an integer, got {m!r}")
    if m < 1 or m > size:
        raise ValueError(f"m: expected 1..{meaning} = 1..{size}, got {m}")


def _bandwidth(bandwidth: float) -> float:
    bandwidth = float(bandwidth)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth: expected a finite positive number, got {bandwidth}")
    return bandwidth


def _grid(radius: int) -> list[int]:
    steps = (-radius, 0, radius)
    return [step for row in steps for column in steps for step in (row, column)]


_GRIDS = {radius: _grid(radius) for radius in range(1, 17)}


def _flat_offsets(radius: int, offsets: Sequence[tuple[int, int]] | None) -> list[int]:
    """(row, column) pairs in one list, as the schema has them."""
    if offsets is None:
        if type(radius) is int and (grid := _GRIDS.get(radius)) is not None:
            return grid
        if not isinstance(radius, Integral):
            raise TypeError(f"radius: expected an integer, got {radius!r}")
        if radius < 1:
            raise ValueError(f"radius: expected at least 1, got {radius}")
        return _grid(int(radius))
    flat: list[int] = []
    for offset in offsets:
        if len(offset) != 2:
            raise ValueError(f"offsets: expected pairs (row, column), got {offset!r}")
        if not all(isinstance(step, Integral) for step in offset):
            raise TypeError(f"offsets: expected pairs of integers, got {offset!r}")
        flat.extend(int(step) for step in offset)
    if not flat:
        raise ValueError("offsets: expected at least one pair (row, column), got none")
    return flat


def _check_codeword(values: Tensor, indices: Tensor, mean: Tensor, shape: list[int]) -> None:
    _check_floating(values, "values")
    if values.dim() != 2:
        raise ValueError(f"values: expected shape [B, m], got {list(values.shape)}")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.shape != values.shape:
        raise ValueError(f"indices: expected the shape of values, {list(values.shape)}, got {list(indices.shape)}")
    if not isinstance(mean, Tensor) or mean.dtype != values.dtype:
        raise TypeError(
            f"mean: expected the dtype of values, {values.dtype}, got {getattr(mean, 'dtype', type(mean).__name__)}"
        )
    if mean.shape != values.shape[:1]:
        raise ValueError(f"mean: expected shape [B] = [{values.shape[0]}], got {list(mean.shape)}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes of at least 0, got {shape}")
    _check_device(indices, "indices", values.device)
    _check_device(mean, "mean", values.device)
