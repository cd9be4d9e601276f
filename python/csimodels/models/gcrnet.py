"""GCRNet-1x ("A Lightweight Design to Convolution Based Deep Learning CSI Feedback", Hu et al., 2024), re-imagined.

No code of it is public. Table IV of LLMCsiNet tells two things: its encoder is CRNet's, and its decoder has 1.65 M
parameters beside the dense layer, whatever the codeword's length. The decoder's layers here are this project's own.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from csimodels.models.crnet import CRNet, chain, conv_bn
from csimodels.models.csinet import SLOPE

_BLOCKS, _GROUPS = 2, 4


class GCRNet(CRNet):
    """CRNet whose CRBlocks are replaced by :class:`GroupedBlock`.

    Parameters at M = 256, 128, 64 and 32 (2 x 32 x 32): at the UE as CRNet; at the BS 2.188 M, 1.926 M, 1.795 M and
    1.729 M, where Table IV gives 2.18 M, 1.92 M, 1.79 M and 1.72 M (all within 0.6%).

    Args:
        codeword_length, delays, antennas, scale, gain: as :class:`csimodels.models.autoencoder.CsiAutoencoder`; delays
            and antennas are multiples of ``patch``.
        width: maps of each path of a block, a multiple of 4 (the groups). Decided: 480, by the parameters of GCRNet-1x.
        patch: side of the squares whose elements become maps of their own. Decided: 8, so that the many parameters act
            on 16 positions and one sample costs 27 M multiply-adds at the BS.

    Raises:
        ValueError: as the base, a width that is no multiple of 4, or a patch that does not divide delays and antennas.
    """

    def __init__(
        self,
        codeword_length: int,
        *,
        delays: int = 32,
        antennas: int = 32,
        scale: float | None = None,
        gain: float | None = None,
        width: int = 480,
        patch: int = 8,
    ):
        if width < 1 or width % _GROUPS:
            raise ValueError(f"width: expected a multiple of {_GROUPS}, got {width}")
        if patch < 1 or delays % patch or antennas % patch:
            raise ValueError(f"patch: expected a divisor of {delays} delays and {antennas} antennas, got {patch}")
        self._width, self._patch = width, patch
        super().__init__(codeword_length, delays=delays, antennas=antennas, scale=scale, gain=gain)

    def _features(self) -> nn.Module:
        layers = chain(conv5x5_bn=conv_bn(2, 2, 5, 5))
        layers.add_module("relu", nn.LeakyReLU(SLOPE))
        for number in range(1, _BLOCKS + 1):
            layers.add_module(f"block{number}", GroupedBlock(self._patch, self._width))
        return layers


class GroupedBlock(nn.Module):
    """CRBlock on patches, with grouped convolutions: two resolutions, merged and added to the input, 2 -> 2 maps.

    Args:
        patch: side of a patch. width: maps of each path, a multiple of 4.
    """

    def __init__(self, patch: int, width: int):
        super().__init__()
        maps = 2 * patch * patch
        groups = math.gcd(maps, _GROUPS)  # of two maps only where the patch is a single element
        self.patch = patch
        self.path1 = chain(
            conv3x3=conv_bn(maps, width, 3, 3, groups),
            conv1x3=conv_bn(width, width, 1, 3, groups),
            conv3x1=conv_bn(width, width, 3, 1, groups),
        )
        self.path2 = chain(conv1x3=conv_bn(maps, width, 1, 3, groups), conv3x1=conv_bn(width, width, 3, 1, groups))
        self.conv1x1 = conv_bn(2 * width, maps, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, maps, delays, antennas = x.shape
        side, rows, columns = self.patch, delays // self.patch, antennas // self.patch
        # As F.pixel_unshuffle and F.pixel_shuffle, which leave an empty batch as it is.
        patches = x.reshape(batch, maps, rows, side, columns, side).permute(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(batch, maps * side * side, rows, columns)
        features = F.leaky_relu(torch.cat([self.path1(patches), self.path2(patches)], dim=1), SLOPE)
        merged = self.conv1x1(features).reshape(batch, maps, side, side, rows, columns)
        return F.leaky_relu(x + merged.permute(0, 1, 4, 2, 5, 3).reshape(x.shape), SLOPE)
