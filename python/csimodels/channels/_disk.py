"""A file object under HDF5 that survives a full disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class Disk(io.RawIOBase):
    """Remembers the first failure to write, and from then on only pretends to.

    HDF5 cannot close a file that it cannot write: the process dies of a segmentation fault when it tries (seen with
    version 2.0). So it is told that all went well, and :meth:`raise_failure` tells the caller what happened.

    Args:
        raw: unbuffered file, open for reading and writing.
        path: what the file will be called, for the message.
    """

    def __init__(self, raw: io.FileIO, path: Path):
        super().__init__()
        self._raw, self._path = raw, path
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        """All of ``data``; where that fails, nothing."""
        rest = memoryview(data)
        try:
            while self._failure is None and len(rest):
                rest = rest[self._raw.write(rest) :]
        except OSError as error:
            self._failure = error
        return len(data)

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, with zeros beyond the end, where a write may have been swallowed."""
        view = memoryview(buffer)
        count = self._raw.readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file; where that fails, nothing."""
        length = self.tell() if size is None else size
        try:
            if self._failure is None:
                self._raw.truncate(length)
        except OSError as error:
            self._failure = error
        return length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._raw.tell()

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def raise_failure(self) -> None:
        """Raise the first failure as an ``OSError`` that names the path, if there was one."""
        if self._failure is not None:
            raise OSError(self._failure.errno, f"{self._failure.strerror}; nothing was changed", str(self._path))
