"""The file from which a killed training run continues: weights, best weights, optimiser and counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from csimodels.files import load_tensors, save_tensors

STATE = "state.safetensors"


class RunState(NamedTuple):
    """What the file holds. ``counters`` is what JSON can carry."""

    model: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    optimizer: dict[int, dict[str, torch.Tensor]]
    counters: Any

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give ``optimizer`` its state back; its parameter groups stay as they were built."""
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": groups})


def save_run_state(
    run_dir: Path,
    model: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    counters: Any,
    fingerprint: Any,
) -> None:
    """Write the file, whole or not at all. ``fingerprint`` says which run it belongs to."""
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    save_tensors(run_dir / STATE, tensors, {"state": counters, "fingerprint": fingerprint})


def load_run_state(run_dir: Path | None, fingerprint: Any) -> RunState | None:
    """Read the file; None where there is none.

    Raises:
        ValueError: it belongs to another run.
    """
    if run_dir is None or not (run_dir / STATE).exists():
        return None
    path = run_dir / STATE
    tensors, metadata = load_tensors(path)
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path}: belongs to another run ({metadata.get('fingerprint')}), this one is {fingerprint}; "
            "choose another output folder or remove the file"
        )
    run = RunState({}, {}, {}, metadata["state"])
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        if part == "optimizer":
            index, entry = rest.split(".")
            run.optimizer.setdefault(int(index), {})[entry] = tensor
        else:
            (run.model if part == "model" else run.best)[rest] = tensor
    return run
