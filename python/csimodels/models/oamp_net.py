"""OAMP-Net: orthogonal approximate message passing with four trainable scalars per layer.

Baseline of Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section V-D, which cites
"Model-Driven Deep Learning for MIMO Detection" (He, Wen, Jin and Li, 2020); the network is that paper's OAMP-Net2:

    v^2   = max((|y - H x|^2 - N sigma^2) / tr(H^H H), 5e-13)
    W     = K / tr(W^ H) W^,    W^ = v^2 H^H (v^2 H H^H + sigma^2 I)^-1
    r     = x + gamma W (y - H x)
    tau^2 = tr(C C^H) v^2 / K + theta^2 sigma^2 tr(W W^H) / K,    C = I - theta W H
    x     = phi (E[x | r, tau^2] - xi r)

in complex form; the paper's real-valued form has half of each variance per real part, and is the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.evaluation._checks import as_double
from csimodels.evaluation.detection import qam_constellation
from csimodels.models.multiuser import Detector, DetectorConfig, reals

_SMALLEST_VARIANCE = 5e-13  # the paper's "small positive constant"; symbols have unit power


@dataclasses.dataclass(frozen=True)
class OampNetConfig(DetectorConfig):
    """Architecture of an :class:`OampNet`.

    Attributes:
        antennas, min_users, max_users, order: as :class:`DetectorConfig`.
        layers: T; 10 in He et al.
    """

    layers: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("layers")

    @classmethod
    def paper(cls, **changes: Any) -> OampNetConfig:
        """Ten layers, 40 parameters."""
        return cls(**changes)

    @classmethod
    def laptop(cls, **changes: Any) -> OampNetConfig:
        """The same: nothing smaller is needed."""
        return cls(**changes)


class OampNet(Detector):
    """Linear MMSE and posterior-mean estimates in turn.

    Untrained (gamma = theta = phi = 1, xi = 0) it is plain OAMP. Arithmetic is float64: the residual of a converged
    estimate is far below the signal. One eigendecomposition of ``H^H H`` serves all slots and layers, so gradients with
    respect to ``h`` are undefined where its eigenvalues coincide; those of the parameters and of ``y`` always exist.

    Args:
        config: architecture.
    """

    config: OampNetConfig

    def __init__(self, config: OampNetConfig):
        super().__init__(config)
        self.levels: Tensor
        levels = qam_constellation(config.order, dtype=torch.complex128).real.unique()
        self.register_buffer("levels", levels, persistent=False)
        self.gamma = nn.Parameter(torch.ones(config.layers))
        self.theta = nn.Parameter(torch.ones(config.layers))
        self.phi = nn.Parameter(torch.ones(config.layers))
        self.xi = nn.Parameter(torch.zeros(config.layers))

    def _detect(self, h: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        channel, received = as_double(h), as_double(y)
        users = h.shape[2]
        # Everything below is [batch, slot, ...]; slots are rows, so H x is x @ H^T.
        values, vectors = torch.linalg.eigh(channel.mH @ channel)
        gains = values.clamp(min=0).unsqueeze(1)
        sigma2 = noise[:, None, None]
        x = received.new_zeros(*y.shape[:2], users)
        scalars = torch.stack([self.gamma, self.theta, self.phi, self.xi], -1).double()
        for gamma, theta, phi, xi in scalars:
            residual = received - x @ channel.mT
            excess = reals(residual).square().sum((-2, -1)).unsqueeze(-1) - self.config.antennas * sigma2
            v2 = (excess / gains.sum(-1, keepdim=True)).clamp(min=_SMALLEST_VARIANCE)
            # W = U diag(w) U^H H^H in the eigenbasis of H^H H; v^2 cancels in the scaling of W^.
            w = 1 / (v2 * gains + sigma2)
            w = w * (users / (w * gains).sum(-1, keepdim=True))
            rotated = residual @ channel.conj() @ vectors.conj()
            r = x + gamma * (w * rotated) @ vectors.mT
            spread = (1 - theta * w * gains).square().sum(-1, keepdim=True)
            noise_gain = (w.square() * gains).sum(-1, keepdim=True)
            tau2 = (spread * v2 + theta.square() * sigma2 * noise_gain) / users
            x = phi * (self._posterior_mean(r, tau2) - xi * r)
        return x

    def _posterior_mean(self, r: Tensor, tau2: Tensor) -> Tensor:
        """E[x | r] for uniform symbols in complex noise of variance ``tau2``, half of it in each real part."""
        distance = (reals(r).unsqueeze(-1) - self.levels.double()).square()
        weights = torch.softmax(-distance / tau2[..., None, None], -1)
        return torch.view_as_complex((weights * self.levels.double()).sum(-1))
