"""The baselines of LLMCsiNet by name and compression ratio (section V-B), and classical methods beside them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from csimodels.models.crnet import CRNet
from csimodels.models.csinet import CsiNet
from csimodels.models.gcrnet import GCRNet
from csimodels.models.idasnet import IdasNet
from csimodels.models.largest_elements import LargestElements
from csimodels.models.llmcsinet import PAPER_CODEWORD_VALUES, codeword_bits
from csimodels.models.principal_components import PrincipalComponents
from csimodels.models.transindecnet import TransInDecNet

_ELEMENTS = 2 * 32 * 32
_VALUE_BITS, _INDEX_BITS = 64, 10  # Table II


def codeword_length(ratio: float) -> int:
    """M of a codeword of values alone: ``ratio`` of the 2,048 elements of 2 x 32 x 32, rounded.

    Raises:
        ValueError: a ratio not above 0, above 1, or too small for one value.
    """
    length = round(ratio * _ELEMENTS) if 0 < ratio <= 1 else 0
    if length < 1:
        raise ValueError(f"ratio: expected {1 / _ELEMENTS} to 1, got {ratio}")
    return length


def codeword_values(ratio: float) -> int:
    """M of a codeword of values and positions of the same ratio (eq. 17 with 64 and 10 bits).

    The ratios of the paper (1/8, 1/16, 1/32 and 1/64) get the M of Table II, which exceed the ratio by up to 4%; any
    other the largest M that does not.

    Raises:
        ValueError: as :func:`codeword_length`, or a ratio too small for one value, its position and the mean.
    """
    bits = codeword_length(ratio) * _VALUE_BITS
    listed = PAPER_CODEWORD_VALUES.get(round(1 / ratio))
    if listed is not None and ratio * round(1 / ratio) == 1:
        return listed
    values = (bits - _VALUE_BITS) // (_VALUE_BITS + _INDEX_BITS)
    if values < 1:
        least = codeword_bits(1, _VALUE_BITS, _INDEX_BITS) / (_VALUE_BITS * _ELEMENTS)
        raise ValueError(f"ratio: expected {least} to 1 for values with positions, got {ratio}")
    return values


# "gcrnet" is GCRNet-1x.
BASELINES: dict[str, Callable[[float], nn.Module]] = {
    "csinet": lambda ratio: CsiNet(codeword_length(ratio)),
    "crnet": lambda ratio: CRNet(codeword_length(ratio)),
    "idasnet": lambda ratio: IdasNet(codeword_values(ratio)),
    "transindecnet": lambda ratio: TransInDecNet(codeword_length(ratio)),
    "gcrnet": lambda ratio: GCRNet(codeword_length(ratio)),
    "pca": lambda ratio: PrincipalComponents(codeword_length(ratio)),
    "largest": lambda ratio: LargestElements(codeword_values(ratio)),
}
# Without stages of training; principal components are fitted to the training samples.
CLASSICAL = ("pca", "largest")
LABELS = {
    "csinet": "CsiNet",
    "crnet": "CRNet",
    "idasnet": "IdasNet",
    "transindecnet": "TransInDecNet",
    "gcrnet": "GCRNet-1x",
    "pca": "Principal components",
    "largest": "Largest elements",
}
