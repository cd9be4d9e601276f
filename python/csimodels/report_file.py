"""Feedback reports of many samples in one file, with what the BS must know to put the channels back in place.

=========  =======================================================================
bytes      content (little-endian)
=========  =======================================================================
0-7        magic ``CSIFILE`` and a zero
8-15       u32 version of this layout, u32 length of the description
then       description, JSON: ``samples``, ``report_bytes``, ``values``, ``layout``
4          u32 CRC-32 of the description
then       the reports (:mod:`csimodels.models.payload`), each of ``report_bytes``
=========  =======================================================================
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csimodels.channels.csi_file import CsiLayout
from csimodels.files import atomic_path

VALUES = ("float32", "codes")
_MAGIC, _VERSION = b"CSIFILE\0", 1
_HEADER, _CRC = struct.Struct("<8sII"), struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class ReportFile:
    """``reports``, one per sample; ``values``: ``"float32"`` or ``"codes"`` (Lloyd-Max); ``layout`` of the channels."""

    reports: list[bytes]
    values: str
    layout: CsiLayout


def write_reports(
    path: str | os.PathLike, reports: Iterable[bytes], samples: int, values: str, layout: CsiLayout
) -> int:
    """Write ``samples`` reports of one length, as they come; returns the bytes of one.

    Raises:
        ValueError: no reports, another number of them than ``samples``, or of several lengths; an old file stays.
        OSError: the file could not be written.
    """
    length, count = None, 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for report in reports:
            if length is None:
                length = len(report)
                description = {
                    "samples": samples,
                    "report_bytes": length,
                    "values": values,
                    "layout": dataclasses.asdict(layout),
                }
                text = json.dumps(description).encode()
                file.write(_HEADER.pack(_MAGIC, _VERSION, len(text)) + text + _CRC.pack(zlib.crc32(text)))
            if len(report) != length:
                raise ValueError(f"reports: expected {length} bytes each, got {len(report)} for report {count}")
            file.write(report)
            count += 1
        if length is None or count != samples:
            raise ValueError(f"reports: expected {samples}, at least one, got {count}")
    return length


def read_reports(path: str | os.PathLike) -> ReportFile:
    """Read what :func:`write_reports` wrote. The reports themselves are checked when they are unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, damaged or no report file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: the file is empty")
    if content[: len(_MAGIC)] != _MAGIC[: len(content)]:
        raise ValueError(f"{path}: not a file of feedback reports (it does not start with {_MAGIC!r})")
    try:
        _, version, length = _HEADER.unpack_from(content)
        text = content[_HEADER.size : _HEADER.size + length]
        (checksum,) = _CRC.unpack_from(content, _HEADER.size + length)
    except struct.error:
        raise ValueError(f"{path}: truncated within its description, after {len(content)} bytes") from None
    if version != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION} of the file, got {version}")
    if zlib.crc32(text) != checksum:
        raise ValueError(f"{path}: damaged: the description's checksum is {zlib.crc32(text):08x}, not {checksum:08x}")
    return _parsed(path, json.loads(text), content[_HEADER.size + length + _CRC.size :])


def _parsed(path: Path, description: dict[str, Any], body: bytes) -> ReportFile:
    try:
        samples, size, values = (description[name] for name in ("samples", "report_bytes", "values"))
        layout = CsiLayout(**description["layout"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description is not readable ({error})") from None
    if values not in VALUES:
        raise ValueError(f"{path}: expected values {' or '.join(VALUES)}, got {values!r}")
    if len(body) != samples * size:
        raise ValueError(
            f"{path}: truncated or damaged: expected {samples} reports of {size} bytes, {samples * size} bytes, found "
            f"{len(body)}"
        )
    return ReportFile([body[place * size : (place + 1) * size] for place in range(samples)], values, layout)
