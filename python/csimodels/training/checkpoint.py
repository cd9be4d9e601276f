"""Model checkpoints: safetensors with the architecture in the metadata."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

from torch import nn

from csimodels import __version__
from csimodels.files import fitting, known, load_format, save_tensors
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig
from csimodels.models.projection import CodecConfig

_FORMAT = "csimodels.checkpoint"
Model = TypeVar("Model", bound=nn.Module)


def save_checkpoint(
    path: str | os.PathLike, model: ChannelTransformer, codec: CodecConfig, extra: dict[str, Any] | None = None
) -> None:
    """Write ``model``, its configuration and the codec that it was trained for, atomically."""
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "architecture": type(model).__name__,
        "config": dataclasses.asdict(model.config),
        "codec": dataclasses.asdict(codec),
        "extra": extra or {},
    }
    save_tensors(path, model.state_dict(), metadata)


def load_checkpoint(
    path: str | os.PathLike, *, expected: TransformerConfig | None = None, codec: CodecConfig | None = None
) -> tuple[ChannelTransformer, CodecConfig, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        path: the file.
        expected: if given, the architecture that the checkpoint must have.
        codec: if given, the codec that the checkpoint must have been trained for.

    Returns:
        The model in eval mode (float32), its codec's configuration and the extra metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this package, or of another architecture or codec; the message names both.
    """
    tensors, metadata = load_format(path, _FORMAT, "a csimodels checkpoint")
    if metadata.get("architecture") != ChannelTransformer.__name__:
        raise ValueError(
            f"{path}: expected architecture ChannelTransformer, the file holds {metadata.get('architecture')}"
        )
    with known(path, metadata):
        config, stored_codec = TransformerConfig(**metadata["config"]), CodecConfig(**metadata["codec"])
    if expected is not None and config != expected:
        raise ValueError(f"{path}: expected architecture {expected}, the file holds {config}")
    if codec is not None and stored_codec != codec:
        raise ValueError(f"{path}: expected a model for {codec}, the file was trained for {stored_codec}")
    model = ChannelTransformer(config)
    with fitting(path):
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval(), stored_codec, metadata.get("extra", {})


def freeze(model: Model) -> Model:
    """Switch ``model`` to inference for good: eval mode, no gradients."""
    return model.eval().requires_grad_(False)
