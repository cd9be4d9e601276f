"""Channel prediction without a network: the last slot again, and the linear MMSE predictor.

What a network has to beat: complex ``[B, T1, M]`` (slot, subcarrier) to complex ``[B, T2, M]``, as in
:mod:`csimodels.models.channel_predictors`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from csimodels.models.channel_predictors import check_history, check_positive

DOMAINS = ("slots", "slots and subcarriers")


@dataclasses.dataclass(frozen=True)
class HoldConfig:
    """Sizes: T1, T2, M. A size below 1 is a ``ValueError``."""

    history: int = 16
    future: int = 4
    subcarriers: int = 48

    def __post_init__(self) -> None:
        check_positive(self, "history", "future", "subcarriers")


class HoldPredictor(nn.Module):
    """Predicts that the channel stays what it was in the last slot: what outdated CSI costs."""

    def __init__(self, config: HoldConfig):
        super().__init__()
        self.config = config

    def forward(self, history: Tensor) -> Tensor:
        """Complex ``[B, T1, M]`` to ``[B, T2, M]``; raises what
        :func:`csimodels.models.channel_predictors.check_history` raises.
        """
        check_history(history, self.config.history, self.config.subcarriers)
        return history[:, -1:].repeat(1, self.config.future, 1)


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """The linear MMSE predictor.

    Attributes:
        history, future, subcarriers: T1, T2, M.
        domain: ``"slots"`` predicts every subcarrier by itself; ``"slots and subcarriers"`` first turns the subcarriers
            to uncorrelated ones (Karhunen-Loeve, near enough to delays), each with an SNR of its own. With noise the
            latter is the better one, without noise they are the same. It assumes that the covariance is a product of
            one over slots and one over subcarriers, as of wide-sense stationary uncorrelated scatterers.
        ridge: added to the eigenvalues of the covariances, as a share of their mean. Decided: 1e-12, which float64
            still resolves; what regularises is the power of the noise.

    Raises:
        ValueError: a size below 1, another domain, or a ridge that is not positive and below 1.
    """

    history: int = 16
    future: int = 4
    subcarriers: int = 48
    domain: str = "slots and subcarriers"
    ridge: float = 1e-12

    def __post_init__(self) -> None:
        check_positive(self, "history", "future", "subcarriers")
        if self.domain not in DOMAINS:
            raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {self.domain!r}")
        if not 0 < self.ridge < 1:
            raise ValueError(f"ridge: expected a number above 0 and below 1, got {self.ridge}")


class LinearPredictor(nn.Module):
    """``E[f x^H] (E[x x^H] + noise)^-1 x``, fitted on training channels by :meth:`fit`; one matrix for all UEs.

    Covariances over slots are means over all samples and subcarriers. Their eigenvalues are kept, so that the filter of
    any noise power costs a division. Arithmetic is complex128; the state is kept in float64.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    cross: Tensor
    modes: Tensor
    mode_powers: Tensor
    noise_power: Tensor
    fitted: Tensor

    def __init__(self, config: LinearConfig):
        super().__init__()
        self.config = config
        slots, columns = config.history, config.subcarriers
        shapes = {
            "eigenvectors": (slots, slots, 2),
            "eigenvalues": (slots,),
            "cross": (config.future, slots, 2),  # E[f x^H], in the eigenvectors' coordinates
            "modes": (columns, columns, 2),
            "mode_powers": (columns,),
            "noise_power": (),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, histories: Tensor, futures: Tensor, *, noise_power: float | Tensor = 0.0) -> LinearPredictor:
        """Fit to training channels.

        Args:
            histories: complex ``[B, T1, M]``, noisy or not.
            futures: complex ``[B, T2, M]``, without noise.
            noise_power: of the noise within ``histories``, per entry: a number or real ``[B]``. It is taken out of the
                covariances and becomes what :meth:`forward` assumes. With 0 the histories are taken as they are: of
                noisy ones, what is fitted is the filter for their mixture of noise.

        Returns:
            itself.

        Raises:
            TypeError, ValueError: another dtype, shape or number of samples; numbers that are not finite, histories
                without power, or a noise power that is negative or not below that of the histories.
        """
        config = self.config
        check_history(histories, config.history, config.subcarriers, "histories")
        check_history(futures, config.future, config.subcarriers, "futures")
        if not len(histories) or len(histories) != len(futures):
            raise ValueError(
                "histories, futures: expected the same number of samples, at least 1, got "
                f"{len(histories)} and {len(futures)}"
            )
        x, f = histories.to(torch.complex128), futures.to(torch.complex128)
        power = float(x.abs().square().mean())
        if not (0 < power < float("inf") and bool(torch.isfinite(f.abs()).all())):
            raise ValueError(f"histories, futures: expected finite numbers and some power, got a mean power of {power}")
        noise = float(_noise(noise_power, len(x), x.device).mean())
        if not noise < power:
            raise ValueError(f"noise_power: expected less than the mean power of histories, {power}, got {noise}")
        over_slots = x.transpose(0, 1).flatten(1)  # [T1, B * M]
        count = over_slots.shape[1]
        values, vectors = torch.linalg.eigh(over_slots @ over_slots.mH / count)
        self._set("eigenvalues", (values - noise).clamp_min(0))
        self._set("eigenvectors", vectors)
        self._set("cross", f.transpose(0, 1).flatten(1) @ over_slots.mH / count @ vectors)
        over_subcarriers = x.flatten(0, 1).mT
        powers, modes = torch.linalg.eigh(over_subcarriers @ over_subcarriers.mH / over_subcarriers.shape[1])
        powers = (powers - noise).clamp_min(0)
        self._set("modes", modes)
        self._set("mode_powers", powers / powers.mean())
        self._set("noise_power", torch.tensor(noise))
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def forward(self, history: Tensor, noise_power: float | Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            history: complex ``[B, T1, M]``.
            noise_power: of the noise in it, per entry: a number or real ``[B]``. None is the mean of those of
                :meth:`fit`, the best linear choice where only their distribution is known.

        Returns:
            complex ``[B, T2, M]``, of the same dtype.

        Raises:
            TypeError, ValueError: as for the histories of :meth:`fit`.
            RuntimeError: :meth:`fit` was not called, nor a fitted state loaded.
        """
        check_history(history, self.config.history, self.config.subcarriers)
        if not self.fitted:
            raise RuntimeError("LinearPredictor: expected to be fitted first, by fit(histories, futures)")
        given = self.noise_power if noise_power is None else noise_power
        noise = _noise(given, len(history), history.device)[:, None, None]  # [B | 1, slot, column]
        x, ridge = history.to(torch.complex128), self.config.ridge
        powers, modes = torch.ones_like(self.mode_powers), None
        if self.config.domain != DOMAINS[0]:
            modes, powers = torch.view_as_complex(self.modes), self.mode_powers
            x = x @ modes.conj()
        # A mode of covariance p R has the filter C R^-1 of R + (noise / p) I. Those without power predict nothing.
        noise = noise / powers.clamp_min(ridge)
        values = self.eigenvalues[:, None] + ridge * self.eigenvalues.mean()
        x = (torch.view_as_complex(self.eigenvectors).mH @ x) / (values + noise)
        predicted = torch.view_as_complex(self.cross) @ x
        return (predicted if modes is None else predicted @ modes.mT).to(history.dtype)

    def _set(self, name: str, values: Tensor) -> None:
        getattr(self, name).copy_(torch.view_as_real(values) if values.is_complex() else values)


def _noise(noise_power: float | Tensor, samples: int, device: torch.device) -> Tensor:
    """Real float64 ``[samples]`` or ``[1]``."""
    noise = torch.as_tensor(noise_power, dtype=torch.float64, device=device)
    if noise.ndim > 1 or (noise.ndim == 1 and len(noise) != samples):
        raise ValueError(f"noise_power: expected a number or [{samples}], got {tuple(noise.shape)}")
    if not bool(((noise >= 0) & torch.isfinite(noise)).all()):
        raise ValueError(f"noise_power: expected finite numbers of at least 0, got {noise.min().item()}")
    return noise.reshape(-1)
