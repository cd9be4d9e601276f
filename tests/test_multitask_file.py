"""Files of the multi-task commands: they come back as they were, and what does not fit is refused in one line."""

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import load_file, save_file

from csimodels.channels.multitask_file import ARRAYS, read_multitask, write_multitask
from csimodels.files import load_metadata

SHAPES = {
    "history": (3, 5, 7),
    "future": (3, 2, 7),
    "speed_kmh": (3,),
    "channels": (3, 6, 4),
    "received": (3, 8, 6),
    "noise_power": (3,),
    "precoder": (3, 6, 4),
    "symbols": (3, 8, 4),
}
REAL = ("speed_kmh", "noise_power")
ENDINGS = (".safetensors", ".npz", ".mat")


def arrays(*names, **changes):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in names or ARRAYS:
        shape = changes.get(name, SHAPES[name])
        real = torch.rand(shape, generator=generator) + 0.1
        made[name] = real if name in REAL else torch.complex(real, torch.randn(shape, generator=generator))
    return made


@pytest.fixture
def refused(tmp_path):
    """The message with which a file of this content is refused, without the name of the file, which it begins with."""

    def message(content, required=("history",), name="a.npz", **options):
        path = tmp_path / name
        if isinstance(content, dict):
            np.savez(path, **{key: np.asarray(value) for key, value in content.items()})
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError) as raised:
            read_multitask(path, required, **options)
        text = str(raised.value)
        assert text.startswith(f"{path}: ") and "\n" not in text
        return text.removeprefix(f"{path}: ")

    return message


@pytest.mark.parametrize("ending", ENDINGS)
def test_all_arrays_return_bit_for_bit(ending, tmp_path):
    written = arrays()
    parameters = {"carrier": 2.4e9, "slot": 0.5e-3}
    write_multitask(tmp_path / f"a{ending}", written, parameters)
    read = read_multitask(tmp_path / f"a{ending}", ARRAYS)
    assert set(read.arrays) == set(ARRAYS)
    for name, values in written.items():
        assert read[name].dtype == (torch.float32 if name in REAL else torch.complex64)
        assert torch.equal(read[name], values), name
    assert read.parameters == (parameters if ending == ".safetensors" else {})


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name, shape", [("history", (2, 3, 5, 7)), ("history", (1, 1, 1)), ("channels", (2, 6, 1))])
def test_other_ranks_and_sizes_of_one(ending, name, shape, tmp_path):
    written = arrays(name, **{name: shape})
    write_multitask(tmp_path / f"a{ending}", written)
    assert torch.equal(read_multitask(tmp_path / f"a{ending}", [name])[name], written[name])


def test_strided_conjugated_double_precision_and_differentiable_arrays(tmp_path):
    base = torch.randn(7, 5, 3, dtype=torch.complex128)
    for number, values in enumerate([base.permute(2, 1, 0), base.permute(2, 1, 0).conj(), base.mT.requires_grad_()]):
        path = tmp_path / f"{number}.safetensors"
        write_multitask(path, {"history": values})
        expected = values.detach().to(torch.complex64).resolve_conj()
        assert torch.equal(read_multitask(path, ["history"])["history"], expected)


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "a.safetensors"
    write_multitask(path, arrays("history", "speed_kmh"), {"slot": 0.5e-3})
    stored = load_file(path)
    assert stored["history"].dtype == torch.float32 and stored["history"].shape == (3, 5, 7, 2)
    metadata = load_metadata(path)
    assert metadata["axes"] == {"history": ["sample", "history slot", "subcarrier"], "speed_kmh": ["sample"]}
    assert metadata["units"] == {"history": "1", "speed_kmh": "km/h"}
    assert metadata["format"] == "csimodels.multitask" and metadata["parameters"] == {"slot": 0.5e-3}


def test_files_of_other_tools_are_read(tmp_path):
    history = np.random.default_rng(0).standard_normal((2, 4, 3)) * (1 + 2j)
    scipy.io.savemat(tmp_path / "a.mat", {"history": history, "comment": "text"})
    expected = torch.from_numpy(history).to(torch.complex64)
    assert torch.equal(read_multitask(tmp_path / "a.mat", ["history"])["history"], expected)
    for metadata in (None, {"format": "pt"}):
        save_file({"history": expected}, tmp_path / "b.safetensors", metadata)  # complex, as csimodels does not write
        read = read_multitask(tmp_path / "b.safetensors", ["history"])
        assert torch.equal(read["history"], expected) and read.parameters == {}
    scipy.io.savemat(tmp_path / "c.mat", {"channels": np.ones((2, 3, 4)) * 1j, "noise_power": np.array([[0.1], [0.2]])})
    assert read_multitask(tmp_path / "c.mat", ["channels", "noise_power"])["noise_power"].shape == (2,)
    scipy.io.savemat(tmp_path / "d.mat", {"channels": np.ones((2, 3)) * 1j})  # as MATLAB stores one user
    assert read_multitask(tmp_path / "d.mat", ["channels"])["channels"].shape == (2, 3, 1)


def test_optional_arrays(tmp_path):
    path = tmp_path / "a.npz"
    write_multitask(path, arrays("history", "future"))
    read = read_multitask(path, ["history"], optional=["future", "speed_kmh"])
    assert "future" in read and "speed_kmh" not in read
    assert "future" not in read_multitask(path, ["history"])
    with pytest.raises(KeyError):
        read["speed_kmh"]


def test_sizes(tmp_path):
    path = tmp_path / "a.npz"
    write_multitask(path, arrays("history"))
    read_multitask(path, ["history"], sizes={"subcarrier": 7, "history slot": 5, "antenna": 9})
    with pytest.raises(ValueError) as raised:
        read_multitask(path, ["history"], sizes={"subcarrier": 48})
    assert str(raised.value) == f"{path}: history: expected 48 of axis subcarrier, as this model has, got 7"


def test_files_that_are_not_whole_are_refused(refused, tmp_path):
    for ending, what in ((".safetensors", "safetensors"), (".npz", "npz"), (".mat", "MAT-file")):
        assert refused(b"", name=f"empty{ending}") == "the file is empty"
        assert what in refused(b"something else " * 40, name=f"other{ending}")
        write_multitask(tmp_path / f"whole{ending}", arrays("history"))
        content = (tmp_path / f"whole{ending}").read_bytes()
        for kept in (len(content) - 1, len(content) // 2, 20):
            if ending == ".mat" and kept == len(content) - 1:
                continue  # a byte of padding
            assert refused(content[:kept], name=f"cut{ending}")


def test_a_missing_array_or_file_is_named(refused, tmp_path):
    assert refused({"h": np.ones(3), "x": np.ones(3)}) == "expected an array history, got h, x"
    assert refused({}) == "expected an array history, got none"
    for ending in ENDINGS:
        with pytest.raises(FileNotFoundError, match=f"none{ending}: no such file"):
            read_multitask(tmp_path / f"none{ending}", ["history"])
    for act in (lambda path: read_multitask(path, ["history"]), lambda path: write_multitask(path, arrays())):
        with pytest.raises(
            ValueError, match=r"a.h5: expected a file name that ends in one of .mat, .npz, .safetensors"
        ):
            act(tmp_path / "a.h5")


def test_arrays_that_do_not_fit_are_refused(refused):
    message = refused({"history": np.ones((3, 4), complex)})
    assert message == (
        "history: expected complex [sample, history slot, subcarrier] or [sample, antenna, history slot, subcarrier], "
        "not empty, got complex128 (3, 4)"
    )
    assert "got float64 (3, 4, 5)" in refused({"history": np.ones((3, 4, 5))})
    assert "got complex64 (0, 4, 5)" in refused({"history": np.ones((0, 4, 5), np.complex64)})
    assert "expected a numeric array" in refused({"history": np.array(["a"])})
    assert "not a readable .npz" in refused({"history": np.array([{}], dtype=object)})
    message = refused({"noise_power": np.ones(3, complex)}, ["noise_power"])
    assert message == "noise_power: expected real [sample], not empty, got complex128 (3,)"


def test_arrays_of_different_sizes_are_refused(refused):
    channels = np.ones((3, 6, 4), complex)
    both = ["channels", "received"]
    message = refused({"channels": channels, "received": np.ones((2, 8, 6), complex)}, both)
    assert message == "received: expected 3 of axis sample, as channels has, got 2"
    message = refused({"channels": channels, "received": np.ones((3, 8, 5), complex)}, both)
    assert message == "received: expected 6 of axis antenna, as channels has, got 5"


def test_numbers_that_are_not_finite_are_refused(refused):
    history = np.ones((4, 3, 2), complex)
    history[2, 1, 1] = np.nan
    expected = "history: expected finite numbers, got others in 1 of 4 samples, the first is sample 2"
    assert refused({"history": history}) == expected
    history[2, 1, 1], history[1, 0, 0] = 1, 1e300  # beyond single precision
    assert refused({"history": history}).endswith("the first is sample 1")
    for bad in (0.0, -1.0, np.nan, np.inf):
        message = refused({"noise_power": np.array([1.0, bad, 1.0])}, ["noise_power"])
        assert message.startswith("noise_power: expected positive and finite numbers, got others in 1 of 3 samples")
    assert refused({"speed_kmh": np.array([np.nan])}, ["speed_kmh"]).startswith("speed_kmh: expected finite")


def test_what_is_written_is_checked_before_a_file_is_begun(tmp_path):
    path = tmp_path / "folder" / "a.npz"
    cases = [
        ({}, "arrays: expected at least one of history, future, "),
        ({"h": torch.ones(1)}, "arrays: expected some of history, future, .*, got 'h'"),
        ({"history": torch.ones(2, 3, 4)}, r"^history: expected complex .*, got float32 \(2, 3, 4\)"),
        (arrays("channels", "symbols", symbols=(3, 8, 5)), "^symbols: expected 4 of axis user, as channels has, got 5"),
        ({"speed_kmh": torch.tensor([torch.inf])}, "^speed_kmh: expected finite numbers"),
    ]
    for content, message in cases:
        with pytest.raises(ValueError, match=message):
            write_multitask(path, content)
    assert not path.parent.exists()
    with pytest.raises(ValueError, match="required: expected some of .*, got 'h'"):
        read_multitask(path, ["h"])


def test_an_old_file_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_multitask(path, arrays("history"))
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        write_multitask(path, arrays("future"))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
