"""What of a language model takes a low-rank adapter, and what identifies the model beneath the adapters.

Shared by :mod:`csimodels.models.low_rank`, :mod:`csimodels.models.adapter_file` and
:mod:`csimodels.models.bitsandbytes_weights`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from csikernels import NF4LoRALinear

POSITIONS = ("wpe", "position_embeddings")  # GPT-2's and BERT's; LLaMA and Qwen2 rotate instead


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapter of one projection: scaling B A is added to its weight [out, in].

    Attributes:
        lora_a: A [rank, in], the transpose of the paper's B. lora_b: B [out, rank], the paper's A.
        scaling: its factor, alpha / rank.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_a.shape[0]


def backbone_of(model: nn.Module) -> nn.Module:
    """``model.backbone`` where there is one, else ``model``.

    Raises:
        ValueError: ``model.backbone`` is None.
    """
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"model: expected one with a backbone, got {type(model).__name__} with backbone={backbone!r}")
    return backbone


def transformer_of(model: nn.Module) -> Any:
    """The module of `transformers` in ``model``: its backbone's ``model``, its backbone, or itself.

    Raises:
        ValueError: there is none.
    """
    backbone = backbone_of(model)
    base = getattr(backbone, "model", backbone)
    if hasattr(backbone, "get_base_model"):
        raise ValueError(
            "model: expected the transformers model itself, got one wrapped in PEFT's PeftModel; save its adapter with "
            "save_pretrained and read that with load_adapter"
        )
    if not hasattr(getattr(base, "config", None), "model_type"):
        raise ValueError(
            f"model: expected a transformers model, or a module that holds one as backbone, got {type(model).__name__}"
        )
    return base


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_adapted(module: nn.Module) -> bool:
    """Whether it is an :class:`NF4LoRALinear` or a LoRA layer of PEFT."""
    return isinstance(module, NF4LoRALinear) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))


def projections_of(base: Any) -> dict[str, nn.Module]:
    """Linear layers of the Transformer layers by name, adapted or not: all within an ``nn.ModuleList``.

    Poolers, embeddings and heads stand outside it.

    Raises:
        ValueError: there are none.
    """
    found = dict(_projections(base, "", False))
    if not found:
        raise ValueError(f"model: expected Transformer layers with linear projections, {type(base).__name__} has none")
    return found


def _projections(module: nn.Module, prefix: str, inside: bool) -> Iterator[tuple[str, nn.Module]]:
    inside = inside or isinstance(module, nn.ModuleList)
    for name, child in module.named_children():
        if inside and (isinstance(child, nn.Linear) or is_conv1d(child) or is_adapted(child)):
            yield prefix + name, child
        else:
            yield from _projections(child, f"{prefix}{name}.", inside)


def norms_of(base: nn.Module) -> dict[str, nn.Module]:
    """Layer and RMS normalisations by name, the last one behind all layers included."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }


def positions_of(base: nn.Module) -> dict[str, nn.Module]:
    """Learned position embeddings by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS
    }


def adapter_of(name: str, layer: nn.Module) -> Adapter:
    """The one adapter of an adapted layer.

    Raises:
        ValueError: a PEFT layer with several adapters, merged, or of another kind than plain LoRA.
    """
    if isinstance(layer, NF4LoRALinear):
        return Adapter(layer.lora_a, layer.lora_b, layer.scaling)
    peft_layer: Any = layer
    key = adapter_key(name, peft_layer)
    a, b = peft_layer.lora_A[key], peft_layer.lora_B[key]
    if peft_layer.merged or key in peft_layer.lora_variant or b.bias is not None:
        raise ValueError(f"model: expected plain, unmerged LoRA without a bias of its own in {name}, got {peft_layer}")
    return Adapter(a.weight, b.weight, float(peft_layer.scaling[key]))


def adapter_key(name: str, layer: Any) -> str:
    """Name of a PEFT layer's only adapter.

    Raises:
        ValueError: it has several.
    """
    keys = list(layer.lora_A)
    if len(keys) != 1:
        raise ValueError(f"model: expected one adapter in {name}, got {keys}")
    return keys[0]


def set_scaling(name: str, layer: nn.Module, scaling: float) -> None:
    """Give an adapted layer another scaling."""
    if isinstance(layer, NF4LoRALinear):
        layer.scaling = scaling
        return
    peft_layer: Any = layer
    key = adapter_key(name, peft_layer)
    peft_layer.scaling[key], peft_layer.lora_alpha[key] = scaling, scaling * peft_layer.r[key]


def check_alpha(alpha: float | None, rank: int) -> float:
    """``alpha``, by default ``rank``.

    Raises:
        ValueError: not a positive finite number.
    """
    if alpha is None:
        return float(rank)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha: expected a positive number, got {alpha}")
    return float(alpha)


def identity(base: Any) -> dict[str, Any]:
    """Model type, width and layers of a transformers module: whose adapters have its names and shapes."""
    config = base.config
    return {"model_type": config.model_type, "width": config.hidden_size, "layers": config.num_hidden_layers}


def describe_identity(value: dict[str, Any]) -> str:
    """An :func:`identity` in words."""
    return f"{value['model_type']} (width {value['width']}, {value['layers']} layers)"


def weights_digest(base: Any) -> str:
    """SHA-256, hexadecimal, of what the adapters stand over: the projections' weights and biases as they are stored.

    4-bit weights count as their codes and scales, so that W, its plain NF4 and LoftQ's Q all differ.
    """
    total = hashlib.sha256()
    for name, layer in projections_of(base).items():
        inner: Any = layer
        if isinstance(layer, NF4LoRALinear):
            parts = {"packed": layer.packed, "absmax": layer.absmax, "bias": layer.bias}
        else:
            inner = inner.get_base_layer() if is_adapted(layer) else inner
            parts = {"weight": inner.weight, "bias": inner.bias}
        for part, tensor in parts.items():
            if tensor is not None:
                total.update(f"{name}.{part} {tensor.dtype} {tuple(tensor.shape)};".encode())
                total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
