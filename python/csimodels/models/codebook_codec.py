"""Codebook-based CSI feedback online (LVM4CF (Zhuang et al.), eqs. 6, 7, 11 and 15): a search at the UE, a look-up at
the BS. No network runs at either end; what a model has learned is in the codewords.

With dual-side deployment (DS) both ends load one codebook. With single-side deployment (SS) the UE keeps a conventional
one, and the BS looks the index up in its own; its file says which codebook that index was searched in.
"""

from __future__ import annotations

from torch import Tensor

from csikernels import Codebook
from csimodels.models.codebook_file import FeedbackCodebook
from csimodels.models.index_payload import IndexFormat, IndexStream, pack_indices, unpack_indices


class CodebookEncoder:
    """The UE's end.

    Args:
        book: the codebook that the UE keeps. environment: which of several, as the BS signals it.

    Raises:
        ValueError: a codebook that only the BS has (SS), or an environment out of range.
    """

    def __init__(self, book: FeedbackCodebook, environment: int | None = None):
        if book.deployment == "SS":
            raise ValueError(
                f"book: expected the codebook that the UE keeps, of digest {book.ue_digest}, got one that is deployed "
                "at the BS alone (SS)"
            )
        self.form = IndexFormat(book.bits, book.feedback_digest(environment))
        self._codebook = Codebook(book.select(environment), copy=False)

    def indices(self, h: Tensor) -> Tensor:
        """The best codeword of each channel, int64 ``[N]``, or of each subcarrier of each, int64 ``[N S]``.

        Args:
            h: complex ``[N, D]`` or ``[N, D, S]``, of any norm.

        Raises:
            TypeError, ValueError: as :func:`csikernels.codebook_argmax`, or a channel that is zero or not finite, which
                has no best codeword (the first one's index is named).
        """
        rows = h if h.dim() != 3 else h.mT.flatten(0, 1)
        index, _ = self._codebook.search(rows)
        bad = (index < 0).nonzero()
        if len(bad):
            first = int(bad[0, 0])
            where = f"{first}" if h.dim() == 2 else f"{first // h.shape[2]}, subcarrier {first % h.shape[2]}"
            raise ValueError(f"h: {len(bad)} channels are zero or not finite, the first is {where}")
        return index

    def encode(self, h: Tensor) -> bytes:
        """A stream of one report per channel ``[N, D]``, or per subcarrier of each ``[N, D, S]``."""
        per_sample = h.shape[2] if h.dim() == 3 else 1
        return pack_indices(IndexStream(self.indices(h).cpu(), per_sample), self.form)


class CodebookDecoder:
    """The BS's end.

    Args:
        book: the BS's codebook. environment: its own, of several.

    Raises:
        ValueError: an environment out of range.
    """

    def __init__(self, book: FeedbackCodebook, environment: int | None = None):
        self.form = IndexFormat(book.bits, book.feedback_digest(environment))
        self._words = book.select(environment)

    def decode(self, stream: bytes) -> Tensor:
        """The codewords of a stream as channels of unit norm, complex64 ``[N, D, S]`` (S = 1 for narrowband ones).

        Raises:
            ValueError: as :func:`csimodels.models.index_payload.unpack_indices`.
        """
        found = unpack_indices(stream, self.form)
        words = self._words[found.indices.to(self._words.device)]
        return words.view(-1, found.per_sample, words.shape[1]).mT.contiguous()


def feed_back(h: Tensor, ue: FeedbackCodebook, bs: FeedbackCodebook, environment: int | None = None) -> Tensor:
    """Channels as the BS sees them after feedback: :class:`CodebookEncoder`, then :class:`CodebookDecoder`.

    Args:
        h: complex ``[N, D]`` or ``[N, D, S]``. ue, bs: the codebooks of the two ends; one and the same with DS.

    Returns:
        complex64, shape of ``h``, unit norm over D.
    """
    estimate = CodebookDecoder(bs, environment).decode(CodebookEncoder(ue, environment).encode(h))
    return estimate.view(h.shape)
