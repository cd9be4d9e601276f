"""Builds the extension ``csikernels._C`` where torch and a C++ compiler are there, with CUDA where it can.

Everything else is in pyproject.toml. Environment:

- ``CSIKERNELS_CUDA=0`` leaves CUDA out; ``=1`` demands it and fails with the reason where it cannot be built. Unset,
  CUDA is built when torch is a CUDA build and a matching nvcc is found; whether a GPU is present does not matter.
- ``TORCH_CUDA_ARCH_LIST`` replaces the default list of GPU architectures; ``CXX`` and ``CUDA_HOME`` choose the
  compilers.
- ``CSIKERNELS_SANITIZE=1`` adds AddressSanitizer and UndefinedBehaviorSanitizer (``make asan``).

Without torch or a compiler the package installs as pure Python, and ``csikernels.build_info()`` says why.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

CPP_SOURCES = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for kind in ("*.cpp", "*.cu") for path in Path("csrc/cuda").glob(kind))
CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0a;12.0a"
# -O3 without -march: the file of each instruction set carries its own target, so one binary runs on every x86-64.
# Products and sums are fused only where the code says so: every instruction set then rounds as its file reads.
# libgomp is the one that torch has loaded, so its thread pool and torch.set_num_threads are shared.
CXX_FLAGS = ["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp"]
LINK_FLAGS = ["-fopenmp"]
# vptr asks for the type information of torch's classes, which is not exported.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-O1", "-g"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"]

record: dict[str, str | bool | None] = {"cpp": False, "cuda": False, "torch": None, "reason": None, "cuda_reason": None}


def import_torch() -> ModuleType:
    """torch, also from within pip's isolated build, which hides the installed packages but keeps their location."""
    try:
        import torch
    except ModuleNotFoundError:
        sys.path += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
        import torch
    return torch


def compiler_problem() -> str | None:
    """Why no extension can be compiled here, or None."""
    if sys.platform == "win32":
        return "the extension is not built on Windows"
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]!r} was not found (set CXX)"
    include = sysconfig.get_path("include")
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-I", include, "csrc/compiler_probe.h"]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        return f"{compiler[0]!r} cannot compile the extension: {probe.stderr.strip().splitlines()[0]}"
    return None


def find_cuda_home() -> str | None:
    """The toolkit's folder. nvcc itself says where it lies; the nvcc on PATH may be a wrapper in another folder."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return os.environ.get("CUDA_HOME") or os.environ["CUDA_PATH"]
    if shutil.which("nvcc") is None:
        return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None
    report = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)
    return str(Path(found.group(1)).resolve()) if found else None


def cuda_problem(torch: ModuleType, cuda_home: str | None) -> str | None:
    """Why CUDA cannot be built here, or None. A GPU is not needed."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not nvcc.exists():
        return "nvcc was not found (set CUDA_HOME, or put nvcc on PATH)"
    report = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", report)
    if not found or found.group(1) != torch.version.cuda.split(".")[0]:
        version = found.group(1) if found else "unknown"
        return f"{nvcc} is CUDA {version}, torch was built with CUDA {torch.version.cuda}"
    return None


def wants_cuda(torch: ModuleType, cuda_home: str | None) -> bool:
    """Apply ``CSIKERNELS_CUDA`` to what is possible."""
    asked = os.environ.get("CSIKERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"CSIKERNELS_CUDA: expected 0, 1 or unset, got {asked!r}")
    problem = "CSIKERNELS_CUDA=0" if asked == "0" else cuda_problem(torch, cuda_home)
    if asked == "1" and problem:
        raise SystemExit(f"CSIKERNELS_CUDA=1, but CUDA cannot be built: {problem}")
    record["cuda_reason"] = problem
    return problem is None


def extension_arguments() -> dict:
    """``ext_modules`` and ``cmdclass`` for :func:`setup`, empty where the package stays pure."""
    try:
        torch = import_torch()
    except ImportError as error:
        problem = f"torch was not found at build time ({error}): install torch, then csikernels --no-build-isolation"
    else:
        problem = compiler_problem()
    if problem:
        if os.environ.get("CSIKERNELS_CUDA") == "1":
            raise SystemExit(f"CSIKERNELS_CUDA=1, but the extension cannot be built: {problem}")
        print(f"csikernels: installing without the compiled extension: {problem}", file=sys.stderr)
        record["reason"] = problem
        return {}

    cuda_home = find_cuda_home()
    os.environ["CUDA_HOME"] = cuda_home or ""  # read by torch's module as it is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    record.update(cpp=True, torch=torch.__version__, cuda=wants_cuda(torch, cuda_home))
    sanitize = SANITIZE_FLAGS if os.environ.get("CSIKERNELS_SANITIZE") == "1" else []
    flags, macros = {"cxx": CXX_FLAGS + sanitize}, [("PY_SSIZE_T_CLEAN", None)]
    if record["cuda"]:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        flags["nvcc"] = NVCC_FLAGS
        macros.append(("CSIKERNELS_WITH_CUDA", None))
    kind, sources = (CUDAExtension, CPP_SOURCES + CUDA_SOURCES) if record["cuda"] else (CppExtension, CPP_SOURCES)
    include = [str(Path(__file__).parent / "csrc")]  # ninja runs in the build folder, so the path is absolute
    flags_and_links = {"extra_compile_args": flags, "extra_link_args": LINK_FLAGS + sanitize}
    extension = kind("csikernels._C", sources, include_dirs=include, define_macros=macros, **flags_and_links)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


class BuildWithRecord(build_py):
    """Puts ``csikernels/_build.json`` beside the modules: what was built, and the reason for what was not."""

    def run(self) -> None:
        super().run()
        target = Path("." if self.editable_mode else self.build_lib, "csikernels", "_build.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=2) + "\n")


arguments = extension_arguments()
setup(cmdclass={"build_py": BuildWithRecord, **arguments.pop("cmdclass", {})}, **arguments)
