"""One registration per op and device key, which asks the chosen backend.

``torch.library`` dispatches on device; which *implementation* runs there is decided here, never by import order.

- ``csikernels::<op>`` is the public op. Its schema comes from ``csrc/library.cpp`` when the extension is loaded and
  from :func:`define` otherwise; an extension whose schema differs is refused at import.
- Where the extension has a kernel for a device, that C++ function owns the device key and asks the chosen backend
  itself (an atomic, so the fast path never enters Python); for any other choice it calls ``csikernels_python::<op>``.
- ``csikernels_python::<op>`` chooses among the implementations written in Python (``triton``, ``reference``). It also
  owns the device key directly where there is no compiled kernel.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from csikernels import _load, triton

NAMESPACE = "csikernels"
PYTHON_NAMESPACE = "csikernels_python"
BACKENDS = ("cpp", "cuda", "triton", "reference")  # best first
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_COMPILED = {"cpu": "cpp", "cuda": "cuda"}

_public = torch.library.Library(NAMESPACE, "FRAGMENT")
_python = torch.library.Library(PYTHON_NAMESPACE, "FRAGMENT")
_implementations: dict[str, dict[str, Callable]] = {}  # op -> python backend -> function
_schemas: dict[str, str] = {}
_chosen: str | None = None


def define(schema: str) -> str:
    """Define ``csikernels::<op>`` from its schema text and return the op's name.

    Called once per op by ``ops/<op>.py``. The same text stands in ``csrc/library.cpp``.
    """
    name = schema.split("(", 1)[0]
    if name in _schemas:
        raise RuntimeError(f"op {name!r} is defined twice")
    _schemas[name] = schema
    _implementations.setdefault(name, {})
    tags = (torch.Tag.pt2_compliant_tag,)
    if not _extension_defines(name, schema):
        _public.define(schema, tags=tags)
    _python.define(schema, tags=tags)

    def choose(*args, **kwargs):
        # The dispatcher hands every argument of a Python kernel over positionally except keyword-only ones.
        device = _device_type(args)
        # The op's own autograd formula has been set up by now; what runs inside must not record a second graph. Nor may
        # autocast reach inside: the op's dtype rules are its own, and a float32 product there would become bfloat16.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return _python_implementation(name, device)(*args, **kwargs)

    _python.impl(name, choose, "CompositeExplicitAutograd")
    for device, key in _DEVICES.items():
        if not has_compiled_kernel(name, device):
            _public.impl(name, choose, key)
    return name


def _extension_defines(name: str, schema: str) -> bool:
    text = _load.extension.schema(name) if _load.extension is not None else None
    if text is None:
        return False
    if torch._C.parse_schema(text) != torch._C.parse_schema(f"{NAMESPACE}::{schema}"):
        raise ImportError(
            f"csikernels._C was built from other sources (it has {text}, expected {schema}): install csikernels again"
        )
    return True


def implement(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Decorator: the Python implementation of ``op`` for ``backend`` ("reference" or "triton").

    The function takes exactly the schema's arguments. It must return fresh tensors (never a view of an input).
    ``"cuda"`` is for the tests: their simulator of a GPU takes CPU tensors and runs only where it is asked for.
    """
    if backend not in ("reference", "triton", "cuda"):
        raise ValueError(f"backend: expected 'reference', 'triton' or 'cuda', got {backend!r}")

    def register(function: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return register


def register_fake(op: str, *, on_cpu: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Decorator: ``torch.library.register_fake``, refusing calls that mix meta tensors with others.

    Torch hands a call to the fake as soon as one tensor is on the meta device; with the others real, it would return as
    if something had been computed. ``on_cpu`` names arguments that may lie on the CPU beside tensors elsewhere.
    """
    names = [argument.name for argument in torch._C.parse_schema(_schemas[op]).arguments]

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def checked(*args, **kwargs):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            _check_meta(op, {name: value for name, value in given.items() if name not in on_cpu})
            return function(*args, **kwargs)

        torch.library.register_fake(f"{NAMESPACE}::{op}")(checked)
        return function

    return register


def _check_meta(op: str, arguments: dict[str, object]) -> None:
    """Raise when some tensors are on the meta device and some are not."""
    first: dict[bool, str] = {}  # on the meta device -> an argument, with its device
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                first.setdefault(tensor.device.type == "meta", f"{name} on {tensor.device}")
    if len(first) == 2:
        raise ValueError(f"{op}: expected all tensors on one device, got {' and '.join(first.values())}")


def has_compiled_kernel(op: str, device: str) -> bool:
    """Whether the extension registered a kernel of ``op`` for this device type."""
    return _load.extension is not None and _load.extension.has_kernel(op, _DEVICES[device])


def schemas() -> dict[str, str]:
    """Op name -> schema text, for every defined op."""
    return dict(_schemas)


def backends() -> dict[str, dict[str, list[str]]]:
    """Available backends: op name -> device type ("cpu", "cuda") -> backend names, best first.

    A device type that this machine or this torch build lacks has an empty list.
    """
    return {op: {device: _available(op, device) for device in _DEVICES} for op in sorted(_schemas)}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the enclosed calls on one backend: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    The choice is process-wide (backward passes run on autograd's own threads) and restored on exit; contexts nest. The
    environment variable ``CSIKERNELS_BACKEND`` sets it for a whole run. An op called inside that has no such backend on
    its tensors' device raises ``RuntimeError``: there is no silent fallback.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: the backend is not available in this installation; the message says why.
    """
    check_backend(name)
    previous = _chosen
    _set(name)
    try:
        yield
    finally:
        _set(previous)


def chosen_backend() -> str | None:
    """The backend forced by ``use_backend`` or ``CSIKERNELS_BACKEND``, or None for each op's best."""
    return _chosen


def best_backend(op: str, device: str) -> str | None:
    """The backend that runs ``op`` on this device type: the forced one, or the first available."""
    return _chosen or next(iter(_available(op, device)), None)


def check_backend(name: str) -> None:
    """Raise unless ``name`` is a backend that this installation has for at least one op."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if not any(name in names for devices in backends().values() for names in devices.values()):
        raise RuntimeError(f"backend {name!r} is not available: {_why_not(name)}")


def _why_not(name: str) -> str:
    if name == "triton" and not triton.installed():
        return "triton is not installed"
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if name in ("cpp", "cuda") and _load.extension is None:
        return _load.missing_reason or "the extension was not built"
    if name == "cpp":
        return "no op has a C++ kernel in this build"
    if name == "cuda":
        return "the extension was built without CUDA (see build_info())"
    return "Triton kernels need sm_80 or later on every visible GPU"


def _set(name: str | None) -> None:
    global _chosen
    _chosen = name
    if _load.extension is not None:
        _load.extension.set_backend(name or "")


def _device_type(args: tuple) -> str:
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device.type
    return "cpu"


def _available(op: str, device: str) -> list[str]:
    if device == "cuda" and not torch.cuda.is_available():
        return []
    names = [_COMPILED[device]] if has_compiled_kernel(op, device) else []
    if device == "cpu" and "cuda" in _implementations[op]:
        names.append("cuda")  # simulated
    if triton.runs_on(device) and ("triton" in _implementations[op] or op in triton.KERNELS):
        names.append("triton")
    if "reference" in _implementations[op]:
        names.append("reference")
    return names


def _python_implementation(op: str, device: str) -> Callable:
    available = _available(op, device)
    if _chosen is not None:
        if _chosen not in available:
            has = ", ".join(available) or "none"
            raise RuntimeError(f"{op}: backend {_chosen!r} was asked for, but on {device} this op has: {has}")
        if _chosen == "triton" or _chosen in _implementations[op]:
            return _implementation(op, _chosen)
        # The compiled kernel itself hands over what the op's documentation leaves to the reference, such as float64.
    for name in available:
        if name not in ("cpp", "cuda") and not (name == "triton" and device == "cpu"):
            return _implementation(op, name)
    raise RuntimeError(f"{op}: no backend for tensors on {device}; available devices: cpu, cuda")


def _implementation(op: str, backend: str) -> Callable:
    if backend == "triton" and backend not in _implementations[op]:
        triton.load(op)
    return _implementations[op][backend]


def apply_environment_choice() -> None:
    """Honour ``CSIKERNELS_BACKEND``; called once, after every op is registered."""
    name = os.environ.get("CSIKERNELS_BACKEND")
    if name:
        try:
            check_backend(name)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"CSIKERNELS_BACKEND={name}: {error}") from None
        _set(name)
