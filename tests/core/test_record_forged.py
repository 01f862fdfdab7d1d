"""Records that were damaged by accident or forged on purpose: each is refused, with its reason, at bounded cost."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core import precisions, record
from kvlab.core.codecs import CODECS
from kvlab.core.record import BadRecord, Format
from tests.core.make_golden import GOLDEN_FORMATS, GOLDEN_KEY, golden_tensor
from tests.core.test_record import FORMATS, SHAPE, every_golden, expected, golden
from tests.harness.helpers import KEY, REASONS, encoded, flipped, reason_of, resealed, same_bits, tampered


def reason_at(offset: int, aes: bool) -> str:
    """What a changed byte of the record is refused for: what this reader does not know before what is damaged."""
    fields = {"magic": range(4), "version": [4], "key_id": [9, *range(12, 16)], "length": range(48, 56)}
    structural = next((reason for reason, offsets in fields.items() if offset in offsets), None)
    return structural or ("forged" if aes else "checksum")


@every_golden
def test_every_single_byte_that_flips_is_noticed(name: str) -> None:
    value, aes = golden(name), name.endswith("-aes")
    for mask in (0x01, 0x80) if aes else (0x01, 0x10, 0x80, 0xFF):
        for at in range(len(value)):
            reason = reason_of(flipped(value, at, mask), GOLDEN_FORMATS[name], SHAPE, GOLDEN_KEY)
            assert reason == reason_at(at, aes), at


@every_golden
def test_every_length_but_the_right_one_is_noticed(name: str) -> None:
    value, fmt = golden(name), GOLDEN_FORMATS[name]
    for length in range(len(value)):
        assert reason_of(value[:length], fmt) == "length"
    for garbage in (b"\0", b"x" * 100, value):
        assert reason_of(value + garbage, fmt) == "length"


@given(st.binary(max_size=400), st.sampled_from(list(GOLDEN_FORMATS.values())))
def test_arbitrary_bytes_are_a_bad_record(value: bytes, fmt: Format) -> None:
    assert reason_of(value, fmt) in {"length", "magic"}


@given(st.data(), st.sampled_from(FORMATS))
def test_arbitrary_headers_are_a_bad_record_or_the_right_tensor(data: st.DataObject, fmt: Format) -> None:
    """The worst case: a forger who knows the format and makes every checksum fit."""
    value = bytearray(encoded(golden_tensor(), fmt))
    for at in data.draw(st.lists(st.integers(0, len(value) - 1), min_size=1, max_size=6)):
        value[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        struct.pack_into("<Q", value, 48, len(value) - 128)
    try:
        got = record.decode(resealed(bytes(value)), KEY, fmt, SHAPE)
    except BadRecord as error:
        assert error.reason in REASONS
    else:
        assert tuple(got.shape) == SHAPE


@given(st.data(), st.sampled_from(FORMATS))
def test_arbitrary_text_headers_are_a_bad_record_or_some_tensor(data: st.DataObject, fmt: Format) -> None:
    """Where any shape is accepted, what is made is bounded, whatever the header says."""
    value = bytearray(encoded(golden_tensor(), fmt, kind=record.KIND_TEXT))
    ndim = data.draw(st.integers(0, 9))
    extent = st.one_of(st.integers(0, 8), st.sampled_from([2**16, 2**31, 2**32 - 1]))
    dims = data.draw(st.lists(extent, min_size=min(ndim, 8), max_size=8))[:8]
    value[10] = ndim
    struct.pack_into(f"<{len(dims)}I", value, 16, *dims)
    try:
        got = record.decode(resealed(bytes(value)), KEY, fmt, None, record.KIND_TEXT, max_bytes=1 << 20)
    except BadRecord as error:
        assert error.reason in REASONS
    else:
        assert got.nbytes <= 1 << 20


RECORD = encoded(golden_tensor(), Format())
PACKED = encoded(golden_tensor(), Format("fp32", "gzip"))


def with_payload(record_: bytes, payload: bytes) -> bytes:
    """Another payload, with its length and checksum made to fit."""
    return resealed(record_[:48] + struct.pack("<Q", len(payload)) + record_[56:128] + payload)


def framed(frames: list[bytes], lengths: list[int] | None = None) -> bytes:
    """A zstd payload from the text of `kvlab.core.codecs`: lengths, then frames."""
    numbers = [len(f) for f in frames] if lengths is None else lengths
    return struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(frames)


def by_hand(claimed: int, *blocks: bytes) -> bytes:
    """A zstd frame (RFC 8878, 3.1.1) of a 128 KiB window that claims a content size of 8 bytes' width."""
    return b"\x28\xb5\x2f\xfd" + b"\xc0\x38" + struct.pack("<Q", claimed) + b"".join(blocks)


def zstd_block(data: bytes, repeat: int = 0, last: bool = True) -> bytes:
    """A raw block, or with `repeat` one byte so many times."""
    size = repeat or len(data)
    return struct.pack("<I", last | bool(repeat) << 1 | size << 3)[:3] + data


ZSTD = encoded(golden_tensor(), Format("fp32", "zstd"))
BYTE_PLANES = [RECORD[128:][i::4] for i in range(4)]
FRAMES = [zstandard.compress(plane) for plane in BYTE_PLANES]
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(BYTE_PLANES[2])
SUMMED = zstandard.ZstdCompressor(write_checksum=True).compress(BYTE_PLANES[2])
TOLD = [len(f) for f in FRAMES]
MANY = [zstd_block(b"\0", 1 << 17, last=False)] * 1000


def third(frame: bytes) -> bytes:
    """The zstd record with another frame as the third of four."""
    return with_payload(ZSTD, framed([*FRAMES[:2], frame, FRAMES[3]]))


def dims_bytes(*dims: int) -> bytes:
    return struct.pack("<8I", *dims, *[0] * (8 - len(dims)))


FORGED: dict[str, tuple[bytes, str]] = {
    "other magic": (tampered(RECORD, 0, b"KVL2"), "magic"),
    "version 0": (tampered(RECORD, 4, b"\0"), "version"),
    "version 2": (tampered(RECORD, 4, b"\2"), "version"),
    "text kind": (tampered(RECORD, 5, b"\2"), "kind"),
    "unknown kind": (tampered(RECORD, 5, b"\x63"), "kind"),
    "unknown codec": (tampered(RECORD, 6, b"\x07"), "codec"),
    "raw called zstd": (tampered(RECORD, 6, b"\2"), "codec"),
    "gzip called zstd": (tampered(PACKED, 6, b"\2"), "codec"),
    "zstd called raw": (tampered(ZSTD, 6, b"\0"), "codec"),
    "zstd called gzip": (tampered(ZSTD, 6, b"\1"), "codec"),
    "raw called gzip": (tampered(RECORD, 6, b"\1"), "codec"),
    "gzip called raw": (tampered(PACKED, 6, b"\0"), "codec"),
    "precision fp16": (tampered(RECORD, 7, b"\2"), "precision"),
    "precision int8": (tampered(RECORD, 7, b"\4"), "precision"),
    "precision unknown": (tampered(RECORD, 7, b"\0"), "precision"),
    "precision 6": (tampered(RECORD, 7, b"\6"), "precision"),
    "dtype unknown": (tampered(RECORD, 8, b"\0"), "dims"),
    "seal aes-gcm": (tampered(RECORD, 9, b"\2"), "key_id"),
    "seal unknown": (tampered(RECORD, 9, b"\0"), "key_id"),
    "seal 3": (tampered(RECORD, 9, b"\3"), "key_id"),
    "key id": (tampered(RECORD, 12, b"\1\0\0\0"), "key_id"),
    "no dims": (tampered(RECORD, 10, b"\0"), "dims"),
    "fewer dims": (tampered(RECORD, 10, b"\4"), "dims"),
    "more dims": (tampered(RECORD, 10, b"\6"), "dims"),
    "nine dims": (tampered(RECORD, 10, b"\x09"), "dims"),
    "dims swapped": (tampered(RECORD, 16, dims_bytes(2, 2, 4, 1, 3)), "dims"),
    "dims larger": (tampered(RECORD, 16, dims_bytes(2, 2, 1, 8, 3)), "dims"),
    "length too small": (tampered(RECORD, 48, struct.pack("<Q", 4)), "length"),
    "length huge": (tampered(RECORD, 48, struct.pack("<Q", 2**64 - 1)), "length"),
    "other key": (tampered(RECORD, 64, bytes(32)), "key"),
    "last byte of the key": (tampered(RECORD, 95, b"\xff"), "key"),
    "other checksum": (RECORD[:96] + bytes(8) + RECORD[104:], "checksum"),
    "checksum with a tail": (flipped(RECORD, 127), "checksum"),
    "short payload": (with_payload(RECORD, RECORD[128:-4]), "codec"),
    "long payload": (with_payload(RECORD, RECORD[128:] + bytes(4)), "codec"),
    "empty payload": (with_payload(RECORD, b""), "codec"),
    "empty gzip payload": (with_payload(PACKED, b""), "codec"),
    "gzip cut short": (with_payload(PACKED, PACKED[128:-5]), "codec"),
    "gzip of less": (with_payload(PACKED, gzip.compress(bytes(188))), "codec"),
    "gzip of more": (with_payload(PACKED, gzip.compress(bytes(196))), "codec"),
    "gzip with a tail": (with_payload(PACKED, PACKED[128:] + b"tail"), "codec"),
    "gzip twice": (with_payload(PACKED, gzip.compress(bytes(96)) + gzip.compress(bytes(96))), "codec"),
    "gzip with a wrong sum": (with_payload(PACKED, PACKED[128:-8] + bytes(8)), "codec"),
    "zlib instead of gzip": (with_payload(PACKED, zlib.compress(RECORD[128:])), "codec"),
    "not gzip at all": (with_payload(PACKED, b"\xff" * 50), "codec"),
    "zstd without anything": (with_payload(ZSTD, b""), "codec"),
    "zstd lengths cut short": (with_payload(ZSTD, ZSTD[128 : 128 + 15]), "codec"),
    "zstd lengths without frames": (with_payload(ZSTD, ZSTD[128 : 128 + 16]), "codec"),
    "zstd lengths of nothing": (with_payload(ZSTD, bytes(16)), "codec"),
    "zstd lengths one too large": (with_payload(ZSTD, framed(FRAMES, [*TOLD[:3], TOLD[3] + 1])), "codec"),
    "zstd lengths one too small": (with_payload(ZSTD, framed(FRAMES, [*TOLD[:3], TOLD[3] - 1])), "codec"),
    "zstd lengths huge": (with_payload(ZSTD, framed(FRAMES, [2**32 - 1] * 4)), "codec"),
    "zstd lengths that cut frames": (
        with_payload(ZSTD, framed(FRAMES, [TOLD[0] + 1, TOLD[1] - 1, *TOLD[2:]])),
        "codec",
    ),
    "zstd payload cut short": (with_payload(ZSTD, ZSTD[128:-1]), "codec"),
    "zstd payload with a tail": (with_payload(ZSTD, ZSTD[128:] + b"x"), "codec"),
    "zstd of three frames": (with_payload(ZSTD, framed(FRAMES[:3])), "codec"),
    "zstd of five frames": (with_payload(ZSTD, framed([*FRAMES, FRAMES[0]])), "codec"),
    "zstd frame of less": (third(zstandard.compress(bytes(47))), "codec"),
    "zstd frame of more": (third(zstandard.compress(bytes(49))), "codec"),
    "zstd frame of nothing": (third(zstandard.compress(b"")), "codec"),
    "zstd frame missing": (third(b""), "codec"),
    "zstd frame without a size": (third(UNSIZED), "codec"),
    "zstd frame that claims a terabyte": (third(by_hand(2**40, zstd_block(bytes(48)))), "codec"),
    "zstd frame that claims all there is": (third(by_hand(2**64 - 3, zstd_block(bytes(48)))), "codec"),
    "zstd frame that unpacks to less": (third(by_hand(48, zstd_block(bytes(47)))), "codec"),
    "zstd frame that unpacks to one more": (third(by_hand(48, zstd_block(bytes(49)))), "codec"),
    "zstd frame that unpacks to much more": (third(by_hand(48, *MANY, zstd_block(b"\0", 48))), "codec"),
    "zstd frame without an end": (third(by_hand(48, zstd_block(bytes(48), last=False))), "codec"),
    "zstd frame cut short": (third(FRAMES[2][:-1]), "codec"),
    "zstd frame with a tail": (third(FRAMES[2] + b"x"), "codec"),
    "zstd frame twice": (third(FRAMES[2] + FRAMES[2]), "codec"),
    "zstd skippable frame": (third(SKIPPABLE), "codec"),
    "zstd skippable frame first": (third(SKIPPABLE + FRAMES[2]), "codec"),
    "zstd skippable frame last": (third(FRAMES[2] + SKIPPABLE), "codec"),
    "zstd frame with a wrong sum": (third(SUMMED[:-4] + bytes(4)), "codec"),
    "zstd not at all": (third(b"\xff" * 48), "codec"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_record_is_refused_with_its_reason(name: str) -> None:
    value, reason = FORGED[name]
    assert reason_of(value, Format(), SHAPE) == reason
    assert reason_of(value, Format(), SHAPE, out=torch.empty(SHAPE)) == reason


def test_an_honest_reseal_is_accepted() -> None:
    """Otherwise every forged record above might be refused for its checksum alone."""
    assert same_bits(record.decode(resealed(RECORD), KEY, Format(), SHAPE), golden_tensor())
    again = with_payload(PACKED, gzip.compress(RECORD[128:]))
    assert same_bits(record.decode(again, KEY, Format(), SHAPE), golden_tensor())


@pytest.mark.parametrize(
    "frame",
    [FRAMES[2], SUMMED, zstandard.compress(BYTE_PLANES[2], 19), by_hand(48, zstd_block(BYTE_PLANES[2]))],
    ids=["level 3", "with a checksum", "level 19", "by hand"],
)
def test_zstd_frames_of_any_other_writer_are_accepted(frame: bytes) -> None:
    assert same_bits(record.decode(third(frame), KEY, Format(), SHAPE), golden_tensor())


def test_a_zstd_payload_is_what_the_text_says() -> None:
    lengths = struct.unpack("<4I", ZSTD[128:144])
    at = 144
    for length, plane in zip(lengths, BYTE_PLANES, strict=True):
        assert zstandard.decompress(ZSTD[at : at + length]) == plane
        at += length
    assert at == len(ZSTD)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("change", [-12, -8, -1, 1, 8])
def test_integers_of_another_length_are_refused(precision: str, change: int) -> None:
    honest = encoded(golden_tensor(), Format(precision))
    payload = honest[128:change] if change < 0 else honest[128:] + bytes(change)
    assert reason_of(with_payload(honest, payload), Format(precision), SHAPE) == "codec"
    packed = encoded(golden_tensor(), Format(precision, "gzip"))
    assert reason_of(with_payload(packed, gzip.compress(payload)), Format(precision), SHAPE) == "codec"
    planes = encoded(golden_tensor(), Format(precision, "zstd"))
    frames = frames_of(planes, 6 if precision == "int8" else 8)
    assert with_payload(planes, framed(frames)) == planes
    frames[0] = zstandard.compress(bytes(len(zstandard.decompress(frames[0])) + change))
    assert reason_of(with_payload(planes, framed(frames)), Format(precision), SHAPE) == "codec"


def frames_of(value: bytes, count: int) -> list[bytes]:
    """The frames of a zstd record."""
    ends = np.cumsum([128 + 4 * count, *struct.unpack_from(f"<{count}I", value, 128)]).tolist()
    assert ends[-1] == len(value)
    return [value[at:end] for at, end in pairwise(ends)]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dims", [(2, 3, 1, 4, 2), (2, 1, 2, 4, 3), (48,), (2, 2, 12), (4, 12)], ids=str)
def test_integers_of_a_shape_without_planes_are_refused(precision: str, dims: tuple[int, ...]) -> None:
    honest = encoded(golden_tensor(), Format(precision))
    forged = tampered(tampered(honest, 10, bytes([len(dims)])), 16, dims_bytes(*dims))
    assert reason_of(forged, Format(precision), dims) == "dims"
    assert reason_of(forged, Format(precision), None) == "dims"


@pytest.mark.parametrize("dims", [(2**32 - 1,) * 8, (2, 2**30), (2**15, 2**14)], ids=str)
@pytest.mark.parametrize("value", [RECORD, PACKED, ZSTD], ids=CODECS)
def test_where_any_shape_is_accepted_the_size_is_bounded(dims: tuple[int, ...], value: bytes) -> None:
    forged = tampered(tampered(value, 10, bytes([len(dims)])), 16, dims_bytes(*dims))
    assert reason_of(forged, Format(), None) == "overflow"


def test_a_forged_shape_without_elements_is_refused_or_empty() -> None:
    forged = tampered(tampered(RECORD, 10, b"\5"), 16, dims_bytes(2, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    assert reason_of(with_payload(forged, b""), Format(), None) in {"dims", "overflow"}


BOMBS = {
    "gzip": with_payload(PACKED, gzip.compress(bytes(64 << 20))),
    "gzip in gzip": with_payload(PACKED, gzip.compress(gzip.compress(bytes(64 << 20)))),
    "zstd": with_payload(ZSTD, framed([zstandard.compress(bytes(64 << 20))] * 4)),
    "zstd that claims a terabyte": third(by_hand(2**40, *MANY, zstd_block(b"\0", 1 << 17))),
    "zstd that claims 48 bytes": third(by_hand(48, *MANY, zstd_block(b"\0", 1 << 17))),
    "zstd that claims nothing": third(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("shape", [SHAPE, None])
def test_a_bomb_is_refused_without_unpacking_it(name: str, shape: Any) -> None:
    tracemalloc.start()
    try:
        assert reason_of(BOMBS[name], Format(), shape) == "codec"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_decoding_makes_no_more_than_a_few_copies(precision: str, codec: str) -> None:
    tensor = torch.zeros(2, 2, 2, 128, 512)
    fmt = Format(precision, codec)
    value, out = encoded(tensor, fmt), torch.empty(tensor.shape)
    tracemalloc.start()
    try:
        record.decode(value, KEY, fmt, tuple(tensor.shape), out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * tensor.nbytes


def test_a_record_is_only_for_the_precision_asked_for() -> None:
    """And for any reader of that precision, whatever codec it would write with."""
    for wrote in FORMATS:
        for asked in FORMATS:
            value = encoded(golden_tensor(), wrote)
            if wrote.precision == asked.precision:
                assert same_bits(record.decode(value, KEY, asked, SHAPE), expected(asked.precision))
            else:
                assert reason_of(value, asked, SHAPE) == "precision"


def test_a_text_record_is_no_block_and_a_block_no_text() -> None:
    text = encoded(golden_tensor(), Format(), kind=record.KIND_TEXT)
    assert reason_of(text, Format(), SHAPE) == "kind"
    assert reason_of(RECORD, Format(), None, kind=record.KIND_TEXT) == "kind"
    assert same_bits(record.decode(text, KEY, Format(), None, record.KIND_TEXT), golden_tensor())
