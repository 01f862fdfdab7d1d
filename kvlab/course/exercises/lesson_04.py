"""The exercises of notebook 04, serialization: byte planes, integers with a scale, and writing and reading a record."""

from __future__ import annotations

import struct

import torch
import xxhash
from torch import Tensor

from kvlab.core.record import Format, encode
from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import open_record, pack_record


def unshuffle(planes: bytes, size: int) -> bytes:
    """The numbers of `size` bytes each whose byte planes these are: the way back from `shuffle`."""
    count = len(planes) // size
    return b"".join(planes[i::count] for i in range(count))


def _shuffled_again(planes: bytes, size: int) -> bytes:
    return b"".join(planes[i::size] for i in range(size))


def _numbers_reversed(planes: bytes, size: int) -> bytes:
    count = len(planes) // size
    return b"".join(planes[i::count][::-1] for i in range(count))


def _two_planes_only(planes: bytes, size: int) -> bytes:
    half = len(planes) // 2
    return b"".join(bytes(pair) for pair in zip(planes[:half], planes[half:]))


def _first_number_only(planes: bytes, size: int) -> bytes:
    return planes[:: len(planes) // size]


UNSHUFFLE = Exercise(
    name="unshuffle",
    number="04.1",
    difficulty=2,
    reference=unshuffle,
    cases=(
        (b"abcABC", 2),
        (bytes(range(12)), 4),
        (b"plain", 1),
        (b"1234", 4),
        (b"", 2),
    ),
    wrong=(
        Wrong(_shuffled_again, "shuffling twice is no way back: a plane has as many bytes as there are numbers"),
        Wrong(_numbers_reversed, "the first plane has the first byte of each number: keep that order"),
        Wrong(_two_planes_only, "numbers may have 1, 2 or 4 bytes: there are `size` planes, not always two"),
        Wrong(_first_number_only, "that is one number: do the same from the next byte on, once for each number"),
    ),
    hint="there are len(planes) // size numbers; number i has byte i of each plane",
    after="Shuffling exchanges the rows and columns of a table of bytes, and so does the way back.",
)


def quantise_int8(x: Tensor, axis: int) -> Tensor:
    """`x` as it comes back from integers of -127 … 127, one scale for each group along `axis`."""
    scale = (x.abs().amax(axis, keepdim=True) / 127).clamp_min(2.0**-126)
    integers = (x / scale).round().to(torch.int8)
    return integers * scale


def _quantised(x: Tensor, scale: Tensor) -> Tensor:
    integers = (x / scale.clamp_min(2.0**-126)).round().to(torch.int32)
    return ((integers + 128) % 256 - 128) * scale  # what does not fit into 8 bits wraps around


def _one_scale_for_all(x: Tensor, axis: int) -> Tensor:
    return _quantised(x, x.abs().max() / 127)


def _groups_across_the_axis(x: Tensor, axis: int) -> Tensor:
    others = [i for i in range(x.ndim) if i != axis % x.ndim]
    return _quantised(x, x.abs().amax(others, keepdim=True) / 127)


def _cut_instead_of_rounded(x: Tensor, axis: int) -> Tensor:
    scale = (x.abs().amax(axis, keepdim=True) / 127).clamp_min(2.0**-126)
    return (x / scale).trunc() * scale


def _a_level_too_many(x: Tensor, axis: int) -> Tensor:
    return _quantised(x, x.abs().amax(axis, keepdim=True) / 128)


def _largest_with_its_sign(x: Tensor, axis: int) -> Tensor:
    return _quantised(x, x.amax(axis, keepdim=True) / 127)


def _axis_lost(x: Tensor, axis: int) -> Tensor:
    scale = (x.abs().amax(axis) / 127).clamp_min(2.0**-126)
    return (x / scale).round() * scale


def _integers_alone(x: Tensor, axis: int) -> Tensor:
    scale = (x.abs().amax(axis, keepdim=True) / 127).clamp_min(2.0**-126)
    return (x / scale).round().to(torch.int8)


def _clamped_at_one(x: Tensor, axis: int) -> Tensor:
    scale = x.abs().amax(dim=axis, keepdim=True).clamp_min(1) / 127
    return (x / scale).round().to(torch.int8) * scale


QUANTISE = Exercise(
    name="quantise_int8",
    number="04.2",
    difficulty=3,
    reference=quantise_int8,
    cases=(
        (torch.tensor([[1.0, -2.0, 0.3], [50.0, 7.7, -100.0]]), 1),
        (torch.tensor([[1.0, 90.0], [-0.55, 40.7], [0.3, -100.0]]), 0),
        (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4)) * 10, -1),
        (torch.tensor([[0.0, 0.0], [3.0, 1.7]]), -1),
        (torch.tensor([[0.01, -0.02, 0.003], [0.5, 0.07, -1.0]]), 1),
    ),
    wrong=(
        Wrong(
            _clamped_at_one,
            "groups of small numbers lost all their digits: the bound that keeps a scale from 0 must be tiny",
        ),
        Wrong(_one_scale_for_all, "one scale for everything lets the largest group spoil the others: amax over `axis`"),
        Wrong(_groups_across_the_axis, "a group runs along `axis`: take amax over that axis, with keepdim"),
        Wrong(_cut_instead_of_rounded, "turning a float into an integer cuts it off: round first"),
        Wrong(_a_level_too_many, "8 bits end at 127: +128 wraps around to -128, so divide the largest by 127"),
        Wrong(_largest_with_its_sign, "the largest number may be negative: take the absolute values first"),
        Wrong(_axis_lost, "the scales need the shape of the groups: keepdim=True keeps the axis"),
        Wrong(_integers_alone, "these are the integers; multiply them by the scale to come back"),
    ),
    hint="scale = largest absolute value along `axis` (keepdim) / 127; divide, round, multiply; mind groups of zeros",
    after="kvlab does this for keys along the tokens, and stores the scales as 16-bit numbers.",
)


def _packed(
    block: Tensor,
    key: bytes,
    order: str = "<",
    length: int | None = None,
    sealed: str = "header zeros payload",
    seal_order: str = "little",
    zeros: int = 24,
    payload: bytes | None = None,
) -> bytes:
    """A record as `pack_record` writes it, but for what the arguments change."""
    if payload is None:
        payload = block.contiguous().numpy().astype(f"{order}f4").tobytes()
    dims = [*block.shape, *[0] * (8 - block.ndim)]
    length = len(payload) if length is None else length
    codes = (1, 1, 0, 1, 1, 1, block.ndim, 0)
    header = struct.pack(f"{order}4s8BI8IQQ32s", b"KVL1", *codes, 0, *dims, length, 0, key)
    pieces = {"header": header, "zeros": bytes(32), "payload": payload}
    digest = xxhash.xxh3_64_intdigest(b"".join(pieces[name] for name in sealed.split()))
    return header + digest.to_bytes(8, seal_order) + bytes(zeros) + payload  # type: ignore[arg-type]


def _payload_alone_summed(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, sealed="payload")


def _seal_field_left_out(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, sealed="header payload")


def _header_alone_summed(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, sealed="header zeros")


def _key_left_out(block: Tensor, key: bytes) -> bytes:
    return _packed(block, bytes(32))


def _big_endian(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, order=">", payload=block.contiguous().numpy().tobytes())


def _seal_big_endian(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, seal_order="big")


def _seal_too_short(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, zeros=0)


def _whole_storage(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, payload=bytes(block.untyped_storage()))


def _numbers_counted(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, length=block.numel())


def _header_counted(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, length=128 + 4 * block.numel())


def _dims_of_this_block_only(block: Tensor, key: bytes) -> bytes:
    payload = block.contiguous().numpy().tobytes()
    dims = struct.pack(f"<{block.ndim}I", *block.shape)
    header = struct.pack("<4s8BI", b"KVL1", 1, 1, 0, 1, 1, 1, block.ndim, 0, 0) + dims
    header += struct.pack("<QQ32s", len(payload), 0, key)
    digest = xxhash.xxh3_64_intdigest(header + bytes(32) + payload)
    return header + digest.to_bytes(8, "little") + bytes(24) + payload


def _too_few_arguments(block: Tensor, key: bytes) -> bytes:
    payload = block.contiguous().numpy().tobytes()
    codes = (1, 1, 0, 1, 1, 1, block.ndim, 0)
    return struct.pack("<4s8BI8IQQ32s", b"KVL1", *codes, 0, *block.shape, len(payload), 0, key)


def _not_contiguous(block: Tensor, key: bytes) -> bytes:
    return _packed(block, key, payload=block.view(-1).numpy().tobytes())


_KV = torch.arange(96.0).reshape(1, 2, 1, 12, 4)

PACK_RECORD = Exercise(
    name="pack_record",
    number="04.3",
    difficulty=3,
    reference=pack_record,
    cases=(
        (torch.arange(16.0).reshape(1, 2, 1, 2, 4), bytes(range(32))),
        (_KV[:, :, :, 4:8], bytes(range(100, 132))),
        (torch.tensor([[0.5, -2.0], [1e9, 0.0]]), bytes(range(32))),
    ),
    wrong=(
        Wrong(_payload_alone_summed, "this checksum covers the payload only: damage to the header would go unnoticed"),
        Wrong(_seal_field_left_out, "the seal's own 32 bytes count too, as zeros, between header and payload"),
        Wrong(_header_alone_summed, "this checksum covers the header only: add the payload"),
        Wrong(_key_left_out, "bytes 64 to 95 are the key: without it a reader cannot notice a mixed-up record"),
        Wrong(_big_endian, "> writes the highest byte first; records are little-endian, so begin the format with <"),
        Wrong(_seal_big_endian, "the checksum too is little-endian: intdigest() and to_bytes(8, 'little')"),
        Wrong(_seal_too_short, "the seal field has 32 bytes: 8 of checksum, then 24 zeros"),
        Wrong(_whole_storage, "a slice shares memory with the whole tensor: copy its own numbers with contiguous()"),
        Wrong(_numbers_counted, "the payload length is in bytes, and a float32 has 4 of them"),
        Wrong(_header_counted, "the payload length does not count the header"),
        Wrong(_dims_of_this_block_only, "every header has room for 8 dims: fill the unused ones with zeros"),
        Wrong(_too_few_arguments, "8I needs 8 numbers: fill up the dims of the block with zeros"),
        Wrong(_not_contiguous, "a slice of a larger tensor is not contiguous: copy it with contiguous() first"),
    ),
    hint="96 bytes of fields by the table, then the checksum (8 bytes), 24 zeros, and the payload",
    after="MiniCache, the cache in your mykv.py, now writes your records.",
)


def _key_never_checked(value: bytes, key: bytes) -> str:
    return open_record(value, value[64:96])


def _checksum_before_version(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "checksum" if reason == "version" else reason


def _key_before_checksum(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "key" if reason == "checksum" and value[64:96] != key else reason


def _seal(header: bytes, payload: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(header[:96] + bytes(32) + payload).to_bytes(8, "little") + bytes(24)


def _without_the_length(value: bytes, key: bytes) -> str:
    """What `open_record` says of a value whose payload length it does not look at."""
    reason = open_record(value, key)
    if reason != "length" or len(value) < 128:
        return reason
    if value[96:128] != _seal(value, value[128:]):
        return "checksum"
    return "ok" if value[64:96] == key else "key"


def _length_never_checked(value: bytes, key: bytes) -> str:
    return _without_the_length(value, key)


def _longer_values_taken(value: bytes, key: bytes) -> str:
    if len(value) >= 128 and struct.unpack_from("<Q", value, 48)[0] <= len(value) - 128:
        return _without_the_length(value, key)
    return open_record(value, key)


def _tuple_for_the_length(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return reason if reason in ("magic", "version") else "length"  # a tuple is never equal to a number


def _payload_alone_sealed(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "checksum" if reason in ("ok", "key") else reason


def _eight_bytes_compared(value: bytes, key: bytes) -> str:
    return open_record(value[:104] + bytes(24) + value[128:] if len(value) >= 128 else value, key)


def _short_values_read(value: bytes, key: bytes) -> str:
    if value[:4] != b"KVL1":
        return "magic"
    if value[4] != 1:
        return "version"
    return open_record(value, key)


def _records() -> list[tuple[bytes, bytes]]:
    """Two good records and values that are none, each with the key that was asked for."""
    key, block = bytes(range(32)), torch.arange(16.0).reshape(1, 2, 1, 2, 4)
    good = b"".join(encode(block, key, Format("fp16")))
    newer = good[:4] + b"\x02" + good[5:]  # its seal, whatever a version 2 has, is none of ours
    bad_key = good[:70] + b"\xff" + good[71:]
    bad_payload = good[:-1] + bytes([good[-1] ^ 1])
    bad_seal = good[:127] + b"\x01" + good[128:]
    longer = good[128:] + b"more"
    too_long = good[:96] + _seal(good, longer) + longer  # sealed as a whole, but not what the header says
    older = good[:4] + b"\x00" + good[5:]
    far_longer = good[:52] + b"\x01" + good[53:]  # says 2**32 bytes more
    header = good[:48] + bytes(8) + good[56:96]
    empty = header + _seal(header, b"")  # 128 bytes, no payload
    bad = (bad_payload, bad_key, bad_seal, too_long, older, far_longer)
    values = (good, empty, good[:100], b"GIF8" + good[4:], newer, good[:-2], *bad, b"KVL1")
    return [*((value, key) for value in values), (good, bytes(32))]


OPEN_RECORD = Exercise(
    name="open_record",
    number="04.4",
    difficulty=3,
    reference=open_record,
    cases=_records(),
    wrong=(
        Wrong(_key_never_checked, "an intact record of other tokens is still the wrong one: compare its key"),
        Wrong(_checksum_before_version, "a newer version may seal in another way: tell the version first"),
        Wrong(_key_before_checksum, "a flipped bit in the key field is damage: trust the key only after the checksum"),
        Wrong(_length_never_checked, "the header says how long the payload is: compare that before the checksum"),
        Wrong(_longer_values_taken, "test whether the length is not the same, not only whether bytes are missing"),
        Wrong(_tuple_for_the_length, "struct.unpack_from returns a tuple, also for one number: take its first element"),
        Wrong(_payload_alone_sealed, "the seal covers the header too, with 32 zeros in the place of the seal"),
        Wrong(_eight_bytes_compared, "the seal field has 32 bytes, the last 24 are zeros: compare all of it"),
        Wrong(_short_values_read, "a value of 4 bytes has no version to read: test the 128 bytes first"),
    ),
    hint="in this order: 128 bytes there, magic, version, payload length, checksum, key",
    after="MiniCache asks your function about every value that it reads. Not ok is a miss, and never an error.",
)
