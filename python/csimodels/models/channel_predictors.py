"""Networks that predict the channels of the next slots, the baselines of Zheng and Dai, section V-B.1.

RNN, LSTM and GRU of four layers [33]-[35], and the Transformer that predicts all slots in parallel [5]. Each maps the
history at one antenna, complex ``[B, T1, M]`` (slot, subcarrier), to complex ``[B, T2, M]``. Slots are tokens of 2M
numbers, all real parts, then all imaginary parts. Every history is scaled to unit mean power on the way in and back on
the way out; decided, since a fade at one antenna is nothing that a network should have to learn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_COMPLEX = (torch.complex64, torch.complex128)
_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
CELLS = tuple(_CELLS)


def check_positive(config: Any, *names: str) -> None:
    """Fields of a configuration that must be whole numbers of at least 1; another is a ``ValueError``."""
    for name in names:
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(config, name)!r}")


def check_history(history: Tensor, slots: int, subcarriers: int, name: str = "history") -> None:
    """Refuse anything but complex ``[B, slots, subcarriers]``.

    Raises:
        TypeError: not a complex tensor. ValueError: another shape.
    """
    if not isinstance(history, Tensor) or history.dtype not in _COMPLEX:
        found = history.dtype if isinstance(history, Tensor) else type(history).__name__
        raise TypeError(f"{name}: expected a tensor of complex64 or complex128, got {found}")
    if history.ndim != 3 or tuple(history.shape[1:]) != (slots, subcarriers):
        raise ValueError(f"{name}: expected [B, {slots}, {subcarriers}], got {tuple(history.shape)}")


def to_tokens(history: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens of unit mean power: float ``dtype`` ``[B, T1, 2M]``, and the amplitudes ``[B, 1, 1]`` taken from them."""
    parts = torch.cat([history.real, history.imag], dim=-1)
    # The mean of |h|^2, twice that of the parts; a history of zeros stays what it is.
    scale = (2 * parts.square().mean((1, 2), keepdim=True)).sqrt().clamp_min(torch.finfo(parts.dtype).tiny)
    return (parts / scale).to(dtype), scale


def to_channels(tokens: Tensor, scale: Tensor) -> Tensor:
    """The inverse of :func:`to_tokens` for predicted slots: complex ``[B, T2, M]``."""
    real, imaginary = (tokens.to(scale.dtype) * scale).chunk(2, dim=-1)
    return torch.complex(real, imaginary)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions of "Attention is all you need" (section 3.5), float32 ``[length, width]``, any width."""
    position = torch.arange(length)[:, None]
    angle = position * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


class ChannelPredictor(nn.Module):
    """Predicts the channels of the next slots.

    A subclass has a ``config`` with ``history`` and ``subcarriers`` and a layer ``embed``, in whose precision it
    computes, and defines :meth:`_predict`.
    """

    config: Any
    embed: nn.Linear | nn.Conv1d

    def forward(self, history: Tensor) -> Tensor:
        """Predict.

        Args:
            history: complex ``[B, T1, M]``.

        Returns:
            complex ``[B, T2, M]``, of the same dtype.

        Raises:
            TypeError, ValueError: as :func:`check_history`.
        """
        check_history(history, self.config.history, self.config.subcarriers)
        tokens, scale = to_tokens(history, self.embed.weight.dtype)
        return to_channels(self._predict(tokens), scale)

    def _predict(self, tokens: Tensor) -> Tensor:
        """Float ``[B, T1, 2M]`` -> ``[B, T2, 2M]``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """A recurrent predictor.

    Attributes:
        cell: ``"rnn"`` [33], ``"lstm"`` [34] or ``"gru"`` [35].
        history, future, subcarriers: T1, T2, M.
        layers: 4 in the paper.
        width: of the hidden state. The paper is silent; decided: 192.

    Raises:
        ValueError: another cell, or a size below 1.
    """

    cell: str = "lstm"
    history: int = 16
    future: int = 4
    subcarriers: int = 48
    layers: int = 4
    width: int = 192

    def __post_init__(self) -> None:
        if self.cell not in _CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {self.cell!r}")
        check_positive(self, "history", "future", "subcarriers", "layers", "width")

    @classmethod
    def paper(cls, cell: str = "lstm") -> RecurrentConfig:
        """Section V-B.1: 0.3 M (RNN), 1.2 M (LSTM) or 0.9 M (GRU) parameters."""
        return cls(cell)

    @classmethod
    def laptop(cls, cell: str = "lstm") -> RecurrentConfig:
        """Widths of about 0.4 M parameters, whatever the cell."""
        return cls(cell, width={"rnn": 208, "lstm": 112, "gru": 128}.get(cell, 128))


class RecurrentPredictor(ChannelPredictor):
    """A linear layer, a recurrent network and a linear layer, which predict one slot from those before it.

    Decided: autoregressive, a predicted slot is the next input. The paper sets the Transformer apart from these by its
    predicting "in parallel", which "avoids error propagation".

    Args:
        config: sizes.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        features = 2 * config.subcarriers
        self.embed = nn.Linear(features, config.width)
        self.cells = _CELLS[config.cell](config.width, config.width, config.layers, batch_first=True)
        self.project = nn.Linear(config.width, features)

    def _predict(self, tokens: Tensor) -> Tensor:
        hidden, state = self.cells(self.embed(tokens))
        slots = [self.project(hidden[:, -1:])]
        for _ in range(self.config.future - 1):
            hidden, state = self.cells(self.embed(slots[-1]), state)
            slots.append(self.project(hidden))
        return torch.cat(slots, dim=1)


@dataclasses.dataclass(frozen=True)
class TransformerPredictorConfig:
    """The parallel Transformer predictor [5].

    Attributes:
        history, future, subcarriers: T1, T2, M.
        label: how many of the last known slots the decoder is given beside those to predict; decided: T1 / 2.
        width, heads, feedforward, encoder_layers, decoder_layers: decided: those of the public code of LLM4CP [13], of
            which it is a baseline too.
        dropout: while training; decided: 0, since the task is regression.

    Raises:
        ValueError: a size below 1, more label slots than history, heads that do not divide the width, or a dropout that
            is none.
    """

    history: int = 16
    future: int = 4
    subcarriers: int = 48
    label: int = 8
    width: int = 512
    heads: int = 8
    feedforward: int = 512
    encoder_layers: int = 3
    decoder_layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "history", "future", "subcarriers", "label", "width", "heads", "feedforward")
        check_positive(self, "encoder_layers", "decoder_layers")
        if self.label > self.history:
            raise ValueError(f"label: expected at most history={self.history}, got {self.label}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 to below 1, got {self.dropout}")

    @classmethod
    def paper(cls) -> TransformerPredictorConfig:
        """10 M parameters."""
        return cls()

    @classmethod
    def laptop(cls) -> TransformerPredictorConfig:
        """0.5 M parameters."""
        return cls(width=96, heads=4, feedforward=192)


class TransformerPredictor(ChannelPredictor):
    """Encoder and decoder; the decoder's tokens are the last known slots and one of zeros for each slot to predict.

    All slots come at once, so that no error is fed back, and no mask hides one from another.

    Args:
        config: sizes.
    """

    positions: Tensor

    def __init__(self, config: TransformerPredictorConfig):
        super().__init__()
        self.config = config
        features = 2 * config.subcarriers
        layer = (config.width, config.heads, config.feedforward, config.dropout)
        self.embed = nn.Linear(features, config.width)
        self.embed_decoder = nn.Linear(features, config.width)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*layer, batch_first=True), config.encoder_layers, nn.LayerNorm(config.width)
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*layer, batch_first=True), config.decoder_layers, nn.LayerNorm(config.width)
        )
        self.project = nn.Linear(config.width, features)
        self.register_buffer("positions", sinusoids(config.history + config.future, config.width), persistent=False)

    def _predict(self, tokens: Tensor) -> Tensor:
        config = self.config
        memory = self.encoder(self.embed(tokens) + self.positions[: config.history])
        unknown = tokens.new_zeros(len(tokens), config.future, tokens.shape[2])
        known = torch.cat([tokens[:, config.history - config.label :], unknown], dim=1)
        decoded = self.decoder(self.embed_decoder(known) + self.positions[config.history - config.label :], memory)
        return self.project(decoded[:, config.label :])
