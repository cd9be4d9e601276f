"""The multi-task network and its rivals at a size of seconds: 8 antennas, 5 subcarriers, 2 to 3 users, one layer."""

from __future__ import annotations

import dataclasses

from csimodels.channels import multitask_data
from csimodels.channels.rays import SubcarrierGrid
from csimodels.models.detnet import DetNetConfig
from csimodels.models.dnn_detector import DnnDetectorConfig
from csimodels.models.language_backbone import LanguageConfig
from csimodels.models.multitask import MultiTaskConfig
from csimodels.training.loop import TrainConfig
from csimodels.training.multitask import MultiTaskTraining
from csimodels.training.multitask_data import Drawing, TaskSamples
from csimodels.training.multitask_file import Adaptation
from csimodels.training.multitask_presets import MultiTaskPreset

ANTENNAS, SUBCARRIERS = 8, 5
BACKBONE = LanguageConfig("gpt2", None, 1, 16, 2, 24, vocabulary=200, positions=90)
CONFIG = MultiTaskConfig(
    antennas=ANTENNAS,
    subcarriers=SUBCARRIERS,
    history=4,
    future=2,
    patch=2,
    slots=2,
    min_users=2,
    max_users=3,
    backbone=BACKBONE,
    blocks=1,
    heads=2,
    feedforward=16,
    received_hidden=12,
    received_width=10,
    attention_blocks=1,
    attention_channels=4,
    attention_reduction=2,
    decoder_hidden=14,
    prediction_hidden=18,
)
DRAWING = Drawing(history=4, slots=2, min_users=2, max_users=3)
SAMPLES = TaskSamples("tiny", train=80, validation=8, test=8, antennas=2, users=3)
TRAIN = TrainConfig(epochs=2, batch_size=8, learning_rate=3e-3, weight_decay=0.0, save_every=2)
PRESET = MultiTaskPreset(
    "tiny",
    CONFIG,
    backbones={"one layer": BACKBONE, "no backbone": None},
    samples=SAMPLES,
    train=TRAIN,
    baseline_train=TRAIN,
    supervised_share=0.5,
    adaptation=Adaptation("lora", rank=2),
    cost_batch=2,
    rank=2,
    pretrained={"another": dataclasses.replace(BACKBONE, layers=2)},
)


def add_sets(monkeypatch) -> None:
    """Sets of small arrays under the names ``tiny`` and ``other``."""
    small = {"rows": 2, "columns": 4, "grid": SubcarrierGrid(SUBCARRIERS, 0.9e6), "history": 4, "future": 2}
    for name, like in (("tiny", "uma_nlos"), ("other", "umi_nlos")):
        one = dataclasses.replace(multitask_data.MULTITASK_SETS[like], name=name, **small)
        monkeypatch.setitem(multitask_data.MULTITASK_SETS, name, one)


def training(**changes) -> MultiTaskTraining:
    """All tasks at full precision, one supervised epoch and one without, unless told otherwise."""
    fields = {
        "model": "multitask",
        "config": CONFIG,
        "tasks": CONFIG.tasks,
        "train": TRAIN,
        "samples": SAMPLES,
        "drawing": DRAWING,
        "supervised_epochs": 1,
    }
    return MultiTaskTraining(**{**fields, **changes})


def detector(kind: str) -> MultiTaskTraining:
    """A training of ``"dnn"`` or ``"detnet"``."""
    config = {
        "dnn": DnnDetectorConfig(ANTENNAS, 2, 3, hidden=(16,)),
        "detnet": DetNetConfig(ANTENNAS, 2, 3, layers=3, hidden=8, memory=4, weights="shared"),
    }[kind]
    return training(model=kind, config=config, tasks=("detect",), supervised_epochs=0)


def single(task: str) -> MultiTaskTraining:
    """The multi-task network for one task."""
    config = dataclasses.replace(CONFIG, tasks=(task,))
    return training(config=config, tasks=(task,), supervised_epochs=int(task == "precode"))
