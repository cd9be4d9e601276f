"""Deployments of enhanced codebooks: which lies where, for any number of sites at once, and what must be signalled.

Source: "Extract the Best, Discard the Rest: CSI Feedback with Offline Large AI Models" (Zhuang et al.), section III.
SSLCF gives a site a codebook of its own, MSLCF one to each environment type. Reports as bytes are the business of
:mod:`csimodels.models.codebook_codec`.
"""

from __future__ import annotations

import dataclasses

import torch

import csikernels
from csimodels.models.codebook_file import FeedbackCodebook

_WORD_BYTES = 8  # of a complex number as a float32 pair


@dataclasses.dataclass(frozen=True)
class Signalling:
    """What feedback costs.

    Attributes:
        report_bits: B, from the UE, per channel.
        codebook_bytes: from the BS to a UE that comes to the site, as float32 pairs (by RRC, section III-A).
        environment_bits: from the BS to a UE that comes to the site: which of the stored codebooks is in use.
        stored_bytes: enhanced codebooks that the UE keeps, whatever the site.
    """

    report_bits: int
    codebook_bytes: int = 0
    environment_bits: int = 0
    stored_bytes: int = 0


class CodebookDeployment:
    """A UE and its BSs; build one with a class method.

    Args:
        ue: where the UE looks for its channel. bs: where the BS looks the index up.
        signalling: the costs.

    Raises:
        ValueError: shapes that differ, or a codebook at the UE that is for the BS alone.
    """

    def __init__(self, ue: FeedbackCodebook, bs: FeedbackCodebook, signalling: Signalling):
        if bs.words.shape != ue.words.shape:
            raise ValueError(
                f"bs: expected a codebook {tuple(ue.words.shape)} like the UE's, got {tuple(bs.words.shape)}"
            )
        if ue.deployment != "DS":
            raise ValueError(f"ue: expected a codebook that the UE keeps, got one of deployment {ue.deployment}")
        self.signalling = signalling
        self._search = csikernels.Codebook(ue.words)
        self._words = bs.words

    @classmethod
    def conventional(cls, book: FeedbackCodebook) -> CodebookDeployment:
        """Both ends have one codebook ``[K, D]`` that a standard gave them."""
        _check_environments("book", book, several=False)
        return cls(book, book, Signalling(book.bits))

    @classmethod
    def single_side(cls, conventional: FeedbackCodebook, enhanced: FeedbackCodebook) -> CodebookDeployment:
        """SSLCF, SS deployment: the UE keeps the ``conventional`` codebook, the BS has the ``enhanced`` one.

        Raises:
            ValueError: ``enhanced`` does not say that it was made for ``conventional``.
        """
        if enhanced.deployment != "SS" or enhanced.ue_digest != conventional.digest():
            raise ValueError(
                f"enhanced: expected a codebook for the UE's {conventional.digest()} (SS), got one for "
                f"{enhanced.ue_digest} ({enhanced.deployment})"
            )
        return cls(conventional, enhanced, Signalling(conventional.bits))

    @classmethod
    def dual_side(cls, enhanced: FeedbackCodebook) -> CodebookDeployment:
        """SSLCF, DS deployment: both have the ``enhanced`` codebook ``[K, D]``, which the BS sends to the UE."""
        _check_environments("enhanced", enhanced, several=False)
        return cls(enhanced, enhanced, Signalling(enhanced.bits, codebook_bytes=_WORD_BYTES * enhanced.words.numel()))

    @classmethod
    def multi_scenario(cls, books: FeedbackCodebook) -> CodebookDeployment:
        """MSLCF: both have the codebooks ``[E, K, D]`` of all environment types; the BS sends its type's index."""
        _check_environments("books", books, several=True)
        signalling = Signalling(
            books.bits,
            environment_bits=(len(books.environments) - 1).bit_length(),
            stored_bytes=_WORD_BYTES * books.words.numel(),
        )
        return cls(books, books, signalling)

    def report_index(
        self, h: torch.Tensor, environment: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """At the UE: the index to feed back (eqs. 11 and 15), B bits.

        Args:
            h: complex64 or complex128 ``[N, D]``.
            environment: MSLCF's type of each channel's site, int64 ``[N]``, or one for all.

        Returns:
            index int64 ``[N]``, -1 for a channel that is zero or not finite; similarity to the UE's codeword, float32
            ``[N]``.

        Raises:
            TypeError, ValueError: as :func:`csikernels.codebook_argmax`; an environment out of range.
        """
        return self._search.search(h, self._environment(environment, len(h)))

    def reconstruct(self, index: torch.Tensor, environment: int | torch.Tensor | None = None) -> torch.Tensor:
        """At the BS: the channels' directions, complex64 ``[N, D]``, from int64 ``index`` ``[N]``.

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


def _check_environments(name: str, book: FeedbackCodebook, *, several: bool) -> None:
    if (book.words.ndim == 3) != several:
        wanted = "[E, K, D]" if several else "[K, D]"
        raise ValueError(f"{name}: expected a codebook {wanted}, got {tuple(book.words.shape)}")
