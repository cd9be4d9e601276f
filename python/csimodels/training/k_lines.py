"""k-lines: the generalised Lloyd algorithm on the Grassmannian of lines, a codebook fitted to a site's channels.

Alternates two steps, neither of which can lower the mean squared cosine ``mean_n max_i |c_i^H h_n|^2``: every channel
goes to its best codeword (:class:`csikernels.Codebook`, LVM4CF (Zhuang et al.), eq. 6), and every codeword becomes the
dominant eigenvector of its cell's covariance ``sum_n h_n h_n^H`` (Xia and Giannakis, "Design and Analysis of
Transmit-Beamforming Based on Limited-Rate Feedback", 2006; the squared chordal distance is 1 minus the squared cosine).

A cell without channels cannot be averaged: its word moves to the channel that is served worst, each such word to
another one. No other channel loses by that, so the mean still does not fall.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from csikernels import Codebook
from csimodels.models.codebooks import check_bits

_ROWS = 4096  # channels whose cells are averaged at once: 4 MB at D = 128
_POWER_STEPS = 100
_POWER_TOLERANCE = 1e-5  # relative gain of a cell's Rayleigh quotient below which its eigenvector is good enough
_TILT = 0.1
_SERVED = 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class KLines:
    """A fitted codebook.

    Attributes:
        words: complex64 ``[2^B, D]``, unit norm.
        squared_cosine: mean squared cosine of the seeds, and after each iteration; the last is that of ``words``.
        cosine: mean cosine of ``words`` on the same channels.
        empty: cells without channels at the end; more than none only where the channels have fewer directions.
    """

    words: Tensor
    squared_cosine: list[float]
    cosine: float
    empty: int


def k_lines(
    h: Tensor,
    bits: int,
    *,
    seed: int,
    iterations: int = 100,
    tolerance: float = 1e-4,
    on_iteration: Callable[[int, float], None] | None = None,
) -> KLines:
    """Fit 2^B codewords to channels.

    Memory: the channels once more, the codewords twice, and a pack of about a quarter of them. An iteration takes
    little more than one search of all channels: 70,000 of 128 numbers took 1.0 s at 2^10 words and 2.1 s at 2^12 on one
    thread of an AMD EPYC, and all of it 20 s (19 iterations) and 30 s (13), so nothing is kept to resume from.

    Args:
        h: channels, complex64 ``[N, D]`` of any norm, N at least 2^B. Only their directions count, each alike.
        bits: B, 1 to 20.
        seed: chooses the channels that the words start as.
        iterations: at most. tolerance: stop when the mean squared cosine grows by less than this part of itself.
        on_iteration: called with the iteration's number and the mean squared cosine.

    Raises:
        TypeError: ``h`` is not complex64.
        ValueError: ``bits`` out of range, fewer channels than words, a channel that is zero or not finite (its index is
            named), or ``iterations`` or ``tolerance`` negative.
    """
    check_bits(bits)
    h = _directions(h)
    if len(h) < 2**bits:
        raise ValueError(f"h: expected at least 2^{bits} = {2**bits} channels to start from, got {len(h)}")
    if iterations < 0 or not tolerance >= 0:
        raise ValueError(f"iterations, tolerance: expected at least 0, got {iterations} and {tolerance}")
    words = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))[: 2**bits].to(h.device)]
    index, similarity = Codebook(words, copy=False).search(h)
    history = [_mean_square(similarity)]
    for iteration in range(1, iterations + 1):
        words = updated_words(h, words, index, similarity)
        index, similarity = Codebook(words, copy=False).search(h)
        history.append(_mean_square(similarity))
        if on_iteration is not None:
            on_iteration(iteration, history[-1])
        if history[-1] - history[-2] <= tolerance * history[-2]:
            break
    empty = len(words) - len(index.unique())
    return KLines(words, history, similarity.double().mean().item(), empty)


def updated_words(h: Tensor, words: Tensor, index: Tensor, similarity: Tensor) -> Tensor:
    """One update of the codewords, given who is served by whom.

    Args:
        h: complex64 ``[N, D]``, unit norm. words: complex64 ``[K, D]``, unit norm.
        index: int64 ``[N]``, the word of each channel. similarity: float32 ``[N]``, their cosine.

    Returns:
        complex64 ``[K, D]``: dominant eigenvectors; worst-served channels in place of words without channels.
    """
    new = _eigenvectors(h, words, index)
    empty = (torch.bincount(index, minlength=len(words)) == 0).nonzero()[:, 0]
    if len(empty):
        value, worst = similarity.topk(min(len(empty), len(h)), largest=False)
        worst = worst[value < _SERVED]  # a word beside a channel that has its own would serve nobody
        new[empty[: len(worst)]] = h[worst]
    return new


def single_side_words(h: Tensor, words: Tensor) -> Tensor:
    """The best codebook of a BS whose UEs keep another one (LVM4CF (Zhuang et al.), eq. 9, SS), by mean squared cosine.

    The UE's codebook fixes the cells, so one update is all there is: each word becomes the dominant eigenvector of the
    channels that report its index. No codebook of the BS has a larger mean squared cosine on these channels.

    Args:
        h: channels, complex64 ``[N, D]`` of any norm. words: the UE's codebook, complex64 ``[K, D]``, unit norm.

    Returns:
        complex64 ``[K, D]``, unit norm; a word whose index no channel reports stays as it is.

    Raises:
        TypeError, ValueError: as :func:`k_lines` for ``h``, or another D.
    """
    h = _directions(h)
    return _eigenvectors(h, words, Codebook(words).search(h)[0])


def _eigenvectors(h: Tensor, words: Tensor, index: Tensor) -> Tensor:
    """Dominant eigenvectors of the cells; words without channels as they are."""
    new = words.clone()
    for cells, members in _cells(index, len(words)):
        new[cells] = _dominant(h[members], words[cells])
    return new


def _directions(h: Tensor) -> Tensor:
    if not isinstance(h, Tensor) or h.dtype != torch.complex64:
        raise TypeError(f"h: expected complex64, got {h.dtype if isinstance(h, Tensor) else type(h).__name__}")
    if h.dim() != 2 or h.shape[1] == 0:
        raise ValueError(f"h: expected [N, D], got shape {tuple(h.shape)}")
    norm = torch.linalg.vector_norm(torch.view_as_real(h.contiguous()).flatten(1), dim=1, keepdim=True)
    bad = ~((norm > 0) & norm.isfinite())
    if bool(bad.any()):
        raise ValueError(
            f"h: {int(bad.sum())} channels are zero or not finite, the first is {int(bad.nonzero()[0, 0])}"
        )
    return h / norm


def _mean_square(similarity: Tensor) -> float:
    return similarity.double().square().mean().item()


def _cells(index: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cells with channels, those of one size together: cells int64 ``[C]``, their channels int64 ``[C, n]``."""
    order = torch.argsort(index, stable=True)
    size = torch.bincount(index, minlength=count)
    start = size.cumsum(0) - size
    for n in size.unique().tolist():
        if n == 0:
            continue
        for cells in (size == n).nonzero()[:, 0].split(max(1, _ROWS // n)):
            yield cells, order[start[cells, None] + torch.arange(n, device=index.device)]


def _dominant(rows: Tensor, word: Tensor) -> Tensor:
    """Dominant eigenvector of each ``sum_n h_n h_n^H``, by power iterations that never form the matrix.

    Args:
        rows: complex64 ``[C, n, D]``. word: complex64 ``[C, D]``, unit norm, to start from.

    Returns:
        complex64 ``[C, D]``, unit norm, whose Rayleigh quotients are no smaller than those of ``word``.
    """
    if rows.shape[1] == 1:
        return rows[:, 0]
    first = gain = (rows * word.conj()[:, None]).sum(2)  # c^H h
    # Tilted towards the channel served worst: a word orthogonal to the dominant eigenvector would stay so.
    worst = gain.abs().argmin(1)
    best = _unit(word + _TILT * rows[torch.arange(len(rows), device=rows.device), worst])
    before = torch.zeros(len(rows), device=rows.device)
    for _ in range(_POWER_STEPS):
        gain = (rows * best.conj()[:, None]).sum(2)
        quotient = _power(gain)
        if bool((quotient - before <= _POWER_TOLERANCE * quotient).all()):
            break
        before = quotient
        best = _unit((rows * gain.conj()[:, :, None]).sum(1))
    quotient = _power((rows * best.conj()[:, None]).sum(2))
    return torch.where((quotient >= _power(first))[:, None], best, word)


def _power(gain: Tensor) -> Tensor:
    return torch.view_as_real(gain).square().sum((1, 2))


def _unit(word: Tensor) -> Tensor:
    return word / torch.linalg.vector_norm(torch.view_as_real(word), dim=(1, 2))[:, None]
