"""CSI as network tokens, and the random linear projection that makes the codeword (LASCO, eqs. 9 to 11)."""

from __future__ import annotations

import dataclasses
import math

import torch


def to_tokens(h: torch.Tensor) -> torch.Tensor:
    """Complex ``[..., antenna, subcarrier]`` -> real ``[..., subcarrier, 2 * antenna]``: one token per subcarrier.

    The first half of a token holds real parts, the second imaginary ones.
    """
    if not h.is_complex() or h.ndim < 2:
        raise TypeError(f"h: expected a complex tensor [..., antenna, subcarrier], got {h.dtype} {tuple(h.shape)}")
    h = h.mT
    return torch.cat([h.real, h.imag], dim=-1)


def from_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`to_tokens`: real ``[..., subcarrier, 2 * antenna]`` to complex."""
    if tokens.ndim < 2 or tokens.shape[-1] % 2:
        raise ValueError(f"tokens: expected shape [..., subcarrier, 2 * antenna], got {tuple(tokens.shape)}")
    if not tokens.is_floating_point():
        raise TypeError(f"tokens: expected a real floating-point tensor, got {tokens.dtype}")
    real, imaginary = tokens.chunk(2, dim=-1)
    return torch.complex(real, imaginary).mT


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What UE and BS must agree on.

    Attributes:
        antennas, subcarriers: size of ``H``.
        codeword_length: M, the reals fed back per sample; LASCO uses 100 to 150 of 2048.
        seed: of the projection matrix, shared by UE and BS.
    """

    antennas: int = 32
    subcarriers: int = 32
    codeword_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.antennas, self.subcarriers) < 1:
            raise ValueError(f"antennas, subcarriers: expected at least 1, got {self.antennas} and {self.subcarriers}")
        if not 1 <= self.codeword_length <= self.reals:
            raise ValueError(
                f"codeword_length: expected 1 to {self.reals} (2 * {self.antennas} * {self.subcarriers}), "
                f"got {self.codeword_length}"
            )

    @property
    def reals(self) -> int:
        """Real numbers in one sample, ``2 Nt Nc``."""
        return 2 * self.antennas * self.subcarriers

    @property
    def compression(self) -> float:
        """The compression ratio ``2 Nt Nc / M`` (LASCO, eq. 10)."""
        return self.reals / self.codeword_length


class RandomProjectionCodec:
    """The UE's encoder ``s = A vec(H)`` and the BS's first estimate ``H_in = A^+ s`` (LASCO, eqs. 9 and 11).

    ``A`` has independent Gaussian entries of variance 1/M. Networks work in *network units*: tokens scaled so that a
    sample of power ``Nt * Nc`` has unit variance per real, and ``H_in`` scaled by a further ``sqrt(2 Nt Nc / M)``,
    which gives back the energy that the projection onto M dimensions removes.

    Attributes:
        projection: float32 ``[M, 2 Nt Nc]``. pseudo_inverse: float32 ``[2 Nt Nc, M]`` (computed in float64).
    """

    def __init__(self, config: CodecConfig):
        self.config = config
        m, reals = config.codeword_length, config.reals
        generator = torch.Generator().manual_seed(config.seed)
        projection = torch.randn(m, reals, generator=generator, dtype=torch.float64) / math.sqrt(m)
        self.projection = projection.float()
        self.pseudo_inverse = torch.linalg.pinv(projection).float()
        self.token_scale = math.sqrt(2.0)
        self.input_scale = self.token_scale * math.sqrt(reals / m)

    @property
    def token_shape(self) -> tuple[int, int]:
        """``(tokens, features)`` of one sample: ``(subcarriers, 2 * antennas)``."""
        return self.config.subcarriers, 2 * self.config.antennas

    def check(self, h: torch.Tensor) -> None:
        """Raise unless ``h`` is complex ``[batch, antenna, subcarrier]`` of this codec's size."""
        expected = (self.config.antennas, self.config.subcarriers)
        if not h.is_complex():
            raise TypeError(f"h: expected a complex tensor, got {h.dtype}")
        if h.ndim != 3 or tuple(h.shape[1:]) != expected:
            raise ValueError(f"h: expected shape [batch, {expected[0]}, {expected[1]}], got {tuple(h.shape)}")

    def encode(self, h: torch.Tensor) -> torch.Tensor:
        """Complex ``[batch, antenna, subcarrier]`` -> codeword, float32 ``[batch, M]``."""
        self.check(h)
        return to_tokens(h).flatten(1).float() @ self.projection.T

    def initial(self, codeword: torch.Tensor) -> torch.Tensor:
        """Codeword ``[batch, M]`` -> ``H_in`` in network units, float32 ``[batch, subcarriers, 2 * antennas]``."""
        m = self.config.codeword_length
        if not codeword.is_floating_point():
            raise TypeError(f"codeword: expected a real floating-point tensor, got {codeword.dtype}")
        if codeword.ndim != 2 or codeword.shape[1] != m:
            raise ValueError(f"codeword: expected shape [batch, {m}], got {tuple(codeword.shape)}")
        return (codeword.float() @ self.pseudo_inverse.T).unflatten(1, self.token_shape) * self.input_scale

    def target(self, h: torch.Tensor) -> torch.Tensor:
        """``H`` in network units: what a network's output is compared with."""
        self.check(h)
        return to_tokens(h).float() * self.token_scale

    def to_channel(self, tokens: torch.Tensor) -> torch.Tensor:
        """Network output -> complex64 ``[batch, antenna, subcarrier]``."""
        return from_tokens(tokens.float() / self.token_scale)
