"""What the networks for several single-antenna users share: their range of users, the checks of inputs, a detector.

Channels are ``[batch, antenna, user]`` as in :mod:`csimodels.evaluation.precoding` and
:mod:`csimodels.evaluation.detection`; all samples of a batch have the same number of users K.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csimodels.evaluation._checks import (
    COMPLEX_DTYPES,
    as_positive,
    check_finite,
    check_none,
    check_same_device,
    check_tensor,
)
from csimodels.evaluation.detection import QAM_ORDERS


@dataclasses.dataclass(frozen=True)
class MultiUserConfig:
    """The system that a network is made for.

    Attributes:
        antennas: N of the BS; 128 in Zheng and Dai, section V-A.
        min_users, max_users: K of a batch lies between them; 4 and 8 there.
    """

    antennas: int = 128
    min_users: int = 4
    max_users: int = 8

    def __post_init__(self) -> None:
        self._check_positive("antennas", "min_users", "max_users")
        if self.max_users < self.min_users:
            raise ValueError(f"max_users: expected at least min_users={self.min_users}, got {self.max_users}")

    def check_channel(self, h: Tensor) -> None:
        """Refuse anything but finite channels ``[batch, antennas, min_users..max_users]`` with no all-zero sample."""
        check_tensor("h", h, "[batch, antenna, user]", min_dim=3, dtypes=COMPLEX_DTYPES)
        if h.dim() != 3 or h.shape[1] != self.antennas:
            raise ValueError(f"h: expected shape [batch, {self.antennas}, user], got {tuple(h.shape)}")
        if not self.min_users <= h.shape[2] <= self.max_users:
            raise ValueError(f"users: expected {self.min_users} to {self.max_users}, got {h.shape[2]}")
        check_finite("h", h)
        check_none("h", (h.detach() == 0).flatten(1).all(1), "sample(s) of zero channel")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


@dataclasses.dataclass(frozen=True)
class DetectorConfig(MultiUserConfig):
    """The system that a detector is made for.

    Attributes:
        antennas, min_users, max_users: as :class:`MultiUserConfig`.
        order: of the QAM, one of 4, 16, 64, 256; 16 in Zheng and Dai, section V-A.
    """

    order: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.order, int) or self.order not in QAM_ORDERS:
            raise ValueError(f"order: expected one of {', '.join(map(str, QAM_ORDERS))}, got {self.order!r}")


class Detector(nn.Module):
    """Uplink detector of ``y = H x + n`` (Zheng and Dai, eq. 7), ``slots`` received vectors sharing one channel.

    A subclass defines :meth:`_detect`.

    Args:
        config: sizes.
    """

    config: DetectorConfig

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config

    def forward(self, h: Tensor, y: Tensor, noise_power: float | Tensor) -> Tensor:
        """Soft symbols.

        Args:
            h: Channels, complex ``[batch, antenna, user]``.
            y: Received signals, complex ``[batch, slot, antenna]``.
            noise_power: Variance of the noise at each antenna, positive; scalar or ``[batch]``.

        Returns:
            Complex ``[batch, slot, user]`` in the scale of unit average symbol power, dtype of ``y``.

        Raises:
            TypeError: not complex tensors, or of two dtypes.
            ValueError: shapes or devices that do not fit each other or the configuration, users out of its range,
                non-finite values, a sample without any channel, or ``noise_power`` not positive.
        """
        noise = self._check(h, y, noise_power)
        return self._detect(h, y, noise).to(y.dtype)

    def _check(self, h: Tensor, y: Tensor, noise_power: float | Tensor) -> Tensor:
        """``noise_power`` in float64 as ``[batch]``, after all inputs have been looked at."""
        self.config.check_channel(h)
        check_tensor("y", y, "[batch, slot, antenna]", min_dim=3, dtypes=(h.dtype,))
        if y.dim() != 3 or y.shape[0] != h.shape[0] or y.shape[2] != h.shape[1]:
            raise ValueError(f"y: expected shape [{h.shape[0]}, slot, {h.shape[1]}], got {tuple(y.shape)}")
        check_same_device("y", y, "h", h)
        check_finite("y", y)
        return as_positive("noise_power", noise_power, h.shape[:1], h).expand(h.shape[0])

    def _detect(self, h: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """As :meth:`forward`, on checked arguments."""
        raise NotImplementedError


def reals(x: Tensor) -> Tensor:
    """Real and imaginary part as a new last axis: complex ``[...]`` -> ``[..., 2]``."""
    return torch.view_as_real(x.resolve_conj().contiguous())


def pad_last(x: Tensor, size: int) -> Tensor:
    """Zeros after the last axis up to ``size``."""
    return F.pad(x, (0, size - x.shape[-1]))
