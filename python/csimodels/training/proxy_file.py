"""Adapted small models on disk: the proxy SAM, its alpha, and the LMMSE estimator where it starts from that."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from csimodels import __version__
from csimodels.evaluation.lmmse import LinearMmse
from csimodels.files import fitting, known, load_format, save_tensors
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig
from csimodels.models.lasco import Proxy, ProxyConfig
from csimodels.models.projection import CodecConfig

_FORMAT = "csimodels.proxy"
_ESTIMATOR = ("mean", "gain", "codeword_mean")


def save_proxy(
    path: str | os.PathLike,
    proxy: Proxy,
    codec: CodecConfig,
    *,
    lmmse: LinearMmse | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write one environment's proxy atomically; ``lmmse`` if the networks start from its estimate."""
    tensors = {f"proxy.{name}": tensor for name, tensor in proxy.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "config": dataclasses.asdict(proxy.sam.config),
        "proxy": dataclasses.asdict(proxy.config),
        "codec": dataclasses.asdict(codec),
        "rank": None if lmmse is None else lmmse.rank,
        "extra": extra or {},
    }
    if lmmse is not None:
        tensors |= {f"lmmse.{name}": getattr(lmmse, name) for name in _ESTIMATOR}
    save_tensors(path, tensors, metadata)


def load_proxy(path: str | os.PathLike, *, codec: CodecConfig) -> tuple[Proxy, LinearMmse | None, dict[str, Any]]:
    """Read what :func:`save_proxy` wrote: the proxy in eval mode, the estimator or None, the extra metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a proxy file, one that is not whole, or made for another codec than ``codec``; the message names
            both.
    """
    tensors, metadata = load_format(path, _FORMAT, "an adapted proxy")
    with known(path, metadata):
        stored, config = CodecConfig(**metadata["codec"]), ProxyConfig(**metadata["proxy"])
        architecture, rank = TransformerConfig(**metadata["config"]), metadata["rank"]
    if stored != codec:
        raise ValueError(f"{path}: adapted for {stored}, the base model is for {codec}")
    proxy = Proxy(config, ChannelTransformer(architecture))
    with fitting(path):
        proxy.load_state_dict({n.removeprefix("proxy."): t for n, t in tensors.items() if n.startswith("proxy.")})
        estimator = None if rank is None else {name: tensors[f"lmmse.{name}"] for name in _ESTIMATOR}
    lmmse = None if estimator is None else LinearMmse(rank=rank, **estimator)
    return proxy.eval(), lmmse, metadata.get("extra", {})
