"""The networks that LVM4CF is compared with (section V), and all codeword networks by name.

"LLM" is :class:`csimodels.models.lvm4cf.Lvm4Cf` with GPT-2's layers. The paper gives FC no sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig, parameter_count
from csimodels.models.codeword_network import CodewordConfig, CodewordNetwork
from csimodels.models.lvm4cf import Lvm4Cf, Lvm4CfConfig


@dataclasses.dataclass(frozen=True)
class FcConfig(CodewordConfig):
    """``hidden``: widths of the hidden layers; decided, the paper gives none."""

    hidden: tuple[int, ...] = (512, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))  # JSON makes it a list
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden: expected at least one width, each at least 1, got {self.hidden}")


class FcNetwork(CodewordNetwork):
    """Fully connected layers with ReLU over both polarisations at once."""

    config: FcConfig

    def __init__(self, config: FcConfig):
        super().__init__(config)
        elements = config.polarisations * config.token_features
        widths = (elements, *config.hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, self._output_layer(nn.Linear(widths[-1], elements)))

    def _refine(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens.flatten(1)).unflatten(1, tokens.shape[1:])


@dataclasses.dataclass(frozen=True)
class TransformerCodewordConfig(CodewordConfig):
    """The paper's "Transformer": 2 layers, feature dimension 256. Heads and feed-forward width are decided."""

    layers: int = 2
    width: int = 256
    heads: int = 8
    feedforward: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.architecture()

    def architecture(self) -> TransformerConfig:
        """Of the encoder, one token per polarisation."""
        return TransformerConfig(
            self.polarisations, self.token_features, self.layers, self.width, self.heads, self.feedforward
        )


class TransformerNetwork(CodewordNetwork):
    """A small Transformer encoder drawn anew, with learned positions."""

    config: TransformerCodewordConfig

    def __init__(self, config: TransformerCodewordConfig):
        super().__init__(config)
        self.transformer = ChannelTransformer(config.architecture())
        self._output_layer(self.transformer.output)

    def _refine(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.transformer(tokens)


_NAMES: dict[type[CodewordConfig], str] = {
    FcConfig: "fc",
    TransformerCodewordConfig: "transformer",
    Lvm4CfConfig: "lvm4cf",
}


def build_network(config: CodewordConfig, *, pretrained: bool = True) -> CodewordNetwork:
    """The network of a configuration, its own weights drawn from PyTorch's global generator.

    Args:
        config: of one of the networks here, or of LVM4CF.
        pretrained: as :class:`Lvm4Cf`.

    Raises:
        TypeError: a configuration of no network.
    """
    if isinstance(config, Lvm4CfConfig):
        return Lvm4Cf(config, pretrained=pretrained)
    if isinstance(config, TransformerCodewordConfig):
        return TransformerNetwork(config)
    if isinstance(config, FcConfig):
        return FcNetwork(config)
    raise TypeError(f"config: expected one of {', '.join(_NAMES.values())}, got {type(config).__name__}")


def describe(config: CodewordConfig) -> dict[str, Any]:
    """The configuration as JSON-serialisable values, with the network's name; :func:`config_of` reads it back."""
    return {"network": _NAMES[type(config)], **dataclasses.asdict(config)}


def config_of(entries: Mapping[str, Any]) -> CodewordConfig:
    """The inverse of :func:`describe`.

    Raises:
        ValueError: an unknown network.
        KeyError, TypeError: entries that its configuration does not have.
    """
    fields = dict(entries)
    name = fields.pop("network")
    if name == "lvm4cf":
        return Lvm4CfConfig.from_dict(fields)
    if name == "fc":
        return FcConfig(**fields)
    if name == "transformer":
        return TransformerCodewordConfig(**fields)
    raise ValueError(f"network: expected one of {', '.join(_NAMES.values())}, got {name!r}")


def count_parameters(config: CodewordConfig) -> int:
    """Parameters of the network of ``config``, counted without memory for them.

    A source's weights are not looked for, so ``config`` states all sizes, as the presets do.
    """
    with torch.device("meta"):
        return parameter_count(build_network(config, pretrained=False))
