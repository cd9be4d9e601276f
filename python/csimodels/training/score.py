"""Score pre-trained and adapted models on any channels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from csimodels.channels.rays import normalize_power
from csimodels.evaluation.metrics import gcs, nmse_db
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.adapt import linear_estimate
from csimodels.training.proxy_file import load_proxy


@torch.inference_mode()
def score_models(
    base: Callable[[torch.Tensor], torch.Tensor],
    reference: ChannelTransformer,
    codec: RandomProjectionCodec,
    h: torch.Tensor,
    proxy_path: str | os.PathLike | None = None,
    batch: int = 512,
) -> dict[str, dict[str, Any]]:
    """NMSE (dB, mean of ratios) and GCS of the models on ``h``, complex ``[samples, antenna, subcarrier]``.

    Returns:
        Method name -> ``nmse_db``, ``gcs`` and, for a proxy that has one, ``alpha``.
    """
    codec.check(h)
    h = normalize_power(h)
    proxy, lmmse, _ = load_proxy(proxy_path, codec=codec.config) if proxy_path is not None else (None, None, None)
    estimates: dict[str, list[torch.Tensor]] = {"pretrained_lam": [], "pretrained_sam": []}
    for part in h.split(batch):
        h_in = codec.initial(codec.encode(part))
        estimates["pretrained_lam"].append(base(h_in))
        estimates["pretrained_sam"].append(reference(h_in))
        if proxy is not None:
            start = h_in if lmmse is None else linear_estimate(lmmse, codec, part)
            outputs = (estimates["pretrained_lam"][-1], estimates["pretrained_sam"][-1])
            if lmmse is not None:
                outputs = (base(start), reference(start))
            estimates.setdefault(proxy.config.method, []).append(proxy(start, *outputs))
    scores: dict[str, dict[str, Any]] = {}
    for name, parts in estimates.items():
        channels = codec.to_channel(torch.cat(parts))
        scores[name] = {"nmse_db": nmse_db(h, channels).item(), "gcs": gcs(h, channels).item()}
    if proxy is not None and proxy.config.method in ("lasco", "e_lasco"):
        scores[proxy.config.method]["alpha"] = proxy.alpha.item()
    return scores
