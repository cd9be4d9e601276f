"""Unsigned numbers as a run of bits: most significant bit first, filled up with zeros to whole bytes."""

from __future__ import annotations

import numpy as np


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """int64 ``[count]``, each in 0..2^bits - 1, in :func:`packed_bytes`."""
    places = np.arange(bits - 1, -1, -1)
    return np.packbits(((numbers[:, None] >> places) & 1).astype(np.uint8)).tobytes()


def unpack_bits(content: bytes, count: int, bits: int) -> np.ndarray:
    """int64 ``[count]`` of what :func:`pack_bits` packed."""
    places = np.unpackbits(np.frombuffer(content, np.uint8), count=count * bits).reshape(count, bits)
    return places.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
