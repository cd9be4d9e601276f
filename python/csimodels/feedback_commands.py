"""The commands of CSI feedback in the angle-delay domain: ``train``, ``encode`` and ``decode``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from csimodels.console import Threads, console, reported, training_progress
from csimodels.files import digest
from csimodels.options import family_and_source, replace_given

Model = Annotated[Path, typer.Option("--model", help="model.safetensors of csimodels train or experiment")]


def train(
    out: Annotated[Path, typer.Option(file_okay=False, help="output folder; an interrupted run there is continued")],
    model: Annotated[
        str, typer.Option(help="llmcsinet, or a method to compare with: csinet, crnet, idasnet, pca and others")
    ] = "llmcsinet",
    data: Annotated[
        Path | None, typer.Option(help="HDF5 or COST 2100 .mat file to train on, split 8:1:1; default: --channels")
    ] = None,
    channels: Annotated[
        str,
        typer.Option(help="indoor_los, outdoor_nlos, uma_28ghz, raytraced, or NAME=PATH as for csimodels experiment"),
    ] = "outdoor_nlos",
    preset: Annotated[
        str, typer.Option(help="laptop (for two CPU cores) or paper (the paper's sizes and epochs)")
    ] = "laptop",
    variant: Annotated[str, typer.Option(help="of LLMCsiNet: S, M or L (1, 3 or 6 Transformer layers)")] = "S",
    compression: Annotated[int, typer.Option(help="1/sigma: 8, 16, 32 or 64")] = 8,
    all_ratios: Annotated[
        bool, typer.Option(help="one LLMCsiNet for all the preset's compressions (the paper's -MC)")
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="pre-trained layers: family:source, such as gpt2:openai-community/gpt2-large, llama:FOLDER or "
            "bert:all-minilm-l6-v2 (offline); 'random' draws them; default: the preset's"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="at most, of each stage; default: the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="samples per step; default: the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate; default: the preset's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of weights and batch order")] = 0,
    threads: Threads = None,
) -> None:
    """Train LLMCsiNet (or a network to compare it with) to compress channels; writes model.safetensors and log.json.

    Example: csimodels train --data site.h5 --out runs/llmcsinet
    """
    with reported():
        from csimodels.training.llmcsinet import train_feedback
        from csimodels.training.llmcsinet_presets import feedback_preset
        from csimodels.training.loop import make_accelerator

        if threads:
            torch.set_num_threads(threads)
        changes: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
        sizes = replace_given(feedback_preset(preset), **changes)
        if data is None:
            sizes = sizes.with_channels([channels])
            (channels,) = sizes.channels
        if model == "llmcsinet":
            chosen = {} if backbone is None else {"backbone": _backbone(sizes, variant, backbone)}
            name = channels if data is None else "user"
            training = sizes.llmcsinet(variant, compression, name, mixed_ratios=all_ratios, **chosen)
        elif all_ratios or backbone is not None:
            raise ValueError(f"all-ratios, backbone: expected neither for {model}, which has one ratio and no backbone")
        else:
            training = sizes.baseline(model, compression)
            given = [name for name, value in changes.items() if value is not None]
            if given and not training.stages:
                raise ValueError(f"{', '.join(given)}: expected none for {model}, which has no training")
        training = training.seeded(seed)
        source = _training_data(sizes, channels, data, out)
        accelerator = make_accelerator(training.last_train())
        with training_progress(f"training {model}") as on_step:
            _, best = train_feedback(training, source, out, accelerator=accelerator, on_step=on_step)
        if accelerator.is_main_process:
            console.print(f"validation NMSE {best:.2f} dB; wrote {out}/model.safetensors", soft_wrap=True)


def _backbone(sizes: Any, variant: str, text: str) -> Any:
    """``"family:source"`` or ``"random"`` -> the backbone's configuration, with the variant's depth."""
    from csimodels.models.backbone import BackboneConfig

    config = sizes.config(variant, 8).backbone
    if text == "random":
        return dataclasses.replace(config, source=None)
    family, source = family_and_source(text, "family:source or random")
    return BackboneConfig(family=family, source=source, layers=config.layers)


def _training_data(sizes: Any, channels: str, data: Path | None, out: Path) -> Any:
    from csimodels.channels.csi_file import CsiFile
    from csimodels.channels.presets import split_811
    from csimodels.training.llmcsinet import FeedbackData, normalize_energy

    if data is None:
        return sizes.channel_set(channels).training_data(out)
    config = sizes.config("S", 8)
    file = CsiFile(data, delays=config.delays, antennas=config.antennas)
    h = normalize_energy(torch.cat(list(file.images())))
    train, validation, _ = split_811(len(h), seed=0)
    return FeedbackData(h[train], h[validation], {"sha256": digest(data), "split": "8:1:1"})


def encode(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="channels: an HDF5 file, or a COST 2100 .mat with HT")],
    out: Annotated[Path, typer.Argument(dir_okay=False, help="file of feedback reports to write, such as site.csif")],
    model: Model,
    elements: Annotated[int | None, typer.Option(help="M, elements fed back per sample; default: the model's")] = None,
    values: Annotated[
        str, typer.Option(help="float32, or codes (those of the Lloyd-Max quantiser that the model carries)")
    ] = "float32",
    shift: Annotated[int, typer.Option(min=0, help="delay rows kept before delay 0, for HDF5 files")] = 2,
    threads: Threads = None,
) -> None:
    """Compress channels as the UE does: one feedback report per sample, as real bytes.

    Example: csimodels encode site.h5 site.csif --model runs/llmcsinet/model.safetensors
    """
    with reported():
        from csimodels.feedback import encode_file, load_llmcsinet

        if threads:
            torch.set_num_threads(threads)
        result = encode_file(load_llmcsinet(model), source, out, elements=elements, values=values, shift=shift)
        console.print(
            f"wrote {result.samples} reports of {result.report_bytes} bytes (M = {result.elements}, values as "
            f"{values}) to {out}",
            soft_wrap=True,
        )


def decode(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="file of feedback reports that encode wrote")],
    out: Annotated[
        Path, typer.Argument(dir_okay=False, help="channels to write, in a file of the kind that was encoded")
    ],
    model: Model,
    truth: Annotated[Path | None, typer.Option(help="the file that was encoded, to print the NMSE against")] = None,
    threads: Threads = None,
) -> None:
    """Reconstruct channels as the BS does, from the reports alone; with --truth also their NMSE.

    Example: csimodels decode site.csif restored.h5 --model runs/llmcsinet/model.safetensors --truth site.h5
    """
    with reported():
        from csimodels.feedback import decode_file, load_llmcsinet

        if threads:
            torch.set_num_threads(threads)
        result = decode_file(load_llmcsinet(model), source, out, truth=truth)
        console.print(f"wrote {result['samples']} samples to {out}", soft_wrap=True)
        if "nmse_db" in result:
            console.print(f"NMSE {result['nmse_db']:.2f} dB, SGCS {result['sgcs']:.3f}", soft_wrap=True)
        if result.get("left_out"):
            console.print(f"left out of these: {result['left_out']} samples of no energy", soft_wrap=True)
