"""Codebook feedback on files: channels to a stream of codeword indices at the UE, the stream to channels at the BS."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csimodels.channels.vector_file import VARIABLE, VectorFile, write_vectors
from csimodels.evaluation.metrics import codeword_cosine
from csimodels.files import atomic_path
from csimodels.models.codebook_codec import CodebookDecoder, CodebookEncoder
from csimodels.models.codebook_file import FeedbackCodebook
from csimodels.models.index_payload import IndexStream, pack_indices


@dataclasses.dataclass(frozen=True)
class EncodedChannels:
    """``reports`` of ``bits`` bits each, of ``samples`` channels, in a file of ``bytes``."""

    samples: int
    reports: int
    bits: int
    bytes: int


def encode_channels(
    book: FeedbackCodebook,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    environment: int | None = None,
    variable: str = VARIABLE,
) -> EncodedChannels:
    """Find the codeword of every channel of a file (:mod:`csimodels.channels.vector_file`) and write their indices.

    Args:
        book: the UE's codebook. environment: which of several.
        source: channels; each subcarrier is reported by itself. variable: their name in it.
        out: file of one stream (:mod:`csimodels.models.index_payload`).

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, does not fit the codebook or holds channels that are
            zero or not finite; a codebook that only the BS has; an environment out of range.
        OSError: ``out`` could not be written; an old file stays.
    """
    encoder = CodebookEncoder(book, environment)
    file = VectorFile(source, book.dimension, variable)
    indices, begin = [], 0
    for h in file.blocks():
        try:
            indices.append(encoder.indices(h))
        except ValueError as error:
            raise ValueError(f"{source}: samples from {begin} on: {error}") from None
        begin += len(h)
    found = torch.cat(indices)
    content = pack_indices(IndexStream(found, file.subcarriers), encoder.form)
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)
    return EncodedChannels(len(file), len(found), book.bits, len(content))


def decode_channels(
    book: FeedbackCodebook,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    environment: int | None = None,
    truth: str | os.PathLike | None = None,
    variable: str = VARIABLE,
) -> dict[str, Any]:
    """Look up the codewords of a file of indices and write them as channels of unit norm.

    Args:
        book: the BS's codebook. environment: its own, of several.
        source: what :func:`encode_channels` wrote.
        out: the channels, in a file of the kind that its ending says.
        truth: the file that was encoded, to compare with. variable: name of its channels.

    Returns:
        ``samples``, ``subcarriers``, and with a truth ``cosine``: the mean of ``codeword_cosine`` over all vectors.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, a stream of another codebook, or a truth of another
            size.
        OSError: ``out`` could not be written; an old file stays.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        estimate = CodebookDecoder(book, environment).decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    samples, _, subcarriers = estimate.shape
    result: dict[str, Any] = {"samples": samples, "subcarriers": subcarriers}
    environments, los = np.zeros(samples, np.int64), np.zeros(samples, bool)
    if truth is not None:
        file = VectorFile(truth, book.dimension, variable)
        if (len(file), file.subcarriers) != (samples, subcarriers):
            raise ValueError(
                f"{truth}: expected the {samples} samples of {subcarriers} subcarriers that were encoded, got "
                f"{len(file)} of {file.subcarriers}"
            )
        environments, los = file.environment, file.los
        result["cosine"] = _mean_cosine(file, estimate)
    parameters = {"reports": str(source), "bits": book.bits}
    write_vectors(out, estimate, environment=environments, los=los, parameters=parameters)
    return result


def _mean_cosine(file: VectorFile, estimate: torch.Tensor) -> float:
    total, begin = 0.0, 0
    for h in file.blocks():
        known = estimate[begin : begin + len(h)]
        total += codeword_cosine(h.mT, known.mT, reduction="none").sum().item()
        begin += len(h)
    return total / (begin * estimate.shape[2])
