"""Records of opaque elements: blocks in the memory layout of an engine, and descriptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import DistributedKVCache
from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.record import KIND_BLOCK, KIND_DESCRIPTION, KIND_ENGINE, BadRecord, Format
from kvlab.core.seals import AesGcm
from kvlab.errors import ConfigError, InputError

KEY = bytes(range(32))
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def value_of(elements: np.ndarray, fmt: Format, key: bytes = KEY, kind: int = KIND_ENGINE) -> bytes:
    return b"".join(record.encode_opaque(elements, key, fmt, kind))


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 5), min_size=1, max_size=7),
    st.sampled_from(sorted(CODECS)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_elements_come_back_bit_by_bit(width: int, shape: list[int], codec: str, hidden: bool, random: object) -> None:
    fmt = Format("opaque", codec, AesGcm({1: bytes(32)}) if hidden else Format().seal)
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    elements = rng.integers(0, 2 ** (8 * width), size=shape, dtype=DTYPES[width])
    value = value_of(elements, fmt)
    got = record.decode_opaque(value, KEY, fmt, (*shape, width))
    assert got.dtype == elements.dtype and np.array_equal(got, elements)
    assert np.array_equal(record.decode_opaque(value, KEY, fmt, None), elements)
    assert len(value) <= record.max_record_bytes(fmt, (*shape, width), KIND_ENGINE)


@pytest.mark.parametrize("codec", CODECS)
def test_every_changed_byte_and_every_other_request_is_refused(codec: str) -> None:
    fmt = Format("opaque", codec)
    elements = np.arange(60, dtype=np.uint16).reshape(3, 20)
    value = value_of(elements, fmt)
    assert record.decode_opaque(value, KEY, fmt, (3, 20, 2)) is not None
    for at in range(len(value)):
        with pytest.raises(BadRecord):
            record.decode_opaque(value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :], KEY, fmt, (3, 20, 2))
    for key, shape, kind, reason in (
        (bytes(32), (3, 20, 2), KIND_ENGINE, "key"),
        (KEY, (3, 10, 4), KIND_ENGINE, "dims"),
        (KEY, (3, 40, 1), KIND_ENGINE, "dims"),
        (KEY, (60, 2), KIND_ENGINE, "dims"),
        (KEY, (3, 20, 2), KIND_DESCRIPTION, "kind"),
        (KEY, (3, 20, 2), KIND_BLOCK, "kind"),
    ):
        with pytest.raises(BadRecord) as refused:
            record.decode_opaque(value, key, fmt, shape, kind)
        assert refused.value.reason == reason
    with pytest.raises(BadRecord) as refused:
        record.decode_opaque(value, KEY, fmt, (3, 20, 2), max_bytes=100)
    assert refused.value.reason == "overflow"


def test_a_block_of_tensors_is_never_read_as_opaque_nor_the_other_way_round() -> None:
    tensor = torch.zeros(1, 2, 1, 4, 4)
    block = b"".join(record.encode(tensor, KEY, Format()))
    with pytest.raises(BadRecord, match="precision"):
        record.decode_opaque(block, KEY, Format("opaque"), None, KIND_BLOCK)
    opaque = value_of(np.zeros((1, 2, 1, 4), np.uint32), Format("opaque"), kind=KIND_BLOCK)
    with pytest.raises(BadRecord, match="precision"):
        record.decode(opaque, KEY, Format(), None)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.float32, [4]), (np.uint64, [4]), (np.int16, [4]), (np.uint8, []), (np.uint8, [1] * 8)],
)
def test_other_elements_are_refused(dtype: type, shape: list[int]) -> None:
    elements = np.zeros(shape, dtype)
    with pytest.raises(InputError, match="unsigned integers of 1, 2 or 4 bytes"):
        record.encode_opaque(elements, KEY, Format("opaque"))


def test_the_precision_of_a_tensor_and_opaque_do_not_mix() -> None:
    with pytest.raises(InputError, match="opaque elements"):
        record.encode_opaque(np.zeros(4, np.uint8), KEY, Format("fp32"))
    with pytest.raises(InputError, match="a precision for it"):
        record.encode(torch.zeros(1, 2, 1, 4, 4), KEY, Format("opaque"))
    with pytest.raises(InputError, match="32 bytes"):
        record.encode_opaque(np.zeros(4, np.uint8), b"short", Format("opaque"))
    with pytest.raises(ConfigError, match="precisions"):
        DistributedKVCache(precision="opaque")
