"""IdasNet ("Deep CSI Compression for Massive MIMO: A Self-Information Model-Driven Neural Network", Yin et al., 2022).

LLMCsiNet takes its encoder, and its preliminary decoder has as many parameters as Table IV gives for IdasNet's: what
tells the two apart is the language model. No code of IdasNet is public.
"""

from __future__ import annotations

from typing import Any

from csimodels.models.llmcsinet import LlmCsiNet, LlmCsiNetConfig


class IdasNet(LlmCsiNet):
    """Values and positions of the strongest elements of the self-information image, refined by two residual networks.

    :class:`csimodels.models.llmcsinet.LlmCsiNet` without f_TP, which chooses the elements by the magnitude of the image
    rather than by the information of ``H``. Decided: IdasNet's abstract has the information mask ``H`` first, and the
    encoder choose the codeword from what is left.

    Parameters: 2,502 at the UE (3.16 k in Table IV; :meth:`LlmCsiNet.ue_parameters` says where 576 of the rest are),
    3,362 at the BS (3.36 k), whatever the compression ratio.

    Args:
        codeword_values: M, the elements fed back.
        delays, antennas: Nc and Nt.
        choices: other fields of :class:`csimodels.models.llmcsinet.LlmCsiNetConfig`.

    Raises:
        ValueError: what the configuration refuses.
    """

    def __init__(self, codeword_values: int, *, delays: int = 32, antennas: int = 32, **choices: Any):
        fields: dict[str, Any] = {"selection": "image", "prediction": False} | choices
        super().__init__(LlmCsiNetConfig(delays, antennas, codeword_values, **fields))
