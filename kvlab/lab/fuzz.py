"""Fuzzing: decodes records that were damaged, forged or exchanged on purpose.

    python -m kvlab bench fuzz --n 1000000 --seed 1 --json

Each case changes an intact record with knowledge of the format: changed header fields with a
recomputed checksum, wrong lengths and frame tables, decompression bombs, records of another key,
shape, kind, precision or tenant, shortened and lengthened values, bit flips, and random bytes. The
record is then decoded as the cache decodes records.

Decoding must raise `BadRecord` or return exactly the right tensor (after a change that has no
effect). Every other result is counted:

    wrong_tensors    decoding returned another tensor
    uncaught         decoding raised an exception other than `BadRecord`
    over_allocated   decoding allocated more than three fp32 tensors, two copies of the value and 64 KiB
"""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zstandard
from torch import Tensor

from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import HEADER_BYTES, KIND_BLOCK, KIND_TEXT, BadRecord, Format
from kvlab.core.seals import AesGcm, Seal, Xxh3
from kvlab.lab.machine import describe_machine, versions

SHAPES = ((2, 2, 1, 4, 3), (1, 2, 2, 16, 8))
SLACK = 64 << 10  # bytes for Python objects and headers
SEAL_AT = 96
ANOTHER_KEY = b"\xee" * 32
FIELDS = {  # offset and size of every header field that a forger can set
    "magic": (0, 4),
    "version": (4, 1),
    "kind": (5, 1),
    "codec": (6, 1),
    "precision": (7, 1),
    "dtype": (8, 1),
    "seal": (9, 1),
    "ndim": (10, 1),
    "zero": (11, 1),
    "key_id": (12, 4),
    "dims": (16, 32),
    "length": (48, 8),
    "reserved": (56, 8),
    "key": (64, 32),
}
ABOUT = (
    "each case decodes a record that was damaged or forged on purpose; wrong_tensors, uncaught and over_allocated must "
    "be 0; by_reason: number of cases by result; by_case: number of cases by kind of damage"
)
EXTREMES = (0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Target:
    """A requested format, shape and key, the intact record, and the tensor that decoding must return."""

    fmt: Format
    shape: tuple[int, ...]
    key: bytes
    value: bytes
    right: Tensor

    @property
    def allowed(self) -> int:
        """Bytes that decoding may allocate in addition to copies of the value: three fp32 tensors and `SLACK`."""
        return 3 * 4 * self.right.numel() + SLACK


Spoil = Callable[[random.Random, Target, list[Target]], bytes]


def run(n: int = 100_000, seed: int = 0) -> dict[str, Any]:
    """Run `n` cases. The same seed gives the same cases, except for the nonces of encrypted records."""
    rng, targets = random.Random(seed), _targets()
    counts = Counter(wrong_tensors=0, uncaught=0, over_allocated=0)
    reasons: Counter[str] = Counter()
    by_case: Counter[str] = Counter()
    examples: list[str] = []
    tracemalloc.start()
    try:
        for i in range(n):
            target = rng.choice(targets)
            name = rng.choice(tuple(CASES))
            value = CASES[name](rng, target, targets)
            verdict, reason = _decode(target, value)
            reasons[reason] += 1
            by_case[name] += 1
            for bad in verdict:
                counts[bad] += 1
                examples.append(f"case {i}, {name}, {target.fmt.precision}-{target.fmt.codec}: {bad} {reason}")
    finally:
        tracemalloc.stop()
    return {
        "about": ABOUT,
        "ok": not any(counts.values()),
        "n": n,
        "seed": seed,
        **counts,
        "by_reason": dict(sorted(reasons.items())),
        "by_case": dict(sorted(by_case.items())),
        "examples": examples[:10],
        "machine": describe_machine(),
        "versions": versions(),
    }


def _decode(target: Target, value: bytes) -> tuple[list[str], str]:
    """Decode a value. Returns the failures and the result: a `BadRecord` reason, "right" or an exception's name."""
    out = torch.full(target.shape, 7.0)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    bad, reason = [], "right"
    try:
        record.decode(value, target.key, target.fmt, target.shape, out=out)
        if not torch.equal(out, target.right):
            bad.append("wrong_tensors")
    except BadRecord as error:
        reason = error.reason
    except Exception as error:
        reason = type(error).__name__
        bad.append("uncaught")
    if tracemalloc.get_traced_memory()[1] - before > target.allowed + 2 * len(value):
        bad.append("over_allocated")
    return bad, reason


def _targets() -> list[Target]:
    seals: tuple[Seal, ...] = (Xxh3(), AesGcm({1: bytes(32), 2: bytes(range(32))}, b"one"), AesGcm({2: b"x" * 32}))
    made = []
    for i, shape in enumerate(SHAPES):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for key in (bytes([i]) * 32, bytes([i + 100]) * 32):
            for seal in seals:
                formats = [Format(p, c, seal) for p in PRECISIONS for c in CODECS]
                made += [_target(tensor + key[0], key, fmt) for fmt in formats]
    return made


def _target(tensor: Tensor, key: bytes, fmt: Format) -> Target:
    value = b"".join(record.encode(tensor, key, fmt))
    return Target(fmt, tuple(tensor.shape), key, value, record.decode(value, key, fmt, tensor.shape))


# --- kinds of damage ----------------------------------------------------------------------------
def _resealed(value: bytes) -> bytes:
    """The value with a matching checksum. Only xxh3 can be recomputed; an encrypted record stays invalid."""
    if len(value) < HEADER_BYTES or value[9] != Xxh3.kind:
        return value
    seal = Xxh3().close(value[:SEAL_AT], (value[HEADER_BYTES:],))[0]
    return value[:SEAL_AT] + seal + value[HEADER_BYTES:]


def _with_payload(value: bytes, payload: bytes) -> bytes:
    return _resealed(value[:48] + struct.pack("<Q", len(payload)) + value[56:HEADER_BYTES] + payload)


def _flip_bits(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    value = bytearray(target.value)
    for _bit in range(rng.choice((1, 1, 1, 2, 8))):
        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
    return bytes(value)


def _set_fields(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    value = bytearray(target.value)
    for _field in range(rng.choice((1, 1, 2, 3))):
        at, size = FIELDS[rng.choice(tuple(FIELDS))]
        if size == 32 and rng.random() < 0.8:  # one dim, or four bytes of the key
            at, size = at + 4 * rng.randrange(8), 4
        number = rng.choice((rng.choice(EXTREMES), rng.getrandbits(8 * size)))
        value[at : at + size] = (number % 256**size).to_bytes(size, "little")
    return _resealed(bytes(value))


def _cut_or_stretch(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    value = target.value
    cut = value[: rng.randrange(len(value))]
    stretched = value + rng.randbytes(rng.choice((1, 3, 4, 64)))
    changed = rng.choice((cut, stretched))
    if len(changed) < HEADER_BYTES or rng.random() < 0.3:
        return changed
    return _with_payload(changed, changed[HEADER_BYTES:])


def _other_record(rng: random.Random, target: Target, targets: list[Target]) -> bytes:
    """Another intact record, sometimes with the key or the whole header of the requested record."""
    other = rng.choice([t for t in rng.sample(targets, 8) if t.value is not target.value])
    if rng.random() < 0.5:
        return other.value
    if rng.random() < 0.5 and (other.shape, other.fmt.precision) != (target.shape, target.fmt.precision):
        return _resealed(other.value[:64] + target.key + other.value[SEAL_AT:])
    return target.value[:HEADER_BYTES] + other.value[HEADER_BYTES:]


def _other_kind(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    kind = rng.choice((KIND_TEXT, KIND_BLOCK))
    shape = target.shape if rng.random() < 0.5 else (2, *target.shape[2:])
    tensor = torch.ones(shape)
    if kind == KIND_TEXT and shape[0] != 2 and target.fmt.precision.startswith("int"):
        kind = KIND_BLOCK
    if kind == KIND_BLOCK:
        return b"".join(record.encode(torch.ones(target.shape), ANOTHER_KEY, target.fmt, kind))
    return b"".join(record.encode(tensor, target.key, target.fmt, kind))


def _bomb(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    """A small payload that decompresses to a large size or claims a large size."""
    size = 13 + rng.choice((0, 1 << 10, 1 << 16, 1 << 20))  # never the size of the tensor
    codec = rng.choice(("gzip", "zstd"))
    if codec == "gzip":
        payload = gzip.compress(bytes(size), 1)
    else:
        frame = zstandard.ZstdCompressor(level=1).compress(bytes(size))
        if rng.random() < 0.5:  # descriptor: 8 bytes of content size, single segment; then a false size
            frame = frame[:4] + b"\xe0" + struct.pack("<Q", rng.choice(EXTREMES)) + frame[6:]
        frames = [frame] * rng.choice((1, 2, 4, 8))
        payload = struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)
    value = bytearray(target.value)
    value[6] = CODECS[codec]
    return _with_payload(bytes(value), payload)


def _frame_table(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    """A zstd record with a wrong table of frame lengths; for other codecs, a record with changed fields."""
    value = target.value
    if value[6] != CODECS["zstd"] or len(value) < HEADER_BYTES + 8:
        return _set_fields(rng, target, [])
    payload = bytearray(value[HEADER_BYTES:])
    first, second = struct.unpack_from("<2I", payload)
    step = rng.choice((1, 4, first, 2**31, 2**32 - 1))
    numbers = ((first + step) % 2**32, (second - step) % 2**32)
    struct.pack_into("<2I", payload, 0, *(numbers if rng.random() < 0.7 else (numbers[0], second)))
    return _with_payload(value, bytes(payload))


def _noise(rng: random.Random, target: Target, _: list[Target]) -> bytes:
    noise = rng.randbytes(rng.choice((0, 1, 127, 128, 129, 400)))
    return noise if rng.random() < 0.5 else target.value[: rng.choice((4, 16, 128))] + noise


CASES: dict[str, Spoil] = {
    "bit flips": _flip_bits,
    "fields, resealed": _set_fields,
    "cut or stretched": _cut_or_stretch,
    "another record": _other_record,
    "another kind": _other_kind,
    "bomb, resealed": _bomb,
    "frame table, resealed": _frame_table,
    "noise": _noise,
}
