"""Channel files: what is written is read, in any part and order; nothing half-written, nothing foreign, nothing NaN."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import csimodels
from csimodels.channels.hdf5 import ChannelReader, write_channels

ROOT = Path(__file__).parents[1]


def samples(count=300, antennas=4, subcarriers=6, seed=0):
    return torch.randn(
        count, antennas, subcarriers, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)
    )


def write(path, h, *, parts=(7, 100), environment=5, los=True, **options):
    described = {"generator": "test", "parameters": {"carrier": 1e9, "names": ["a"]}, "seed": 3} | options
    with write_channels(path, antennas=h.shape[1], subcarriers=h.shape[2], **described) as writer:
        start = 0
        for size in (*parts, len(h)):
            writer.append(h[start : start + size], environment=environment, los=los)
            start += size
    return path


@pytest.fixture
def stored(tmp_path):
    h = samples()
    return h, write(tmp_path / "channels.h5", h)


def test_everything_comes_back(stored):
    h, path = stored
    with ChannelReader(path) as file:
        assert len(file) == 300 and (file.antennas, file.subcarriers) == (4, 6)
        assert torch.equal(file.read(), h)
        assert file.environment.tolist() == [5] * 300 and file.los.all() and file.los.dtype == bool
        assert (file.generator, file.seed, file.version) == ("test", 3, csimodels.__version__)
        assert file.parameters == {"carrier": 1e9, "names": ["a"]}
        file.check()


@pytest.mark.parametrize(
    "selection",
    [
        slice(3, 290),
        slice(None, None, -7),
        slice(10, 10),
        [5, 299, 0, 5, -1],
        np.array([256, 255]),
        torch.arange(299, -1, -2),
        np.arange(300) % 3 == 1,
        [],
    ],
    ids=["range", "backwards", "nothing", "list", "array", "tensor", "mask", "empty"],
)
def test_parts_in_any_order(stored, selection):
    h, path = stored
    with ChannelReader(path) as file:
        part = file.read(selection)
    expected = h.numpy()[selection if len(np.shape(selection)) == 0 or len(selection) else slice(0)]
    assert part.dtype == torch.complex64 and np.array_equal(part.numpy(), expected)


@pytest.mark.parametrize("size", [1, 128, 299, 1000])
def test_blocks_are_the_whole(stored, size):
    h, path = stored
    with ChannelReader(path) as file:
        blocks = list(file.blocks(size))
        assert max(len(block) for block in blocks) == min(size, 300)
        assert torch.equal(torch.cat(blocks), h)


def test_columns_per_sample(tmp_path):
    h = samples(10)
    path = tmp_path / "channels.h5"
    with write_channels(path, antennas=4, subcarriers=6, generator="g", parameters={}, seed=0) as writer:
        writer.append(h[:4], environment=[1, 2, 3, 4], los=[True, False, True, False])
        writer.append(h[:0], environment=9, los=True)
        writer.append(h[4:], environment=np.arange(6), los=False)
        assert len(writer) == 10
    with ChannelReader(path) as file:
        assert file.environment.tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
        assert file.los.tolist() == [True, False, True, False] + [False] * 6
        assert torch.equal(file.read(file.environment == 2), h[[1, 6]])


def test_non_contiguous_samples(tmp_path):
    h = samples(12, 6, 4).mT[::2]
    with ChannelReader(write(tmp_path / "channels.h5", h)) as file:
        assert torch.equal(file.read(), h)


def test_complex_numbers_are_compounds_that_matlab_reads(stored):
    with h5py.File(stored[1]) as file:
        stored_type = file["h"].id.get_type()
        assert stored_type.get_class() == h5py.h5t.COMPOUND
        assert [stored_type.get_member_name(i) for i in range(2)] == [b"r", b"i"]
        assert all(stored_type.get_member_type(i) == h5py.h5t.IEEE_F32LE for i in range(2))


@pytest.mark.parametrize("antennas, subcarriers, rows", [(4, 6, 256), (32, 32, 128), (256, 1024, 1)])
def test_chunks_are_bounded(tmp_path, antennas, subcarriers, rows):
    write(tmp_path / "channels.h5", samples(2, antennas, subcarriers), parts=())
    with h5py.File(tmp_path / "channels.h5") as file:
        assert file["h"].chunks == (rows, antennas, subcarriers)


# What may not be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "h, options, error, message",
    [
        (samples().to(torch.complex128), {}, TypeError, "complex64, got torch.complex128"),
        (samples()[0], {}, ValueError, r"\[sample, 4, 6\], got \(4, 6\)"),
        (samples(antennas=5), {}, ValueError, r"\[sample, 4, 6\], got \(300, 5, 6\)"),
        (samples(), {"environment": [1, 2]}, ValueError, "environment: expected one value or 300"),
        (samples(), {"los": np.ones((300, 1), bool)}, ValueError, "los: expected one value or 300"),
    ],
)
def test_bad_appends_are_named(tmp_path, h, options, error, message):
    with (
        pytest.raises(error, match=message),
        write_channels(tmp_path / "x.h5", antennas=4, subcarriers=6, generator="g", parameters={}, seed=0) as writer,
    ):
        writer.append(h, **({"environment": 1, "los": True} | options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), complex(0, float("-inf"))])
def test_nan_is_not_written(tmp_path, value):
    h = samples(20)
    h[[11, 17], 1, 2] = value
    with pytest.raises(ValueError, match="got 2 others, the first at index 11"):
        write(tmp_path / "x.h5", h, parts=())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"antennas": 0}, "antennas: expected at least 1"),
        ({"parameters": {"a": float("nan")}}, "parameters: .*JSON"),
        ({"parameters": {"a": torch.ones(1)}}, "parameters: .*JSON"),
        ({}, "at least one sample"),
    ],
)
def test_bad_files_are_not_begun(tmp_path, options, message):
    described = {"antennas": 4, "subcarriers": 6, "generator": "g", "parameters": {}, "seed": 0} | options
    with pytest.raises(ValueError, match=message), write_channels(tmp_path / "x.h5", **described):
        pass
    assert list(tmp_path.iterdir()) == []


# What may not be read -------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.h5"):
        ChannelReader(tmp_path / "x.h5")


@pytest.mark.parametrize("size", [0, 100, 3000, -1])
def test_truncated_files_are_refused(stored, size):
    whole = stored[1].read_bytes()
    stored[1].write_bytes(whole[:size])
    with pytest.raises(ValueError, match="empty|truncated|not an HDF5 file"):
        ChannelReader(stored[1])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5\n" * 1000)
    with pytest.raises(ValueError, match="not an HDF5 file"):
        ChannelReader(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["h"] = np.zeros((2, 3, 4), np.complex64)
    with pytest.raises(ValueError, match="not a channel file of csimodels"):
        ChannelReader(tmp_path / "foreign.h5")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.attrs.__setitem__("format_version", 2), "format version 1, got 2"),
        (lambda f: f.attrs.__delitem__("seed"), "description"),
        (lambda f: f.attrs.__setitem__("parameters", "{"), "description"),
        (lambda f: f.__delitem__("h"), "/h: expected complex64 of rank 3, got nothing"),
        (lambda f: (f.__delitem__("h"), f.create_dataset("h", data=np.zeros((300, 4, 6)))), "got float64"),
        (
            lambda f: (f.__delitem__("h"), f.create_dataset("h", data=np.zeros((300, 4), "c8"))),
            r"rank 3, got .* \(300, 4\)",
        ),
        (lambda f: f["los"].resize(299, axis=0), "one length"),
        (lambda f: [f[name].resize(0, axis=0) for name in ("h", "environment", "los")], "not 0"),
    ],
)
def test_inconsistent_files_are_refused(stored, change, message):
    with h5py.File(stored[1], "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        ChannelReader(stored[1])


def test_nan_in_a_file_is_counted_and_named(stored):
    with h5py.File(stored[1], "r+") as file:
        for index in (280, 41, 270):
            file["h"][index, 0, 0] = np.nan
    with ChannelReader(stored[1]) as file:
        with pytest.raises(ValueError, match="3 of 300 samples are not finite, the first is 41"):
            file.check()
        with pytest.raises(ValueError, match="2 of 3 samples are not finite, the first is sample 270"):
            file.read([280, 270, 3])
        with pytest.raises(ValueError, match="the first is sample 41"):
            list(file.blocks(20))
        assert len(file.read(slice(0, 41))) == 41


def test_a_damaged_chunk_is_noticed(stored):
    with h5py.File(stored[1]) as file:
        where = file["h"].id.get_chunk_info(1).byte_offset
    data = bytearray(stored[1].read_bytes())
    data[where + 100] ^= 0x10
    stored[1].write_bytes(data)
    with ChannelReader(stored[1]) as file:
        assert len(file.read(slice(0, 256))) == 256
        with pytest.raises(ValueError, match="damaged"):
            file.read([299])
        with pytest.raises(ValueError, match="damaged"):
            file.check()


@pytest.mark.parametrize(
    "selection", [[300], [-301], [0.5], [[1]], np.ones(299, bool)], ids=["high", "low", "float", "2-D", "short mask"]
)
def test_bad_selections_are_refused(stored, selection):
    with ChannelReader(stored[1]) as file, pytest.raises(IndexError, match="selection: expected"):
        file.read(selection)


def test_bad_block_size(stored):
    with ChannelReader(stored[1]) as file, pytest.raises(ValueError, match="size"):
        next(file.blocks(0))


# The old file stays ---------------------------------------------------------------------------------------------------


def test_an_exception_leaves_the_old_file(stored):
    h, path = stored
    with (
        pytest.raises(KeyboardInterrupt),
        write_channels(path, antennas=4, subcarriers=6, generator="new", parameters={}, seed=0) as writer,
    ):
        writer.append(h, environment=1, los=False)
        raise KeyboardInterrupt
    assert [entry.name for entry in path.parent.iterdir()] == ["channels.h5"]
    with ChannelReader(path) as file:
        assert file.generator == "test"


CHILD = """
import resource, sys, time, torch
from csimodels.channels.hdf5 import write_channels
h = torch.ones(1000, 4, 6, dtype=torch.complex64)

def write():
    # Ten appends make 1.9 MB of samples and somewhat more of file.
    with write_channels(sys.argv[1], antennas=4, subcarriers=6, generator="new", parameters={}, seed=0) as writer:
        for _ in range(10):
            writer.append(h, environment=1, los=False)
        if len(sys.argv) == 2:
            print("writing", flush=True)
            time.sleep(600)

for limit in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        write()
    except OSError as error:
        print(error.errno, error, flush=True)
if len(sys.argv) == 2:
    write()
"""


def child(path, *limits):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-c", CHILD, str(path), *map(str, limits)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE reports as an error on Linux")
def test_a_full_disk_leaves_the_old_file(stored):
    process = child(stored[1], 1000, 300_000, 1_900_000)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, "the process must end in order: HDF5 crashes when it closes a file it cannot write"
    assert len(output.splitlines()) == 3
    for line in output.splitlines():
        assert line.startswith(f"{errno.EFBIG} ") and "nothing was changed" in line and str(stored[1]) in line
    assert [entry.name for entry in stored[1].parent.iterdir()] == ["channels.h5"]
    with ChannelReader(stored[1]) as file:
        assert file.generator == "test" and torch.equal(file.read(), stored[0])


def test_a_kill_leaves_the_old_file(stored):
    process = child(stored[1])
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    with ChannelReader(stored[1]) as file:
        assert file.generator == "test" and torch.equal(file.read(), stored[0])
