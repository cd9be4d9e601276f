"""Codebook ops in Triton: checks, allocations, launches.

The search waits for nothing and reads nothing on the host, so it can be captured in a CUDA graph once a call outside
has tuned its kernel. An environment out of range stops the GPU, since to name it would mean to wait: torch's own
assertion does that before the kernels start (Triton's is compiled only for debugging). Packing waits once, to refuse
words without a direction. Results do not depend on what the tuning chose, nor on the other queries.

Words of more than 256 complex numbers and books of more than 2^22 words take the reference, when packing and when
searching.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csikernels._dispatch import implement
from csikernels.reference import codebook as in_pytorch
from csikernels.triton import codebook_checks as checks
from csikernels.triton.codebook_filter import list_groups, spread_queries
from csikernels.triton.codebook_pack import pack
from csikernels.triton.codebook_rescore import rescore
from csikernels.triton.codebook_rows import MOST_DIMENSION, MOST_WORDS, Layout
from csikernels.triton.launch import on

# Groups of words times queries of one launch. With two keys and a score each: 64 MB.
LISTED = 1 << 22
_ROWS = 4096  # queries of one launch at most


@implement("codebook_pack", "triton")
def codebook_pack(codebook: Tensor, precision: str, copy: bool = True) -> tuple[Tensor, Tensor]:
    checks.check_codewords(codebook, "codebook")
    checks.check_precision(precision)
    in_pytorch.check_copy(codebook, copy)
    if not _is_ours(codebook):
        return in_pytorch.pack(codebook, precision, copy)
    layout = _layout(codebook)
    given = _plain(codebook)
    words = torch.empty_like(given) if copy else given.new_empty(0)
    packed = torch.zeros(layout.bytes, dtype=torch.uint8, device=words.device)
    factors, tiles, residuals = _parts(packed, layout)
    with on(words):
        pack(_real(given), _real(words), (factors, tiles, residuals), layout)
    refused = (factors == 0).nonzero()
    if len(refused):
        in_pytorch.refuse_codeword(codebook, int(refused[0]))
    return words, packed


@implement("codebook_search", "triton")
def codebook_search(
    h: Tensor, words: Tensor, packed: Tensor, environment: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    checks.check_codewords(words, "words")
    checks.check_queries(h, words, environment)
    checks.check_precision(precision)
    if not _is_ours(words):
        return in_pytorch.search(h, words, packed, environment, precision)
    layout = _layout(words)
    checks.check_packed(packed, layout.bytes, words)
    if environment is not None:
        _check_values(environment, layout.books)
    index = torch.empty(len(h), dtype=torch.int64, device=h.device)
    similarity = torch.empty(len(h), dtype=torch.float32, device=h.device)
    if len(h):
        packed = packed.contiguous()
        packed = packed.clone() if packed.data_ptr() % 16 else packed  # a slice
        with on(h):
            _search(_real(_plain(h)), _real(_plain(words)), packed, environment, (index, similarity), layout, precision)
    return index, similarity


def _search(
    h: Tensor, words: Tensor, packed: Tensor, environment: Tensor | None, result: tuple[Tensor, Tensor],
    layout: Layout, precision: str,
) -> None:  # fmt: skip
    factors, tiles, residuals = _parts(packed, layout)
    # Queries of one environment side by side: a program reads each of its books once.
    books, order = (None, None) if environment is None else torch.sort(environment, stable=True)
    at_once = min(len(h), _ROWS, LISTED // layout.groups)
    for first in range(0, len(h), at_once):
        rows = min(at_once, len(h) - first)
        own = None if books is None else books[first : first + rows]
        planes = torch.empty(rows, 3, layout.padded, dtype=torch.bfloat16, device=h.device)
        errors = torch.empty(2, rows, dtype=torch.float32, device=h.device)
        keys = torch.empty(2, rows, layout.groups, dtype=torch.int32, device=h.device)
        spread_queries(h, order, planes, errors, first)
        list_groups(planes, tiles, own, keys, layout)
        rescore(h, order, own, words, (factors, residuals), errors, keys, result, first, layout, precision == "exact")


def _is_ours(words: Tensor) -> bool:
    return words.shape[-1] <= MOST_DIMENSION and words.shape[-2] <= MOST_WORDS


def _layout(words: Tensor) -> Layout:
    return Layout(words.shape[0] if words.dim() == 3 else 1, words.shape[-2], words.shape[-1])


def _parts(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [E, K], bfloat16 words [E, P, 2, D'] and residuals [E, P / G], flat views of a packed buffer."""
    at = layout.factor_bytes, layout.factor_bytes + layout.word_bytes
    factors = packed[: 8 * layout.books * layout.words].view(torch.float64)
    return factors, packed[at[0] : at[1]].view(torch.bfloat16), packed[at[1] :].view(torch.float32)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()


def _real(tensor: Tensor) -> Tensor:
    """[..., D, 2]"""
    return torch.view_as_real(tensor)


def _check_values(environment: Tensor, books: int) -> None:
    if environment.device.type == "cpu":
        in_pytorch.check_environment_values(environment, books)
    else:  # without waiting for the GPU: it stops there, as torch's own indexing would
        inside = ((environment >= 0) & (environment < books)).all()
        torch._assert_async(inside, f"environment: expected 0..{books - 1}")
