"""Named arrays in files of other tools' formats, by ending: ``.mat``, ``.npz`` and ``.safetensors``.

Safetensors got complex numbers late: there they are written as float32 ``[..., 2]``, and read as either.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csimodels.channels.matfile import read_variable, variable_names
from csimodels.files import atomic_path, save_tensors

ENDINGS = (".mat", ".npz", ".safetensors")


def check_ending(path: str | os.PathLike) -> str:
    """The ending of ``path``, one of :data:`ENDINGS`; another is a ``ValueError``."""
    ending = Path(path).suffix
    if ending not in ENDINGS:
        raise ValueError(f"{path}: expected a file name that ends in one of {', '.join(ENDINGS)}")
    return ending


def array_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, damaged or of another kind than its ending says.
    """
    path, ending = Path(path), check_ending(path)
    if ending == ".mat":
        return variable_names(path)
    if ending == ".npz":
        with _npz(path) as file:
            return list(file.files)
    with _safetensors(path) as file:
        return list(file.keys())


def read_array(path: str | os.PathLike, name: str) -> Tensor:
    """One array, as it is stored.

    Raises:
        FileNotFoundError, ValueError: as :func:`array_names`, or it has no numeric array of that name.
    """
    path, ending = Path(path), check_ending(path)
    if ending == ".mat":
        return torch.from_numpy(np.ascontiguousarray(read_variable(path, name)))
    if ending == ".npz":
        with _npz(path) as file:
            names = list(file.files)
            values = file[name] if name in names else None
        if values is None:
            raise _missing(path, name, names)
        if values.dtype.kind not in "fiuc":
            raise ValueError(f"{path}: {name}: expected a numeric array, got {values.dtype}")
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    with _safetensors(path) as file:
        names = list(file.keys())
        if name in names:
            return file.get_tensor(name).clone()
    raise _missing(path, name, names)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Metadata of a safetensors file; empty of the other kinds, which have none."""
    path = Path(path)
    if check_ending(path) != ".safetensors":
        return {}
    with _safetensors(path) as file:
        return file.metadata() or {}


def as_complex(values: Tensor, ranks: Collection[int]) -> Tensor:
    """Float32 ``[..., 2]`` as the complex array of one of ``ranks`` that it stands for; everything else as it is."""
    if values.dtype == torch.float32 and values.ndim - 1 in ranks and values.shape[-1] == 2:
        return torch.view_as_complex(values.contiguous())
    return values


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write arrays as a file of the kind that its ending says.

    Args:
        path: of the file, which appears when it is complete.
        arrays: by name.
        metadata: JSON-serialisable, for safetensors; the other kinds have no place for them.

    Raises:
        ValueError: another ending. OSError: the file could not be written; an old one stays.
    """
    ending = check_ending(path)
    if ending == ".safetensors":
        stored = {
            name: torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
            for name, values in arrays.items()
        }
        save_tensors(path, stored, metadata)
        return
    plain = {name: values.detach().cpu().resolve_conj().numpy() for name, values in arrays.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if ending == ".mat":
            scipy.io.savemat(file, plain)
        else:
            np.savez(file, **plain)  # type: ignore[arg-type]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")


def _missing(path: Path, name: str, names: Collection[str]) -> ValueError:
    return ValueError(f"{path}: expected a variable {name}, got {', '.join(sorted(names)) or 'none'}")


@contextmanager
def _npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    _check_file(path)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single .npy array")
        with file:
            yield file
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable .npz file of plain arrays ({error})") from None


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
