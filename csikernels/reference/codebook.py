"""Codebook search in plain PyTorch: the oracle of the other backends and the fallback without a compiler.

``codebook_search`` maximises the cosine similarity |c^H h| / (|c| |h|) over the codewords c in two steps:

1. All scores as one real matrix product per block of words, [2 rows, 2 D] x [2 D, words]: with (Re, Im) interleaved,
   the first half of the rows gives Re(c^H h) and the second half, which holds -j h, gives Im(c^H h). Only the running
   best and second best of a row are kept, so memory is bounded whatever the number of codewords.
2. Where the two are closer than the error bound of that product, the candidates are scored one by one in a fixed
   order of summation, and of all that agree to within float64 rounding the lowest index wins. Structured books need
   this: with a real ``h``, mirrored DFT words have equal similarities and only rounding would tell them apart.

"exact" runs step 1 in float64, which no matrix-multiplication setting (TF32, bfloat16 emulation) can weaken.
"""

from __future__ import annotations

from typing import NoReturn

import torch

_ROWS = 512  # queries per block
_WORDS = 4096  # codewords per block: 8 MB of float64 at D = 128
_PAIRS = 2**20  # real elements per block of single (query, codeword) scores
_SCORES = 2**22  # scores held at once while ambiguous rows are resolved
_EPS = 2.0**-52


def pack(codebook: torch.Tensor, precision: str, copy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the codewords and precompute the factor that brings each to unit norm.

    Args:
        codebook: complex [K, D] or [E, K, D].
        precision: "exact" or "float32"; this backend packs both alike.
        copy: whether to return the words; they need not be, where the caller keeps the codebook.

    Returns:
        words: contiguous copy; complex128 words are scaled by powers of two, so that no factor leaves float64's range.
            Empty without ``copy``.
        packed: uint8 buffer of this backend's own layout: float64 [E*K] factors.

    Raises:
        ValueError: a codeword is zero or holds NaN or infinity, or ``copy`` is false for complex128.
    """
    check_copy(codebook, copy)
    given = codebook.resolve_conj().resolve_neg()
    words = given.clone(memory_format=torch.contiguous_format) if copy else given.contiguous()
    flat = words.view(-1, words.shape[-1])
    factor = torch.empty(len(flat), dtype=torch.float64, device=words.device)
    for start in range(0, len(flat), _WORDS):
        block = slice(start, start + _WORDS)
        usable, exponent, scaled = _scaled(flat[block])
        if not bool(usable.all()):
            refuse_codeword(words, start + int((~usable).nonzero()[0]))
        factor[block] = 1 / _norm(scaled)
        if words.dtype == torch.complex128:
            flat[block] = scaled
        else:
            factor[block] *= torch.exp2(-exponent)
    return words if copy else words.new_empty(0), factor.view(torch.uint8)


def search(
    h: torch.Tensor, words: torch.Tensor, packed: torch.Tensor, environment: torch.Tensor | None, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best codeword of each row of ``h``.

    Args:
        h: complex [N, D].
        words, packed: from :func:`pack`.
        environment: int64 [N], which codebook of [E, K, D] each row uses; None for [K, D].
        precision: "exact" or "float32".

    Returns:
        index int64 [N] (-1 for a zero or non-finite row), similarity float32 [N] (NaN for such a row).

    Raises:
        RuntimeError: ``packed`` has another backend's layout.
        ValueError: an environment is outside 0..E-1.
    """
    d = words.shape[-1]
    count = words.numel() // d
    if packed.numel() != 8 * count:
        raise RuntimeError(
            f"packed: expected the reference layout of {8 * count} bytes for {count} codewords, got {packed.numel()}; "
            "it was packed by another backend"
        )
    books = words.view(-1, *words.shape[-2:])
    factors = packed.view(torch.float64).view(books.shape[:2])
    index = torch.full((h.shape[0],), -1, dtype=torch.int64, device=h.device)
    similarity = torch.full((h.shape[0],), float("nan"), dtype=torch.float32, device=h.device)
    for book, rows in _rows_of_books(h, words, environment):
        for block in rows.split(_ROWS):
            usable, _, scaled = _scaled(h[block])
            block, scaled = block[usable], scaled[usable]
            unit = scaled / _norm(scaled)[:, None]
            index[block], similarity[block] = _search_block(unit, _Book(books[book], factors[book]), precision)
    return index, similarity


class _Book:
    """One codebook [K, D] with the factor that brings each codeword to unit norm."""

    def __init__(self, words: torch.Tensor, factor: torch.Tensor):
        self.words, self.factor = words, factor

    def unit(self, select) -> torch.Tensor:
        """Unit codewords, (Re, Im) interleaved, float64 [n, 2 D]; ``select`` is a slice or int64 indices."""
        return _real(self.words[select]).to(torch.float64, copy=True).mul_(self.factor[select, None])


def _search_block(h: torch.Tensor, book: _Book, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Index int64 and similarity float32, each [R], of unit rows ``h``, complex128 [R, D]."""
    queries = torch.cat([_real(h), _real(h * -1j)])
    exact = precision == "exact"
    index, best, second = _two_best(queries.to(torch.float64 if exact else torch.float32), book)
    if exact:
        close = best.sqrt() - second.clamp(min=0).sqrt() <= 2 * _product_error(h.shape[1])
        for part in close.nonzero()[:, 0].split(max(1, _SCORES // len(book.words))):
            index[part] = _resolve(h[part], best[part], book)
    similarity, _ = _pair_scores(h, torch.arange(len(h), device=h.device), index, book)
    return index, similarity.to(torch.float32)


def _two_best(queries: torch.Tensor, book: _Book) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the best codeword, its squared similarity and the second best's, each [R], in one pass."""
    rows = len(queries) // 2
    best = torch.full((rows,), -1.0, dtype=queries.dtype, device=queries.device)
    second = best.clone()
    index = torch.zeros(rows, dtype=torch.int64, device=queries.device)
    for start in range(0, len(book.words), _WORDS):
        squared = _squared_similarity(queries, book, slice(start, start + _WORDS))
        value, position = squared.max(dim=1)
        runner_up = squared.scatter_(1, position[:, None], -1.0).amax(dim=1)
        second = torch.maximum(torch.minimum(best, value), torch.maximum(second, runner_up))
        index = torch.where(value > best, position + start, index)  # strict: an equal earlier word stays
        best = torch.maximum(best, value)
    return index, best, second


def _squared_similarity(queries: torch.Tensor, book: _Book, block: slice) -> torch.Tensor:
    """[R, words of the block] from ``queries`` [2 R, 2 D]: the unit rows h, then -j h."""
    with torch.autocast(queries.device.type, enabled=False):  # it reaches into ops and would compute in bfloat16
        product = queries @ book.unit(block).to(queries.dtype).T
    rows = len(queries) // 2
    return product[:rows].square_().addcmul_(product[rows:], product[rows:])


def _resolve(h: torch.Tensor, best: torch.Tensor, book: _Book) -> torch.Tensor:
    """Index int64 [R] for rows whose best codewords are closer than the error of the matrix product."""
    queries = torch.cat([_real(h), _real(h * -1j)])
    squared = torch.empty(len(h), len(book.words), dtype=torch.float64, device=h.device)
    for start in range(0, len(book.words), _WORDS):
        block = slice(start, start + _WORDS)
        squared[:, block] = _squared_similarity(queries, book, block)
    # Three times the error: twice for the two scores, once more for the product's run-to-run difference.
    floor = (best.sqrt() - 3 * _product_error(h.shape[1])).clamp(min=0).square()
    rows, words = (squared >= floor[:, None]).nonzero(as_tuple=True)
    score, slack = _pair_scores(h, rows, words, book)
    highest = torch.full((len(h),), -1.0, dtype=torch.float64, device=h.device)
    highest.scatter_reduce_(0, rows, score - slack, "amax")
    tied = score + slack >= highest[rows]
    index = torch.full((len(h),), len(book.words), dtype=torch.int64, device=h.device)
    return index.scatter_reduce_(0, rows[tied], words[tied], "amin")


def _pair_scores(
    h: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, book: _Book
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity of each pair (rows[p], words[p]) and the rounding it may carry, float64 [P] each.

    Each pair is summed by itself, so its value depends neither on its neighbours nor on the number of threads. The
    slack is a few ulp of the sum of magnitudes, which is what pairwise summation of D terms leaves.
    """
    real, turned = _real(h), _real(h * -1j)
    scores, slacks = [], []
    size = max(1, _PAIRS // real.shape[1])
    for row, word in zip(rows.split(size), words.split(size), strict=True):
        codeword = book.unit(word)
        in_phase, quadrature = codeword * real[row], codeword * turned[row]
        scores.append(torch.hypot(in_phase.sum(dim=1), quadrature.sum(dim=1)))
        slacks.append(8 * _EPS * (in_phase.abs_().sum(dim=1) + quadrature.abs_().sum(dim=1)))
    return torch.cat(scores), torch.cat(slacks)


def _product_error(d: int) -> float:
    """Bound on the error of one similarity from the float64 product: 2 D terms, two components, two normalisations."""
    return 4 * (d + 8) * _EPS


def _scaled(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of complex [R, D] divided by 2^exponent, so that no square over- or underflows.

    Returns (usable [R]: finite and not all zero, exponent float64 [R], scaled complex128 [R, D]).
    """
    z = z.to(torch.complex128)
    largest = torch.view_as_real(z).abs().amax(dim=(1, 2))  # NaN propagates through amax
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent.to(torch.float64)
    half = (exponent / 2).floor()  # in two steps: 2^1074, which lifts a denormal, is beyond float64
    return usable, exponent, z * torch.exp2(-half)[:, None] * torch.exp2(half - exponent)[:, None]


def _norm(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z).square().sum(dim=(1, 2)).sqrt()


def _real(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z).flatten(1)


def _rows_of_books(
    h: torch.Tensor, words: torch.Tensor, environment: torch.Tensor | None
) -> list[tuple[int, torch.Tensor]]:
    if environment is None:
        return [(0, torch.arange(h.shape[0], device=h.device))]
    check_environment_values(environment, words.shape[0])
    return [(int(book), (environment == book).nonzero()[:, 0]) for book in environment.unique()]


def check_environment_values(environment: torch.Tensor, books: int) -> None:
    """Raise unless every entry is in ``0..books - 1``."""
    outside = (environment < 0) | (environment >= books)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"environment: expected values in 0..{books - 1}, got {int(environment[row])} at row {row}")


def check_copy(codebook: torch.Tensor, copy: bool) -> None:
    """Refuse complex128 words that are not copied: their pack goes with the scaled copy only."""
    if not copy and codebook.dtype != torch.complex64:
        raise ValueError(f"copy: expected True for {codebook.dtype} words, got False")


def refuse_codeword(words: torch.Tensor, position: int) -> NoReturn:
    """Raise for the codeword without a direction that packing met; ``position`` counts through all books."""
    k = words.shape[-2]
    row = words.reshape(-1, words.shape[-1])[position]
    name = f"codeword {position % k}" + (f" of environment {position // k}" if words.dim() == 3 else "")
    what = "is zero" if bool((row == 0).all()) else "holds NaN or infinity"
    raise ValueError(f"codebook: expected finite, non-zero codewords, but {name} {what}")
