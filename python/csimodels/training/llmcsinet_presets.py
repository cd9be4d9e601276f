"""The two sizes at which LLMCsiNet and its baselines are trained: ``paper`` (section V-A) and ``laptop``."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csimodels.channels.angle_delay_sets import ANGLE_DELAY_SETS, angle_delay_preset
from csimodels.channels.channel_files import ChannelFiles, find_files
from csimodels.channels.raytracing import SPLITS
from csimodels.files import json_digest, load_tensors, save_tensors
from csimodels.models.backbone import BackboneConfig
from csimodels.models.baselines import CLASSICAL
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
        files: what the samples are of, if not of the named set.

    Raises:
        ValueError: more samples than the files have, or a speed where they know of none.
    """

    name: str
    train: int
    validation: int
    test: int
    speed_kmh: float = 0.0
    mixed: bool = False
    files: ChannelFiles | None = None

    def __post_init__(self) -> None:
        if self.files is None:
            return
        for split, available in zip(SPLITS, self.files.available, strict=True):
            if getattr(self, split) > available:
                raise ValueError(
                    f"{split}: expected at most {available} samples of {self.name}, got {getattr(self, split)}"
                )
        if self.speed_kmh and not self.files.moves:
            raise ValueError(f"speed_kmh: {self.name} has files of still channels, got {self.speed_kmh:g} km/h")

    def described(self) -> dict[str, Any]:
        """What determines the samples, JSON-serialisable: of files their content, not where they are; of a named set
        what its name stands for."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "files"}
        if self.files is not None:
            return {**fields, "files": self.files.described()}
        return {**fields, "definition": json_digest(angle_delay_preset(self.name).definition())[:16]}

    def key(self) -> str:
        """Identifies the samples."""
        return json_digest(self.described())[:16]

    def draw(self) -> dict[str, torch.Tensor]:
        """All splits, float32 ``[samples, 2, delays, antennas]`` of energy ``delays * antennas``."""
        splits = {split: self._sample(split, self.speed_kmh) for split in SPLITS}
        if self.mixed:
            for split in ("train", "validation"):
                splits[split][::2] = self._sample(split, 0.0)[::2]
        return splits

    def _sample(self, split: str, speed_kmh: float) -> torch.Tensor:
        count = getattr(self, split)
        if self.files is not None:
            return self.files.sample(split, count, speed_kmh=speed_kmh)
        return angle_delay_preset(self.name, speed_kmh=speed_kmh).sample(split, count)

    def kept_energy(self, count: int) -> torch.Tensor | None:
        """Share of the energy of ``count`` test samples (or all, if fewer) in the delay rows; None if not known."""
        if self.files is not None:
            return self.files.kept_energy("test", min(count, self.files.available[-1]))
        return angle_delay_preset(self.name).kept_energy("test", count)

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """:meth:`draw`, kept in ``folder`` for the next time."""
        path = folder / f"{self.name}-{self.key()}.safetensors"
        if not path.exists():
            save_tensors(path, self.draw(), self.described())
        return load_tensors(path)[0]

    def training_data(self, folder: Path) -> FeedbackData:
        """What a network is trained on."""
        splits = self.load(folder)
        return FeedbackData(splits["train"], splits["validation"], self.described())


@dataclasses.dataclass(frozen=True)
class FeedbackPreset:
    """Sizes of one preset.

    Attributes:
        samples: for training, validation and test.
        epochs: at most, of each stage of LLMCsiNet; a baseline, which has one stage, gets both stages' together.
        dense_epochs: at most, of the baselines with dense layers.
        batch_size, patience: of every stage.
        learning_rate: of LLMCsiNet and of IdasNet, which has its encoder. dense_learning_rate: of the baselines with
            dense layers.
        transfer: sample counts of few-shot transfer (Fig. 11). transfer_epochs: at most.
        compressions: values of 1/sigma. variants: of LLMCsiNet. channels: names of the sets.
        wide: whether the backbone has GPT-2 Large's sizes.
        identity_start: of LLMCsiNet and IdasNet (:class:`csimodels.training.llmcsinet.FeedbackTraining`).
        residual: of LLMCsiNet (:class:`csimodels.models.llmcsinet.LlmCsiNetConfig`).
        files: the sets among ``channels`` that are of files.
    """

    name: str
    samples: tuple[int, int, int]
    epochs: int
    dense_epochs: int
    batch_size: int
    learning_rate: float
    dense_learning_rate: float
    patience: int
    transfer: tuple[int, ...]
    transfer_epochs: int
    compressions: tuple[int, ...]
    variants: tuple[str, ...]
    channels: tuple[str, ...]
    wide: bool
    identity_start: bool = False
    residual: bool = False
    files: tuple[ChannelFiles, ...] = ()

    def with_channels(self, sets: Sequence[str]) -> FeedbackPreset:
        """These sets in place of the preset's.

        Args:
            sets: names of :data:`csimodels.channels.angle_delay_sets.ANGLE_DELAY_SETS`, or ``NAME=PATH`` for what
                :func:`csimodels.channels.channel_files.find_files` makes of a file or folder. Sample counts beyond
                those of the files are lowered.

        Raises:
            ValueError: a name that is unknown, taken or given twice; an extra that is not installed; files that cannot
                be used, or with fewer training samples than a batch has.
            FileNotFoundError: files are missing.
        """
        names, files = [], []
        for text in sets:
            name, separator, path = text.partition("=")
            if separator:
                files.append(self._files(name, path))
            elif reason := angle_delay_preset(name).unavailable():
                raise ValueError(f"channels: {name}: {reason}")
            names.append(name)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"channels: expected names that differ, got {', '.join(names) or 'none'}")
        fewest = min((file.available[0] for file in files), default=max(self.transfer))
        transfer = tuple(dict.fromkeys(min(count, fewest) for count in self.transfer))
        return dataclasses.replace(self, channels=tuple(names), files=tuple(files), transfer=transfer)

    def _files(self, name: str, path: str) -> ChannelFiles:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in ANGLE_DELAY_SETS:
            raise ValueError(
                "channels: expected NAME=PATH with a name of letters, digits, - and _ that is not "
                f"{', '.join(ANGLE_DELAY_SETS)}, got {name!r}"
            )
        found = find_files(name, Path(path))
        if found.available[0] < self.batch_size:
            raise ValueError(
                f"{path}: expected at least {self.batch_size} training samples, a batch, got {found.available[0]}"
            )
        return found

    def channel_set(self, name: str, **changes: Any) -> Channels:
        """The named set at this preset's numbers of samples, or as many as its files have."""
        files = next((files for files in self.files if files.name == name), None)
        available = self.samples if files is None else files.available
        train, validation, test = (min(pair) for pair in zip(self.samples, available, strict=True))
        return dataclasses.replace(Channels(name, train, validation, test, files=files), **changes)

    def _frozen(self, channels: str) -> bool:
        """Whether f_EN and f_PD keep their weights in stage 2."""
        return next((files.frozen for files in self.files if files.name == channels), FROZEN.get(channels, False))

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
            "residual": self.residual,
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
            stages.append(Stage(self._train(self.epochs, self.learning_rate), "preliminary"))
        if config.prediction:
            frozen = config.preliminary and self._frozen(channels)
            stages.append(Stage(self._train(self.epochs, self.learning_rate), "whole", frozen))
        lengths = tuple(codeword_values(ratio) for ratio in self.compressions) if mixed_ratios else ()
        return FeedbackTraining(LLMCSINET, tuple(stages), config, lengths=lengths, identity_start=self.identity_start)

    def baseline(self, name: str, compression: int) -> FeedbackTraining:
        """A baseline at 1/sigma."""
        if name in CLASSICAL:
            return FeedbackTraining(name, (), compression=compression)
        if name == "idasnet":
            stage = Stage(self._train(2 * self.epochs, self.learning_rate))
            return FeedbackTraining(name, (stage,), compression=compression, identity_start=self.identity_start)
        stage = Stage(self._train(self.dense_epochs, self.dense_learning_rate))
        return FeedbackTraining(name, (stage,), compression=compression)

    def fine_tuning(self, start: FeedbackTraining, checkpoint: str, samples: int) -> FeedbackTraining:
        """Few-shot transfer: all weights of ``start``'s network go on from ``checkpoint``.

        Decided (the paper gives none of it): a tenth of the learning rate, constant, and the weights before any
        training are a candidate, so that a handful of samples cannot do harm.
        """
        train = dataclasses.replace(
            self._train(self.transfer_epochs, start.stages[-1].train.learning_rate / 10),
            schedule="constant",
            batch_size=min(self.batch_size, samples),
            initial_candidate=True,
        )
        return dataclasses.replace(start, stages=(Stage(train),), initial=checkpoint)

    def _train(self, epochs: int, rate: float) -> TrainConfig:
        # Decided: the paper gives neither batch size, nor the length of the warm-up, nor the final rate of eq. 16.
        return TrainConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=rate,
            final_learning_rate=rate / 40,
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
            dense_epochs=600,
            batch_size=200,
            learning_rate=2e-3,
            dense_learning_rate=2e-3,
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
        # Small batches and a high rate: what is learned in these minutes depends on the number and length of steps.
        samples=(3000, 300, 1000),
        epochs=3,
        dense_epochs=10,
        batch_size=8,
        learning_rate=5e-3,
        dense_learning_rate=2e-3,
        patience=20,
        transfer=(100, 300, 1000),
        transfer_epochs=6,
        compressions=(8, 32),
        variants=("S", "M"),
        channels=("outdoor_nlos", "indoor_los"),
        wide=False,
        identity_start=True,
        residual=True,
    )
