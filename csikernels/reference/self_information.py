"""Self-information, exact selection and scattering in plain PyTorch.

Information is computed in float64 whatever the input, so that the ranking is the one float64 arithmetic gives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from csikernels._dispatch import implement


@implement("self_information", "reference")
def self_information(h: Tensor, bandwidth: float, offsets: list[int]) -> Tensor:
    """h [B,C,H,W], offsets (row, column, row, column, ...) -> bits [B,C,H,W]."""
    pairs = _pairs(offsets)
    log_sum = _log_neighbour_sum(h, bandwidth, pairs)
    centres = pairs.count((0, 0))
    if centres:
        log_sum = torch.logaddexp(log_sum, torch.full_like(log_sum, math.log(centres)))
    log_density = log_sum - math.log(len(pairs)) - math.log(math.sqrt(2 * math.pi) * bandwidth)
    bits = log_density / -math.log(2)
    return bits.to(h.dtype if h.dtype == torch.float64 else torch.float32)


@implement("select_informative", "reference")
def select_informative(
    h: Tensor, m: int, bandwidth: float, offsets: list[int], source: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h [B,C,H,W], source like h -> values [B,m], indices [B,m]."""
    # The constant centre is left out: it would only round away differences between very informative elements.
    density = _log_neighbour_sum(h, bandwidth, _pairs(offsets)).flatten(1)
    indices = _smallest(density, m)
    return _pick((h if source is None else source).flatten(1), indices), indices


@implement("top_m", "reference")
def top_m(score: Tensor, m: int, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """score [B,N], source [B,N] -> values [B,m], indices [B,m]."""
    indices = _smallest(-score, m)
    return _pick(score if source is None else source, indices), indices


@implement("scatter_codeword", "reference")
def scatter_codeword(values: Tensor, indices: Tensor, mean: Tensor, shape: list[int]) -> Tensor:
    """values [B,m], indices [B,m], mean [B] -> [B,*shape]."""
    batch, size = values.shape[0], math.prod(shape)
    check_positions(indices, shape)
    winner = last_writer(indices, size)
    candidates = torch.cat([_bits(values), _bits(mean)[:, None]], dim=1)  # the mean stands in the last column
    filled = candidates.gather(1, torch.where(winner >= 0, winner, values.shape[1]))
    return filled.view(values.dtype).reshape(batch, *shape)


def check_positions(indices: Tensor, shape: list[int]) -> None:
    """On the CPU; to look on a GPU would mean to wait for it."""
    size = math.prod(shape)
    if indices.device.type == "cpu":
        wrong = indices[(indices < 0) | (indices >= size)]
        if wrong.numel():
            raise ValueError(f"indices: expected 0..{size - 1}, the elements of {tuple(shape)}, got {wrong[0].item()}")


def last_writer(indices: Tensor, size: int) -> Tensor:
    """indices [B,m] -> [B,size]: the last position in the codeword that points at each element, or -1."""
    batch, m = indices.shape
    order = torch.arange(m, device=indices.device).repeat(batch, 1)
    # A maximum does not depend on the order of writes, so duplicates are deterministic on every device.
    return torch.full((batch, size), -1, device=indices.device).scatter_reduce_(1, indices, order, "amax")


def _bits(tensor: Tensor) -> Tensor:
    # PyTorch's own gather normalises the NaNs of some types; integers go through it bit for bit.
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _pick(source: Tensor, indices: Tensor) -> Tensor:
    return _bits(source).gather(1, indices).view(source.dtype)


def _pairs(offsets: list[int]) -> list[tuple[int, int]]:
    return list(zip(offsets[0::2], offsets[1::2], strict=True))


def _log_neighbour_sum(h: Tensor, bandwidth: float, offsets: list[tuple[int, int]]) -> Tensor:
    """log of the sum over all non-central neighbours of exp(-(c_j - c_jk)^2 / (2 b^2)), float64.

    NaN where c_j is not finite. The largest term is factored out: far from all its neighbours, an element's sum
    underflows but its logarithm does not.
    """
    centre = h.double()
    reach = max(max(abs(row), abs(column)) for row, column in offsets)
    padded = F.pad(centre, (reach, reach, reach, reach))
    height, width = h.shape[-2:]

    def distance(offset: tuple[int, int]) -> Tensor:
        row, column = reach + offset[0], reach + offset[1]
        neighbour = padded[..., row : row + height, column : column + width]
        return ((centre - neighbour) / bandwidth).square() / 2

    neighbours = [offset for offset in offsets if offset != (0, 0)]
    nearest = torch.full_like(centre, torch.finfo(torch.float64).max)
    for offset in neighbours:
        nearest = torch.minimum(nearest, distance(offset))
    total = torch.zeros_like(centre)
    # Each term is rounded to a multiple of 2^-52 times the rounder's power of two, so that all partial sums are exact:
    # elements with the same differences to their neighbours, in whatever order, get the same sum and tie.
    rounder = 1.5 * 2.0 ** math.ceil(math.log2(max(1, len(neighbours))))
    for offset in neighbours:
        total += ((nearest - distance(offset)).exp() + rounder) - rounder
    return torch.where(centre.isfinite(), total.log() - nearest, torch.nan)


def _smallest(key: Tensor, m: int) -> Tensor:
    """key [B,N] -> positions [B,m] of the smallest, equal keys by position, NaN last."""
    # sort places NaN behind every number when ascending; topk keeps neither that nor the order of ties.
    return torch.sort(key, dim=1, stable=True).indices[:, :m].clone()
