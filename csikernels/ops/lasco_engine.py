"""A large model and a bank of small ones, reconstructing in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csikernels import triton
from csikernels._arrays import accepts_arrays
from csikernels._dispatch import best_backend, chosen_backend, has_compiled_kernel
from csikernels.ops.lasco import check_input, check_slot, lasco_forward
from csikernels.ops.lasco_bank import SamBank
from csikernels.ops.lasco_graph import StepGraphs
from csikernels.ops.lasco_layout import Architecture, LayoutError, check_usable, matrices_of, read_layout, weight_names
from csikernels.reference.lasco import check_slot_values

_PRECISIONS = ("float32", "bfloat16", "int8", "float64")
_MOST_CUDA_LAYERS = 16  # kMaxLayers in csrc/cuda/lasco.h
PANEL = 32  # kPanel in csrc/cpu/transformer_kernel.h
_QUANTIZED = ("qkv_weight", "proj_weight", "up_weight", "down_weight")


class LascoEngine:
    """LASCO at inference: the base LAM's reconstruction, corrected per sample by its slot's SAMs (eq. 18).

    A base with the standard layout (see :meth:`SamBank.from_modules`) is *packed*: its weights run through the
    package's own Transformer kernels. Any other callable is a *black box*, of which only outputs are used: a model
    behind an API, a compiled module, another architecture.

    Precision of a packed base (the bank has its own):

    - "float32" (or "float64" for a float64 module and bank): later changes to the module's parameters show. A backend
      that reads its own layout (C++, float32) keeps one more copy of the matrices and renews it when PyTorch has
      counted a write to them; writes that it does not count, through ``.data`` or to parameters made in inference mode,
      need :meth:`refresh`.
    - "bfloat16": operands of all products rounded to bfloat16, float32 accumulation, LayerNorm, softmax and residuals.
    - "int8": as bfloat16, but the four products of each block in symmetric int8: weights scaled per output channel,
      activations per row at run time. The reference backend forms the integer sums in float32, C++ exactly.

    "bfloat16" and "int8" are copies; :meth:`refresh` takes them anew. "float64" always runs on the reference backend.

    On a GPU a packed base runs cuBLAS, PyTorch's fused attention and Triton kernels between them (int8: the reference).
    Its second call of a batch size captures the whole step, base and SAMs, in a CUDA graph, which later calls of that
    size replay. Slots on the GPU are then not checked before the step, see :func:`csikernels.lasco_forward`.

    Attributes:
        bank: the small models.
        precision: that of the base.
        packed: whether the base is packed (False: a black box).
    """

    def __init__(self, base: nn.Module | Callable[[Tensor], Tensor], bank: SamBank, precision: str = "float32"):
        """Pack the base.

        Args:
            base: a module with the standard layout, in eval mode if it has dropout, on the bank's device; or any
                callable that maps ``h_in`` [B, T, F] to [B, T, F].
            bank: the small models.
            precision: "float32", "bfloat16" or "int8" ("float64" with a float64 bank). A black box decides its own
                precision, so there only "float32" (the bank's dtype, if float64) is accepted.

        Raises:
            TypeError: ``base`` is not callable, or ``bank`` no :class:`SamBank`.
            ValueError: ``precision`` is unknown or does not fit ``base``; base and bank differ in tokens, features,
                dtype or device; the base has active dropout.
        """
        if not isinstance(bank, SamBank):
            raise TypeError(f"bank: expected a SamBank, got {type(bank).__name__}")
        if not callable(base):
            raise TypeError(f"base: expected a module or a callable, got {type(base).__name__}")
        if precision not in _PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(_PRECISIONS)}, got {precision!r}")
        if (precision == "float64") != (bank.dtype == torch.float64):
            raise ValueError(f"precision: expected one that fits a bank of {bank.dtype}, got {precision!r}")
        self.bank = bank
        self.precision = precision
        self.packed = False
        self._base = base
        self._packed: list[Tensor] = []
        self._packed_from: list[tuple[int, int]] = []
        self._graphs = StepGraphs(self._step)
        reason = self._pack(base)
        if not self.packed and precision not in ("float32", "float64"):
            raise ValueError(f"precision: expected 'float32' for a black box, got {precision!r} ({reason})")

    @accepts_arrays
    def __call__(self, h_in: Tensor, slot: Tensor) -> Tensor:
        """Reconstruct a batch that mixes any slots.

        Args:
            h_in: [B, T, F] in the bank's dtype, in network units.
            slot: [B] int64, 0..U-1.

        Returns:
            [B, T, F], without autograd history. NumPy or CuPy arrays give the same kind back.

        Raises:
            TypeError, ValueError: as :func:`csikernels.lasco_forward`; a black box returned something else than a
                floating tensor [B, T, F] on the device of ``h_in``.
        """
        with torch.inference_mode():
            if not isinstance(h_in, Tensor):
                raise TypeError(f"h_in: expected a tensor, got {type(h_in).__name__}")
            check_input(h_in, "h_in", self.bank)
            check_slot(slot, h_in)
            if slot.device.type == "cpu":  # elsewhere it would wait for the device; the op checks again anyway
                check_slot_values(slot, self.bank.slots)
            if self._capturable(h_in):
                return self._graphs(h_in, slot, self._state())
            return self._step(h_in, slot)

    def _step(self, h_in: Tensor, slot: Tensor) -> Tensor:
        return lasco_forward(h_in, self._base_output(h_in), self.bank, slot)

    def _capturable(self, h_in: Tensor) -> bool:
        """Whether the step can be a CUDA graph: kernels throughout (the reference waits for the GPU to read slots), and
        no capture that this call is part of."""
        if not self.packed or h_in.device.type != "cuda" or not h_in.numel() or self.bank.precision == "float64":
            return False
        sam, backend = self.bank.architecture, best_backend("lasco_forward", "cuda")
        kernels = (backend == "cuda" and sam.layers <= _MOST_CUDA_LAYERS) or (
            backend == "triton" and triton.runs_small_models(sam.tokens, sam.width)
        )
        return kernels and not torch.cuda.is_current_stream_capturing()

    def _state(self) -> tuple:
        """Where a graph finds what it reads, and how it was made; changes when either does."""
        bank = (self.bank.alpha, *self.bank.proxies.tensors(), *self.bank.reference.tensors())
        return chosen_backend(), *(tensor.data_ptr() for tensor in (*bank, *self._weights, *self._scales))

    def refresh(self) -> None:
        """Take the parameters of a packed base as they are now. The old ones stay in use if this fails.

        Raises:
            ValueError: the module's layout has changed since the engine was built.
        """
        if not self.packed or not isinstance(self._base, nn.Module):
            return
        architecture, weights = read_layout(self._base, "base")
        if architecture != self._architecture:
            raise ValueError(
                f"base: expected the same layout as before, got {architecture.difference(self._architecture)}"
            )
        _check_fits(architecture, weights, self.bank)
        self._take(weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the bank and of a packed base (a black box keeps its own)."""
        packed = (*self._weights, *self._scales, *self._packed) if self.packed else ()
        return self.bank.nbytes + sum(tensor.nbytes for tensor in packed)

    def __repr__(self) -> str:
        kind = f"packed {self.precision}" if self.packed else "black box"
        return f"LascoEngine({kind} base, {self.bank.slots} slots in {self.bank.precision}, {self.nbytes / 1e6:.1f} MB)"

    def _pack(self, base: Callable) -> str:
        """Pack the base if it has the layout; otherwise say why it is a black box."""
        if not isinstance(base, nn.Module):
            return f"{type(base).__name__} is no nn.Module"
        try:
            architecture, weights = read_layout(base, "base")
            check_usable(base, "base", architecture, weights)
        except LayoutError as error:
            return str(error)
        _check_fits(architecture, weights, self.bank)
        self.packed = True
        self._architecture = architecture
        self._take(weights)
        return ""

    def _take(self, weights: list[Tensor]) -> None:
        """The base's weights in the precision, and in the layout of the compiled kernels where these will run."""
        taken, scales = _in_precision([weight.detach() for weight in weights], self._architecture, self.precision)
        packed, versions = self._packed_for_kernels(taken), _versions(taken)
        self._weights, self._scales, self._packed, self._packed_from = taken, scales, packed, versions
        self._graphs.clear()

    def _packed_for_kernels(self, weights: list[Tensor]) -> list[Tensor]:
        compiled = weights[0].device.type == "cpu" and has_compiled_kernel("transformer_forward", "cpu")
        if not compiled or chosen_backend() not in (None, "cpp") or self.precision == "float64":
            return []
        return pack([w for w, matrix in zip(weights, matrices_of(self._architecture), strict=True) if matrix])

    def _current_pack(self) -> list[Tensor]:
        """The packed weights, packed again when the module has changed or another backend was in force before."""
        versions = _versions(self._weights)
        if not self._packed or versions != self._packed_from:
            packed = self._packed_for_kernels(self._weights)
            self._packed, self._packed_from = packed, versions
        return self._packed

    def _base_output(self, h_in: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.csikernels.transformer_forward(
                h_in, self._weights, self._scales, self._current_pack(), *self._architecture.hyper()
            )
        output = self._base(h_in)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            given = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"base: expected it to return a floating tensor, got {given}")
        if output.shape != h_in.shape or output.device != h_in.device:
            raise ValueError(
                f"base: expected it to return {tuple(h_in.shape)} on {h_in.device}, "
                f"got {tuple(output.shape)} on {output.device}"
            )
        return output.to(h_in.dtype)


def _check_fits(architecture: Architecture, weights: list[Tensor], bank: SamBank) -> None:
    for name in ("tokens", "features", "dtype"):
        given, expected = getattr(architecture, name), getattr(bank.architecture, name)
        if given != expected:
            raise ValueError(f"base: expected {name} {expected} (that of the bank), got {given}")
    if weights[0].device != bank.device:
        raise ValueError(
            f"base: expected a module on {bank.device} (where the bank is), got one on {weights[0].device}"
        )


def pack(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices [N, K] as the C++ kernels read them (``Linear`` in csrc/cpu/transformer_kernel.h).

    Returns:
        For each its panels [N/32, K/g, 32, g], g = 4 bytes' worth, zero-padded; then for each int8 matrix 128 times the
        sum of each row [N to the next 32] int32.
    """
    panels, shifts = [], []
    for matrix in matrices:
        rows, columns = matrix.shape
        group = 4 // matrix.element_size()
        padded = F.pad(matrix, (0, -columns % group, 0, -rows % PANEL))
        if matrix.dtype == torch.int8:
            shifts.append((padded.sum(1) * 128).to(torch.int32))
        panels.append(padded.view(-1, PANEL, padded.shape[1] // group, group).transpose(1, 2).contiguous())
    return panels + shifts


def _versions(weights: list[Tensor]) -> list[tuple[int, int]]:
    """Changes with every write that PyTorch counts, and with the storage."""
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


def _in_precision(
    weights: list[Tensor], architecture: Architecture, precision: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The flat weight list in the precision, and the scales of its int8 matrices."""
    if precision in ("float32", "float64"):
        return weights, []
    packed, scales = [], []
    names, matrices = weight_names(architecture), matrices_of(architecture)
    for weight, name, matrix in zip(weights, names, matrices, strict=True):
        if precision == "int8" and name.startswith("block") and name.endswith(_QUANTIZED):
            weight, scale = _quantize(weight)
            scales.append(scale)
        elif matrix:
            weight = weight.to(torch.bfloat16)
        else:
            weight = weight.clone()
        packed.append(weight)
    return packed, scales


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8 in -127..127 and the float32 scale of each row."""
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight / scale[:, None]).to(torch.int8), scale
