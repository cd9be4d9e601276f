"""Triton kernels without a GPU: what a launch moves, counted in Triton's interpreter, and what its machine code needs.

The interpreter runs a program's tiles whole. A load counts each byte that its unmasked lanes touch once: lanes that
share an address are served by one access. Over a program's loads a byte counts once as long as all that the program
reads fits into the L1 cache; beyond that, once a load. Every store counts. An atomic reads and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

if TYPE_CHECKING:  # triton asks TRITON_INTERPRET as it is imported
    import triton

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = 90
MULTIPROCESSORS = 132
CACHED = 64 * 1024  # bytes of L1 that a program can count on, with others and shared memory beside it
OPTIONS = ("enable_fp_fusion", "maxnreg")


@dataclasses.dataclass
class Launch:
    """A kernel's launch: where it is defined, its arguments (tensors as empty ones of their dtype), what it moved."""

    module: str
    kernel: str
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]  # of the compiler, beside these
    choices: list[tuple[dict, int, int, dict]]  # constants, warps, stages, options that a GPU would choose from
    loaded: int = 0
    stored: int = 0
    reads: list[np.ndarray] = dataclasses.field(default_factory=list)  # of the program that runs: first and last byte

    def end_program(self) -> None:
        if not self.reads:
            return
        reads, self.reads = np.concatenate(self.reads), []
        distinct = _bytes(np.unique(reads, axis=0))
        self.loaded += distinct if distinct <= CACHED else _bytes(reads)


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Within, every launch of an interpreted kernel is appended to the list, oldest first."""
    from triton.runtime import autotuner, interpreter

    builder, kernels, tuners = interpreter.interpreter_builder, interpreter.InterpretedFunction, autotuner.Autotuner
    launches: list[Launch] = []
    choices: list[triton.Config] = []
    run, tuned_run = kernels.run, tuners.run

    def noted_tuned_run(self, *args, **kwargs):
        choices[:] = self.early_config_prune(self.choices, dict(zip(self.arg_names, args, strict=False)), **kwargs)
        return tuned_run(self, *args, **kwargs)

    def noted_run(self, *args, **kwargs):
        launches.append(_launch(self, args, kwargs, choices))
        choices.clear()
        result = run(self, *args, **kwargs)
        launches[-1].end_program()
        return result

    def next_program(*index):
        launches[-1].end_program()
        return type(builder).set_grid_idx(builder, *index)

    def load(ptrs, mask, *rest):
        launches[-1].reads.append(_touched(ptrs, mask))
        return type(builder).create_masked_load(builder, ptrs, mask, *rest)

    def store(ptrs, value, mask, *rest):
        launches[-1].stored += _bytes(_touched(ptrs, mask))
        return type(builder).create_masked_store(builder, ptrs, value, mask, *rest)

    def atomic(name: str, mask_at: int | None):
        def counted(*args):
            ptrs = next(arg for arg in args if isinstance(arg, interpreter.TensorHandle))
            size = _bytes(_touched(ptrs, None if mask_at is None else args[mask_at]))
            launches[-1].loaded += size  # in L2, every time
            launches[-1].stored += size
            return getattr(type(builder), name)(builder, *args)

        return counted

    ours = {
        "set_grid_idx": next_program,
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic("create_atomic_rmw", 3),
        "create_atomic_cas": atomic("create_atomic_cas", None),
    }
    vars(builder).update(ours)
    kernels.run, tuners.run = noted_run, noted_tuned_run
    try:
        yield launches
    finally:
        kernels.run, tuners.run = run, tuned_run
        for name in ours:
            del vars(builder)[name]


def _touched(ptrs, mask) -> np.ndarray:
    """First and last byte behind each distinct address of the unmasked lanes, [n, 2]."""
    addresses = ptrs.data if mask is None else ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
    first = np.unique(addresses).astype(np.int64)
    return np.stack([first, first + max(1, ptrs.get_element_ty().primitive_bitwidth // 8) - 1], 1)


def _bytes(touched: np.ndarray) -> int:
    return int((touched[:, 1] - touched[:, 0] + 1).sum())


def _launch(kernel, args: tuple, kwargs: dict, configs: list[triton.Config]) -> Launch:
    import triton.language as tl

    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    annotations = kernel.fn.__annotations__
    constants = {
        name: given[name] for name in kernel.arg_names if annotations.get(name) in (tl.constexpr, "tl.constexpr")
    }
    arguments = {name: _described(given[name]) for name in kernel.arg_names if name not in constants}
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    tried = [
        (config.kwargs, config.num_warps, config.num_stages, {"maxnreg": config.maxnreg} if config.maxnreg else {})
        for config in configs
    ]
    choices = tried or [({}, given.get("num_warps", 4), given.get("num_stages", 3), {})]
    return Launch(kernel.fn.__module__, kernel.__name__, arguments, constants, options, choices)


def _described(value):
    if isinstance(value, torch.Tensor):
        return torch.empty(0, dtype=value.dtype)
    return tuple(map(_described, value)) if isinstance(value, tuple) else value


@contextlib.contextmanager
def as_on_an_h100() -> Iterator[None]:
    """Within, kernels have the tiles and the grids of an H100, not those that spare the interpreter work."""
    from csikernels.triton import codebook_filter, codebook_pack, codebook_rescore, launch, nf4_lora

    kernels = {
        kind: launch.tuned(configs, nf4_lora._KEY)(nf4_lora._product_kernel)
        for kind, configs in nf4_lora.CONFIGS.items()
    }
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            *((module, "AT_ONCE", 1024) for module in (codebook_filter, codebook_pack, codebook_rescore)),
            (codebook_filter, "_gpu", lambda device: (9, MULTIPROCESSORS)),
            (nf4_lora, "_multiprocessors", lambda device: MULTIPROCESSORS),
            (nf4_lora, "_KERNELS", kernels),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def machine_code(launches: Sequence[Launch]) -> list[list[dict]]:
    """Of each launch what ``triton_compile.compiled`` finds for an H100, once for each configuration of its kernel.

    In an interpreter of its own: whether ``triton.jit`` compiles or interprets is decided at a module's import.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benches")])
    done = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps(launches),
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(f"kernels did not compile:\n{done.stderr.decode()}")
    return json.loads(done.stdout)


def _compile(launch: Launch) -> list[dict]:
    import importlib

    from triton_compile import compiled

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    return [
        {
            **compiled(
                kernel, launch.arguments, {**launch.constants, **own}, ARCHITECTURE, warps, stages,
                **launch.options, **options,
            ),
            "warps": warps,
        }
        for own, warps, stages, options in launch.choices
    ]  # fmt: skip


if __name__ == "__main__":
    import interpreted  # pickled launches are of the module's class, not of __main__'s

    found: dict[bytes, list[dict]] = {}
    results = []
    for launch in pickle.loads(sys.stdin.buffer.read()):
        same = pickle.dumps(dataclasses.replace(launch, loaded=0, stored=0))
        if same not in found:
            found[same] = interpreted._compile(launch)
        results.append(found[same])
    print(json.dumps(results))
