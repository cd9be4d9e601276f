"""Sum rate of users precoded on what codebook feedback left of their channels (LVM4CF (Zhuang et al.), Fig. 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csimodels.evaluation._checks import COMPLEX_DTYPES, check_same_shape, check_tensor
from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.precoding import zf


def codebook_sum_rate(
    h: Tensor, h_hat: Tensor, snr_db: float | Sequence[float], users: int = 4, *, seed: int = 0
) -> Tensor:
    """Sum rate against SNR of ZF precoding on fed back channels (LVM4CF (Zhuang et al.), eqs. 3-5).

    The channels are grouped at random, ``users`` to a group; those left over by the division are not used. Each group's
    precoder is the pseudo-inverse of ``h_hat`` (eq. 3), scaled as a whole to the power P (eq. 4), and its rate on ``h``
    is that of eq. 5, with noise power 1 and P the SNR. The paper stacks plain transposes in eq. 3, which would null
    ``h^T v``; here it is ``h^H v``, which eqs. 1 and 5 receive.

    Decided: the norms of ``h`` count as they are. For channels of unit norm the SNR is then that of a single user with
    maximum-ratio transmission. Only the directions of ``h_hat`` should be known to the BS; codewords have unit norm.
    Users of one group that fed back the same codeword cannot be separated, where eq. 3 has no inverse; the
    pseudo-inverse gives them one beam.

    Args:
        h: true channels, complex ``[N, D]``. h_hat: what the BS has of them, same shape.
        snr_db: one or several SNRs in dB.
        users: of a group, 1 to N and to D.
        seed: of the grouping, the same for every SNR, so that methods are compared on the same groups.

    Returns:
        float64, mean over the groups in bit/s/Hz: a scalar, or one for each SNR.

    Raises:
        TypeError: not complex tensors.
        ValueError: shapes that differ, too few channels, ``users`` out of range, or a channel that is not finite (or
            zero, for ``h_hat``).
    """
    check_tensor("h", h, "[N, D]", min_dim=2, dtypes=COMPLEX_DTYPES)
    check_tensor("h_hat", h_hat, "[N, D]", min_dim=2, dtypes=COMPLEX_DTYPES)
    check_same_shape("h_hat", h_hat, "h", h)
    if h.dim() != 2 or not 1 <= users <= min(h.shape):
        raise ValueError(f"users: expected 1 to N and to D of h [N, D], got {users} for shape {tuple(h.shape)}")
    groups = len(h) // users
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))[: groups * users].to(h.device)
    true, known = (x[order].view(groups, users, -1).mT for x in (h, h_hat))
    direction = zf(known, normalization="total")
    snr = 10 ** (torch.as_tensor(snr_db, dtype=torch.float64) / 10)
    rates = [sum_rate(true, direction, 1 / power).mean() for power in snr.flatten().tolist()]
    return torch.stack(rates).view(snr.shape)
