"""Fixtures that every test of an op shares.

``backend`` runs a test once per implementation that this machine has of the ops named by ``@pytest.mark.op(...)``; the
compiled one once per CPU capability, since each is another kernel. Inside such a test, the package's functions run on
that backend and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import simulator
import torch

import csikernels
from csikernels import _load

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
GPU_BACKENDS = ("cuda", "triton")

# Triton decides while a kernel is defined whether it is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _variants(ops: tuple[str, ...], device: str) -> list[str]:
    """Backends that all these ops have on the device; "cpp" once per CPU capability."""
    available = csikernels.backends()
    unknown = [op for op in ops if op not in available]
    if unknown:
        raise pytest.UsageError(f"pytest.mark.op: no such op: {', '.join(unknown)}; known: {', '.join(available)}")
    names = [name for name in available[ops[0]][device] if all(name in available[op][device] for op in ops)]
    names = [name for name in names if name not in GPU_BACKENDS]  # theirs are the tests with the fixture `device`
    capabilities = _load.extension.cpu_capabilities() if _load.extension is not None else []
    return [
        variant
        for name in names
        for variant in ([f"cpp-{capability}" for capability in capabilities] if name == "cpp" else [name])
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        gpu = metafunc.definition.get_closest_marker("gpu")
        if gpu is None or not gpu.args or set(gpu.args) - set(GPU_BACKENDS):
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid}: `device` needs pytest.mark.gpu with backends of GPUs"
            )
        metafunc.parametrize("device", gpu.args, indirect=True)
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None or not marker.args:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: `backend` needs pytest.mark.op with the ops under test")
    metafunc.parametrize("backend", _variants(marker.args, "cpu"), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend in force during this test, such as ``"reference"`` or ``"cpp-avx2"``."""
    name, _, capability = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if capability:
            assert _load.extension is not None
            stack.callback(_load.extension.set_cpu_capability, _load.extension.cpu_capability())
            _load.extension.set_cpu_capability(capability)
        stack.enter_context(csikernels.use_backend(name))
        yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a backend named by ``@pytest.mark.gpu(...)`` runs, that backend in force: a GPU, else, with CPU tensors,
    the PTX simulator (``cuda``) or Triton's interpreter (``triton``); else the test is skipped."""
    name = request.param
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            if name == "cuda" and not csikernels.build_info()["cuda"]:
                pytest.skip(f"no CUDA kernels: {csikernels.build_info()['cuda_reason']}")
        elif name == "cuda":
            if reason := simulator.missing():
                pytest.skip(f"no GPU, and {reason}")
            stack.enter_context(simulator.attached())
        elif importlib.util.find_spec("triton") is None:
            pytest.skip("no GPU, and triton is not installed")
        stack.enter_context(csikernels.use_backend(name))
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def simulated() -> Iterator[simulator.Simulator]:
    """The PTX simulator with the CUDA backend in force, for what only it can show: bytes, races, launches."""
    if reason := simulator.missing():
        pytest.skip(reason)
    with simulator.attached() as attached, csikernels.use_backend("cuda"):
        yield attached


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """``run_python(code, NAME="value")``: in a fresh interpreter, since the environment is read once per process."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CSIKERNELS_")}
        packages = [ROOT / "python", Path(csikernels.__file__).parent.parent]  # make asan tests a build elsewhere
        paths = {"PYTHONPATH": os.pathsep.join(map(str, reversed(packages)))}
        return subprocess.run(
            [sys.executable, "-c", code], env={**inherited, **paths, **environment}, capture_output=True, text=True
        )

    return run


@pytest.fixture
def opcheck() -> Callable[..., None]:
    """``opcheck("top_m", (score, 3))``: all of torch.library.opcheck's tests on ``csikernels::top_m``."""

    def check(op: str, args: tuple, kwargs: dict | None = None) -> None:
        torch.library.opcheck(getattr(torch.ops.csikernels, op).default, args, kwargs or {})

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)``: run what follows on ``n`` threads; the number before is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_models(threads: Callable[[int], None]) -> Iterator[None]:
    """For tests that train many tiny models: more threads make these slower, and so does searching all of torch's
    objects for garbage after each."""
    threads(1)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def lasco_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a tiny base LAM and reference SAM; see :mod:`tiny_lasco`."""
    from tiny_lasco import make_checkpoints

    return make_checkpoints(tmp_path_factory.mktemp("lasco"))


@pytest.fixture
def shipped(lasco_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The tiny checkpoints in place of those shipped in the package."""
    import csimodels.assets
    import csimodels.evaluation.demo
    import csimodels.training.checkpoint_store

    for module in (csimodels.assets, csimodels.evaluation.demo, csimodels.training.checkpoint_store):
        monkeypatch.setattr(module, "shipped_checkpoint", lasco_checkpoints.__getitem__)
    return lasco_checkpoints


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its precision in process-wide state; a test starts and leaves it anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(fresh_accelerate: None) -> Accelerator:
    """On the CPU, for the tiny training runs."""
    from tiny_training import TRAIN

    from csimodels.training.loop import make_accelerator

    return make_accelerator(TRAIN, cpu=True)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of a module's experiments, which share what they have in common."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def finished() -> dict[str, list]:
    """Rows by task, as the row file keeps them for experiments that share tasks; see :mod:`tiny_runs`."""
    return {}
