"""Networks that refine the codewords of a codebook: what LVM4CF and the networks it is compared with share.

Source: "Extract the Best, Discard the Rest: CSI Feedback with Offline Large AI Models" (Zhuang et al.), section IV-A.
A network maps one codeword to a better one, ``g_i = f(c_i)`` (eq. 10), offline; feedback itself uses codebooks only.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class CodewordConfig:
    """What every network's configuration has.

    Attributes:
        dimension: N_c, complex elements of a codeword, polarisation-major.
        polarisations: equal parts that become tokens of their own (eq. 16).
        residual: True adds the output of eq. 21 to the codeword (in the same unit) before the unit norm, and starts at
            the codeword itself; the paper's network predicts the refined codeword as a whole.
    """

    dimension: int = 128
    polarisations: int = 2
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("dimension", "polarisations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dimension % self.polarisations:
            raise ValueError(
                f"dimension: expected a multiple of polarisations={self.polarisations}, got {self.dimension}"
            )

    @property
    def token_features(self) -> int:
        """Reals of one token: real parts, then imaginary parts (eq. 17); N_c with two polarisations."""
        return 2 * self.dimension // self.polarisations


class CodewordNetwork(nn.Module):
    """Refines codewords: complex64 ``[n, dimension]`` -> complex64 ``[n, dimension]`` of unit norm.

    A subclass defines :meth:`_refine`. Decided: a codeword enters scaled to elements of unit mean square in each real
    part (times sqrt(2 N_c), since a unit-norm word's reals are about 1/16 at N_c = 128, where the biases of eq. 18
    would outweigh the word). Pre-processing, Tanh and recombination are the same for all networks.

    Args:
        config: sizes.
    """

    config: CodewordConfig

    def __init__(self, config: CodewordConfig):
        super().__init__()
        self.config = config

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Refined codewords.

        Raises:
            TypeError: ``words`` is not complex64.
            ValueError: it is not ``[n, dimension]``.
        """
        _check_words("words", words, self.config.dimension)
        if not len(words):
            return words.clone()  # the layers of transformers cannot reshape an empty batch
        tokens = self.to_tokens(words)
        refined = torch.tanh(self._refine(tokens))
        if self.config.residual:
            refined = tokens + refined
        return self.to_words(refined)

    def to_tokens(self, words: torch.Tensor) -> torch.Tensor:
        """Complex ``[n, dimension]`` -> float ``[n, polarisations, token_features]`` (eqs. 16 and 17)."""
        parts = words.unflatten(1, (self.config.polarisations, -1))
        return torch.cat([parts.real, parts.imag], dim=2) * math.sqrt(2 * self.config.dimension)

    def to_words(self, tokens: torch.Tensor) -> torch.Tensor:
        """Float ``[n, polarisations, token_features]`` -> complex ``[n, dimension]`` of unit norm (eq. 22)."""
        words = torch.complex(*tokens.float().chunk(2, dim=2)).flatten(1)
        return words / torch.linalg.vector_norm(words, dim=1, keepdim=True)

    def _output_layer(self, layer: nn.Linear) -> nn.Linear:
        """``layer`` as the network's last: with ``residual`` its weights start at zero, so that a network that is
        drawn anew gives the codeword itself."""
        if self.config.residual:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return layer

    def _refine(self, tokens: torch.Tensor) -> torch.Tensor:
        """Float ``[n, polarisations, token_features]`` -> the same, before Tanh."""
        raise NotImplementedError


@torch.inference_mode()
def refine_codebook(network: CodewordNetwork, codebook: torch.Tensor, batch: int = 4096) -> torch.Tensor:
    """The refined codebook, ``g_i = f(c_i)`` for all i (eq. 10), ``batch`` codewords at a time.

    Args:
        network: put into eval mode for the time.
        codebook: complex64 ``[K, dimension]``.
        batch: codewords per forward; bounds the memory besides the result's.

    Returns:
        complex64 ``[K, dimension]``, unit norm, on the CPU.

    Raises:
        TypeError, ValueError: the codebook does not fit the network, or ``batch`` is below 1.
        FloatingPointError: a refined codeword is zero or not finite.
    """
    _check_words("codebook", codebook, network.config.dimension)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    device = next(network.parameters()).device
    refined = torch.empty_like(codebook, device="cpu", memory_format=torch.contiguous_format)
    training = network.training
    network.eval()
    try:
        for start in range(0, len(codebook), batch):
            refined[start : start + batch] = network(codebook[start : start + batch].to(device)).cpu()
    finally:
        network.train(training)
    bad = (~torch.isfinite(torch.view_as_real(refined)).flatten(1).all(1)).nonzero()
    if len(bad):
        raise FloatingPointError(f"the network refines codeword {int(bad[0])} to one without a direction")
    return refined


def _check_words(name: str, words: torch.Tensor, dimension: int) -> None:
    if not isinstance(words, torch.Tensor) or words.dtype != torch.complex64:
        raise TypeError(f"{name}: expected complex64, got {getattr(words, 'dtype', type(words).__name__)}")
    if words.ndim != 2 or words.shape[1] != dimension:
        raise ValueError(f"{name}: expected shape [n, {dimension}], got {list(words.shape)}")
