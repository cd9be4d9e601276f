"""LLMCsiNet: the UE feeds back the most informative CSI elements, a language model at the BS predicts the others.

Source: "Large Language Model Empowered CSI Feedback in Massive MIMO Systems" (Wu et al.), sections III and IV. Where
the paper leaves a choice open, it is a field of :class:`LlmCsiNetConfig` and its default this project's decision.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

import csikernels
from csimodels.models.backbone import Backbone, BackboneConfig
from csimodels.models.channel_transformer import parameter_count
from csimodels.models.quantizer import LloydMax

__all__ = [
    "BackboneConfig",
    "Codeword",
    "LlmCsiNet",
    "LlmCsiNetConfig",
    "codeword_bits",
    "codeword_scale",
    "compression_ratio",
]

VARIANTS = {"S": 1, "M": 3, "L": 6}
# Table II: fed back values for sigma = 1/8 ... 1/64 of 2 x 32 x 32, at 64 bits a value and 10 an index.
PAPER_CODEWORD_VALUES = {8: 221, 16: 111, 32: 56, 64: 28}
_SLOPE = 0.3  # of LReLU for negative arguments, eq. 10
_OFFSET = 16.0  # of PreliminaryDecoder.start_as_identity; one of 221 elements can have sqrt(221) times their rms


class Codeword(NamedTuple):
    """What the UE feeds back.

    Attributes:
        values: float32 ``[B, M]``, in the unit of ``h``.
        indices: int64 ``[B, M]`` into the flattened ``2*Nc*Nt``. A sample that sends fewer than M elements has its
            first one, value and index, repeated at the end; inserted twice, it leaves what a shorter codeword would.
        mean: float32 ``[B]``, of all elements of ``h``.
    """

    values: torch.Tensor
    indices: torch.Tensor
    mean: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LlmCsiNetConfig:
    """Architecture of an :class:`LlmCsiNet`.

    Attributes:
        delays, antennas: Nc rows and Nt columns of ``H`` in the angle-delay domain.
        codeword_values: M, the elements fed back unless a call says otherwise.
        bandwidth: standard deviation of the Gaussian kernel (eq. 7, where it is h), in units of the sample's root mean
            square. The paper does not state it. With 1, the 221 (56) elements picked from the built-in generator's
            outdoor CSI without line of sight hold 96.3% (84.5%) of its energy, the largest 97.5% (85.1%); with 0.1 or
            8 it is 94.5% (79%).
        radius: R of the neighbourhood.
        neighbours: which nine of its elements are taken: ``"grid"``, {-R, 0, R}^2, or ``"random"``, nine distinct ones
            drawn once by ``seed``. The paper says "uniformly".
        keep_fraction: part of the elements that SICNet's mask keeps: the threshold T of section IV-B, which the paper
            does not state, is set per sample so. Fed back elements are kept in any case.
        selection: ``"information"`` ranks elements by the self-information of ``H``, ``"image"`` by the magnitude of
            the self-information image. The paper allows both readings.
        mask: ``"self_information"``, or without f_EN, M elements of ``H`` itself: at random positions (``"random"``,
            the ablation of Fig. 10), or the largest (``"magnitude"``, not in the paper).
        preliminary, prediction: False for the ablations without f_PD and without f_TP (Fig. 10). Without both, the BS
            fills in the mean, which takes elements of ``H`` itself.
        patch: S_p, side of the CSI patch that makes a token.
        features: feature maps of the encoder.
        backbone: the language model's layers.
        residual: True adds f_TP's output to H_p; the paper's text has f_TP predict all of ``H``.
        scale_invariant: True divides ``h`` by its root mean square at the UE, and the codeword by its own at the BS
            (which needs no feedback), so that path loss does not matter: scaling ``h`` scales the reconstruction.
        quantizer_levels: levels of the Lloyd-Max quantiser that travels with the model, None for none.
        seed: of random neighbours and random masks.
    """

    delays: int = 32
    antennas: int = 32
    codeword_values: int = 221
    bandwidth: float = 1.0
    radius: int = 3
    neighbours: str = "grid"
    keep_fraction: float = 0.5
    selection: str = "information"
    mask: str = "self_information"
    preliminary: bool = True
    prediction: bool = True
    patch: int = 4
    features: int = 64
    backbone: BackboneConfig = dataclasses.field(default_factory=lambda: BackboneConfig.gpt2_large(VARIANTS["L"]))
    residual: bool = False
    scale_invariant: bool = True
    quantizer_levels: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("delays", "antennas", "radius", "patch", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.radius >= min(self.delays, self.antennas):
            raise ValueError(
                f"radius: expected less than the array, which has {self.delays} delays and {self.antennas} antennas, "
                f"got {self.radius}"
            )
        if not 1 <= self.codeword_values <= self.elements:
            raise ValueError(
                f"codeword_values: expected 1 to {self.elements} (2 * {self.delays} * {self.antennas}), "
                f"got {self.codeword_values}"
            )
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth: expected a finite positive number, got {self.bandwidth}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction: expected above 0 to 1, got {self.keep_fraction}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.mask == "self_information" and not (self.preliminary or self.prediction):
            raise ValueError(
                "preliminary, prediction: expected at least one of them to be True for a self-information image, "
                "got False and False"
            )

    @property
    def elements(self) -> int:
        """Real numbers in one sample, ``2 Nc Nt``."""
        return 2 * self.delays * self.antennas

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one sample."""
        return (2, self.delays, self.antennas)

    def variant(self, name: str) -> LlmCsiNetConfig:
        """This configuration with 1, 3 or 6 Transformer layers: LLMCsiNet-S, -M or -L (section V-B)."""
        if name not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
        return dataclasses.replace(self, backbone=dataclasses.replace(self.backbone, layers=VARIANTS[name]))

    def digest(self) -> bytes:
        """Eight bytes that tell configurations apart between which a codeword cannot be exchanged.

        ``codeword_values`` is left out, since every report states its own M, and so is where the backbone came from.
        """
        entries: dict[str, Any] = dataclasses.asdict(self)
        del entries["codeword_values"], entries["backbone"]["source"]
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).digest()[:8]

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> LlmCsiNetConfig:
        """The inverse of ``dataclasses.asdict``, for configurations stored as JSON."""
        return cls(**{**entries, "backbone": BackboneConfig(**entries["backbone"])})


_CHOICES = {
    "neighbours": ("grid", "random"),
    "selection": ("information", "image"),
    "mask": ("self_information", "random", "magnitude"),
}


class LlmCsiNet(nn.Module):
    """UE encoder f_EN and BS decoder f_PD and f_TP. ``h`` is float32 ``[B, 2, Nc, Nt]``, zero-centred.

    Defined for any finite CSI: all-zero CSI gives zero values at the first M positions and is reconstructed as zeros;
    constant CSI is selected where the array ends, since zero padding makes its border informative.

    Args:
        config: architecture.
        pretrained: False builds the backbone from ``config`` alone, for a checkpoint that brings its weights.
    """

    def __init__(self, config: LlmCsiNetConfig, *, pretrained: bool = True):
        super().__init__()
        self.encoder = SelfInformationEncoder(config) if config.mask == "self_information" else None
        self.preliminary_decoder = PreliminaryDecoder() if config.preliminary else None
        self.prediction = TokenPrediction(config, pretrained=pretrained) if config.prediction else None
        if self.prediction is not None:  # its sizes may have come from a source
            config = dataclasses.replace(config, backbone=self.prediction.backbone.config)
        self.quantizer = LloydMax(config.quantizer_levels) if config.quantizer_levels is not None else None
        self.config = config
        self._stage1_frozen = False
        # Its dtype is the model's, which without decoders has no parameter to ask.
        self.register_buffer("_dtype_of", torch.empty(0), persistent=False)

    def encode(
        self, h: torch.Tensor, m: int | torch.Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Codeword:
        """f_EN (eq. 3): self-information image, and its ``m`` most informative elements in one pass.

        Args:
            h: float ``[B, 2, Nc, Nt]``.
            m: elements fed back, 1 to 2 Nc Nt: one number (by default ``codeword_values``), or int64 ``[B]`` for a
                number per sample, which is how LLMCsiNet-MC trains; M of the codeword is then the largest.
            generator: of a random mask's positions. By default these come from PyTorch's global generator in training
                and from ``config.seed`` anew in every call in evaluation, which makes them repeatable.

        Returns:
            The codeword, most informative element first, with the gradient of the image in its values.

        Raises:
            TypeError: ``h`` has another dtype than the model.
            ValueError: another shape, ``m`` out of range, or ``h`` not finite; the message names the sample.
        """
        self._check_csi(h)
        most = self._check_m(m, h)
        scale = _root_mean_square(h.detach())
        wrong = (~scale.isfinite()).nonzero()
        if wrong.numel():
            raise ValueError(f"h: expected finite numbers, sample {wrong[0].item()} has NaN or infinite elements")
        if not self.config.scale_invariant:
            scale = torch.ones_like(scale)
        scale = scale.to(h.dtype)[:, None]
        if self.config.mask == "magnitude":
            values, indices = csikernels.top_m(h.detach().abs().flatten(1), most, source=h.flatten(1))
        elif self.encoder is None:
            values, indices = self._random_elements(h, most, generator)
        else:
            values, indices = self.encoder(_divide(h, scale[:, :, None, None]), most, m)
            values = values * scale
        if isinstance(m, torch.Tensor):
            surplus = torch.arange(most, device=h.device) >= m[:, None]
            values = torch.where(surplus, values[:, :1], values)
            indices = torch.where(surplus, indices[:, :1], indices)
        return Codeword(values, indices, h.mean(dim=(1, 2, 3)))

    def preliminary(self, codeword: Codeword) -> torch.Tensor:
        """H_p ``[B, 2, Nc, Nt]`` (eq. 11): values inserted into the mean, refined by f_PD unless it is left out."""
        normalised, scale = self._normalise(codeword)
        return self._preliminary(normalised) * scale[:, None, None, None]

    def decode(self, codeword: Codeword) -> torch.Tensor:
        """The reconstruction ``[B, 2, Nc, Nt]`` (eqs. 4 and 12)."""
        normalised, scale = self._normalise(codeword)
        h = self._preliminary(normalised)
        if self.prediction is not None:
            h = self.prediction(h)
        return h * scale[:, None, None, None]

    def forward(self, h: torch.Tensor, m: int | torch.Tensor | None = None) -> torch.Tensor:
        return self.decode(self.encode(h, m))

    def ue_parameters(self) -> int:
        """Parameters at the UE: 2,502 with 64 features.

        Table IV says 3.16 k. Of the difference, 576 are SICNet's fixed convolution from nine kernel maps to 64 equal
        feature maps, which "without gradients and biases" holds ones only: here one map is computed, nothing stored.
        """
        return 0 if self.encoder is None else parameter_count(self.encoder)

    def bs_parameters(self) -> int:
        """Parameters at the BS; 19.85 M, 59.20 M and 118.24 M for S, M and L with GPT-2 Large's sizes (Table IV)."""
        return sum(parameter_count(part) for part in (self.preliminary_decoder, self.prediction) if part is not None)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set f_EN and f_PD so that training starts from the elements themselves instead of from a random image.

        Decided, and off unless asked for: the paper draws all weights at random. f_EN's image then is ``H`` times its
        mask, but for its last leaky ReLU, which shrinks what is negative; f_PD hands on what was filled in, up to
        :data:`_OFFSET` times the codeword's root mean square, where its leaky ReLUs bend. Random weights need
        thousands of steps to get there, since the last layers must learn offsets that keep the signs apart.
        """
        if self.encoder is not None:
            self.encoder.start_as_identity()
        if self.preliminary_decoder is not None:
            self.preliminary_decoder.start_as_identity()

    def stage1_modules(self) -> list[nn.Module]:
        """What stage 1 of Algorithm 1 trains: f_EN and f_PD, where the configuration has them."""
        return [part for part in (self.encoder, self.preliminary_decoder) if part is not None]

    def freeze_stage1(self, frozen: bool) -> None:
        """Freeze or unfreeze f_EN and f_PD for stage 2; frozen, their batch normalisation keeps its statistics."""
        self._stage1_frozen = frozen
        for module in self.stage1_modules():
            module.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> LlmCsiNet:
        super().train(mode)
        if self._stage1_frozen:
            for module in self.stage1_modules():
                module.eval()
        return self

    def _preliminary(self, codeword: Codeword) -> torch.Tensor:
        filled = csikernels.scatter_codeword(*codeword, self.config.shape)
        return filled if self.preliminary_decoder is None else self.preliminary_decoder(filled)

    def _normalise(self, codeword: Codeword) -> tuple[Codeword, torch.Tensor]:
        """The codeword in units of its own scale, and that scale ``[B]``."""
        self._check_codeword(codeword)
        values, indices, mean = codeword
        if not self.config.scale_invariant:
            return codeword, torch.ones_like(mean)
        scale = codeword_scale(codeword)
        scale = torch.where(scale > 0, scale, mean.abs())
        return Codeword(_divide(values, scale[:, None]), indices, _divide(mean, scale)), scale

    def _random_elements(
        self, h: torch.Tensor, m: int, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if generator is None and not self.training:
            generator = torch.Generator(h.device).manual_seed(self.config.seed)
        device = h.device if generator is None else generator.device
        draw = torch.rand(h.shape[0], self.config.elements, generator=generator, device=device).to(h.device)
        return csikernels.top_m(draw.to(h.dtype), m, source=h.flatten(1))

    def _check_csi(self, h: torch.Tensor) -> None:
        dtype = self._dtype_of.dtype
        if not isinstance(h, torch.Tensor) or h.dtype != dtype:
            raise TypeError(f"h: expected {dtype}, got {getattr(h, 'dtype', type(h).__name__)}")
        if h.ndim != 4 or tuple(h.shape[1:]) != self.config.shape:
            expected = ", ".join(map(str, self.config.shape))
            raise ValueError(f"h: expected shape [batch, {expected}], got {list(h.shape)}")

    def _check_m(self, m: int | torch.Tensor | None, h: torch.Tensor) -> int:
        if m is None:
            return self.config.codeword_values
        if isinstance(m, torch.Tensor):
            if m.dtype != torch.int64 or m.shape != h.shape[:1]:
                raise ValueError(f"m: expected int64 [{h.shape[0]}], one per sample, got {m.dtype} {list(m.shape)}")
            least, most = (int(m.min()), int(m.max())) if m.numel() else (1, 1)
        elif isinstance(m, int) and not isinstance(m, bool):
            least = most = m
        else:
            raise TypeError(f"m: expected an integer or an int64 tensor, got {m!r}")
        if least < 1 or most > self.config.elements:
            wrong = least if least < 1 else most
            raise ValueError(f"m: expected 1 to {self.config.elements}, the elements of a sample, got {wrong}")
        return most

    def _check_codeword(self, codeword: Codeword) -> None:
        values = codeword.values
        if values.ndim != 2 or not 1 <= values.shape[1] <= self.config.elements:
            raise ValueError(
                f"codeword.values: expected shape [batch, 1 to {self.config.elements}], got {list(values.shape)}"
            )


class SelfInformationEncoder(nn.Module):
    """f_EN (Fig. 2): features of ``H``, those of little information set to zero, back to an image like ``H``.

    The information of each element ranks twice: SICNet's mask keeps the delay-angle bins whose real or imaginary part
    is among the most informative ``keep_fraction`` of all elements, and the first M of the same ranking are fed back.
    """

    def __init__(self, config: LlmCsiNetConfig):
        super().__init__()
        self.extract = _convolution(2, config.features)
        self.image = nn.Sequential(
            _NarrowConvolution(config.features, 2, 3, padding=1), nn.BatchNorm2d(2), nn.LeakyReLU(_SLOPE)
        )
        self.selection, self.bandwidth, self.radius = config.selection, config.bandwidth, config.radius
        self.kept = math.ceil(config.keep_fraction * config.elements)
        self.offsets = _random_neighbours(config.radius, config.seed) if config.neighbours == "random" else None

    def start_as_identity(self) -> None:
        """See :meth:`LlmCsiNet.start_as_identity`. Four features are plus and minus both parts of ``H``; the others
        stay random, and without weight in the image. With fewer than four features nothing changes."""
        extract, image = cast(nn.Conv2d, self.extract[0]).weight, cast(nn.Conv2d, self.image[0]).weight
        if len(extract) < 4:
            return
        centre = extract.shape[2] // 2
        extract[:4], image[:] = 0.0, 0.0
        for part in range(2):
            for feature, sign in ((2 * part, 1.0), (2 * part + 1, -1.0)):
                extract[feature, part, centre, centre] = sign
                image[part, feature, centre, centre] = sign / (1 + _SLOPE)  # LReLU(x) - LReLU(-x) is 1.3 x

    def forward(
        self, h: torch.Tensor, most: int, m: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h ``[B, 2, Nc, Nt]`` in units of its root mean square -> values and indices ``[B, most]``."""
        _, ranked = csikernels.select_informative(
            h.detach(), max(self.kept, most), bandwidth=self.bandwidth, radius=self.radius, offsets=self.offsets
        )
        kept = torch.ones_like(ranked, dtype=h.dtype)
        if isinstance(m, torch.Tensor):  # a sample's mask must not depend on its neighbours in the batch
            kept = (torch.arange(ranked.shape[1], device=h.device) < m.clamp(min=self.kept)[:, None]).to(h.dtype)
        mask = torch.zeros_like(h).flatten(1).scatter_(1, ranked, kept).view(h.shape).amax(1, keepdim=True)
        image = self.image(self.extract(h) * mask).flatten(1)
        if self.selection == "image":
            return csikernels.top_m(image.detach().abs(), most, source=image)
        indices = ranked[:, :most].contiguous()
        return image.gather(1, indices), indices


class _NarrowConvolution(nn.Conv2d):
    """The same function as its base, for few output maps, an odd kernel and padding that keeps the size.

    oneDNN computes 16 output maps at a time, whatever is asked for. One product gives all taps' contributions instead,
    which are then shifted into place: 2.5 times as fast for one sample, 3.8 times for 64.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return super().forward(x)
        # A tap that looks one step ahead contributes one step behind.
        taps = self.weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)
        image = F.fold(taps @ x.flatten(2), x.shape[2:], self.kernel_size, padding=self.kernel_size[0] // 2)
        return image if self.bias is None else image + self.bias[:, None, None]


class PreliminaryDecoder(nn.Module):
    """f_PD (Fig. 3): two residual networks and a convolution, ``[B, 2, Nc, Nt]`` to the same.

    Sizes: the 3.36 k parameters that Table IV gives for IdasNet's decoder are those of two of CsiNet's RefineNets
    (2 -> 8 -> 16 -> 2) and a 3x3 convolution with bias, to the last one (3,362).
    """

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Sequential(ResidualNetwork(), ResidualNetwork())
        self.output = nn.Conv2d(2, 2, 3, padding=1)

    def start_as_identity(self) -> None:
        """See :meth:`LlmCsiNet.start_as_identity`."""
        for network, offset in zip(cast("list[ResidualNetwork]", self.refine), (_OFFSET, 0.0), strict=True):
            last = cast(nn.BatchNorm2d, network.convolutions[-1])
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, offset)
        nn.init.dirac_(self.output.weight)
        nn.init.constant_(cast(torch.Tensor, self.output.bias), -_OFFSET)

    def forward(self, filled: torch.Tensor) -> torch.Tensor:
        return self.output(self.refine(filled))


class ResidualNetwork(nn.Module):
    """Three convolutions whose maps are added to the input before the last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _convolution(2, 8), _convolution(8, 16), nn.Conv2d(16, 2, 3, padding=1), nn.BatchNorm2d(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x + self.convolutions(x), _SLOPE)


class TokenPrediction(nn.Module):
    """f_TP (Fig. 4): patches of H_p as tokens, the language model's layers, and back to ``[B, 2, Nc, Nt]``.

    H_p is normalised to zero mean and unit variance per sample, undone at the end. Arrays that patches do not divide
    are padded with zeros at the far ends. The class token stands last where attention is causal, since there only the
    last token sees all others, and first otherwise.
    """

    def __init__(self, config: LlmCsiNetConfig, *, pretrained: bool = True):
        super().__init__()
        self.backbone = Backbone(config.backbone, pretrained=pretrained)
        width = self.backbone.width
        self.patch, self.shape, self.residual = config.patch, config.shape, config.residual
        self.grid = math.ceil(config.delays / config.patch), math.ceil(config.antennas / config.patch)
        self.tokenise = nn.Conv2d(2, width, config.patch, stride=config.patch)
        self.position = nn.Parameter(torch.randn(math.prod(self.grid), width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.output = nn.Linear(width, 2 * config.patch**2)
        self.class_last = self.backbone.config.attention == "causal"

    def forward(self, preliminary: torch.Tensor) -> torch.Tensor:
        if not len(preliminary):
            return preliminary  # the layers of transformers cannot reshape an empty batch
        variance, mean = torch.var_mean(preliminary, dim=(1, 2, 3), keepdim=True, correction=0)
        # H_p is of unit scale. One of no variance stays defined, and so does its gradient.
        deviation = (variance + 1e-12).sqrt()
        rows, columns = self.grid
        _, delays, antennas = self.shape
        padding = (0, columns * self.patch - antennas, 0, rows * self.patch - delays)
        x = F.pad((preliminary - mean) / deviation, padding)
        tokens = self.tokenise(x).flatten(2).mT + self.position
        class_token = self.class_token.expand(tokens.shape[0], -1, -1)
        if self.class_last:
            tokens = self.backbone(torch.cat([tokens, class_token], dim=1))[:, :-1]
        else:
            tokens = self.backbone(torch.cat([class_token, tokens], dim=1))[:, 1:]
        patches = self.output(tokens).view(-1, rows, columns, 2, self.patch, self.patch)
        h = patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, rows * self.patch, columns * self.patch)
        h = h[:, :, :delays, :antennas] * deviation + mean
        return preliminary + h - mean if self.residual else h


def codeword_scale(codeword: Codeword) -> torch.Tensor:
    """Root mean square of the fed back values ``[B]``, each counted once: the same however long the padding is."""
    values, indices, _ = codeword
    once = indices != indices[:, :1]
    once[:, :1] = True
    return (_root_mean_square(values.detach() * once) * (values.shape[1] / once.sum(1)).sqrt()).to(values.dtype)


def compression_ratio(
    m: int, delays: int = 32, antennas: int = 32, value_bits: int = 64, index_bits: int = 10
) -> float:
    """sigma of eq. 17: bits of the codeword over bits of ``H``. The paper takes 64 bits a value and 10 an index.

    (Eleven are needed to tell 2,048 positions apart; a report of :mod:`csimodels.models.payload` has those.)
    """
    return codeword_bits(m, value_bits, index_bits) / (value_bits * 2 * delays * antennas)


def codeword_bits(m: int, value_bits: int = 64, index_bits: int = 10) -> int:
    """Bits of a codeword of ``m`` values, the mean and ``m`` indices (eq. 17's numerator, Table II)."""
    if m < 1 or value_bits < 1 or index_bits < 0:
        raise ValueError(
            f"m, value_bits, index_bits: expected at least 1, 1 and 0, got {m}, {value_bits}, {index_bits}"
        )
    return value_bits * (m + 1) + index_bits * m


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(_SLOPE))


def _random_neighbours(radius: int, seed: int) -> list[tuple[int, int]]:
    """Nine distinct elements of the (2R+1)^2 around an element, which itself is left out: it tells nothing of it."""
    side = range(-radius, radius + 1)
    around = [(row, column) for row in side for column in side if (row, column) != (0, 0)]
    order = torch.randperm(len(around), generator=torch.Generator().manual_seed(seed)).tolist()
    return [around[i] for i in order[:9]]


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """``[B, ...]`` -> float64 ``[B]``: squares of weak CSI underflow in float32."""
    elements = x.shape[1:].numel()
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64) / math.sqrt(elements)


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, and x where the scale is 0."""
    return x / torch.where(scale > 0, scale, torch.ones_like(scale))
