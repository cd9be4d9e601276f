"""Codebook files: they come back as they were, and whatever does not fit is refused or said."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from csimodels.files import load_metadata, save_tensors
from csimodels.models import codebook_file
from csimodels.models.codebook_file import FeedbackCodebook, digests, load_codebook, save_codebook
from csimodels.models.codebooks import PortLayout, dft_codebook, rvq_codebook

PORTS = PortLayout(2, 2, 4)


def book(bits: int = 5, seed: int = 0, **changes: object) -> FeedbackCodebook:
    fields = {"words": rvq_codebook(bits, 16, seed=seed), "kind": "rvq", "ports": PORTS, "source": {"seed": seed}}
    return FeedbackCodebook(**{**fields, **changes})


def several() -> FeedbackCodebook:
    words = torch.stack([rvq_codebook(4, 16, seed=seed) for seed in range(3)])
    return book(words=words, kind="k-lines", environments=("UMa", "RMa", "InF"))


@pytest.mark.parametrize(
    "make",
    [
        book,
        several,
        lambda: book(deployment="SS", ue_digest=book(seed=9).digest(), kind="lvm4cf", source={"run": {"epochs": 3}}),
    ],
    ids=["one", "several environments", "single-side"],
)
def test_a_codebook_returns_bit_for_bit(make, tmp_path):
    saved = make()
    save_codebook(tmp_path / "a.safetensors", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_codebook(tmp_path / "a.safetensors", ports=PORTS)
    assert torch.equal(loaded.words, saved.words)
    for field in dataclasses.fields(saved):
        if field.name != "words":
            assert getattr(loaded, field.name) == getattr(saved, field.name)
    assert (loaded.bits, loaded.dimension) == (saved.bits, saved.dimension) and saved.dimension == 16
    environment = 1 if saved.environments else None
    assert loaded.digest(environment) == saved.digest(environment)


def test_the_file_is_as_documented(tmp_path):
    save_codebook(tmp_path / "a.safetensors", several())
    words = load_file(tmp_path / "a.safetensors")["words"]
    assert words.dtype == torch.float32 and words.shape == (3, 16, 16, 2)
    assert torch.equal(torch.view_as_complex(words), several().words)
    metadata = load_metadata(tmp_path / "a.safetensors")
    assert metadata["ports"] == {"polarisations": 2, "rows": 2, "columns": 4}
    assert (metadata["bits"], metadata["dimension"], metadata["deployment"]) == (4, 16, "DS")


def test_digests_tell_words_and_port_layouts_apart():
    first = book()
    assert first.digest() == book().digest() and len(first.digest()) == 64
    words = first.words.clone()
    words[7, 3] = words[7, 3].conj()
    others = [book(seed=1), book(words=words), book(ports=PortLayout(2, 4, 2)), book(words=first.words.flip(0))]
    assert len({first.digest(), *(other.digest() for other in others)}) == 5
    assert first.feedback_digest() == bytes.fromhex(first.digest())[:8]


def test_digests_read_every_block(monkeypatch):
    words, whole = book().words, book().digest()
    monkeypatch.setattr(codebook_file, "_BLOCK", 5)
    assert digests(words, PORTS) == (whole,)


def test_an_environments_codebook_has_the_digest_that_it_has_alone():
    many = several()
    for index in range(3):
        alone = book(words=many.words[index].clone(), kind="k-lines")
        assert many.digest(index) == alone.digest() and torch.equal(many.select(index), alone.select())
        assert many.feedback_digest(index) == alone.feedback_digest()
    assert len({many.digest(index) for index in range(3)}) == 3


def test_with_single_side_deployment_reports_name_the_ues_codebook():
    ue = book(seed=9)
    bs = book(deployment="SS", ue_digest=ue.digest())
    assert bs.feedback_digest() == ue.feedback_digest() != bytes.fromhex(bs.digest())[:8]


# Norms ----------------------------------------------------------------------------------------------------------------


def test_words_of_other_norms_are_normalised_and_that_is_said(monkeypatch):
    monkeypatch.setattr(codebook_file, "_BLOCK", 5)
    words = rvq_codebook(5, 16, seed=0)
    scaled = words.clone()
    scaled[2], scaled[9], scaled[30] = 4 * words[2], words[9] / 2, words[30] * 2.0**-130
    given = scaled.clone()
    with pytest.warns(UserWarning, match=r"normalised 3 of 32 codewords, whose norms were .* to 4, not 1") as caught:
        made = book(words=scaled)
    assert caught[0].filename == __file__
    assert torch.equal(scaled, given)
    torch.testing.assert_close(made.words, words, atol=1e-6, rtol=1e-4)


def test_unit_words_are_kept_without_a_copy_and_without_a_word():
    words = rvq_codebook(5, 16, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = book(words=words)
    assert made.words.data_ptr() == words.data_ptr()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_words_without_a_direction_are_named(value):
    what = "is zero" if value == 0 else "is not finite"
    words = several().words.clone()
    words[2, 4] = value
    with pytest.raises(ValueError, match=f"codeword 4 of environment 2 {what}"):
        book(words=words, environments=("a", "b", "c"))
    with pytest.raises(ValueError, match=f"codeword 4 {what}"):
        book(words=words[2])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"words": torch.ones(4, 16)}, TypeError, "words: expected complex64, got torch.float32"),
        ({"words": [1]}, TypeError, "words: expected complex64, got list"),
        (
            {"words": torch.ones(4, dtype=torch.complex64)},
            ValueError,
            "words: expected a non-empty [K, D] or [E, K, D]",
        ),
        ({"words": rvq_codebook(3, 15, seed=0)}, ValueError, "words: expected D = 16 for 2 x 2 x 4 (polarisations"),
        ({"words": rvq_codebook(3, 16, seed=0)[:7]}, ValueError, "words: expected 2^B codewords, got 7"),
        ({"words": rvq_codebook(3, 16, seed=0)[:1]}, ValueError, "bits: expected 1 to 20, got 0"),
        ({"environments": ("UMa",)}, ValueError, "environments: expected 0 names, got 1"),
        ({"deployment": "both"}, ValueError, "deployment: expected SS or DS, got 'both'"),
        ({"deployment": "SS"}, ValueError, "ue_digest: expected 64 hexadecimal digits with SS, got None"),
        ({"deployment": "SS", "ue_digest": "xyz"}, ValueError, "ue_digest: expected 64 hexadecimal digits with SS"),
        ({"ue_digest": "0" * 64}, ValueError, "ue_digest: expected none with DS"),
        (
            {"words": several().words, "environments": ("a", "b", "c"), "deployment": "SS", "ue_digest": "0" * 64},
            ValueError,
            "deployment: expected DS for several environments, got SS",
        ),
    ],
)
def test_codebooks_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error) as raised:
        book(**changes)
    assert message in str(raised.value)


def test_more_than_twenty_bits_are_refused():
    words = torch.ones(1, 1, dtype=torch.complex64).expand(2**21, 1)
    with pytest.raises(ValueError, match="bits: expected 1 to 20, got 21"):
        FeedbackCodebook(words, "rvq", PortLayout(1, 1, 1))


def test_environments_out_of_range():
    for index in (-1, 3, None):
        with pytest.raises(ValueError, match=r"environment: expected 0 to 2 \(UMa, RMa, InF\), got"):
            several().select(index)
    with pytest.raises(ValueError, match="environment: expected none for a codebook of one environment, got 0"):
        book().digest(0)


def test_a_file_for_another_array_is_refused(tmp_path):
    save_codebook(tmp_path / "a.safetensors", book())
    with pytest.raises(ValueError) as raised:
        load_codebook(tmp_path / "a.safetensors", ports=PortLayout(1, 4, 4))
    for layout in ("for 1 x 4 x 4", "for 2 x 2 x 4"):
        assert layout in str(raised.value)


def rewritten(path, change_words=None, **changes: object) -> None:
    """The file with other metadata, or other words under the metadata that it had."""
    words = load_file(path)["words"]
    save_tensors(
        path, {"words": words if change_words is None else change_words(words)}, {**load_metadata(path), **changes}
    )


def swap(words: torch.Tensor) -> torch.Tensor:
    return words[[1, 0, *range(2, len(words))]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "not a readable safetensors file"),
        (lambda p: rewritten(p, format="csimodels.proxy"), "not a codebook (its metadata has no format"),
        (lambda p: rewritten(p, swap), "damaged: the codewords do not have the digests of its metadata"),
        (lambda p: rewritten(p, lambda w: w.double()), "words: expected float32 [..., K, D, 2], got torch.float64"),
        (lambda p: rewritten(p, bits=4), "expected B, D = (4, 16) as its metadata say, got (5, 16)"),
        (lambda p: rewritten(p, ports={"rows": 2}), "damaged"),
        (lambda p: rewritten(p, ports={"panels": 2}), "does not know its description"),
        (lambda p: rewritten(p, deployment="SS"), "ue_digest: expected 64 hexadecimal digits"),
        (lambda p: rewritten(p, environments=["a"]), "environments: expected 0 names, got 1"),
    ],
    ids=["empty", "cut", "foreign", "changed", "double", "bits", "other ports", "unknown", "no digest", "environments"],
)
def test_damaged_and_foreign_files_are_refused(change, message, tmp_path):
    path = tmp_path / "a.safetensors"
    save_codebook(path, book())
    change(path)
    with pytest.raises(ValueError) as raised:
        load_codebook(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_a_file_of_words_of_other_norms_is_normalised_and_that_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    save_codebook(path, book())
    doubled = 2 * book().words
    rewritten(path, lambda w: 2 * w, digests=list(digests(doubled, PORTS)))
    with pytest.warns(UserWarning, match="normalised 32 of 32 codewords"):
        loaded = load_codebook(path)
    torch.testing.assert_close(loaded.words, book().words)


def test_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_codebook(tmp_path / "a.safetensors")


def test_a_source_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    save_codebook(tmp_path / "a.safetensors", book())
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_codebook(tmp_path / "a.safetensors", book(source={"seed": torch.tensor(1)}))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert json.loads(json.dumps(load_metadata(tmp_path / "a.safetensors")["source"])) == {"seed": 0}


def test_beams_of_the_papers_array(tmp_path):
    made = FeedbackCodebook(dft_codebook(PortLayout(), (1, 1), 4), "dft", PortLayout())
    assert (made.bits, made.dimension) == (8, 128)
