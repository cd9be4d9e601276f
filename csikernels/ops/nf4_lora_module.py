"""``NF4LoRALinear``: the layer that holds a 4-bit weight and its adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from csikernels.ops.nf4_lora import check_linear, loftq_init, nf4_quantize
from csikernels.ops.nf4_lora_weight import DTYPES, NF4Weight

_FORMAT = 1


class NF4LoRALinear(nn.Module):
    """Linear layer ``x W^T + scaling (x A^T) B^T + bias`` with W in NF4 and a trainable low-rank adapter A, B.

    W is quantised and constant: its codes and scales are buffers, which ``.to(dtype)`` and ``.half()`` leave alone.
    ``lora_a``, ``lora_b`` and ``bias`` are parameters. The state dict holds tensors only, so ``safetensors`` can save
    it; loading one restores ``scaling`` as well.

    The constructor draws W and A as ``nn.Linear`` does and sets B to zero; it serves to load a state dict into. Use
    :meth:`from_linear`, :meth:`from_loftq` or :meth:`from_peft` to convert a trained layer, and :meth:`from_weight` for
    a weight that is in NF4 already.

    Args:
        in_features, out_features: K and N.
        rank: r, 1..min(N, K).
        scaling: factor of the adapter.
        bias: whether there is a bias.
        block_size: elements per NF4 block.
        device, dtype: of the weight before quantisation and of the bias; the adapter is float32 (float64 for float64).

    Raises:
        ValueError: a size is out of range.
    """

    packed: torch.Tensor
    absmax: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 1.0,
        bias: bool = True,
        block_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        weight = nf4_quantize(linear.weight, block_size)
        self._hold(weight, *_fresh_adapter(linear.weight, rank), scaling, linear.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, *, scaling: float = 1.0, alpha: float | None = None, block_size: int = 64
    ) -> NF4LoRALinear:
        """Quantise a linear layer and add an adapter that starts at zero (B = 0, A uniform as in LoRA).

        Args:
            linear: layer with a floating weight [N, K]; it is not changed.
            rank: r, 1..min(N, K).
            scaling: factor of the adapter. ``alpha``, when given, sets it to ``alpha / rank`` instead.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` with a floating weight.
            ValueError: ``rank`` is out of range, both ``scaling`` and ``alpha`` are given, or the weight is not finite.
        """
        _check_linear_module(linear)
        adapter = _fresh_adapter(linear.weight, rank)
        if alpha is not None:
            if scaling != 1.0:
                raise ValueError(f"alpha: expected none beside scaling={scaling}, got {alpha}")
            scaling = alpha / rank
        return cls._from_parts(nf4_quantize(linear.weight, block_size), *adapter, scaling, linear.bias)

    @classmethod
    def from_loftq(cls, linear: nn.Linear, rank: int, iterations: int = 5, *, block_size: int = 64) -> NF4LoRALinear:
        """Quantise a linear layer with an adapter that makes up for the loss; see ``loftq_init``. Scaling is 1.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` with a floating weight.
            ValueError: ``rank`` or ``iterations`` is out of range, or the weight is not finite.
        """
        _check_linear_module(linear)
        dense = linear.weight.detach()
        weight, lora_a, lora_b = loftq_init(dense, rank, iterations=iterations, block_size=block_size)
        return cls._from_parts(weight, lora_a, lora_b, 1.0, linear.bias)

    @classmethod
    def from_weight(
        cls, weight: NF4Weight, lora_a=None, lora_b=None, *, scaling: float = 1.0, bias=None
    ) -> NF4LoRALinear:
        """A layer over a weight that is in NF4 already; all parts but the weight, which is constant, are copied.

        Args:
            weight: W [N, K].
            lora_a: A [r, K]; lora_b: B [N, r]. Without both there is no adapter, that is r = 0.
            scaling: factor of the adapter.
            bias: [N], or None.

        Raises:
            TypeError: ``weight`` is no NF4Weight, or another part is no floating tensor.
            ValueError: one of ``lora_a`` and ``lora_b`` alone, or shapes or devices that do not fit.
        """
        if not isinstance(weight, NF4Weight):
            raise TypeError(f"weight: expected an NF4Weight, got {type(weight).__name__}")
        if (lora_a is None) != (lora_b is None):
            raise ValueError(f"lora_a, lora_b: expected both or none, got {'lora_a' if lora_b is None else 'lora_b'}")
        if lora_a is None:
            n, k = weight.shape
            lora_a, lora_b = torch.empty(0, k, device=weight.device), torch.empty(n, 0, device=weight.device)
        return cls._from_parts(weight, lora_a, lora_b, scaling, bias)

    @classmethod
    def from_peft(cls, layer: Any, adapter: str | None = None) -> NF4LoRALinear:
        """Take over a PEFT LoRA layer on a bitsandbytes ``Linear4bit`` (NF4); all parts are copied.

        A base layer that has not been quantised yet is quantised here as bitsandbytes would. One that has run in eval
        mode on a CPU with AVX-512 BF16 has lost its scales' float32 precision: a warning says so.

        Args:
            layer: ``peft.tuners.lora.bnb.Linear4bit``, not merged, with plain LoRA.
            adapter: its name; by default the only active one.

        Raises:
            TypeError: ``layer`` is no LoRA layer over a 4-bit linear layer.
            ValueError: no or several active adapters, an unknown name, a merged layer, a variant such as DoRA, FP4
                codes, or dropout on a layer in training mode (this class has none; call ``layer.eval()`` first).
        """
        base = _peft_base(layer)
        name = _peft_adapter(layer, adapter)
        scaling = float(layer.scaling[name])
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        bias = base.bias
        if lora_b.bias is not None:
            shift = scaling * lora_b.bias.detach()
            bias = shift if bias is None else bias.detach() + shift.to(bias.dtype)
        return cls._from_parts(_weight_of_linear4bit(base), lora_a.weight, lora_b.weight, scaling, bias)

    @classmethod
    def _from_parts(cls, weight: NF4Weight, lora_a, lora_b, scaling: float, bias) -> NF4LoRALinear:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._hold(weight, lora_a, lora_b, scaling, bias)
        return module

    def _hold(self, weight: NF4Weight, lora_a, lora_b, scaling: float, bias) -> None:
        """Copy the parts in and check that they fit."""
        x = lora_a.new_empty(0, weight.shape[1])
        check_linear(x, weight.shape, weight.device, lora_a, lora_b, scaling, bias)
        self.out_features, self.in_features = weight.shape
        self.rank = lora_a.shape[0]
        self.scaling = float(scaling)
        self.block_size = weight.block_size
        self.weight_dtype = weight.dtype
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.lora_a, self.lora_b = _parameter(lora_a), _parameter(lora_b)
        self.bias = None if bias is None else _parameter(bias)

    @property
    def weight(self) -> NF4Weight:
        """The 4-bit weight [N, K]; it shares the buffers."""
        return NF4Weight(
            self.packed, self.absmax, (self.out_features, self.in_features), self.block_size, self.weight_dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]; see ``nf4_lora_linear`` for dtypes and errors."""
        shape = (self.out_features, self.in_features)
        check_linear(x, shape, self.packed.device, self.lora_a, self.lora_b, self.scaling, self.bias)
        return torch.ops.csikernels.nf4_lora_linear(
            x, self.packed, self.absmax, self.block_size, self.lora_a, self.lora_b, self.scaling, self.bias
        )

    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight W + scaling B A, [N, K].

        The sum is float32 or wider, rounded to ``dtype`` (default: the weight's before quantisation).
        """
        wide = torch.promote_types(torch.promote_types(self.lora_a.dtype, self.lora_b.dtype), torch.float32)
        with torch.no_grad():
            dense = self.weight.dequantize(wide).addmm_(self.lora_b.to(wide), self.lora_a.to(wide), alpha=self.scaling)
        return dense.to(self.weight_dtype if dtype is None else dtype)

    def get_extra_state(self) -> torch.Tensor:
        """Format, N, K, block size, dtype code and scaling, float64 [6]: the state dict's part beside the tensors."""
        code = DTYPES.index(self.weight_dtype)
        values = [_FORMAT, self.out_features, self.in_features, self.block_size, code, self.scaling]
        return torch.tensor(values, dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that a state dict fits this layer and take its scaling over.

        Raises:
            ValueError: another format, shape or block size.
        """
        version, *sizes, code, scaling = state.tolist()
        expected = [self.out_features, self.in_features, self.block_size]
        if version != _FORMAT or sizes != expected or not 0 <= code < len(DTYPES):
            raise ValueError(
                f"state dict: expected format {_FORMAT} with out_features, in_features, block_size = {expected}, "
                f"got format {version:g} with {[int(size) for size in sizes]} and dtype code {code:g}"
            )
        self.weight_dtype, self.scaling = DTYPES[int(code)], scaling

    def _apply(self, fn: Callable, recurse: bool = True) -> NF4LoRALinear:
        absmax = self.absmax
        super()._apply(fn, recurse)
        if self.absmax.dtype != torch.float32:  # a change of the module's dtype must not round the scales
            self.absmax = absmax.to(self.absmax.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, rank, scaling, block size."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, bias={self.bias is not None}, block_size={self.block_size}"
        )


def _parameter(value: torch.Tensor) -> nn.Parameter:
    """A copy, contiguous so that ``safetensors`` takes it: factors of a decomposition may be transposed."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))


def _fresh_adapter(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    if not isinstance(rank, int) or not 1 <= rank <= min(n, k):
        raise ValueError(f"rank: expected an integer in 1..{min(n, k)} for a weight ({n}, {k}), got {rank!r}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_a = torch.empty(rank, k, dtype=dtype, device=weight.device)
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a, torch.zeros(n, rank, dtype=dtype, device=weight.device)


def _check_linear_module(linear) -> None:
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise TypeError(f"linear: expected an nn.Linear with a floating weight, got {type(linear).__name__}")


def _peft_base(layer) -> Any:
    parts = ("lora_A", "lora_B", "scaling", "get_base_layer")
    base = layer.get_base_layer() if all(hasattr(layer, part) for part in parts) else None
    if not hasattr(getattr(base, "weight", None), "quant_type"):
        raise TypeError(f"layer: expected a PEFT LoRA layer over a bitsandbytes Linear4bit, got {type(layer).__name__}")
    if layer.merged:
        raise ValueError("layer: expected an unmerged layer, got one with merged adapters; call layer.unmerge() first")
    return base


def _peft_adapter(layer, name: str | None) -> str:
    known = list(layer.lora_A.keys())
    if name is None:
        active = [adapter for adapter in layer.active_adapters if adapter in known]
        if len(active) != 1:
            raise ValueError(f"adapter: expected a name, as {len(active)} of {known} are active")
        name = active[0]
    if name not in known:
        raise ValueError(f"adapter: expected one of {known}, got {name!r}")
    if name in layer.lora_variant:
        raise ValueError(f"adapter: expected plain LoRA, got {type(layer.lora_variant[name]).__name__} for {name!r}")
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    if dropout and layer.training:
        raise ValueError(f"layer: expected no dropout in training mode, got p={dropout}; call layer.eval() first")
    return name


def _weight_of_linear4bit(base) -> NF4Weight:
    weight = base.weight
    if weight.quant_type != "nf4":
        raise ValueError(f"layer: expected NF4 codes, got quant_type {weight.quant_type!r}")
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None:  # bitsandbytes quantises when the layer is moved to its device
        return nf4_quantize(weight.detach().as_subclass(torch.Tensor), weight.blocksize)
    if getattr(state, "packing_format_for_cpu", False):
        warnings.warn("bitsandbytes has rounded the NF4 scales of this layer to bfloat16", stacklevel=3)
    return NF4Weight.from_bitsandbytes(state, weight.data)
