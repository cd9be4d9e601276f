"""Runs for the LLMCsiNet experiments: one task per trained network, scored under several conditions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from csimodels.channels.angle_delay import noisy, to_frequency
from csimodels.evaluation.metrics import nmse_db, sgcs, user_rates
from csimodels.evaluation.precoding import zf
from csimodels.evaluation.task_rows import Row
from csimodels.files import json_digest
from csimodels.models.channel_transformer import device_of
from csimodels.models.llmcsinet import Codeword, LlmCsiNet
from csimodels.models.payload import PayloadFormat, quantized, relative_values
from csimodels.models.quantizer import LloydMax
from csimodels.training.llmcsinet import LOG, WEIGHTS, FeedbackTraining, train_feedback
from csimodels.training.llmcsinet_presets import VALUE_BITS, Channels
from csimodels.training.loop import make_accelerator

USERS = 4
_BATCH = 256
# What only some conditions have.
_UNSET = {"report_bytes": None, "snr_db": None, "test_speed_kmh": None, "rate": None}


@dataclasses.dataclass(frozen=True)
class FeedbackTask:
    """A network, trained unless its checkpoint is there, and what it is scored at.

    Attributes:
        label: of the method. training: of the network. channels: that it is trained and tested on.
        compression: 1/sigma, copied into the rows.
        folder: of checkpoints and channels.
        lengths: M to score at, with their compressions; empty: the trained one.
        codes: whether to score with Lloyd-Max codes of the values too (Table VI).
        snrs_db: of noisy CSI at the encoder (Fig. 7). rate_snrs_db: of the downlink (Fig. 12).
        tests: further sets whose test samples to score on (Fig. 9).
        start: label of what a transfer started from, copied into the rows.
    """

    label: str
    training: FeedbackTraining
    channels: Channels
    compression: int
    folder: str
    lengths: tuple[tuple[int, int], ...] = ()
    codes: bool = False
    snrs_db: tuple[float, ...] = ()
    rate_snrs_db: tuple[float, ...] = ()
    tests: tuple[Channels, ...] = ()
    start: str = ""

    def run_dir(self) -> Path:
        """Folder of the checkpoint; the same for every task that trains the same network on the same channels."""
        name = f"{self.training.model}-{self.channels.name}-{self.compression}"
        key = json_digest([self.training.described(), self.channels.described()])[:12]
        return Path(self.folder) / "llmcsinet" / f"{name}-{key}"

    def checkpoint(self) -> Path:
        """The trained network's file."""
        return self.run_dir() / WEIGHTS

    def key(self) -> str:
        """Identifies the outcome: everything that determines it but the folder."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["folder"]
        sets = {"channels": self.channels.described(), "tests": [channels.described() for channels in self.tests]}
        return json_digest({**fields, **sets, "training": self.training.described()})[:16]


def run_task(task: FeedbackTask) -> list[Row]:
    """Train and score; one row per condition."""
    data_folder = Path(task.folder) / "channels"
    run_dir = task.run_dir()
    network, _ = train_feedback(
        task.training,
        task.channels.training_data(data_folder),
        run_dir,
        accelerator=make_accelerator(task.training.last_train(), cpu=not torch.cuda.is_available()),
    )
    stages = json.loads((run_dir / LOG).read_text())["stages"]
    splits = task.channels.load(data_folder)
    common = {
        "label": task.label,
        "model": task.training.model,
        "channels": task.channels.name,
        "train_samples": task.channels.train,
        "start": task.start,
        "epochs": [stage["epochs"] for stage in stages],
        "seconds": sum(stage["seconds"] for stage in stages),
        "ue_parameters": cast(Any, network).ue_parameters(),
        "bs_parameters": cast(Any, network).bs_parameters(),
    }
    test, rows = splits["test"], []

    def add(condition: str, compression: int, h: torch.Tensor, estimate: torch.Tensor, **more: Any) -> None:
        rows.append(
            {**common, **_UNSET, "condition": condition, "compression": compression, **score(h, estimate), **more}
        )

    for compression, m in task.lengths or ((task.compression, None),):
        size = {"report_bytes": report_bytes(network, m)}
        add("clean", compression, test, reconstruct(network, test, m=m), **size)
    if task.codes:
        quantizer = fit_quantizer(network, splits["train"])
        size = {"report_bytes": report_bytes(network, None, quantizer)}
        add("codes", task.compression, test, reconstruct(network, test, quantizer=quantizer), **size)
    for snr in task.snrs_db:
        heard = noisy(test, snr, torch.Generator().manual_seed(0))
        add("noisy", task.compression, test, reconstruct(network, heard), snr_db=snr)
    for other in task.tests:
        h = other.load(data_folder)["test"]
        add("other", task.compression, h, reconstruct(network, h), test_speed_kmh=other.speed_kmh)
    if task.rate_snrs_db:
        estimate = reconstruct(network, test)
        for snr in task.rate_snrs_db:
            add("rate", task.compression, test, estimate, snr_db=snr, rate=zf_rate(test, estimate, snr))
    return rows


def score(h: torch.Tensor, estimate: torch.Tensor) -> dict[str, float]:
    """NMSE in dB (eq. 14) and SGCS (eq. 15) of float ``[samples, 2, delays, antennas]``."""
    complex_h, complex_estimate = (torch.complex(*x.unbind(1)) for x in (h, estimate))
    return {"nmse_db": nmse_db(h, estimate).item(), "sgcs": sgcs(complex_h, complex_estimate).item()}


@torch.inference_mode()
def reconstruct(
    network: nn.Module, h: torch.Tensor, *, m: int | None = None, quantizer: LloydMax | None = None
) -> torch.Tensor:
    """``network``'s reconstruction of float ``[samples, 2, delays, antennas]``, on the CPU.

    ``m`` elements are fed back where the network can choose, and their values quantised where there is a quantiser.
    """
    model: Any = network
    device = device_of(network)
    parts = []
    for part in h.split(_BATCH):
        codeword = model.encode(part.to(device)) if m is None else model.encode(part.to(device), m)
        if quantizer is not None:
            codeword = _quantized(codeword, quantizer)
        parts.append(model.decode(codeword).float().cpu())
    return torch.cat(parts)


def _as_codeword(codeword: Codeword | torch.Tensor) -> Codeword:
    """A baseline's values, as if they had positions and a mean, so that both kinds are quantised by the same code."""
    if isinstance(codeword, Codeword):
        return codeword
    return Codeword(codeword, torch.zeros_like(codeword, dtype=torch.int64), codeword.new_zeros(len(codeword)))


def _quantized(codeword: Codeword | torch.Tensor, quantizer: LloydMax) -> Codeword | torch.Tensor:
    heard = quantized(_as_codeword(codeword), quantizer)
    return heard if isinstance(codeword, Codeword) else heard.values


@torch.inference_mode()
def fit_quantizer(network: nn.Module, h: torch.Tensor, bits: int = VALUE_BITS) -> LloydMax:
    """A Lloyd-Max quantiser of the values that ``network`` feeds back for ``h``, relative to their root mean square."""
    model: Any = network
    values = [relative_values(_as_codeword(model.encode(part)))[0] for part in h.split(_BATCH)]
    quantizer = LloydMax(2**bits)
    quantizer.fit(torch.cat(values))
    return quantizer


def report_bytes(network: nn.Module, m: int | None = None, quantizer: LloydMax | None = None) -> int:
    """Bytes of one report: as :mod:`csimodels.models.payload` has them, or the bare values of an autoencoder.

    (With codes, an autoencoder sends 4 bytes of scale besides.)
    """
    if isinstance(network, LlmCsiNet):
        config = network.config
        return PayloadFormat.of(config, quantizer).report_bytes(config.codeword_values if m is None else m)
    length: int = cast(Any, network).codeword_length
    return 4 * length if quantizer is None else (length * quantizer.bits + 7) // 8 + 4


def zf_rate(h: torch.Tensor, estimate: torch.Tensor, snr_db: float) -> float:
    """Average rate per user in bit/s/Hz of zero forcing on ``estimate`` for groups of four users (section V-I).

    Users of one group are samples of different environments (the test samples in a seeded order). Every 1/delays-th of
    the band is looked at, where the rows kept give the response exactly. Power is split evenly; the SNR is transmit
    power over noise at a channel of unit mean gain.

    Args:
        h, estimate: float ``[samples, 2, delays, antennas]`` of energy ``delays * antennas``.
        snr_db: of the downlink.
    """
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    order = order[: len(h) // USERS * USERS]
    channels = []
    for image in (h, estimate):
        frequency = to_frequency(image[order], image.shape[2], 0).unflatten(0, (-1, USERS))
        channels.append(frequency.permute(0, 3, 2, 1).to(torch.complex128))  # [group, subcarrier, antenna, user]
    precoder = zf(channels[1])
    return user_rates(channels[0], precoder, 10 ** (-snr_db / 10)).mean().item()
