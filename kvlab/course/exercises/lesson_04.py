"""The exercises of notebook 04, serialization: byte planes, integers with a scale, nibbles, a sealed record."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core.record import Format, encode
from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import open_record


def shuffle(data: bytes, size: int) -> bytes:
    """The byte planes of numbers of `size` bytes: all their first bytes, then all their second ones, and so on."""
    return b"".join(data[i::size] for i in range(size))


def _highest_first(data: bytes, size: int) -> bytes:
    return b"".join(data[i::size] for i in reversed(range(size)))


def _bytes_swapped(data: bytes, size: int) -> bytes:
    return b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))


def _two_planes_only(data: bytes, size: int) -> bytes:
    return data[::2] + data[1::2]


SHUFFLE = Exercise(
    name="shuffle",
    number="04.1",
    difficulty=3,
    reference=shuffle,
    cases=((b"aAbBcC", 2), (bytes(range(12)), 4), (b"plain", 1), (b"", 2)),
    wrong=(
        Wrong(_highest_first, "the planes come in the order of the bytes in memory: first bytes first"),
        Wrong(_bytes_swapped, "this turns each number around; a plane has the same byte of all numbers"),
        Wrong(_two_planes_only, "numbers may have 1, 2 or 4 bytes: there are `size` planes"),
    ),
    hint="plane i begins at byte i and takes every size-th byte from there",
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
    ),
    wrong=(
        Wrong(_one_scale_for_all, "one scale for everything lets the largest group spoil the others: amax over `axis`"),
        Wrong(_groups_across_the_axis, "a group runs along `axis`: take amax over that axis, with keepdim"),
        Wrong(_cut_instead_of_rounded, "turning a float into an integer cuts it off: round first"),
        Wrong(_a_level_too_many, "8 bits end at 127: +128 wraps around to -128, so divide the largest by 127"),
    ),
    hint="scale = largest absolute value along `axis` (keepdim) / 127; divide, round, multiply; mind groups of zeros",
)


def pack_nibbles(numbers: list[int]) -> bytes:
    """Two numbers of 0 … 15 in each byte, the first one low; an odd last one gets a 0 beside it."""
    even = [*numbers, 0] if len(numbers) % 2 else numbers
    return bytes(low | high << 4 for low, high in zip(even[::2], even[1::2]))


def _first_one_high(numbers: list[int]) -> bytes:
    even = [*numbers, 0] if len(numbers) % 2 else numbers
    return bytes(a << 4 | b for a, b in zip(even[::2], even[1::2], strict=True))


def _odd_one_lost(numbers: list[int]) -> bytes:
    return bytes(low | high << 4 for low, high in zip(numbers[::2], numbers[1::2], strict=False))


def _halves_paired(numbers: list[int]) -> bytes:
    even = [*numbers, 0] if len(numbers) % 2 else numbers
    half = len(even) // 2
    return bytes(low | high << 4 for low, high in zip(even[:half], even[half:], strict=True))


PACK_NIBBLES = Exercise(
    name="pack_nibbles",
    number="04.3",
    difficulty=3,
    reference=pack_nibbles,
    cases=(([1, 2, 3, 15],), ([7, 8, 9],), ([],), ([0, 15, 15, 0, 5, 10],)),
    wrong=(
        Wrong(_first_one_high, "the first of two goes into the low half: shift the second one"),
        Wrong(_odd_one_lost, "an odd last number must not get lost: put a 0 beside it"),
        Wrong(_halves_paired, "neighbours share a byte: numbers 0 and 1, then 2 and 3"),
    ),
    hint="take pairs of neighbours; a byte is first | second << 4",
)


def _key_never_checked(value: bytes, key: bytes) -> str:
    return open_record(value, value[64:96])


def _checksum_before_version(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "checksum" if reason == "version" else reason


def _key_before_checksum(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "key" if reason == "checksum" and value[64:96] != key else reason


def _length_never_checked(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "checksum" if reason == "length" and len(value) >= 128 else reason


def _payload_alone_sealed(value: bytes, key: bytes) -> str:
    reason = open_record(value, key)
    return "checksum" if reason in ("ok", "key") else reason


def _records() -> list[tuple[bytes, bytes]]:
    """One good record and six that are not, each with the key that was asked for."""
    key, block = bytes(range(32)), torch.arange(16.0).reshape(1, 2, 1, 2, 4)
    good = b"".join(encode(block, key, Format("fp16")))
    newer = good[:4] + b"\x02" + good[5:]  # its seal, whatever a version 2 has, is none of ours
    bad_key = good[:70] + b"\xff" + good[71:]
    bad_payload = good[:-1] + bytes([good[-1] ^ 1])
    values = (good, good[:100], b"GIF8" + good[4:], newer, good[:-2], bad_payload, bad_key)
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
        Wrong(_payload_alone_sealed, "the seal covers the header too, with 32 zeros in the place of the seal"),
    ),
    hint="in this order: 128 bytes there, magic, version, payload length, checksum, key",
)
