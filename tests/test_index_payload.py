"""Streams of codeword indices: bit for bit what was packed, every kind of damage refused; and the two ends on them."""

from __future__ import annotations

import math
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csikernels import codebook_argmax
from csimodels.models.codebook_codec import CodebookDecoder, CodebookEncoder, feed_back
from csimodels.models.codebook_file import FeedbackCodebook
from csimodels.models.codebooks import PortLayout, rvq_codebook
from csimodels.models.index_payload import IndexFormat, IndexStream, pack_indices, unpack_indices

DIGEST = bytes(range(1, 9))
FORM = IndexFormat(12, DIGEST)
HEADER, CHECKSUM = 20, 4
PORTS = PortLayout(2, 2, 4)


def stream(count: int = 5, bits: int = 12, per_sample: int = 1) -> IndexStream:
    generator = torch.Generator().manual_seed(0)
    return IndexStream(torch.randint(2**bits, (count,), generator=generator), per_sample)


def resealed(content: bytes) -> bytes:
    """With the checksum that its content has."""
    return content[:-CHECKSUM] + struct.pack("<I", zlib.crc32(content[:-CHECKSUM]))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 5), st.binary(min_size=8, max_size=8))
def test_indices_return_bit_for_bit(data, bits, per_sample, digest):
    samples = data.draw(st.integers(0, 12))
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=samples * per_sample, max_size=samples * per_sample)
    indices = torch.tensor(data.draw(numbers), dtype=torch.int64)
    form = IndexFormat(bits, digest)
    content = pack_indices(IndexStream(indices, per_sample), form)
    assert len(content) == form.stream_bytes(len(indices)) == HEADER + math.ceil(len(indices) * bits / 8) + CHECKSUM
    found = unpack_indices(content, form)
    assert found.per_sample == per_sample
    assert found.indices.dtype == torch.int64 and torch.equal(found.indices, indices)


def test_the_bytes_are_as_documented():
    content = pack_indices(IndexStream(torch.tensor([5, 0, 4095, 2048]), 2), FORM)
    assert content[:20] == b"CSII" + bytes([1, 12, 2, 0]) + DIGEST + bytes([4, 0, 0, 0])
    assert content[20:-4] == bytes([0x00, 0x50, 0x00, 0xFF, 0xF8, 0x00])
    assert content[-4:] == struct.pack("<I", zlib.crc32(content[:-4]))


def test_every_flipped_bit_and_every_truncation_is_noticed():
    content = pack_indices(stream(), FORM)
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="stream: .*expected .*found "):
            unpack_indices(bytes(damaged), FORM)
    for length in range(len(content)):
        with pytest.raises(ValueError, match="stream: .*expected .*found "):
            unpack_indices(content[:length], FORM)
    with pytest.raises(
        ValueError, match="truncated or corrupted: expected 32 bytes for 5 reports of 12 bits, found 33"
    ):
        unpack_indices(content + b"\0", FORM)
    with pytest.raises(ValueError, match="corrupted: expected the checksum [0-9a-f]{8}, found [0-9a-f]{8}"):
        unpack_indices(content[:25] + bytes([content[25] ^ 1]) + content[26:], FORM)


@pytest.mark.parametrize("foreign", [b"", b"CS", b"CSIF" + bytes(60), bytes(100)])
def test_something_else_is_refused(foreign):
    with pytest.raises(ValueError, match="stream: .*expected .*found "):
        unpack_indices(foreign, FORM)


def test_another_codebook_or_another_size_is_refused():
    content = pack_indices(stream(), FORM)
    message = f"of another codebook: expected the digest {b'another!'.hex()}, found {DIGEST.hex()}"
    with pytest.raises(ValueError, match=message):
        unpack_indices(content, IndexFormat(12, b"another!"))
    with pytest.raises(ValueError, match="expected reports of 11 bits, .* found 5 of 12 bits"):
        unpack_indices(content, IndexFormat(11, DIGEST))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (slice(4, 5), b"\7", "expected version 1, found 7"),
        (slice(6, 8), b"\0\0", "0 to a sample"),
        (slice(6, 8), b"\2\0", "found 5 of 12 bits, 2 to a sample"),
        (slice(16, 20), b"\6\0\0\0", "found 6 of 12 bits, .* in 32"),
    ],
)
def test_contradictions_under_a_right_checksum_are_refused(place, value, message):
    content = bytearray(pack_indices(stream(), FORM))
    content[place] = value
    with pytest.raises(ValueError, match=message):
        unpack_indices(resealed(bytes(content)), FORM)


def test_what_cannot_be_packed_is_refused():
    for value in (-1, 4096):
        with pytest.raises(ValueError, match=f"indices: expected 0 to 4095, got {value} for report 1"):
            pack_indices(IndexStream(torch.tensor([0, value])), FORM)
    with pytest.raises(TypeError, match=r"indices: expected int64 \[count\], got torch.float32"):
        pack_indices(IndexStream(torch.zeros(3)), FORM)
    for per_sample in (0, 2, 2**16):
        with pytest.raises(ValueError, match="per_sample: expected 1 to 65535, a divisor of the 5 reports"):
            pack_indices(IndexStream(stream().indices, per_sample), FORM)
    with pytest.raises(ValueError, match="digest: expected 8 bytes, got 3"):
        IndexFormat(12, b"abc")
    with pytest.raises(ValueError, match="bits: expected 1 to 20, got 21"):
        IndexFormat(21, DIGEST)


# The two ends ---------------------------------------------------------------------------------------------------------


def conventional(seed: int = 0) -> FeedbackCodebook:
    return FeedbackCodebook(rvq_codebook(6, 16, seed=seed), "rvq", PORTS)


def single_side(ue: FeedbackCodebook) -> FeedbackCodebook:
    return FeedbackCodebook(rvq_codebook(6, 16, seed=5), "lvm4cf", PORTS, "SS", ue.digest())


def channels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))


def test_dual_side_feedback_is_the_best_codeword():
    book, h = conventional(), 1e-6 * channels(20, 16)
    sent = CodebookEncoder(book).encode(h)
    assert len(sent) == HEADER + 20 * 6 // 8 + CHECKSUM
    index, _ = codebook_argmax(h, book.words)
    assert torch.equal(CodebookDecoder(book).decode(sent), book.words[index][:, :, None])
    assert torch.equal(feed_back(h, book, book), book.words[index])


def test_single_side_feedback_looks_the_ues_index_up_in_the_codebook_of_the_bs():
    ue, h = conventional(), channels(20, 16)
    bs = single_side(ue)
    index, _ = codebook_argmax(h, ue.words)
    assert torch.equal(feed_back(h, ue, bs), bs.words[index])
    with pytest.raises(ValueError, match=f"expected the codebook that the UE keeps, of digest {ue.digest()}, got one"):
        CodebookEncoder(bs)
    with pytest.raises(ValueError, match="of another codebook: expected the digest"):
        feed_back(h, conventional(seed=1), bs)


def test_subcarriers_are_reported_one_by_one_and_put_back():
    book, h = conventional(), channels(3, 16, 4)
    sent = CodebookEncoder(book).encode(h)
    found = CodebookDecoder(book).decode(sent)
    assert found.shape == h.shape
    for subcarrier in range(4):
        assert torch.equal(found[:, :, subcarrier], feed_back(h[:, :, subcarrier], book, book))
    assert torch.equal(feed_back(h, book, book), found)


def test_each_environment_has_its_codebook():
    words = torch.stack([rvq_codebook(6, 16, seed=seed) for seed in range(3)])
    books, h = FeedbackCodebook(words, "k-lines", PORTS, environments=("a", "b", "c")), channels(9, 16)
    index, _ = codebook_argmax(h, words[2])
    assert torch.equal(feed_back(h, books, books, 2), words[2][index])
    # The BS may hold its own environment's codebook alone.
    alone = FeedbackCodebook(words[2].clone(), "k-lines", PORTS)
    assert torch.equal(CodebookDecoder(alone).decode(CodebookEncoder(books, 2).encode(h))[..., 0], words[2][index])
    with pytest.raises(ValueError, match="of another codebook"):
        CodebookDecoder(books, 1).decode(CodebookEncoder(books, 2).encode(h))
    for end in (CodebookEncoder, CodebookDecoder):
        with pytest.raises(ValueError, match=r"environment: expected 0 to 2 \(a, b, c\), got 3"):
            end(books, 3)


def test_no_channels_make_an_empty_stream():
    book = conventional()
    assert feed_back(channels(0, 16), book, book).shape == (0, 16)


@pytest.mark.parametrize("value", [0, float("nan")])
def test_channels_without_a_direction_are_named(value):
    h = channels(6, 16)
    h[[2, 4]] = value
    with pytest.raises(ValueError, match="h: 2 channels are zero or not finite, the first is 2"):
        CodebookEncoder(conventional()).encode(h)
    wide = channels(6, 16, 3)
    wide[4, :, 1] = value
    with pytest.raises(ValueError, match="h: 1 channels are zero or not finite, the first is 4, subcarrier 1"):
        CodebookEncoder(conventional()).encode(wide)
    with pytest.raises(ValueError, match=r"h: expected \[N, 16\], got shape \(6, 8\)"):
        CodebookEncoder(conventional()).encode(channels(6, 8))
