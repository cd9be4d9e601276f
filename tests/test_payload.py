"""Reports: bit for bit what was packed, their sizes, and every kind of damage refused."""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib

import numpy as np
import pytest
import torch

from csimodels.models.llmcsinet import Codeword, LlmCsiNetConfig
from csimodels.models.payload import PayloadFormat, pack, quantized, relative_values, unpack
from csimodels.models.quantizer import LloydMax

pytestmark = pytest.mark.usefixtures("small_models")
DIGEST = b"\x01\x02\x03\x04\x05\x06\x07\x08"
PLAIN = PayloadFormat(2048, DIGEST)
HEADER, CHECKSUM = 28, 4


def codeword(batch: int = 3, m: int = 221, elements: int = 2048, seed: int = 0) -> Codeword:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(batch, elements, generator=generator).argsort(1)[:, :m]
    return Codeword(torch.randn(batch, m, generator=generator), indices, torch.randn(batch, generator=generator))


def quantizer(levels: int) -> LloydMax:
    fitted = LloydMax(levels)
    fitted.fit(torch.randn(2000, generator=torch.Generator().manual_seed(3)), 20)
    return fitted


def equal(first: Codeword, second: Codeword) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def resealed(report: bytes) -> bytes:
    """With the checksum that its content has."""
    return report[:-CHECKSUM] + struct.pack("<I", zlib.crc32(report[:-CHECKSUM]))


@pytest.mark.parametrize("elements", [2, 3, 31, 2047, 2048, 2049, 100_000])
@pytest.mark.parametrize("m", [1, 2, 7, 31])
def test_float32_reports_return_bit_for_bit(elements, m):
    m = min(m, elements)
    sent = codeword(4, m, elements)
    form = PayloadFormat(elements, DIGEST)
    reports = pack(sent, form)
    assert [len(report) for report in reports] == [form.report_bytes(m)] * 4
    assert equal(unpack(reports, form), sent)


def test_every_float_returns_with_its_bits():
    values = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, 1.1754944e-38]])
    sent = Codeword(values, torch.arange(6)[None], torch.tensor([-0.0]))
    received = unpack(pack(sent, PLAIN), PLAIN)
    assert torch.equal(received.values.view(torch.int32), values.view(torch.int32))
    assert torch.equal(received.mean.view(torch.int32), sent.mean.view(torch.int32))


def test_indices_take_eleven_bits_of_2048_positions():
    assert PLAIN.index_bits == 11
    assert PLAIN.report_bytes(221) == HEADER + 221 * 4 + math.ceil(221 * 11 / 8) + CHECKSUM
    report = pack(codeword(1), PLAIN)[0]
    packed = report[HEADER + 221 * 4 : -CHECKSUM]
    bits = "".join(f"{byte:08b}" for byte in packed)
    assert [int(bits[11 * i : 11 * i + 11], 2) for i in range(221)] == codeword(1).indices[0].tolist()
    assert set(bits[11 * 221 :]) <= {"0"}


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 1000])
def test_quantised_reports_return_the_levels(levels):
    sent, form = codeword(4, 50), PayloadFormat(2048, DIGEST, quantizer(levels))
    reports = pack(sent, form)
    code_bits = math.ceil(math.log2(levels))
    assert len(reports[0]) == HEADER + math.ceil(50 * code_bits / 8) + math.ceil(50 * 11 / 8) + CHECKSUM
    received = unpack(reports, form)
    assert equal(received, quantized(sent, form.quantizer))
    error = (received.values - sent.values).square().mean() / sent.values.square().mean()
    assert error < 2.5 / levels ** (1.5)  # a Gaussian's falls with the square of the levels, at first more slowly


def test_quantised_values_scale_with_the_codeword():
    sent, levels = codeword(2, 30), quantizer(16)
    louder = Codeword(sent.values * 2.0**-40, sent.indices, sent.mean)
    torch.testing.assert_close(quantized(louder, levels).values, quantized(sent, levels).values * 2.0**-40)
    relative, scale = relative_values(sent)
    torch.testing.assert_close(relative.square().mean(1), torch.ones(2))
    torch.testing.assert_close(relative * scale[:, None], sent.values)


def test_quantised_values_of_a_short_codeword_do_not_depend_on_its_padding():
    short, levels = codeword(1, 4), quantizer(16)
    padded = Codeword(*(torch.cat([part, part[:, :1].repeat(1, 30)], 1) for part in short[:2]), short.mean)
    assert torch.equal(quantized(padded, levels).values[:, :4], quantized(short, levels).values)


@pytest.mark.parametrize("levels", [None, 16])
def test_codeword_of_zeros(levels):
    form = PayloadFormat(2048, DIGEST, quantizer(levels) if levels else None)
    sent = Codeword(torch.zeros(1, 5), torch.arange(5)[None], torch.zeros(1))
    assert (unpack(pack(sent, form), form).values == 0).all()


def test_reports_of_different_lengths():
    sent, lengths = codeword(3, 9), torch.tensor([9, 1, 4])
    reports = pack(sent, PLAIN, lengths)
    assert [len(report) for report in reports] == [PLAIN.report_bytes(m) for m in (9, 1, 4)]
    received = unpack(reports, PLAIN)
    for i, m in enumerate(lengths.tolist()):
        assert torch.equal(received.values[i, :m], sent.values[i, :m])
        assert torch.equal(received.indices[i, :m], sent.indices[i, :m])
        assert (received.values[i, m:] == sent.values[i, 0]).all()
        assert (received.indices[i, m:] == sent.indices[i, 0]).all()
        assert equal(
            unpack(reports[i], PLAIN), Codeword(*(part[i : i + 1, :m] for part in sent[:2]), sent.mean[i : i + 1])
        )


def test_format_of_a_model():
    config = LlmCsiNetConfig(delays=5, antennas=7, codeword_values=3)
    form = PayloadFormat.of(config)
    assert (form.elements, form.digest, form.index_bits) == (70, config.digest(), 7)


def test_no_reports():
    empty = codeword(0, 5)
    assert pack(empty, PLAIN) == []
    received = unpack([], PLAIN)
    assert received.values.shape[0] == received.mean.shape[0] == 0


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 16])
def test_every_flipped_bit_is_noticed(levels):
    form = PayloadFormat(2048, DIGEST, quantizer(levels) if levels else None)
    report = pack(codeword(1, 3), form)[0]
    for place in range(8 * len(report)):
        damaged = bytearray(report)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="report 0: .*expected .*found "):
            unpack(bytes(damaged), form)


def test_every_truncation_is_noticed():
    report = pack(codeword(1, 5), PLAIN)[0]
    for length in range(len(report)):
        with pytest.raises(ValueError, match="report 0: .*expected .*found "):
            unpack(report[:length], PLAIN)


def test_truncation_says_how_many_bytes_are_missing():
    report = pack(codeword(1, 5), PLAIN)[0]
    message = f"truncated or corrupted: expected {len(report)} bytes for M = 5, found {len(report) - 9}"
    with pytest.raises(ValueError, match=message):
        unpack(report[:-9], PLAIN)
    with pytest.raises(ValueError, match="truncated: expected at least 32 bytes, found 31"):
        unpack(report[:31], PLAIN)


def test_appended_bytes_are_noticed():
    report = pack(codeword(1, 5), PLAIN)[0]
    with pytest.raises(ValueError, match=f"expected {len(report)} bytes for M = 5, found {len(report) + 1}"):
        unpack(report + b"\0", PLAIN)


@pytest.mark.parametrize("foreign", [b"", b"\x89PNG\r\n\x1a\n" + bytes(60), b"CS", bytes(100)])
def test_something_else_is_refused(foreign):
    with pytest.raises(ValueError, match="report 0: .*expected .*found "):
        unpack(foreign, PLAIN)


def test_the_damaged_one_of_many_is_named():
    reports = pack(codeword(3, 5), PLAIN)
    reports[1] = reports[1][:-1] + bytes([reports[1][-1] ^ 1])
    with pytest.raises(ValueError, match="report 1: corrupted: expected the checksum [0-9a-f]{8}, found [0-9a-f]{8}"):
        unpack(reports, PLAIN)


def test_another_version_is_refused():
    report = bytearray(pack(codeword(1, 5), PLAIN)[0])
    report[4] = 7
    with pytest.raises(ValueError, match="report 0: expected version 1, found 7"):
        unpack(resealed(bytes(report)), PLAIN)


def test_another_configuration_is_refused():
    report = pack(codeword(1, 5), PLAIN)[0]
    other = PayloadFormat(2048, b"another!")
    message = f"another configuration: expected the digest {b'another!'.hex()}, found {DIGEST.hex()}"
    with pytest.raises(ValueError, match=message):
        unpack(report, other)


def test_other_levels_are_refused():
    first, second = (PayloadFormat(2048, DIGEST, LloydMax(4)) for _ in range(2))
    first.quantizer.fit(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    second.quantizer.fit(torch.tensor([0.0, 1.0, 2.0, 4.0]))
    with pytest.raises(ValueError, match="report 0: of another configuration: expected the digest"):
        unpack(pack(codeword(1, 5), first), second)


def test_another_kind_of_values_is_refused():
    codes = PayloadFormat(2048, DIGEST, quantizer(16))
    with pytest.raises(ValueError, match="expected float32 of 32 bits, found Lloyd-Max codes of 4 bits"):
        unpack(pack(codeword(1, 5), codes), PLAIN)
    with pytest.raises(ValueError, match="expected Lloyd-Max codes of 4 bits, found float32 of 32 bits"):
        unpack(pack(codeword(1, 5), PLAIN), codes)


def test_indices_beyond_the_array_are_refused_on_both_sides():
    sent = codeword(1, 5)
    sent.indices[0, 2] = 2048
    with pytest.raises(ValueError, match="codeword.indices: expected 0 to 2047, got"):
        pack(sent, PLAIN)
    odd = PayloadFormat(2000, DIGEST)  # 11 bits too
    sent.indices[0, 2] = 2040
    with pytest.raises(ValueError, match="report 0: expected indices of 0 to 1999, found 2040"):
        unpack(pack(sent, PLAIN), odd)


def test_m_that_does_not_fit_its_bytes_is_refused():
    report = bytearray(pack(codeword(1, 5), PLAIN)[0])
    for m in (0, 6, 2049):
        report[16:20] = struct.pack("<I", m)
        with pytest.raises(ValueError, match=f"expected M of 1 to 2048 and its .* bytes, found M = {m}"):
            unpack(resealed(bytes(report)), PLAIN)


@pytest.mark.parametrize("place", ["values", "mean"])
def test_codeword_that_is_not_finite_is_refused_with_its_sample(place):
    sent = codeword(4, 5)
    getattr(sent, place)[2] = np.nan
    with pytest.raises(ValueError, match="codeword: expected finite numbers, sample 2 has others"):
        pack(sent, PLAIN)


@pytest.mark.parametrize("lengths", [[5], [0, 5], [5, 6]])
def test_lengths_out_of_range(lengths):
    with pytest.raises(ValueError, match=r"lengths: expected \[2\] numbers of 1 to 5, got \["):
        pack(codeword(2, 5), PLAIN, torch.tensor(lengths))


def test_format_out_of_range():
    with pytest.raises(ValueError, match="digest: expected 8 bytes, got 3"):
        PayloadFormat(10, b"abc")
    with pytest.raises(ValueError, match="elements: expected at least 1, got 0"):
        dataclasses.replace(PLAIN, elements=0)
