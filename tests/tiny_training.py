"""A training of seconds, shared by the tests; run as a script it is the process that they kill, starve or start twice.

    python tests/tiny_training.py RUN_DIR [--batch-size N ...] [--hold STEP] [--full-disk STEP] [--compare-processes]

prints ``step <number> <loss>`` for every step of the main process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.rays import AntennaArray, SubcarrierGrid
from csimodels.channels.source import FixedSource
from csimodels.files import load_tensors, save_tensors
from csimodels.models.channel_transformer import TransformerConfig
from csimodels.models.projection import CodecConfig
from csimodels.training.loop import TrainConfig, Trainer, TrainResult, make_accelerator
from csimodels.training.pretrain import PretrainTask, pretrain

ROOT = Path(__file__).resolve().parent.parent
CELL = CellConfig(array=AntennaArray.ula(8), grid=SubcarrierGrid(8, 70e6))
CODEC = CodecConfig(antennas=8, subcarriers=8, codeword_length=32)
MODEL = TransformerConfig(tokens=8, features=16, layers=1, width=16, heads=2, feedforward=32)
TRAIN = TrainConfig(epochs=3, batch_size=16, learning_rate=3e-3, seed=3, save_every=4)  # 15 steps an epoch
SAMPLES = 240


def channels(count: int = SAMPLES, index: int = 2, seed: int = 0) -> torch.Tensor:
    """Complex64 ``[count, 8, 8]`` of one built-in environment."""
    return Environment(CELL, index, seed=1).sample(count, seed=seed)


def train(run_dir: Path, config: TrainConfig = TRAIN, *, accelerator=None, on_step=None, **changes: Any) -> TrainResult:
    """Pre-train :data:`MODEL` on :func:`channels`; ``changes`` go to :class:`PretrainTask`."""
    task = PretrainTask(**{"architecture": MODEL, "codec": CODEC, "train": config, **changes})
    return pretrain(
        task,
        FixedSource(channels()),
        channels(64, seed=1),
        run_dir,
        accelerator=accelerator or make_accelerator(config, cpu=True),
        data_description={"environments": (2, 3), "samples": SAMPLES},
        on_step=on_step,
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the finished run's checkpoint."""
    return load_tensors(run_dir / "model.safetensors")[0]


def names(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden files too, sorted."""
    return sorted(child.name for child in folder.iterdir())


def saved_state(run_dir: Path) -> dict[str, Any]:
    """Where the run's state file stands: ``epoch``, ``step_in_epoch``, ``step`` and more."""
    return load_tensors(run_dir / "state.safetensors")[1]["state"]


def log_without_times(run_dir: Path) -> dict[str, Any]:
    """``log.json`` without what differs between two runs of the same thing."""
    log = json.loads((run_dir / "log.json").read_text())
    del log["seconds"]
    for entry in log["history"]:
        del entry["seconds"]
    return log


def environment() -> dict[str, str]:
    """Of a test's subprocess: the source tree, no GPU, one thread, the loopback device for process groups."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests")])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "CSIKERNELS_"))}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**inherited, **fixed, "PYTHONPATH": path}


def start(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start this file as a script, after ``prefix`` (``-m launcher ...``), in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *prefix, __file__, *map(str, arguments)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str | Path, prefix: tuple[str, ...] = (), timeout: float = 300) -> tuple[int, str]:
    """Run this file as a script to its end; exit status and output. Its whole session is killed on a timeout."""
    process = start(*arguments, prefix=prefix)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def losses(output: str) -> dict[int, float]:
    """Step -> loss, from a script's output."""
    lines = (line.split() for line in output.splitlines() if line.startswith("step "))
    return {int(step): float(loss) for _, step, loss in lines}


class _OnStep:
    """Prints the step, then holds the process still or fills its disk when asked to."""

    def __init__(self, hold: int | None, full_disk: int | None):
        self.hold, self.full_disk = hold, full_disk

    def __call__(self, step: int, total: int, loss: float) -> None:
        print("step", step, repr(loss), flush=True)
        if step == self.hold:
            print("holding", flush=True)
            sys.stdin.read()  # until the test kills this process
        if step == self.full_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def _disagree(run_dir: Path) -> None:
    """Processes whose validation values differ: alone, the main one would run 5 epochs, the others 3."""
    config = TrainConfig(epochs=5, batch_size=4, schedule="constant", patience=2)
    accelerator = make_accelerator(config)
    torch.manual_seed(accelerator.process_index)  # even then, all must start from the main process's weights
    model = torch.nn.Linear(2, 1)
    data = (torch.randn(9, 2, generator=torch.Generator().manual_seed(0)),)
    values = iter([3.0, 2.0, 1.0, 0.5, 0.25] if accelerator.is_main_process else [1.0, 2.0, 3.0, 4.0, 5.0])

    def loss(network: torch.nn.Module, batch: Any) -> torch.Tensor:
        return network(batch[0]).square().mean()

    result = Trainer(model, config, lambda epoch: data, loss, lambda m: next(values), accelerator=accelerator).fit()
    report = {"epochs": result.epochs, "best": result.best_validation, "processes": accelerator.num_processes}
    (run_dir / f"disagree{accelerator.process_index}.json").write_text(json.dumps(report))
    save_tensors(run_dir / f"disagree{accelerator.process_index}.safetensors", model.state_dict(), {})
    try:
        small = TrainConfig(epochs=1, batch_size=1)
        Trainer(model, small, lambda epoch: data, loss, lambda m: 0.0, accelerator=accelerator)
    except ValueError as error:
        (run_dir / f"refused{accelerator.process_index}.txt").write_text(str(error))


def main() -> None:
    """Command line, see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[TRAIN.batch_size])
    parser.add_argument("--hold", type=int)
    parser.add_argument("--full-disk", type=int)
    parser.add_argument("--compare-processes", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.batch_size:
        run_dir = options.run_dir / str(size) if len(options.batch_size) > 1 else options.run_dir
        config = TrainConfig(**{**vars(TRAIN), "batch_size": size})
        # No cpu=True: on a machine without accelerators the processes must find together by themselves.
        accelerator = make_accelerator(config, cpu=not options.compare_processes)
        if accelerator.is_main_process:
            print("batch", size, "processes", accelerator.num_processes, flush=True)
        train(run_dir, config, accelerator=accelerator, on_step=_OnStep(options.hold, options.full_disk))
    if options.compare_processes:
        _disagree(options.run_dir)


if __name__ == "__main__":
    main()
