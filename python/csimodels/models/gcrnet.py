"""GCRNet-1x ("A Lightweight Design to Convolution Based Deep Learning CSI Feedback", Hu et al., 2024), re-imagined.

No code of it is public. Table IV of LLMCsiNet tells two things: its encoder is CRNet's, and its decoder has 1.65 M
parameters beside the dense layer, whatever the codeword's length. The decoder's layers here are this project's own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from csimodels.models.crnet import CRNet, chain, conv_bn
from csimodels.models.csinet import SLOPE

_BLOCKS = 2


class GCRNet(CRNet):
    """CRNet whose CRBlocks are replaced by :class:`GroupedBlock`.

    Parameters at M = 256, 128, 64 and 32 (2 x 32 x 32): at the UE as CRNet; at the BS 2.188 M, 1.926 M, 1.795 M and
    1.729 M, where Table IV gives 2.18 M, 1.92 M, 1.79 M and 1.72 M (all within 0.6%).

    Args:
        codeword_length, delays, antennas, scale: as :class:`csimodels.models.autoencoder.CsiAutoencoder`; delays and
            antennas are multiples of ``patch``.
        expansion: width of the blocks; 1 is GCRNet-1x.
        patch: side of the squares whose elements become maps of their own. Decided: 8, so that the many parameters act
            on 16 positions and one sample costs 27 M multiply-adds at the BS.

    Raises:
        ValueError: as the base, an expansion below 1, or a patch that does not divide the delays and the antennas.
    """

    def __init__(
        self,
        codeword_length: int,
        *,
        delays: int = 32,
        antennas: int = 32,
        scale: float | None = None,
        expansion: int = 1,
        patch: int = 8,
    ):
        if expansion < 1:
            raise ValueError(f"expansion: expected at least 1, got {expansion}")
        if patch < 1 or delays % patch or antennas % patch:
            raise ValueError(f"patch: expected a divisor of {delays} delays and {antennas} antennas, got {patch}")
        self._expansion, self._patch = expansion, patch
        super().__init__(codeword_length, delays=delays, antennas=antennas, scale=scale)

    def _features(self) -> nn.Module:
        layers = chain(conv5x5_bn=conv_bn(2, 2, 5, 5))
        layers.add_module("relu", nn.LeakyReLU(SLOPE))
        for number in range(1, _BLOCKS + 1):
            layers.add_module(f"block{number}", GroupedBlock(self._patch, 480 * self._expansion))
        return layers


class GroupedBlock(nn.Module):
    """CRBlock on patches, with grouped convolutions: two resolutions, merged and added to the input, 2 -> 2 maps.

    Args:
        patch: side of a patch. width: maps of each path, a multiple of ``groups``. groups: of the convolutions.
    """

    def __init__(self, patch: int, width: int, groups: int = 4):
        super().__init__()
        maps = 2 * patch * patch
        groups = groups if maps % groups == 0 else 1
        self.patch = patch
        self.path1 = chain(
            conv3x3=conv_bn(maps, width, 3, 3, groups),
            conv1x3=conv_bn(width, width, 1, 3, groups),
            conv3x1=conv_bn(width, width, 3, 1, groups),
        )
        self.path2 = chain(conv1x3=conv_bn(maps, width, 1, 3, groups), conv3x1=conv_bn(width, width, 3, 1, groups))
        self.conv1x1 = conv_bn(2 * width, maps, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(x, self.patch)
        maps = F.leaky_relu(torch.cat([self.path1(patches), self.path2(patches)], dim=1), SLOPE)
        return F.leaky_relu(x + F.pixel_shuffle(self.conv1x1(maps), self.patch), SLOPE)
