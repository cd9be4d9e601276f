"""The ``csimodels`` command line."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import csikernels

app = typer.Typer(
    name="csimodels",
    help="Models, channels and experiments for AI-based CSI feedback. Start with: csimodels demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
_errors = Console(stderr=True)

Preset = Annotated[str, typer.Option(help="laptop (minutes on two CPU cores) or paper (the paper's sizes and epochs)")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default: one per core")]
BasePath = Annotated[Path | None, typer.Option(help="base LAM checkpoint; default: the one shipped in the package")]
ReferencePath = Annotated[Path | None, typer.Option(help="reference SAM checkpoint; default: the shipped one")]


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn expected failures into one line on stderr and an exit code: 2 for bad input, 1 for the rest."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError) as error:
        _errors.print(f"[bold red]error:[/] {_one_line(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (RuntimeError, OSError, FloatingPointError) as error:
        _errors.print(f"[bold red]error:[/] {_one_line(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()) or type(error).__name__)


@contextlib.contextmanager
def _progress(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar; yields ``update(done, total, detail="")``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_errors) as progress:
        bar = progress.add_task(description, total=None)

        def update(done: int, total: int, detail: str = "") -> None:
            progress.update(bar, completed=done, total=total, description=f"{description} {detail}".rstrip())

        yield update


@app.command()
def info() -> None:
    """Show versions, the kernels' backends on this machine, and what optional extras are installed."""
    from importlib.util import find_spec

    table = Table("build", "value")
    for name, value in csikernels.build_info().items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    console.print(table)
    table = Table("op", "cpu", "cuda")
    for name, devices in csikernels.backends().items():
        table.add_row(name, *(", ".join(devices[device]) or "-" for device in ("cpu", "cuda")))
    console.print(table)
    extras = {"sionna": "sionna", "llm": "transformers", "cuda": "cupy"}
    table = Table("extra", "installed")
    for extra, module in extras.items():
        table.add_row(extra, "yes" if find_spec(module) else f"no: pip install 'csikernels\\[{extra}]'")
    console.print(table)


def _parse_indices(text: str) -> list[int]:
    """``"1-100,105"`` -> indices."""
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or (last and int(last) < int(first)):
            raise ValueError(f"environments: expected numbers and ranges such as 1-100,105, got {text!r}")
        indices += range(int(first), int(last or first) + 1)
    return indices


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="HDF5 file to write")],
    environments: Annotated[str, typer.Option(help="indices, such as 1-100,105; odd are NLOS, even LOS")] = "101-110",
    samples: Annotated[int, typer.Option(min=1, help="UE positions per environment")] = 1000,
    generator: Annotated[str, typer.Option(help="builtin or sionna (needs the extra)")] = "builtin",
    seed: Annotated[int, typer.Option(min=0, help="of the cell")] = 0,
    patches: Annotated[int, typer.Option(min=1, help="independent ray sets per environment")] = 1,
) -> None:
    """Draw channels of LASCO's setting (32 antennas, 32 subcarriers, 2.655 GHz, UMi) into an HDF5 file."""
    with _reported():
        from csimodels.channels.environment import CellConfig
        from csimodels.channels.presets import generate_dataset

        indices = _parse_indices(environments)
        with _progress("generating") as update:
            generate_dataset(
                out, CellConfig(patches=patches), seed, indices, samples, generator=generator, progress=update
            )
        console.print(f"wrote {len(indices) * samples} samples of {len(indices)} environments to {out}")


@app.command()
def pretrain(
    model: Annotated[str, typer.Option(help="base (the LAM) or reference (the SAM)")],
    out: Annotated[Path, typer.Option(help="output folder; an interrupted run there is continued")],
    preset: Preset = "laptop",
    codeword_length: Annotated[int, typer.Option(help="M, 1 to 2048")] = 256,
    data: Annotated[Path | None, typer.Option(help="HDF5 file to train on, split 8:1:1; default: the preset's")] = None,
    initial: Annotated[Path | None, typer.Option(help="checkpoint to start from (any codeword length)")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="over all processes; default: the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="peak; default: the preset's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of weights and batch order")] = None,
    threads: Threads = None,
) -> None:
    """Pre-train LASCO's base LAM or reference SAM (step 1). Scales out under torchrun or accelerate launch."""
    with _reported():
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
        source = pretrain_data(preset) if data is None else split_data(_read_channels(data), {"file": str(data)})
        with _progress(f"pre-training {model}") as update:
            result = run(
                task,
                source.source,
                source.validation,
                out,
                accelerator=accelerator,
                data_description=source.description,
                on_step=lambda step, total, loss: update(step, total, f"loss {loss:.4f}"),
            )
        if accelerator.is_main_process:
            console.print(
                f"validation NMSE {result.best_validation:.2f} dB (epoch {result.best_epoch} of {result.epochs}, "
                f"{result.seconds:.0f} s); wrote {out}/model.safetensors"
            )


def _read_channels(path: Path) -> torch.Tensor:
    """All channels of a project HDF5 file, checked."""
    from csimodels.channels.hdf5 import ChannelReader

    with ChannelReader(path) as reader:
        return reader.read(slice(None))


def _load_models(base: Path | None, reference: Path | None) -> tuple[Any, Any, Any]:
    """Frozen base and reference and their codec."""
    from csimodels.assets import shipped_checkpoint
    from csimodels.models.projection import RandomProjectionCodec
    from csimodels.training.checkpoint import freeze, load_checkpoint

    base_model, codec, _ = load_checkpoint(base or shipped_checkpoint("base"))
    reference_model, _, _ = load_checkpoint(reference or shipped_checkpoint("reference"), codec=codec)
    return freeze(base_model), freeze(reference_model), RandomProjectionCodec(codec)


def _environment_channels(data: Path | None, environment: int | None, count: int, draw: int = 0) -> torch.Tensor:
    """One environment's channels: all of a file, or ``count`` positions of a built-in environment."""
    from csimodels.channels.environment import CellConfig, Environment

    if data is not None and environment is None:
        return _read_channels(data)
    if data is None and environment is not None:
        return Environment(CellConfig(), environment, 0).sample(count, seed=draw)
    raise ValueError("data, environment: expected exactly one of --data FILE and --environment INDEX")


@app.command()
def adapt(
    out: Annotated[Path, typer.Option(help="output folder; an interrupted run there is continued")],
    data: Annotated[Path | None, typer.Option(help="HDF5 file with one environment's channels")] = None,
    environment: Annotated[int | None, typer.Option(min=1, help="or: index of a built-in environment")] = None,
    method: Annotated[
        str, typer.Option(help="finetuned_sam, baseline_a, lasco_no_reference, lasco or e_lasco")
    ] = "e_lasco",
    base: BasePath = None,
    reference: ReferencePath = None,
    preset: Preset = "laptop",
    initial: Annotated[str, typer.Option(help="what the networks start from: pinv (the paper) or lmmse")] = "pinv",
    alpha: Annotated[float | None, typer.Option(help="LASCO's coefficient, or E-LASCO's start")] = None,
    train: Annotated[int, typer.Option(min=1, help="training samples")] = 1000,
    validation: Annotated[int, typer.Option(min=1, help="validation samples")] = 125,
    test: Annotated[int, typer.Option(min=1, help="test samples")] = 1000,
    threads: Threads = None,
) -> None:
    """Adapt a proxy SAM to one environment (step 2); writes proxy.safetensors and result.json."""
    with _reported():
        from csimodels.files import write_json
        from csimodels.models.lasco import ADAPTED_METHODS
        from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData
        from csimodels.training.lasco_presets import check_preset
        from csimodels.training.loop import make_accelerator
        from csimodels.training.proxy_file import save_proxy

        check_preset(preset)
        if method not in ADAPTED_METHODS:
            raise ValueError(f"method: expected one of {', '.join(ADAPTED_METHODS)}, got {method!r}")
        if threads:
            torch.set_num_threads(threads)
        changes: dict[str, Any] = {"initial": initial}
        if alpha is not None:
            changes["initial_alpha" if method == "e_lasco" else "alpha"] = alpha
        config = AdaptConfig.paper(**changes) if preset == "paper" else AdaptConfig.laptop(**changes)
        base_model, reference_model, codec = _load_models(base, reference)
        h = _environment_channels(data, environment, train + validation + test)
        accelerator = make_accelerator(config.train)
        split = EnvironmentData.split(h, train, validation, test)
        adapter = Adapter(base_model, reference_model, codec, split, config, accelerator=accelerator)
        with console.status(f"adapting {method} ..."):
            result, proxy = adapter.adapt(method, run_dir=out)
            scores = {name: dataclasses.asdict(adapter.score(name)) for name in ("pretrained_lam", "pretrained_sam")}
        scores[method] = dataclasses.asdict(result)
        if accelerator.is_main_process:
            lmmse = adapter.lmmse if initial == "lmmse" else None
            save_proxy(
                out / "proxy.safetensors",
                proxy,
                codec.config,
                lmmse=lmmse,
                extra={"result": scores[method]},
            )
            write_json(out / "result.json", {"preset": preset, "initial": initial, "methods": scores})
            _print_scores(scores)
            console.print(f"wrote {out}/proxy.safetensors and {out}/result.json")


def _print_scores(scores: dict[str, dict[str, Any]]) -> None:
    from csimodels.models.lasco import LABELS

    table = Table("method", "NMSE (dB)", "GCS", "epochs", "alpha")
    for name, score in scores.items():
        epochs, alpha = score.get("epochs"), score.get("alpha")
        table.add_row(
            LABELS[name],
            f"{score['nmse_db']:.2f}",
            f"{score['gcs']:.3f}",
            "-" if epochs is None else str(epochs),
            "-" if alpha is None else f"{alpha:.2f}",
        )
    console.print(table)


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="HDF5 file with channels")] = None,
    environment: Annotated[int | None, typer.Option(min=1, help="or: index of a built-in environment")] = None,
    proxy: Annotated[Path | None, typer.Option(help="adapted proxy.safetensors to score beside the models")] = None,
    base: BasePath = None,
    reference: ReferencePath = None,
    samples: Annotated[int, typer.Option(min=1, help="positions drawn with --environment (fresh ones)")] = 1000,
    threads: Threads = None,
) -> None:
    """Score the pre-trained models, and an adapted proxy, on channels: NMSE and GCS."""
    with _reported():
        from csimodels.training.score import score_models

        if threads:
            torch.set_num_threads(threads)
        # Draw 0 is what `adapt --environment` trains and tests on; these positions are new to it.
        h = _environment_channels(data, environment, samples, draw=10**6)
        base_model, reference_model, codec = _load_models(base, reference)
        _print_scores(score_models(base_model, reference_model, codec, h, proxy))


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(help="see --list")] = None,
    preset: Preset = "laptop",
    out: Annotated[Path, typer.Option(help="output folder, shared by all experiments")] = Path("runs/experiments"),
    workers: Workers = None,
    show_list: Annotated[bool, typer.Option("--list", help="name every experiment with its figure")] = False,
) -> None:
    """Run a paper's experiment; writes NAME.json, NAME.md and NAME.png. Interrupted runs continue."""
    with _reported():
        from csimodels.evaluation.lasco_experiments import EXPERIMENTS, settings
        from csimodels.files import write_json, write_text
        from csimodels.training.checkpoint_store import CheckpointStore

        if show_list:
            table = Table("experiment", "what")
            for key, (description, _) in EXPERIMENTS.items():
                table.add_row(key, description)
            console.print(table)
            return
        if name not in EXPERIMENTS:
            raise ValueError(f"name: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
        description, function = EXPERIMENTS[name]
        with _progress(name) as update:
            store = CheckpointStore(
                out / "checkpoints",
                preset,
                on_start=_errors.print,
                on_step=lambda step, total, loss: update(step, total, f"pre-training, loss {loss:.4f}"),
            )
            outcome = function(
                settings(preset, store, out, workers=workers, on_done=lambda done, total, task: update(done, total))
            )
        report = f"# {description}\n\nPreset: {preset}.\n\n{outcome.report}"
        write_json(out / f"{name}.json", {"experiment": name, "preset": preset, "rows": outcome.rows})
        write_text(out / f"{name}.md", report)
        figure = outcome.draw(out)
        console.print(report, markup=False, soft_wrap=True)
        console.print(f"wrote {out}/{name}.json, {out}/{name}.md and {figure}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="output folder")] = Path("runs/demo"),
    workers: Workers = None,
) -> None:
    """Adapt the shipped large model to four environments it has never seen, and compare all methods."""
    with _reported():
        from csimodels.evaluation.demo import run_demo, table_rows

        with _progress("adapting") as update:
            report = run_demo(out, workers=workers, on_done=lambda done, total, task: update(done, total))
        header, rows = table_rows(report)
        table = Table(*header, title=f"CSI reconstruction from M = {report['codeword_length']} of 2048 reals")
        for row in rows:
            table.add_row(*("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        console.print(f"wrote {out}/report.json, report.md, methods.png, alpha.png and channels.png")
