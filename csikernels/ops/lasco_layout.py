"""The standard layout of a channel Transformer, found in a module by structure.

``output(encoder(input(h) + position))``: an input ``nn.Linear``, a learned position, an ``nn.TransformerEncoder`` and
an output ``nn.Linear`` (LASCO, section III-E). The weights travel as one flat list, ordered by :func:`weight_names`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csikernels.reference import transformer

_STANDARD = (
    "an nn.Linear `input`, an nn.Parameter `position`, an nn.TransformerEncoder `encoder`, an nn.Linear `output`"
)
_BLOCK = ("qkv", "proj", "up", "down", "norm1", "norm2")
_BLOCK_PARTS: dict[str, type[nn.Module]] = {
    "self_attn": nn.MultiheadAttention,
    "self_attn.out_proj": nn.Linear,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
}
# Another computation is off by the size of the output itself; rounding, even that of bfloat16 autocast, stays below.
_PROBE_TOLERANCE = 5e-2


class LayoutError(ValueError):
    """A module does not have the standard layout."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that two modules must share so that one kernel runs both."""

    tokens: int
    features: int
    layers: int
    width: int
    heads: int
    feedforward: int
    activation: str  # "relu" or "gelu"
    norm_first: bool
    final_norm: bool
    eps: float
    dtype: torch.dtype

    def hyper(self) -> transformer.Hyper:
        """The scalars that the ops take beside the weights."""
        return transformer.Hyper(self.heads, self.activation, self.norm_first, self.eps)

    def difference(self, other: Architecture) -> str:
        """What differs, as ``name theirs instead of ours`` (empty when nothing does)."""
        return ", ".join(
            f"{field.name} {getattr(other, field.name)} instead of {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def weight_names(architecture: Architecture) -> list[str]:
    """Names of the flat weight list: input, position, blocks, final norm if any, output."""
    parts = [f"block{index}_{part}" for index in range(architecture.layers) for part in _BLOCK]
    parts += ["norm"] if architecture.final_norm else []
    names = ["input_weight", "input_bias", "position"]
    names += [f"{part}_{kind}" for part in parts for kind in ("weight", "bias")]
    return [*names, "output_weight", "output_bias"]


def matrices_of(architecture: Architecture) -> list[bool]:
    """For each entry of the flat list, whether it is the matrix of a product (which low precision rounds)."""
    return [name.endswith("weight") and "norm" not in name for name in weight_names(architecture)]


def read_layout(module: nn.Module, name: str) -> tuple[Architecture, list[Tensor]]:
    """The architecture and the live parameters of a module with the standard layout.

    Other attribute names are accepted where the type alone decides: one ``nn.TransformerEncoder``, two ``nn.Linear``
    among the direct children (input first), one direct parameter ``[T, d]`` or ``[1, T, d]``.

    Args:
        module: the module.
        name: how errors call it.

    Returns:
        The architecture, and views of the parameters in the order of :func:`weight_names`.

    Raises:
        TypeError: no ``nn.Module``.
        LayoutError: a part is missing, is of an unsupported kind, or does not fit the others.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    linear_in, position, encoder, linear_out = _find_parts(module, name)
    inner, norms = _read_encoder(encoder, name)
    weights = [*_affine(linear_in, f"{name}: input"), position, *inner, *_affine(linear_out, f"{name}: output")]
    first: Any = encoder.layers[0]
    architecture = Architecture(
        tokens=position.shape[0],
        features=linear_in.in_features,
        layers=len(encoder.layers),
        width=first.self_attn.embed_dim,
        heads=_the_one([block.self_attn.num_heads for block in encoder.layers], f"{name}: heads"),
        feedforward=first.linear1.out_features,
        activation=_the_one([_activation(block, name) for block in encoder.layers], f"{name}: activation"),
        norm_first=_the_one([bool(block.norm_first) for block in encoder.layers], f"{name}: norm_first"),
        final_norm=encoder.norm is not None,
        eps=_the_one([norm.eps for norm in norms], f"{name}: LayerNorm eps"),
        dtype=_the_one([weight.dtype for weight in weights], f"{name}: dtype"),
    )
    _the_one([weight.device for weight in weights], f"{name}: device")
    _check_shapes(architecture, weights, name)
    _check_complete(module, weights, name)
    return architecture, weights


def check_usable(module: nn.Module, name: str, architecture: Architecture, weights: Sequence[Tensor]) -> None:
    """Raise unless the module is deterministic and its own forward is the standard one.

    The forward is tried on one sample: a module with the right parts may still scale or add something between them,
    which its structure does not show.

    Raises:
        ValueError: dropout is active, or (LayoutError) the forward computes something else.
    """
    for path, child in module.named_modules():
        rate = child.p if isinstance(child, nn.Dropout) else getattr(child, "dropout", 0.0)
        if child.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{name}: expected eval mode (or dropout 0), got dropout {rate} in training mode at {path!r}"
            )
    tokens, features = architecture.tokens, architecture.features
    probe = torch.sin(torch.arange(tokens * features, dtype=torch.float64)).view(1, tokens, features)
    probe = probe.to(weights[0])
    with torch.no_grad():
        expected = transformer.forward(
            probe[None], transformer.network_of([weight[None] for weight in weights]), architecture.hyper()
        )[0]
        try:
            actual = module(probe)
        except Exception as error:
            raise LayoutError(f"{name}: its forward failed on a tensor [1, {tokens}, {features}]: {error}") from error
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        given = tuple(actual.shape) if isinstance(actual, Tensor) else type(actual).__name__
        raise LayoutError(f"{name}: expected its forward to keep the shape [1, {tokens}, {features}], got {given}")
    deviation = (actual - expected).abs().max().item()
    if deviation > _PROBE_TOLERANCE * expected.abs().max().item():
        raise LayoutError(
            f"{name}: expected its forward to compute output(encoder(input(h) + position)), got something else "
            f"(off by {deviation:.2g} on a probe)"
        )


def _find_parts(module: nn.Module, name: str) -> tuple[nn.Linear, Tensor, nn.TransformerEncoder, nn.Linear]:
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.TransformerEncoder):
        encoders = [child for child in module.children() if isinstance(child, nn.TransformerEncoder)]
        if len(encoders) != 1:
            raise LayoutError(f"{name}: expected {_STANDARD}; found {len(encoders)} nn.TransformerEncoder")
        encoder = encoders[0]
    linears: list[Any] = [getattr(module, "input", None), getattr(module, "output", None)]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        if len(linears) != 2:
            raise LayoutError(f"{name}: expected {_STANDARD}; found {len(linears)} nn.Linear")
    position = getattr(module, "position", None)
    if not isinstance(position, nn.Parameter):
        positions = list(module.parameters(recurse=False))
        if len(positions) != 1:
            raise LayoutError(f"{name}: expected {_STANDARD}; found {len(positions)} parameters of its own")
        position = positions[0]
    if position.ndim == 3 and position.shape[0] == 1:
        position = position.squeeze(0)
    if position.ndim != 2:
        raise LayoutError(f"{name}: expected a position [T, d] or [1, T, d], got {tuple(position.shape)}")
    if type(encoder).forward is not nn.TransformerEncoder.forward:
        raise LayoutError(
            f"{name}: expected the forward of nn.TransformerEncoder, got that of {type(encoder).__name__}"
        )
    return linears[0], position, encoder, linears[1]


def _read_encoder(encoder: nn.TransformerEncoder, name: str) -> tuple[list[Tensor], list[nn.LayerNorm]]:
    """The weights between input and output projection, and all normalisations."""
    if not len(encoder.layers):
        raise LayoutError(f"{name}: expected an encoder of at least one layer, got none")
    weights: list[Tensor] = []
    norms: list[Any] = []
    for index, block in enumerate(encoder.layers):
        weights += _read_block(block, f"{name}.encoder.layers[{index}]")
        norms += [block.norm1, block.norm2]
    if encoder.norm is not None:
        if not isinstance(encoder.norm, nn.LayerNorm):
            raise LayoutError(f"{name}: expected an nn.LayerNorm as final norm, got {type(encoder.norm).__name__}")
        weights += _affine(encoder.norm, f"{name}: final norm")
        norms.append(encoder.norm)
    return weights, norms


def _read_block(block: Any, name: str) -> list[Tensor]:
    if type(block).forward is not nn.TransformerEncoderLayer.forward:
        raise LayoutError(f"{name}: expected an nn.TransformerEncoderLayer, got {type(block).__name__}")
    for part, kind in _BLOCK_PARTS.items():
        if not isinstance(child := block.get_submodule(part), kind):
            raise LayoutError(f"{name}.{part}: expected an nn.{kind.__name__}, got {type(child).__name__}")
    attention = block.self_attn
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise LayoutError(f"{name}: expected plain self-attention, got separate projections, bias_k or add_zero_attn")
    if attention.in_proj_bias is None:
        raise LayoutError(f"{name}: expected a bias in self_attn, got none")
    weights: list[Tensor] = [attention.in_proj_weight, attention.in_proj_bias]
    for part in list(_BLOCK_PARTS)[1:]:
        weights += _affine(block.get_submodule(part), f"{name}.{part}")
    return weights


def _affine(module: Any, name: str) -> list[Tensor]:
    for part in ("weight", "bias"):
        if getattr(module, part) is None:
            raise LayoutError(f"{name}: expected a weight and a bias, got no {part}")
    return [module.weight, module.bias]


def _activation(block: Any, name: str) -> str:
    function = block.activation
    if function in (F.relu, torch.relu) or isinstance(function, nn.ReLU):
        return "relu"
    if function is F.gelu or (isinstance(function, nn.GELU) and function.approximate == "none"):
        return "gelu"
    raise LayoutError(f"{name}: expected activation relu or (exact) gelu, got {function}")


def _the_one(values: Sequence, what: str):
    if any(value != values[0] for value in values):
        raise LayoutError(f"{what}: expected one value throughout, got {', '.join(map(str, dict.fromkeys(values)))}")
    return values[0]


def _check_shapes(architecture: Architecture, weights: Sequence[Tensor], name: str) -> None:
    names = weight_names(architecture)
    for weight, key, shape in zip(weights, names, _shapes(architecture), strict=True):
        if tuple(weight.shape) != shape:
            raise LayoutError(f"{name}: expected {key} of shape {list(shape)}, got {list(weight.shape)}")


def _shapes(architecture: Architecture) -> Iterator[tuple[int, ...]]:
    width, feedforward, features = architecture.width, architecture.feedforward, architecture.features
    yield from ((width, features), (width,), (architecture.tokens, width))
    for _ in range(architecture.layers):
        yield from ((3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((feedforward, width), (feedforward,), (width, feedforward), (width,))
        yield from ((width,),) * 4
    yield from ((width,),) * (2 if architecture.final_norm else 0)
    yield from ((features, width), (features,))


def _check_complete(module: nn.Module, weights: Sequence[Tensor], name: str) -> None:
    read = {weight.data_ptr() for weight in weights}
    if len(read) != len(weights):
        raise LayoutError(f"{name}: expected separate parameters, got tied ones")
    for path, parameter in module.named_parameters():
        if parameter.data_ptr() not in read:
            raise LayoutError(f"{name}: expected no parameter beyond the standard layout, got {path!r}")
