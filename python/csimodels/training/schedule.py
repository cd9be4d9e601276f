"""Learning-rate schedules as pure functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, *, warmup_fraction: float, peak: float, final: float) -> float:
    """Linear warm-up from 0 to ``peak``, then a cosine to ``final`` (LASCO, section IV-B).

    Args:
        step: 0-based optimiser step. total: steps of the whole run.
        warmup_fraction: share of ``total`` spent warming up.
    """
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, progress)))
