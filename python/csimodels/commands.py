"""The ``csimodels`` command line."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import csikernels
from csimodels import codebook_training_command  # noqa: F401  registers itself with codebook_app
from csimodels.codebook_commands import codebook_app, feedback_app
from csimodels.console import (
    OneLineErrors,
    Threads,
    console,
    errors,
    print_scores,
    progress,
    reported,
    training_progress,
)
from csimodels.feedback_commands import decode, encode, train
from csimodels.files import digest, write_json, write_text
from csimodels.multitask_commands import detect, multitask_app, precode, predict

app = typer.Typer(
    name="csimodels",
    cls=OneLineErrors,
    help="Models, channels and experiments for AI-based CSI feedback. Start with: csimodels demo\n\n"
    "For a site of your own: generate (or write) a file of its channels, adapt to it, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Preset = Annotated[str, typer.Option(help="laptop (for two CPU cores) or paper (the paper's sizes and epochs)")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default: one per core")]
OutFolder = Annotated[Path, typer.Option(file_okay=False, help="output folder; an interrupted run there is continued")]
EnvironmentIndex = Annotated[int | None, typer.Option(min=1, help="or: index of a built-in environment, such as 1201")]
BasePath = Annotated[Path | None, typer.Option(help="checkpoint of the base model (LAM); default: the shipped one")]
ReferencePath = Annotated[
    Path | None, typer.Option(help="checkpoint of the reference model (SAM); default: the shipped one")
]


@app.command()
def info() -> None:
    """Show versions, the kernels' backends on this machine, and what optional extras are installed.

    Example: csimodels info
    """
    from importlib.util import find_spec

    table = Table("build", "value")
    for name, value in csikernels.build_info().items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        table.add_row(name, "-" if text in (None, "") else str(text))
    console.print(table)
    table = Table("op", "cpu", "cuda", title="backends, best first")
    for name, devices in csikernels.backends().items():
        table.add_row(name, *(", ".join(devices[device]) or "-" for device in ("cpu", "cuda")))
    console.print(table)
    extras = {"sionna": "sionna", "raytracing": "mitsuba", "llm": "transformers", "cuda": "cupy"}
    table = Table("extra", "installed")
    for extra, module in extras.items():
        table.add_row(extra, "yes" if find_spec(module) else f"no: pip install 'csikernels\\[{extra}]'")
    console.print(table)


def _parse_indices(text: str) -> list[int]:
    """``"1-100,105"`` -> indices."""
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"environments: expected numbers from 1 and ascending ranges such as 1-100,105, got {text!r}"
            )
        indices += range(first, last + 1)
    return indices


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="HDF5 file to write, such as site.h5")],
    environments: Annotated[
        str | None, typer.Option(help="indices, such as 1-100,105; odd are NLOS, even LOS; default: 101-110")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="UE positions per environment; with --channels, in all")] = 1000,
    generator: Annotated[str, typer.Option(help="builtin, or sionna (needs the extra sionna)")] = "builtin",
    seed: Annotated[int, typer.Option(min=0, help="seed of the cell that the environments lie in")] = 0,
    patches: Annotated[int, typer.Option(min=1, help="independent ray sets per environment")] = 1,
    channels: Annotated[
        str | None,
        typer.Option(
            help="instead of environments: LLMCsiNet's set indoor_los, outdoor_nlos, uma_28ghz (needs the extra "
            "sionna) or raytraced (needs the extra raytracing), with its 1,024 subcarriers; or LVM4CF's set "
            "codebook:uma_28ghz_site, codebook:uma_28ghz, codebook:rma_28ghz, codebook:uma_3.5ghz or "
            "codebook:rma_3.5ghz, with 128 ports and one subcarrier"
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="of --channels: train, validation or test")] = "test",
) -> None:
    """Draw channels of LASCO's setting (32 antennas, 32 subcarriers, 2.655 GHz, UMi) into an HDF5 file.

    With --channels, those of one of LLMCsiNet's sets.

    Example: csimodels generate site.h5 --environments 1301 --samples 3000
    """
    with reported():
        from csimodels.channels.environment import CellConfig
        from csimodels.channels.presets import generate_dataset

        if channels is not None:
            if environments is not None or (generator, seed, patches) != ("builtin", 0, 1):
                raise ValueError("channels: expected no --environments, --generator, --seed or --patches beside it")
            _generate_set(out, channels, split, samples)
            return
        indices = _parse_indices("101-110" if environments is None else environments)
        with progress("generating") as update:
            generate_dataset(
                out, CellConfig(patches=patches), seed, indices, samples, generator=generator, progress=update
            )
        count = f"{len(indices)} environment{'s' if len(indices) > 1 else ''}"
        console.print(f"wrote {len(indices) * samples} samples of {count} to {out}", soft_wrap=True)


def _generate_set(out: Path, name: str, split: str, samples: int) -> None:
    from csimodels.channels.angle_delay_sets import angle_delay_preset
    from csimodels.channels.codebook_data import codebook_set

    family, separator, rest = name.partition(":")
    if separator and family == "codebook":
        codebook_set(rest).write(out, split, samples)
    else:
        chosen = angle_delay_preset(name)
        reason = chosen.unavailable()
        if reason is not None:
            raise ValueError(f"channels: {name}: {reason}")
        with progress("generating") as update:
            chosen.write(out, split, samples, progress=update)
    console.print(f"wrote {samples} samples of {name} ({split}) to {out}", soft_wrap=True)


@app.command()
def pretrain(
    model: Annotated[str, typer.Option(help="base (the LAM) or reference (the SAM)")],
    out: OutFolder,
    preset: Preset = "laptop",
    codeword_length: Annotated[int, typer.Option(help="M, the reals fed back per sample: 1 to 2048")] = 256,
    data: Annotated[Path | None, typer.Option(help="HDF5 file to train on, split 8:1:1; default: the preset's")] = None,
    initial: Annotated[Path | None, typer.Option(help="checkpoint to start from, of any codeword length")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the data; default: the preset's")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="samples per step, over all processes; default: the preset's")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak learning rate; default: the preset's")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="seed of weights and batch order; default: the preset's")
    ] = None,
    threads: Threads = None,
) -> None:
    """Pre-train LASCO's base LAM or reference SAM (step 1). Scales out under torchrun or accelerate launch.

    Example: csimodels pretrain --model reference --out runs/reference
    """
    with reported():
        from csimodels.training.lasco_presets import pretrain_data, pretrain_task, split_data
        from csimodels.training.loop import make_accelerator
        from csimodels.training.pretrain import pretrain as run

        if threads:
            torch.set_num_threads(threads)
        changes: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        task = pretrain_task(
            model, preset, codeword_length, initial_checkpoint=None if initial is None else str(initial), **changes
        )
        accelerator = make_accelerator(task.train)
        if data is None:
            source = pretrain_data(preset, continued=initial is not None)
        else:
            source = split_data(_read_channels(data), {"file": str(data), "sha256": digest(data)})
        with training_progress(f"pre-training {model}") as on_step:
            result = run(
                task,
                source.source,
                source.validation,
                out,
                accelerator=accelerator,
                data_description=source.description,
                on_step=on_step,
            )
        if accelerator.is_main_process:
            console.print(
                f"validation NMSE {result.best_validation:.2f} dB (epoch {result.best_epoch} of {result.epochs}, "
                f"{result.seconds:.0f} s); wrote {out}/model.safetensors",
                soft_wrap=True,
            )


def _read_channels(path: Path, *, one_environment: bool = False) -> torch.Tensor:
    """All channels of a project HDF5 file, checked."""
    from csimodels.channels.hdf5 import ChannelReader

    with ChannelReader(path) as reader:
        indices = sorted(set(reader.environment.tolist()))
        if one_environment and len(indices) > 1:
            raise ValueError(
                f"{path}: expected one environment to adapt to, got {len(indices)}; make a file of one with "
                f"csimodels generate FILE --environments {indices[0]} --samples 3000"
            )
        return reader.read()


def _load_models(base: Path | None, reference: Path | None) -> tuple[Any, Any, Any, dict[str, str]]:
    """Frozen base and reference, their codec, and what identifies the files."""
    from csimodels.assets import shipped_checkpoint
    from csimodels.models.projection import RandomProjectionCodec
    from csimodels.training.checkpoint import freeze, load_checkpoint

    base, reference = base or shipped_checkpoint("base"), reference or shipped_checkpoint("reference")
    base_model, codec, _ = load_checkpoint(base)
    reference_model, _, _ = load_checkpoint(reference, codec=codec)
    identity = {"base": digest(base), "reference": digest(reference)}
    return freeze(base_model), freeze(reference_model), RandomProjectionCodec(codec), identity


def _channels(
    data: Path | None, environment: int | None, count: int, draw: int, *, one_environment: bool = False
) -> tuple[torch.Tensor, dict[str, Any]]:
    """All channels of a file, or ``count`` positions of a built-in environment; and what identifies them."""
    from csimodels.channels.environment import CellConfig, Environment

    if data is not None and environment is None:
        return _read_channels(data, one_environment=one_environment), {"sha256": digest(data)}
    if data is None and environment is not None:
        return Environment(CellConfig(), environment, 0).sample(count, seed=draw), {"environment": environment}
    raise ValueError("data, environment: expected exactly one of --data FILE and --environment INDEX")


def _sites(
    data: Path | None, environment: int | None, environments: str | None, count: int
) -> list[tuple[int | None, torch.Tensor, dict[str, Any]]]:
    """What to adapt to: environment (None where the call is about one), its channels, and what identifies them."""
    from csimodels.channels.hdf5 import ChannelReader

    if environments is None:
        return [(None, *_channels(data, environment, count, draw=0, one_environment=True))]
    if environment is not None:
        raise ValueError("environment, environments: expected one of them, got both")
    indices = _parse_indices(environments)
    if len(set(indices)) < len(indices):
        raise ValueError(f"environments: expected each once, got {environments!r}")
    if data is None:
        return [(index, *_channels(None, index, count, draw=0)) for index in indices]
    source = {"sha256": digest(data)}
    with ChannelReader(data) as reader:
        missing = sorted(set(indices) - set(reader.environment.tolist()))
        if missing:
            raise ValueError(f"{data}: expected environments {environments}, it has no {missing[0]}")
        return [
            (index, reader.read(reader.environment == index), {**source, "environment": index}) for index in indices
        ]


def _adapt_config(preset: str, method: str, initial: str, alpha: float | None) -> Any:
    from csimodels.models.lasco import ADAPTED_METHODS
    from csimodels.training.adapt import AdaptConfig
    from csimodels.training.lasco_presets import check_preset

    check_preset(preset)
    if method not in ADAPTED_METHODS:
        raise ValueError(f"method: expected one of {', '.join(ADAPTED_METHODS)}, got {method!r}")
    changes: dict[str, Any] = {"initial": initial}
    if alpha is not None:
        if method not in ("lasco", "e_lasco"):
            raise ValueError(f"alpha: expected none for {method}, which has no coefficient, got {alpha}")
        changes["initial_alpha" if method == "e_lasco" else "alpha"] = alpha
    return AdaptConfig.paper(**changes) if preset == "paper" else AdaptConfig.laptop(**changes)


@app.command()
def adapt(
    out: OutFolder,
    data: Annotated[Path | None, typer.Option(help="HDF5 file with one environment's channels")] = None,
    environment: EnvironmentIndex = None,
    environments: Annotated[
        str | None,
        typer.Option(help="several at once, such as 1301-1308: of the file, or built-in; a folder for each in --out"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="e_lasco (learns how much of the large model to use), lasco (with a fixed alpha), "
            "lasco_no_reference, baseline_a (random start) or finetuned_sam (the small model alone)"
        ),
    ] = "e_lasco",
    base: BasePath = None,
    reference: ReferencePath = None,
    preset: Preset = "laptop",
    initial: Annotated[str, typer.Option(help="what the networks start from: pinv (the paper) or lmmse")] = "pinv",
    alpha: Annotated[
        float | None, typer.Option(help="lasco's coefficient (default 0.7), or where e_lasco starts (default 1)")
    ] = None,
    train: Annotated[int | None, typer.Option(min=2, help="training samples, the first; default: the preset's")] = None,
    validation: Annotated[
        int | None, typer.Option(min=1, help="validation samples, the next ones; default: the preset's")
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="test samples, after these; default: the preset's")] = None,
    threads: Threads = None,
) -> None:
    """Adapt a small model to one environment (step 2); writes proxy.safetensors and result.json.

    With --environments one for each, trained together: on a CPU several times faster than one after the other.

    Example: csimodels adapt --data site.h5 --out runs/site
    """
    with reported():
        from csimodels.channels.presets import data_preset
        from csimodels.training.adapt import Adapter, EnvironmentData
        from csimodels.training.loop import make_accelerator

        config = _adapt_config(preset, method, initial, alpha)
        if threads:
            torch.set_num_threads(threads)
        defaults = data_preset(preset).adaptation_samples
        counts = (train or defaults[0], validation or defaults[1], test or defaults[2])
        sites = _sites(data, environment, environments, sum(counts))
        base_model, reference_model, codec, identity = _load_models(base, reference)
        accelerator = make_accelerator(config.train)
        adapters, folders, descriptions = [], [], []
        for index, h, source in sites:
            split = EnvironmentData.split(h, *counts)
            adapters.append(Adapter(base_model, reference_model, codec, split, config, accelerator=accelerator))
            folders.append(out if index is None else out / str(index))
            descriptions.append({**source, **identity, "split": counts})
        with console.status(f"adapting {method} ..."):
            results = _adapt_all(adapters, method, out, folders, descriptions)
        if not accelerator.is_main_process:
            return
        for adapter, folder, description, (result, proxy) in zip(adapters, folders, descriptions, results, strict=True):
            if folder != out:
                console.print(f"environment {folder.name}")
            _write_adapted(adapter, method, preset, folder, description, result, proxy)


def _adapt_all(
    adapters: Sequence[Any], method: str, out: Path, folders: Sequence[Path], descriptions: Sequence[dict[str, Any]]
) -> list[tuple[Any, Any]]:
    """Result and proxy of each environment: all in one bank where that is faster, else one after the other."""
    from csimodels.training.adapt_together import Adaptation, adapt_together, can_adapt_together

    if can_adapt_together(adapters[0]):
        together = [Adaptation(adapter, method) for adapter in adapters]
        return adapt_together(together, run_dir=out, description={"environments": list(descriptions)})
    return [
        adapter.adapt(method, run_dir=folder, description=description)
        for adapter, folder, description in zip(adapters, folders, descriptions, strict=True)
    ]


def _write_adapted(
    adapter: Any, method: str, preset: str, out: Path, description: dict[str, Any], result: Any, proxy: Any
) -> None:
    from csimodels.training.proxy_file import save_proxy

    scores = {name: dataclasses.asdict(adapter.score(name)) for name in ("pretrained_lam", "pretrained_sam")}
    scores[method] = dataclasses.asdict(result)
    initial = adapter.config.initial
    lmmse = adapter.lmmse if initial == "lmmse" else None
    extra = {"result": scores[method], "data": description}
    save_proxy(out / "proxy.safetensors", proxy, adapter.codec.config, lmmse=lmmse, extra=extra)
    write_json(out / "result.json", {"preset": preset, "initial": initial, "methods": scores})
    print_scores(scores)
    console.print(f"wrote {out}/proxy.safetensors and {out}/result.json", soft_wrap=True)


def _without_adapted(h: torch.Tensor, data: Path, used: int, environment: int | None) -> torch.Tensor:
    """``h``, all channels of ``data``, without those that a proxy saw: the first ones (of one of its environments)."""
    from csimodels.channels.hdf5 import ChannelReader

    if environment is None:
        console.print(f"left out: the first {used} samples, which the proxy was adapted on")
        return h[used:]
    console.print(f"left out: the first {used} samples of environment {environment}, which the proxy was adapted on")
    with ChannelReader(data) as reader:
        own = torch.from_numpy(reader.environment == environment)
    return h[~own | (own.cumsum(0) > used)]


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="HDF5 file with channels")] = None,
    environment: EnvironmentIndex = None,
    proxy: Annotated[Path | None, typer.Option(help="adapted proxy.safetensors to score beside the models")] = None,
    base: BasePath = None,
    reference: ReferencePath = None,
    samples: Annotated[int, typer.Option(min=1, help="positions drawn with --environment (fresh ones)")] = 1000,
    threads: Threads = None,
) -> None:
    """Score the pre-trained models, and an adapted proxy, on channels: NMSE and GCS.

    Samples of a file that the proxy was adapted on are left out.

    Example: csimodels evaluate --data site.h5 --proxy runs/site/proxy.safetensors
    """
    with reported():
        from csimodels.training.proxy_file import load_proxy
        from csimodels.training.score import score_models

        if threads:
            torch.set_num_threads(threads)
        # Draw 0 is what `adapt --environment` trains and tests on; these positions are new to it.
        h, source = _channels(data, environment, samples, draw=10**6)
        base_model, reference_model, codec, identity = _load_models(base, reference)
        if proxy is not None:
            origin = load_proxy(proxy, codec=codec.config)[2].get("data", {})
            if any(origin.get(name, value) != value for name, value in identity.items()):
                raise ValueError(f"{proxy}: adapted beside other models; give its --base and --reference")
            if data is not None and origin.get("sha256") == source["sha256"]:
                h = _without_adapted(h, data, sum(origin["split"][:2]), origin.get("environment"))
        print_scores(score_models(base_model, reference_model, codec, h, proxy))


for command in (train, encode, decode, predict, precode, detect):
    app.command()(command)
app.add_typer(codebook_app, name="codebook")
app.add_typer(feedback_app, name="feedback")
app.add_typer(multitask_app, name="multitask")


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(help="which one; --list names them all")] = None,
    preset: Preset = "laptop",
    out: Annotated[Path, typer.Option(file_okay=False, help="output folder, shared by all experiments")] = Path(
        "runs/experiments"
    ),
    workers: Workers = None,
    channels: Annotated[
        list[str] | None,
        typer.Option(
            help="for llmcsinet-*, repeatable: sets in place of the preset's, the first for most figures: indoor_los, "
            "outdoor_nlos, uma_28ghz, raytraced, or NAME=PATH of your own files (a folder of COST 2100 .mat files, of "
            "train.h5, validation.h5 and test.h5, or of a DeepMIMO scenario; or one .mat or .h5 file)"
        ),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="name every experiment with its figure")] = False,
) -> None:
    """Run a paper's experiment; writes NAME.json, NAME.md and NAME.png. Interrupted runs continue.

    Example: csimodels experiment lasco-fig6
    """
    with reported():
        from csimodels.evaluation.experiments import EXPERIMENTS
        from csimodels.evaluation.outcome import Context

        if show_list:
            table = Table("experiment", "what")
            for key, entry in EXPERIMENTS.items():
                table.add_row(key, entry.description)
            console.print(table)
            return
        if name is None:
            raise ValueError("name: expected an experiment; csimodels experiment --list names them")
        if name not in EXPERIMENTS:
            raise ValueError(f"name: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
        chosen = EXPERIMENTS[name]
        with progress(name) as update:
            context = Context(
                preset,
                out,
                workers,
                tuple(channels or ()),
                on_start=errors.print,
                on_step=lambda step, total, loss: update(step, total, f"training, loss {loss:.4f}"),
                on_done=lambda done, total, task: update(done, total),
            )
            outcome = chosen.run(context)
        report = f"# {chosen.description}\n\nPreset: {preset}.\n\n{outcome.report}"
        write_json(out / f"{name}.json", {"experiment": name, "preset": preset, "rows": outcome.rows})
        write_text(out / f"{name}.md", report)
        written = [f"{out}/{name}.json", f"{out}/{name}.md"]
        if outcome.draw is not None:
            written.append(str(outcome.draw(out)))
        console.print(report, markup=False, soft_wrap=True)
        console.print(f"wrote {', '.join(written[:-1])} and {written[-1]}", soft_wrap=True)


@app.command()
def demo(
    out: OutFolder = Path("runs/demo"),
    workers: Workers = None,
) -> None:
    """Adapt the shipped large model to four environments it has never seen, and compare all methods.

    Example: csimodels demo
    """
    with reported():
        from csimodels.evaluation.demo import run_demo, table_rows

        with progress("adapting") as update:
            report = run_demo(out, workers=workers, on_done=lambda done, total, task: update(done, total))
        header, rows = table_rows(report)
        table = Table(*header, title=f"CSI reconstruction from M = {report['codeword_length']} of 2048 reals")
        for row in rows:
            table.add_row(*("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        console.print(f"wrote {out}/report.json, report.md, methods.png, alpha.png and channels.png", soft_wrap=True)
