"""Conventional codebooks of unit-norm codewords: random (RVQ), oversampled DFT beams, and the 3GPP Type I beams.

Codewords are complex64 ``[K, D]``. A port layout orders the D ports polarisation-major, each polarisation row-major
over (vertical rows, horizontal columns): port ``(p * rows + r) * columns + c``. LVM4CF (Zhuang et al., Table I) has 2
polarisations of 8 x 8 ports, D = 128.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

MOST_BITS = 20
_BLOCK = 2**14  # codewords made at once: 16 MB at D = 128


@dataclasses.dataclass(frozen=True)
class PortLayout:
    """A uniform planar array: ``polarisations`` times ``rows`` (vertical) times ``columns`` (horizontal)."""

    polarisations: int = 2
    rows: int = 8
    columns: int = 8

    def __post_init__(self) -> None:
        if self.polarisations not in (1, 2):
            raise ValueError(f"polarisations: expected 1 or 2, got {self.polarisations}")
        for name in ("rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def __len__(self) -> int:
        return self.polarisations * self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.polarisations} x {self.rows} x {self.columns} (polarisations x rows x columns)"


def check_bits(bits: int) -> None:
    """Raise unless ``bits`` is in 1..20."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits: expected 1 to {MOST_BITS}, got {bits!r}")


def rvq_codebook(bits: int, dimension: int = 128, *, seed: int) -> Tensor:
    """Random vector quantisation: independent codewords, isotropic on the unit sphere (Jindal, "MIMO Broadcast Channels
    with Finite-Rate Feedback", 2006, which LVM4CF takes as the conventional codebook).

    A function of the arguments on one version of torch; the two ends of a link should compare digests
    (:mod:`csimodels.models.codebook_file`) rather than trust that both drew the same.

    Args:
        bits: B, 1 to 20.
        dimension: D.
        seed: of the draw.

    Returns:
        complex64 ``[2^B, D]``. 2^20 words of 128 are 1.07 GB, and no copy of them is made on the way.

    Raises:
        ValueError: ``bits`` or ``dimension`` out of range.
    """
    check_bits(bits)
    if dimension < 1:
        raise ValueError(f"dimension: expected at least 1, got {dimension}")
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(2**bits, dimension, dtype=torch.complex64)
    for block in words.split(_BLOCK):
        parts = torch.view_as_real(block)
        parts.normal_(generator=generator)
        parts /= torch.linalg.vector_norm(parts, dim=(1, 2), keepdim=True)
    return words


def dft_codebook(ports: PortLayout, oversampling: tuple[int, int] = (4, 4), cophases: int = 4) -> Tensor:
    """Oversampled two-dimensional DFT beams, one beam for both polarisations, which differ by a phase.

    A word is ``[b, e^{j 2 pi n / cophases} b] / sqrt(D)`` with ``b = a_rows(l) (x) a_columns(m)`` and the element i of
    ``a_N(k)`` being ``e^{j 2 pi k i / (O N)}``. Indices ascend in (l, m, n), n fastest: of the row beam, the column
    beam and the co-phase. :func:`dft_oversampling` chooses the oversampling for a number of bits.

    Args:
        ports: of the array.
        oversampling: O over (rows, columns), each at least 1.
        cophases: phases between the polarisations; with one polarisation there is none to choose.

    Returns:
        complex64 ``[rows O_rows columns O_columns cophases, D]``, its B the base-2 logarithm; unit norm.

    Raises:
        ValueError: an oversampling or ``cophases`` below 1, more than 2^20 words, or a number of words that is no power
            of two of at least 2, which whole bits could not index.
    """
    if min(oversampling) < 1 or cophases < 1:
        raise ValueError(f"oversampling, cophases: expected at least 1 each, got {oversampling} and {cophases}")
    phases = cophases if ports.polarisations == 2 else 1
    rows, columns = ports.rows * oversampling[0], ports.columns * oversampling[1]
    _whole_bits(rows * columns * phases, f"{rows} x {columns} beams and {phases} co-phases")
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return _beam_words(row.flatten(), column.flatten(), ports, (rows, columns), phases)


def dft_oversampling(bits: int, ports: PortLayout, cophases: int = 4) -> tuple[int, int]:
    """The oversampling (rows, columns) with which :func:`dft_codebook` has 2^bits words.

    The columns take the odd factor of two, and a dimension of one port is not oversampled: its beams are all alike.

    Raises:
        ValueError: ``bits`` out of range, or no oversampling gives that many words.
    """
    check_bits(bits)
    fewest = ports.rows * ports.columns * (cophases if ports.polarisations == 2 else 1)
    doublings = bits - (fewest.bit_length() - 1)
    if fewest & (fewest - 1) or doublings < 0:
        raise ValueError(
            f"bits: expected at least {math.log2(fewest):g} and a power of two of words for {ports}, got {bits}"
        )
    if ports.columns == 1:
        return 2**doublings, 1
    own = 0 if ports.rows == 1 else doublings // 2
    return 2**own, 2 ** (doublings - own)


def type1_codebook(n1: int = 8, n2: int = 8, o1: int = 4, o2: int = 4, *, codebook_mode: int = 1) -> Tensor:
    """The Type I single-panel codebook of rank 1 (3GPP TS 38.214, section 5.2.2.2.1, Table 5.2.2.2.1-5).

    ``W_{l,m,n} = [v_{l,m}; phi_n v_{l,m}] / sqrt(P)`` with ``phi_n = e^{j pi n / 2}`` in {1, j, -1, -j} and
    ``v_{l,m}`` the Kronecker product of DFT vectors of length N1 (beam l of N1 O1) and N2 (beam m of N2 O2).

    The index is the PMI ``(i_{1,1}, i_{1,2}, i_2)`` with the last fastest, as TS 38.212 concatenates their bits (most
    significant first, for the sizes of which each is a power of two):

    - ``codebook_mode`` 1: ``i_{1,1} = l`` in 0..N1 O1 - 1, ``i_{1,2} = m`` in 0..N2 O2 - 1, ``i_2 = n`` in 0..3.
    - ``codebook_mode`` 2: ``i_{1,1}`` in 0..N1 O1 / 2 - 1, ``i_{1,2}`` in 0..N2 O2 / 2 - 1, ``i_2`` in 0..15, of which
      ``n = i_2 mod 4``, and ``i_2 div 4`` chooses among the beams ``(2 i_{1,1}, 2 i_{1,2})`` plus (0, 0), (1, 0),
      (0, 1), (1, 1). Where N2 = 1 it chooses l = 2 i_{1,1} plus 0, 1, 2, 3, so every word occurs twice.

    Args:
        n1, o1: ports and oversampling of the first dimension, here the horizontal one (columns). n2, o2: of the second,
            the vertical one (rows). The standard lists the pairs that a network may configure, up to 32 ports before
            Release 19; the same formula serves every size here, 8 x 8 ports of two polarisations included.
        codebook_mode: 1 or 2.

    Returns:
        complex64 ``[N1 O1 N2 O2 4, 2 N1 N2]`` (twice as many in mode 2 with N2 = 1), unit norm. B is the base-2
        logarithm of the number of words: 12 for 8 x 8 with oversampling 4 x 4. The ports are in this project's order
        (rows slow, columns fast within a polarisation), where the standard's v_{l,m} has the first dimension slow.

    Raises:
        ValueError: a size below 1, another mode, an odd number of beams in mode 2, or a number of words that is no
            power of two of at most 2^20.
    """
    for name, value in {"n1": n1, "n2": n2, "o1": o1, "o2": o2}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if codebook_mode not in (1, 2):
        raise ValueError(f"codebook_mode: expected 1 or 2, got {codebook_mode}")
    horizontal, vertical = _type1_beams(n1 * o1, n2 * o2, codebook_mode)
    _whole_bits(4 * len(horizontal), f"{n1 * o1} x {n2 * o2} beams in mode {codebook_mode} and 4 co-phases")
    return _beam_words(vertical, horizontal, PortLayout(2, n2, n1), (n2 * o2, n1 * o1), 4)


def _type1_beams(beams1: int, beams2: int, mode: int) -> tuple[Tensor, Tensor]:
    """Beams (l, m) of every ``(i_{1,1}, i_{1,2}, i_2 div 4)`` in order, int64 each."""
    if mode == 1:
        l, m = torch.meshgrid(torch.arange(beams1), torch.arange(beams2), indexing="ij")  # noqa: E741
        return l.flatten(), m.flatten()
    if beams1 % 2 or (beams2 > 1 and beams2 % 2):
        raise ValueError(f"codebook_mode: expected 1 for an odd number of beams, {beams1} x {beams2}, got 2")
    if beams2 == 1:
        l = 2 * torch.arange(beams1 // 2)[:, None] + torch.arange(4)  # noqa: E741
        return l.flatten() % beams1, torch.zeros(l.numel(), dtype=torch.int64)
    first = 2 * torch.arange(beams1 // 2)[:, None, None] + torch.tensor([0, 1, 0, 1])
    second = 2 * torch.arange(beams2 // 2)[None, :, None] + torch.tensor([0, 0, 1, 1])
    l, m = torch.broadcast_tensors(first, second)  # noqa: E741
    return l.flatten(), m.flatten()


def _beam_words(row: Tensor, column: Tensor, ports: PortLayout, beams: tuple[int, int], cophases: int) -> Tensor:
    """The beams (row[i], column[i]) out of ``beams``, each with every co-phase: complex64 ``[n cophases, D]``."""
    vertical, horizontal = _steering(ports.rows, beams[0]), _steering(ports.columns, beams[1])
    phase = _phasor(torch.arange(cophases), cophases) / math.sqrt(len(ports))
    words = torch.empty(len(row), cophases, len(ports), dtype=torch.complex64)
    for start in range(0, len(row), _BLOCK // cophases):
        part = slice(start, start + _BLOCK // cophases)
        beam = (vertical[row[part], :, None] * horizontal[column[part], None, :]).flatten(1)[:, None]
        polarised = [
            beam * (phase[0].expand(cophases) if p == 0 else phase)[:, None] for p in range(ports.polarisations)
        ]
        words[part] = torch.cat(polarised, dim=2)
    return words.flatten(0, 1)


def _steering(elements: int, beams: int) -> Tensor:
    """``e^{j 2 pi k i / beams}`` for each beam k and element i, complex128 ``[beams, elements]``."""
    return _phasor(torch.outer(torch.arange(beams), torch.arange(elements)), beams)


def _phasor(numerator: Tensor, denominator: int) -> Tensor:
    """``e^{j 2 pi numerator / denominator}`` of integers, complex128; quarter turns are exact."""
    angle = 2 * torch.pi * (numerator % denominator).double() / denominator
    parts = torch.stack([angle.cos(), angle.sin()], dim=-1)
    parts[parts.abs() < 1e-12] = 0
    return torch.view_as_complex(parts)


def _whole_bits(words: int, what: str) -> None:
    if words & (words - 1) or not 2 <= words <= 2**MOST_BITS:
        raise ValueError(f"codebook: expected a power of two of 2 to 2^{MOST_BITS} words, got {words} from {what}")
