"""Codebook feedback from the command line: codebooks made and shown, channels of files reported and restored."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.io
import torch
from command_line import refuse, run, succeed
from safetensors.torch import save_file

from csikernels import codebook_argmax
from csimodels.channels.hdf5 import ChannelReader, write_channels
from csimodels.channels.presets import split_811
from csimodels.channels.vector_file import VectorFile
from csimodels.evaluation.metrics import codeword_cosine
from csimodels.files import load_metadata, save_tensors
from csimodels.models.codebook_file import FeedbackCodebook, digests, load_codebook, save_codebook
from csimodels.models.codebooks import PortLayout, dft_codebook, rvq_codebook, type1_codebook
from csimodels.training.k_lines import k_lines, single_side_words

PORTS = PortLayout(2, 2, 4)
ARRAY = ("--ports", "2x2x4")


def channels(count: int = 30, subcarriers: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, subcarriers, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def write_site(path, h: torch.Tensor):
    """The channels in a file of the kind that its ending says."""
    flat = h[:, :, 0] if h.shape[2] == 1 else h
    if path.suffix == ".h5":
        sizes = {"antennas": h.shape[1], "subcarriers": h.shape[2]}
        with write_channels(path, **sizes, generator="test", parameters={}, seed=0) as writer:
            writer.append(h, environment=7, los=True)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {"h": flat.numpy()})
    elif path.suffix == ".npz":
        np.savez(path, h=flat.numpy(), extra=np.arange(3))
    else:
        save_file({"h": torch.view_as_real(flat).contiguous()}, path)
    return path


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "rvq.safetensors"
    succeed("codebook", "make", path, "--bits", 6, *ARRAY, "--seed", 3)
    return path


@pytest.fixture
def site(tmp_path):
    return write_site(tmp_path / "site.h5", channels())


# Codebooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--kind", "rvq", "--bits", 5, "--seed", 3), rvq_codebook(5, 16, seed=3)),
        (("--kind", "dft", "--bits", 8), dft_codebook(PORTS, (2, 4))),
        (("--kind", "type1", "--bits", 9), type1_codebook(4, 2, 4, 4)),
        (("--kind", "type1", "--bits", 9, "--codebook-mode", 2), type1_codebook(4, 2, 4, 4, codebook_mode=2)),
    ],
    ids=["rvq", "dft", "type1", "type1 mode 2"],
)
def test_conventional_codebooks_are_made(options, expected, tmp_path):
    path, bits = tmp_path / "book.safetensors", options[3]
    out = succeed("codebook", "make", path, *ARRAY, *options)
    assert out == f"wrote {2**bits} codewords of 16 numbers (B = {bits}) to {path}\n"
    made = load_codebook(path, ports=PORTS)
    assert made.kind == options[1] and made.deployment == "DS"
    assert torch.equal(made.words, expected)


def test_type1_of_a_line_of_ports(tmp_path):
    line = ("--ports", "2x1x4", "--kind", "type1")
    succeed("codebook", "make", tmp_path / "1", *line, "--bits", 6)
    assert torch.equal(load_codebook(tmp_path / "1").words, type1_codebook(4, 1, 4, 1))
    succeed("codebook", "make", tmp_path / "2", *line, "--bits", 7, "--codebook-mode", 2)
    assert torch.equal(load_codebook(tmp_path / "2").words, type1_codebook(4, 1, 4, 1, codebook_mode=2))


@pytest.mark.parametrize("subcarriers", [1, 3])
def test_k_lines_is_fitted_to_a_file(subcarriers, tmp_path):
    h = channels(40, subcarriers)
    source, path = write_site(tmp_path / "site.npz", h), tmp_path / "book.safetensors"
    out = succeed("codebook", "make", path, *ARRAY, "--kind", "k-lines", "--bits", 4, "--channels", source)
    fitted = k_lines(h.mT.flatten(0, 1), 4, seed=0)
    made = load_codebook(path)
    assert torch.equal(made.words, fitted.words)
    assert made.source["squared_cosine"] == fitted.squared_cosine and made.source["samples"] == 40 * subcarriers
    steps = len(fitted.squared_cosine) - 1
    assert f"mean cosine {fitted.cosine:.4f} on the training channels after {steps} iterations" in out


def test_show_says_what_a_file_holds(book, tmp_path):
    out = succeed("codebook", "show", book, *ARRAY)
    for name, value in {
        "kind": "rvq",
        "bits": "6 (64 codewords)",
        "dimension": "16",
        "ports": "2 x 2 x 4 (polarisations x rows x columns)",
        "deployment": "DS: both ends",
        "digest": load_codebook(book).digest(),
        "source: seed": "3",
    }.items():
        assert re.search(rf"│ {re.escape(name)} +│ {re.escape(value)} +│", out)
    words = torch.stack([rvq_codebook(3, 16, seed=seed) for seed in range(2)])
    save_codebook(tmp_path / "two", FeedbackCodebook(words, "k-lines", PORTS, environments=("UMa", "RMa")))
    out = succeed("codebook", "show", tmp_path / "two")
    assert re.search(r"digest of environment 1 \(RMa\) +│ [0-9a-f]{64}", out)


# Feedback -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".mat", ".npz", ".safetensors"])
@pytest.mark.parametrize("subcarriers", [1, 3])
def test_a_file_comes_back_as_its_codewords(suffix, subcarriers, book, tmp_path):
    h = channels(20, subcarriers)
    site, reports, restored = write_site(tmp_path / f"site{suffix}", h), tmp_path / "r", tmp_path / f"restored{suffix}"
    out = succeed("feedback", "encode", site, reports, "--codebook", book)
    count = 20 * subcarriers
    size = 24 + (6 * count + 7) // 8
    assert out == f"wrote {count} reports of 6 bits ({size} bytes) of 20 channels to {reports}\n"
    assert reports.stat().st_size == size
    out = succeed("feedback", "decode", reports, restored, "--codebook", book, "--truth", site)
    words = load_codebook(book).words
    expected = words[codebook_argmax(h.mT.flatten(0, 1), words)[0]].view(20, subcarriers, 16).mT
    assert torch.equal(VectorFile(restored, 16).read(), expected)
    cosine = codeword_cosine(h.mT, expected.mT).item()
    assert out == f"wrote 20 channels to {restored}\nmean cosine {cosine:.4f}\n"
    if suffix == ".h5":
        with ChannelReader(restored) as reader:
            assert (reader.environment == 7).all() and reader.los.all()


def test_without_the_truth_only_the_channels_are_written(book, site, tmp_path):
    succeed("feedback", "encode", site, tmp_path / "r", "--codebook", book)
    out = succeed("feedback", "decode", tmp_path / "r", tmp_path / "restored.npz", "--codebook", book)
    assert "cosine" not in out
    assert np.load(tmp_path / "restored.npz")["h"].shape == (30, 16)


def test_single_side_deployment(book, site, tmp_path):
    bs, reports = tmp_path / "bs.safetensors", tmp_path / "r"
    fit = ("codebook", "make", bs, *ARRAY, "--kind", "k-lines", "--channels", site, "--ue", book)
    succeed(*fit, "--bits", 6)
    made, ue = load_codebook(bs), load_codebook(book)
    assert (made.deployment, made.ue_digest) == ("SS", ue.digest())
    assert torch.equal(made.words, single_side_words(channels()[..., 0], ue.words))
    assert re.search(rf"digest of the UE's codebook +│ {ue.digest()}", succeed("codebook", "show", bs))
    succeed("feedback", "encode", site, reports, "--codebook", book)
    cosines = {}
    for name, path in {"ue": book, "bs": bs}.items():
        out = succeed("feedback", "decode", reports, tmp_path / "x.h5", "--codebook", path, "--truth", site)
        cosines[name] = float(re.search(r"mean cosine ([\d.]+)", out)[1])
    assert cosines["bs"] > cosines["ue"] + 0.1
    message = refuse("feedback", "encode", site, reports, "--codebook", bs)
    assert f"expected the codebook that the UE keeps, of digest {ue.digest()}" in message
    assert "bits: expected 6, as the UE's codebook has, got 5" in refuse(*fit, "--bits", 5)


def test_environments_are_chosen_by_their_index(site, tmp_path):
    words = torch.stack([rvq_codebook(5, 16, seed=seed) for seed in range(2)])
    path, reports = tmp_path / "books", tmp_path / "r"
    save_codebook(path, FeedbackCodebook(words, "k-lines", PORTS, environments=("UMa", "RMa")))
    succeed("feedback", "encode", site, reports, "--codebook", path, "--environment", 1)
    succeed("feedback", "decode", reports, tmp_path / "x.h5", "--codebook", path, "--environment", 1)
    index, _ = codebook_argmax(channels()[..., 0], words[1])
    assert torch.equal(VectorFile(tmp_path / "x.h5", 16).read()[..., 0], words[1][index])
    decode = ("feedback", "decode", reports, tmp_path / "y.h5", "--codebook", path)
    assert "of another codebook: expected the digest" in refuse(*decode, "--environment", 0)
    assert "environment: expected 0 to 1 (UMa, RMa), got 2" in refuse(*decode, "--environment", 2)
    assert "environment: expected 0 to 1 (UMa, RMa), got none" in refuse(*decode)
    assert not (tmp_path / "y.h5").exists()


def test_words_that_are_normalised_are_mentioned(book, site, tmp_path):
    words = 2 * torch.view_as_real(load_codebook(book).words)
    found = list(digests(torch.view_as_complex(words), PORTS))
    save_tensors(book, {"words": words}, {**load_metadata(book), "digests": found})
    code, _, err = run("feedback", "encode", site, tmp_path / "r", "--codebook", book)
    assert code == 0
    assert err == f"note: {book}: normalised 64 of 64 codewords, whose norms were 2 to 2, not 1\n"


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "grassmann"), "kind: expected one of rvq, dft, type1, k-lines, got 'grassmann'"),
        (("--bits", 0), "bits: expected 1 to 20, got 0"),
        (("--bits", 21, "--kind", "dft"), "bits: expected 1 to 20, got 21"),
        (("--bits", 4, "--kind", "dft"), "bits: expected at least 5"),
        (("--kind", "k-lines"), "channels: expected with --kind k-lines, and only there"),
        (("--channels", "a.h5"), "channels: expected with --kind k-lines, and only there"),
        (("--ue", "a"), "ue: expected only with --kind k-lines"),
        (("--kind", "k-lines", "--channels", "no.h5"), "no.h5: no such file"),
        (("--ports", "2x8"), "ports: expected polarisations x rows x columns such as 2x8x8, got '2x8'"),
        (("--ports", "3x8x8"), "polarisations: expected 1 or 2, got 3"),
        (("--ports", "1x8x8", "--kind", "type1"), "ports: expected two polarisations for type1, got 1 x 8 x 8"),
        (("--kind", "type1", "--codebook-mode", 3), "codebook_mode: expected 1 or 2, got 3"),
    ],
)
def test_codebooks_that_cannot_be_made(options, message, tmp_path):
    assert message in refuse("codebook", "make", tmp_path / "a", *ARRAY, *options)
    assert not (tmp_path / "a").exists()


def test_a_codebook_for_another_array_is_refused(book, tmp_path):
    message = refuse("codebook", "show", book, "--ports", "1x4x4")
    assert "expected a codebook for 1 x 4 x 4 (" in message and "got one for 2 x 2 x 4 (" in message
    message = refuse("codebook", "show", tmp_path / "none")
    assert message == f"{tmp_path}/none: no such file"


def test_channels_that_cannot_be_reported(book, tmp_path):
    def encode(name: str, h: torch.Tensor | None = None, *options: str) -> str:
        if h is not None:
            write_site(tmp_path / name, h)
        return refuse("feedback", "encode", tmp_path / name, tmp_path / "r", "--codebook", book, *options)

    assert "no such file" in encode("none.h5")
    assert "no such file" in encode("none.npz")
    assert "expected channels of D = 16 ports, got shape (30, 8, 1)" in encode("a.h5", channels()[:, :8])
    assert "a.mat: h: expected channels of D = 16 ports, got shape (30, 8)" in encode("a.mat", channels()[:, :8])
    broken = channels(5000)
    broken[4500] = 0
    message = encode("b.npz", broken)
    assert "samples from 4096 on: h: 1 channels are zero or not finite, the first is 404" in message
    message = encode("c.npz", channels(), "--variable", "H")
    assert "c.npz: expected a variable H, got extra, h" in message
    assert "extra: expected complex [N, D] or [N, D, S], got int64 (3,)" in encode("c.npz", None, "--variable", "extra")
    assert "expected a variable H, got h" in encode("d.safetensors", channels(), "--variable", "H")
    assert "expected a variable H, got h" in encode("d.mat", channels(), "--variable", "H")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.mat", "a.h5"])
def test_files_that_are_not_what_their_ending_says(name, book, tmp_path):
    for content in (b"", b"PK\x03\x04" + bytes(50), bytes(100)):
        (tmp_path / name).write_bytes(content)
        assert name in refuse("feedback", "encode", tmp_path / name, tmp_path / "r", "--codebook", book)
    whole = write_site(tmp_path / name, channels()).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert name in refuse("feedback", "encode", tmp_path / name, tmp_path / "r", "--codebook", book)


def test_complex_numbers_in_safetensors(book, tmp_path):
    save_file({"H": channels()[..., 0]}, tmp_path / "a.safetensors")
    assert torch.equal(VectorFile(tmp_path / "a.safetensors", 16, "H").read(), channels())
    save_file({"h": channels().real.contiguous()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: h: expected complex \[N, D\] .*, got float32 \(30, 16, 1\)"):
        VectorFile(tmp_path / "b.safetensors", 16)


def test_a_single_array_is_no_npz(book, tmp_path):
    np.save(tmp_path / "a.npy", channels().numpy())
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    message = refuse("feedback", "encode", tmp_path / "a.npz", tmp_path / "r", "--codebook", book)
    assert "not a readable .npz file of plain arrays (a single .npy array)" in message


def test_pickled_arrays_are_refused(book, tmp_path):
    np.savez(tmp_path / "a.npz", h=np.array([{"a": 1}], dtype=object))
    message = refuse("feedback", "encode", tmp_path / "a.npz", tmp_path / "r", "--codebook", book)
    assert "not a readable .npz file of plain arrays" in message


def test_reports_that_cannot_be_decoded_leave_the_old_file(book, site, tmp_path):
    reports, restored = tmp_path / "r", tmp_path / "restored.h5"
    succeed("feedback", "encode", site, reports, "--codebook", book)
    restored.write_bytes(b"what was there")
    decode = ("feedback", "decode", reports, restored, "--codebook")
    other = tmp_path / "other.safetensors"
    succeed("codebook", "make", other, "--bits", 6, *ARRAY)
    assert f"{reports}: stream: of another codebook" in refuse(*decode, other)
    write_site(tmp_path / "short.h5", channels(29))
    message = refuse(*decode, book, "--truth", tmp_path / "short.h5")
    assert "expected the 30 samples of 1 subcarriers that were encoded, got 29 of 1" in message
    reports.write_bytes(reports.read_bytes()[:-2])
    assert "truncated or corrupted: expected 47 bytes for 30 reports of 6 bits, found 45" in refuse(*decode, book)
    assert "no such file" in refuse("feedback", "decode", tmp_path / "none", restored, "--codebook", book)
    assert restored.read_bytes() == b"what was there"


def test_train_refines_a_codebook_and_continues(tmp_path):
    site_file, out = tmp_path / "site.h5", tmp_path / "book"
    h = channels(60)
    write_site(site_file, h)
    arguments = (
        "--channels",
        site_file,
        "--network",
        "fc",
        "--bits",
        "3",
        *ARRAY,
        "--epochs",
        "2",
        "--batch-size",
        "8",
    )
    text = succeed("codebook", "train", out, *arguments)
    book = load_codebook(out / "codebook.safetensors")
    assert (book.kind, book.bits, book.deployment) == ("fc", 3, "DS")
    told = re.search(r"mean cosine ([0-9.]+) on the validation channels \(([0-9.]+) before\)", text)
    _, validation, _ = split_811(60, seed=0)
    similarity = codebook_argmax(h[validation, :, 0], book.words)[1]
    assert float(told[1]) == pytest.approx(similarity.mean().item(), abs=1e-4) and float(told[1]) >= float(told[2])
    before = (out / "codebook.safetensors").stat().st_mtime_ns
    assert succeed("codebook", "train", out, *arguments).split() == text.split()
    assert (out / "codebook.safetensors").stat().st_mtime_ns == before  # a finished run is read
    assert "belongs to another training" in refuse("codebook", "train", out, *arguments, "--seed", "1")


def test_train_single_side_keeps_the_ues_codebook(tmp_path):
    site_file, ue, out = tmp_path / "site.npz", tmp_path / "ue.safetensors", tmp_path / "book"
    write_site(site_file, channels(60))
    succeed("codebook", "make", ue, "--bits", "3", *ARRAY)
    start = ("--channels", site_file, "--network", "fc", "--deployment", "SS", "--start", ue, *ARRAY)
    short = ("--epochs", "1", "--batch-size", "8")
    succeed("codebook", "train", out, *start, *short)
    book = load_codebook(out / "codebook.safetensors")
    assert (book.deployment, book.ue_digest) == ("SS", load_codebook(ue).digest())
    tuned = ("--initial", out / "model.safetensors")
    succeed("codebook", "train", tmp_path / "tuned", *start, *tuned, *short)
    told = refuse("codebook", "train", out, *start, "--deployment", "both")
    assert told == "deployment: expected SS or DS, got 'both'"
    assert "expected a network of" in refuse("codebook", "train", tmp_path / "x", *start, *tuned, "--network", "lvm4cf")
