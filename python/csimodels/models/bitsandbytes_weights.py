"""4-bit weights as bitsandbytes writes them into a state dict, read without bitsandbytes.

Beside ``weight``, the codes, stand ``weight.absmax``, ``weight.quant_map`` and, as JSON in a uint8 tensor,
``weight.quant_state.bitsandbytes__nf4``; with double quantisation also ``weight.nested_absmax`` and
``weight.nested_quant_map``, and ``weight.absmax`` is then uint8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from csikernels import NF4LoRALinear, NF4Weight
from csimodels.models.adapted_layers import check_alpha, is_conv1d
from csimodels.models.low_rank import plain_projections, replace_layers, train_adapters_only

_STATE = "quant_state.bitsandbytes__nf4"
_Model = TypeVar("_Model", bound=nn.Module)


def read_bitsandbytes(tensors: Mapping[str, torch.Tensor], name: str = "weight") -> NF4Weight:
    """One NF4 weight [out, in] of a state dict, bit for bit; double quantisation is resolved into float32 scales.

    Args:
        tensors: state dict, for instance a file of ``save_pretrained`` through ``safetensors.torch.load_file``.
        name: of the weight in it, such as ``"h.0.attn.c_attn.weight"``.

    Raises:
        ValueError: a part is missing, the codes are not NF4 with its usual levels, or the parts do not fit together.
    """
    other = sorted(key for key in tensors if key.startswith(f"{name}.quant_state.") and key != f"{name}.{_STATE}")
    if other:
        raise ValueError(f"{name}: expected {_STATE}, got {', '.join(key.removeprefix(f'{name}.') for key in other)}")
    wanted = ["absmax", "quant_map", _STATE]
    if f"{name}.nested_absmax" in tensors:
        wanted += ["nested_absmax", "nested_quant_map"]
    missing = [part for part in wanted if f"{name}.{part}" not in tensors]
    if name not in tensors or missing:
        raise ValueError(f"{name}: expected a bitsandbytes NF4 weight, missing {', '.join(missing) or 'the codes'}")
    part = {key: tensors[f"{name}.{key}"] for key in wanted}
    try:
        entries = json.loads(bytes(part[_STATE].tolist()))
        state = SimpleNamespace(
            quant_type=entries["quant_type"],
            absmax=part["absmax"],
            blocksize=entries["blocksize"],
            dtype=getattr(torch, entries["dtype"]),
            shape=entries["shape"],
            nested="nested_absmax" in part,
        )
        if state.nested:
            state.offset = torch.tensor(float(entries["nested_offset"]), device=state.absmax.device)
            state.state2 = SimpleNamespace(
                absmax=part["nested_absmax"], code=part["nested_quant_map"], blocksize=entries["nested_blocksize"]
            )
        weight = NF4Weight.from_bitsandbytes(state, tensors[name])
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{name}: no readable bitsandbytes NF4 weight ({error!r})") from None
    if not torch.equal(part["quant_map"].cpu().float(), _levels()):
        raise ValueError(f"{name}.quant_map: expected NF4's levels, got {part['quant_map'].tolist()}")
    return weight


def load_bitsandbytes(
    model: _Model,
    tensors: Mapping[str, torch.Tensor],
    rank: int = 16,
    *,
    alpha: float | None = None,
    train_norms: bool = True,
    train_positions: bool = True,
) -> _Model:
    """Take a whole backbone over from a state dict of bitsandbytes, in place, with adapters of the plain start.

    The result is that of ``quantize_backbone(model, rank, start="lora", ...)``, but for the weights: these are the
    file's, 4-bit codes and scales bit for bit.

    Args:
        model, rank, alpha, train_norms, train_positions: see ``quantize_backbone``.
        tensors: holds every parameter of the transformers module, the projections' weights as
            :func:`read_bitsandbytes` reads them. Names may start with a causal model's prefix ("transformer.",
            "model."). More tensors, such as further layers, are left alone.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a tensor is missing, of another shape, or no NF4 weight; or as ``quantize_backbone``. The model is
            then as it was.
    """
    base, layers = plain_projections(model, rank)
    scaling = check_alpha(alpha, rank) / rank
    prefix = getattr(base, "base_model_prefix", "")
    given = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    weights = {name: read_bitsandbytes(given, f"{name}.weight") for name in layers}
    for name, layer in layers.items():
        source: Any = layer
        shape = tuple(source.weight.shape[::-1] if is_conv1d(layer) else source.weight.shape)
        if weights[name].shape != shape:
            raise ValueError(f"{name}.weight: expected {shape}, got {weights[name].shape}")
    rest = {name: value for name, value in base.named_parameters() if name.removesuffix(".weight") not in layers}
    for name, value in rest.items():
        if name not in given or given[name].shape != value.shape:
            has = "none" if name not in given else str(tuple(given[name].shape))
            raise ValueError(f"{name}: expected {tuple(value.shape)}, got {has}")
    with torch.no_grad():
        for name, value in rest.items():
            value.copy_(given[name])
    replacements: dict[str, nn.Module] = {}
    for name, weight in weights.items():
        n, k = weight.shape
        bias: Any = layers[name].bias
        device = weight.device if bias is None else bias.device
        lora_a = torch.empty(rank, k, device=device).normal_(std=1 / rank)
        lora_b = torch.zeros(n, rank, device=device)
        replacements[name] = NF4LoRALinear.from_weight(weight.to(device), lora_a, lora_b, scaling=scaling, bias=bias)
    replace_layers(base, replacements)
    train_adapters_only(model, train_norms=train_norms, train_positions=train_positions)
    return model


def _levels() -> torch.Tensor:
    """NF4's 16 levels in the order of their codes."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8)
    return NF4Weight((codes << 4) | (codes + 1), torch.ones(1), (1, 16)).dequantize().flatten()
