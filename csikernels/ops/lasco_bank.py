"""Many small models of one architecture in stacked storage."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csikernels.ops.lasco_layout import Architecture, check_usable, matrices_of, read_layout, weight_names

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class _Weights(nn.Module):
    """One flat weight list under its names."""

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor], trainable: bool):
        super().__init__()
        self._names = tuple(names)
        for name, tensor in zip(names, tensors, strict=True):
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> list[Tensor]:
        own: dict[str, Any] = self._parameters or self._buffers  # getattr would look through both for each name
        if tuple(own) == self._names:
            return list(own.values())
        return [getattr(self, name) for name in self._names]  # some are computed, by a parametrization say


class SamBank(nn.Module):
    """``U`` proxy SAMs, one per slot, and the frozen reference SAM that they share (LASCO, sections III-C and III-D).

    Built by :meth:`from_modules`, used by :func:`csikernels.lasco_forward` and :class:`csikernels.LascoEngine`. The
    weights of all proxies are stacked ``[U, ...]``, so that a batch which mixes slots is one call, and adapting many
    slots at once is one forward, one backward and one optimiser step: the slots do not interact (a slot without samples
    in a batch gets zero gradients, on which an optimiser with momentum or weight decay still acts).

    A bank's dtype is fixed when it is built; ``.to(device)`` moves it. In bfloat16 the matrices of products are stored
    in bfloat16, everything else (biases, LayerNorm, position, alpha) in float32.

    Attributes:
        alpha: [U] collaboration coefficients; a parameter in a trainable bank (E-LASCO learns it, LASCO keeps it fixed
            by ``alpha.requires_grad_(False)``).
        proxies, reference: the weights, proxies stacked ``[U, ...]``.
        architecture: what all modules of the bank share.
        precision: "float32", "bfloat16" or "float64".
        trainable: whether proxies and alpha are parameters.
    """

    alpha: Tensor

    def __init__(
        self,
        architecture: Architecture,
        reference: Sequence[Tensor],
        proxies: Sequence[Tensor],
        alpha: Tensor,
        template: nn.Module,
        *,
        precision: str,
        trainable: bool,
    ):
        super().__init__()
        names = weight_names(architecture)
        self.architecture = architecture
        self.precision = precision
        self.trainable = trainable
        self.reference = _Weights(names, reference, trainable=False)
        self.proxies = _Weights(names, proxies, trainable)
        if trainable:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self._template = (template,)  # in a tuple: not a submodule, so neither moved nor saved

    @classmethod
    def from_modules(
        cls,
        reference: nn.Module,
        proxies: Sequence[nn.Module],
        alpha: float | Sequence[float] | Tensor,
        *,
        precision: str = "float32",
        trainable: bool = False,
    ) -> SamBank:
        """Copy modules with the standard layout into a bank.

        The layout is found by structure: an input ``nn.Linear(F, d)`` (attribute ``input``), a learned position
        ``[T, d]`` or ``[1, T, d]`` (``position``), an ``nn.TransformerEncoder`` (``encoder``; pre- or post-norm, relu
        or gelu, with or without final norm) and an output ``nn.Linear(d, F)`` (``output``); other attribute names are
        taken where the types alone decide. Each module's forward is tried on one sample and must be
        ``output(encoder(input(h) + position))``.

        Args:
            reference: the pre-trained SAM, shared by all slots and always frozen.
            proxies: one SAM per slot, of the same architecture, dtype and device.
            alpha: collaboration coefficient of eq. 18: one for all slots, or one per slot.
            precision: "float32" or "bfloat16" for float32 modules, "float64" for float64 modules.
            trainable: proxies and alpha become parameters ("float32" and "float64" only).

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a module lacks the layout, differs from the reference, or has active dropout; ``alpha`` has the
                wrong length or is not finite; ``precision`` is unknown or does not fit.
        """
        proxies = _modules(proxies)
        architecture, reference_weights = read_layout(reference, "reference")
        _check_precision(precision, trainable, architecture.dtype)
        check_usable(reference, "reference", architecture, reference_weights)
        device = reference_weights[0].device
        read = [_read_same(module, f"proxies[{i}]", architecture, device) for i, module in enumerate(proxies)]
        with torch.no_grad():
            stacked = [torch.stack(weights) for weights in zip(*read, strict=True)]
            stacked = _store(stacked, architecture, precision)
            shared = _store([weight.clone() for weight in reference_weights], architecture, precision)
        coefficients = _alpha(alpha, len(proxies)).to(device, architecture.dtype)
        template = copy.deepcopy(reference).cpu()
        return cls(architecture, shared, stacked, coefficients, template, precision=precision, trainable=trainable)

    @property
    def slots(self) -> int:
        """Number of slots ``U``."""
        return self.alpha.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs: float32, or float64 for a float64 bank."""
        return self.architecture.dtype

    @property
    def device(self) -> torch.device:
        """Where the bank is."""
        return self.alpha.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: proxies, reference and alpha."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def forward(self, h_in: Tensor, base_output: Tensor, slot: Tensor) -> Tensor:
        """:func:`csikernels.lasco_forward` on this bank, for wrappers that call modules (data parallelism)."""
        from csikernels.ops.lasco import lasco_forward

        return lasco_forward(h_in, base_output, self, slot)

    @torch.no_grad()
    def replace(self, slot: int, module: nn.Module, alpha: float | None = None) -> None:
        """Put another proxy into a slot, in place; an error leaves the slot as it was.

        Args:
            slot: 0..U-1.
            module: a module of the bank's architecture, on any device.
            alpha: its coefficient; None keeps the slot's.

        Raises:
            TypeError, ValueError: as in :meth:`from_modules`; ``slot`` is out of range.
        """
        slot = self._slot(slot)
        weights = _read_same(module, "module", self.architecture)
        if alpha is not None:
            self.alpha[slot] = _alpha(alpha, 1).to(self.alpha)[0]
        for stacked, weight in zip(self.proxies.tensors(), weights, strict=True):
            stacked[slot].copy_(weight)

    @torch.no_grad()
    def export(self, slot: int, module: nn.Module | None = None) -> nn.Module:
        """A slot's proxy as a module. Its alpha is ``bank.alpha[slot]``.

        float32 and float64 banks give the weights back bit by bit; a bfloat16 bank gives them as rounded.

        Args:
            slot: 0..U-1.
            module: a module of the bank's architecture to load the weights into, in place; None makes a new one on the
                CPU, a copy of the reference that :meth:`from_modules` saw.

        Returns:
            The module.

        Raises:
            TypeError, ValueError: ``module`` lacks the layout or differs from the bank; ``slot`` is out of range.
        """
        slot = self._slot(slot)
        module = copy.deepcopy(self._template[0]) if module is None else module
        architecture, weights = read_layout(module, "module")
        _check_same(architecture, "module", self.architecture)
        for weight, stacked in zip(weights, self.proxies.tensors(), strict=True):
            weight.copy_(stacked[slot])
        return module

    def extra_repr(self) -> str:
        a = self.architecture
        return (
            f"slots={self.slots}, layers={a.layers}, width={a.width}, heads={a.heads}, feedforward={a.feedforward}, "
            f"tokens={a.tokens}, features={a.features}, precision={self.precision!r}, trainable={self.trainable}"
        )

    def get_extra_state(self) -> Tensor:
        """What the weights' shapes do not tell, as a tensor so that safetensors takes it."""
        heads, activation, norm_first, eps = self.architecture.hyper()
        return torch.tensor([heads, activation == "gelu", norm_first, eps], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.cpu(), own := self.get_extra_state()):
            raise ValueError(
                f"state_dict: expected a bank with [heads, gelu, norm_first, eps] {own.tolist()}, got {state.tolist()}"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Before anything is copied: torch would look at the extra state last.
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _slot(self, slot: int) -> int:
        if isinstance(slot, bool) or not isinstance(slot, int):
            raise TypeError(f"slot: expected an int, got {type(slot).__name__}")
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot: expected 0..{self.slots - 1} (the bank has {self.slots} slots), got {slot}")
        return slot

    def _apply(self, fn, recurse=True):
        # Module.half() and the like would turn a bank into one of no defined precision.
        for dtype in {tensor.dtype for tensor in (*self.parameters(), *self.buffers())}:
            if (changed := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise TypeError(f"SamBank: its dtype is fixed when it is built, expected {dtype}, got {changed}")
        return super()._apply(fn, recurse)


def _modules(proxies: Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(proxies, nn.Module) and not isinstance(proxies, nn.ModuleList):
        raise TypeError(f"proxies: expected a sequence of modules, got one {type(proxies).__name__}")
    modules = list(proxies)
    if not modules:
        raise ValueError("proxies: expected at least one module, got none")
    return modules


def _check_precision(precision: str, trainable: bool, dtype: torch.dtype) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    needed = torch.float64 if precision == "float64" else torch.float32
    if dtype != needed:
        raise ValueError(f"precision: {precision!r} expects {needed} modules, got {dtype}")
    if trainable and precision == "bfloat16":
        raise ValueError("precision: a trainable bank is 'float32' or 'float64', got 'bfloat16'")


def _check_same(architecture: Architecture, name: str, expected: Architecture) -> None:
    if difference := expected.difference(architecture):
        raise ValueError(f"{name}: expected the architecture of the reference, got {difference}")


def _read_same(
    module: nn.Module, name: str, expected: Architecture, device: torch.device | None = None
) -> list[Tensor]:
    """The weights of a module that must match the reference's architecture (and device, if given)."""
    architecture, weights = read_layout(module, name)
    _check_same(architecture, name, expected)
    if device is not None and weights[0].device != device:
        raise ValueError(f"{name}: expected a module on {device}, got one on {weights[0].device}")
    check_usable(module, name, architecture, weights)
    return weights


def _store(weights: Sequence[Tensor], architecture: Architecture, precision: str) -> list[Tensor]:
    matrices = matrices_of(architecture)
    dtype = PRECISIONS[precision]
    return [w.detach().to(dtype) if matrix else w.detach() for w, matrix in zip(weights, matrices, strict=True)]


def _alpha(alpha: float | Sequence[float] | Tensor, slots: int) -> Tensor:
    """[slots] float64, a tensor of its own."""
    try:
        values = torch.as_tensor(alpha, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"alpha: expected a number or {slots} of them, got {alpha!r}") from None
    if values.ndim == 0:
        values = values.expand(slots).clone()
    if values.shape != (slots,):
        raise ValueError(f"alpha: expected a number or {slots} of them, got shape {tuple(values.shape)}")
    for index, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            raise ValueError(f"alpha: expected finite numbers, got {value} for slot {index}")
    return values
