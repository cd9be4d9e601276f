"""LVM4CF: the first layers of a large vision model refine the codewords of a CSI codebook.

Source: "Extract the Best, Discard the Rest: CSI Feedback with Offline Large AI Models" (Zhuang et al.), section IV-A
and Fig. 3. Where the paper leaves a choice open, it is a field of :class:`Lvm4CfConfig` and its default this project's
decision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from csimodels.models.backbone import Backbone, BackboneConfig
from csimodels.models.codeword_network import CodewordConfig, CodewordNetwork

# "Sequential Modeling Enables Scalable Learning for Large Vision Models" (Bai et al.): a LLaMA of 7B parameters.
LVM = "Emma02/LVM_ckpts"
GPT2_XL = "openai-community/gpt2-xl"
_ROTARY = ("llama", "gemma", "qwen")


def _lvm(source: str | None = LVM, layers: int = 2) -> BackboneConfig:
    return BackboneConfig("llama", source, layers, width=4096, heads=32, feedforward=11008)


@dataclasses.dataclass(frozen=True)
class Lvm4CfConfig(CodewordConfig):
    """Architecture of an :class:`Lvm4Cf`.

    Attributes:
        backbone: the Transformer layers. Its ``attention`` is ``"bidirectional"`` by default: the paper is silent, and
            each polarisation should see the other.
        final_norm: whether the norm after the source's last layer follows the first L layers too. Eq. 20 has none
            (and a pre-trained one belongs to the 32nd layer), so False is the default. Of backbones without layer
            norms before their sub-layers (``bert``) there is none to leave out.
    """

    backbone: BackboneConfig = dataclasses.field(default_factory=_lvm)
    final_norm: bool = False

    @classmethod
    def paper(cls, source: str | None = LVM, **changes: Any) -> Lvm4CfConfig:
        """L = 2 layers of width D = 4096 (section V); 414.0 M parameters. ``source=None`` for random weights."""
        return cls(backbone=_lvm(source), **changes)

    @classmethod
    def laptop(cls, **changes: Any) -> Lvm4CfConfig:
        """Two random LLaMA layers of width 128, which a CPU core can train."""
        return cls(backbone=BackboneConfig("llama", None, 2, width=128, heads=4, feedforward=344), **changes)

    @classmethod
    def llm_paper(cls, source: str | None = GPT2_XL, **changes: Any) -> Lvm4CfConfig:
        """The paper's "LLM": 12 layers of GPT-2 XL (section V). Embedding and output are decided to be LVM4CF's."""
        return cls(backbone=BackboneConfig("gpt2", source, 12, width=1600, heads=25, feedforward=6400), **changes)

    @classmethod
    def llm_laptop(cls, **changes: Any) -> Lvm4CfConfig:
        """Two random GPT-2 layers of width 128."""
        return cls(backbone=BackboneConfig.laptop(2), **changes)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Lvm4CfConfig:
        """The inverse of ``dataclasses.asdict``, for configurations stored as JSON."""
        return cls(**{**entries, "backbone": BackboneConfig(**entries["backbone"])})


class Lvm4Cf(CodewordNetwork):
    """One token per polarisation: embedding, Transformer layers, output (eqs. 16 to 22).

    "Rotary position embedding is applied to X_e" is read as what LLaMA does and its weights were trained for: every
    layer turns queries and keys, not the residual stream, by the token's position. Backbones without rotary positions
    (GPT-2, BERT) get learned ones added to X_e, drawn anew as the embedding is.

    Args:
        config: architecture.
        pretrained: False builds the backbone from ``config`` alone, for a checkpoint that brings its weights.

    Raises:
        ImportError, FileNotFoundError, ValueError: as :class:`csimodels.models.backbone.Backbone`.
    """

    config: Lvm4CfConfig

    def __init__(self, config: Lvm4CfConfig, *, pretrained: bool = True):
        backbone = Backbone(config.backbone, pretrained=pretrained)
        super().__init__(dataclasses.replace(config, backbone=backbone.config))  # its sizes may come from a source
        width, features = backbone.width, config.token_features
        self.embed = nn.Sequential(
            nn.Linear(features, width // 2), nn.LayerNorm(width // 2), nn.GELU(), nn.Linear(width // 2, width)
        )
        self.position = None
        if config.backbone.family not in _ROTARY:
            self.position = nn.Parameter(torch.randn(config.polarisations, width) * 0.02)
        self.backbone = backbone
        if not config.final_norm:
            _drop_final_norm(backbone)
        self.output = self._output_layer(nn.Linear(width, features))

    def _refine(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position
        return self.output(self.backbone(x))


def _drop_final_norm(backbone: Backbone) -> None:
    for name in ("norm", "ln_f"):
        if hasattr(backbone.model, name):
            setattr(backbone.model, name, nn.Identity())
