"""Runs for the LVM4CF experiments: one task per codebook, scored on the test channels of one set or several."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from csimodels.channels.codebook_data import CODEBOOK_SETS, codebook_channels
from csimodels.evaluation.codebook_rate import codebook_sum_rate
from csimodels.evaluation.metrics import codeword_cosine
from csimodels.evaluation.task_rows import Row
from csimodels.files import json_digest, load_tensors, save_tensors
from csimodels.models.codebook_deployment import CodebookDeployment
from csimodels.models.codebook_file import FeedbackCodebook, load_codebook, save_codebook
from csimodels.models.codebooks import PortLayout, dft_codebook, dft_oversampling, rvq_codebook, type1_codebook
from csimodels.models.codeword_baselines import count_parameters
from csimodels.training.codebook_training import CODEBOOK, CodebookData, CodebookTraining, enhance_codebook
from csimodels.training.k_lines import k_lines, single_side_words
from csimodels.training.loop import make_accelerator
from csimodels.training.shaped_codebook import shaped_codebook

SPLITS = ("train", "validation", "test")
# Codebooks that need no network -> the deployment that they are for.
CLASSICAL = {
    "rvq": "conventional",
    "dft": "conventional",
    "type1": "conventional",
    "shaped": "dual_side",
    "k_lines": "dual_side",
    "cells": "single_side",
}
USERS = 4
RVQ_SEED = 0


@dataclasses.dataclass(frozen=True)
class ChannelSet:
    """A set of :mod:`csimodels.channels.codebook_data`, and how many samples of each split."""

    name: str
    train: int
    validation: int
    test: int

    def key(self) -> str:
        """Identifies the samples: counts, and how the set is defined now."""
        # A set that there is not has no definition, and drawing it is refused.
        defined = CODEBOOK_SETS[self.name].describe() if self.name in CODEBOOK_SETS else None
        return json_digest([self, defined])[:16]

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """All splits, complex64 ``[samples, D]``, kept in ``folder`` for the next time."""
        path = folder / f"{self.name}-{self.key()}.safetensors"
        if not path.exists():
            splits = {split: draw_channels(self.name, split, getattr(self, split)) for split in SPLITS}
            save_tensors(path, splits, dataclasses.asdict(self))
        return load_tensors(path)[0]


def draw_channels(name: str, split: str, count: int) -> torch.Tensor:
    """Complex64 ``[count, D]`` of a named set."""
    return codebook_channels(name, split, count)


@dataclasses.dataclass(frozen=True)
class CodebookTask:
    """A codebook, made unless its file is there, and what it is scored at.

    Attributes:
        label: of the method. method: a name in :data:`CLASSICAL`, or ``"network"``.
        bits: B. ports: of the array.
        channels: that the codebook is made for. test: whose test samples it is scored on.
        folder: of codebooks and channels.
        training: of a network.
        snrs_db: of the downlink, for the sum rate (Fig. 9).
    """

    label: str
    method: str
    bits: int
    ports: PortLayout
    channels: ChannelSet
    test: ChannelSet
    folder: str
    training: CodebookTraining | None = None
    snrs_db: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.method != "network" and self.method not in CLASSICAL:
            raise ValueError(f"method: expected network or one of {', '.join(CLASSICAL)}, got {self.method!r}")
        if (self.training is not None) != (self.method == "network"):
            raise ValueError(f"training: expected one for a network alone, got {self.training} for {self.method!r}")

    @property
    def deployment(self) -> str:
        """``single_side`` or ``dual_side`` of an enhanced codebook, else ``conventional``."""
        return CLASSICAL[self.method] if self.training is None else self.training.deployment

    def conventional(self) -> FeedbackCodebook:
        """The RVQ codebook that enhanced ones start from."""
        words = rvq_codebook(self.bits, len(self.ports), seed=RVQ_SEED)
        return FeedbackCodebook(words, "rvq", self.ports, source={"seed": RVQ_SEED})

    def run_dir(self) -> Path:
        """Folder of the codebook; the same for every task that makes the same one for the same channels."""
        name = f"{self.method}-{self.deployment}-{self.channels.name}-{self.bits}"
        return Path(self.folder) / "lvm4cf" / f"{name}-{json_digest(self._made_of())[:12]}"

    def key(self) -> str:
        """Identifies the outcome: everything that determines it but the folder."""
        return json_digest([self._made_of(), self.label, self.test.key(), self.snrs_db])[:16]

    def _made_of(self) -> list[Any]:
        described = None if self.training is None else self.training.described()
        return [self.method, self.bits, self.ports, self.channels.key(), described]


def run_task(task: CodebookTask) -> list[Row]:
    """Make the codebook and score it: one row, and one more per SNR."""
    folder = Path(task.folder) / "channels"
    test = task.test.load(folder)["test"]
    deployment, seconds = deploy(task, folder)
    index, _ = deployment.report_index(test)
    estimate = deployment.reconstruct(index)
    common = {
        "label": task.label,
        "method": task.method,
        "deployment": task.deployment,
        "bits": task.bits,
        "channels": task.channels.name,
        "test": task.test.name,
        "parameters": 0 if task.training is None else count_parameters(task.training.network),
        "seconds": seconds,
        "cosine": codeword_cosine(test, estimate).item(),
        **dataclasses.asdict(deployment.signalling),
    }
    rows: list[Row] = [{**common, "condition": "cosine", "snr_db": None, "rate": None}]
    if task.snrs_db:
        rates = codebook_sum_rate(test, estimate, task.snrs_db, USERS).tolist()
        rows += [
            {**common, "condition": "rate", "snr_db": snr, "rate": rate}
            for snr, rate in zip(task.snrs_db, rates, strict=True)
        ]
    return rows


def deploy(task: CodebookTask, folder: Path) -> tuple[CodebookDeployment, float | None]:
    """The task's codebooks at both ends, and the seconds that making the enhanced one took (None if unknown)."""
    conventional = task.conventional()
    if task.method == "rvq":
        return CodebookDeployment.conventional(conventional), None
    if task.method == "dft":
        words = dft_codebook(task.ports, dft_oversampling(task.bits, task.ports))
        return CodebookDeployment.conventional(FeedbackCodebook(words, "dft", task.ports)), None
    if task.method == "type1":
        words = type1_codebook(task.ports.columns, task.ports.rows)
        return CodebookDeployment.conventional(FeedbackCodebook(words, "type1", task.ports)), None
    if task.training is None:
        book = _classical(task, conventional, folder)
        seconds = book.source["seconds"]
    else:
        accelerator = make_accelerator(task.training.train, cpu=not torch.cuda.is_available())
        splits = task.channels.load(folder)
        data = CodebookData(splits["train"], splits["validation"], dataclasses.asdict(task.channels))
        enhanced = enhance_codebook(task.training, conventional, data, task.run_dir(), accelerator=accelerator)
        book, seconds = enhanced.book, sum(entry.get("seconds", 0.0) for entry in enhanced.history)
    if task.deployment == "single_side":
        return CodebookDeployment.single_side(conventional, book), seconds
    return CodebookDeployment.dual_side(book), seconds


def _classical(task: CodebookTask, conventional: FeedbackCodebook, folder: Path) -> FeedbackCodebook:
    """A codebook fitted to the training channels without a network, from its file if there is one."""
    path = task.run_dir() / CODEBOOK
    if path.exists():
        return load_codebook(path)
    h = task.channels.load(folder)["train"]
    started = time.perf_counter()
    if task.method == "k_lines":
        words = k_lines(h, task.bits, seed=0).words
    elif task.method == "shaped":
        words = shaped_codebook(conventional.words, h)
    else:
        words = single_side_words(h, conventional.words)
    single = task.deployment == "single_side"
    book = FeedbackCodebook(
        words,
        task.method,
        task.ports,
        deployment="SS" if single else "DS",
        ue_digest=conventional.digest() if single else None,
        source={"channels": dataclasses.asdict(task.channels), "seconds": time.perf_counter() - started},
    )
    save_codebook(path, book)
    return book
