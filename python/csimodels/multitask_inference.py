"""A trained network of the physical-layer tasks on files: futures from histories, symbols from signals, precoders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.channels.multitask_file import MultiTaskFile, read_multitask, write_multitask
from csimodels.evaluation.detection import qam_demodulate, qam_modulate
from csimodels.evaluation.metrics import nmse_db, sum_rate
from csimodels.evaluation.multitask_scores import detection_scores
from csimodels.evaluation.precoding import structured_precoder
from csimodels.models.low_rank import merge_adapters
from csimodels.models.multitask_baselines import run_batched
from csimodels.training.multitask_file import load_multitask


@dataclasses.dataclass(frozen=True)
class TaskNetwork:
    """A network and what its file says of it.

    Attributes:
        network: in eval mode. path: of its file. model: its name. tasks: that it was trained for.
        order: of the QAM.
    """

    network: nn.Module
    path: str
    model: str
    tasks: tuple[str, ...]
    order: int

    def run(self, task: str, *inputs: Any) -> Any:
        """The task's estimate, batch by batch.

        Raises:
            ValueError: it was not trained for ``task``; or inputs that it refuses.
        """
        if task not in self.tasks:
            raise ValueError(f"{self.path}: expected a network for {task}, it was trained for {', '.join(self.tasks)}")
        with torch.inference_mode():
            return run_batched(self.network, self.model, task, *inputs)


def load_network(path: str | os.PathLike, *, merged: bool = False) -> TaskNetwork:
    """A network that :mod:`csimodels.training.multitask` wrote.

    Args:
        path: of its file.
        merged: add the low-rank matrices to the weights, which are then in full precision.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load_multitask`.
    """
    network, metadata = load_multitask(path)
    if merged and metadata["adaptation"] is not None:
        merge_adapters(network)
    return TaskNetwork(network.eval(), str(path), metadata["model"], tuple(metadata["tasks"]), metadata["order"])


def predict_file(network: TaskNetwork, source: Path, out: Path) -> dict[str, Any]:
    """Predict the futures of a file's histories, antenna by antenna.

    Args:
        network: trained for ``"predict"``.
        source: file with ``history``; with ``future`` too, the NMSE is told.
        out: file to write, with ``future``.

    Returns:
        ``samples``, and ``nmse_db`` (eq. 11) where the truth is known.

    Raises:
        FileNotFoundError, ValueError: of the file, or histories that the network refuses (T1 slots, M subcarriers).
    """
    _check_out(source, out)
    file = read_multitask(source, ["history"], optional=["future"])
    history = file["history"]
    flat = history.flatten(0, 1) if history.dim() == 4 else history
    future = network.run("predict", flat)
    future = future.unflatten(0, history.shape[:2]) if history.dim() == 4 else future
    if "future" in file and file["future"].shape != future.shape:
        raise ValueError(f"{source}: future: expected {list(future.shape)}, got {list(file['future'].shape)}")
    write_multitask(out, {"future": future}, _parameters(network, file))
    result: dict[str, Any] = {"samples": len(history)}
    if "future" in file:
        result["nmse_db"] = nmse_db(file["future"].flatten(1), future.flatten(1), reduction="ratio_of_sums").item()
    return result


def precode_file(network: TaskNetwork, source: Path, out: Path, *, power: float, noise_power: float) -> dict[str, Any]:
    """Design the precoder of every sample by eq. 4.

    Args:
        network: trained for ``"precode"``.
        source: file with ``channels``. out: file to write, with ``precoder``.
        power: P_max, W. noise_power: at each user, W.

    Returns:
        ``samples`` and ``rate``, the mean sum rate in bit/s/Hz.

    Raises:
        FileNotFoundError, ValueError: of the file, or channels that the network refuses (antennas, users).
    """
    _check_out(source, out)
    file = read_multitask(source, ["channels"])
    h = file["channels"]
    lambdas, p = network.run("precode", h, torch.full((len(h),), power), noise_power)
    precoder = structured_precoder(h, lambdas, p, noise_power)
    write_multitask(out, {"precoder": precoder}, {**_parameters(network, file), "power": power})
    return {"samples": len(h), "rate": sum_rate(h, precoder, noise_power).mean().item()}


def detect_file(network: TaskNetwork, source: Path, out: Path) -> dict[str, Any]:
    """Detect the symbols of a file's received signals.

    Args:
        network: trained for ``"detect"``.
        source: file with ``channels``, ``received`` and ``noise_power`` (which the multi-task network does not use);
            with ``symbols`` too, the NMSE and the symbol error ratio are told.
        out: file to write, with ``symbols``: soft estimates.

    Returns:
        ``samples``, and ``nmse`` (linear) and ``ser`` where the truth is known.

    Raises:
        FileNotFoundError, ValueError: of the file, or arrays that the network refuses.
    """
    _check_out(source, out)
    file = read_multitask(source, ["channels", "received", "noise_power"], optional=["symbols"])
    truth = _symbol_indices(source, file, network.order) if "symbols" in file else None
    estimate = network.run("detect", file["channels"], file["received"], file["noise_power"])
    write_multitask(out, {"symbols": estimate}, _parameters(network, file))
    result: dict[str, Any] = {"samples": len(estimate)}
    if truth is not None:
        result |= detection_scores(estimate, truth, network.order)
    return result


def _check_out(source: Path, out: Path) -> None:
    if source.resolve() == out.resolve():
        raise ValueError(f"{out}: expected another file than the one that is read")


def _symbol_indices(source: Path, file: MultiTaskFile, order: int) -> Tensor:
    """Indices of the file's symbols, which must be points of the network's constellation."""
    indices = qam_demodulate(file["symbols"], order)
    off = (qam_modulate(indices, order) - file["symbols"]).abs() > 1e-3
    if off.any():
        raise ValueError(
            f"{source}: symbols: expected {order}-QAM of unit power, as the network detects, got {int(off.sum())} of "
            f"{off.numel()} that are none"
        )
    return indices


def _parameters(network: TaskNetwork, file: MultiTaskFile) -> dict[str, Any]:
    return {"source": file.parameters, "model": network.model}
