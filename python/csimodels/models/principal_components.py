"""The best linear autoencoder of CSI: its principal components (the Karhunen-Loeve transform), in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from csimodels.models.autoencoder import CsiAutoencoder
from csimodels.models.channel_transformer import parameter_count


class PrincipalComponents(CsiAutoencoder):
    """``codeword = V^T vec(H)`` at the UE, ``V codeword`` at the BS, with orthonormal ``V`` ``[2 Nc Nt, M]``.

    Not in the paper: of all linear encoders and decoders the one of least squared error, hence what an autoencoder of
    dense layers must beat. Both ends hold ``V``. It is zero, and so is every codeword, until :meth:`fit`.

    Args:
        codeword_length, delays, antennas: as :class:`csimodels.models.autoencoder.CsiAutoencoder`; ``h`` is used as it
            is, not as an image.
    """

    def __init__(self, codeword_length: int, *, delays: int = 32, antennas: int = 32):
        super().__init__(codeword_length, delays=delays, antennas=antennas)
        self.components = nn.Linear(self.elements, codeword_length, bias=False).requires_grad_(False)
        nn.init.zeros_(self.components.weight)

    @torch.no_grad()
    def fit(self, h: torch.Tensor) -> None:
        """Take the eigenvectors of the M largest eigenvalues of the second moment of ``h``, computed in float64.

        Args:
            h: float ``[samples, 2, delays, antennas]``. Not centred: its phases have no mean. With fewer samples than
                M, the components beyond their number are zero.

        Raises:
            TypeError, ValueError: as :meth:`encode`; no samples.
        """
        self._check("h", h, self.shape)
        if not len(h):
            raise ValueError("h: expected at least one sample, got none")
        rows = h.flatten(1).double()
        if len(rows) < self.elements:
            vectors = torch.linalg.svd(rows, full_matrices=False).Vh
        else:  # the samples, which may be many, enter through their second moment only
            vectors = torch.linalg.eigh(rows.T @ rows).eigenvectors.T.flip(0)
        self.components.weight.zero_()
        found = vectors[: self.codeword_length]
        self.components.weight[: len(found)] = found.float()

    def bs_parameters(self) -> int:
        return parameter_count(self)

    def _encode(self, h: torch.Tensor) -> torch.Tensor:
        return self.components(h.flatten(1))

    def _decode(self, codeword: torch.Tensor) -> torch.Tensor:
        return (codeword @ self.components.weight).unflatten(1, self.shape)

    def _ue_modules(self) -> Iterator[nn.Module]:
        yield self.components
