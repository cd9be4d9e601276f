"""The two sizes at which LLMCsiNet and its baselines are trained: ``paper`` (section V-A) and ``laptop``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from csimodels.channels.angle_delay_sets import angle_delay_preset
from csimodels.channels.raytracing import SPLITS
from csimodels.files import load_tensors, save_tensors
from csimodels.models.backbone import BackboneConfig
from csimodels.models.llmcsinet import PAPER_CODEWORD_VALUES, VARIANTS, LlmCsiNetConfig
from csimodels.training.lasco_presets import check_preset
from csimodels.training.llmcsinet import FeedbackData, FeedbackTraining, Stage
from csimodels.training.loop import TrainConfig

LLMCSINET = "llmcsinet"
GPT2_LARGE = "openai-community/gpt2-large"
VALUE_BITS = 6  # of the Lloyd-Max codes; decided, the paper gives none
# Section V-B: f_EN and f_PD keep their stage-1 weights indoors and in traced scenes.
FROZEN = {"indoor_los": True, "outdoor_nlos": False, "uma_28ghz": False, "raytraced": True}


@dataclasses.dataclass(frozen=True)
class Channels:
    """A set of angle-delay channels (:mod:`csimodels.channels.angle_delay_sets`), and how many of each.

    Attributes:
        name: of the set. train, validation, test: samples.
        speed_kmh: of the UEs in every split.
        mixed: training and validation samples alternate between UEs that stand and that move (section V-F); the test
            samples all move at ``speed_kmh``.
    """

    name: str
    train: int
    validation: int
    test: int
    speed_kmh: float = 0.0
    mixed: bool = False

    def key(self) -> str:
        """Identifies the samples."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def draw(self) -> dict[str, torch.Tensor]:
        """All splits, float32 ``[samples, 2, delays, antennas]`` of energy ``delays * antennas``."""
        moving = angle_delay_preset(self.name, speed_kmh=self.speed_kmh)
        splits = {split: moving.sample(split, getattr(self, split)) for split in SPLITS}
        if self.mixed:
            still = angle_delay_preset(self.name)
            for split in ("train", "validation"):
                splits[split][::2] = still.sample(split, getattr(self, split))[::2]
        return splits

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """:meth:`draw`, kept in ``folder`` for the next time."""
        path = folder / f"{self.name}-{self.key()}.safetensors"
        if not path.exists():
            save_tensors(path, self.draw(), dataclasses.asdict(self))
        return load_tensors(path)[0]

    def training_data(self, folder: Path) -> FeedbackData:
        """What a network is trained on."""
        splits = self.load(folder)
        return FeedbackData(splits["train"], splits["validation"], dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class FeedbackPreset:
    """Sizes of one preset.

    Attributes:
        samples: for training, validation and test.
        epochs: at most, of each stage of LLMCsiNet; a baseline, which has one stage, gets both stages' together.
        batch_size, learning_rate, patience: of every stage.
        transfer: sample counts of few-shot transfer (Fig. 11). transfer_epochs: at most.
        compressions: values of 1/sigma. variants: of LLMCsiNet. channels: names of the sets.
        wide: whether the backbone has GPT-2 Large's sizes.
    """

    name: str
    samples: tuple[int, int, int]
    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    transfer: tuple[int, ...]
    transfer_epochs: int
    compressions: tuple[int, ...]
    variants: tuple[str, ...]
    channels: tuple[str, ...]
    wide: bool

    def channel_set(self, name: str, **changes: Any) -> Channels:
        """The named set at this preset's numbers of samples."""
        return dataclasses.replace(Channels(name, *self.samples), **changes)

    def config(self, variant: str, compression: int, **changes: Any) -> LlmCsiNetConfig:
        """LLMCsiNet-S, -M or -L at 1/sigma."""
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        layers = VARIANTS[variant]
        backbone = BackboneConfig.gpt2_large(layers, GPT2_LARGE) if self.wide else BackboneConfig.laptop(layers)
        fields: dict[str, Any] = {
            "codeword_values": codeword_values(compression),
            "backbone": backbone,
            "quantizer_levels": 2**VALUE_BITS,
        }
        return LlmCsiNetConfig(**{**fields, **changes})

    def llmcsinet(
        self, variant: str, compression: int, channels: str, *, mixed_ratios: bool = False, **changes: Any
    ) -> FeedbackTraining:
        """Algorithm 1 for one network; ``changes`` go to its configuration.

        Without f_PD there is no stage 1, without f_TP no stage 2. ``mixed_ratios`` trains one network for all of the
        preset's compressions (LLMCsiNet-MC).
        """
        config = self.config(variant, compression, **changes)
        stages = []
        if config.preliminary:
            stages.append(Stage(self._train(self.epochs), "preliminary"))
        if config.prediction:
            frozen = config.preliminary and FROZEN.get(channels, False)
            stages.append(Stage(self._train(self.epochs), "whole", frozen))
        lengths = tuple(codeword_values(ratio) for ratio in self.compressions) if mixed_ratios else ()
        return FeedbackTraining(LLMCSINET, tuple(stages), config, lengths=lengths)

    def baseline(self, name: str, compression: int) -> FeedbackTraining:
        """A baseline at 1/sigma."""
        return FeedbackTraining(name, (Stage(self._train(2 * self.epochs)),), compression=compression)

    def fine_tuning(self, start: FeedbackTraining, checkpoint: str, samples: int) -> FeedbackTraining:
        """Few-shot transfer: all weights of ``start``'s network go on from ``checkpoint``.

        Decided (the paper gives none of it): a tenth of the learning rate, constant, and the weights before any
        training are a candidate, so that a handful of samples cannot do harm.
        """
        train = dataclasses.replace(
            self._train(self.transfer_epochs),
            learning_rate=self.learning_rate / 10,
            schedule="constant",
            batch_size=min(self.batch_size, samples),
            initial_candidate=True,
        )
        return dataclasses.replace(start, stages=(Stage(train),), initial=checkpoint)

    def _train(self, epochs: int) -> TrainConfig:
        # Decided: the paper gives neither batch size, nor the length of the warm-up, nor the final rate of eq. 16.
        return TrainConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 40,
            weight_decay=0.0,
            patience=self.patience,
            mixed_precision="auto" if self.wide else "no",
            save_every=200,
        )


def codeword_values(compression: int) -> int:
    """M of Table II at 1/sigma = ``compression``."""
    if compression not in PAPER_CODEWORD_VALUES:
        raise ValueError(
            f"compression: expected one of {', '.join(map(str, PAPER_CODEWORD_VALUES))}, got {compression}"
        )
    return PAPER_CODEWORD_VALUES[compression]


@functools.cache
def feedback_preset(name: str) -> FeedbackPreset:
    """``"laptop"`` or ``"paper"``.

    Raises:
        ValueError: there is no such preset.
    """
    check_preset(name)
    if name == "paper":
        return FeedbackPreset(
            name,
            samples=(20_000, 10_000, 10_000),
            epochs=300,
            batch_size=200,
            learning_rate=2e-3,
            patience=20,
            transfer=(500, 1000, 2000, 3000),
            transfer_epochs=100,
            compressions=(8, 16, 32, 64),
            variants=("S", "M", "L"),
            channels=("outdoor_nlos", "indoor_los", "uma_28ghz", "raytraced"),
            wide=True,
        )
    return FeedbackPreset(
        name,
        samples=(2000, 300, 1000),
        epochs=6,
        batch_size=32,
        learning_rate=2e-3,
        patience=20,
        transfer=(100, 300, 1000),
        transfer_epochs=6,
        compressions=(8, 32),
        variants=("S", "L"),
        channels=("outdoor_nlos", "indoor_los"),
        wide=False,
    )
