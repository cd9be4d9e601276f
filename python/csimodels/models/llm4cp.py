"""LLM4CP: channel prediction by GPT-2, whose layer norms and position embeddings alone are trained.

B. Liu, X. Liu, S. Gao, X. Cheng, L. Yang, "LLM4CP: Adapting Large Language Models for Channel Prediction", Journal of
Communications and Information Networks, 2024; a baseline of Zheng and Dai, section V-B.1. Sizes are those of its public
code (github.com/liuboxun/LLM4CP), and so is the order of the modules. Other than there:

- Each history is scaled by itself, not by the mean and deviation of its batch, so that a prediction does not depend on
  what else is in the batch.
- The branches of the delay and the frequency domain have patch layers of their own, and the planes of the image are the
  real and imaginary part in both; the code shares one layer, and mixes the parts of the delay domain.
- The embedding's convolution over slots pads with zeros; the code's circular padding lets the first slot see the last.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.models.backbone import BackboneConfig, build_model
from csimodels.models.channel_predictors import ChannelPredictor, check_positive, sinusoids

TUNED = ("norms", "all")


@dataclasses.dataclass(frozen=True)
class Llm4cpConfig:
    """Sizes of LLM4CP.

    Attributes:
        backbone: GPT-2's layers, of the family ``gpt2`` and with causal attention.
        history, future, subcarriers: T1, T2, M.
        patch: slots that are mixed by a linear layer, a divisor of T1.
        attention_blocks, attention_channels: CSI attention modules in each domain, and their feature maps.
        reduction: of the channels in the squeeze of an attention module.
        dropout: of the embedding while training.
        tuned: ``"norms"`` trains the backbone's layer norms and positions alone; ``"all"`` trains it whole, for random
            weights, which hold nothing that were worth keeping.

    Raises:
        ValueError: a size below 1, a patch that does not divide the history, a reduction that does not divide the
            channels, another backbone, or a dropout or ``tuned`` that is none.
    """

    backbone: BackboneConfig
    history: int = 16
    future: int = 4
    subcarriers: int = 48
    patch: int = 4
    attention_blocks: int = 4
    attention_channels: int = 64
    reduction: int = 1
    dropout: float = 0.1
    tuned: str = "norms"

    def __post_init__(self) -> None:
        check_positive(self, "history", "future", "subcarriers", "patch", "attention_channels", "reduction")
        check_positive(self, "attention_blocks")
        if self.history % self.patch:
            raise ValueError(f"patch: expected a divisor of history={self.history}, got {self.patch}")
        if self.attention_channels % self.reduction:
            raise ValueError(
                f"reduction: expected a divisor of attention_channels={self.attention_channels}, got {self.reduction}"
            )
        if self.backbone.family != "gpt2" or self.backbone.attention != "causal":
            raise ValueError(
                "backbone: expected the family gpt2 with causal attention, got "
                f"{self.backbone.family} with {self.backbone.attention} attention"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 to below 1, got {self.dropout}")
        if self.tuned not in TUNED:
            raise ValueError(f"tuned: expected one of {', '.join(TUNED)}, got {self.tuned!r}")

    @classmethod
    def paper(cls, source: str | None = "openai-community/gpt2") -> Llm4cpConfig:
        """The first six layers of GPT-2 with its weights; ``source=None`` draws them at random.

        44.3 M parameters, of which 1.76 M are trained.
        """
        return cls(
            BackboneConfig(
                "gpt2", source=source, layers=6, width=768, heads=12, feedforward=3072, attention="causal", dropout=0.1
            )
        )

    @classmethod
    def laptop(cls) -> Llm4cpConfig:
        """Two random layers of width 96 that are trained whole: 0.3 M parameters in all."""
        backbone = BackboneConfig(
            "gpt2", layers=2, width=96, heads=4, feedforward=384, attention="causal", settings={"n_positions": 16}
        )
        return cls(backbone, attention_blocks=1, attention_channels=4, dropout=0.0, tuned="all")

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Llm4cpConfig:
        """The inverse of ``dataclasses.asdict``; a ``TypeError`` for entries that it does not know."""
        return cls(**(entries | {"backbone": BackboneConfig(**entries["backbone"])}))


class Llm4cp(ChannelPredictor):
    """Preprocessing in the delay and frequency domains, embedding, GPT-2, and two linear layers.

    Args:
        config: sizes.
        pretrained: False builds the architecture from ``config`` alone, for a checkpoint that brings the weights.

    Attributes:
        config: with the sizes and settings of the backbone's source written out.

    Raises:
        ImportError, FileNotFoundError, ValueError: as :func:`csimodels.models.backbone.build_model`; or a backbone
            of fewer positions than T1.
    """

    positions: Tensor

    def __init__(self, config: Llm4cpConfig, *, pretrained: bool = True):
        super().__init__()
        backbone, built = build_model(config.backbone, pretrained=pretrained)
        backbone.set_input_embeddings(nn.Identity())  # CSI tokens are no words
        width, there = backbone.config.hidden_size, backbone.config.max_position_embeddings
        if there < config.history:
            raise ValueError(f"backbone: expected at least history={config.history} positions, got {there}")
        self.config = dataclasses.replace(config, backbone=built)
        self.delay, self.frequency = _Preprocessor(config), _Preprocessor(config)
        self.embed = nn.Conv1d(2 * config.subcarriers, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity="leaky_relu")
        self.dropout = nn.Dropout(config.dropout)
        self.mix = nn.Linear(config.history, config.history)
        self.backbone = backbone
        if config.tuned == "norms":
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(".ln_" in f".{name}" or name.startswith("wpe."))
        self.project = nn.Linear(width, 2 * config.subcarriers)
        self.predict = nn.Linear(config.history, config.future)
        self.register_buffer("positions", sinusoids(config.history, width), persistent=False)

    def _predict(self, tokens: Tensor) -> Tensor:
        image = tokens.unflatten(2, (2, -1)).transpose(1, 2)  # [B, part, slot, subcarrier]
        # Unitary, as the two branches should see numbers of the same size.
        delay = torch.fft.ifft(torch.complex(*image.unbind(1)), norm="ortho")
        features = self.frequency(image) + self.delay(torch.stack([delay.real, delay.imag], dim=1))
        embedded = self.embed(features.transpose(1, 2).flatten(2).mT).mT + self.positions
        embedded = self.mix(self.dropout(embedded).mT).mT
        hidden = self.backbone(inputs_embeds=embedded, use_cache=False)[0]
        return self.predict(self.project(hidden).mT).mT


class _Preprocessor(nn.Module):
    """Mixes the slots of a patch, then extracts features by CSI attention; real ``[B, part, slot, column]`` to such."""

    def __init__(self, config: Llm4cpConfig):
        super().__init__()
        self.patch = config.patch
        self.mix = nn.Linear(config.patch, config.patch)
        channels = config.attention_channels
        blocks = [_CsiAttention(channels, config.reduction) for _ in range(config.attention_blocks)]
        self.features = nn.Sequential(
            nn.Conv2d(2, channels, 3, padding=1), *blocks, nn.Conv2d(channels, 2, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        patches = image.mT.unflatten(3, (-1, self.patch))  # [B, part, column, patch, slot]
        mixed = self.mix(patches).flatten(3).mT
        # With few channels, CPUs take 2 to 6 times as long for gradients of convolutions in the other layout.
        return self.features(mixed.contiguous(memory_format=torch.channels_last))


class _CsiAttention(nn.Module):
    """A residual block whose feature maps are weighted by what their means and maxima say (squeeze and excitation)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.convolutions(x)
        weights = torch.stack([maps.mean((2, 3)), maps.amax((2, 3))])
        weights = self.excite(self.squeeze(weights).relu()).sum(0).sigmoid()
        return x + maps * weights[..., None, None]
