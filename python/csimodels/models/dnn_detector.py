"""DNN: a black-box detector from channel and received signal to symbols.

Baseline of Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section V-D, which cites
"Power of Deep Learning for Channel Estimation and Signal Detection in OFDM Systems" (Ye, Li and Juang, 2018): fully
connected layers with ReLU, hidden ones of 500, 250 and 120 neurons. That network gives the bits of one link and ends in
sigmoids; here the outputs are real and imaginary parts of the users' symbols, so the last layer is linear (decided).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.models.multiuser import Detector, DetectorConfig, pad_last, reals


@dataclasses.dataclass(frozen=True)
class DnnDetectorConfig(DetectorConfig):
    """Architecture of a :class:`DnnDetector`.

    Attributes:
        antennas, min_users, max_users, order: as :class:`DetectorConfig`. The network itself does not use the order: it
            learns the constellation from its training symbols.
        hidden: neurons of the hidden layers; (500, 250, 120) in Ye et al.
    """

    hidden: tuple[int, ...] = (500, 250, 120)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden: expected at least one layer of at least 1 neuron, got {self.hidden!r}")

    @classmethod
    def paper(cls, **changes: Any) -> DnnDetectorConfig:
        """The layers of Ye et al.; 1.31 M parameters at 128 antennas and 8 users."""
        return cls(**changes)

    @classmethod
    def laptop(cls, **changes: Any) -> DnnDetectorConfig:
        """Half as wide; 0.62 M parameters."""
        return cls(**{"hidden": (250, 125, 60), **changes})


class DnnDetector(Detector):
    """Fully connected network on the users' channels and one slot's received signal.

    Users are padded with zero channels to ``max_users``, and the outputs of the padded ones are cut off. The noise
    power is not an input. Decided: every slot is detected by itself, so any number of slots is taken; ``y`` enters
    divided by sqrt(K), which leaves its size independent of the number of users.

    Args:
        config: architecture.
    """

    config: DnnDetectorConfig

    def __init__(self, config: DnnDetectorConfig):
        super().__init__(config)
        first, *others = config.hidden
        # One layer on [h, y]; its two halves are apart so that the one on h is computed once for all slots.
        self.from_channel = nn.Linear(2 * config.antennas * config.max_users, first)
        self.from_received = nn.Linear(2 * config.antennas, first, bias=False)
        inputs = 2 * config.antennas * (config.max_users + 1)
        for layer in (self.from_channel, self.from_received):
            nn.init.uniform_(layer.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        layers: list[nn.Module] = [nn.ReLU()]
        width = first
        for neurons in others:
            layers += [nn.Linear(width, neurons), nn.ReLU()]
            width = neurons
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2 * config.max_users))

    def _detect(self, h: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        dtype = self.from_channel.weight.dtype
        channel = reals(pad_last(h, self.config.max_users)).flatten(1).to(dtype)
        received = reals(y / math.sqrt(h.shape[2])).flatten(2).to(dtype)
        features = self.from_channel(channel).unsqueeze(1) + self.from_received(received)
        symbols = self.layers(features).unflatten(-1, (self.config.max_users, 2)).to(dtype)
        return torch.view_as_complex(symbols.contiguous())[..., : h.shape[2]]
