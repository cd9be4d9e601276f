"""Adapters of a language backbone as files in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

The tensors have PEFT's names. Normalisations and position embeddings stand among them as PEFT's ``modules_to_save``, so
that the folder holds all in which an adapted backbone differs from what it was before, whether or not they were
trained.

What an adapter means depends on the weights that it stands over: over LoftQ's Q it makes up for what the quantisation
lost, and over W or another Q it does harm. So the file's metadata, which PEFT ignores, hold a digest of these weights,
and :func:`load_adapter` compares it. PEFT itself knows no such check: an adapter that was trained over 4-bit weights
must be loaded there onto a model with those weights, dequantised.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from csimodels import __version__
from csimodels.files import save_tensors, write_json
from csimodels.models.adapted_layers import (
    Adapter,
    adapter_of,
    describe_identity,
    identity,
    is_adapted,
    norms_of,
    positions_of,
    projections_of,
    set_scaling,
    transformer_of,
    weights_digest,
)

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_FORMAT = "csimodels.adapter"
_PREFIX = "base_model.model."
# Settings of PEFT's LoraConfig that change what the tensors mean, with the values under which this module knows them.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
}


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapters, normalisations and position embeddings of an adapted model to ``folder``.

    Args:
        model: adapted by ``add_lora`` or ``quantize_backbone``; ``base_model_name_or_path`` of the file is the name or
            folder that its weights came from, or else its type, width and layers in words. The weights beneath the
            adapters are not written; LoftQ's can differ from one machine to the next, so keep the model's state dict.

    Raises:
        ValueError: no adapters, or not all of one rank and scaling.
        OSError: a file could not be written.
    """
    base = transformer_of(model)
    adapters = _adapters(base)
    kinds = sorted({(adapter.rank, adapter.scaling) for adapter in adapters.values()})
    if len(kinds) > 1:
        raise ValueError(f"model: expected adapters of one rank and scaling, got (rank, scaling) {kinds}")
    rank, scaling = kinds[0]
    alpha = rank * scaling
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": adapter.lora_a, f"{_PREFIX}{name}.lora_B.weight": adapter.lora_b}
    others = _others(base)
    tensors |= {_PREFIX + name: parameter for name, parameter in others.items()}
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "base": identity(base),
        "base_weights": weights_digest(base),
    }
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(base, "name_or_path", "") or describe_identity(identity(base)),
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapters),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in others}) or None,
        "fan_in_fan_out": base.config.model_type == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
    # The tensors first: a folder without a configuration is not mistaken for an adapter.
    save_tensors(Path(folder) / TENSORS_FILE, tensors, metadata)
    write_json(Path(folder) / CONFIG_FILE, config)


def load_adapter(model: nn.Module, folder: str | os.PathLike, *, other_weights: bool = False) -> None:
    """Read an adapter that :func:`save_adapter` or PEFT wrote into a model that has adapters of the same rank.

    A, B and the scaling are taken over, and the normalisations and position embeddings that the file holds; those that
    a file of PEFT lacks stay as they are. Names may start with a causal model's prefix ("transformer.", "model.").

    Args:
        model: adapted by ``add_lora`` or ``quantize_backbone``.
        other_weights: take an adapter also over weights other than those it was saved over, for instance one that was
            trained in full precision over the plain NF4 start. PEFT's own files do not tell their weights: whoever
            loads one knows that they fit, which over LoftQ's Q they never do.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not readable, no plain LoRA, of another backbone, of another rank, or over other weights; the model
            is then as it was.
    """
    base, folder = transformer_of(model), Path(folder)
    adapters = _adapters(base)
    config = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_tensors(folder / TENSORS_FILE)
    own = identity(base)
    if metadata.get("base", own) != own:
        raise ValueError(
            f"{folder}: an adapter of {describe_identity(metadata['base'])}, the model is {describe_identity(own)}"
        )
    rank = next(iter(adapters.values())).rank
    if config["r"] != rank:
        raise ValueError(f"{folder}: rank: expected {rank}, as the model's adapters have, got {config['r']}")
    prefix = getattr(base, "base_model_prefix", "")
    given = {name.removeprefix(_PREFIX).removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    targets: dict[str, nn.Parameter] = {}
    for name, adapter in adapters.items():
        targets |= {f"{name}.lora_A.weight": adapter.lora_a, f"{name}.lora_B.weight": adapter.lora_b}
    required = set(targets)
    targets |= _others(base)
    wrong = sorted(name for name in given if name not in targets or given[name].shape != targets[name].shape)
    missing = sorted(required - set(given))
    if wrong or missing:
        raise ValueError(
            f"{folder}: an adapter of {config.get('base_model_name_or_path')!r} does not fit {describe_identity(own)}: "
            f"{len(wrong)} tensors that it has not in this shape {wrong[:3]}, {len(missing)} missing {missing[:3]}"
        )
    saved = metadata.get("base_weights")
    if not other_weights and saved is not None and saved != (has := weights_digest(base)):
        raise ValueError(
            f"{folder}: trained over weights {saved[:12]} of {describe_identity(own)}, the model has {has[:12]}; "
            "quantised or drawn otherwise, they give the adapter another meaning (other_weights=True takes it anyway)"
        )
    with torch.no_grad():
        for name, tensor in given.items():
            targets[name].copy_(tensor)
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    for name, layer in projections_of(base).items():
        if name in adapters:
            set_scaling(name, layer, config["lora_alpha"] / root)


def _adapters(base: Any) -> dict[str, Adapter]:
    found = {name: adapter_of(name, layer) for name, layer in projections_of(base).items() if is_adapted(layer)}
    if not found:
        raise ValueError("model: expected adapters, got none; call add_lora or quantize_backbone first")
    return found


def _others(base: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of normalisations and position embeddings by name."""
    modules = norms_of(base) | positions_of(base)
    return {
        f"{name}.{part}": parameter
        for name, module in modules.items()
        for part, parameter in module.named_parameters(recurse=False)
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of a PEFT LoRA adapter ({error!r})") from None
    for name, known in _PLAIN.items():
        if name in config and config[name] not in known:
            raise ValueError(f"{path}: {name}: expected {known[0]!r}, as of plain LoRA, got {config[name]!r}")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{path}: r, lora_alpha: expected numbers, got {rank!r}, {alpha!r}")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and, of a file of :func:`save_adapter`, the metadata; those of PEFT are no JSON and tell nothing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if raw.get("format") != json.dumps(_FORMAT):
        return tensors, {}
    return tensors, {name: json.loads(value) for name, value in raw.items()}
