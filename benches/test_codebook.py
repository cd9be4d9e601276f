"""Timings of the codebook search against what one would write in PyTorch, words of 128 antennas.

Peers: the complex product, its magnitude and argmax in complex64 (which may pick a word that is only nearly the best)
and, where it fits, complex128; and the same as one real product, in float32 and bfloat16. Books and peers are prepared
outside the timing. Every result is checked first: what claims to be exact against float64, the others to within what
their precision can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, compare

from csikernels import Codebook, codebook_argmax

ANTENNAS = 128
CASES = [  # queries, feedback bits, book, calls per round, rounds
    (1, 12, "gaussian", 200, 15),
    (16, 12, "gaussian", 50, 15),
    (16, 16, "gaussian", 5, 15),
    (1024, 12, "gaussian", 3, 15),
    (1024, 12, "clusters", 3, 15),
    (1024, 16, "gaussian", 1, 5),
    (1024, 16, "clusters", 1, 5),
    (1024, 16, "dft", 1, 5),
]
SLACK = {"torch complex64": 1e-5, "torch float32 product": 1e-5, "torch bfloat16 product": 2e-2, "float32": 1e-5}


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def make_book(kind: str, words: int) -> torch.Tensor:
    """[words, ANTENNAS]: independent, 64 clusters with 10% noise, or an oversampled DFT grid."""
    if kind == "clusters":
        return gaussian(64, ANTENNAS, seed=3)[torch.arange(words) % 64] + 0.1 * gaussian(words, ANTENNAS, seed=2)
    if kind == "dft":
        phase = torch.outer(torch.arange(words), torch.arange(ANTENNAS)) % words
        return torch.exp(2j * torch.pi * phase.double() / words).to(torch.complex64).to(DEVICE)
    return gaussian(words, ANTENNAS, seed=2)


def complex_peer(h: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    h, transposed = h.to(dtype), unit(words.to(dtype)).T
    return lambda: (h.conj() @ transposed).abs().argmax(1)


def real_peer(h: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Re and Im of c^H h from one real product of twice the rows, without a square root."""
    transposed = torch.view_as_real(unit(words)).flatten(1).T.contiguous().to(dtype)

    def search() -> torch.Tensor:
        queries = torch.cat([torch.view_as_real(h).flatten(1), torch.view_as_real(h * -1j).flatten(1)]).to(dtype)
        product = (queries @ transposed).square_()
        return (product[: len(h)] + product[len(h) :]).argmax(1)

    return search


def checker(h: torch.Tensor, words: torch.Tensor) -> Callable[[str, torch.Tensor], None]:
    """Compares an index, or index and similarity, with float64."""
    best, wanted, scores = [], [], []
    for rows in h.to(torch.complex128).split(64):
        block = (rows.conj() @ unit(words.to(torch.complex128)).T).abs()
        top = block.max(dim=1)
        best.append(top.values)
        wanted.append(top.indices)
        scores.append(block)

    def check(name: str, result) -> None:
        index = result if isinstance(result, torch.Tensor) else result[0]
        for part, top, first, block in zip(index.split(64), best, wanted, scores, strict=True):
            reached = block.gather(1, part[:, None])[:, 0]
            if name in SLACK:
                assert torch.all(reached >= top * (1 - SLACK[name])), name
            else:
                assert torch.all((part == first) | (reached >= top * (1 - 1e-15))), name

    return check


@pytest.mark.parametrize(("queries", "bits", "kind", "calls", "rounds"), CASES)
def test_search(benchmark, queries, bits, kind, calls, rounds):
    h, words = gaussian(queries, ANTENNAS, seed=1), make_book(kind, 2**bits)
    exact, single = Codebook(words), Codebook(words, "float32")
    peers = {
        "torch complex64": complex_peer(h, words, torch.complex64),
        "torch float32 product": real_peer(h, words, torch.float32),
        "torch bfloat16 product": real_peer(h, words, torch.bfloat16),
    }
    if queries * 2**bits <= 2**22:
        peers["torch complex128"] = complex_peer(h, words, torch.complex128)
    compare(
        benchmark,
        case=f"codebook search, N={queries}, B={bits}, {kind}",
        ours={"exact": lambda: exact.search(h), "float32": lambda: single.search(h)},
        peers=peers,
        check=checker(h, words),
        flops=8 * queries * 2**bits * ANTENNAS,
        bytes=exact.nbytes - words.nbytes,
        peak={"exact": "int8", "float32": "float32"} if queries > 16 else "dram",
        calls=calls,
        rounds=rounds,
    )


def test_environments(benchmark):
    count, words, queries = 64, 1024, 1024
    books, h = gaussian(count, words, ANTENNAS, seed=2), gaussian(queries, ANTENNAS, seed=1)
    environment = torch.arange(queries, device=DEVICE) % count
    packed, transposed = Codebook(books), unit(books).mT

    def loop() -> torch.Tensor:
        index = torch.empty(queries, dtype=torch.int64, device=DEVICE)
        for book in range(count):
            rows = environment == book
            index[rows] = (h[rows].conj() @ transposed[book]).abs().argmax(1)
        return index

    def check(name: str, result) -> None:
        index = result if isinstance(result, torch.Tensor) else result[0]
        for book in range(count):
            rows = environment == book
            scores = (h[rows].to(torch.complex128).conj() @ unit(books[book].to(torch.complex128)).T).abs()
            reached = scores.gather(1, index[rows, None])[:, 0]
            assert torch.all(reached >= scores.amax(dim=1) * (1 - SLACK.get(name, 1e-15))), name

    compare(
        benchmark,
        case=f"codebook search, {count} environments, N={queries}, B=10",
        ours={"exact": lambda: packed.search(h, environment)},
        peers={"torch complex64": loop},
        check=check,
        flops=8 * queries * words * ANTENNAS,
        peak="int8",
        calls=3,
    )


def test_pack(benchmark):
    words = gaussian(2**16, ANTENNAS, seed=2)
    h = gaussian(16, ANTENNAS, seed=1)
    index = codebook_argmax(h, words)[0]

    def check(name: str, result) -> None:
        if name == "normalised copy":
            torch.testing.assert_close(result.norm(dim=1), torch.ones(len(words), device=DEVICE))
        else:
            assert torch.equal(result.search(h)[0], index)

    compare(
        benchmark,
        case="codebook pack, B=16",
        ours={"exact": lambda: Codebook(words), "float32": lambda: Codebook(words, "float32")},
        peers={"normalised copy": lambda: unit(words)},
        check=check,
        bytes=2 * words.nbytes + words.nbytes / 4,
        peak="dram",
        rounds=9,
    )
