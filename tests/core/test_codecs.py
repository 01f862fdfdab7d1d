"""Codecs: the numbers in the format, and what their payloads are to other programs."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from kvlab.core import codecs, precisions, record
from kvlab.core.seals import AesGcm, Xxh3
from tests.core.test_record_forged import PACKED, RECORD


def test_format_numbers_are_frozen() -> None:
    assert precisions.PRECISIONS == {"fp32": 1, "fp16": 2, "bf16": 3, "int8": 4, "int4": 5}
    assert codecs.CODECS == {"raw": 0, "gzip": 1, "zstd": 2}
    assert (Xxh3.kind, AesGcm.kind) == (1, 2)
    assert (record.MAGIC, record.VERSION, record.KIND_BLOCK, record.KIND_TEXT) == (b"KVL1", 1, 1, 2)


def test_gzip_payloads_are_plain_gzip_without_a_time_stamp() -> None:
    payload = PACKED[128:]
    assert gzip.decompress(payload) == RECORD[128:]
    assert payload[4:8] == bytes(4)


def test_every_codec_in_the_table_packs_as_itself_and_no_other_packs_at_all() -> None:
    part = np.arange(64, dtype=np.uint8)
    assert len({b"".join(map(bytes, codecs.pack([part], codec))) for codec in codecs.CODECS}) == len(codecs.CODECS)
    with pytest.raises(ValueError, match="expected a codec of raw, gzip, zstd, got 'lz4'"):
        codecs.pack([part], "lz4")
