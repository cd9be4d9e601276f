"""The COST 2100 files: every MAT version, the normalisation both ways, and files that are something else."""

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from csimodels.channels.cost2100 import from_complex, read_angle_delay, read_frequency, smallest_scale, to_complex

COUNT = 5


def angle_delay(count=COUNT):
    """Values of every entry that tell where it is: sample, part, angle and delay."""
    return np.random.default_rng(0).random((count, 2, 32, 32))


def frequency(count=COUNT):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, 32, 125)) + 1j * rng.standard_normal((count, 32, 125))


def save(path, variables, version):
    """``variables`` in MATLAB's order, as MATLAB of that version saves them."""
    if version in ("5", "7"):
        scipy.io.savemat(path, variables, do_compression=version == "7")
        return path
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in variables.items():
            if np.iscomplexobj(value):
                value = np.rec.fromarrays([value.real, value.imag], names="real,imag")
            file[name] = value.T
        file.create_group("#refs#")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


versions = pytest.mark.parametrize("version", ["5", "7", "7.3"])


@versions
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_angle_delay(tmp_path, version, dtype):
    x = angle_delay().astype(dtype)
    path = save(tmp_path / "DATA_Htestin.mat", {"HT": x.reshape(COUNT, 2048)}, version)
    read = read_angle_delay(path)
    assert read.dtype == torch.float32 and read.shape == (COUNT, 2, 32, 32)
    assert np.array_equal(read.numpy(), x.astype(np.float32))


@versions
@pytest.mark.parametrize("dtype", [np.complex128, np.complex64])
def test_frequency(tmp_path, version, dtype):
    h = frequency().astype(dtype)
    path = save(tmp_path / "DATA_HtestFin_all.mat", {"HF_all": h.reshape(COUNT, 4000)}, version)
    read = read_frequency(path)
    assert read.dtype == torch.complex64 and read.shape == (COUNT, 32, 125)
    assert np.array_equal(read.numpy(), h.astype(np.complex64))


@versions
def test_shaped_arrays_and_single_samples(tmp_path, version):
    x, h = angle_delay(1), frequency(1)
    path = save(tmp_path / "x.mat", {"HT": x, "HF_all": h, "other": np.ones((1, 1))}, version)
    assert np.array_equal(read_angle_delay(path).numpy(), x.astype(np.float32))
    assert np.array_equal(read_frequency(path).numpy(), h.astype(np.complex64))


# Normalisation --------------------------------------------------------------------------------------------------------


def test_to_complex_by_hand():
    x = torch.tensor([[[0.5, 1.0]], [[0.0, 0.75]]], dtype=torch.float64)
    expected = torch.tensor([[-0.5j, 0.5 + 0.25j]], dtype=torch.complex128)
    assert torch.equal(to_complex(x), expected)
    assert torch.equal(to_complex(x, scale=4.0), 4 * expected)


def test_there_and_back():
    x = torch.from_numpy(angle_delay())
    torch.testing.assert_close(from_complex(to_complex(x, 3.0), 3.0), x, rtol=0, atol=1e-15)
    h = torch.from_numpy(frequency()).to(torch.complex64)
    scale = smallest_scale(h)
    normalized = from_complex(h, scale)
    assert normalized.dtype == torch.float32 and normalized.min() >= 0 and normalized.max() <= 1
    torch.testing.assert_close(to_complex(normalized, scale), h, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(from_complex(h.conj().resolve_conj().conj(), scale), normalized)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: to_complex(torch.zeros(3, 32, 32)), r"\[\.\.\., 2, angle, delay\]"),
        (lambda: to_complex(torch.zeros(2, 32, 32, dtype=torch.int64)), "float"),
        (lambda: to_complex(torch.zeros(2, 32, 32), scale=0.0), "scale"),
        (lambda: from_complex(torch.full((2, 2), 0.6 + 0j)), r"at least 1\.2"),
        (lambda: from_complex(torch.zeros(2, 2)), "complex"),
        (lambda: from_complex(torch.zeros(0, 2, dtype=torch.complex64)), "not empty"),
        (lambda: from_complex(torch.full((2, 2), float("nan") + 0j)), "finite"),
    ],
)
def test_bad_arrays_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What is refused ------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.mat"):
        read_angle_delay(tmp_path / "x.mat")


@versions
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, version, kept):
    path = save(tmp_path / "x.mat", {"HT": angle_delay().reshape(COUNT, 2048)}, version)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="empty|truncated"):
        read_angle_delay(path)


@pytest.mark.parametrize("content", [b"text\n" * 100, b"\0" * 1000, b"\x89HDF\r\n\x1a\n" + b"\0" * 100])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(ValueError, match="not a MAT-file"):
        read_angle_delay(tmp_path / "x.mat")


@versions
def test_other_variables_are_named(tmp_path, version):
    path = save(tmp_path / "x.mat", {"H_other": np.ones((2, 3)), "abc": np.ones((2, 3))}, version)
    with pytest.raises(ValueError, match="expected a variable HT, got H_other, abc"):
        read_angle_delay(path)
    with pytest.raises(ValueError, match="expected a variable HF_all"):
        read_frequency(path)


@versions
@pytest.mark.parametrize("value", [np.zeros((COUNT, 2047)), np.zeros((COUNT, 2048), complex), np.zeros((2, 32, 32))])
def test_other_shapes_are_refused(tmp_path, version, value):
    with pytest.raises(ValueError, match=r"HT: expected real \[N, 2048\], got"):
        read_angle_delay(save(tmp_path / "x.mat", {"HT": value + (1j if np.iscomplexobj(value) else 0)}, version))


@versions
@pytest.mark.parametrize("value", [np.zeros((COUNT, 4000)), np.full((COUNT, 3999), 1j)])
def test_other_frequency_shapes_are_refused(tmp_path, version, value):
    with pytest.raises(ValueError, match=r"HF_all: expected complex \[N, 4000\], got"):
        read_frequency(save(tmp_path / "x.mat", {"HF_all": value}, version))


def test_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="numeric"):
        read_angle_delay(save(tmp_path / "x.mat", {"HT": "text"}, "5"))


@versions
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 1.01])
def test_samples_out_of_range_are_counted_and_named(tmp_path, version, value):
    x = angle_delay().reshape(COUNT, 2048)
    x[[2, 4], 7] = value
    with pytest.raises(ValueError, match="got 2 samples with others, first 2"):
        read_angle_delay(save(tmp_path / "x.mat", {"HT": x}, version))


@versions
def test_frequency_samples_that_are_not_finite_are_counted_and_named(tmp_path, version):
    h = frequency().reshape(COUNT, 4000)
    h[[1, 3], 9] = complex(0, np.nan)
    with pytest.raises(ValueError, match="2 samples are not finite, the first is sample 1"):
        read_frequency(save(tmp_path / "x.mat", {"HF_all": h}, version))
