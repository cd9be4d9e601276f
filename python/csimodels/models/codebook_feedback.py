"""Codebook feedback with enhanced codebooks: which codebook lies where, what is reported, what must be signalled.

Source: "Extract the Best, Discard the Rest: CSI Feedback with Offline Large AI Models" (Zhuang et al.), section III.
SSLCF gives a site a codebook of its own, MSLCF an environment type.
"""

from __future__ import annotations

import dataclasses

import torch

import csikernels
from csimodels.models.codeword_network import feedback_bits

COMPLEX64_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Signalling:
    """What feedback costs.

    Attributes:
        report_bits: B, from the UE, per channel.
        codebook_bytes: from the BS to a UE that comes to the site, as float32 pairs (by RRC, section III-A).
        environment_bits: from the BS to a UE that comes to the site: which of the stored codebooks is in use.
        stored_bytes: codebooks that the UE keeps, whatever the site.
    """

    report_bits: int
    codebook_bytes: int = 0
    environment_bits: int = 0
    stored_bytes: int = 0


class CodebookFeedback:
    """A UE and a BS with their codebooks; build one with a class method.

    Args:
        ue: complex64 or complex128 ``[K, D]``, or ``[E, K, D]`` for a codebook per environment type: where the UE
            looks for its channel.
        bs: of the same shape: where the BS looks up the index.
        signalling: the costs.
        precision: of the search, as :class:`csikernels.Codebook`.

    Raises:
        TypeError, ValueError: as :class:`csikernels.Codebook`; shapes that differ; K other than 2^B, B in 1..20.
    """

    def __init__(self, ue: torch.Tensor, bs: torch.Tensor, signalling: Signalling, precision: str = "exact"):
        self.bits = feedback_bits(ue)
        if bs.shape != ue.shape or bs.device != ue.device or not bs.is_complex():
            raise ValueError(
                f"bs: expected a complex codebook {tuple(ue.shape)} on {ue.device}, like the UE's, got {bs.dtype} "
                f"{tuple(bs.shape)} on {bs.device}"
            )
        self.signalling = signalling
        self._search = csikernels.Codebook(ue, precision)
        self._words = bs.detach().clone()

    @classmethod
    def single_side(cls, conventional: torch.Tensor, enhanced: torch.Tensor, **options: str) -> CodebookFeedback:
        """SSLCF, SS deployment: the UE keeps the ``conventional`` codebook, the BS has the ``enhanced`` one."""
        return cls(conventional, enhanced, Signalling(feedback_bits(conventional)), **options)

    @classmethod
    def dual_side(cls, enhanced: torch.Tensor, **options: str) -> CodebookFeedback:
        """SSLCF, DS deployment: both have the ``enhanced`` codebook ``[K, D]``, which the BS sends to the UE."""
        if enhanced.ndim != 2:
            raise ValueError(f"enhanced: expected [K, D], got {tuple(enhanced.shape)}")
        size = COMPLEX64_BYTES * enhanced.numel()
        return cls(enhanced, enhanced, Signalling(feedback_bits(enhanced), codebook_bytes=size), **options)

    @classmethod
    def multi_scenario(cls, codebooks: torch.Tensor, **options: str) -> CodebookFeedback:
        """MSLCF: both have the ``codebooks`` ``[E, K, D]`` of all environment types; the BS sends its type's index."""
        if codebooks.ndim != 3 or 0 in codebooks.shape:
            raise ValueError(f"codebooks: expected a non-empty [E, K, D], got {tuple(codebooks.shape)}")
        signalling = Signalling(
            feedback_bits(codebooks),
            environment_bits=(len(codebooks) - 1).bit_length(),
            stored_bytes=COMPLEX64_BYTES * codebooks.numel(),
        )
        return cls(codebooks, codebooks, signalling, **options)

    def report_index(
        self, h: torch.Tensor, environment: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """At the UE: the index to feed back (eqs. 11 and 15).

        Args:
            h: complex64 or complex128 ``[N, D]``.
            environment: MSLCF's type of the site, one for all rows or int64 ``[N]``.

        Returns:
            index int64 ``[N]``, -1 for a channel that is zero or not finite; similarity to the UE's codeword, float32
            ``[N]``.

        Raises:
            TypeError, ValueError: as :func:`csikernels.codebook_argmax`; an environment out of range.
        """
        environment = self._environment(environment, len(h))
        return self._search.search(h, environment)

    def reconstruct(self, index: torch.Tensor, environment: int | torch.Tensor | None = None) -> torch.Tensor:
        """At the BS: the channel's direction, complex ``[N, D]``, from int64 ``index`` ``[N]``.

        Raises:
            TypeError: ``index`` is not int64.
            ValueError: an index is not in 0..K-1 (-1 says that the UE had no channel), or an environment out of range.
        """
        count = self._words.shape[-2]
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index: expected int64, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.ndim != 1:
            raise ValueError(f"index: expected [N], got shape {tuple(index.shape)}")
        wrong = ((index < 0) | (index >= count)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(f"index: expected values in 0..{count - 1}, got {int(index[first])} at {first}")
        environment = self._environment(environment, len(index))
        return self._words[index] if environment is None else self._words[environment, index]

    def _environment(self, environment: int | torch.Tensor | None, rows: int) -> torch.Tensor | None:
        types = len(self._words) if self._words.ndim == 3 else None
        if types is None or environment is None:
            if (types is None) != (environment is None):
                wanted = "none, there is one codebook" if types is None else f"the site's type, 0..{types - 1}"
                raise ValueError(f"environment: expected {wanted}, got {environment!r}")
            return None
        if isinstance(environment, int):
            environment = torch.full((rows,), environment, dtype=torch.int64, device=self._words.device)
        if environment.dtype != torch.int64 or environment.shape != (rows,):
            raise ValueError(
                f"environment: expected int64 [{rows}], got {environment.dtype} {tuple(environment.shape)}"
            )
        wrong = environment[(environment < 0) | (environment >= types)]
        if len(wrong):
            raise ValueError(f"environment: expected values in 0..{types - 1}, got {int(wrong[0])}")
        return environment
