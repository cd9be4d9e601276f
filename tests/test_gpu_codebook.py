"""codebook_argmax and Codebook on a GPU, or its simulator: the float64 argmax, as on every backend."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import simulator
import torch
from test_codebook import dft, gaussian, oracle
from test_codebook_kernels import KINDS, agrees, by_reference, make_book

from csikernels import Codebook, codebook_argmax

pytestmark = pytest.mark.gpu("cuda", "triton")


def search(device, h, book, environment=None, precision="exact"):
    environment = None if environment is None else environment.to(device)
    index, similarity = Codebook(book.to(device), precision).search(h.to(device), environment)
    assert index.dtype == torch.int64 and similarity.dtype == torch.float32
    return index.cpu(), similarity.cpu()


def check(device, h, book, environment=None):
    agrees(search(device, h, book, environment), by_reference(h, book, environment=environment))


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(37, 1000, 128), (1, 1, 1), (1, 17, 3), (3, 129, 31), (5, 33, 1), (2, 1300, 7), (70, 15, 65), (40, 200, 256)],
)
def test_matches_float64(device, dtype, n, k, d):
    h, book = gaussian(n, d, dtype=dtype, seed=1), gaussian(k, d, dtype=dtype, seed=2)
    index, similarity = search(device, h, book)
    best, wanted = oracle(h, book).max(dim=1)
    assert torch.equal(index, torch.zeros(n, dtype=torch.int64) if d == 1 else wanted)  # d == 1: one big tie
    torch.testing.assert_close(similarity, best.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("precision", ["exact", "float32"])
@pytest.mark.parametrize("k", [1, 2, 127, 128, 129, 300])
def test_every_word_can_win(device, precision, k):
    # Wherever a word lies in its tile, and whatever the order of words in the pack.
    book = gaussian(k, 24, seed=k)
    assert torch.equal(search(device, book, book, precision=precision)[0], torch.arange(k))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_sizes(device, kind):
    draw = random.Random(kind)
    for seed in range(4):
        n, k, d = (draw.randint(1, 70) for _ in range(3))
        k *= draw.choice([1, 7])
        h_type, book_type = (draw.choice([torch.complex64, torch.complex128]) for _ in range(2))
        h, book = gaussian(n, d, dtype=h_type, seed=seed + 100), make_book(kind, k, d, book_type, seed)
        if seed == 0:
            h.imag.zero_()
        check(device, h, book)


def test_a_dimension_beyond_shared_memory_takes_the_reference(device):
    h, book = gaussian(3, 257), gaussian(40, 257, seed=1)
    check(device, h, book)


# Exactness ------------------------------------------------------------------------------------------------------------


def test_close_codewords_are_told_apart(device):
    # Rotating a word away from h by t lowers the similarity by t^2 / 2: these differ by far less than float32 sees.
    h = gaussian(1, 64, dtype=torch.complex128)
    unit = h / h.norm()
    other = gaussian(1, 64, dtype=torch.complex128, seed=5)
    other -= (unit.conj() * other).sum() * unit
    book = unit + torch.linspace(3e-3, 2.5e-3, 12, dtype=torch.float64)[:, None] * other / other.norm()
    assert search(device, h, book)[0].item() == 11
    assert search(device, h, book.flip(0))[0].item() == 0


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_lists_of_nearly_the_whole_book(device, noise):
    book = gaussian(1, 12, dtype=torch.complex128) + noise * gaussian(2500, 12, dtype=torch.complex128, seed=1)
    h = torch.cat([gaussian(1, 12, seed=2), gaussian(1, 12) + noise * gaussian(1, 12, seed=3)])
    check(device, h, book)


@pytest.mark.gpu("cuda")  # the lists of the Triton kernels have a place for every group of words
def test_lists_that_overflow(device):
    # Two queries have no word nearer than the error of bfloat16, so that all are listed, and there are too many.
    h, book = gaussian(300, 4), gaussian(14_000, 4, seed=1)
    book[:, 3] = 0
    h[[7, 290], :3] = 0
    h[290, 0] = 1e-7
    check(device, h, book)


def test_ties_go_to_the_lower_index(device):
    h, book = gaussian(20, 48), gaussian(100, 48, seed=1)
    first, _ = search(device, h, book)
    for factor in (1.0, 0.7, complex(np.exp(1j))):  # the same directions again, with higher indices
        copies = torch.cat([book.to(torch.complex128), book.to(torch.complex128) * factor])
        assert torch.equal(search(device, h, copies)[0], first)
    assert search(device, h[:2], book[:1].expand(2500, 48))[0].tolist() == [0] * 2


def test_mirrored_words_tie_for_a_real_channel(device):
    h = torch.complex(torch.randn(20, 32, generator=torch.Generator().manual_seed(3)), torch.zeros(20, 32))
    order = torch.arange(127, -1, -1)
    index, _ = search(device, h, dft(128, 32))
    assert torch.all(index <= 64)
    assert torch.equal(order[search(device, h, dft(128, 32)[order])[0]], -index % 128)


def test_tiny_similarities_still_count(device):
    book = torch.tensor([[0, 0, 1], [0, 1, 0]], dtype=torch.complex128)
    for dtype, tiny in ((torch.complex128, 1e-14), (torch.complex64, 1e-30)):
        index, similarity = search(device, torch.tensor([[1e8, tiny, 0.0]], dtype=dtype), book)
        assert index.item() == 1
        torch.testing.assert_close(similarity, torch.tensor([tiny / 1e8]), rtol=1e-5, atol=1e-45)
    index, similarity = search(device, torch.eye(3, 4).to(torch.complex64)[:1], torch.eye(4)[1:].to(torch.complex64))
    assert (index.item(), similarity.item()) == (0, 0.0)


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_scale_does_not_matter(device, precision):
    h, book = gaussian(5, 24), gaussian(60, 24, seed=1)
    wanted, similarity = by_reference(h, book)
    for h_exponent, book_exponent in ((100, 0), (-119, 119), (100, -119)):
        index, scaled = search(
            device,
            torch.ldexp(h, torch.tensor(h_exponent)),
            torch.ldexp(book, torch.tensor(book_exponent)),
            precision=precision,
        )
        assert torch.equal(index, wanted)
        torch.testing.assert_close(scaled, similarity, rtol=1e-6, atol=0)


def test_denormal_and_extreme_rows(device):
    h, book = gaussian(5, 24), gaussian(60, 24, seed=1)
    check(device, h * 1e-40, book)
    check(device, h, book * 1e-40)
    check(device, torch.full((1, 4), 1e-45, dtype=torch.complex64), torch.eye(4) + 0j)
    h, book = h.to(torch.complex128), book.to(torch.complex128)
    wanted = search(device, h, book)[0]
    for scale in (1e300, 1e-300):
        assert torch.equal(search(device, h * scale, book)[0], wanted)
        assert torch.equal(search(device, h, book * scale)[0], wanted)
    denormal = torch.full((1, 4), 5e-324, dtype=torch.complex128)
    assert search(device, denormal, denormal)[1].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_rows_without_a_direction(device, precision, dtype):
    h, book = gaussian(6, 8, dtype=dtype), gaussian(20, 8, seed=1)
    wanted, _ = search(device, h, book, precision=precision)
    h[0] = 0
    h[2, 3] = complex(float("nan"), 0)
    h[3, 7] = complex(0, float("inf"))
    index, similarity = search(device, h, book, precision=precision)
    bad = torch.tensor([True, False, True, True, False, False])
    assert torch.all(index[bad] == -1) and similarity[bad].isnan().all()
    assert torch.equal(index[~bad], wanted[~bad]) and similarity[~bad].isfinite().all()


def test_float32_is_nearly_the_best(device):
    h, book = gaussian(20, 64), gaussian(700, 64, seed=1)
    index, similarity = search(device, h, book, precision="float32")
    scores = oracle(h, book)
    chosen = scores.gather(1, index[:, None])[:, 0]
    assert torch.all(chosen >= scores.amax(dim=1) - 1e-6)
    torch.testing.assert_close(similarity, chosen.float(), rtol=3e-7, atol=0)


# Environments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "books", "k"), [(1, 1, 5), (9, 5, 200), (70, 3, 77), (100, 1, 130), (40, 60, 3)])
def test_environments(device, n, books, k):
    environment = torch.randint(books, (n,), generator=torch.Generator().manual_seed(n))
    environment[environment == 2] = 0  # a book that nobody uses
    h = gaussian(n, 19, seed=n)
    h[n // 2] = 0
    words = gaussian(books, k, 19)
    agrees(search(device, h, words, environment), by_reference(h, words, environment=environment))


def test_more_queries_than_one_launch_takes(device):
    h, words = gaussian(4100, 2), gaussian(3, 5, 2)
    environment = torch.arange(4100) % 3
    agrees(search(device, h, words, environment), by_reference(h, words, environment=environment))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it stops the kernel, and with it the process's tests")
@pytest.mark.gpu("triton")
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_environment_out_of_range_is_named_where_nothing_waits(device, wrong):
    with pytest.raises(ValueError, match=rf"environment: expected values in 0..2, got {wrong} at row 1"):
        codebook_argmax(gaussian(2, 8), gaussian(3, 5, 8), torch.tensor([0, wrong]))


def test_an_environment_out_of_range_stops_the_kernel(simulated):
    for wrong in (-1, 3):
        with pytest.raises(simulator.ptxsim().PtxFault, match="trap"):
            codebook_argmax(gaussian(2, 8), gaussian(3, 5, 8), torch.tensor([0, wrong]))


# The object, and what holds for all -----------------------------------------------------------------------------------


def test_codebook_holds_a_snapshot_and_can_be_updated(device):
    h, words, new = gaussian(9, 16).to(device), gaussian(40, 16, seed=1).to(device), gaussian(30, 16, seed=2).to(device)
    book = Codebook(words)
    wanted = book.search(h)[0]
    words.zero_()
    assert torch.equal(book.search(h)[0], wanted)
    assert torch.equal(copy.deepcopy(book).search(h)[0], wanted)
    assert book.nbytes >= 40 * 16 * (8 + 4) and book.device == h.device and book.shape == (40, 16)
    with pytest.raises(ValueError, match="codeword 0 is zero"):
        book.update(words)
    assert torch.equal(book.search(h)[0], wanted)
    book.update(new)
    assert torch.equal(book.search(h)[0], codebook_argmax(h, new)[0])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_codewords_without_a_direction(device, value, dtype):
    books = gaussian(3, 9, 8, dtype=dtype)
    books[2, 7] = books[2, 4] = value
    what = "is zero" if value == 0 else "holds NaN or infinity"
    with pytest.raises(ValueError, match=f"codeword 4 of environment 2 {what}"):
        Codebook(books.to(device))
    with pytest.raises(ValueError, match=f"codeword 4 {what}"):
        Codebook(books[2].to(device))


def test_empty_strided_and_conjugated(device):
    for precision in ("exact", "float32"):
        index, similarity = search(device, torch.empty(0, 8, dtype=torch.complex64), gaussian(5, 8), None, precision)
        assert index.shape == similarity.shape == (0,)
    none = torch.empty(0, dtype=torch.int64)
    assert search(device, torch.empty(0, 8, dtype=torch.complex64), gaussian(2, 5, 8), none)[0].shape == (0,)
    h, book = gaussian(16, 40).to(device), gaussian(3, 16, 60, seed=1).to(device)
    environment = torch.tensor([0, 9, 2, 9, 0, 9, 1, 9], device=device)[::2]
    for rows, words, which in (
        (h.T.conj(), book[1].T.conj(), None),
        (h[:, ::2].T[:4], book.transpose(1, 2), environment),
        (h.T[:4, 1:], book.transpose(1, 2)[:, ::3, 1:].conj(), environment),
    ):
        whole = [None if x is None else x.resolve_conj().clone().contiguous() for x in (rows, words, which)]
        assert torch.equal(codebook_argmax(rows, words, which)[0], codebook_argmax(*whole)[0])


def test_a_foreign_pack_is_refused(device):
    h, book = gaussian(5, 8).to(device), gaussian(9, 8).to(device)
    with pytest.raises(RuntimeError, match="packed: expected the (CUDA|Triton) layout of .* bytes for codewords"):
        other = Codebook(gaussian(200, 8).to(device))
        torch.ops.csikernels.codebook_search(h, book, other._packed(), None, "exact")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, p: (h.real, w, p, None, "exact"), TypeError, "h: expected complex64 or complex128"),
        (lambda h, w, p: (h[:, :7], w, p, None, "exact"), ValueError, r"h: expected \[N, 8\], got shape \[5, 7\]"),
        (lambda h, w, p: (h, w[0], p, None, "exact"), ValueError, r"words: expected a non-empty \[K, D\]"),
        (lambda h, w, p: (h, w, p, None, "int8"), ValueError, "precision: expected 'exact' or 'float32', got 'int8'"),
        (lambda h, w, p: (h, w[None], p, None, "exact"), ValueError, "environment: expected none for"),
        (lambda h, w, p: (h, w[None], p, h.real[:, 0], "exact"), TypeError, "environment: expected int64"),
    ],
)
def test_errors_of_the_op(device, change, error, message):
    h, words = gaussian(5, 8).to(device), gaussian(9, 8).to(device)
    packed = torch.ops.csikernels.codebook_pack(words, "exact")[1]
    with pytest.raises(error, match=message):
        torch.ops.csikernels.codebook_search(*change(h, words, packed))


def test_words_are_kept_without_a_copy(device):
    h, words = gaussian(20, 24).to(device), gaussian(300, 24, seed=1).to(device)
    given = words.clone()
    copied, packed = torch.ops.csikernels.codebook_pack(words, "exact")
    none, alone = torch.ops.csikernels.codebook_pack(words, "exact", False)
    assert torch.equal(copied, words) and torch.equal(alone, packed) and none.shape == (0,)
    kept = Codebook(words, copy=False)
    wanted = Codebook(words).search(h)
    assert all(torch.equal(a, b) for a, b in zip(kept.search(h), wanted, strict=True))
    assert torch.equal(words, given) and kept._words.data_ptr() == words.data_ptr()
    with pytest.raises(ValueError, match="copy: expected True for .* words, got False"):
        torch.ops.csikernels.codebook_pack(words.to(torch.complex128), "exact", False)


def test_results_repeat(device):
    words = gaussian(300, 20)
    book = Codebook(torch.cat([words, words.conj(), words * 2]).to(device), "float32")
    h = gaussian(40, 20, seed=1)
    h[:20].imag.zero_()
    first, again = book.search(h.to(device)), book.search(h.to(device))
    alone = book.search(h[7:8].to(device))  # tiles and splits of other sizes
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[7:8], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_search_in_a_cuda_graph(device):
    books, environment = gaussian(4, 300, 24).to(device), torch.arange(20, device=device) % 4
    book, h = Codebook(books), gaussian(20, 24, seed=1).to(device)
    book.search(h, environment)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, similarity = book.search(h, environment)
    h.copy_(gaussian(20, 24, seed=2))
    environment.copy_(environment.flip(0))
    graph.replay()
    wanted = by_reference(h.cpu(), books.cpu(), environment=environment.cpu())
    agrees((index.cpu(), similarity.cpu()), wanted)


def test_bytes_are_within_a_quarter_of_the_least(simulated):
    n, k, d = 16, 4096, 128
    h, book = gaussian(n, d), Codebook(gaussian(k, d, seed=1))
    simulated.clear()
    book.search(h)
    moved = sum(launch["global_load_bytes"] + launch["global_store_bytes"] for launch in simulated.launches)
    assert len(simulated.launches) == 2
    # The words in bf16, the queries, index and similarity.
    assert moved <= 1.25 * (4 * d * k + 8 * d * n + 12 * n)
