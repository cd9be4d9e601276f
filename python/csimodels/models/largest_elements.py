"""The classical way to feed back sparse CSI: the largest elements and where they are, without any network."""

from __future__ import annotations

from typing import Any

from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig


class LargestElements(LlmCsiNet):
    """Values, positions and mean, as LLMCsiNet sends them, of the largest elements of ``H``; the mean everywhere else.

    Not in the paper: what LLMCsiNet and IdasNet must beat at equal bits for their networks to be of use. There is
    nothing to train, and no parameter at either end.

    Args:
        codeword_values: M, the elements fed back.
        delays, antennas: Nc and Nt.
        choices: other fields of :class:`csimodels.models.llmcsinet.LlmCsiNetConfig`.

    Raises:
        ValueError: what the configuration refuses.
    """

    def __init__(self, codeword_values: int, *, delays: int = 32, antennas: int = 32, **choices: Any):
        fields: dict[str, Any] = {"mask": "magnitude", "preliminary": False, "prediction": False} | choices
        super().__init__(LlmCsiNetConfig(delays, antennas, codeword_values, **fields))
