"""Files that are either whole or not there: temporary name, flush, rename; and safetensors with JSON metadata."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from csimodels import __version__


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any failure the old file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; the result is an ordinary file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically. NaN and infinities, which JSON lacks, are a ``ValueError``."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically; every metadata value is stored as JSON.

    Raises:
        OSError: it could not be written, for instance because the disk is full; the old file stays.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, {key: json.dumps(value) for key, value in metadata.items()})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written, what was there before stays ({error})") from None


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no safetensors file of this project.
    """
    path = Path(path)
    with _opened(path) as (file, metadata):
        # Copies: safetensors maps the file, and who then overwrites or cuts it would change or crash this process.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata alone, without reading the tensors; raises what :func:`load_tensors` raises."""
    with _opened(Path(path)) as (_, metadata):
        return metadata


def load_format(path: str | os.PathLike, form: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """:func:`load_tensors` of a file whose metadata has the ``format`` ``form``, that of ``what`` ("a codebook").

    Raises:
        FileNotFoundError, ValueError: as :func:`load_tensors`, or it is of another format.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != form:
        raise ValueError(f"{path}: not {what} (its metadata has no format {form!r})")
    return tensors, metadata


@contextlib.contextmanager
def known(path: str | os.PathLike, metadata: Mapping[str, Any], what: str = "configuration") -> Iterator[None]:
    """While ``metadata`` are read: what they lack or have besides is a ``ValueError`` that names both versions."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: written by csimodels {metadata.get('version')}, {__version__} does not know its {what} ({error})"
        ) from None


@contextlib.contextmanager
def fitting(path: str | os.PathLike) -> Iterator[None]:
    """While a file's weights are taken over: those that do not fit its own configuration are a ``ValueError``."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: its weights do not fit its own configuration: {error}") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file of this project and its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file of csimodels ({error})") from None


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value (dataclasses included), hexadecimal: identifies what determines a run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hexadecimal: tells whether two runs start from the same file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    total = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
