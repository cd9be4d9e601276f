"""Timings of the codebook search against what one would write in PyTorch.

Peers: the complex product, its magnitude and argmax in complex64 (which may pick a word that is only nearly the best)
and in complex128, and the same as one real float32 product; of packing: normalising the codewords. The peers get a
normalised codebook, prepared outside the timing like the pack. Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import csikernels
from csikernels import Codebook

BACKENDS = csikernels.backends()["codebook_search"]["cpu"]
ANTENNAS = 128
SIZES = [(1, 12), (16, 12), (256, 12), (16, 14)]  # queries, feedback bits


def gaussian(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, ANTENNAS, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def complex_peer(words: torch.Tensor, dtype: torch.dtype) -> Callable:
    transposed = unit(words.to(dtype)).T
    return lambda h: (h.to(dtype).conj() @ transposed).abs().argmax(1)


def real_peer(words: torch.Tensor) -> Callable:
    """Re and Im of c^H h from one float32 product of twice the rows, without a square root."""
    transposed = torch.view_as_real(unit(words)).flatten(1).T.contiguous()

    def search(h: torch.Tensor) -> torch.Tensor:
        queries = torch.cat([torch.view_as_real(h).flatten(1), torch.view_as_real(h * -1j).flatten(1)])
        product = (queries @ transposed).square_()
        return (product[: len(h)] + product[len(h) :]).argmax(1)

    return search


PEERS = {
    "torch complex64": lambda words: complex_peer(words, torch.complex64),
    "torch complex128": lambda words: complex_peer(words, torch.complex128),
    "torch float32 product": real_peer,
}


def run(benchmark, name: str, function: Callable, *arguments) -> None:
    benchmark.name = name
    benchmark.pedantic(function, arguments, rounds=9, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize(("queries", "bits"), SIZES)
@pytest.mark.parametrize("precision", ["exact", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_search(benchmark, queries, bits, precision, backend):
    benchmark.group = f"codebook search, {queries} queries x 2^{bits} words x {ANTENNAS}"
    h, words = gaussian(queries, 1), gaussian(2**bits, 2)
    with csikernels.use_backend(backend):
        book = Codebook(words, precision)
        check(book.search(h)[0], h, words, exact=precision == "exact")
        run(benchmark, f"csikernels {backend} {precision}", book.search, h)


@pytest.mark.parametrize(("queries", "bits"), SIZES)
@pytest.mark.parametrize("peer", PEERS)
def test_search_peers(benchmark, queries, bits, peer):
    benchmark.group = f"codebook search, {queries} queries x 2^{bits} words x {ANTENNAS}"
    h, words = gaussian(queries, 1), gaussian(2**bits, 2)
    search = PEERS[peer](words)
    check(search(h), h, words, exact=peer == "torch complex128")
    run(benchmark, peer, search, h)


def check(index: torch.Tensor, h: torch.Tensor, words: torch.Tensor, *, exact: bool) -> None:
    scores = (h.to(torch.complex128).conj() @ unit(words.to(torch.complex128)).T).abs()
    best, wanted = scores.max(dim=1)
    if exact:
        assert torch.equal(index, wanted)
    assert torch.all(scores.gather(1, index[:, None])[:, 0] >= best * (1 - 1e-5))


@pytest.mark.parametrize("who", [*BACKENDS, "torch normalised copy"])
def test_pack(benchmark, who):
    benchmark.group = f"codebook pack, 2^14 words x {ANTENNAS}"
    words = gaussian(2**14, 2)
    if who not in BACKENDS:
        torch.testing.assert_close(unit(words).norm(dim=1), torch.ones(len(words)))
        run(benchmark, who, unit, words)
        return
    with csikernels.use_backend(who):
        h = gaussian(16, 1)
        check(Codebook(words).search(h)[0], h, words, exact=True)
        run(benchmark, f"csikernels {who}", Codebook, words)
