"""The two sizes at which the multi-task network and its rivals are trained: ``paper`` (section V-A) and ``laptop``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from csimodels.models.language_backbone import GPT2, LanguageConfig
from csimodels.models.multitask import TASKS, MultiTaskConfig
from csimodels.models.multitask_baselines import TASK_OF, baseline_config
from csimodels.training.lasco_presets import check_preset
from csimodels.training.loop import TrainConfig
from csimodels.training.multitask import MultiTaskTraining
from csimodels.training.multitask_data import Drawing, TaskSamples
from csimodels.training.multitask_file import Adaptation

_PRESET = object()


@dataclasses.dataclass(frozen=True)
class MultiTaskPreset:
    """Sizes of one preset.

    Attributes:
        config: of the multi-task network.
        backbones: of Table II, by label; the first is ``config``'s.
        samples, drawing: of training and test.
        train: how the multi-task network is optimised. baseline_train: its rivals.
        supervised_share: of the epochs, those in which precoding follows WMMSE.
        adaptation: of the backbone. rank: of its low-rank matrices.
        cost_batch: samples of the steps that are timed.
        pretrained: label -> pre-trained backbones for Table I, where that of ``config`` is random; with identifiers
            alone for prompts, which a bidirectional model has to go through for every sample.
    """

    name: str
    config: MultiTaskConfig
    backbones: dict[str, LanguageConfig | None] = dataclasses.field(hash=False)
    samples: TaskSamples
    train: TrainConfig
    baseline_train: TrainConfig
    supervised_share: float
    adaptation: Adaptation | None
    cost_batch: int
    rank: int = 16
    pretrained: dict[str, LanguageConfig] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def drawing(self) -> Drawing:
        """Of noise, symbols and users, as the configuration has them."""
        config = self.config
        return Drawing(config.history, config.slots, config.min_users, config.max_users, config.order)

    def random_backbone(self) -> LanguageConfig | None:
        """The backbone's architecture without its weights."""
        backbone = self.config.backbone
        return None if backbone is None else dataclasses.replace(backbone, source=None)

    def multitask(
        self,
        tasks: tuple[str, ...] = TASKS,
        *,
        share: float = 1.0,
        adaptation: Any = _PRESET,
        backbone: Any = _PRESET,
        prompt: str | None = None,
        seed: int = 0,
    ) -> MultiTaskTraining:
        """The multi-task network, or the same for some ``tasks``.

        Args:
            tasks: of :data:`TASKS`. share: of the training samples; the epochs are as many more, so that all see as
                many batches.
            adaptation, backbone, prompt: in place of the preset's. Without a backbone there is nothing to adapt.
            seed: of weights and batch order.
        """
        chosen = self.config.backbone if backbone is _PRESET else backbone
        width = self.config.backbone.width if chosen is None and self.config.backbone is not None else None
        prompt = prompt or self.config.prompt
        config = dataclasses.replace(self.config, tasks=tasks, backbone=chosen, width=width, prompt=prompt)
        adapted = self.adaptation if adaptation is _PRESET else adaptation
        train = self._train(self.train, share, seed)
        return MultiTaskTraining(
            "multitask",
            config,
            tasks,
            train,
            self.samples.fraction(share),
            self.drawing,
            adaptation=None if chosen is None else adapted,
            supervised_epochs=round(self.supervised_share * train.epochs) if "precode" in tasks else 0,
            seed=seed,
        )

    def baseline(self, name: str, *, share: float = 1.0, seed: int = 0) -> MultiTaskTraining:
        """A network that does one task, by its name in :data:`csimodels.models.multitask_baselines.NAMES`.

        Raises:
            ValueError: there is no such network.
        """
        config = baseline_config(name, self.name)
        train, task = self._train(self.baseline_train, share, seed), TASK_OF[name]
        supervised = round(self.supervised_share * train.epochs) if task == "precode" else 0
        return MultiTaskTraining(
            name,
            config,
            (task,),
            train,
            self.samples.fraction(share),
            self.drawing,
            supervised_epochs=supervised,
            seed=seed,
        )

    def _train(self, train: TrainConfig, share: float, seed: int) -> TrainConfig:
        return dataclasses.replace(train, epochs=round(train.epochs / share), seed=seed)


@functools.cache
def multitask_preset(name: str) -> MultiTaskPreset:
    """``"laptop"`` or ``"paper"``.

    The paper states 50,000 and 10,000 samples per task, 500 epochs, batches of 100 and rank 16; the learning rate, its
    schedule and how long precoding is supervised are decided, and so are samples for validation, which the paper does
    not mention. At ``laptop`` the backbone is random: no small pre-trained decoder can be had offline, and the
    pre-trained MiniLM (``LanguageConfig.minilm()``) takes forty times as long per step. Table I, which is about what
    quantising takes from pre-trained weights, also has two of its layers, with short prompts.

    The learning rate of ``laptop`` was chosen by precoding: with 2e-3 the Transformer blocks of its encoder, normalised
    after the residual connections, collapsed to one output for all channels; with 1e-3 and 3e-4 they did not, and
    validation sum rates agreed within 0.001 bit/s/Hz.

    Raises:
        ValueError: there is no such preset.
    """
    check_preset(name)
    if name == "paper":
        config = MultiTaskConfig.paper(source=GPT2)
        return MultiTaskPreset(
            name,
            config,
            backbones={
                "GPT-2": config.backbone,
                "GPT-2(6)": LanguageConfig.gpt2(GPT2, layers=6),
                "no backbone": None,
            },
            samples=TaskSamples("uma_nlos", train=50_000, validation=2_000, test=10_000),
            train=TrainConfig(500, 100, 5e-4, 5e-6, weight_decay=0.0, save_every=2_000, mixed_precision="auto"),
            baseline_train=TrainConfig(500, 100, 1e-3, 1e-5, weight_decay=0.0, save_every=2_000),
            supervised_share=0.2,
            adaptation=Adaptation("lora"),
            cost_batch=100,
        )
    config = MultiTaskConfig.laptop(backbone=LanguageConfig.laptop(4))
    return MultiTaskPreset(
        name,
        config,
        backbones={
            "GPT-2, 4 layers": config.backbone,
            "GPT-2, 2 layers": LanguageConfig.laptop(2),
            "no backbone": None,
        },
        samples=TaskSamples("uma_nlos", train=3_200, validation=320, test=200),
        train=TrainConfig(10, 32, 1e-3, 1e-5, weight_decay=0.0, save_every=200),
        baseline_train=TrainConfig(10, 32, 1e-3, 1e-5, weight_decay=0.0, save_every=200),
        supervised_share=0.2,
        adaptation=Adaptation("lora"),
        cost_batch=8,
        pretrained={"MiniLM": LanguageConfig.minilm(2)},
    )
