"""Tiny random language models of every family that takes low-rank adapters, and what the tests of these share."""

from __future__ import annotations

import torch
import transformers
from torch import nn

# Sizes whose products are no multiples of NF4's block size; GPT-2's weights even have odd numbers of elements.
_GPT2 = {"n_layer": 2, "n_embd": 21, "n_head": 3, "n_inner": 33, "n_positions": 9, "vocab_size": 11}
_OTHERS = {
    "num_hidden_layers": 2, "hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 34, "vocab_size": 11,
    "max_position_embeddings": 9,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = {
    "gpt2": _GPT2,
    "llama": _OTHERS | {"num_key_value_heads": 1},
    "qwen2": _OTHERS | {"num_key_value_heads": 1},
    "bert": _OTHERS,
}
FAMILIES = tuple(SETTINGS)
PROJECTIONS = {"gpt2": 4, "llama": 7, "qwen2": 7, "bert": 6}  # per layer


def tiny(family: str = "gpt2", seed: int = 0, **changes: int) -> nn.Module:
    """A two-layer model in eval mode, with biases, normalisations and weights all drawn at random."""
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model(family, **{**SETTINGS[family], **_TOKENS, **changes})
    model = transformers.AutoModel.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """[3, 7, width], of the same random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return model(inputs_embeds=torch.randn(3, 7, model.config.hidden_size, generator=generator))[0]


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Change everything trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
