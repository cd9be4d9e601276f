"""CNN that predicts the parameters of the optimal precoder structure.

Baseline of Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section V-C, which cites "A
Deep Learning Framework for Optimization of MISO Downlink Beamforming" (Xia et al., 2020): the network of its sum-rate
problem. Real and imaginary parts of all users' channels form an image of 2 rows and N K columns; it
goes through 3 x 3 convolutions of 8 maps, each with batch normalisation and ReLU, one fully connected layer, a sigmoid,
and the scaling to the power constraint. Training is supervised on WMMSE first, then on the negative sum rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csimodels.evaluation._checks import as_positive
from csimodels.evaluation.precoding import scale_to_power
from csimodels.models.multiuser import MultiUserConfig, pad_last, reals


@dataclasses.dataclass(frozen=True)
class PrecodingCnnConfig(MultiUserConfig):
    """Architecture of a :class:`PrecodingCnn`.

    Attributes:
        antennas, min_users, max_users: as :class:`MultiUserConfig`.
        convolutions: how many of them. Decided: 2, as a small network on two rows has no use for more.
        maps: of each convolution; 8 in Xia et al.
    """

    convolutions: int = 2
    maps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("convolutions", "maps")

    @classmethod
    def paper(cls, **changes: Any) -> PrecodingCnnConfig:
        """8 maps; 0.26 M parameters at 128 antennas and 8 users, nearly all in the fully connected layer."""
        return cls(**changes)

    @classmethod
    def laptop(cls, **changes: Any) -> PrecodingCnnConfig:
        """4 maps; 0.13 M parameters."""
        return cls(**{"maps": 4, **changes})


class PrecodingCnn(nn.Module):
    """lambda and p of :func:`csimodels.evaluation.precoding.structured_precoder` from the users' channels.

    Users are padded with zero channels to ``max_users``, and the outputs of the padded ones are cut off before the
    scaling, so all power goes to real users. Decided: channels enter scaled by sqrt(power / noise_power), which makes
    the input a signal-to-noise ratio and lets one network serve all powers.

    Args:
        config: architecture.
    """

    config: PrecodingCnnConfig

    def __init__(self, config: PrecodingCnnConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for index in range(config.convolutions):
            inputs = config.maps if index else 1
            # The batch normalisation has the bias.
            convolution = nn.Conv2d(inputs, config.maps, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(config.maps), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(config.maps * 2 * config.antennas * config.max_users, 2 * config.max_users)

    def forward(self, h: Tensor, power: float | Tensor, noise_power: float | Tensor) -> tuple[Tensor, Tensor]:
        """Virtual uplink and downlink powers.

        Args:
            h: Channels, complex ``[batch, antenna, user]``.
            power: P_max, positive; scalar or ``[batch]``.
            noise_power: Noise variance at each user, positive; scalar or ``[batch]``, in the unit of ``power``.

        Returns:
            ``(lambdas, p)``, each float32 ``[batch, user]``, positive, with sum ``power`` (Zheng and Dai, eq. 24).

        Raises:
            TypeError: ``h`` is not complex.
            ValueError: shapes that do not fit, users out of the configuration's range, non-finite values, a sample
                without any channel, or ``power`` or ``noise_power`` not positive.
        """
        self.config.check_channel(h)
        batch, _, users = h.shape
        budget = as_positive("power", power, h.shape[:1], h).expand(batch)
        noise = as_positive("noise_power", noise_power, h.shape[:1], h)
        scaled = h * (budget / noise).sqrt()[:, None, None].to(h.real.dtype)
        # User-major columns, real parts in the first row: [batch, 1, 2, max_users * antennas].
        image = reals(pad_last(scaled, self.config.max_users).mT).flatten(1, 2).mT.unsqueeze(1)
        maps = self.convolutions(image.to(self.output.weight.dtype))
        values = self.output(maps.flatten(1)).float().unflatten(1, (2, -1))[..., :users]
        # A sigmoid up to a factor per row, which the scaling takes out again, so that a row cannot underflow to zeros.
        logarithm = F.logsigmoid(values)
        shares = torch.exp(logarithm - logarithm.detach().amax(-1, keepdim=True))
        lambdas, p = scale_to_power(shares, budget.unsqueeze(-1)).unbind(1)
        return lambdas, p
