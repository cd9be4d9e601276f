"""codebook_argmax and Codebook: the float64 argmax on every backend, whatever the scale, the ties or the size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import csikernels
from csikernels import Codebook, codebook_argmax

pytestmark = pytest.mark.op("codebook_pack", "codebook_search")


def gaussian(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dft(words: int, antennas: int, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    """Oversampled DFT book [words, antennas]; word -k is exactly the conjugate of word k."""
    phase = torch.outer(torch.arange(words), torch.arange(antennas)) % words
    angle = 2 * torch.pi * phase.double() / words
    book = torch.complex(angle.cos(), angle.sin())
    half = (words + 1) // 2
    book[words - torch.arange(1, half)] = book[1:half].conj()
    return book.to(dtype)


def oracle(h: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """All similarities [N, K] in float64, one codeword after the other."""
    h, book = h.to(torch.complex128), book.to(torch.complex128)
    return (h @ book.conj().T).abs() / h.norm(dim=1)[:, None] / book.norm(dim=1)


def check(h: torch.Tensor, book: torch.Tensor, **arguments) -> None:
    index, similarity = codebook_argmax(h, book, **arguments)
    best, wanted = oracle(h, book).max(dim=1)
    assert index.dtype == torch.int64 and similarity.dtype == torch.float32
    assert torch.equal(index, wanted)
    torch.testing.assert_close(similarity, best.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    ("n", "k", "d"), [(37, 1000, 128), (1, 1, 1), (1, 17, 3), (5, 33, 1), (3, 16, 31), (2, 5000, 7), (600, 15, 65)]
)
def test_matches_float64(backend, dtype, n, k, d):
    h, book = gaussian(n, d, dtype=dtype, seed=1), gaussian(k, d, dtype=dtype, seed=2)
    if d == 1:  # every similarity is 1: one big tie
        index, similarity = codebook_argmax(h, book)
        assert index.tolist() == [0] * n
        torch.testing.assert_close(similarity, torch.ones(n))
    else:
        check(h, book)


def test_mixed_dtypes(backend):
    check(gaussian(9, 16), gaussian(40, 16, dtype=torch.complex128, seed=1))
    check(gaussian(9, 16, dtype=torch.complex128), gaussian(40, 16, seed=1))


def test_close_codewords_are_told_apart(backend):
    # Rotating a word away from h by t lowers the similarity by t^2 / 2: these differ by far less than float32 sees.
    h = gaussian(20, 64, dtype=torch.complex128)
    unit = h / h.norm(dim=1, keepdim=True)
    other = gaussian(20, 64, dtype=torch.complex128, seed=5)
    other -= (unit.conj() * other).sum(dim=1, keepdim=True) * unit
    other /= other.norm(dim=1, keepdim=True)
    for row in range(len(h)):
        tilt = torch.linspace(3e-3, 2.5e-3, 12, dtype=torch.float64)[:, None]
        book = unit[row] + tilt * other[row]
        assert codebook_argmax(h[row : row + 1], book)[0].item() == 11
        assert codebook_argmax(h[row : row + 1], book.flip(0))[0].item() == 0


def test_clusters_and_dft_books(backend):
    centres = gaussian(16, 32)
    cluster = centres.repeat_interleave(64, dim=0) + 0.1 * gaussian(1024, 32, seed=1)
    check(gaussian(50, 32, seed=2), cluster)
    check(gaussian(50, 32, seed=2), dft(256, 32))


def test_ties_go_to_the_lower_index(backend):
    h, book = gaussian(30, 48), gaussian(100, 48, seed=1)
    first, _ = codebook_argmax(h, book)
    # The same directions again: copies, other lengths, other phases, all with higher indices.
    for factor in (1.0, 3.0, 0.7, 1j, complex(np.exp(1j))):
        copies = torch.cat([book.to(torch.complex128), book.to(torch.complex128) * factor])
        assert torch.equal(codebook_argmax(h, copies)[0], first)
    assert codebook_argmax(h, book[:1].expand(5000, 48))[0].tolist() == [0] * 30


def test_mirrored_words_tie_for_a_real_channel(backend):
    words, antennas = 128, 32
    h = torch.complex(torch.randn(40, antennas, generator=torch.Generator().manual_seed(3)), torch.zeros(40, antennas))
    book = dft(words, antennas)
    index, _ = codebook_argmax(h, book)
    assert torch.all(index <= words // 2)
    order = torch.arange(words - 1, -1, -1)
    mirrored, _ = codebook_argmax(h, book[order])
    assert torch.equal(order[mirrored], -index % words)


def test_channel_orthogonal_to_every_word(backend):
    square = dft(16, 16)
    index, similarity = codebook_argmax(square[5:6], torch.cat([square[:5], square[6:]]))
    assert index.item() in range(15)
    assert similarity.item() < 1e-6
    index, similarity = codebook_argmax(torch.eye(3, 4).to(torch.complex64)[:1], torch.eye(4)[1:].to(torch.complex64))
    assert (index.item(), similarity.item()) == (0, 0.0)


def test_tiny_similarities_still_count(backend):
    h = torch.tensor([[1.0, 1e-14, 0.0]], dtype=torch.complex128)
    book = torch.tensor([[0, 0, 1], [0, 1, 0]], dtype=torch.complex128)
    index, similarity = codebook_argmax(h, book)
    assert index.item() == 1
    torch.testing.assert_close(similarity, torch.tensor([1e-14]))


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_scale_does_not_matter(backend, precision):
    h, book = gaussian(20, 24), gaussian(60, 24, seed=1)
    wanted, similarity = Codebook(book, precision).search(h)
    # Powers of two change no digit, down to the smallest number that is not a denormal.
    for h_exponent, book_exponent in ((100, 0), (0, 100), (-100, -100), (100, -100), (-119, 119)):
        index, scaled = Codebook(torch.ldexp(book, torch.tensor(book_exponent)), precision).search(
            torch.ldexp(h, torch.tensor(h_exponent))
        )
        assert torch.equal(index, wanted)
        torch.testing.assert_close(scaled, similarity, rtol=1e-6, atol=0)
    for h_scale, book_scale in ((1e30, 1e-30), (1e-30, 1e30), (1e30, 1e30), (1e-30, 1e-30)):
        check(h * h_scale, book * book_scale)


def test_denormal_rows(backend):
    h, book = gaussian(20, 24), gaussian(60, 24, seed=1)
    check(h * 1e-40, book)
    check(h, book * 1e-40)
    index, similarity = codebook_argmax(torch.full((1, 4), 1e-45, dtype=torch.complex64), torch.eye(4) + 0j)
    assert index.item() == 0
    torch.testing.assert_close(similarity, torch.tensor([0.5]))


def test_extreme_complex128(backend):
    h, book = gaussian(9, 24, dtype=torch.complex128), gaussian(60, 24, dtype=torch.complex128, seed=1)
    wanted, _ = codebook_argmax(h, book)
    for scale in (1e300, 1e-300):
        assert torch.equal(codebook_argmax(h * scale, book)[0], wanted)
        assert torch.equal(codebook_argmax(h, book * scale)[0], wanted)
    denormal = torch.full((1, 4), 5e-324, dtype=torch.complex128)
    assert codebook_argmax(denormal, denormal)[1].item() == 1.0


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_rows_without_a_direction(backend, precision):
    h, book = gaussian(6, 8), gaussian(20, 8, seed=1)
    wanted, _ = Codebook(book, precision).search(h)
    h[0] = 0
    h[2, 3] = complex(float("nan"), 0)
    h[3, 7] = complex(0, float("inf"))
    index, similarity = Codebook(book, precision).search(h)
    bad = torch.tensor([True, False, True, True, False, False])
    assert torch.all(index[bad] == -1) and similarity[bad].isnan().all()
    assert torch.equal(index[~bad], wanted[~bad]) and similarity[~bad].isfinite().all()


def test_float32_precision(backend):
    h, book = gaussian(100, 64), gaussian(3000, 64, seed=1)
    index, similarity = Codebook(book, precision="float32").search(h)
    scores = oracle(h, book)
    chosen = scores.gather(1, index[:, None])[:, 0]
    assert torch.all(chosen >= scores.amax(dim=1) * (1 - 1e-5))
    torch.testing.assert_close(similarity, chosen.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_autocast_changes_nothing(backend, precision):
    h, book = gaussian(100, 64), gaussian(3000, 64, seed=1)
    wanted = Codebook(book, precision).search(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = Codebook(book, precision).search(h)
    assert all(torch.equal(got, expected) for got, expected in zip(result, wanted, strict=True))


def test_environments(backend):
    h, books = gaussian(50, 16), gaussian(4, 30, 16, seed=1)
    environment = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2))  # the fourth is never used
    h[7] = 0
    index, similarity = codebook_argmax(h, books, environment)
    for row in range(50):
        alone, score = codebook_argmax(h[row : row + 1], books[environment[row]])
        assert index[row] == alone[0]
        torch.testing.assert_close(similarity[row], score[0], equal_nan=True)


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_empty_batch(backend, precision):
    book = Codebook(gaussian(5, 8), precision)
    index, similarity = book.search(torch.empty(0, 8, dtype=torch.complex64))
    assert index.shape == similarity.shape == (0,)
    assert (index.dtype, similarity.dtype) == (torch.int64, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    assert codebook_argmax(torch.empty(0, 8, dtype=torch.complex64), gaussian(2, 5, 8), none)[0].shape == (0,)


def test_non_contiguous_and_conjugated(backend):
    h, book = gaussian(16, 40), gaussian(16, 60, seed=1)
    wanted = codebook_argmax(h[::3, ::2].clone(), book.T[::2, :].clone()[:, :16].repeat(1, 2)[:, :20])
    got = codebook_argmax(h[::3, ::2], book.T[::2].repeat(1, 2)[:, :20])
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    check(h.T, book.T)
    check(h.T.conj(), book.T.conj())
    environment = torch.tensor([0, 9, 1, 9, 0, 9, 1, 9])[::2]
    books = gaussian(16, 5, 2, seed=4).permute(2, 1, 0)
    assert torch.equal(
        codebook_argmax(h.T[:4], books, environment)[0],
        codebook_argmax(h.T[:4].contiguous(), books.contiguous(), environment.clone())[0],
    )


def test_the_pack_is_a_snapshot(backend):
    h, words = gaussian(9, 16), gaussian(40, 16, seed=1)
    book = Codebook(words)
    wanted, _ = book.search(h)
    words.zero_()
    assert torch.equal(book.search(h)[0], wanted)
    assert book.nbytes >= 40 * 16 * 8
    assert (book.shape, book.dtype, book.device) == ((40, 16), torch.complex64, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_words_are_kept_without_a_copy(backend, precision):
    h, words, books = gaussian(9, 16), gaussian(40, 16, seed=1), gaussian(2, 40, 16, seed=2)
    environment = torch.arange(9) % 2
    for codewords, choice in ((words, ()), (books, (environment,))):
        given = codewords.clone()
        copied, kept = Codebook(codewords, precision), Codebook(codewords, precision, copy=False)
        wanted = copied.search(h, *choice)
        assert all(torch.equal(a, b) for a, b in zip(kept.search(h, *choice), wanted, strict=True))
        assert torch.equal(codewords, given)
        assert kept._words.data_ptr() == codewords.data_ptr() != copied._words.data_ptr()
        assert kept.nbytes == copied.nbytes and kept.shape == codewords.shape
        kept.update(codewords.flip(-2), copy=False)
        index = kept.search(h, *choice)[0]
        assert torch.equal(39 - index, wanted[0])
    array = words.numpy()
    assert np.array_equal(Codebook(array, precision, copy=False).search(h.numpy())[0], Codebook(words).search(h)[0])


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (gaussian(6, 8, dtype=torch.complex128), "torch.complex128"),
        (gaussian(8, 6).T, "torch.complex64, strides"),
        (gaussian(6, 8).conj(), "torch.complex64, pending conjugation"),
    ],
    ids=["complex128", "transposed", "conjugated"],
)
def test_words_that_would_have_to_be_copied_are_not_kept(backend, words, got):
    book = Codebook(gaussian(6, 8))
    wanted = book.search(gaussian(3, 8, seed=1))[0]
    with pytest.raises(ValueError, match=f"codebook: expected contiguous complex64 for copy=False, got {got}"):
        book.update(words, copy=False)
    assert torch.equal(book.search(gaussian(3, 8, seed=1))[0], wanted)


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_a_pack_does_not_depend_on_the_copy(backend, precision):
    words = gaussian(40, 16) * 2.0**-100
    copied, packed = torch.ops.csikernels.codebook_pack(words, precision)
    none, alone = torch.ops.csikernels.codebook_pack(words, precision, False)
    assert torch.equal(copied, words) and none.shape == (0,) and none.dtype == torch.complex64
    assert torch.equal(alone, packed)
    _, transposed = torch.ops.csikernels.codebook_pack(words.T.contiguous().T, precision, False)
    assert torch.equal(transposed, packed)
    with pytest.raises(ValueError, match="copy: expected True for .* words, got False"):
        torch.ops.csikernels.codebook_pack(words.to(torch.complex128), precision, False)
    words[3] = 0
    with pytest.raises(ValueError, match="codeword 3 is zero"):
        torch.ops.csikernels.codebook_pack(words, precision, False)


def test_update(backend):
    h, old, new = gaussian(9, 16), gaussian(40, 16, seed=1), gaussian(30, 16, seed=2)
    book = Codebook(old)
    book.update(new)
    assert torch.equal(book.search(h)[0], codebook_argmax(h, new)[0])


def test_a_failed_update_leaves_the_old_pack(backend):
    h, words = gaussian(9, 16), gaussian(40, 16, seed=1)
    book = Codebook(words)
    wanted = book.search(h)
    broken = words.clone()
    broken[33] = 0
    with pytest.raises(ValueError, match="codeword 33 is zero"):
        book.update(broken)
    with pytest.raises(TypeError, match="codebook"):
        book.update(words.real)
    for got, expected in zip(book.search(h), wanted, strict=True):
        assert torch.equal(got, expected)


def test_memory_is_bounded(backend):
    # 2^17 words x 256 queries would be 268 MB of float64 scores; the limit on one allocation is a tenth of that.
    h, book = gaussian(256, 4), Codebook(gaussian(2**17, 4, seed=1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        book.search(h)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 27e6


def test_thread_count_changes_nothing(backend, threads):
    h, book = gaussian(70, 33), gaussian(9000, 33, seed=1)
    h[:5].imag.zero_()
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(codebook_argmax(h, torch.cat([book, book.conj()])))
    for index, similarity in results[1:]:
        assert torch.equal(index, results[0][0]) and torch.equal(similarity, results[0][1])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, c: (h.real, c), TypeError, "h: expected complex64 or complex128, got torch.float32"),
        (lambda h, c: (h, c.real), TypeError, "codebook: expected complex64 or complex128, got torch.float32"),
        (lambda h, c: (h.to(torch.complex32), c), TypeError, "h: expected complex64 or complex128"),
        (lambda h, c: ([1.0], c), TypeError, "h: expected a complex tensor or array, got list"),
        (lambda h, c: (h[0], c), ValueError, r"h: expected \[N, 8\], got shape \(8,\)"),
        (lambda h, c: (h[:, :7], c), ValueError, r"h: expected \[N, 8\], got shape \(5, 7\)"),
        (lambda h, c: (h, c[0]), ValueError, r"codebook: expected a non-empty \[K, D\] or \[E, K, D\]"),
        (lambda h, c: (h, c[:0]), ValueError, r"codebook: expected a non-empty .* got shape \(0, 8\)"),
        (lambda h, c: (h, c, torch.zeros(5, dtype=torch.int64)), ValueError, "environment: expected none"),
        (lambda h, c: (h, c[None]), ValueError, r"environment: expected int64 \[N\] .* got NoneType"),
        (lambda h, c: (h, c[None], torch.zeros(5)), TypeError, "environment: expected an int64 tensor"),
        (
            lambda h, c: (h, c[None], torch.zeros(4, dtype=torch.int64)),
            ValueError,
            r"environment: expected shape \(5,\)",
        ),
        (lambda h, c: (h, c[None], torch.tensor([0, 0, 1, 0, 0])), ValueError, r"0\.\.0, got 1 at row 2"),
        (lambda h, c: (h, c[None], torch.tensor([0, -1, 0, 0, 0])), ValueError, r"0\.\.0, got -1 at row 1"),
        (lambda h, c: (h.to("meta"), c), ValueError, "h: expected a tensor on cpu, where .*, got one on meta"),
    ],
)
def test_errors(backend, change, error, message):
    with pytest.raises(error, match=message):
        codebook_argmax(*change(gaussian(5, 8), gaussian(9, 8, seed=1)))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_codewords_without_a_direction(backend, value):
    books = gaussian(3, 9, 8)
    books[2, 4] = value
    what = "is zero" if value == 0 else "holds NaN or infinity"
    with pytest.raises(ValueError, match=f"codeword 4 of environment 2 {what}"):
        Codebook(books)
    with pytest.raises(ValueError, match=f"codeword 4 {what}"):
        Codebook(books[2])


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision: expected one of 'exact', 'float32', got 'int8'"):
        Codebook(gaussian(3, 4), precision="int8")


def test_a_foreign_pack_is_refused(backend):
    words, packed = torch.ops.csikernels.codebook_pack(gaussian(9, 8), "exact")
    with pytest.raises(RuntimeError, match="packed"):
        torch.ops.csikernels.codebook_search(gaussian(5, 8), words, packed[:-1], None, "exact")


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_every_backend_packs_for_itself(backend, dtype, copy):
    if not copy and dtype == torch.complex128:
        pytest.skip("is always copied")
    h, words = gaussian(20, 16), gaussian(80, 16, dtype=dtype, seed=1) * 1e-30
    with csikernels.use_backend("reference"):
        book = Codebook(words, copy=copy)
        wanted, _ = book.search(h)
    assert torch.equal(book.search(h)[0], wanted)


def test_arrays(backend):
    h, words = gaussian(20, 16).numpy(), gaussian(80, 16, seed=1).numpy()
    wanted, _ = codebook_argmax(torch.from_numpy(h), torch.from_numpy(words))
    index, similarity = codebook_argmax(h, words)
    assert isinstance(index, np.ndarray) and isinstance(similarity, np.ndarray)
    assert np.array_equal(index, wanted.numpy())
    reversed_index, _ = Codebook(words[::-1]).search(h[::-1])
    assert np.array_equal(79 - reversed_index[::-1], index)
    via_dlpack, _ = codebook_argmax(torch.from_dlpack(h), torch.from_dlpack(words))
    assert np.array_equal(np.from_dlpack(via_dlpack), index)
    with pytest.raises(TypeError, match="arrays of one kind"):
        codebook_argmax(h, torch.from_numpy(words))


def test_no_gradient_and_no_alias(backend):
    h, words = gaussian(5, 8).requires_grad_(), gaussian(9, 8, seed=1).requires_grad_()
    index, similarity = codebook_argmax(h, words)
    assert not similarity.requires_grad
    assert not Codebook(words, copy=False).search(h)[1].requires_grad
    copy, packed = torch.ops.csikernels.codebook_pack(words.detach(), "exact")
    storages = {tensor.untyped_storage().data_ptr() for tensor in (h, words, index, similarity, copy, packed)}
    assert len(storages) == 6


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_opcheck(backend, opcheck, precision):
    h, words = gaussian(5, 8), gaussian(9, 8, seed=1)
    opcheck("codebook_pack", (words, precision))
    opcheck("codebook_pack", (words, precision, False))
    copy, packed = torch.ops.csikernels.codebook_pack(words, precision)
    opcheck("codebook_search", (h, copy, packed, None, precision))
    books, packed = torch.ops.csikernels.codebook_pack(gaussian(2, 9, 8), precision)
    opcheck("codebook_search", (h, books, packed, torch.tensor([0, 1, 1, 0, 0]), precision))


def test_compile(backend):
    h, words = gaussian(20, 16), gaussian(80, 16, seed=1)
    wanted, _ = codebook_argmax(h, words)
    whole = torch.compile(lambda h, words: codebook_argmax(h, words)[0], fullgraph=True)
    assert torch.equal(whole(h, words), wanted)
    book = Codebook(words)
    kept = torch.compile(lambda h, words: Codebook(words, copy=False).search(h)[0], fullgraph=True)
    assert torch.equal(kept(h, words), wanted)
    prepared = torch.compile(lambda h: book.search(h)[0], fullgraph=True)
    assert torch.equal(prepared(h), wanted)
    assert torch.equal(prepared(h[:7]), wanted[:7])


def test_export(backend):
    class Search(torch.nn.Module):
        def __init__(self, words: torch.Tensor):
            super().__init__()
            self.register_buffer("words", words)

        def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return codebook_argmax(h, self.words)

    h, words = gaussian(20, 16), gaussian(80, 16, seed=1)
    program = torch.export.export(Search(words), (h,), dynamic_shapes={"h": {0: torch.export.Dim("n", min=2)}})
    assert torch.equal(program.module()(h[:11])[0], codebook_argmax(h[:11], words)[0])
