"""Scores of the multi-task paper's detection and precoding (Zheng and Dai, sections V-C and V-D).

Channel prediction is scored by :func:`csimodels.evaluation.metrics.nmse_db` with ``reduction="ratio_of_sums"``: that is
eq. 11.
"""

from __future__ import annotations

from torch import Tensor

from csimodels.evaluation._checks import COMPLEX_DTYPES, INTEGER_DTYPES, check_same_shape, check_tensor
from csimodels.evaluation.detection import qam_demodulate, qam_modulate
from csimodels.evaluation.metrics import nmse, ser, sum_rate
from csimodels.evaluation.precoding import structured_precoder


def detection_scores(estimate: Tensor, symbols: Tensor, order: int) -> dict[str, float]:
    """NMSE and symbol error ratio of soft symbols (Figs. 9 and 10).

    Args:
        estimate: Complex ``[batch, slot, user]``, in the scale of unit average symbol power.
        symbols: The transmitted ones' indices, an integer tensor of the same shape.
        order: 4, 16, 64 or 256.

    Returns:
        ``"nmse"``: total squared error over total power of the symbols, linear, as the paper tabulates it; ``"ser"``:
        of minimum-distance decisions.

    Raises:
        TypeError: ``estimate`` not complex or ``symbols`` not integer.
        ValueError: shapes that differ, no symbols, another order, an index out of range, or non-finite estimates.
    """
    check_tensor("estimate", estimate, "[batch, slot, user]", min_dim=3, dtypes=COMPLEX_DTYPES)
    check_tensor("symbols", symbols, "[batch, slot, user]", min_dim=3, dtypes=INTEGER_DTYPES)
    check_same_shape("symbols", symbols, "estimate", estimate)
    if symbols.numel() == 0:
        raise ValueError("symbols: expected at least one, got none")
    transmitted = qam_modulate(symbols, order, dtype=estimate.dtype)
    decided = qam_demodulate(estimate, order)
    return {
        # All symbols as one sample: the ratio of sums.
        "nmse": float(nmse(transmitted.unsqueeze(0), estimate.detach().unsqueeze(0))),
        "ser": float(ser(symbols, decided)),
    }


def precoding_rate(h: Tensor, lambdas: Tensor, p: Tensor, noise_power: float | Tensor) -> Tensor:
    """Mean over samples of the sum rate that predicted parameters of eq. 4 reach (Figs. 7 and 8).

    Args:
        h: Channels, complex ``[batch, antenna, user]``.
        lambdas, p: Virtual uplink and downlink powers, ``[batch, user]``.
        noise_power: Noise variance at each user, positive; scalar or ``[batch]``.

    Returns:
        float64 scalar in bit/s/Hz. Differentiable; its negative is the loss of eq. 37.

    Raises:
        TypeError, ValueError: as :func:`csimodels.evaluation.precoding.structured_precoder`; no samples.
    """
    rates = sum_rate(h, structured_precoder(h, lambdas, p, noise_power), noise_power)
    if rates.numel() == 0:
        raise ValueError("h: expected at least one sample to average over, got none")
    return rates.mean()
