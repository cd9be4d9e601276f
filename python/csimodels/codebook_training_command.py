"""The command ``codebook train``: a network refines a codebook for the channels of a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from csimodels.codebook_commands import (
    Ports,
    Variable,
    codebook_app,
    load_book,
    parse_ports,
    training_channels,
)
from csimodels.console import Threads, console, reported, training_progress
from csimodels.files import digest
from csimodels.options import replace_given

_DEPLOYMENTS = {"SS": "single_side", "DS": "dual_side"}


@codebook_app.command()
def train(
    out: Annotated[Path, typer.Argument(file_okay=False, help="output folder; an interrupted run there is continued")],
    channels: Annotated[
        Path, typer.Option(help="channels to train on, split 8:1:1: HDF5, .mat, .npz or .safetensors, complex [N, D]")
    ],
    network: Annotated[str, typer.Option(help="lvm4cf, llm, transformer or fc")] = "lvm4cf",
    deployment: Annotated[
        str, typer.Option(help="DS (both ends get the new codebook) or SS (UEs keep the old one)")
    ] = "DS",
    start: Annotated[
        Path | None, typer.Option(help="codebook that both ends have; default: random words (rvq) of --bits")
    ] = None,
    bits: Annotated[int, typer.Option(help="B of the default codebook, 1 to 20")] = 8,
    ports: Ports = "2x8x8",
    preset: Annotated[str, typer.Option(help="laptop (for two CPU cores) or paper (the paper's sizes)")] = "laptop",
    initial: Annotated[
        Path | None, typer.Option(help="model.safetensors of an SS training elsewhere to fine-tune at this site")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="in all; default: the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="channels per step; default: the preset's")] = None,
    variable: Variable = "h",
    seed: Annotated[int, typer.Option(min=0, help="of weights, batch order and the default codebook")] = 0,
    threads: Threads = None,
) -> None:
    """Train a network to refine a codebook; writes codebook.safetensors and log.json.

    Example: csimodels codebook train runs/book --channels site.h5 --bits 8
    """
    with reported():
        from csimodels.channels.presets import split_811
        from csimodels.models.codebook_file import FeedbackCodebook
        from csimodels.models.codebooks import rvq_codebook
        from csimodels.training.codebook_training import CodebookData, enhance_codebook
        from csimodels.training.loop import make_accelerator

        if threads:
            torch.set_num_threads(threads)
        if deployment not in _DEPLOYMENTS:
            raise ValueError(f"deployment: expected {' or '.join(_DEPLOYMENTS)}, got {deployment!r}")
        layout = parse_ports(ports)
        if start is None:
            words = rvq_codebook(bits, len(layout), seed=seed)
            conventional = FeedbackCodebook(words, "rvq", layout, source={"seed": seed})
        else:
            conventional = load_book(start, layout)
        training = _training(preset, network, deployment, layout, initial, epochs, batch_size, seed)
        h = training_channels(channels, layout, variable)
        first, second, _ = split_811(len(h), seed=0)
        data = CodebookData(h[first], h[second], {"sha256": digest(channels), "split": "8:1:1"})
        accelerator = make_accelerator(training.train)
        with training_progress(f"training {network}", lambda loss: f"cosine {-loss:.4f}") as on_step:
            enhanced = enhance_codebook(training, conventional, data, out, accelerator=accelerator, on_step=on_step)
        if accelerator.is_main_process:
            before = enhanced.history[0]["validation"]
            console.print(
                f"mean cosine {enhanced.validation:.4f} on the validation channels ({before:.4f} before); wrote "
                f"{out}/codebook.safetensors",
                soft_wrap=True,
            )


def _training(
    preset: str,
    network: str,
    deployment: str,
    layout: Any,
    initial: Path | None,
    epochs: int | None,
    batch_size: int | None,
    seed: int,
) -> Any:
    """The preset's :class:`CodebookTraining` for the array, with what the caller changes."""
    from csimodels.training.lvm4cf_presets import codebook_preset

    training = codebook_preset(preset).training(
        network, _DEPLOYMENTS[deployment], initial=None if initial is None else str(initial), seed=seed
    )
    # What is not a whole number of the preset's intervals is one interval.
    intervals = training.update_interval
    if epochs is not None and epochs % intervals:
        intervals = epochs
    return dataclasses.replace(
        training,
        network=dataclasses.replace(training.network, dimension=len(layout), polarisations=layout.polarisations),
        train=replace_given(training.train, epochs=epochs, batch_size=batch_size),
        update_interval=intervals,
    )
