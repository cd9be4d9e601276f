"""The compiled codebook search where its steps could go wrong: bounds, lists that fill up, layouts, divided work."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

import csikernels
from csikernels import Codebook, _load, codebook_argmax

pytestmark = pytest.mark.op("codebook_pack", "codebook_search")

KINDS = ["gaussian", "cluster", "sparse", "dft", "repeated", "scaled"]


def gaussian(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_book(kind: str, k: int, d: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    words = gaussian(k, d, dtype=dtype, seed=seed)
    if kind == "cluster":
        return gaussian(3, d, dtype=dtype, seed=seed + 1)[torch.arange(k) % 3] + 10.0 ** -(seed % 7) * words
    if kind == "sparse":
        words[words.real.abs() < 1.5] = 0
        words[:, seed % d] += words.abs().sum(dim=1) == 0
        return words
    if kind == "dft":
        return torch.exp(2j * torch.pi * torch.outer(torch.arange(k), torch.arange(d)) / k).to(dtype)
    if kind == "repeated":
        return words[torch.arange(k) * 7 % max(1, k // 3)]
    if kind == "scaled":  # powers of two, so that no word loses a digit
        return torch.ldexp(words, torch.arange(k)[:, None] * 37 % 200 - 100)
    return words


def by_reference(h: torch.Tensor, book: torch.Tensor, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    with csikernels.use_backend("reference"):
        return codebook_argmax(h, book, **arguments)


def agrees(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=3e-7, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_sizes(backend, kind):
    draw = random.Random(kind)
    for seed in range(12):
        n, k, d = (draw.randint(1, 130) for _ in range(3))
        k *= draw.choice([1, 1, 12])
        h_type, book_type = (draw.choice([torch.complex64, torch.complex128]) for _ in range(2))
        book = make_book(kind, k, d, book_type, seed)
        h = gaussian(n, d, dtype=h_type, seed=seed + 100)
        if seed % 4 == 0:
            h.imag.zero_()
        agrees(codebook_argmax(h, book), by_reference(h, book))


def test_sampled_strides(backend):
    draw = random.Random(0)
    for seed in range(10):
        n, k, d = (draw.randint(1, 60) for _ in range(3))
        h = gaussian(d + 2, 2 * n, seed=seed).T[::2, 1 : d + 1]
        book = gaussian(d, 3, k, seed=seed + 1).permute(2, 1, 0)[:, seed % 3]
        if seed % 2:
            h = h.conj()
        agrees(codebook_argmax(h, book), by_reference(h.resolve_conj().clone(), book.clone()))


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_every_word_can_win(backend, precision):
    # Wherever a word lies in its tile, and whatever the order of words in the pack.
    for k in [*range(1, 35), 63, 64, 65, 127, 513, 1031]:
        book = gaussian(k, 24, seed=k)
        assert torch.equal(Codebook(book, precision).search(book)[0], torch.arange(k))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_whole_book_close_to_one_word(backend, dtype, noise):
    # Nearly all words survive the integer bound, with the smaller noises the float32 one too.
    book = gaussian(1, 20, dtype=dtype) + noise * gaussian(3000, 20, dtype=dtype, seed=1)
    h = torch.cat([gaussian(3, 20, seed=2), gaussian(1, 20) + noise * gaussian(4, 20, seed=3)])
    agrees(codebook_argmax(h, book), by_reference(h, book))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_close_words_beyond_the_range_of_float32(backend, scale):
    # Products of such rows would under- or overflow in float32, so they are scored in float64.
    book = (gaussian(1, 20) + 0.1 * gaussian(700, 20, seed=1)) * scale
    h = gaussian(8, 20, seed=2)
    agrees(codebook_argmax(h, book), by_reference(h, book))
    agrees(codebook_argmax(h * scale, book), by_reference(h * scale, book))


def test_one_coarse_component(backend):
    # One large component takes the integer range, and the small ones, which decide, are lost in its step.
    book = 1e-3 * gaussian(500, 16, seed=1)
    book[:, 0] = 1
    h = 1e-3 * gaussian(9, 16, seed=2)
    agrees(codebook_argmax(h, book), by_reference(h, book))
    h[:, 0] = 1
    agrees(codebook_argmax(h, book), by_reference(h, book))


def test_rows_too_long_for_seven_bits(backend):
    # 2 D products of two bytes would leave 32 bits.
    d = 70_000
    book = torch.ones(5, d, dtype=torch.complex64)
    book.view(torch.float32)[:, : 2 * d].mul_(1 + 1e-3 * torch.arange(5)[:, None])
    book[torch.arange(5), torch.arange(5)] += 40j
    h = torch.ones(2, d, dtype=torch.complex64)
    h[1, 3] -= 40j
    agrees(codebook_argmax(h, book), by_reference(h, book))


def test_books_of_several_environments(backend):
    books = gaussian(5, 77, 19)
    for n in (1, 9, 100):
        h, environment = gaussian(n, 19, seed=n), torch.randint(5, (n,), generator=torch.Generator().manual_seed(n))
        environment[environment == 3] = 1  # a book that nobody uses
        agrees(codebook_argmax(h, books, environment), by_reference(h, books, environment=environment))


@pytest.mark.parametrize("precision", ["exact", "float32"])
@pytest.mark.parametrize("n", [1, 16, 300])
def test_divided_work_changes_nothing(backend, threads, precision, n):
    # Few queries are divided by words, many by queries; the twins have equal similarities far apart in the book.
    words = gaussian(6000, 40)
    book = Codebook(torch.cat([words, words.conj(), words * 2]), precision)
    h = gaussian(n, 40, seed=1)
    h[: n // 2].imag.zero_()
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(book.search(h))
    assert torch.all(results[0][0] < 12000)
    for index, similarity in results[1:]:
        assert torch.equal(index, results[0][0]) and torch.equal(similarity, results[0][1])


def test_float32_is_nearly_the_best(backend):
    h, book = gaussian(50, 64), gaussian(3000, 64, seed=1)
    index, similarity = Codebook(book, "float32").search(h)
    scores = (h.to(torch.complex128) @ book.to(torch.complex128).conj().T).abs()
    scores /= h.to(torch.complex128).norm(dim=1)[:, None] * book.to(torch.complex128).norm(dim=1)
    chosen = scores.gather(1, index[:, None])[:, 0]
    assert torch.all(chosen >= scores.amax(dim=1) - 1e-6)
    torch.testing.assert_close(similarity, chosen.float(), rtol=3e-7, atol=0)


def test_out_of_memory_leaves_the_old_pack(backend):
    h, words = gaussian(9, 16), gaussian(40, 16, seed=1)
    book = Codebook(words)
    wanted = book.search(h)
    with pytest.raises(RuntimeError, match="memory"):
        book.update(torch.ones(1, 2**15, dtype=torch.complex64).expand(2**30, 2**15))  # 256 TiB once copied
    for got, expected in zip(book.search(h), wanted, strict=True):
        assert torch.equal(got, expected)
    assert book.shape == (40, 16)


def test_copies_and_pickles_search_alike(backend):
    h, book = gaussian(9, 16), Codebook(gaussian(40, 16, seed=1))
    for other in (copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert torch.equal(other.search(h)[0], book.search(h)[0])


def compiled(backend: str) -> None:
    if not backend.startswith("cpp"):
        pytest.skip("the layout is that of the compiled backend")


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_a_pack_outlives_its_capability(backend, precision):
    compiled(backend)
    assert _load.extension is not None
    h, words = gaussian(30, 33), gaussian(200, 33, seed=1)
    here = _load.extension.cpu_capability()
    copied, packed = torch.ops.csikernels.codebook_pack(words, precision)
    wanted = torch.ops.csikernels.codebook_search(h, copied, packed, None, precision)[0]
    for other in _load.extension.cpu_capabilities():
        _load.extension.set_cpu_capability(other)
        there = torch.ops.csikernels.codebook_pack(words, precision)[1]
        assert torch.equal(there, packed)
        assert torch.equal(torch.ops.csikernels.codebook_search(h, copied, packed, None, precision)[0], wanted)
    _load.extension.set_cpu_capability(here)


def test_a_pack_of_something_else_is_refused(backend):
    compiled(backend)
    h = gaussian(3, 8)
    words, packed = torch.ops.csikernels.codebook_pack(gaussian(16, 8), "exact")
    changed = packed.clone()
    changed[40] ^= 1
    others = {
        "header": (words, changed, "exact"),
        "precision": (words, packed, "float32"),
        "words": (words[:15].clone(), packed, "exact"),
        "dtype": (words, packed.view(torch.float32), "exact"),
    }
    for codewords, pack, precision in others.values():
        with pytest.raises(RuntimeError, match="packed: expected the C.. layout"):
            torch.ops.csikernels.codebook_search(h, codewords, pack, None, precision)


LARGEST = """
import resource, torch
from csikernels import Codebook
from csimodels.models.codebooks import rvq_codebook

torch.set_num_threads(1)
words = rvq_codebook(20, 128, seed=0)
sent = torch.arange(0, 2**20, 2048)
h = torch.cat([words[sent], torch.randn(512, 128, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))])
book = Codebook(words, copy=False)
index, similarity = book.search(h)
assert torch.equal(index[:512], sent), "its own words are found"
assert 0.3 < similarity[512:].mean() < 0.4, similarity[512:].mean()
print(book.nbytes, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_words_are_searched_in_bounded_memory(run_python, record_property):
    if _load.extension is None:
        pytest.skip("the reference takes minutes for this")
    shown = run_python(LARGEST)
    assert shown.returncode == 0, shown.stderr
    held, peak = map(int, shown.stdout.split())
    record_property("bytes", {"held": held, "peak": peak})
    words = 8 * 2**20 * 128
    assert words < held < 1.5 * words
    assert peak < 2.5e9
