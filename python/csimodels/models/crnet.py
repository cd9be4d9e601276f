"""CRNet ("Multi-resolution CSI Feedback with Deep Learning in Massive MIMO System", Lu et al., 2020).

Names and shapes of the state dict are those of the authors' public code, whose checkpoints :func:`load_checkpoint`
reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from csimodels.models.autoencoder import CsiAutoencoder
from csimodels.models.csinet import SLOPE

# The profiler that the public training code runs leaves these in every module.
_PROFILER_ENTRIES = ("total_ops", "total_params")


class CRNet(CsiAutoencoder):
    """Convolutions of two resolutions and a dense layer at the UE; a dense layer and two CRBlocks at the BS.

    Parameters at M = 256, 2 x 32 x 32: 524,716 at the UE and 529,290 at the BS; Table IV of LLMCsiNet gives 0.52 M and
    0.53 M, and at smaller M they agree as well.

    Args:
        codeword_length, delays, antennas, scale, gain: as :class:`csimodels.models.autoencoder.CsiAutoencoder`.
    """

    def __init__(
        self,
        codeword_length: int,
        *,
        delays: int = 32,
        antennas: int = 32,
        scale: float | None = None,
        gain: float | None = None,
    ):
        super().__init__(codeword_length, delays=delays, antennas=antennas, scale=scale, gain=gain)
        self.encoder1 = chain(
            conv3x3_bn=conv_bn(2, 2, 3, 3), conv1x9_bn=conv_bn(2, 2, 1, 9), conv9x1_bn=conv_bn(2, 2, 9, 1)
        )
        self.encoder2 = conv_bn(2, 2, 3, 3)
        self.encoder_conv = chain(conv1x1_bn=conv_bn(4, 2, 1, 1))
        self.encoder_fc = nn.Linear(self.elements, codeword_length)
        self.decoder_fc = nn.Linear(codeword_length, self.elements)
        self.decoder_feature = self._features()
        self.apply(_initialise)
        _start_small(self.decoder_feature)

    def _features(self) -> nn.Module:
        layers = chain(conv5x5_bn=conv_bn(2, 2, 5, 5))
        layers.add_module("relu", nn.LeakyReLU(SLOPE))
        layers.add_module("CRBlock1", CRBlock())
        layers.add_module("CRBlock2", CRBlock())
        return layers

    def _encode(self, h: torch.Tensor) -> torch.Tensor:
        image = self._to_image(h)
        maps = torch.cat([self.encoder1(image), self.encoder2(image)], dim=1)
        maps = self.encoder_conv(F.leaky_relu(maps, SLOPE))
        return self.encoder_fc(F.leaky_relu(maps, SLOPE).flatten(1))

    def _decode(self, codeword: torch.Tensor) -> torch.Tensor:
        initial = self.decoder_fc(codeword).unflatten(1, self.shape)
        return self._from_maps(self.decoder_feature(initial))

    def _ue_modules(self) -> Iterator[nn.Module]:
        yield from (self.encoder1, self.encoder2, self.encoder_conv, self.encoder_fc)


class CRBlock(nn.Module):
    """Convolutions of reach 3 + 9 and of reach 5 side by side, merged and added to their input, 2 -> 2 maps."""

    def __init__(self) -> None:
        super().__init__()
        self.path1 = chain(conv3x3=conv_bn(2, 7, 3, 3), conv1x9=conv_bn(7, 7, 1, 9), conv9x1=conv_bn(7, 7, 9, 1))
        self.path2 = chain(conv1x5=conv_bn(2, 7, 1, 5), conv5x1=conv_bn(7, 7, 5, 1))
        self.conv1x1 = conv_bn(14, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = F.leaky_relu(torch.cat([self.path1(x), self.path2(x)], dim=1), SLOPE)
        return F.leaky_relu(x + self.conv1x1(maps), SLOPE)


def conv_bn(inputs: int, outputs: int, height: int, width: int, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (odd kernels), without bias, and a batch normalisation."""
    layers = nn.Sequential()
    padding = (height // 2, width // 2)
    layers.add_module("conv", nn.Conv2d(inputs, outputs, (height, width), padding=padding, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(outputs))
    return layers


def chain(**layers: nn.Module) -> nn.Sequential:
    """The layers one after the other under their names, a leaky ReLU between two of them."""
    chained = nn.Sequential()
    for number, (name, layer) in enumerate(layers.items()):
        if number:
            chained.add_module(f"relu{number}", nn.LeakyReLU(SLOPE))
        chained.add_module(name, layer)
    return chained


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Take the weights of a public checkpoint of CRNet, or of another network whose state dict has ``model``'s names.

    Args:
        model: takes the weights.
        path: of a file by ``torch.save``: a state dict, or a dictionary that has one under ``"state_dict"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or has not the names and shapes of the model (which ones).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise ValueError(f"{path}: expected a checkpoint of tensors and numbers ({error})") from None
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if state is None or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict, or one under 'state_dict'")
    state = {name: value for name, value in state.items() if name.split(".")[-1] not in _PROFILER_ENTRIES}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _start_small(features: nn.Module) -> None:
    """Let the decoder's first output be small: an error of a fraction of a dB above that of an estimate of zero.

    Decided. With scales of 1 the output of random weights has several times the energy of ``h``; the cheapest descent
    is then to cancel it, which ends at outputs of zero, where the dense layers get no gradient. Batch normalisations
    that end a residual path start at 0, as is usual, and the first one at 0.3.
    """
    for name, module in features.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if name.endswith("conv1x1.bn"):
                nn.init.zeros_(module.weight)
            elif name.startswith("conv5x5_bn"):
                nn.init.constant_(module.weight, 0.3)


def _initialise(module: nn.Module) -> None:
    # As the public code does.
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
