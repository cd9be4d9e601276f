"""What the three physical-layer tasks are trained on: channels of one set, and each epoch's noise, symbols and users.

Source: Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section V-A. How the number of
users and the power vary while training is left open there; decided: both are drawn anew for every sample in every
epoch, and a batch takes its first sample's number of users, since samples of different numbers do not stack. With
several processes each has its own part of the batch, hence its own number of users, symbols and noise: a training on
two processes is as good as one on a single process, but not the same to the last bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csimodels.channels.multitask_data import MULTITASK_SETS, multiuser_channels, prediction_channels
from csimodels.channels.rays import normalize_power
from csimodels.files import json_digest, load_tensors, save_tensors
from csimodels.models.multitask import TASKS

NOISE_POWER = 0.1  # W: -10 dBW at each user (sections V-C and V-E)
SLOTS = 8  # L0 of detection (section III-B)
_PREDICTION, _USERS = "prediction", "users"


@dataclasses.dataclass(frozen=True)
class TaskSamples:
    """Channels of a set of :mod:`csimodels.channels.multitask_data`, the same number for each task.

    Attributes:
        name: of the set.
        train, validation, test: samples per task. A sample of prediction is one antenna's, one of precoding and of
            detection the channels of ``users`` UEs, of which the first K are served.
        antennas: of each UE that are predicted, drawn among all. Decided: the paper predicts each antenna by itself
            (section III-B), and neighbouring antennas of one UE tell little new.
        users: most users of a sample.
        generator: ``"builtin"`` or ``"sionna"``.
    """

    name: str
    train: int
    validation: int
    test: int
    antennas: int = 4
    users: int = 8
    generator: str = "builtin"

    def described(self) -> dict[str, Any]:
        """All fields and how the set is defined now, JSON-serialisable."""
        # A set that there is not has no definition, and drawing it is refused.
        defined = MULTITASK_SETS[self.name].describe() if self.name in MULTITASK_SETS else None
        return {**dataclasses.asdict(self), "set": defined}

    def fraction(self, share: float) -> TaskSamples:
        """With so much of the training and validation samples (section V-H)."""
        return dataclasses.replace(
            self, train=max(1, round(share * self.train)), validation=max(1, round(share * self.validation))
        )

    def prediction(self, split: str, folder: Path, *, speed_kmh: float | None = None) -> Tensor:
        """Complex64 ``[split's samples, slots, subcarriers]``, kept in ``folder`` for the next time."""
        count = getattr(self, split)
        ues = -(-count // self.antennas)
        arguments: dict[str, Any] = {"speed_kmh": speed_kmh, "antennas": self.antennas, "generator": self.generator}
        return self._kept(
            folder,
            [_PREDICTION, self.described()["set"], split, ues, arguments],
            lambda: prediction_channels(self.name, split, ues, **arguments)[0].flatten(0, 1),
        )[:count]

    def multiuser(self, split: str, folder: Path) -> Tensor:
        """Complex64 ``[split's samples, antenna, user]``, kept in ``folder`` for the next time."""
        count = getattr(self, split)
        arguments: dict[str, Any] = {"users": self.users, "generator": self.generator}
        return self._kept(
            folder,
            [_USERS, self.described()["set"], split, count, arguments],
            lambda: multiuser_channels(self.name, split, count, **arguments),
        )

    def _kept(self, folder: Path, identity: list[Any], draw: Any) -> Tensor:
        path = folder / f"{self.name}-{identity[0]}-{identity[2]}-{json_digest(identity)[:16]}.safetensors"
        if not path.exists():
            save_tensors(path, {"h": draw()}, {"drawn": identity})
        return load_tensors(path)[0]["h"]


class Noise(NamedTuple):
    """What varies while training: SNR in dB of histories and received signals, transmit power in dBW.

    Section V-A has the SNR; the powers are those of Fig. 7.
    """

    snr_db: tuple[float, float] = (0.0, 20.0)
    power_dbw: tuple[float, float] = (-10.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How an epoch's samples come about: fields as in the model's configuration, ``order`` of the QAM."""

    history: int
    slots: int
    min_users: int
    max_users: int
    order: int = 16
    noise: Noise = dataclasses.field(default_factory=Noise)


def draw_prediction(h: Tensor, drawing: Drawing, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Channels, the SNR of their histories in dB ``[n]``, and seeds of the noise int64 ``[n]``.

    Args:
        h: complex64 ``[n, slots, subcarriers]``.
    """
    return h, _uniform(len(h), drawing.noise.snr_db, generator), _seeds(len(h), generator)


def draw_detection(h: Tensor, drawing: Drawing, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Channels, SNR in dB ``[n]``, numbers of users int64 ``[n]``, and seeds of symbols and noise int64 ``[n]``."""
    n = len(h)
    return h, _uniform(n, drawing.noise.snr_db, generator), _users(n, drawing, generator), _seeds(n, generator)


def draw_precoding(h: Tensor, drawing: Drawing, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Channels, powers in W ``[n]``, numbers of users int64 ``[n]``, and whether WMMSE supervises, bool ``[n]``: no."""
    power = 10 ** (_uniform(len(h), drawing.noise.power_dbw, generator) / 10)
    return h, power, _users(len(h), drawing, generator), torch.zeros(len(h), dtype=torch.bool)


DRAW = dict(zip(TASKS, (draw_prediction, draw_detection, draw_precoding), strict=True))


def served(h: Tensor, users: int) -> Tensor:
    """The channels of the first ``users`` UEs of each sample, scaled to unit mean power over these.

    Args:
        h: complex ``[n, antenna, user]``; UEs keep their path loss relative to each other.

    Raises:
        ValueError: fewer than ``users`` UEs.
    """
    if h.shape[-1] < users:
        raise ValueError(f"users: expected at most the {h.shape[-1]} of the channels, got {users}")
    return normalize_power(h[..., :users])


def seeded(seeds: Tensor) -> torch.Generator:
    """The generator of a batch: its first sample's seed decides, so that a resumed run meets the same noise."""
    return torch.Generator().manual_seed(int(seeds[0]))


def _uniform(n: int, span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return span[0] + (span[1] - span[0]) * torch.rand(n, generator=generator)


def _users(n: int, drawing: Drawing, generator: torch.Generator) -> Tensor:
    return torch.randint(drawing.min_users, drawing.max_users + 1, (n,), generator=generator)


def _seeds(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**62, (n,), generator=generator)
