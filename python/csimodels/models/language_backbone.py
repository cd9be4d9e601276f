"""A language model with its own token and position embeddings, for tokens of data that follow a text prompt.

Source: "Large Language Model Enabled Multi-Task Physical Layer Network" (Zheng and Dai), sections III-A and III-C. Where
:mod:`csimodels.models.backbone` keeps the Transformer layers alone, the embeddings stay here: the prompt goes through
the model's own embedder, and GPT-2's position embeddings are trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from csimodels.models.backbone import (
    MINILM,
    BackboneConfig,
    build_model,
    import_transformers,
    missing_source,
    quietly,
    resolve_source,
)

GPT2 = "openai-community/gpt2"


@dataclasses.dataclass(frozen=True)
class LanguageConfig(BackboneConfig):
    """Which language model, and where its weights and its tokeniser come from.

    Attributes:
        family, source, layers, width, heads, feedforward, dropout, settings: as for
            :class:`csimodels.models.backbone.BackboneConfig`; family ``"qwen"`` is Qwen2.
        attention: ``"causal"``, ``"bidirectional"``, or ``"pretrained"`` (default): as the family was trained, causal
            for all but ``bert``. Decided, since the paper inserts GPT-2 as it is: a data token sees the prompt and the
            data tokens before it. Which of the two is better for sets of users is open.
        vocabulary: number of tokens, the rows of the token embedding. With a source, None takes the source's.
        positions: the longest sequence; for ``gpt2`` and ``bert`` the rows of the position embedding. With a source,
            None takes the source's.
    """

    attention: str = "pretrained"
    vocabulary: int | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.attention == "pretrained":
            object.__setattr__(self, "attention", "bidirectional" if self.family == "bert" else "causal")
        super().__post_init__()
        for name in ("vocabulary", "positions"):
            value = getattr(self, name)
            if value is None and self.source is None:
                raise ValueError(f"{name}: expected a number, since without a source nothing else states it, got None")
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @classmethod
    def gpt2(cls, source: str | None = None, layers: int = 12) -> LanguageConfig:
        """The first layers of GPT-2 (124.44 M parameters with all 12); ``source=GPT2`` for its weights."""
        return cls("gpt2", source, layers, 768, 12, 3072, vocabulary=50_257, positions=1024)

    @classmethod
    def laptop(cls, layers: int = 2) -> LanguageConfig:
        """Random GPT-2 layers of width 128 (0.2 M parameters each) with 1024 tokens, which a CPU core can train."""
        return cls("gpt2", None, layers, 128, 4, 512, vocabulary=1024, positions=128)

    @classmethod
    def minilm(cls, layers: int = 6) -> LanguageConfig:
        """Up to 6 pre-trained layers of MiniLM (width 384, 1.8 M parameters each), without any network."""
        return cls("bert", MINILM, layers, 384, 12, 1536, vocabulary=30_522, positions=512)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> LanguageConfig:
        """The inverse of ``dataclasses.asdict``, for configurations stored as JSON."""
        return cls(**entries)


class LanguageBackbone(nn.Module):
    """Maps embeddings to the outputs of a language model's last layer.

    The token embedding is frozen: only prompts use it. All else is trainable.

    Args:
        config: which model.
        pretrained: False builds the architecture from ``config`` alone, with random weights: for a checkpoint that
            brings them. The configuration must state all sizes, as that of a built one does. The tokeniser still is the
            source's, loaded when the first text comes.

    Attributes:
        config: with the sizes and settings of the source written out.
        model: the module of `transformers`: GPT2Model, LlamaModel, Qwen2Model, BertModel.
        width: of a token's embedding.

    Raises:
        ImportError: `transformers` is not installed (extra ``llm``).
        FileNotFoundError: the source is not to be had; the message names those that work offline.
        ValueError: the source is of another family, has fewer layers, or other sizes than ``config`` states.
    """

    config: LanguageConfig

    def __init__(self, config: LanguageConfig, *, pretrained: bool = True):
        super().__init__()
        self.model, self.config = _build(config, pretrained)
        self.width: int = self.model.config.hidden_size
        self.model.get_input_embeddings().weight.requires_grad_(False)
        self._tokenizer: Any = None
        self._ids: dict[str, list[int]] = {}

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text: the source's tokeniser without special tokens, or :func:`hashed_ids` without a source.

        Raises:
            ValueError: a text without tokens.
            FileNotFoundError: the source's tokeniser is not to be had.
        """
        if text not in self._ids:
            if self.config.source is None:
                ids = hashed_ids(text, self.model.config.vocab_size)
            else:
                if self._tokenizer is None:
                    self._tokenizer = _load_tokenizer(self.config.source)
                ids = self._tokenizer.encode(text, add_special_tokens=False)
            if not ids:
                raise ValueError(f"text: expected at least one token, got {text!r}")
            self._ids[text] = ids
        return self._ids[text]

    def embed_text(self, text: str) -> Tensor:
        """The model's own embedding of a text, float ``[tokens, width]``, without positions. It takes no gradient.

        Raises:
            ValueError, FileNotFoundError: as :meth:`token_ids`.
        """
        embedding = self.model.get_input_embeddings()
        return embedding(torch.tensor(self.token_ids(text), device=embedding.weight.device))

    def forward(self, embeddings: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Outputs for ``embeddings``.

        Args:
            embeddings: float ``[batch, tokens, width]``; the model's position embeddings are added here.
            prefix: embeddings ``[tokens before, width]`` that precede every sequence, such as a prompt's. With causal
                attention they see nothing of the sequences, so their keys and values are computed once for the whole
                batch; the outcome is that of concatenation. Dropout then drops the same of the prefix everywhere.

        Returns:
            float ``[batch, tokens, width]``, none for the prefix.

        Raises:
            ValueError: another width, or more tokens than the model has positions for.
        """
        before = 0 if prefix is None else len(prefix)
        self._check(embeddings, before)
        if prefix is None:
            return self._run(embeddings)
        if self.config.attention == "causal":
            return self._continue(embeddings, prefix)
        whole = torch.cat([prefix.expand(len(embeddings), -1, -1), embeddings], 1)
        return self._run(whole)[:, before:]

    def _run(self, embeddings: Tensor) -> Tensor:
        if self.config.family == "bert":
            return self.model(inputs_embeds=embeddings)[0]
        mask = None
        if self.config.attention == "bidirectional":
            tokens = embeddings.shape[1]
            mask = embeddings.new_zeros(1, 1, tokens, tokens)  # added to the scores: hides nothing
        return self.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]

    def _continue(self, embeddings: Tensor, prefix: Tensor) -> Tensor:
        cache = import_transformers().DynamicCache()
        # transformers renamed the argument within version 5.
        has_new_name = "cache" in inspect.signature(self.model.forward).parameters
        arguments = {"cache" if has_new_name else "past_key_values": cache, "use_cache": True}
        self.model(inputs_embeds=prefix[None], **arguments)
        cache.batch_repeat_interleave(len(embeddings))
        return self.model(inputs_embeds=embeddings, **arguments)[0]

    def _check(self, embeddings: Tensor, before: int) -> None:
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.width:
            raise ValueError(
                f"embeddings: expected shape [batch, tokens, {self.width}], got {tuple(embeddings.shape)}"
            )
        tokens, positions = before + embeddings.shape[1], self.model.config.max_position_embeddings
        if tokens > positions:
            raise ValueError(f"embeddings: expected at most {positions} tokens with the prefix, got {tokens}")


def hashed_ids(text: str, vocabulary: int) -> list[int]:
    """Tokens for a model with random weights, which has no tokeniser: one per word, number or sign of the text.

    Decided: the id is a hash of the token (BLAKE2b, the same on every machine) modulo the vocabulary, capital letters
    apart from small ones. Two words may share an id; among a prompt's 50 words of 1024 ids it is a pair or so.

    Args:
        text: any text.
        vocabulary: number of ids, at least 1.

    Returns:
        Ids, each in 0..vocabulary-1; words are kept whole, digits of a number too.
    """
    tokens = re.findall(r"\w+|[^\w\s]", text)
    return [int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest()) % vocabulary for token in tokens]


def _build(config: LanguageConfig, pretrained: bool) -> tuple[Any, LanguageConfig]:
    sizes = {"vocab_size": config.vocabulary, "max_position_embeddings": config.positions}
    if config.source is not None and pretrained:
        model, built = build_model(config, pretrained=True)
        has = {"vocabulary": model.config.vocab_size, "positions": model.config.max_position_embeddings}
        for name, value in has.items():
            if getattr(config, name) not in (None, value):
                raise ValueError(
                    f"{name}: expected {value}, as {config.source!r} has, got {getattr(config, name)}"
                )
        return model, dataclasses.replace(config, **{**_fields(built), **has})
    if None in sizes.values():
        raise ValueError(f"vocabulary, positions: expected numbers, got {config.vocabulary}, {config.positions}")
    # A padding token would have a zero embedding that no token should share.
    entries = {"pad_token_id": None, **sizes, **config.settings}
    model, _ = build_model(dataclasses.replace(config, settings=entries), pretrained=False)
    return model, config


def _fields(config: BackboneConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(BackboneConfig)}


def _load_tokenizer(source: str) -> Any:
    transformers = import_transformers()
    path = resolve_source(source)
    try:
        return quietly(transformers, lambda: transformers.AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise missing_source(source, str(error).split("\n", 1)[0]) from None
