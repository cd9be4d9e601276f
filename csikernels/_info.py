"""What this installation is made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from csikernels import _load

__version__ = "0.1.0"


def build_info() -> dict:
    """Versions, compiled parts and the CPU capability in force.

    Returns:
        A dict that ``json`` can write:

        - ``version``: of csikernels (str); ``torch``: of the torch that is running (str).
        - ``cpp``: whether the C++ extension is loaded (bool).
        - ``cuda``: version of the CUDA runtime that the extension was built with (str), or None.
        - ``cuda_archs``: GPU architectures with machine code in the extension, as ``"sm_80"`` (list of str), read from
          the binary. The architecture-specific variants (``sm_90a``) are listed without their letter.
        - ``triton``: version of the installed triton (str), or None.
        - ``cpu_capability``: instruction sets that the kernels use: ``"scalar"``, ``"avx2"``, ``"avx512"``,
          ``"avx512_vnni"`` or ``"avx512_bf16"``; None without the extension. ``CSIKERNELS_CPU_CAPABILITY`` lowers it.
        - ``compiler``: that built the extension (str), or None.
        - ``reason``: why the extension is missing (str), or None. ``cuda_reason``: why it was built without CUDA.
    """
    extension = _load.extension
    built = extension.build_info() if extension is not None else {}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cpp": extension is not None,
        "cuda": built.get("cuda"),
        "cuda_archs": built.get("cuda_archs", []),
        "triton": _triton_version(),
        "cpu_capability": extension.cpu_capability() if extension is not None else None,
        "compiler": built.get("compiler"),
        "reason": _load.missing_reason,
        "cuda_reason": None if built.get("cuda") else _load.build_record().get("cuda_reason"),
    }


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
