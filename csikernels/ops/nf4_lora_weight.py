"""A weight matrix in NF4: its container, its tensors on disk, and its way in from bitsandbytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from csikernels.reference.nf4_lora import check_block_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the position is the code on disk
_FORMAT = 1
_PAIR = 32  # bitsandbytes' CPU layout: nibbles of rows n and n + 32 of one 64-long run share a byte


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [N, K] in 4-bit NormalFloat blocks over its flattened row-major elements.

    The layout is that of bitsandbytes (``quant_type="nf4"``): 4.5 bits per element at block size 64.

    Attributes:
        packed: uint8 [ceil(N*K / 2)], two codes per byte, the first in the high nibble.
        absmax: float32 [ceil(N*K / block_size)], largest magnitude of each block.
        shape: (N, K), that is (out_features, in_features).
        block_size: 32, 64, ..., 4096.
        dtype: dtype of the weight before quantisation, and the default of :meth:`dequantize`.

    Raises:
        TypeError, ValueError: a part has the wrong dtype, shape or device.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: Sequence[int]
    block_size: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_block_size(self.block_size)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape: expected (N, K) with N and K at least 1, got {tuple(self.shape)}")
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {self.dtype}")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        count = self.shape[0] * self.shape[1]
        _check_part("packed", self.packed, torch.uint8, -(-count // 2))
        _check_part("absmax", self.absmax, torch.float32, -(-count // self.block_size))
        if self.packed.device != self.absmax.device:
            raise ValueError(f"absmax: expected a tensor on {self.packed.device}, got one on {self.absmax.device}")

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K]: level times absmax in float32, then rounded to ``dtype`` (default: the original's)."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        return torch.ops.csikernels.nf4_dequantize(self.packed, self.absmax, self.shape, self.block_size, dtype)

    def to(self, device: torch.device | str) -> NF4Weight:
        """This weight on ``device``; its tensors are shared where they are there already."""
        return dataclasses.replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))

    @property
    def device(self) -> torch.device:
        """Where the packed weight lives."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.numel() + 4 * self.absmax.numel()

    def to_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The weight as named tensors, which ``safetensors`` can save: packed, absmax and header, int64 [5]."""
        header = torch.tensor([_FORMAT, *self.shape, self.block_size, DTYPES.index(self.dtype)])
        return {f"{prefix}packed": self.packed, f"{prefix}absmax": self.absmax, f"{prefix}header": header}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> NF4Weight:
        """The weight that :meth:`to_tensors` wrote.

        Raises:
            ValueError: a tensor is missing, of another format version, or does not fit the header.
        """
        missing = [name for name in ("packed", "absmax", "header") if prefix + name not in tensors]
        if missing:
            raise ValueError(f"tensors: expected {prefix}packed, absmax and header, missing {', '.join(missing)}")
        header = tensors[f"{prefix}header"].tolist()
        if len(header) != 5 or header[0] != _FORMAT or not 0 <= header[4] < len(DTYPES):
            raise ValueError(f"{prefix}header: expected [{_FORMAT}, N, K, block size, dtype code], got {header}")
        _, n, k, block_size, code = header
        return cls(tensors[f"{prefix}packed"], tensors[f"{prefix}absmax"], (n, k), block_size, DTYPES[code])

    @classmethod
    def from_bitsandbytes(cls, quant_state, packed: torch.Tensor) -> NF4Weight:
        """The weight of a bitsandbytes 4-bit tensor, copied.

        Nested ("double") quantisation is resolved into float32 scales. Once a ``Linear4bit`` has run in eval mode on a
        CPU with AVX-512 BF16, bitsandbytes holds it in another layout with scales rounded to bfloat16; that is
        undone, but the rounding stays: convert before the first call to keep the scales exact.

        Args:
            quant_state: ``bitsandbytes.functional.QuantState``, as in ``layer.weight.quant_state``.
            packed: its codes, as in ``layer.weight.data``, in any storage dtype.

        Raises:
            TypeError: ``quant_state`` is None (the layer has not been quantised).
            ValueError: the codes are not NF4, or the weight is not two-dimensional.
        """
        if quant_state is None:
            raise TypeError(
                "quant_state: expected a bitsandbytes QuantState, got None: the weight is not quantised yet"
            )
        if quant_state.quant_type != "nf4":
            raise ValueError(f"quant_state: expected quant_type 'nf4', got {quant_state.quant_type!r}")
        codes = packed.detach().contiguous().view(torch.uint8)
        absmax, dtype = _absmax(quant_state), quant_state.dtype
        if getattr(quant_state, "packing_format_for_cpu", False):
            codes, absmax, dtype = _undo_cpu_layout(codes), absmax.T, quant_state.original_dtype
        # clone(): bitsandbytes may rewrite its own tensors at the next call.
        flat = absmax.reshape(-1).to(torch.float32, copy=True)
        return cls(codes.reshape(-1).clone(), flat, quant_state.shape, quant_state.blocksize, dtype)


def _check_part(name: str, value, dtype: torch.dtype, count: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a {dtype} tensor, got {given}")
    if value.shape != (count,) or not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor of shape ({count},), got {tuple(value.shape)}")


def _absmax(quant_state) -> torch.Tensor:
    if not quant_state.nested:
        return quant_state.absmax
    inner = quant_state.state2
    block = torch.arange(quant_state.absmax.numel(), device=quant_state.absmax.device) // inner.blocksize
    return inner.code[quant_state.absmax.reshape(-1).int()] * inner.absmax[block] + quant_state.offset


def _undo_cpu_layout(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K/2] in bitsandbytes' CPU layout -> uint8 [N*K/2] in the common one.

    There, the pairs of codes of 32 rows stand together: [N/32, K/2, 32 rows, 2 codes], of which each run of 64 codes is
    split into a low half in the low nibbles and a high half in the high nibbles.
    """
    n, half = codes.shape
    runs = codes.reshape(-1, _PAIR)
    pairs = torch.cat([runs & 15, runs >> 4], dim=1).view(n // _PAIR, half, _PAIR, 2).transpose(1, 2)
    return ((pairs[..., 0] << 4) | pairs[..., 1]).reshape(-1)
