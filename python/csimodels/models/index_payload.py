"""Codeword indices as the bytes of a feedback stream: B bits a report, several reports in one stream.

========  =====  ===============================================================================================
bytes     field  content (little-endian)
========  =====  ===============================================================================================
0-3       magic  ``CSII``
4         u8     version of this layout, 1
5         u8     B, bits of an index, 1 to 20
6-7       u16    reports per sample: the subcarriers (or subbands) of one channel, 1 for a narrowband one
8-15      bytes  digest of the codebook that was searched, the UE's
16-19     u32    number of reports
20-       bits   the indices, each most significant bit first, filled up with zeros to whole bytes
last 4    u32    CRC-32 of everything before
========  =====  ===============================================================================================

Over the air a report is its B bits alone; the rest is what a file or a packet needs to be told from another.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

import torch
from torch import Tensor

from csimodels.models.bit_packing import pack_bits, packed_bytes, unpack_bits
from csimodels.models.codebooks import check_bits

_MAGIC = b"CSII"
_VERSION = 1
_HEADER = struct.Struct("<4sBBH8sI")
_CRC = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class IndexFormat:
    """What both ends of a stream must agree on: ``bits`` of an index (B), eight bytes of the codebook's ``digest``."""

    bits: int
    digest: bytes

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if len(self.digest) != 8:
            raise ValueError(f"digest: expected 8 bytes, got {len(self.digest)}")

    def stream_bytes(self, count: int) -> int:
        """Bytes of a stream of ``count`` reports."""
        return _HEADER.size + packed_bytes(count, self.bits) + _CRC.size


@dataclasses.dataclass(frozen=True)
class IndexStream:
    """``indices`` int64 ``[count]``; ``per_sample`` of them belong to one channel, in the order of its subcarriers."""

    indices: Tensor
    per_sample: int = 1


def pack_indices(stream: IndexStream, form: IndexFormat) -> bytes:
    """The bytes of a stream.

    Raises:
        TypeError: the indices are not int64.
        ValueError: an index outside 0..2^B - 1, or a number of reports that ``per_sample`` does not divide.
    """
    indices, per_sample = stream.indices, stream.per_sample
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise TypeError(f"indices: expected int64 [count], got {indices.dtype} {tuple(indices.shape)}")
    outside = (indices < 0) | (indices >= 2**form.bits)
    if bool(outside.any()):
        first = int(outside.nonzero()[0, 0])
        raise ValueError(f"indices: expected 0 to {2**form.bits - 1}, got {int(indices[first])} for report {first}")
    if not 1 <= per_sample < 2**16 or len(indices) % per_sample:
        raise ValueError(
            f"per_sample: expected 1 to {2**16 - 1}, a divisor of the {len(indices)} reports, got {per_sample}"
        )
    header = _HEADER.pack(_MAGIC, _VERSION, form.bits, per_sample, form.digest, len(indices))
    content = header + pack_bits(indices.cpu().numpy(), form.bits)
    return content + _CRC.pack(zlib.crc32(content))


def unpack_indices(content: bytes, form: IndexFormat) -> IndexStream:
    """The indices of a stream, bit for bit what was packed.

    Raises:
        ValueError: the stream is truncated, corrupted, something else, or of another codebook; the message says what
            was expected and what was found.
    """
    if content[:4] != _MAGIC[: len(content)] or not content:
        raise ValueError(f"stream: expected codeword indices, which start with {_MAGIC!r}, found {content[:4]!r}")
    least = _HEADER.size + _CRC.size
    if len(content) < least:
        raise ValueError(f"stream: truncated: expected at least {least} bytes, found {len(content)}")
    _, version, bits, per_sample, digest, count = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise ValueError(f"stream: expected version {_VERSION}, found {version}")
    stored, found = _CRC.unpack(content[-_CRC.size :])[0], zlib.crc32(content[: -_CRC.size])
    whole = _HEADER.size + packed_bytes(count, bits) + _CRC.size
    if stored != found:
        # A cut stream has lost its checksum: its own length tells it from a corrupted one.
        if len(content) != whole:
            raise ValueError(
                f"stream: truncated or corrupted: expected {whole} bytes for {count} reports of {bits} bits, found "
                f"{len(content)}"
            )
        raise ValueError(f"stream: corrupted: expected the checksum {stored:08x}, found {found:08x}")
    if digest != form.digest:
        raise ValueError(f"stream: of another codebook: expected the digest {form.digest.hex()}, found {digest.hex()}")
    if bits != form.bits or len(content) != whole or not per_sample or count % per_sample:
        raise ValueError(
            f"stream: expected reports of {form.bits} bits, whole samples, in their {form.stream_bytes(count)} bytes, "
            f"found {count} of {bits} bits, {per_sample} to a sample, in {len(content)}"
        )
    indices = unpack_bits(content[_HEADER.size : -_CRC.size], count, bits)
    return IndexStream(torch.from_numpy(indices), per_sample)
