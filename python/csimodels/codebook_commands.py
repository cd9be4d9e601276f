"""The commands of codebook feedback: ``codebook make`` and ``show``, ``feedback encode`` and ``decode``."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from csimodels.console import Threads, console, errors, progress, reported
from csimodels.files import digest

codebook_app = typer.Typer(
    help="Make and show codebooks for codebook-based CSI feedback. Start with: csimodels codebook make",
    no_args_is_help=True,
)
feedback_app = typer.Typer(
    help="Codebook-based CSI feedback on files: channels to codeword indices, and back.", no_args_is_help=True
)
KINDS = ("rvq", "dft", "type1", "k-lines")
BookPath = Annotated[Path, typer.Option("--codebook", help="file that csimodels codebook make, or a training, wrote")]
EnvironmentIndex = Annotated[
    int | None, typer.Option(help="which codebook of a file with several environments, from 0")
]
Variable = Annotated[str, typer.Option(help="name of the channels in .mat, .npz and .safetensors files")]
Ports = Annotated[str, typer.Option(help="array as polarisations x rows x columns, such as 2x8x8")]


@codebook_app.command()
def make(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="codebook file to write, such as rvq12.safetensors")],
    kind: Annotated[
        str,
        typer.Option(help="rvq (random), dft or type1 (beams; 3GPP TS 38.214), or k-lines (fitted to --channels)"),
    ] = "rvq",
    bits: Annotated[int, typer.Option(help="B, feedback bits: 2^B codewords, 1 to 20")] = 12,
    ports: Ports = "2x8x8",
    seed: Annotated[int, typer.Option(min=0, help="of rvq's draw, or of the channels that k-lines starts from")] = 0,
    codebook_mode: Annotated[int, typer.Option(help="of type1: 1, or 2 (the beam refined with the co-phase)")] = 1,
    channels: Annotated[
        Path | None, typer.Option(help="training channels for k-lines: HDF5, .mat, .npz or .safetensors")
    ] = None,
    variable: Variable = "h",
    ue: Annotated[
        Path | None,
        typer.Option(help="for k-lines: the codebook that UEs keep; the new one is then the BS's alone (single-side)"),
    ] = None,
    iterations: Annotated[int, typer.Option(min=0, help="of k-lines, at most")] = 100,
    tolerance: Annotated[float, typer.Option(help="relative gain at which k-lines stops")] = 1e-4,
    threads: Threads = None,
) -> None:
    """Make a codebook: a conventional one, or one fitted to a site's channels.

    Example: csimodels codebook make site12.safetensors --kind k-lines --bits 12 --channels site.h5
    """
    with reported():
        from csimodels.models.codebook_file import FeedbackCodebook, save_codebook

        if threads:
            torch.set_num_threads(threads)
        layout = parse_ports(ports)
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if (kind == "k-lines") != (channels is not None):
            raise ValueError("channels: expected with --kind k-lines, and only there")
        if ue is not None and kind != "k-lines":
            raise ValueError("ue: expected only with --kind k-lines")
        if channels is None:
            book = FeedbackCodebook(*_conventional(kind, bits, layout, seed, codebook_mode))
        elif ue is None:
            book = _fitted(bits, layout, channels, variable, seed, iterations, tolerance)
        else:
            book = _single_side(bits, layout, channels, variable, load_book(ue, layout))
        save_codebook(out, book)
        console.print(
            f"wrote {2**book.bits} codewords of {book.dimension} numbers (B = {book.bits}) to {out}", soft_wrap=True
        )


def _conventional(kind: str, bits: int, layout: Any, seed: int, mode: int) -> tuple[Any, ...]:
    """Words, kind, ports, deployment, UE's digest, environments and source of a :class:`FeedbackCodebook`."""
    from csimodels.models.codebooks import dft_codebook, dft_oversampling, rvq_codebook, type1_codebook

    if kind == "rvq":
        return rvq_codebook(bits, len(layout), seed=seed), kind, layout, "DS", None, (), {"seed": seed}
    if kind == "dft":
        rows, columns = dft_oversampling(bits, layout)
        source = {"oversampling": [rows, columns], "cophases": 4 if layout.polarisations == 2 else 1}
        return dft_codebook(layout, (rows, columns)), kind, layout, "DS", None, (), source
    if layout.polarisations != 2:
        raise ValueError(f"ports: expected two polarisations for type1, got {layout}")
    twice = mode == 2 and layout.rows == 1  # then every word has two indices
    o2, o1 = dft_oversampling(bits - twice, layout)
    words = type1_codebook(layout.columns, layout.rows, o1, o2, codebook_mode=mode)
    source = {"n1": layout.columns, "n2": layout.rows, "o1": o1, "o2": o2, "codebook_mode": mode}
    return words, kind, layout, "DS", None, (), source


def _fitted(bits: int, layout: Any, channels: Path, variable: str, seed: int, iterations: int, tolerance: float) -> Any:
    from csimodels.models.codebook_file import FeedbackCodebook
    from csimodels.training.k_lines import k_lines

    h = training_channels(channels, layout, variable)
    with progress(f"k-lines of {len(h)} channels") as update:
        fitted = k_lines(
            h,
            bits,
            seed=seed,
            iterations=iterations,
            tolerance=tolerance,
            on_iteration=lambda iteration, value: update(iteration, iterations, f"mean squared cosine {value:.4f}"),
        )
    console.print(
        f"mean cosine {fitted.cosine:.4f} on the training channels after {len(fitted.squared_cosine) - 1} iterations"
    )
    source = {
        "channels": digest(channels),
        "samples": len(h),
        "seed": seed,
        "tolerance": tolerance,
        "squared_cosine": fitted.squared_cosine,
    }
    return FeedbackCodebook(fitted.words, "k-lines", layout, source=source)


def _single_side(bits: int, layout: Any, channels: Path, variable: str, ue: Any) -> Any:
    from csimodels.models.codebook_file import FeedbackCodebook
    from csimodels.training.k_lines import single_side_words

    if ue.bits != bits:
        raise ValueError(f"bits: expected {ue.bits}, as the UE's codebook has, got {bits}")
    if ue.deployment == "SS":
        raise ValueError("ue: expected a codebook that UEs keep, got one of a BS alone (SS)")
    h = training_channels(channels, layout, variable)
    source = {"channels": digest(channels), "samples": len(h), "ue": ue.kind}
    words = single_side_words(h, ue.select())
    return FeedbackCodebook(words, "k-lines", layout, "SS", ue.digest(), source=source)


def training_channels(path: Path, layout: Any, variable: str) -> torch.Tensor:
    """Every subcarrier of every sample is a channel, complex64 ``[N, D]``."""
    from csimodels.channels.vector_file import VectorFile

    h = VectorFile(path, len(layout), variable).read()
    return h.mT.flatten(0, 1)


@codebook_app.command()
def show(
    path: Annotated[Path, typer.Argument(dir_okay=False, help="codebook file")],
    ports: Annotated[str | None, typer.Option(help="refuse a codebook for another array, such as 2x8x8")] = None,
) -> None:
    """Show what a codebook file holds: kind, bits, array, deployment, digests, and where it comes from.

    Example: csimodels codebook show rvq12.safetensors
    """
    with reported():
        book = load_book(path, None if ports is None else parse_ports(ports))
        several = book.words.dim() == 3
        table = Table("codebook", "value")
        table.add_row("kind", book.kind)
        table.add_row("bits", f"{book.bits} ({2**book.bits} codewords)")
        table.add_row("dimension", str(book.dimension))
        table.add_row("ports", str(book.ports))
        table.add_row("deployment", "SS: the BS alone" if book.deployment == "SS" else "DS: both ends")
        if book.ue_digest is not None:
            table.add_row("digest of the UE's codebook", book.ue_digest)
        for index in range(len(book.words)) if several else (None,):
            name = "digest" if index is None else f"digest of environment {index} ({book.environments[index]})"
            table.add_row(name, book.digest(index))
        for name, value in book.source.items():
            table.add_row(f"source: {name}", value if isinstance(value, str) else json.dumps(value))
        console.print(table)


@feedback_app.command()
def encode(
    source: Annotated[
        Path, typer.Argument(dir_okay=False, help="channels: HDF5, .mat, .npz or .safetensors, complex [N, D]")
    ],
    out: Annotated[Path, typer.Argument(dir_okay=False, help="file of codeword indices to write, such as site.csii")],
    codebook: BookPath,
    environment: EnvironmentIndex = None,
    variable: Variable = "h",
    threads: Threads = None,
) -> None:
    """Report channels as the UE does: the index of the best codeword of each, B bits.

    Example: csimodels feedback encode site.h5 site.csii --codebook rvq12.safetensors
    """
    with reported():
        from csimodels.codebook_feedback import encode_channels

        if threads:
            torch.set_num_threads(threads)
        result = encode_channels(load_book(codebook), source, out, environment=environment, variable=variable)
        console.print(
            f"wrote {result.reports} reports of {result.bits} bits ({result.bytes} bytes) of {result.samples} channels "
            f"to {out}",
            soft_wrap=True,
        )


@feedback_app.command()
def decode(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="file of codeword indices that encode wrote")],
    out: Annotated[
        Path, typer.Argument(dir_okay=False, help="channels to write: HDF5, or .mat, .npz, .safetensors by its ending")
    ],
    codebook: BookPath,
    environment: EnvironmentIndex = None,
    truth: Annotated[Path | None, typer.Option(help="the file that was encoded, to print the cosine against")] = None,
    variable: Variable = "h",
) -> None:
    """Reconstruct channels as the BS does: the codeword of each index; with --truth also their mean cosine.

    Example: csimodels feedback decode site.csii restored.h5 --codebook rvq12.safetensors --truth site.h5
    """
    with reported():
        from csimodels.codebook_feedback import decode_channels

        book = load_book(codebook)
        result = decode_channels(book, source, out, environment=environment, truth=truth, variable=variable)
        console.print(f"wrote {result['samples']} channels to {out}", soft_wrap=True)
        if "cosine" in result:
            console.print(f"mean cosine {result['cosine']:.4f}", soft_wrap=True)


def load_book(path: Path, ports: Any = None) -> Any:
    """A codebook; what its reading has to say goes to stderr as one line."""
    from csimodels.models.codebook_file import load_codebook

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        book = load_codebook(path, ports=ports)
    for warning in caught:
        errors.print(f"note: {path}: {warning.message}", markup=False, highlight=False, soft_wrap=True)
    return book


def parse_ports(text: str) -> Any:
    """``"2x8x8"`` -> port layout; a ``ValueError`` for anything else."""
    from csimodels.models.codebooks import PortLayout

    match = re.fullmatch(r"([0-9]+)x([0-9]+)x([0-9]+)", text)
    if match is None:
        raise ValueError(f"ports: expected polarisations x rows x columns such as 2x8x8, got {text!r}")
    return PortLayout(*map(int, match.groups()))
