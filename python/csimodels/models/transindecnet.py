"""TransInDecNet ("TransInDecNet: Efficient CSI Compression and Reconstruction for FDD MIMO Using Transformer", 2025).

No code of it is public. Its name, and the complexities that LLMCsiNet's Table V gives for it, say: one dense layer at
the UE; a dense layer and a Transformer over the Nc delays at the BS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from csimodels.models.autoencoder import CsiAutoencoder
from csimodels.models.channel_transformer import apply_layer


class TransInDecNet(CsiAutoencoder):
    """``codeword = W vec(H)`` at the UE; at the BS one token per delay, real and imaginary parts of all antennas.

    Parameters at M = 256, 128, 64 and 32 (2 x 32 x 32): 0.524 M, 0.262 M, 0.131 M and 0.066 M at the UE, 0.807 M,
    0.545 M, 0.414 M and 0.349 M at the BS. Table IV gives 0.26 M, 0.13 M and 0.07 M, and 0.54 M, 0.41 M and 0.34 M, cut
    off rather than rounded; for M = 256 it has the two sides exchanged (0.80 M at the UE and 0.52 M at the BS). The
    sizes that lead there are one layer and a feed-forward width of 2,048, PyTorch's default.

    Args:
        codeword_length, delays, antennas: as :class:`csimodels.models.autoencoder.CsiAutoencoder`. Channels are not
            turned into images within [0, 1]; the last addition of a pre-norm layer has the scale of ``h``. Decided.
        layers, heads, feedforward: of the Transformer. Decided: 1, 4, 2048.

    Raises:
        ValueError: as the base, or an embedding (twice the antennas) that is no multiple of the heads.
    """

    def __init__(
        self,
        codeword_length: int,
        *,
        delays: int = 32,
        antennas: int = 32,
        layers: int = 1,
        heads: int = 4,
        feedforward: int = 2048,
    ):
        super().__init__(codeword_length, delays=delays, antennas=antennas)
        width = 2 * antennas
        if min(layers, heads, feedforward) < 1 or width % heads:
            raise ValueError(
                f"layers, heads, feedforward: expected at least 1 each and heads that divide {width} (2 Nt), got "
                f"{layers}, {heads} and {feedforward}"
            )
        self.encoder_fc = nn.Linear(self.elements, codeword_length)
        self.decoder_fc = nn.Linear(codeword_length, self.elements)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def _encode(self, h: torch.Tensor) -> torch.Tensor:
        return self.encoder_fc(h.flatten(1))

    def _decode(self, codeword: torch.Tensor) -> torch.Tensor:
        _, delays, antennas = self.shape
        # The dense layer has weights of its own for every delay: tokens need no positions beside it.
        tokens = self.decoder_fc(codeword).unflatten(1, (delays, 2 * antennas))
        for layer in cast("list[nn.TransformerEncoderLayer]", self.layers):
            tokens = apply_layer(layer, tokens)
        return tokens.unflatten(2, (2, antennas)).transpose(1, 2).contiguous()

    def _ue_modules(self) -> Iterator[nn.Module]:
        yield self.encoder_fc
