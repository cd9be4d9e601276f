"""The commands of the physical-layer tasks: ``multitask generate`` and ``train``, and one command per task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from csimodels.console import Threads, console, reported, training_progress
from csimodels.options import family_and_source, replace_given

multitask_app = typer.Typer(
    help="Channel prediction, signal detection and multi-user precoding by one language model. Start with: csimodels "
    "multitask train",
    no_args_is_help=True,
)
Model = Annotated[Path, typer.Option("--model", help="model.safetensors of csimodels multitask train or experiment")]
Merged = Annotated[bool, typer.Option(help="add the low-rank matrices to the weights first")]
Written = Annotated[Path, typer.Argument(dir_okay=False, help="file to write: .safetensors, .npz or .mat")]
_ADAPTATIONS = ("loftq", "qlora", "lora", "full")


@multitask_app.command()
def generate(
    out: Written,
    task: Annotated[str, typer.Option(help="predict, detect or precode")],
    channels: Annotated[str, typer.Option(help="uma_nlos or umi_nlos")] = "uma_nlos",
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="UEs to predict, or groups of UEs")] = 100,
    users: Annotated[int, typer.Option(min=1, help="K, of detect and precode")] = 4,
    speed: Annotated[float | None, typer.Option(help="of the UEs to predict, km/h; default: 10 to 100")] = None,
    antennas: Annotated[int, typer.Option(min=1, help="of the 128, drawn for each UE to predict")] = 4,
    snr_db: Annotated[float, typer.Option(help="of histories, and of received signals at one antenna")] = 20.0,
    order: Annotated[int, typer.Option(help="of the QAM")] = 16,
    generator: Annotated[str, typer.Option(help="builtin, or sionna (needs the extra sionna)")] = "builtin",
) -> None:
    """Draw what a task starts from, and its true outcome: histories, channels, received signals.

    Example: csimodels multitask generate histories.safetensors --task predict
    """
    with reported():
        from csimodels.channels.multitask_data import multitask_set, multiuser_channels, prediction_channels
        from csimodels.channels.multitask_file import write_multitask
        from csimodels.channels.transmission import add_noise, draw_uplink
        from csimodels.evaluation.detection import qam_modulate
        from csimodels.models.multitask import TASKS
        from csimodels.training.multitask_data import SLOTS, served

        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        noise = torch.Generator().manual_seed(0)
        parameters: dict[str, Any] = {"channels": channels, "split": split, "generator": generator}
        arrays: dict[str, torch.Tensor]
        if task == "predict":
            kept: dict[str, Any] = {"speed_kmh": speed, "antennas": antennas, "generator": generator}
            h, speeds = prediction_channels(channels, split, samples, **kept)
            known = multitask_set(channels).history
            history, future = h[:, :, :known], h[:, :, known:]
            # Each antenna's history has the SNR, as in training and tests.
            heard = add_noise(history.flatten(0, 1), snr_db, noise).unflatten(0, history.shape[:2])
            arrays = {"history": heard, "future": future, "speed_kmh": speeds}
            parameters["snr_db"] = snr_db
        else:
            h = served(multiuser_channels(channels, split, samples, users=users, generator=generator), users)
            arrays = {"channels": h}
            if task == "detect":
                y, symbols, noise_power = draw_uplink(h, SLOTS, order, snr_db, noise)
                arrays |= {"received": y, "noise_power": noise_power, "symbols": qam_modulate(symbols, order)}
                parameters |= {"snr_db": snr_db, "order": order}
        write_multitask(out, arrays, parameters)
        console.print(f"wrote {', '.join(arrays)} of {samples} samples of {channels} to {out}", soft_wrap=True)


@multitask_app.command()
def train(
    out: Annotated[Path, typer.Argument(file_okay=False, help="output folder; an interrupted run there is continued")],
    model: Annotated[
        str,
        typer.Option(
            help="multitask, or one to compare with: rnn, lstm, gru, transformer, llm4cp; cnn; dnn, detnet, oampnet"
        ),
    ] = "multitask",
    tasks: Annotated[
        str | None, typer.Option(help="of multitask: some of predict,detect,precode; default: all")
    ] = None,
    preset: Annotated[str, typer.Option(help="laptop (for two CPU cores) or paper (the paper's sizes)")] = "laptop",
    adaptation: Annotated[
        str | None,
        typer.Option(help="of the backbone: loftq or qlora (4-bit weights), lora, full; default: the preset's"),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="family:source, such as gpt2:openai-community/gpt2, llama:FOLDER, qwen:FOLDER or "
            "bert:all-minilm-l6-v2 (offline); random draws the preset's, none leaves it out; default: the preset's"
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="of --backbone; default: the preset's")] = None,
    channels: Annotated[str | None, typer.Option(help="uma_nlos or umi_nlos; default: the preset's")] = None,
    samples: Annotated[int | None, typer.Option(min=10, help="per task; default: the preset's")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="in all; default: the preset's")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="samples per task and step; default: the preset's")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate; default: the preset's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights and batch order")] = 0,
    threads: Threads = None,
) -> None:
    """Train the multi-task network, or one that does one of its tasks; writes model.safetensors and log.json.

    Example: csimodels multitask train runs/multitask
    """
    with reported():
        from csimodels.models.multitask import TASKS
        from csimodels.models.multitask_baselines import MULTITASK
        from csimodels.training.loop import make_accelerator
        from csimodels.training.multitask import train_multitask
        from csimodels.training.multitask_presets import multitask_preset

        if threads:
            torch.set_num_threads(threads)
        sizes = multitask_preset(preset)
        validation = None if samples is None else max(1, samples // 5)
        drawn = replace_given(sizes.samples, name=channels, train=samples, validation=validation)
        sizes = dataclasses.replace(sizes, samples=drawn)
        if layers is not None and backbone in (None, "none"):
            raise ValueError(f"layers: expected only with a --backbone, got {layers}")
        if backbone == "none" and adaptation is not None:
            raise ValueError(f"adaptation: expected none without a backbone, got {adaptation!r}")
        if model == MULTITASK:
            chosen: dict[str, Any] = {}
            if adaptation is not None:
                chosen["adaptation"] = _adaptation(adaptation, sizes.rank)
            if backbone is not None:
                chosen["backbone"] = _backbone(sizes, backbone, layers)
            parts = None if tasks is None else tuple(part.strip() for part in tasks.split(","))
            training = sizes.multitask(parts or TASKS, seed=seed, **chosen)
        elif (adaptation, backbone, tasks) != (None, None, None):
            raise ValueError(f"adaptation, backbone, tasks: expected none for {model}, which has nothing to choose")
        else:
            training = sizes.baseline(model, seed=seed)
        training = training.optimised(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
        accelerator = make_accelerator(training.train)
        with training_progress(f"training {model}") as on_step:
            train_multitask(training, out, out / "channels", accelerator=accelerator, on_step=on_step)
        if accelerator.is_main_process:
            console.print(f"wrote {out}/model.safetensors", soft_wrap=True)


def _adaptation(name: str, rank: int) -> Any:
    from csimodels.training.multitask_file import Adaptation

    if name not in _ADAPTATIONS:
        raise ValueError(f"adaptation: expected one of {', '.join(_ADAPTATIONS)}, got {name!r}")
    return None if name == "full" else Adaptation(name, rank)


def _backbone(sizes: Any, text: str, layers: int | None) -> Any:
    """``"family:source"``, ``"random"`` or ``"none"`` -> the backbone's configuration."""
    from csimodels.models.language_backbone import LanguageConfig

    if text == "none":
        return None
    preset = sizes.random_backbone()
    if text == "random":
        return dataclasses.replace(preset, layers=layers or preset.layers)
    family, source = family_and_source(text, "family:source, random or none")
    return LanguageConfig(family=family, source=source, layers=layers or preset.layers)


def predict(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="file with history")],
    out: Written,
    model: Model,
    merged: Merged = False,
    threads: Threads = None,
) -> None:
    """Predict the next slots of channels; if the file has the future too, print the NMSE.

    Example: csimodels predict histories.safetensors future.safetensors --model runs/multitask/model.safetensors
    """
    with reported():
        from csimodels.multitask_inference import predict_file

        result = predict_file(_load(model, merged, threads), source, out)
        _tell(result, out, {"nmse_db": "NMSE {:.2f} dB"})


def precode(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="file with channels")],
    out: Written,
    model: Model,
    power_dbw: Annotated[float, typer.Option(help="P_max, total transmit power, dBW")] = 0.0,
    noise_dbw: Annotated[float, typer.Option(help="noise at each user, dBW")] = -10.0,
    merged: Merged = False,
    threads: Threads = None,
) -> None:
    """Design multi-user precoders and print their mean sum rate.

    Example: csimodels precode channels.safetensors precoders.safetensors --model runs/multitask/model.safetensors
    """
    with reported():
        from csimodels.multitask_inference import precode_file

        power, noise_power = 10 ** (power_dbw / 10), 10 ** (noise_dbw / 10)
        network = _load(model, merged, threads)
        result = precode_file(network, source, out, power=power, noise_power=noise_power)
        _tell(result, out, {"rate": "mean sum rate {:.2f} bit/s/Hz"})


def detect(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="file with channels, received and noise_power")],
    out: Written,
    model: Model,
    merged: Merged = False,
    threads: Threads = None,
) -> None:
    """Detect uplink symbols; if the file has the true ones too, print NMSE and symbol error ratio.

    Example: csimodels detect received.safetensors symbols.safetensors --model runs/multitask/model.safetensors
    """
    with reported():
        from csimodels.multitask_inference import detect_file

        result = detect_file(_load(model, merged, threads), source, out)
        _tell(result, out, {"nmse": "NMSE {:.4f}", "ser": "SER {:.5f}"})


def _load(model: Path, merged: bool, threads: int | None) -> Any:
    from csimodels.multitask_inference import load_network

    if threads:
        torch.set_num_threads(threads)
    return load_network(model, merged=merged)


def _tell(result: dict[str, Any], out: Path, forms: dict[str, str]) -> None:
    told = [form.format(result[name]) for name, form in forms.items() if name in result]
    console.print(", ".join([f"wrote {result['samples']} samples to {out}", *told]), soft_wrap=True)
