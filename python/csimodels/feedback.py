"""LLMCsiNet on files: channels to feedback reports at the UE, reports to channels at the BS."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch

from csimodels.channels.angle_delay import SHIFT
from csimodels.channels.csi_file import CsiFile, reconstructed_channels, write_reconstruction
from csimodels.evaluation.metrics import nmse, sgcs
from csimodels.models.llmcsinet import LlmCsiNet
from csimodels.models.payload import PayloadFormat, pack, unpack
from csimodels.report_file import VALUES, ReportFile, read_reports, write_reports
from csimodels.training.feedback_file import load_feedback

_BLOCK = 256


def load_llmcsinet(path: str | os.PathLike) -> LlmCsiNet:
    """A trained LLMCsiNet, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_feedback`, or the file holds a baseline.
    """
    network, metadata = load_feedback(path)
    if not isinstance(network, LlmCsiNet):
        raise ValueError(f"{path}: expected an LLMCsiNet, whose codeword a report holds, got {metadata['model']}")
    return network


def payload_format(network: LlmCsiNet, values: str) -> PayloadFormat:
    """How ``network``'s reports hold their values: ``"float32"``, or ``"codes"`` of the quantiser that it carries.

    Raises:
        ValueError: other ``values``, or a network without a fitted quantiser for codes.
    """
    if values not in VALUES:
        raise ValueError(f"values: expected {' or '.join(VALUES)}, got {values!r}")
    if values == "codes" and (network.quantizer is None or not network.quantizer.fitted):
        raise ValueError("values: expected float32, since the model carries no fitted quantiser, got 'codes'")
    return PayloadFormat.of(network.config, network.quantizer if values == "codes" else None)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """``samples`` written, ``elements`` of each fed back (M), ``report_bytes`` of each."""

    samples: int
    elements: int
    report_bytes: int


def encode_file(
    network: LlmCsiNet,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    elements: int | None = None,
    values: str = "float32",
    shift: int = SHIFT,
) -> Encoded:
    """Compress a file of channels into a file of reports (:mod:`csimodels.report_file`).

    Args:
        network: the model; only its encoder is used.
        source: channels: an HDF5 file of this project, or a COST 2100 ``.mat`` file.
        out: file of reports.
        elements: M; None takes the model's.
        values: see :func:`payload_format`.
        shift: rows before delay 0, for HDF5 files.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, does not fit the model or holds samples that are not
            finite; ``elements`` out of range.
        OSError: ``out`` could not be written; an old file stays.
    """
    config, form = network.config, payload_format(network, values)
    m = config.codeword_values if elements is None else elements
    file = CsiFile(source, delays=config.delays, antennas=config.antennas, shift=shift)

    def reports() -> Iterator[bytes]:
        with torch.inference_mode():
            for image in file.images():
                yield from pack(network.encode(image, m), form)

    size = write_reports(out, reports(), len(file), values, file.layout)
    return Encoded(len(file), m, size)


def decode_file(
    network: LlmCsiNet, source: str | os.PathLike, out: str | os.PathLike, *, truth: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Reconstruct the channels of a file of reports.

    Args:
        network: the model that encoded; only its decoder is used.
        source: file of reports.
        out: the channels, in a file of the kind that they came from and in its unit.
        truth: the file that was encoded, to compare with before any truncation.

    Returns:
        ``samples``, and with a truth ``nmse_db`` (mean of ratios), ``sgcs`` (whole matrices) and ``left_out``, the
        number of samples of no energy, to which no ratio exists.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, reports of another model, or a truth of another size.
        OSError: ``out`` could not be written; an old file stays.
    """
    received = read_reports(source)
    reference = None if truth is None else _open_truth(network, received, truth)
    form = payload_format(network, received.values)
    total = len(received.reports)
    if reference is None:
        environment, los = torch.zeros(total, dtype=torch.int64).numpy(), torch.zeros(total, dtype=torch.bool).numpy()
    else:
        environment, los = reference.environments()
    scores: list[tuple[torch.Tensor, torch.Tensor]] = []

    def blocks() -> Iterator[torch.Tensor]:
        true = None if reference is None else reference.channels()
        for begin in range(0, total, _BLOCK):
            with torch.inference_mode():
                image = network.decode(_unpacked(received, begin, form))
            estimate = reconstructed_channels(image, received.layout)
            if true is not None:
                scores.append(_scores(next(true), estimate))
            yield estimate

    parameters = {"reports": str(source), "elements": network.config.codeword_values}
    write_reconstruction(out, received.layout, blocks(), environment=environment, los=los, parameters=parameters)
    result: dict[str, Any] = {"samples": total}
    if scores:
        ratios, cosines = (torch.cat(parts) for parts in zip(*scores, strict=True))
        result["left_out"] = total - len(ratios)
        if len(ratios):
            result |= {"nmse_db": 10 * ratios.mean().log10().item(), "sgcs": cosines.mean().item()}
    return result


def _open_truth(network: LlmCsiNet, received: ReportFile, truth: str | os.PathLike) -> CsiFile:
    config, layout = network.config, received.layout
    file = CsiFile(truth, delays=config.delays, antennas=config.antennas, shift=layout.shift)
    if file.layout != layout or len(file) != len(received.reports):
        raise ValueError(
            f"{truth}: expected the {len(received.reports)} samples of {layout} that were encoded, got {len(file)} of "
            f"{file.layout}"
        )
    return file


def _unpacked(received: ReportFile, begin: int, form: PayloadFormat) -> Any:
    try:
        return unpack(received.reports[begin : begin + _BLOCK], form)
    except ValueError as error:
        raise ValueError(f"reports from {begin} on: {error}") from None


def _scores(true: torch.Tensor, estimate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    powered = true.abs().amax((1, 2)) > 0
    true, estimate = true[powered], estimate[powered].to(true.dtype)
    if not len(true):
        return true.new_zeros(0, dtype=torch.float64), true.new_zeros(0, dtype=torch.float64)
    return nmse(true, estimate), sgcs(true, estimate, reduction="none")
