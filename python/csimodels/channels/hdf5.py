"""The project's own channel files: HDF5, written as a stream, read in parts, and either whole or not there.

Layout, version 1:

- ``/h``: complex ``[sample, antenna, subcarrier]``, in chunks of at most 256 samples and about 1 MiB, each with a
  Fletcher-32 checksum. A complex number is a compound of two 32-bit floats named ``r`` and ``i``: h5py reads it as
  ``complex64``, MATLAB's ``h5read`` as a struct with these fields (``complex(h.r, h.i)``, its dimensions in reverse).
  HDF5's own complex type, which came with HDF5 2.0, would shut out everything built on an older library.
- ``/environment``: int64 ``[sample]``, number of the environment; ``/los``: uint8 ``[sample]``, 1 in line of sight.
- Attributes of the root: ``format`` (``"csimodels channels"``), ``format_version``, ``csimodels_version``,
  ``generator``, ``parameters`` (JSON) and ``seed``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import csimodels
from csimodels.channels._disk import Disk
from csimodels.files import atomic_path

FORMAT, FORMAT_VERSION = "csimodels channels", 1
_CHUNK_SAMPLES, _CHUNK_BYTES = 256, 2**20
_CACHE_BYTES = 8 * _CHUNK_BYTES


class ChannelWriter:
    """Appends to a file that :func:`write_channels` opened."""

    def __init__(self, file: h5py.File, disk: Disk, antennas: int, subcarriers: int):
        self._disk = disk
        rows = max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // (antennas * subcarriers * 8)))
        options = {"maxshape": (None,), "chunks": (8192,), "fletcher32": True}
        self._h = file.create_dataset(
            "h",
            shape=(0, antennas, subcarriers),
            maxshape=(None, antennas, subcarriers),
            chunks=(rows, antennas, subcarriers),
            dtype=np.complex64,
            fletcher32=True,
        )
        self._environment = file.create_dataset("environment", shape=(0,), dtype=np.int64, **options)
        self._los = file.create_dataset("los", shape=(0,), dtype=np.uint8, **options)

    def __len__(self) -> int:
        return self._h.shape[0]

    def append(
        self, h: torch.Tensor, *, environment: int | Sequence[int] | np.ndarray, los: bool | Sequence[bool] | np.ndarray
    ) -> None:
        """Add samples at the end.

        Args:
            h: complex64 ``[sample, antenna, subcarrier]``, on any device.
            environment: its number, or one per sample.
            los: whether it is in line of sight, or one per sample.

        Raises:
            TypeError: ``h`` is not complex64.
            ValueError: a shape that does not fit the file, or samples that are not finite, with the first one's index
                in ``h``.
            OSError: it could not be written.
        """
        shape = tuple(self._h.shape[1:])
        if h.dtype != torch.complex64:
            raise TypeError(f"h: expected complex64, got {h.dtype}")
        if h.ndim != 3 or tuple(h.shape[1:]) != shape:
            raise ValueError(f"h: expected [sample, {shape[0]}, {shape[1]}], got {tuple(h.shape)}")
        bad = _not_finite(h)
        if len(bad):
            raise ValueError(f"h: expected finite samples, got {len(bad)} others, the first at index {bad[0]}")
        columns = {}
        for name, value, dtype in (("environment", environment, np.int64), ("los", los, np.uint8)):
            column = np.asarray(value)
            if column.shape not in ((), (len(h),)):
                raise ValueError(f"{name}: expected one value or {len(h)}, got shape {column.shape}")
            columns[name] = np.broadcast_to(column.astype(dtype), (len(h),))
        start, stop = len(self), len(self) + len(h)
        for dataset, values in (
            (self._h, h.detach().cpu().numpy()),
            (self._environment, columns["environment"]),
            (self._los, columns["los"]),
        ):
            dataset.resize(stop, axis=0)
            dataset[start:stop] = values
        self._disk.raise_failure()


@contextlib.contextmanager
def write_channels(
    path: str | os.PathLike,
    *,
    antennas: int,
    subcarriers: int,
    generator: str,
    parameters: dict[str, Any],
    seed: int,
) -> Iterator[ChannelWriter]:
    """Write a channel file; use as ``with write_channels(...) as writer: writer.append(...)``.

    The samples go to a temporary file beside ``path``, which takes its place when the block ends. Whatever ends it
    early (an exception, a kill, a full disk) leaves the old file, or none.

    Args:
        path: of the file; folders are made.
        antennas, subcarriers: of every sample.
        generator: what made the channels. parameters: its settings, JSON-serialisable. seed: its seed.

    Raises:
        ValueError: a size below 1, parameters that JSON cannot hold, or no samples at the end.
        OSError: it could not be written.
    """
    for name, value in (("antennas", antennas), ("subcarriers", subcarriers)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    try:
        described = json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameters: expected values that JSON can hold ({error})") from None
    with atomic_path(path) as temporary, temporary.open("w+b", buffering=0) as raw:
        disk = Disk(raw, Path(path))
        with h5py.File(disk, "w", rdcc_nbytes=_CACHE_BYTES) as file:
            file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
            file.attrs["csimodels_version"] = csimodels.__version__
            file.attrs["generator"], file.attrs["parameters"], file.attrs["seed"] = generator, described, seed
            writer = ChannelWriter(file, disk, antennas, subcarriers)
            yield writer
            if not len(writer):
                raise ValueError(f"{path}: expected at least one sample, got none; no file was written")
        disk.raise_failure()


class ChannelReader:
    """A channel file, open for reading; samples stay on disk until they are asked for.

    Attributes:
        path: of the file.
        antennas, subcarriers: of every sample.
        environment: int64 ``[sample]``. los: bool ``[sample]``.
        generator, parameters, seed, version: what made it, its settings, its seed, and the version of csimodels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, or no channel file of this project.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> None:
        attributes = self._file.attrs
        if attributes.get("format") != FORMAT:
            raise ValueError(f"{self.path}: an HDF5 file, but not a channel file of csimodels (no attribute format)")
        if attributes.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path}: expected format version {FORMAT_VERSION}, got {attributes.get('format_version')}"
            )
        expected = {"h": (np.complex64, 3), "environment": (np.int64, 1), "los": (np.uint8, 1)}
        for name, (dtype, rank) in expected.items():
            found = self._file.get(name)
            if not isinstance(found, h5py.Dataset) or found.dtype != dtype or found.ndim != rank:
                described = (
                    f"{found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else "nothing of that name"
                )
                raise ValueError(f"{self.path}: /{name}: expected {np.dtype(dtype)} of rank {rank}, got {described}")
        self._h = self._file["h"]
        lengths = {name: len(self._file[name]) for name in expected}
        if len(set(lengths.values())) != 1 or 0 in self._h.shape:
            raise ValueError(f"{self.path}: expected datasets of one length that is not 0, got {lengths}")
        self.antennas, self.subcarriers = self._h.shape[1:]
        with self._readable():
            self.environment = self._file["environment"][:]
            self.los = self._file["los"][:].astype(bool)
        try:
            self.generator, self.seed = str(attributes["generator"]), int(attributes["seed"])
            self.version, self.parameters = str(attributes["csimodels_version"]), json.loads(attributes["parameters"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.path}: the description of what made it is not readable ({error})") from None

    def __len__(self) -> int:
        return self._h.shape[0]

    def read(self, selection: slice | Sequence[int] | np.ndarray | torch.Tensor = slice(None)) -> torch.Tensor:
        """Some samples, in the order asked for.

        Args:
            selection: a slice; integer indices (negative ones count from the end); or a mask, bool ``[sample]``.

        Returns:
            complex64 ``[selected, antenna, subcarrier]``.

        Raises:
            IndexError: an index outside the file, or a mask of another length.
            ValueError: samples that are not finite, with their number and the first one's index in the file, or a part
                of the file that is damaged.
        """
        indices = self._indices(selection)
        h = np.empty((len(indices), self.antennas, self.subcarriers), dtype=np.complex64)
        order = np.argsort(indices, kind="stable")
        # One read per chunk: HDF5 handles a whole chunk for every sample of it that is asked for.
        chunk = indices[order] // self._h.chunks[0] if self._h.chunks else np.zeros(len(order), dtype=np.int64)
        with self._readable():
            for members in np.split(order, np.flatnonzero(np.diff(chunk)) + 1) if len(order) else []:
                first, last = indices[members[0]], indices[members[-1]]
                h[members] = self._h[first : last + 1][indices[members] - first]
        samples = torch.from_numpy(h)
        bad = _not_finite(samples)
        if len(bad):
            raise ValueError(
                f"{self.path}: {len(bad)} of {len(indices)} samples are not finite, the first is sample "
                f"{indices[bad].min()}"
            )
        return samples

    def blocks(self, size: int = 4096) -> Iterator[torch.Tensor]:
        """All samples in order, at most ``size`` at a time; raises what :meth:`read` raises."""
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))

    def check(self) -> None:
        """Read everything once.

        Raises:
            ValueError: the file is damaged, or holds samples that are not finite: how many, and the first one's index.
        """
        bad: list[int] = []
        for start in range(0, len(self), 4096):
            with self._readable():
                block = torch.from_numpy(self._h[start : start + 4096])
            bad.extend((start + _not_finite(block)).tolist())
        if bad:
            raise ValueError(f"{self.path}: {len(bad)} of {len(self)} samples are not finite, the first is {bad[0]}")

    def _indices(self, selection: slice | Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        if isinstance(selection, slice):
            return np.arange(len(self))[selection]
        wanted = np.asarray(selection)
        if wanted.dtype == bool:
            if wanted.shape != (len(self),):
                raise IndexError(f"selection: expected a mask of {len(self)} samples, got shape {wanted.shape}")
            return np.flatnonzero(wanted)
        if wanted.size == 0:
            return np.empty(0, dtype=np.int64)
        if wanted.ndim != 1 or not np.issubdtype(wanted.dtype, np.integer):
            raise IndexError(f"selection: expected a slice or 1-D indices, got {wanted.dtype} of shape {wanted.shape}")
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"selection: expected indices below {len(self)}, got {wanted[outside][0]}")
        return np.where(wanted < 0, wanted + len(self), wanted).astype(np.int64)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"{self.path}: damaged, a part cannot be read ({error})") from None

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._file.close()

    def __enter__(self) -> ChannelReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES)
    except PermissionError:
        raise
    except OSError as error:
        known = "truncated or damaged" if h5py.is_hdf5(path) else "not an HDF5 file"
        raise ValueError(f"{path}: {known} ({error})") from None


def _not_finite(h: torch.Tensor) -> np.ndarray:
    """Indices of the samples of complex ``h`` that hold a NaN or an infinity."""
    parts = torch.view_as_real(h).flatten(1)
    # A sum is a hundred times quicker than looking at every number; only if it is not finite is there anything to find.
    if torch.isfinite(parts.sum(dtype=torch.float64)):
        return np.empty(0, dtype=np.int64)
    return (~torch.isfinite(parts)).any(1).nonzero().flatten().cpu().numpy()
