"""The CUDA kernels on a machine without a GPU.

``csrc/cuda`` is compiled as for a GPU, but linked with ``runtime.cpp`` in place of the CUDA runtime: a launch arrives
here, with its kernel's name, grid, block and arguments, and a PTX simulator runs it on the host's memory. It checks
every access against the buffers that the wrapper passed, and looks for races and for shared memory read before it was
written. So the wrapper, the launcher and the kernel are the ones a GPU runs.

The simulator is the module ``ptxsim``, looked for in ``CSIKERNELS_PTXSIM`` (a folder) and in ``../shared/ptxsim``.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import cpp_extension

from csikernels import _dispatch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simulator"
NAMESPACE = "csikernels_simulated"
PTX_ARCH = "compute_80"  # the oldest target: what runs here uses nothing newer
# As torch's build has them: without the conversions and operators that these take away, some code does not compile.
_TORCH_MACROS = ["HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"]
_DEFINES = [f"-D__CUDA_NO_{name}__" for name in _TORCH_MACROS]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", *_DEFINES, "-I", str(ROOT / "csrc")]

_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def missing() -> str | None:
    """Why the kernels cannot be simulated here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc was not found"
    return None if _ptxsim_folder() else "the PTX simulator was not found (set CSIKERNELS_PTXSIM to its folder)"


def _ptxsim_folder() -> Path | None:
    asked = os.environ.get("CSIKERNELS_PTXSIM")
    folders = [Path(asked)] if asked else [ROOT.parent / "shared" / "ptxsim"]
    return next((folder for folder in folders if (folder / "ptxsim.py").exists()), None)


# Faults of the simulator, mended as it is loaded; nothing happens where they are mended already.
_MENDS = (
    # A write that a warp's barrier orders before a read was reported as a race with a later write. What counts is
    # whether both lie in the same interval between barriers.
    ("& ((r2 >> 32) > k))", "& ((r2 >> 32) != k))"),
    # Lanes that came to a warp's barrier without a detour replaced those that waited there already.
    (
        "    def sync_ready(self, bb, pc, G):\n        S = self.S\n",
        "    def sync_ready(self, bb, pc, G):\n        S = self.S\n"
        "        o = self.blocked.pop((-len(G.stack), pc, G.stack), None)\n"
        "        G = G if o is None else Group(G.mask | o.mask, G.n + o.n, G.fp, G.stack)\n",
    ),
    # A kernel's argument read at an index was counted as global memory. It comes through the constant cache.
    (
        '            self.line(f"t={fn}(S,{self.G},{self.I},{self.addr(a)},{sz},{nv})")\n        if wide:',
        '            argument = self.space(i) == "param" and sp == "global"\n'
        """            self.line("n=S.cnt['global_load_bytes']") if argument else None\n"""
        '            self.line(f"t={fn}(S,{self.G},{self.I},{self.addr(a)},{sz},{nv})")\n'
        """            self.line("S.cnt['global_load_bytes']=n") if argument else None\n        if wide:""",
    ),
)


@functools.cache
def ptxsim() -> Any:
    folder = _ptxsim_folder()
    if folder is None:
        raise RuntimeError(missing())
    path = folder / "ptxsim.py"
    text = path.read_text()
    for wrong, right in _MENDS:
        text = text.replace(wrong, right)
    module = types.ModuleType("ptxsim")
    module.__file__ = str(path)
    sys.modules["ptxsim"] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


# Building -------------------------------------------------------------------------------------------------------------


def _built(source: Path, suffix: str, command: list[str], headers: str) -> Path:
    """``command ... source -o target``, unless the same was built before."""
    key = hashlib.sha256("\0".join([headers, source.read_text(), *command]).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}{'' if source.suffix == '.cu' else '_cpp'}-{key}{suffix}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        done = subprocess.run([*command, str(source), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} {source}:\n{done.stderr}")
        partial.rename(target)
    return target


def _headers() -> str:
    folders = [ROOT / "csrc", SOURCES, Path(__file__).parent]
    return "\0".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.*h")))


def kernel_sources() -> list[Path]:
    """The ``.cu`` files that hold kernels."""
    return [path for path in sorted(SOURCES.glob("*.cu")) if "__global__" in path.read_text()]


def unhashed(kernel: str) -> str:
    """The kernel's name without the hash of its file, which nvcc derives anew at each call."""
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_", "_GLOBAL__N__", kernel)


def compile_ptx(source: Path, extra: tuple[str, ...] = ()) -> str:
    """The PTX of a ``.cu`` file; ``extra`` are further options of nvcc, such as a macro that seeds a bug."""
    command = ["nvcc", *extra, *NVCC_FLAGS, "-ptx", f"-arch={PTX_ARCH}"]
    return _built(source, ".ptx", command, _headers()).read_text()


@functools.cache
def _library() -> ctypes.CDLL:
    """The wrappers, launchers and the runtime, loaded, with the ops of csikernels defined for them."""
    headers = _headers()
    listing = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    toolkit = next(line.removeprefix("#$ TOP=") for line in listing.splitlines() if line.startswith("#$ TOP="))
    include = [str(ROOT / "csrc"), str(Path(__file__).parent), f"{toolkit}/include", *cpp_extension.include_paths()]
    # No optimisation: the wrappers do no work, and compile in half the time.
    cxx = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-c"]
    cxx += ["-DCSIKERNELS_SIMULATED", *(f"-I{path}" for path in include)]
    wrappers = [Path(__file__).parent / "runtime.cpp", ROOT / "csrc" / "dispatch.cpp", *sorted(SOURCES.glob("*.cpp"))]
    nvcc = ["nvcc", *NVCC_FLAGS, f"-arch={PTX_ARCH}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
    objects = [_built(source, ".o", cxx, headers) for source in wrappers]
    objects += [_built(source, ".o", nvcc, headers) for source in kernel_sources()]
    name = hashlib.sha256("\0".join(path.name for path in objects).encode()).hexdigest()[:16]
    library = BUILD / f"simulated-{name}.so"
    if not library.exists():
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        partial = library.with_suffix(f".{os.getpid()}.partial")
        link = [*os.environ.get("CXX", "c++").split(), "-shared", *map(str, objects), *torch_libraries]
        subprocess.run([*link, "-lc10", "-ltorch", "-ltorch_cpu", "-Wl,-z,defs", "-o", str(partial)], check=True)
        partial.rename(library)
    return ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)


# Running --------------------------------------------------------------------------------------------------------------


class Simulator:
    """Runs each launch of the loaded wrappers.

    Attributes:
        launches: ptxsim's ``Stats`` of every launch since the last :meth:`clear`, oldest first.
    """

    def __init__(self) -> None:
        self._modules = [ptxsim().Module(compile_ptx(source)) for source in kernel_sources()]
        self._kernels = {name: (module, name) for module in self._modules for name in module.kernels()}
        self._buffers: dict[int, np.ndarray] = {}
        self._fault: BaseException | None = None
        self._running = False
        self.launches: list[Any] = []
        self.schemas: Any = None
        # Kept alive as long as the library has them.
        self._callbacks = _LAUNCHER(self._launch), _LISTENER(lambda *buffer: self.know(*buffer))
        _library().csikernels_simulate(*self._callbacks)

    def clear(self) -> None:
        self.launches.clear()

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """The CUDA implementation of ``csikernels::<op>`` on CPU tensors; raises the simulator's fault, if any."""
        if self._running:  # the wrapper hands over what its documentation leaves to the reference
            return _dispatch._implementations[op]["reference"](*args, **kwargs)
        self._fault, self._running = None, True
        try:
            return getattr(getattr(torch.ops, NAMESPACE), op)(*args, **kwargs)
        except RuntimeError as error:
            if self._fault is not None:
                raise self._fault from error
            raise
        finally:
            self._buffers.clear()
            self._running = False

    def find(self, kernel: str) -> tuple[Any, str]:
        """The module that holds a kernel, and the kernel's name there."""
        return self._kernels[kernel]

    def know(self, data: int | None, size: int, writable: int) -> None:
        """A buffer that the wrapper hands to the kernels of this call."""
        if data is None or size == 0:
            return
        known = self._buffers.get(data)
        if known is not None and known.nbytes >= size and (known.flags.writeable or not writable):
            return
        buffer = np.frombuffer((ctypes.c_char * size).from_address(data), np.uint8)
        buffer.flags.writeable = bool(writable)
        self._buffers[data] = buffer

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, args: Any) -> int:
        try:
            module, kernel = self.find(name.decode())
            parameters = module.bodies[kernel].params
            values = [self._value(args[k], parameter.size) for k, parameter in enumerate(parameters)]
            stats = module.launch(kernel, tuple(grid[:3]), tuple(block[:3]), values, shared=shared)
            self.launches.append(stats)
            return 0
        except BaseException as error:
            self._fault = error  # raised by call(): an exception cannot cross the C++ frames
            return 1

    def _value(self, address: int, size: int) -> Any:
        """A kernel argument for ptxsim. 8-byte words that point into a known buffer become device pointers."""
        raw = ctypes.string_at(address, size)
        if size % 8:
            return raw
        parts = [
            self._pointer(int.from_bytes(raw[k : k + 8], sys.byteorder)) or raw[k : k + 8] for k in range(0, size, 8)
        ]
        if not any(isinstance(part, tuple) for part in parts):
            return raw
        return parts[0] if size == 8 else ("struct", parts)

    def _pointer(self, word: int) -> tuple | None:
        starts = sorted(self._buffers)
        at = bisect.bisect_right(starts, word) - 1
        if at < 0:
            return None
        buffer = self._buffers[starts[at]]
        offset = word - starts[at]
        return ("ptr_offset", buffer, offset) if offset < buffer.nbytes else None


@functools.cache
def simulator() -> Simulator:
    """The one simulator of this process, with the ops that have a CUDA kernel in ``torch.ops.csikernels_simulated``."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in _dispatch.schemas().values():
        library.define(schema)
    made = Simulator()
    made.schemas = library  # the definitions live as long as their Library object
    return made


@contextlib.contextmanager
def attached() -> Iterator[Simulator]:
    """Within, ``use_backend("cuda")`` runs the simulated kernels on CPU tensors, and torch fills what it allocates with
    NaN, so that an output left unwritten is seen."""
    made = simulator()
    made.clear()
    ops = [
        op for op in _dispatch.schemas() if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU")
    ]
    before = torch.are_deterministic_algorithms_enabled()
    for op in ops:
        _dispatch.implement(op, "cuda")(functools.partial(made.call, op))
    torch.use_deterministic_algorithms(True)
    try:
        yield made
    finally:
        torch.use_deterministic_algorithms(before)
        for op in ops:
            del _dispatch._implementations[op]["cuda"]
