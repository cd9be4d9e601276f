"""A random codebook shaped by a site's second-order statistics: the enhanced codebook that needs no training.

If channels are ``R^(1/2) g`` with isotropic ``g``, the words ``R^(1/2) c / |R^(1/2) c|`` of an isotropic codebook are
where the channels are (Love and Heath, "Limited Feedback Diversity Techniques for Correlated Channels", 2006; Shen et
al., "On the Performance of Channel-Statistics-Based Codebook for Massive MIMO Channel Feedback", 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shaped_codebook(words: Tensor, h: Tensor) -> Tensor:
    """Codewords turned towards where channels are.

    Args:
        words: complex64 ``[K, D]``. h: the site's channels, complex64 ``[N, D]``; only their directions count.

    Returns:
        complex64 ``[K, D]``, unit norm.

    Raises:
        ValueError: shapes that do not fit, no channel, one that is zero or not finite, or a codeword that the
            channels' covariance leaves nothing of.
    """
    if words.ndim != 2 or h.ndim != 2 or words.shape[1] != h.shape[1] or not len(h):
        raise ValueError(
            f"words, h: expected [K, D] and [N, D], N at least 1, got {tuple(words.shape)}, {tuple(h.shape)}"
        )
    directions = h.to(torch.complex128)
    directions = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    bad = (~torch.isfinite(torch.view_as_real(directions)).flatten(1).all(1)).nonzero()
    if len(bad):
        raise ValueError(f"h: {len(bad)} channels are zero or not finite, the first is {int(bad[0])}")
    values, vectors = torch.linalg.eigh(directions.T @ directions.conj() / len(h))  # E[h h^H], columns as channels
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mH
    shaped = words.to(torch.complex64) @ root.T.to(torch.complex64)
    norm = torch.linalg.vector_norm(shaped, dim=1, keepdim=True)
    lost = (norm[:, 0] < 1e-6).nonzero()
    if len(lost):
        raise ValueError(f"words: {len(lost)} have no part where the channels are, the first is {int(lost[0])}")
    return shaped / norm
