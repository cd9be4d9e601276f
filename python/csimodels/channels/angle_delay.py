"""CSI in the angle-delay domain, as networks see it: transform and truncation (LLMCsiNet, eq. 2).

``h`` is float32 ``[sample, 2, delay, antenna]``: real and imaginary parts, rows of delay, columns of angle. Both DFTs
are unitary, so energies are those of the frequency domain.
"""

from __future__ import annotations

import torch

DELAYS = 32
SHIFT = 2
_BLOCK = 256  # samples of all subcarriers at a time: 64 MiB at 1,024 x 32


def angle_delay(
    h_frequency: torch.Tensor, delays: int = DELAYS, shift: int = SHIFT
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of the angle-delay domain, and what share of the energy lies in them.

    The transform is the inverse DFT along both dimensions of ``H``, the complex conjugate of eq. 2, whose rows are
    ``h^H``: a ray of delay ``tau`` lies at row ``tau * bandwidth``. Delays between two rows leak to both sides, round
    to the last rows; ``shift`` moves all rows down before the cut, so that the early side of a short delay is kept.

    Args:
        h_frequency: complex ``[sample, antenna, subcarrier]``.
        delays: rows kept, Nc.
        shift: rows, 0 or more.

    Returns:
        ``h``, float32 ``[sample, 2, delays, antenna]``, in the unit of ``h_frequency``; and the kept share of every
        sample's energy, float64 ``[sample]`` on the same device.

    Raises:
        ValueError: another array, ``delays`` or ``shift`` out of range, or samples that are not finite or have no
            energy (how many, and the first one's index).
    """
    if not h_frequency.is_complex() or h_frequency.ndim != 3 or 0 in h_frequency.shape:
        raise ValueError(
            "h_frequency: expected complex [sample, antenna, subcarrier], not empty, got "
            f"{h_frequency.dtype} {tuple(h_frequency.shape)}"
        )
    check_cut(h_frequency.shape[2], delays, shift)
    rows = torch.arange(-shift, delays - shift, device=h_frequency.device)
    total = h_frequency.abs().square().sum(dim=(1, 2), dtype=torch.float64)
    bad = (~((total > 0) & torch.isfinite(total))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"h_frequency: expected finite samples with energy, got {len(bad)} others, the first at index {int(bad[0])}"
        )
    kept = torch.cat([torch.fft.ifft(part, norm="ortho")[..., rows] for part in h_frequency.split(_BLOCK)])
    energy = kept.abs().square().sum(dim=(1, 2), dtype=torch.float64)
    return to_image(kept), energy / total


def to_frequency(h: torch.Tensor, subcarriers: int, shift: int = SHIFT) -> torch.Tensor:
    """The inverse of :func:`angle_delay`, with zeros for the rows that were cut.

    Args:
        h: float ``[sample, 2, delay, antenna]``.
        subcarriers: of the frequency domain, at least as many as rows.
        shift: the one that ``h`` was made with.

    Returns:
        complex ``[sample, antenna, subcarrier]`` of ``h``'s precision.

    Raises:
        ValueError: another array, or numbers out of range.
    """
    _check_image(h)
    delays = h.shape[2]
    check_cut(subcarriers, delays, shift)
    cut = torch.fft.fft(torch.complex(h[:, 0], h[:, 1]).mT, dim=1, norm="ortho")
    whole = cut.new_zeros(*cut.shape[:2], subcarriers)
    whole[..., torch.arange(-shift, delays - shift, device=h.device)] = cut
    return torch.fft.fft(whole, norm="ortho")


def noisy(h: torch.Tensor, snr_db: float | torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """``h`` with white Gaussian noise: what a UE estimates (LLMCsiNet, section V-D).

    Args:
        h: float ``[sample, 2, delay, antenna]``.
        snr_db: each sample's energy over the noise's mean energy, both within the rows kept; a number or ``[sample]``.
        generator: of the noise, on ``h``'s device.

    Returns:
        as ``h``; a sample of no energy stays as it is.

    Raises:
        ValueError: another array, or an SNR that is NaN.
    """
    _check_image(h)
    ratio = torch.as_tensor(snr_db, dtype=h.dtype, device=h.device)
    if ratio.ndim > 1 or (ratio.ndim == 1 and len(ratio) != len(h)) or bool(ratio.isnan().any()):
        raise ValueError(f"snr_db: expected a number of dB or one per sample ({len(h)}), got {snr_db}")
    power = h.square().mean(dim=(1, 2, 3)) / 10 ** (ratio / 10)
    noise = torch.randn(h.shape, dtype=h.dtype, device=h.device, generator=generator)
    return h + power.sqrt()[:, None, None, None] * noise


def to_image(rows: torch.Tensor) -> torch.Tensor:
    """Complex ``[sample, antenna, delay]`` to float32 ``[sample, 2, delay, angle]``: the DFT along the antennas."""
    angles = torch.fft.ifft(rows, dim=1, norm="ortho").mT
    return torch.stack([angles.real, angles.imag], dim=1).float()


def _check_image(h: torch.Tensor) -> None:
    if not h.is_floating_point() or h.ndim != 4 or h.shape[1] != 2 or 0 in h.shape:
        raise ValueError(f"h: expected float [sample, 2, delay, antenna], not empty, got {h.dtype} {tuple(h.shape)}")


def check_cut(subcarriers: int, delays: int, shift: int) -> None:
    """Raise a ``ValueError`` unless ``delays`` rows, ``shift`` of them before delay 0, fit in ``subcarriers``."""
    if not 1 <= delays <= subcarriers:
        raise ValueError(f"delays: expected 1 to {subcarriers} (subcarriers), got {delays}")
    if not 0 <= shift < delays:
        raise ValueError(f"shift: expected 0 to {delays - 1} rows, got {shift}")
