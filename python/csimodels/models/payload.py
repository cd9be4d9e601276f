"""A codeword as the bytes of a feedback report, one per sample, written and read back bit for bit.

========  =====  ===============================================================================================
bytes     field  content (little-endian)
========  =====  ===============================================================================================
0-3       magic  ``CSIF``
4         u8     version of this layout, 1
5         u8     kind of the values: 0 float32, 1 Lloyd-Max codes
6-7       u16    bits of a value
8-15      bytes  digest of the configuration, and of the quantiser's levels where there is one
16-19     u32    M
20-23     f32    mean
24-27     f32    scale that the codes' levels are multiplied by; 1 for float32 values
28-       bits   M values, then M indices of ceil(log2(2 Nc Nt)) bits, each list packed most significant bit first and
                 filled up with zeros to whole bytes
last 4    u32    CRC-32 of everything before
========  =====  ===============================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from csimodels.models.bit_packing import pack_bits, packed_bytes, unpack_bits
from csimodels.models.llmcsinet import Codeword, LlmCsiNetConfig, codeword_scale
from csimodels.models.quantizer import LloydMax

_MAGIC = b"CSIF"
_VERSION = 1
_HEADER = struct.Struct("<4sBBH8sIff")
_CRC = struct.Struct("<I")
_KINDS = ("float32", "Lloyd-Max codes")


@dataclasses.dataclass(frozen=True)
class PayloadFormat:
    """What both ends of a report must agree on.

    Attributes:
        elements: positions an index can name, ``2 Nc Nt``.
        digest: eight bytes that tell configurations apart.
        quantizer: of the values; None sends them as float32. Its levels are those of values in units of the codeword's
            own root mean square, see :func:`relative_values`.
    """

    elements: int
    digest: bytes
    quantizer: LloydMax | None = None

    def __post_init__(self) -> None:
        if self.elements < 1:
            raise ValueError(f"elements: expected at least 1, got {self.elements}")
        if len(self.digest) != 8:
            raise ValueError(f"digest: expected 8 bytes, got {len(self.digest)}")

    @classmethod
    def of(cls, config: LlmCsiNetConfig, quantizer: LloydMax | None = None) -> PayloadFormat:
        """The format of a model's reports."""
        return cls(config.elements, config.digest(), quantizer)

    @property
    def index_bits(self) -> int:
        """ceil(log2(elements)): 11 for 2 x 32 x 32. (The paper's 10 would tell only half of these apart.)"""
        return (self.elements - 1).bit_length()

    @property
    def value_bits(self) -> int:
        """32, or the bits of one Lloyd-Max code."""
        return 32 if self.quantizer is None else self.quantizer.bits

    def report_bytes(self, m: int) -> int:
        """Bytes of a report of ``m`` elements."""
        packed = packed_bytes(m, self.value_bits) + packed_bytes(m, self.index_bits)
        return _HEADER.size + packed + _CRC.size

    def full_digest(self) -> bytes:
        """``digest``, mixed with the quantiser's levels where there is one: codes mean nothing under other levels."""
        if self.quantizer is None:
            return self.digest
        levels = self.quantizer.levels.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
        return hashlib.sha256(self.digest + levels).digest()[:8]


def relative_values(codeword: Codeword) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[B, M]`` in units of their root mean square, and that ``[B]``, float32: what a quantiser is fitted to.

    A codeword of zeros has scale 0.
    """
    values, scale = codeword.values.detach().float(), codeword_scale(codeword).float()
    return values / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None], scale


def quantized(codeword: Codeword, quantizer: LloydMax) -> Codeword:
    """The codeword as the BS sees it after a report with ``quantizer``."""
    relative, scale = relative_values(codeword)
    values = quantizer.decode(quantizer.encode(relative)) * scale[:, None]
    return Codeword(values, codeword.indices, codeword.mean.detach().float())


def pack(codeword: Codeword, form: PayloadFormat, lengths: torch.Tensor | None = None) -> list[bytes]:
    """One report per sample.

    Args:
        codeword: of ``LlmCsiNet.encode``.
        form: agreed with the BS.
        lengths: int64 ``[B]``, elements of each sample that are sent where these are not all M (the ``m`` that
            ``encode`` was given).

    Raises:
        ValueError: values or the mean are not finite (the sample is named), an index is no position, or ``lengths`` is
            out of range.
    """
    batch, most = codeword.values.shape
    if lengths is None:
        lengths = torch.full((batch,), most)
    if lengths.shape != (batch,) or (batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= most):
        raise ValueError(f"lengths: expected [{batch}] numbers of 1 to {most}, got {lengths.tolist()}")
    finite = codeword.values.isfinite().all(1) & codeword.mean.isfinite()
    if not bool(finite.all()):
        raise ValueError(f"codeword: expected finite numbers, sample {int((~finite).nonzero()[0])} has others")
    indices = codeword.indices.cpu().numpy()
    if indices.size and not 0 <= indices.min() <= indices.max() < form.elements:
        raise ValueError(f"codeword.indices: expected 0 to {form.elements - 1}, got {indices.min()} to {indices.max()}")
    mean = codeword.mean.detach().float().cpu().tolist()
    digest, reports = form.full_digest(), []
    for i, m in enumerate(lengths.tolist()):
        sample = Codeword(codeword.values[i : i + 1, :m], codeword.indices[i : i + 1, :m], codeword.mean[i : i + 1])
        kind, scale, values = _values_to_bytes(sample, form)
        header = _HEADER.pack(_MAGIC, _VERSION, kind, form.value_bits, digest, m, mean[i], scale)
        content = header + values + pack_bits(indices[i, :m], form.index_bits)
        reports.append(content + _CRC.pack(zlib.crc32(content)))
    return reports


def unpack(reports: bytes | Sequence[bytes], form: PayloadFormat) -> Codeword:
    """The codeword of one or more reports; bit for bit what was packed, or the levels of its codes.

    Where reports differ in M, the shorter ones repeat their first element as :class:`Codeword` says.

    Raises:
        ValueError: a report is truncated, corrupted, of something else, or of another configuration; the message says
            which report, what was expected and what was found.
    """
    if isinstance(reports, (bytes, bytearray, memoryview)):
        reports = [bytes(reports)]
    samples = [_unpack_one(bytes(report), form, f"report {i}") for i, report in enumerate(reports)]
    most = max((len(indices) for _, indices, _ in samples), default=0)
    values = np.zeros((len(samples), most), np.float32)
    positions = np.zeros((len(samples), most), np.int64)
    for i, (sample, indices, _) in enumerate(samples):
        values[i], positions[i] = sample[0], indices[0]
        values[i, : len(sample)], positions[i, : len(indices)] = sample, indices
    means = np.array([mean for *_, mean in samples], np.float32)
    return Codeword(torch.from_numpy(values), torch.from_numpy(positions), torch.from_numpy(means))


def _unpack_one(report: bytes, form: PayloadFormat, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    if report[:4] != _MAGIC[: len(report)] or not report:
        raise ValueError(f"{name}: expected a CSI report, which starts with {_MAGIC!r}, found {report[:4]!r}")
    if len(report) < _HEADER.size + _CRC.size:
        raise ValueError(f"{name}: truncated: expected at least {_HEADER.size + _CRC.size} bytes, found {len(report)}")
    _, version, kind, value_bits, digest, m, mean, scale = _HEADER.unpack_from(report)
    if version != _VERSION:
        raise ValueError(f"{name}: expected version {_VERSION}, found {version}")
    if zlib.crc32(report[: -_CRC.size]) != _CRC.unpack(report[-_CRC.size :])[0]:
        # A cut report has lost its checksum: its own length tells it from a corrupted one.
        whole = _HEADER.size + packed_bytes(m, value_bits) + packed_bytes(m, form.index_bits) + _CRC.size
        if len(report) != whole:
            raise ValueError(f"{name}: truncated or corrupted: expected {whole} bytes for M = {m}, found {len(report)}")
        stored, found = _CRC.unpack(report[-_CRC.size :])[0], zlib.crc32(report[: -_CRC.size])
        raise ValueError(f"{name}: corrupted: expected the checksum {stored:08x}, found {found:08x}")
    expected = _KINDS[0 if form.quantizer is None else 1], form.value_bits
    if kind >= len(_KINDS) or (_KINDS[kind], value_bits) != expected:
        found_kind = _KINDS[kind] if kind < len(_KINDS) else f"kind {kind}"
        raise ValueError(
            f"{name}: expected {expected[0]} of {expected[1]} bits, found {found_kind} of {value_bits} bits"
        )
    if digest != form.full_digest():
        raise ValueError(
            f"{name}: of another configuration: expected the digest {form.full_digest().hex()}, found {digest.hex()}"
        )
    if not 1 <= m <= form.elements or len(report) != form.report_bytes(m):
        raise ValueError(
            f"{name}: expected M of 1 to {form.elements} and its {form.report_bytes(m)} bytes, found M = {m} and "
            f"{len(report)} bytes"
        )
    middle = _HEADER.size + packed_bytes(m, value_bits)
    values = _values_from_bytes(report[_HEADER.size : middle], m, scale, form)
    indices = unpack_bits(report[middle : -_CRC.size], m, form.index_bits)
    if indices.max() >= form.elements:
        raise ValueError(f"{name}: expected indices of 0 to {form.elements - 1}, found {indices.max()}")
    return values, indices, mean


def _values_to_bytes(sample: Codeword, form: PayloadFormat) -> tuple[int, float, bytes]:
    """Kind, scale and packed values of one sample."""
    if form.quantizer is None:
        return 0, 1.0, sample.values[0].detach().cpu().numpy().astype("<f4").tobytes()
    relative, scale = relative_values(sample)
    codes = form.quantizer.encode(relative[0]).cpu().numpy().astype(np.int64)
    return 1, float(scale), pack_bits(codes, form.value_bits)


def _values_from_bytes(content: bytes, m: int, scale: float, form: PayloadFormat) -> np.ndarray:
    if form.quantizer is None:
        return np.frombuffer(content, "<f4")
    codes = torch.from_numpy(unpack_bits(content, m, form.value_bits))
    return (form.quantizer.decode(codes.to(form.quantizer.levels.device)).cpu() * scale).numpy()
