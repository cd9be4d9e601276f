"""Reader of the COST 2100 files that CsiNet made common (``DATA_Htrainin.mat``, ``DATA_HtestFin_all.mat`` and others).

- ``HT``: angle-delay channels of 32 angles and the first 32 delays, stored as ``[N, 2048]``: real parts, then imaginary
  parts, each ``[32 angle, 32 delay]`` in row-major order. The whole data set was scaled by one number to lie within
  [0, 1], with 0.5 for zero; that number is not in the files.
- ``HF_all``: the same test channels before the delays were cut, in the frequency domain: complex ``[N, 4000]``, that is
  ``[32 angle, 125 subcarrier]``. An angle-delay channel padded to 257 delays and transformed gives its first 125 bins
  (:func:`csimodels.evaluation.metrics.delay_to_frequency`).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from csimodels.channels.matfile import read_variable

ANGLES, DELAYS, SUBCARRIERS = 32, 32, 125
_ROUNDING = 1e-6  # of a float32 at 1, with room for a data set that was scaled in float32


def read_angle_delay(path: str | os.PathLike) -> torch.Tensor:
    """The variable ``HT``.

    Args:
        path: of a MAT-file of version 5, 7 or 7.3.

    Returns:
        float32 ``[N, 2, 32 angle, 32 delay]``, real and imaginary part, between 0 and 1 with 0.5 for zero;
        :func:`to_complex` makes channels of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no MAT-file; it has no ``HT`` (names what it has); ``HT`` has
            another shape or type; samples are not finite or outside [0, 1] (how many, and the first one's index).
    """
    values = read_variable(Path(path), "HT")
    size = 2 * ANGLES * DELAYS
    if np.iscomplexobj(values) or values.ndim < 2 or values.shape[1:] not in ((size,), (2, ANGLES, DELAYS)):
        raise ValueError(f"{path}: HT: expected real [N, {size}], got {values.dtype} {values.shape}")
    flat = values.reshape(len(values), size)
    # Written so that NaN fails it too.
    bad = np.flatnonzero(~((flat >= -_ROUNDING) & (flat <= 1 + _ROUNDING)).all(axis=1))
    if len(bad):
        raise ValueError(f"{path}: HT: expected values from 0 to 1, got {len(bad)} samples with others, first {bad[0]}")
    return torch.from_numpy(flat.astype(np.float32)).reshape(-1, 2, ANGLES, DELAYS)


def read_frequency(path: str | os.PathLike) -> torch.Tensor:
    """The variable ``HF_all``.

    Args:
        path: of a MAT-file of version 5, 7 or 7.3.

    Returns:
        complex64 ``[N, 32 angle, 125 subcarrier]``, as it is in the file.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_angle_delay`.
    """
    values = read_variable(Path(path), "HF_all")
    size = ANGLES * SUBCARRIERS
    if not np.iscomplexobj(values) or values.ndim < 2 or values.shape[1:] not in ((size,), (ANGLES, SUBCARRIERS)):
        raise ValueError(f"{path}: HF_all: expected complex [N, {size}], got {values.dtype} {values.shape}")
    flat = values.reshape(len(values), size)
    bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(bad):
        raise ValueError(f"{path}: HF_all: {len(bad)} samples are not finite, the first is sample {bad[0]}")
    return torch.from_numpy(flat.astype(np.complex64)).reshape(-1, ANGLES, SUBCARRIERS)


def to_complex(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Normalised parts to channels: ``scale * ((x_real - 0.5) + j (x_imaginary - 0.5))``.

    Args:
        x: float ``[..., 2, angle, delay]``.
        scale: of the data set; 1 leaves the channels as the files have them.

    Returns:
        complex ``[..., angle, delay]`` of ``x``'s precision.

    Raises:
        ValueError: ``x`` is no such array, or the scale is not positive.
    """
    if not x.is_floating_point() or x.ndim < 3 or x.shape[-3] != 2:
        raise ValueError(f"x: expected float [..., 2, angle, delay], got {x.dtype} {tuple(x.shape)}")
    _check_scale(scale)
    centred = (x - 0.5) * scale
    return torch.complex(*centred.unbind(-3))


def from_complex(h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The inverse of :func:`to_complex`.

    Args:
        h: complex ``[..., angle, delay]``.
        scale: of the data set: at least :func:`smallest_scale` of it, so that all parts lie within [0, 1].

    Returns:
        float ``[..., 2, angle, delay]`` of ``h``'s precision.

    Raises:
        ValueError: ``h`` is no such array, is not finite, or has parts that the scale takes out of [0, 1].
    """
    _check_scale(scale)
    smallest = smallest_scale(h)
    if smallest > scale * (1 + _ROUNDING):
        raise ValueError(f"scale: expected at least {smallest:.9g} for these channels, got {scale}")
    return (torch.stack([h.real, h.imag], dim=-3) / scale + 0.5).clamp(0, 1)


def smallest_scale(h: torch.Tensor) -> float:
    """Twice the largest absolute real or imaginary part of complex ``h`` ``[..., angle, delay]``.

    Raises:
        ValueError: ``h`` is no such array, is empty or is not finite.
    """
    if not h.is_complex() or h.ndim < 2 or 0 in h.shape:
        raise ValueError(f"h: expected complex [..., angle, delay], not empty, got {h.dtype} {tuple(h.shape)}")
    largest = torch.view_as_real(h.resolve_conj()).abs().max()
    if not torch.isfinite(largest):
        raise ValueError("h: expected finite channels")
    return 2 * largest.item()


def _check_scale(scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}")
