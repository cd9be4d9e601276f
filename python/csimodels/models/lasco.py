"""LASCO and E-LASCO: a frozen large model and two small ones share the reconstruction (paper sections III-C and III-D).

Everything here works on network outputs, so the base LAM may be any callable: only what it returns is used.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import nn

from csimodels.models.channel_transformer import ChannelTransformer

ADAPTED_METHODS = ("finetuned_sam", "baseline_a", "lasco_no_reference", "lasco", "e_lasco")
METHODS = ("pretrained_lam", "pretrained_sam", *ADAPTED_METHODS, "lmmse")
LABELS = {
    "pretrained_lam": "Pre-trained LAM",
    "pretrained_sam": "Pre-trained SAM",
    "finetuned_sam": "Fine-tuned SAM",
    "baseline_a": "Baseline A",
    "lasco_no_reference": "LASCO without reference",
    "lasco": "LASCO",
    "e_lasco": "E-LASCO",
    "lmmse": "LMMSE (classical)",
}


def shift(
    base: torch.Tensor, proxy: torch.Tensor, reference: torch.Tensor, alpha: torch.Tensor | float
) -> torch.Tensor:
    """``base + alpha (proxy - reference)``: the emulated output shift of the LAM (eqs. 15 and, with alpha, 17)."""
    return base + alpha * (proxy - reference)


def collaborate(
    base: torch.Tensor, proxy: torch.Tensor, reference: torch.Tensor, alpha: torch.Tensor | float
) -> torch.Tensor:
    """``proxy + alpha (base - reference)``: what LASCO and E-LASCO infer with (eq. 18).

    Unlike in :func:`shift`, the trainable proxy cannot absorb alpha, which therefore keeps its meaning.
    """
    return proxy + alpha * (base - reference)


def squared_error(target: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    """``||target - estimate||^2`` per real number, averaged over the batch (the norm in eqs. 16, 17, 19 and 20).

    With estimate = ``shift(alpha=1)`` this is eq. 16, ``shift`` eq. 17, ``collaborate`` with fixed alpha eq. 19 and
    with learned alpha eq. 20. The division by the number of reals scales all gradients alike, which AdamW ignores.
    """
    # Autocast estimates are bfloat16; the error is not.
    return (estimate.to(target.dtype) - target).square().mean()


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """How one proxy SAM takes part.

    Attributes:
        method: one of :data:`ADAPTED_METHODS`.
        alpha: the collaboration coefficient: fixed for ``lasco`` (0.7 is the optimum of Fig. 7), the start of
            ``e_lasco`` (the paper is silent; 1 starts at eq. 15), unused otherwise.
        form: ``"collaborate"`` (eq. 18, the paper's final form) or ``"shift"`` (eqs. 15 to 17).
    """

    method: str
    alpha: float = 1.0
    form: str = "collaborate"

    def __post_init__(self) -> None:
        if self.method not in ADAPTED_METHODS:
            raise ValueError(f"method: expected one of {', '.join(ADAPTED_METHODS)}, got {self.method!r}")
        if self.form not in ("collaborate", "shift"):
            raise ValueError(f"form: expected 'collaborate' or 'shift', got {self.form!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha: expected a finite number, got {self.alpha}")


class Proxy(nn.Module):
    """A trainable SAM beside cached outputs of the frozen models.

    ===================  =======================================  ==================
    method               estimate                                 SAM starts as
    ===================  =======================================  ==================
    finetuned_sam        SAM(h)                                   the reference
    baseline_a           base + SAM(h)                            random
    lasco_no_reference   base + SAM(h)                            the reference
    lasco                eq. 18, alpha fixed                      the reference
    e_lasco              eq. 18, alpha learned                    the reference
    ===================  =======================================  ==================

    Args:
        config: the method.
        reference: the reference SAM; copied, never trained itself.
        seed: of baseline A's random start.
    """

    def __init__(self, config: ProxyConfig, reference: ChannelTransformer, *, seed: int = 0):
        super().__init__()
        self.config = config
        if config.method == "baseline_a":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.sam = ChannelTransformer(reference.config)
        else:
            self.sam = copy.deepcopy(reference).requires_grad_(True)
        self.alpha = nn.Parameter(torch.tensor(float(config.alpha)), requires_grad=config.method == "e_lasco")

    def forward(self, h_in: torch.Tensor, base: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """All float ``[batch, tokens, features]`` in network units: input, base LAM's and reference SAM's outputs."""
        proxy = self.sam(h_in)
        if self.config.method == "finetuned_sam":
            return proxy
        if self.config.method in ("baseline_a", "lasco_no_reference"):
            return base + proxy
        combine = collaborate if self.config.form == "collaborate" else shift
        return combine(base, proxy, reference, self.alpha)
