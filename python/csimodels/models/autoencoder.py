"""What the autoencoders among the baselines of LLMCsiNet share: their interface, its checks, and CSI as an image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from csimodels.models.channel_transformer import parameter_count


class CsiAutoencoder(nn.Module):
    """CSI -> codeword of real numbers -> CSI. ``h`` is float32 ``[batch, 2, delays, antennas]``, zero-centred.

    A subclass defines :meth:`_encode`, :meth:`_decode` and :meth:`_ue_modules`.

    Args:
        codeword_length: M, real numbers fed back per sample.
        delays, antennas: Nc and Nt.
        scale: where a network works on images within [0, 1], as the files of CsiNet and CRNet have them
            (:mod:`csimodels.channels.cost2100`), ``h / scale + 0.5`` is one; by default ``2 sqrt(Nc Nt)``, which no
            sample of energy ``Nc Nt`` exceeds. For a public checkpoint take 1 and ``h = x - 0.5``, with angles before
            delays as in the files.
        gain: what a network multiplies by before the sigmoid that makes its image. Public checkpoints have 1, which is
            the default where ``scale`` is given. Otherwise it is ``4 / scale``: an output of 1 is then 1 in the unit
            of ``h`` until the sigmoid bends it. The functions to choose from are the same, since everything behind
            the last normalisation is homogeneous; but from 1 an optimiser must first shrink the output to a hundredth,
            and with it the gradients (a thousand steps in which nothing is learned).

    Raises:
        ValueError: M is below 1 or above the elements of ``h``, a size below 1, or a scale that is not positive.
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
        super().__init__()
        if min(delays, antennas) < 1:
            raise ValueError(f"delays, antennas: expected at least 1, got {delays} and {antennas}")
        self.shape = (2, delays, antennas)
        self.elements = math.prod(self.shape)
        if not 1 <= codeword_length <= self.elements:
            raise ValueError(f"codeword_length: expected 1 to {self.elements} (2 Nc Nt), got {codeword_length}")
        self.codeword_length = codeword_length
        self.scale = 2 * math.sqrt(delays * antennas) if scale is None else scale
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if gain is None:
            gain = 4 / self.scale if scale is None else 1.0
        if not 0 < gain < math.inf:
            raise ValueError(f"gain: expected a positive number, got {gain}")
        self.gain = gain

    def encode(self, h: torch.Tensor) -> torch.Tensor:
        """Float32 ``[batch, 2, delays, antennas]`` -> codeword, float32 ``[batch, M]``.

        Raises:
            TypeError: ``h`` is not of the model's dtype.
            ValueError: another shape.
        """
        self._check("h", h, self.shape)
        return self._encode(h)

    def decode(self, codeword: torch.Tensor) -> torch.Tensor:
        """Codeword, float32 ``[batch, M]`` -> float32 ``[batch, 2, delays, antennas]``.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
        self._check("codeword", codeword, (self.codeword_length,))
        return self._decode(codeword)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What the BS reconstructs of ``h``."""
        return self.decode(self.encode(h))

    def ue_parameters(self) -> int:
        """Number of parameters at the UE."""
        return sum(parameter_count(module) for module in self._ue_modules())

    def bs_parameters(self) -> int:
        """Number of parameters at the BS."""
        return parameter_count(self) - self.ue_parameters()

    def _encode(self, h: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _decode(self, codeword: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _ue_modules(self) -> Iterator[nn.Module]:
        raise NotImplementedError

    def _to_image(self, h: torch.Tensor) -> torch.Tensor:
        return h / self.scale + 0.5

    def _from_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """What the last layer gives, through the sigmoid that makes an image within [0, 1], in the unit of ``h``."""
        return ((maps * self.gain).sigmoid() - 0.5) * self.scale

    def _check(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
        dtype = next(self.parameters()).dtype
        if not isinstance(value, torch.Tensor) or value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.ndim != 1 + len(shape) or tuple(value.shape[1:]) != shape:
            raise ValueError(f"{name}: expected shape [batch, {', '.join(map(str, shape))}], got {list(value.shape)}")
