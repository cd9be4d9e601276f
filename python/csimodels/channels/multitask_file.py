"""What the commands of the multi-task PHY network read and write: ``.safetensors``, ``.npz`` or ``.mat``.

A file holds some of these arrays, by these names (complex64, or float32 where "real" is said; double precision is read
as such):

===============  =====================================================  =====================================
``history``      ``[sample, (antenna,) history slot, subcarrier]``      channels of the last T1 slots
``future``       ``[sample, (antenna,) future slot, subcarrier]``       channels of the next T2 slots
``speed_kmh``    ``[sample]``, real                                     of the UE, km/h
``channels``     ``[sample, antenna, user]``                            H of one subcarrier
``received``     ``[sample, slot, antenna]``                            y = H x + n
``noise_power``  ``[sample]``, real                                     E|n|^2 at one antenna, linear
``precoder``     ``[sample, antenna, user]``                            columns w_k, sqrt(W)
``symbols``      ``[sample, slot, user]``                               x or its estimate, unit average power
===============  =====================================================  =====================================

Axes of one name have one size in a file. Channels have no unit: they are ratios of amplitudes. A safetensors file also
carries metadata in JSON: ``format``, ``version`` (of csimodels), ``axes``, ``units`` and ``parameters`` (how the arrays
were made: carrier in Hz, slot in seconds and the like); the other kinds have no place for them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csimodels import __version__
from csimodels.channels.array_file import (
    array_names,
    as_complex,
    check_ending,
    read_array,
    read_metadata,
    write_arrays,
)

_FORMAT = "csimodels.multitask"


@dataclasses.dataclass(frozen=True)
class _Array:
    axes: tuple[tuple[str, ...], ...]  # without and with the optional ones
    unit: str
    real: bool = False
    positive: bool = False

    def named(self, rank: int) -> tuple[str, ...]:
        """The axes of an array of that rank; none if there is none of it."""
        return next((axes for axes in self.axes if len(axes) == rank), ())


_ARRAYS = {
    "history": _Array(
        (("sample", "history slot", "subcarrier"), ("sample", "antenna", "history slot", "subcarrier")), "1"
    ),
    "future": _Array(
        (("sample", "future slot", "subcarrier"), ("sample", "antenna", "future slot", "subcarrier")), "1"
    ),
    "speed_kmh": _Array((("sample",),), "km/h", real=True),
    "channels": _Array((("sample", "antenna", "user"),), "1"),
    "received": _Array((("sample", "slot", "antenna"),), "sqrt(W)"),
    "noise_power": _Array((("sample",),), "W", real=True, positive=True),
    "precoder": _Array((("sample", "antenna", "user"),), "sqrt(W)"),
    "symbols": _Array((("sample", "slot", "user"),), "1"),
}
ARRAYS = tuple(_ARRAYS)


@dataclasses.dataclass(frozen=True)
class MultiTaskFile:
    """Arrays of a file.

    Attributes:
        arrays: by name, complex64 or float32.
        parameters: how they were made; empty where the file does not say.
    """

    arrays: dict[str, Tensor]
    parameters: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        """The array of that name; a ``KeyError`` if it was not asked for or the file has it not."""
        return self.arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays


def write_multitask(
    path: str | os.PathLike, arrays: Mapping[str, Tensor], parameters: Mapping[str, Any] | None = None
) -> None:
    """Write arrays as a file of the kind that its ending says.

    Args:
        path: of the file, which appears when it is complete.
        arrays: by name, of the shapes above, on any device.
        parameters: how they were made, JSON-serialisable.

    Raises:
        ValueError: another ending, no array, an unknown one, or one of another kind, shape or size; or with numbers
            that are not finite.
        OSError: it could not be written; an old file stays.
    """
    check_ending(path)
    if not arrays:
        raise ValueError(f"arrays: expected at least one of {', '.join(ARRAYS)}, got none")
    _check_names("arrays", arrays)
    kept = {name: _checked(name, values, name) for name, values in arrays.items()}
    _check_sizes("", kept, {})
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "axes": {name: list(_ARRAYS[name].named(values.ndim)) for name, values in kept.items()},
        "units": {name: _ARRAYS[name].unit for name in kept},
        "parameters": dict(parameters or {}),
    }
    write_arrays(path, kept, metadata)


def read_multitask(
    path: str | os.PathLike,
    required: Iterable[str],
    *,
    optional: Iterable[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> MultiTaskFile:
    """Read some arrays of a file.

    Args:
        path: of the file, read by its ending. It need not be of csimodels: the arrays alone are enough.
        required: names of arrays that it must have. optional: that it may have.
        sizes: what an axis must be, by its name above, such as ``{"antenna": 128, "history slot": 16}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending or an unknown name; or the file is empty, cut or of another kind, lacks an array
            (what it has is named), or has one of another kind, shape or size, or with numbers that are not finite. The
            message is one line and names the file.
    """
    path, required, optional = Path(path), tuple(required), tuple(optional)
    _check_names("required", required)
    _check_names("optional", optional)
    there = array_names(path)
    for name in required:
        if name not in there:
            raise ValueError(f"{path}: expected an array {name}, got {', '.join(sorted(there)) or 'none'}")
    wanted = dict.fromkeys([*required, *(name for name in optional if name in there)])
    arrays = {name: _checked(name, _stored(path, name), f"{path}: {name}") for name in wanted}
    _check_sizes(f"{path}: ", arrays, sizes or {})
    metadata = read_metadata(path)
    # What other tools write there is their own.
    own = metadata.get("format") == json.dumps(_FORMAT)
    return MultiTaskFile(arrays, json.loads(metadata["parameters"]) if own else {})


def _stored(path: Path, name: str) -> Tensor:
    kind, values = _ARRAYS[name], read_array(path, name)
    if kind.real:
        # MATLAB has no arrays of one dimension.
        return values.flatten() if path.suffix == ".mat" else values
    ranks = [len(axes) for axes in kind.axes]
    # MATLAB drops last dimensions of 1; where the rank is open it cannot be told.
    if path.suffix == ".mat" and len(ranks) == 1:
        values = values.reshape(*values.shape, *(1,) * (ranks[0] - values.ndim))
    return as_complex(values, ranks)


def _check_names(argument: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in _ARRAYS:
            raise ValueError(f"{argument}: expected some of {', '.join(ARRAYS)}, got {name!r}")


def _checked(name: str, values: Tensor, where: str) -> Tensor:
    """``values`` as complex64 or float32."""
    kind = _ARRAYS[name]
    found = f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
    axes = " or ".join(f"[{', '.join(axes)}]" for axes in kind.axes)
    fits = not values.is_complex() if kind.real else values.is_complex()
    if not fits or not kind.named(values.ndim) or not values.numel() or values.dtype == torch.bool:
        raise ValueError(f"{where}: expected {'real' if kind.real else 'complex'} {axes}, not empty, got {found}")
    values = values.detach().to(torch.float32 if kind.real else torch.complex64)
    bad = ~torch.isfinite(values).flatten(1).all(1) if values.ndim > 1 else ~torch.isfinite(values)
    if kind.positive:
        bad |= ~(values > 0)
    if bad.any():
        what = "positive and finite" if kind.positive else "finite"
        raise ValueError(
            f"{where}: expected {what} numbers, got others in {int(bad.sum())} of {len(bad)} samples, the first is "
            f"sample {int(bad.nonzero()[0])}"
        )
    return values


def _check_sizes(where: str, arrays: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    known = {axis: (size, "this model") for axis, size in sizes.items()}
    for name, values in arrays.items():
        for axis, size in zip(_ARRAYS[name].named(values.ndim), values.shape, strict=True):
            expected, source = known.setdefault(axis, (size, name))
            if size != expected:
                raise ValueError(f"{where}{name}: expected {expected} of axis {axis}, as {source} has, got {size}")
