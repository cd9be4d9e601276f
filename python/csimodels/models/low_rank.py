"""Low-rank adaptation of a language backbone, in full precision and over 4-bit weights (Zheng and Dai, "Large Language
Model Enabled Multi-Task Physical Layer Network", sections IV-A and IV-B).

:func:`add_lora` and :func:`quantize_backbone` change a model in place and leave the same parameters trainable: the
adapters of every projection of the Transformer layers, the normalisations, and the position embeddings. The last are
not in the paper's text, but with them GPT-2's trainable parameters come to its 3.18 M of 124.44 M: 2,359,296 in
adapters of rank 16, 38,400 in normalisations, 786,432 in positions.

The paper writes a weight as d_1 x d_2 with W + A B^T; here as everywhere in torch it is [out, in] with W + scaling B A.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from csikernels import NF4LoRALinear, nf4_quantize
from csimodels.models.adapted_layers import (
    adapter_of,
    backbone_of,
    check_alpha,
    is_adapted,
    is_conv1d,
    norms_of,
    positions_of,
    projections_of,
    transformer_of,
)

STARTS = ("loftq", "lora")
_Model = TypeVar("_Model", bound=nn.Module)


def add_lora(
    model: _Model,
    rank: int = 16,
    *,
    alpha: float | None = None,
    train_norms: bool = True,
    train_positions: bool = True,
) -> _Model:
    """Give every projection of the Transformer layers a LoRA adapter in full precision, in place, through `peft`.

    All weights of the backbone are frozen but the adapters, the normalisations and the position embeddings; what
    ``model`` holds beside its backbone keeps its ``requires_grad``. Outputs do not change: B starts at zero and A is
    normal (eqs. 28 and 29). The variance that eq. 29 leaves open is decided: (1 / rank)^2, PEFT's "gaussian".

    Args:
        model: a module whose ``backbone`` is meant, such as ``MultiTaskPhy``, or a `transformers` model (GPT-2, LLaMA,
            Qwen2, BERT), or a module that holds one as ``model``.
        rank: r, at most the smaller side of every projection; 16 in the paper.
        alpha: the adapters are scaled by alpha / rank. The paper's eq. 28 has no factor; None means alpha = rank, a
            scaling of 1, which is also what makes LoftQ's start approximate W.
        train_norms, train_positions: whether these are trainable. LLaMA and Qwen2 have no position embeddings.

    Returns:
        ``model`` itself.

    Raises:
        ImportError: `peft` is not installed (extra ``llm``).
        ValueError: no Transformer layers, adapters already there, or ``rank`` or ``alpha`` out of range.
    """
    base, layers = plain_projections(model, rank)
    alpha = check_alpha(alpha, rank)
    # bitsandbytes, which peft imports, warns of a 4-bit kernel that it has not; none of its kernels is used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA in full precision needs peft: pip install 'csikernels[llm]'") from None
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "fan_in_fan_out": any(map(is_conv1d, layers.values())),
        "init_lora_weights": "gaussian",
    }
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), base)
    for name, adapted in projections_of(base).items():
        adapted.train(layers[name].training)  # PEFT's own start in training mode
    train_adapters_only(model, train_norms=train_norms, train_positions=train_positions)
    return model


def quantize_backbone(
    model: _Model,
    rank: int = 16,
    iterations: int = 5,
    *,
    start: str = "loftq",
    block_size: int = 64,
    alpha: float | None = None,
    train_norms: bool = True,
    train_positions: bool = True,
) -> _Model:
    """Store every projection of the Transformer layers in NF4 with a low-rank adapter, in place (Algorithm 1).

    Each becomes a :class:`csikernels.NF4LoRALinear`, GPT-2's transposed to [out, in]: 0.141 of float32's bytes at
    ``block_size`` 64 (see :func:`projection_bytes`). Trainable are the adapters, normalisations and position
    embeddings, as after :func:`add_lora`; biases and all else in the backbone are frozen. The state dict holds tensors
    only; it is loaded into a model of the same architecture that went through this function with the same ``rank`` and
    ``block_size``, for which ``start="lora"`` is the quick way.

    LoftQ takes ``iterations`` singular value decompositions per projection, for GPT-2 some three minutes in all on
    one CPU core; the plain start takes none.

    Args:
        model, rank, train_norms, train_positions: see :func:`add_lora`.
        iterations: Iter of Algorithm 1, 5 in the paper. Of no effect with ``start="lora"``.
        start: ``"loftq"``: Q, A and B by Algorithm 1, so that Q + scaling B A approximates W (eqs. 30 to 35).
            ``"lora"``: W itself is quantised, A is normal and B zero (eq. 29), as QLoRA starts; the variance is that
            of :func:`add_lora`.
        block_size: elements that share a scale: 32, 64, ..., 4096.
        alpha: the adapters are scaled by alpha / rank; None means alpha = rank (decided, see :func:`add_lora`). With
            another one, LoftQ's A and B are divided by the square root of the scaling, so that the start is the same.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no Transformer layers, adapters already there, an argument out of range, or weights that are not
            finite; the model is then as it was.
        TypeError: a projection's weight is not floating, as that of a bitsandbytes layer.
    """
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    base, layers = plain_projections(model, rank)
    scaling = check_alpha(alpha, rank) / rank
    replacements: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            if start == "loftq":
                replacement = NF4LoRALinear.from_loftq(as_linear(layer), rank, iterations, block_size=block_size)
                with torch.no_grad():
                    replacement.lora_a.div_(math.sqrt(scaling))
                    replacement.lora_b.div_(math.sqrt(scaling))
                replacement.scaling = scaling
            else:
                replacement = NF4LoRALinear.from_linear(as_linear(layer), rank, scaling=scaling, block_size=block_size)
                nn.init.normal_(replacement.lora_a, std=1 / rank)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        replacements[name] = replacement
    replace_layers(base, replacements)
    train_adapters_only(model, train_norms=train_norms, train_positions=train_positions)
    return model


def merge_adapters(model: _Model, *, quantize: bool = False) -> _Model:
    """Turn adapted projections into plain layers with the weight W + scaling B A, in place (end of section IV-B).

    Outputs stay the same up to rounding and cost no adapter. Merging **gives up the 4 bits**: the weights are of full
    precision again, and so take the memory that they took before :func:`quantize_backbone`. The layers have the types
    and names that they had at first (GPT-2's are Conv1D), so the state dict fits the unadapted model, normalisations
    and positions as trained. The merged weights are frozen.

    Args:
        model: adapted by :func:`add_lora` or :func:`quantize_backbone`.
        quantize: quantise the merged weights to NF4 again, as :class:`csikernels.NF4LoRALinear` of rank 0; block size
            64, or that of the 4-bit layer before. Outputs then change by the quantisation.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapters, or several or merged ones in a layer.
    """
    base = transformer_of(model)
    layers = {name: layer for name, layer in projections_of(base).items() if is_adapted(layer)}
    if not layers:
        raise ValueError("model: expected adapters, got none")
    merged = {name: _merged(name, layer, conv1d=base.config.model_type == "gpt2") for name, layer in layers.items()}
    if quantize:
        merged = {name: _without_adapter(merged[name], getattr(layers[name], "block_size", 64)) for name in layers}
    replace_layers(base, merged)
    return model


def projection_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the projections' weights: as stored, and in float32.

    4-bit weights count with their scales. Biases and adapters do not count: both forms have the former, and the latter
    are the same with and without quantisation.

    Raises:
        ValueError: no Transformer layers.
    """
    stored = plain = 0
    for layer in projections_of(transformer_of(model)).values():
        inner: Any = layer
        if isinstance(layer, NF4LoRALinear):
            stored += layer.weight.nbytes
            plain += 4 * layer.out_features * layer.in_features
        else:
            weight = (inner.get_base_layer() if is_adapted(layer) else inner).weight
            stored += weight.numel() * weight.element_size()
            plain += 4 * weight.numel()
    return stored, plain


def train_adapters_only(model: nn.Module, *, train_norms: bool = True, train_positions: bool = True) -> None:
    """Freeze the backbone of an adapted model but for the adapters and, where wanted, normalisations and positions."""
    base = transformer_of(model)
    backbone_of(model).requires_grad_(False)
    for layer in projections_of(base).values():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.split(".")[0].lower() in ("lora_a", "lora_b"))
    trained = (norms_of(base) if train_norms else {}) | (positions_of(base) if train_positions else {})
    for module in trained.values():
        module.requires_grad_(True)


def as_linear(layer: nn.Module) -> nn.Linear:
    """An ``nn.Linear``, or GPT-2's Conv1D as one that shares its parameters' memory.

    Raises:
        TypeError: its weight is not floating.
    """
    source: Any = layer
    if not source.weight.is_floating_point():
        raise TypeError(f"layer: expected a floating weight, got {source.weight.dtype} in {layer}")
    if isinstance(layer, nn.Linear):
        return layer
    fan_in, fan_out = source.weight.shape
    linear = nn.Linear(fan_in, fan_out, bias=source.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(source.weight.detach().T, requires_grad=False), source.bias
    return linear


def replace_layers(base: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put other modules in the place of those of these names; they take over its training mode."""
    for name, layer in layers.items():
        layer.train(base.get_submodule(name).training)
        base.set_submodule(name, layer)


def plain_projections(model: nn.Module, rank: int) -> tuple[Any, dict[str, nn.Module]]:
    """The transformers module and its projections, for which ``rank`` is possible and which have no adapters.

    Raises:
        ValueError: otherwise.
    """
    base = transformer_of(model)
    layers = projections_of(base)
    for name, layer in layers.items():
        if is_adapted(layer):
            raise ValueError(f"model: expected no adapters, got {type(layer).__name__} in {name}")
    for name, layer in layers.items():
        source: Any = layer
        shape = tuple(source.weight.shape[::-1] if is_conv1d(layer) else source.weight.shape)
        if not isinstance(rank, int) or not 1 <= rank <= min(shape):
            raise ValueError(f"rank: expected an integer in 1..{min(shape)} for {name} of shape {shape}, got {rank!r}")
    return base, layers


def _merged(name: str, layer: nn.Module, conv1d: bool) -> nn.Module:
    """A plain layer in place of an adapted one."""
    source: Any = layer
    if isinstance(layer, NF4LoRALinear):
        weight, bias = layer.merged_weight(), layer.bias
    else:
        adapter, inner = adapter_of(name, layer), as_linear(source.get_base_layer())
        bias = inner.bias
        with torch.no_grad():
            weight = inner.weight + (adapter.scaling * adapter.lora_b @ adapter.lora_a).to(inner.weight.dtype)
    plain: Any
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(*weight.shape)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), bias
    return plain


def _without_adapter(layer: nn.Module, block_size: int) -> NF4LoRALinear:
    linear = as_linear(layer)
    return NF4LoRALinear.from_weight(nf4_quantize(linear.weight, block_size), bias=linear.bias)
