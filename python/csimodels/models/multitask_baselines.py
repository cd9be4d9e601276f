"""The multi-task network and the networks that it is compared with, by name, and how each is asked (004, section V)."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csimodels.models.channel_predictors import (
    RecurrentConfig,
    RecurrentPredictor,
    TransformerPredictor,
    TransformerPredictorConfig,
)
from csimodels.models.detnet import DetNet, DetNetConfig
from csimodels.models.dnn_detector import DnnDetector, DnnDetectorConfig
from csimodels.models.llm4cp import Llm4cp, Llm4cpConfig
from csimodels.models.multitask import MultiTaskConfig, MultiTaskPhy
from csimodels.models.oamp_net import OampNet, OampNetConfig
from csimodels.models.precoding_cnn import PrecodingCnn, PrecodingCnnConfig

MULTITASK = "multitask"


class _Entry(NamedTuple):
    label: str
    task: str
    config: Any
    network: Any
    fields: dict[str, Any] = {}  # noqa: RUF012  read alone


_ENTRIES = {
    "rnn": _Entry("RNN", "predict", RecurrentConfig, RecurrentPredictor, {"cell": "rnn"}),
    "lstm": _Entry("LSTM", "predict", RecurrentConfig, RecurrentPredictor, {"cell": "lstm"}),
    "gru": _Entry("GRU", "predict", RecurrentConfig, RecurrentPredictor, {"cell": "gru"}),
    "transformer": _Entry("Transformer", "predict", TransformerPredictorConfig, TransformerPredictor),
    "llm4cp": _Entry("LLM4CP", "predict", Llm4cpConfig, Llm4cp),
    "cnn": _Entry("CNN", "precode", PrecodingCnnConfig, PrecodingCnn),
    "dnn": _Entry("DNN", "detect", DnnDetectorConfig, DnnDetector),
    "detnet": _Entry("DetNet", "detect", DetNetConfig, DetNet),
    "oampnet": _Entry("OAMP-Net", "detect", OampNetConfig, OampNet),
}
NAMES = tuple(_ENTRIES)
LABELS = {name: entry.label for name, entry in _ENTRIES.items()}
TASK_OF = {name: entry.task for name, entry in _ENTRIES.items()}


def baseline_config(name: str, preset: str) -> Any:
    """The configuration of a network of :data:`NAMES` at a preset, ``"laptop"`` or ``"paper"``.

    Raises:
        ValueError: there is no such network.
    """
    if name not in _ENTRIES:
        raise ValueError(f"model: expected one of {', '.join(NAMES)}, got {name!r}")
    entry = _ENTRIES[name]
    return getattr(entry.config, preset)(**entry.fields)


def config_from_dict(model: str, fields: dict[str, Any]) -> Any:
    """The configuration that ``dataclasses.asdict`` made ``fields`` of.

    Raises:
        ValueError, TypeError: there is no such network, or it has other fields.
    """
    if model != MULTITASK and model not in _ENTRIES:
        raise ValueError(f"model: expected one of {MULTITASK}, {', '.join(NAMES)}, got {model!r}")
    config: Any = MultiTaskConfig if model == MULTITASK else _ENTRIES[model].config
    if hasattr(config, "from_dict"):
        return config.from_dict(fields)
    # JSON has lists where the configurations have tuples.
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def build_network(model: str, config: Any, *, pretrained: bool = True) -> nn.Module:
    """The untrained network; ``pretrained=False`` draws a backbone's weights, for a checkpoint that brings them."""
    network = MultiTaskPhy if model == MULTITASK else _ENTRIES[model].network
    if "pretrained" in inspect.signature(network).parameters:
        return network(config, pretrained=pretrained)
    return network(config)


def run_network(network: nn.Module, model: str, task: str, *inputs: Any) -> Any:
    """A network on the inputs of its task.

    Args:
        network: of the name ``model``.
        task: ``"predict"`` with a history, ``"detect"`` with channels, received signals and the noise power (which the
            multi-task network is not told, section V-D), ``"precode"`` with channels, power and noise power.
    """
    if model != MULTITASK:
        return network(*inputs)
    return network(task, *(inputs[:2] if task == "detect" else inputs))


def run_batched(network: nn.Module, model: str, task: str, *inputs: Any, batch: int = 256) -> Any:
    """:func:`run_network` batch by batch; inputs that are no tensors are the same for all."""
    parts = []
    for start in range(0, len(inputs[0]), batch):
        given = [x[start : start + batch] if isinstance(x, Tensor) else x for x in inputs]
        parts.append(run_network(network, model, task, *given))
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def training_estimates(network: nn.Module, model: str, task: str, *inputs: Any) -> Tensor:
    """:func:`run_network`, but all layers of DetNet, which is trained on all of them."""
    if isinstance(network, DetNet):
        return network(*inputs, all_layers=True)
    return run_network(network, model, task, *inputs)
