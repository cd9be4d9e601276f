"""DetNet: unfolded projected gradient descent for MIMO detection.

Baseline of Zheng and Dai, "Large Language Model Enabled Multi-Task Physical Layer Network", section V-D, which cites
"Deep MIMO Detection" (Samuel, Diskin and Wiesel, 2017). That paper is for BPSK; higher orders, one-hot estimates and
the gradient step with two step sizes are from the same authors' "Learning to Detect" (IEEE Trans. Signal Process.,
2019). Layer l does, on the real-valued form of the system,

    q = x + delta_1 H^T y - delta_2 H^T H x                       a gradient step
    z = relu(W_1 [q, v] + b_1)                                    lifted with the memory v of the layers before
    s <- a s + (1 - a) (W_2 z + b_2),  v <- a v + (1 - a) (W_3 z + b_3)        residual features
    x = E[levels] with weights softmax(s)                         the projection

with one score s per level of each real part (sqrt(order) of them).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.evaluation._checks import check_tensor
from csimodels.evaluation.detection import qam_constellation
from csimodels.models.multiuser import Detector, DetectorConfig, pad_last, reals


@dataclasses.dataclass(frozen=True)
class DetNetConfig(DetectorConfig):
    """Architecture of a :class:`DetNet`.

    Attributes:
        antennas, min_users, max_users, order: as :class:`DetectorConfig`.
        layers: L; 30 for 16-QAM in the authors' code.
        hidden: width of z. 8 times the 2 K reals in the authors' code for 16-QAM.
        memory: width of v. 4 times the 2 K reals there.
        weights: ``"joint"``: a layer's weights take all users at once, as published; users are padded with zeros to
            ``max_users``, as Zheng and Dai do for networks of fixed size. ``"shared"``: the same weights serve every
            user, ``hidden`` and ``memory`` are per user, and users meet in ``H^T H x`` alone; the network then does not
            depend on their order and needs fewer weights and less training (decided for the laptop).
        residual: a, the share of the layer before in s and v; 0.9 in the authors' code.
    """

    layers: int = 30
    hidden: int = 128
    memory: int = 64
    weights: str = "joint"
    residual: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("layers", "hidden", "memory")
        if self.weights not in ("joint", "shared"):
            raise ValueError(f"weights: expected 'joint' or 'shared', got {self.weights!r}")
        if not 0 <= self.residual < 1:
            raise ValueError(f"residual: expected 0 to below 1, got {self.residual}")

    @classmethod
    def paper(cls, **changes: Any) -> DetNetConfig:
        """The authors' sizes for 16-QAM at K = 8; 0.80 M parameters."""
        return cls(**changes)

    @classmethod
    def laptop(cls, **changes: Any) -> DetNetConfig:
        """Ten layers whose weights the users share; 17 k parameters, which a CPU core can train."""
        return cls(**{"layers": 10, "hidden": 64, "memory": 8, "weights": "shared", "residual": 0.5, **changes})


class DetNet(Detector):
    """Unfolded projected gradient descent. The noise power is not an input.

    Decided, where the papers leave it open or do it otherwise:

    - ``H^T y`` and ``H^T H`` are divided by the mean of ``H^T H``'s diagonal, so that nothing depends on the channel's
      unit. With delta_1 = delta_2 = 1, the start, the step is then parallel interference cancellation. (The authors'
      code starts at 0, where the layers see no data.)
    - The one-hot estimate is a softmax of scores, not the scores themselves: x is then within the constellation's hull,
      and the mean squared error of the symbols (Zheng and Dai, eq. 39) can train it, which it could not with scores
      that only matter through their weighted sum.

    Args:
        config: architecture.
    """

    config: DetNetConfig

    def __init__(self, config: DetNetConfig):
        super().__init__(config)
        levels = qam_constellation(config.order, dtype=torch.complex128).real.unique()
        self.levels: Tensor
        self.register_buffer("levels", levels.to(torch.get_default_dtype()), persistent=False)
        together = config.max_users if config.weights == "joint" else 1
        self.steps = nn.Parameter(torch.ones(config.layers, 2))
        self.lift = nn.ModuleList()
        self.score = nn.ModuleList()
        self.remember = nn.ModuleList()
        for layer in range(config.layers):
            self.lift.append(nn.Linear(2 * together + config.memory, config.hidden))
            self.score.append(nn.Linear(config.hidden, 2 * together * len(levels)))
            if layer + 1 < config.layers:  # nothing reads what the last layer would remember
                self.remember.append(nn.Linear(config.hidden, config.memory))

    def forward(self, h: Tensor, y: Tensor, noise_power: float | Tensor, *, all_layers: bool = False) -> Tensor:
        """Soft symbols.

        Args:
            h, y, noise_power: as :meth:`Detector.forward`.
            all_layers: give every layer's estimate, for :func:`layer_loss`.

        Returns:
            Complex ``[batch, slot, user]``, dtype of ``y``; with ``all_layers`` ``[layer, batch, slot, user]``, whose
            last layer is what comes without.

        Raises:
            TypeError, ValueError: as :meth:`Detector.forward`.
        """
        self._check(h, y, noise_power)
        estimates = self._estimates(h, y)
        return torch.stack(estimates) if all_layers else estimates[-1]

    def _estimates(self, h: Tensor, y: Tensor) -> list[Tensor]:
        gram = h.mH @ h
        unit = gram.diagonal(dim1=1, dim2=2).real.mean(1)[:, None, None]
        # Slots are rows: (H^H H x)^T = x^T (H^H H)^T.
        gram, matched = gram.mT / unit, y @ h.conj() / unit
        x = torch.zeros_like(matched)
        score = self.steps.new_zeros(())
        memory = self.steps.new_zeros(*self._features(x).shape[:-1], self.config.memory)
        keep = self.config.residual
        estimates = []
        for layer, (step, own_step) in enumerate(self.steps):
            moved = x + step * matched - own_step * (x @ gram)
            lifted = torch.relu(self.lift[layer](torch.cat([self._features(moved), memory], -1)))
            score = keep * score + (1 - keep) * self.score[layer](lifted)
            if layer < len(self.remember):
                memory = keep * memory + (1 - keep) * self.remember[layer](lifted)
            x = self._project(score, x.shape[-1]).to(x.dtype)
            estimates.append(x)
        return estimates

    def _features(self, x: Tensor) -> Tensor:
        """Complex ``[batch, slot, user]`` -> the reals that one application of a layer takes, in the last axis."""
        if self.config.weights == "joint":
            return reals(pad_last(x, self.config.max_users)).flatten(-2).to(self.steps.dtype)
        return reals(x).to(self.steps.dtype)

    def _project(self, score: Tensor, users: int) -> Tensor:
        """Scores to complex ``[batch, slot, user]``; those of padded users are cut off."""
        if self.config.weights == "joint":
            score = score.unflatten(-1, (self.config.max_users, -1))[..., :users, :]
        weights = torch.softmax(score.to(self.levels.dtype).unflatten(-1, (2, -1)), -1)
        return torch.view_as_complex((weights * self.levels).sum(-1))


def layer_loss(estimates: Tensor, symbols: Tensor) -> Tensor:
    """Mean squared error over all layers, layer l weighted by log(l) (as in "Deep MIMO Detection").

    Decided: the weights are scaled to sum to 1, so that it compares with the error of one layer (Zheng and Dai,
    eq. 39: the mean over real and imaginary parts), and the division by the error of zero forcing is left out, as in
    the authors' code.

    Args:
        estimates: Complex ``[layer, ...]``, of :class:`DetNet` with ``all_layers``.
        symbols: The transmitted ones, complex ``[...]``.

    Returns:
        Scalar. Differentiable.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes that do not fit.
    """
    complex_dtypes = (torch.complex64, torch.complex128)
    check_tensor("estimates", estimates, "[layer, ...]", min_dim=1, dtypes=complex_dtypes)
    check_tensor("symbols", symbols, "[...]", min_dim=0, dtypes=complex_dtypes)
    if estimates.shape[1:] != symbols.shape or not len(estimates):
        raise ValueError(f"estimates: expected shape [layer, {tuple(symbols.shape)}], got {tuple(estimates.shape)}")
    errors = reals(estimates - symbols).square().flatten(1).mean(1)
    layer = torch.arange(1, len(errors) + 1, dtype=errors.dtype, device=errors.device)
    # log(1) = 0 leaves nothing of a single layer.
    weights = torch.log(layer) if len(errors) > 1 else layer
    return (errors * weights).sum() / weights.sum()
