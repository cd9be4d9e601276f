"""Files are whole or not there: exceptions, a full disk and a kill leave the old one; bad files are named."""

import json
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import environment, names

from csimodels.files import atomic_path, load_tensors, save_tensors, write_json, write_text


def script(text: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)], env=environment(), stdout=subprocess.PIPE, text=True
    )


def test_write_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "old")
    write_text(path, "NMSE ≤ -7 dB")
    assert path.read_text(encoding="utf-8") == "NMSE ≤ -7 dB"
    assert names(path.parent) == ["note.txt"]


def test_result_has_ordinary_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == 0o640


def test_text_is_utf8_in_any_locale(tmp_path):
    text = "import sys; from csimodels.files import write_text; write_text(sys.argv[1], chr(0x2264))"
    plain = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", text, tmp_path / "note.txt"], env=plain, check=True)
    assert (tmp_path / "note.txt").read_bytes() == "≤".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def test_exception_before_the_first_file_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "note.txt"):
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_json_lacks(tmp_path, value):
    path = tmp_path / "report.json"
    write_json(path, {"nmse_db": -7.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"nmse_db": value})
    assert json.loads(path.read_text()) == {"nmse_db": -7.5}


def test_path_that_is_a_folder(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "x")
    assert names(tmp_path) == ["taken"]


# A full disk ----------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys, torch
from csimodels.files import save_tensors, write_text
tensors, text = sys.argv[1:]
save_tensors(tensors, {"a": torch.full((8,), 1.0)}, {"version": 1})
write_text(text, "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as a full disk: write() fails half way
for write in (
    lambda: save_tensors(tensors, {"a": torch.full((100_000,), 2.0)}, {"version": 2}),
    lambda: write_text(text, "n" * 100_000),
):
    try:
        write()
    except OSError as error:
        print("OSError", str(error).replace(chr(10), " "))
"""


def test_full_disk_leaves_the_old_file(tmp_path):
    process = script(FULL_DISK, tmp_path / "a.safetensors", tmp_path / "a.txt")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    first, second = output.splitlines()
    assert first.startswith("OSError") and "a.safetensors" in first and "File too large" in first
    assert second.startswith("OSError") and "File too large" in second
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert metadata == {"version": 1}
    assert torch.equal(tensors["a"], torch.full((8,), 1.0))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.safetensors", "a.txt"]


# A kill ---------------------------------------------------------------------------------------------------------------

HALF_WRITTEN = """
import sys, time
from csimodels.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    with open(temporary, "w") as file:
        file.write("half of the n")
        file.flush()
        print("writing", flush=True)
        time.sleep(600)
"""


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    process = script(HALF_WRITTEN, path)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


REWRITING = """
import sys, torch
from csimodels.files import save_tensors
version = 0
while True:
    version += 1
    save_tensors(sys.argv[1], {"a": torch.full((500_000,), float(version))}, {"version": version})
    if version == 2:
        print("writing", flush=True)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_any_moment_leaves_a_whole_file(tmp_path, seed):
    path = tmp_path / "a.safetensors"
    process = script(REWRITING, path)
    assert process.stdout.readline() == "writing\n"
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    process.kill()
    process.wait()
    process.stdout.close()
    tensors, metadata = load_tensors(path)
    assert metadata["version"] >= 2
    assert torch.equal(tensors["a"], torch.full((500_000,), float(metadata["version"])))


# Tensors --------------------------------------------------------------------------------------------------------------


def test_tensors_round_trip(tmp_path):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1:],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "indices": torch.arange(5),
        "half": base.bfloat16(),
        "double": base.double(),
        "leaf": base.clone().requires_grad_(),
    }
    metadata = {"config": {"layers": 2, "norm_first": True}, "nothing": None, "rate": 1e-3, "name": "≤"}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    loaded, read = load_tensors(tmp_path / "a.safetensors")
    assert read == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert not loaded[name].requires_grad


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(1000)}, {})
    loaded, _ = load_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded["a"], torch.ones(1000))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tensors(tmp_path)


def whole_file(tmp_path) -> bytes:
    save_tensors(tmp_path / "whole.safetensors", {"a": torch.ones(100), "b": torch.zeros(7)}, {"version": 1})
    return (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -1, -300])
def test_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "part.safetensors"
    path.write_bytes(whole_file(tmp_path)[:kept])
    with pytest.raises(ValueError, match=r"part\.safetensors: not a readable safetensors file"):
        load_tensors(path)


def foreign_metadata(path):
    save_file({"a": torch.ones(3)}, path, {"format": "pt"})  # what other packages write: no JSON


FOREIGN = {
    "text": lambda path: path.write_text("nmse_db,gcs\n-7.5,0.9\n" * 40),
    "json": lambda path: path.write_text('{"nmse_db": -7.5}'),
    "zeros": lambda path: path.write_bytes(b"\0" * 4096),
    "pickle": lambda path: torch.save({"a": torch.ones(3)}, path),
    "huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "metadata": foreign_metadata,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file_is_named(tmp_path, kind):
    path = tmp_path / "foreign.bin"
    FOREIGN[kind](path)
    with pytest.raises(ValueError, match=r"foreign\.bin: not a readable safetensors file of csimodels"):
        load_tensors(path)
