"""Codebooks with what both ends of a link must agree on, in memory and as files.

A file is safetensors: ``words``, float32 ``[K, D, 2]`` or ``[E, K, D, 2]`` (real and imaginary parts), and metadata in
JSON: ``kind``, ``bits``, ``dimension``, ``ports``, ``deployment``, ``ue_digest``, ``environments``, ``digests`` and
``source``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csimodels import __version__
from csimodels.files import known, load_format, save_tensors
from csimodels.models.codebooks import PortLayout, check_bits

DEPLOYMENTS = ("SS", "DS")
_FORMAT = "csimodels.codebook"
_UNIT = 1e-5  # how far from 1 float32 rounding leaves a norm, with room
_BLOCK = 2**14


@dataclasses.dataclass(frozen=True, eq=False)
class FeedbackCodebook:
    """A codebook of unit-norm codewords, or one per environment (MSLCF), ready to be deployed.

    Codewords of another norm are normalised, and a ``UserWarning`` says how many: a codeword is a direction (LVM4CF
    (Zhuang et al.), eq. 8b), but whoever made it may have meant otherwise. The tensor given is then left as it is;
    otherwise it is kept without a copy and must not be changed.

    Attributes:
        words: complex64 ``[K, D]``, or ``[E, K, D]`` for E environments; K = 2^B with B in 1..20.
        kind: what it is, such as ``"rvq"``, ``"dft"``, ``"type1"``, ``"k-lines"`` or a model's name.
        ports: order of the D numbers; two codebooks of the same D may be of different arrays.
        deployment: ``"DS"`` (dual-side: the UE searches this codebook too, as with every conventional one) or ``"SS"``
            (single-side: only the BS has it, and index i stands for codeword i of the UE's conventional codebook).
        ue_digest: with SS, :meth:`digest` of the codebook that the UE keeps; else None.
        environments: E names; empty for ``[K, D]``.
        source: where it comes from (seed, training, data), JSON-serialisable.

    Raises:
        TypeError: ``words`` is not complex64.
        ValueError: a shape that does not fit ``ports`` or ``environments``, a number of words that is no power of two,
            B out of range, a codeword that is zero or not finite (it is named), or a deployment that does not fit.
    """

    words: Tensor
    kind: str
    ports: PortLayout
    deployment: str = "DS"
    ue_digest: str | None = None
    environments: tuple[str, ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        words = self.words
        if not isinstance(words, Tensor) or words.dtype != torch.complex64:
            given = words.dtype if isinstance(words, Tensor) else type(words).__name__
            raise TypeError(f"words: expected complex64, got {given}")
        if words.dim() not in (2, 3) or 0 in words.shape:
            raise ValueError(f"words: expected a non-empty [K, D] or [E, K, D], got shape {tuple(words.shape)}")
        if words.shape[-1] != len(self.ports):
            raise ValueError(f"words: expected D = {len(self.ports)} for {self.ports}, got {words.shape[-1]}")
        if words.shape[-2] != 2**self.bits:
            raise ValueError(f"words: expected 2^B codewords, got {words.shape[-2]}")
        check_bits(self.bits)
        expected = words.shape[0] if words.dim() == 3 else 0
        if len(self.environments) != expected:
            raise ValueError(f"environments: expected {expected} names, got {len(self.environments)}")
        self._check_deployment()
        object.__setattr__(self, "words", _unit_norm(words.detach().resolve_conj().contiguous()))

    def _check_deployment(self) -> None:
        if self.deployment not in DEPLOYMENTS:
            raise ValueError(f"deployment: expected {' or '.join(DEPLOYMENTS)}, got {self.deployment!r}")
        if self.deployment == "DS" and self.ue_digest is not None:
            raise ValueError("ue_digest: expected none with DS, where the UE has this codebook")
        if self.deployment == "SS":
            if not _is_digest(self.ue_digest):
                raise ValueError(f"ue_digest: expected 64 hexadecimal digits with SS, got {self.ue_digest!r}")
            if self.words.dim() == 3:
                raise ValueError("deployment: expected DS for several environments, got SS")

    @property
    def bits(self) -> int:
        """B: bits of an index."""
        return (self.words.shape[-2] - 1).bit_length()

    @property
    def dimension(self) -> int:
        """D."""
        return self.words.shape[-1]

    def select(self, environment: int | None = None) -> Tensor:
        """The codewords of one environment, complex64 ``[K, D]``, a view.

        Raises:
            ValueError: an index outside 0..E-1, none where there are several, or one where there is none.
        """
        if self.words.dim() == 2:
            if environment is not None:
                raise ValueError(f"environment: expected none for a codebook of one environment, got {environment}")
            return self.words
        count = len(self.words)
        if environment is None or not 0 <= environment < count:
            raise ValueError(
                f"environment: expected 0 to {count - 1} ({', '.join(self.environments)}), got "
                f"{'none' if environment is None else environment}"
            )
        return self.words[environment]

    def digest(self, environment: int | None = None) -> str:
        """SHA-256 of one environment's codewords and the order of their ports, hexadecimal.

        It is the same for one of several environments and for a codebook that holds this one alone.
        """
        self.select(environment)  # refuses what is out of range
        return self._digests[environment or 0]

    def feedback_digest(self, environment: int | None = None) -> bytes:
        """The eight bytes by which a stream of indices names the codebook that was searched: the UE's."""
        digest = self.digest(environment) if self.ue_digest is None else self.ue_digest
        return bytes.fromhex(digest)[:8]

    @functools.cached_property
    def _digests(self) -> tuple[str, ...]:
        return digests(self.words, self.ports)


def digests(words: Tensor, ports: PortLayout) -> tuple[str, ...]:
    """SHA-256 of the codebook ``[K, D]``, or of each of ``[E, K, D]``, complex64."""
    found = []
    for book in words.reshape(-1, *words.shape[-2:]):
        total = hashlib.sha256(json.dumps([_FORMAT, dataclasses.astuple(ports)]).encode())
        for block in book.split(_BLOCK):
            total.update(torch.view_as_real(block).cpu().numpy().astype("<f4").tobytes())
        found.append(total.hexdigest())
    return tuple(found)


def save_codebook(path: str | os.PathLike, book: FeedbackCodebook) -> None:
    """Write a codebook atomically.

    Raises:
        TypeError, ValueError: ``book.source`` is nothing that JSON can hold.
        OSError: it could not be written; the old file stays.
    """
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "kind": book.kind,
        "bits": book.bits,
        "dimension": book.dimension,
        "ports": dataclasses.asdict(book.ports),
        "deployment": book.deployment,
        "ue_digest": book.ue_digest,
        "environments": list(book.environments),
        "digests": list(book._digests),
        "source": dict(book.source),
    }
    save_tensors(path, {"words": torch.view_as_real(book.words)}, metadata)


def load_codebook(path: str | os.PathLike, *, ports: PortLayout | None = None) -> FeedbackCodebook:
    """Read what :func:`save_codebook` wrote.

    Args:
        path: of the file.
        ports: the array that the codebook is for; None takes the file's word.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no codebook file, a damaged one, one of another port layout (both are named), or words that
            :class:`FeedbackCodebook` refuses.
    """
    tensors, metadata = load_format(path, _FORMAT, "a codebook")
    with known(path, metadata, "description"):
        layout, stored = PortLayout(**metadata["ports"]), tensors["words"]
        fields = {name: metadata[name] for name in ("kind", "deployment", "ue_digest", "source")}
        environments, expected = tuple(metadata["environments"]), tuple(metadata["digests"])
        sizes = metadata["bits"], metadata["dimension"]
    if ports is not None and layout != ports:
        raise ValueError(f"{path}: expected a codebook for {ports}, got one for {layout}")
    if stored.dtype != torch.float32 or stored.dim() not in (3, 4) or stored.shape[-1] != 2:
        raise ValueError(f"{path}: words: expected float32 [..., K, D, 2], got {stored.dtype} {tuple(stored.shape)}")
    words = torch.view_as_complex(stored)
    if digests(words, layout) != expected:
        raise ValueError(f"{path}: damaged: the codewords do not have the digests of its metadata")
    try:
        book = FeedbackCodebook(words, ports=layout, environments=environments, **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if (book.bits, book.dimension) != sizes:
        raise ValueError(f"{path}: expected B, D = {sizes} as its metadata say, got {(book.bits, book.dimension)}")
    return book


def _unit_norm(words: Tensor) -> Tensor:
    """The same tensor where all norms are 1; else a normalised copy, and a warning."""
    flat = words.view(-1, words.shape[-1])
    norm = torch.cat([torch.linalg.vector_norm(_parts(block), dim=1) for block in flat.split(_BLOCK)])
    bad = ~((norm > 0) & norm.isfinite())
    if bool(bad.any()):
        position = int(bad.nonzero()[0, 0])
        where = f"codeword {position % words.shape[-2]}"
        where += f" of environment {position // words.shape[-2]}" if words.dim() == 3 else ""
        what = "is zero" if norm[position] == 0 else "is not finite"
        raise ValueError(f"words: expected finite, non-zero codewords, but {where} {what}")
    off = ((norm - 1).abs() > _UNIT).sum().item()
    if not off:
        return words
    span = f"{norm.min().item():.4g} to {norm.max().item():.4g}"
    warnings.warn(f"normalised {off} of {len(flat)} codewords, whose norms were {span}, not 1", stacklevel=4)
    normalised = torch.empty_like(flat)
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, start + _BLOCK)
        normalised[block] = flat[block] / norm[block, None]  # the float64 norm: a denormal one has no float32 inverse
    return normalised.view(words.shape)


def _parts(block: Tensor) -> Tensor:
    """Real and imaginary parts in float64, in which no square of a float32 number over- or underflows."""
    return torch.view_as_real(block).flatten(1).double()


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
