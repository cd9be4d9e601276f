"""Step 1 of LASCO: pre-train the base LAM and the reference SAM on pooled environments (section III-C)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from csimodels.channels.rays import normalize_power
from csimodels.files import write_json
from csimodels.models.channel_transformer import ChannelTransformer, TransformerConfig, parameter_count
from csimodels.models.projection import CodecConfig, RandomProjectionCodec
from csimodels.training.checkpoint import load_checkpoint, save_checkpoint
from csimodels.training.loop import Batch, TrainConfig, Trainer, TrainResult


@dataclasses.dataclass(frozen=True)
class PretrainTask:
    """One model to pre-train.

    Attributes:
        architecture: of the model. codec: what it reconstructs from. train: how to optimise.
        initial_checkpoint: start from these weights (same architecture, any codeword length) instead of random ones.
    """

    architecture: TransformerConfig
    codec: CodecConfig
    train: TrainConfig
    initial_checkpoint: str | None = None


def validation_nmse_db(
    model: torch.nn.Module, codec: RandomProjectionCodec, h: torch.Tensor, batch: int = 1024
) -> float:
    """NMSE in dB, mean of ratios (LASCO, eq. 13, averaged over samples), of ``model`` on normalised channels ``h``."""
    device = next(model.parameters()).device
    ratios = []
    for part in h.split(batch):
        target = codec.target(part)
        estimate = model(codec.initial(codec.encode(part)).to(device)).float().cpu()
        ratios.append((estimate - target).square().sum(dim=(1, 2)) / target.square().sum(dim=(1, 2)))
    return 10 * torch.cat(ratios).mean().log10().item()


def pretrain(
    task: PretrainTask,
    data: Callable[[int], Batch],
    validation: torch.Tensor,
    run_dir: Path,
    *,
    accelerator: Accelerator,
    data_description: dict[str, Any],
    on_step: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """Pre-train one model; writes ``model.safetensors`` (best weights) and ``log.json`` to ``run_dir``.

    A run that was killed continues from its last state when called again with the same arguments.

    Args:
        task: model, codec and optimisation.
        data: epoch -> ``(h,)``, complex ``[samples, antenna, subcarrier]`` of power ``antennas * subcarriers``.
        validation: complex ``[samples, antenna, subcarrier]``; its NMSE chooses the weights that are kept.
        run_dir: output folder.
        accelerator: see :func:`csimodels.training.loop.make_accelerator`.
        data_description: JSON-serialisable; recorded, and part of what makes two runs the same.
        on_step: progress callback ``(step, total_steps, loss)``.

    Raises:
        ValueError: channels or an initial checkpoint that do not fit ``task``, or what :class:`Trainer` refuses.
        FloatingPointError: the loss or the validation NMSE became infinite or NaN.
    """
    codec = RandomProjectionCodec(task.codec)
    codec.check(validation)  # now, not after the first epoch
    if len(validation) == 0:
        raise ValueError("validation: expected at least one sample, got none")
    if (task.architecture.tokens, task.architecture.features) != codec.token_shape:
        raise ValueError(
            f"task: expected an architecture of {codec.token_shape} tokens and features for {task.codec}, "
            f"got {task.architecture}"
        )
    # The seed of the batch order also draws the weights: one number determines the run.
    torch.manual_seed(task.train.seed)
    if task.initial_checkpoint is None:
        model = ChannelTransformer(task.architecture)
    else:
        model, _, _ = load_checkpoint(task.initial_checkpoint, expected=task.architecture)
        model.train()
    validation = normalize_power(validation)

    def loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
        (h,) = batch
        h = h.cpu()  # the codec is the UE's side; its products are small beside the network's
        device = accelerator.device
        inputs, target = codec.initial(codec.encode(h)).to(device), codec.target(h).to(device)
        # Samples have equal power, so the mean squared error in network units is eq. 13.
        return (network(inputs).float() - target).square().mean()

    trainer = Trainer(
        model,
        task.train,
        data,
        loss,
        lambda network: validation_nmse_db(network, codec, validation),
        accelerator=accelerator,
        run_dir=run_dir,
        fingerprint={
            "architecture": dataclasses.asdict(task.architecture),
            "codec": dataclasses.asdict(task.codec),
            "initial_checkpoint": task.initial_checkpoint,
            "data": data_description,
        },
        on_step=on_step,
    )
    result = trainer.fit()
    if accelerator.is_main_process:
        record = {
            "architecture": dataclasses.asdict(task.architecture),
            "parameters": parameter_count(model),
            "codec": dataclasses.asdict(task.codec),
            "train": dataclasses.asdict(task.train),
            "initial_checkpoint": task.initial_checkpoint,
            "data": data_description,
            "validation_nmse_db": result.best_validation,
            "best_epoch": result.best_epoch,
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "torch": torch.__version__,
            "history": result.history,
        }
        summary = {key: record[key] for key in ("validation_nmse_db", "best_epoch", "steps", "data")}
        save_checkpoint(run_dir / "model.safetensors", accelerator.unwrap_model(model), task.codec, summary)
        write_json(run_dir / "log.json", record)
    accelerator.wait_for_everyone()  # the files are there for every process that returns
    return result
