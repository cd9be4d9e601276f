"""What LLMCsiNet and its baselines cost: parameters, operations and time of their two ends; and the best rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from csimodels.evaluation.llmcsinet_runs import zf_rate
from csimodels.evaluation.task_rows import Row
from csimodels.evaluation.timing import device, seconds
from csimodels.models.baselines import LABELS
from csimodels.training.llmcsinet_presets import Channels, FeedbackPreset


def networks(sizes: FeedbackPreset, baselines: Sequence[str], compression: int = 8) -> Iterator[tuple[str, nn.Module]]:
    """Label and untrained network of each method, one at a time: costs do not depend on the weights."""
    for name in baselines:
        yield LABELS[name], sizes.baseline(name, compression).build().eval()
    for variant in sizes.variants:
        backbone = dataclasses.replace(sizes.config(variant, compression).backbone, source=None)
        training = sizes.llmcsinet(variant, compression, sizes.channels[0], backbone=backbone, quantizer_levels=None)
        yield f"LLMCsiNet-{variant}", training.build().eval()


def parameters(network: Any) -> dict[str, int]:
    """``ue`` and ``bs``."""
    return {"ue": network.ue_parameters(), "bs": network.bs_parameters()}


def _sample() -> torch.Tensor:
    return torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def operations(network: Any) -> dict[str, int]:
    """Floating-point operations of the products and convolutions for one sample, ``ue`` and ``bs``."""
    counts = []
    value: Any = _sample()
    for part in (network.encode, network.decode):
        with FlopCounterMode(display=False) as counter:
            value = part(value)
        counts.append(counter.get_total_flops())
    return {"ue": counts[0], "bs": counts[1]}


@torch.inference_mode()
def latency(label: str, network: Any, repeats: int) -> Row:
    """Milliseconds of encoder (``ue``) and decoder (``bs``) for one sample: median, 20% and 80% of ``repeats``."""
    h = _sample()
    codeword = network.encode(h)
    row: Row = {"label": label, "device": device()}
    for side, call in (("ue", lambda: network.encode(h)), ("bs", lambda: network.decode(codeword))):
        times = 1e3 * seconds(call, repeats)
        for suffix, share in (("", 0.5), ("_low", 0.2), ("_high", 0.8)):
            row[f"{side}{suffix}_ms"] = times.quantile(share).item()
    return row


def spread(row: Row, side: str) -> str:
    """Median and spread of ``"ue"`` or ``"bs"``."""
    return f"{row[f'{side}_ms']:.2f} ({row[f'{side}_low_ms']:.2f} to {row[f'{side}_high_ms']:.2f})"


def perfect_rates(channels: Channels, folder: Path, snrs_db: Sequence[float]) -> list[float]:
    """:func:`zf_rate` when the BS knows the test channels."""
    h = channels.load(folder)["test"]
    return [zf_rate(h, h, snr) for snr in snrs_db]
