"""Variables of MAT-files: those of version 5 and 7 are read by SciPy, those of version 7.3, which are HDF5, by h5py."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import scipy.io

_V73 = b"MATLAB 7.3 MAT-file"
_V5 = b"MATLAB 5.0 MAT-file"


def read_variable(path: Path, name: str) -> np.ndarray:
    """One numeric variable, its dimensions in MATLAB's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no MAT-file, has no such variable (names what it has), or the
            variable is not numeric or empty.
    """
    names, values = _load(path, name)
    if values is None:
        raise ValueError(f"{path}: expected a variable {name}, got {', '.join(sorted(names)) or 'none'}")
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiuc" or values.size == 0:
        raise ValueError(f"{path}: {name}: expected a numeric array that is not empty")
    return values


def variable_names(path: Path) -> list[str]:
    """Names of all variables; raises what :func:`read_variable` raises of the file."""
    return _load(path, None)[0]


def _load(path: Path, name: str | None) -> tuple[list[str], np.ndarray | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    with path.open("rb") as file:
        header = file.read(len(_V5))
    if header not in (_V5, _V73):
        raise ValueError(f"{path}: not a MAT-file of version 5, 7 or 7.3")
    try:
        return _load_v73(path, name) if header == _V73 else _load_v5(path, name)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # SciPy raises whatever the broken bytes lead it to
        raise ValueError(f"{path}: truncated or damaged ({type(error).__name__}: {error})") from None


def _load_v5(path: Path, name: str | None) -> tuple[list[str], np.ndarray | None]:
    names = [entry[0] for entry in scipy.io.whosmat(path)]
    return names, scipy.io.loadmat(path, variable_names=[name])[name] if name in names else None


def _load_v73(path: Path, name: str | None) -> tuple[list[str], np.ndarray | None]:
    with h5py.File(path, "r") as file:
        names = [key for key in file if not key.startswith("#")]
        if name is None or not isinstance(file.get(name), h5py.Dataset):
            return names, None
        stored = file[name][()]
    if stored.dtype.names == ("real", "imag"):
        stored = stored["real"] + 1j * stored["imag"]
    # HDF5 lists the dimensions of MATLAB's column-major arrays backwards.
    return names, stored.T
