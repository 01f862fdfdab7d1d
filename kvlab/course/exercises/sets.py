"""The exercises of the notebooks: reference solutions, cases, typical wrong answers and their hints.

The solution that a notebook shows in its folded block is the reference's source; a test
keeps them equal.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
import struct

import torch
from torch import Tensor

from kvlab.core.record import Format, encode
from kvlab.course.exercises.engine import Exercise, Wrong


# --- 00 start here ------------------------------------------------------------------------------
def cacheable_prefix(a: list[int], b: list[int], block_tokens: int) -> int:
    """How many leading tokens of `b` can come from the cache after `a` was saved."""
    same = 0
    for x, y in zip(a, b):
        if x != y:
            break
        same += 1
    return same // block_tokens * block_tokens


def _counts_partial_blocks(a: list[int], b: list[int], block_tokens: int) -> int:
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _counts_all_equal_positions(a: list[int], b: list[int], block_tokens: int) -> int:
    same = sum(x == y for x, y in zip(a, b, strict=False))
    return same // block_tokens * block_tokens


def hit_rate(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    """Share of the prompt's full blocks that came from the cache."""
    full = prompt_tokens // block_tokens
    return cached_tokens // block_tokens / full if full else 0.0


def _rate_over_tokens(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    return cached_tokens / prompt_tokens


def _rate_over_started_blocks(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    return cached_tokens // block_tokens / math.ceil(prompt_tokens / block_tokens)


CACHEABLE_PREFIX = Exercise(
    name="cacheable_prefix",
    number="00.1",
    reference=cacheable_prefix,
    cases=(
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 4, 5], [1, 2, 3, 9, 5], 2),
        ([1, 2, 3, 4], [9, 2, 3, 4], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 6, 7, 8], 2),
        ([], [1, 2], 4),
    ),
    wrong=(
        Wrong(_counts_partial_blocks, "only full blocks are stored: round down to a multiple of block_tokens"),
        Wrong(_counts_all_equal_positions, "a prefix ends at the first difference; what is equal after it is lost"),
    ),
    hint="walk along both lists while they agree, then round down to whole blocks",
)

HIT_RATE = Exercise(
    name="hit_rate",
    number="00.2",
    reference=hit_rate,
    cases=((1040, 1024, 64), (1024, 512, 64), (100, 64, 64), (40, 0, 64)),
    wrong=(
        Wrong(_rate_over_tokens, "this is the share of tokens; the question is the share of full blocks"),
        Wrong(_rate_over_started_blocks, "the partial last block is never stored: it must not count as a miss"),
    ),
    hint="count full blocks in the prompt and in the cached part; a prompt without a full block has rate 0.0",
)


# --- 01 attention by hand -----------------------------------------------------------------------
def causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention of T new tokens over themselves and the `start` tokens before them."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    T, S = scores.shape[2:]
    sees = torch.arange(S) <= start + torch.arange(T)[:, None]
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _variant(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, offset: int, causal: bool = True) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    T, S = scores.shape[2:]
    sees = (torch.arange(S) <= offset + torch.arange(T)[:, None]) | (not causal)
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _mask_restarts(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, q.shape[3] ** -0.5, 0)


def _no_scale(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, 1.0, start)


def _no_mask(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, q.shape[3] ** -0.5, start, causal=False)


def _heads_interleaved(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return causal_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), start)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    """Bytes of KV that one token takes over all layers."""
    return layers * 2 * kv_heads * head_dim * bytes_per_element


def _one_plane(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    return layers * kv_heads * head_dim * bytes_per_element


def _one_layer(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    return 2 * kv_heads * head_dim * bytes_per_element


def break_even_bandwidth(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    """Bytes a second that a store must deliver so that fetching KV is as fast as computing it."""
    return float(bytes_per_token * prefill_tokens_per_s)


def _divided(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    return bytes_per_token / prefill_tokens_per_s


def _in_bits(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    return 8.0 * bytes_per_token * prefill_tokens_per_s


def suffix_positions(cached_tokens: int, prompt_tokens: int) -> list[int]:
    """Positions of the tokens that are left to compute."""
    return list(range(cached_tokens, prompt_tokens))


def _positions_restarted(cached_tokens: int, prompt_tokens: int) -> list[int]:
    return list(range(prompt_tokens - cached_tokens))


def _positions_off_by_one(cached_tokens: int, prompt_tokens: int) -> list[int]:
    return list(range(cached_tokens + 1, prompt_tokens + 1))


def _qkv(heads: int, kv_heads: int, new: int, start: int) -> tuple[Tensor, Tensor, Tensor, int]:
    g = torch.Generator().manual_seed(heads * 100 + new * 10 + start)
    shapes = ((1, heads, new, 8), (1, kv_heads, start + new, 8), (1, kv_heads, start + new, 8))
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    return q, k, v, start


CAUSAL_ATTENTION = Exercise(
    name="causal_attention",
    number="01.1",
    reference=causal_attention,
    cases=(_qkv(1, 1, 4, 0), _qkv(4, 2, 5, 0), _qkv(4, 2, 3, 6), _qkv(4, 1, 1, 7)),
    wrong=(
        Wrong(_mask_restarts, "new token t sits at position start + t: the mask must begin there, not at 0"),
        Wrong(_no_scale, "divide the scores by the square root of the head dim"),
        Wrong(_no_mask, "token t must not see what comes after position start + t: mask those scores with -inf"),
        Wrong(_heads_interleaved, "neighbouring query heads share a KV head: repeat_interleave, not repeat"),
    ),
    hint="four steps: repeat the KV heads, scaled scores, mask, softmax over the last dim times v",
)

KV_BYTES_PER_TOKEN = Exercise(
    name="kv_bytes_per_token",
    number="01.3",
    reference=kv_bytes_per_token,
    cases=((6, 2, 64, 4), (32, 8, 128, 2), (80, 8, 128, 2)),
    wrong=(
        Wrong(_one_plane, "both keys and values are kept: two planes"),
        Wrong(_one_layer, "every layer has its own keys and values"),
    ),
    hint="multiply everything that one token leaves behind: layers, planes, KV heads, head dim, bytes",
)

SUFFIX_POSITIONS = Exercise(
    name="suffix_positions",
    number="01.2",
    reference=suffix_positions,
    cases=((4, 7), (0, 3), (64, 66)),
    wrong=(
        Wrong(_positions_restarted, "the suffix goes on where the cached prefix ended; restarting at 0 is silent"),
        Wrong(_positions_off_by_one, "positions count from 0: the first token after n cached ones is at n"),
    ),
    hint="a list of positions, from the first token that is not cached to the last of the prompt",
)

BREAK_EVEN_BANDWIDTH = Exercise(
    name="break_even_bandwidth",
    number="01.4",
    reference=break_even_bandwidth,
    cases=((6144, 5000.0), (131072, 15300.0)),
    wrong=(
        Wrong(_divided, "in one second the model computes so many tokens, each worth so many bytes: multiply"),
        Wrong(_in_bits, "the answer is in bytes a second, not bits"),
    ),
    hint="how many bytes of KV does the model itself produce in a second?",
)


# --- 03 prefix hashing --------------------------------------------------------------------------
def block_keys(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    """One chained SHA-256 key for each full block of `tokens`."""
    keys, parent = [], root
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        data = struct.pack(f"<{block_tokens}I", *tokens[i : i + block_tokens])
        parts = (b"kvlab/1/block", parent, data)
        parent = hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()
        keys.append(parent)
    return keys


def _chain(
    tokens: list[int],
    root: bytes,
    block_tokens: int,
    chained: bool = True,
    order: str = "<",
    prefixed: bool = True,
    partial: bool = False,
) -> list[bytes]:
    keys, parent = [], root
    stop = len(tokens) if partial else len(tokens) - block_tokens + 1
    for i in range(0, stop, block_tokens):
        block = tokens[i : i + block_tokens]
        parts = (b"kvlab/1/block", parent, struct.pack(f"{order}{len(block)}I", *block))
        data = b"".join((struct.pack("<I", len(p)) if prefixed else b"") + p for p in parts)
        keys.append(hashlib.sha256(data).digest())
        parent = keys[-1] if chained else root
    return keys


def _without_parent(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, chained=False)


def _big_endian(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, order=">")


def _no_lengths(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, prefixed=False)


def _key_for_a_partial_block(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, partial=True)


def usable_prefix(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    """How many leading tokens need no computing, if `present` says which blocks are stored."""
    blocks = 0
    for there in present:
        if not there:
            break
        blocks += 1
    return min(blocks * block_tokens, prompt_tokens - 1)


def _jumps_the_gap(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min(sum(present) * block_tokens, prompt_tokens - 1)


def _nothing_left(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return [*present, False].index(False) * block_tokens


def _gives_up_a_block(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min([*present, False].index(False), (prompt_tokens - 1) // block_tokens) * block_tokens


def root_key(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    """The parent of every first block: everything that a key depends on, but for the tokens."""
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens))
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def _concatenated(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens))
    return hashlib.sha256(b"".join(parts)).digest()


def _number_as_text(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, str(block_tokens).encode())
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def _empty_salt_left_out(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = [b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens)]
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts if p)).digest()


def best_layout(parts: list[tuple[str, int, float]]) -> list[str]:
    """Names of the parts (name, tokens, chance of a change), in the order that keeps most."""
    from itertools import permutations

    def kept(order: tuple[tuple[str, int, float], ...]) -> float:
        total, unchanged = 0.0, 1.0
        for _, tokens, chance in order:
            unchanged *= 1 - chance
            total += unchanged * tokens
        return total

    return [name for name, _, _ in max(permutations(parts), key=kept)]


def _steady_first(parts: list[tuple[str, int, float]]) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: part[2])]


def _long_first(parts: list[tuple[str, int, float]]) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: -part[1])]


def _changing_first(parts: list[tuple[str, int, float]]) -> list[str]:
    return best_layout(parts)[::-1]


BLOCK_KEYS = Exercise(
    name="block_keys",
    number="03.1",
    reference=block_keys,
    cases=(
        ([1, 2, 3, 4], bytes(32), 2),
        ([1, 2, 3, 4, 5], bytes(32), 2),
        ([7, 7, 7, 7, 7, 7], bytes(range(32)), 2),
        ([4095, 1], bytes(32), 4),
    ),
    wrong=(
        Wrong(_without_parent, "the parent of a block is the key of the block before it; root only begins the chain"),
        Wrong(_big_endian, "tokens are packed little-endian: '<' in struct.pack, whatever the machine"),
        Wrong(_no_lengths, "write each part's length, as u32, in front of the part"),
        Wrong(_key_for_a_partial_block, "only full blocks have a key; leave a rest of fewer tokens out"),
    ),
    hint="three length-prefixed parts for each full block: b'kvlab/1/block', the parent key, the tokens as u32",
)

USABLE_PREFIX = Exercise(
    name="usable_prefix",
    number="03.2",
    reference=usable_prefix,
    cases=(
        ([True, True, False, False], 270, 64),
        ([True, False, True, True], 270, 64),
        ([True, True, True, True], 256, 64),
        ([False, True], 128, 64),
        ([], 30, 64),
    ),
    wrong=(
        Wrong(
            _jumps_the_gap,
            "our cache loads one stretch from the front, so a block after a gap goes unused: stop at the first gap",
        ),
        Wrong(_nothing_left, "the answer starts from the last token's logits, and no cache holds those: leave one"),
        Wrong(_gives_up_a_block, "only the last token must be computed; the rest of its block can still be loaded"),
    ),
    hint="count blocks up to the first missing one, turn them into tokens, and leave at least one token to compute",
)

ROOT_KEY = Exercise(
    name="root_key",
    number="03.3",
    reference=root_key,
    cases=(
        (bytes(32), "fp32", b"", 64),
        (bytes(range(32)), "fp16", b"tenant", 64),
        (bytes(32), "int8", b"ab", 16),
    ),
    wrong=(
        Wrong(_concatenated, "glued together, 'ab' + 'c' equals 'a' + 'bc': put each part's length before it"),
        Wrong(_number_as_text, "the block size goes in as u32 little-endian, four bytes, not as text"),
        Wrong(_empty_salt_left_out, "an empty salt is a part too: its length, 0, must be there"),
    ),
    hint="five length-prefixed parts: b'kvlab/1/root', fingerprint, precision as text, salt, block size as u32",
)

BEST_LAYOUT = Exercise(
    name="best_layout",
    number="03.4",
    reference=best_layout,
    cases=(
        ([("time", 20, 0.9), ("system", 400, 0.01), ("history", 900, 0.5), ("tools", 600, 0.05)],),
        ([("note", 10, 0.05), ("manual", 2000, 0.1)],),
        ([("a", 100, 0.2), ("b", 300, 0.3), ("c", 50, 0.05), ("d", 800, 0.6)],),
    ),
    wrong=(
        Wrong(_steady_first, "the chance of a change is half of it: a long part may go before a steadier short one"),
        Wrong(_long_first, "length is half of it: a long part that often changes spoils all that follows"),
        Wrong(
            _changing_first, "the other way round: what changes spoils everything after it, so it belongs at the end"
        ),
    ),
    hint="a part is kept if it and all parts before it are unchanged: try every order, or compare two neighbours",
)


# --- 04 serialization ---------------------------------------------------------------------------
def shuffle(data: bytes, size: int) -> bytes:
    """The byte planes of numbers of `size` bytes: all their first bytes, then all their second ones, and so on."""
    return b"".join(data[i::size] for i in range(size))


def _highest_first(data: bytes, size: int) -> bytes:
    return b"".join(data[i::size] for i in reversed(range(size)))


def _bytes_swapped(data: bytes, size: int) -> bytes:
    return b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))


def _two_planes_only(data: bytes, size: int) -> bytes:
    return data[::2] + data[1::2]


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


def open_record(value: bytes, key: bytes) -> str:
    """ok, or the first reason not to use it: length, magic, version, length, checksum, key."""
    import xxhash

    if len(value) < 128:
        return "length"
    if value[:4] != b"KVL1":
        return "magic"
    if value[4] != 1:
        return "version"
    if struct.unpack_from("<Q", value, 48)[0] != len(value) - 128:
        return "length"
    digest = xxhash.xxh3_64_intdigest(value[:96] + bytes(32) + value[128:])
    if value[96:128] != digest.to_bytes(8, "little") + bytes(24):
        return "checksum"
    return "ok" if value[64:96] == key else "key"


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


SHUFFLE = Exercise(
    name="shuffle",
    number="04.1",
    reference=shuffle,
    cases=((b"aAbBcC", 2), (bytes(range(12)), 4), (b"plain", 1), (b"", 2)),
    wrong=(
        Wrong(_highest_first, "the planes come in the order of the bytes in memory: first bytes first"),
        Wrong(_bytes_swapped, "this turns each number around; a plane has the same byte of all numbers"),
        Wrong(_two_planes_only, "numbers may have 1, 2 or 4 bytes: there are `size` planes"),
    ),
    hint="plane i begins at byte i and takes every size-th byte from there",
)

QUANTISE = Exercise(
    name="quantise_int8",
    number="04.2",
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

PACK_NIBBLES = Exercise(
    name="pack_nibbles",
    number="04.3",
    reference=pack_nibbles,
    cases=(([1, 2, 3, 15],), ([7, 8, 9],), ([],), ([0, 15, 15, 0, 5, 10],)),
    wrong=(
        Wrong(_first_one_high, "the first of two goes into the low half: shift the second one"),
        Wrong(_odd_one_lost, "an odd last number must not get lost: put a 0 beside it"),
        Wrong(_halves_paired, "neighbours share a byte: numbers 0 and 1, then 2 and 3"),
    ),
    hint="take pairs of neighbours; a byte is first | second << 4",
)

OPEN_RECORD = Exercise(
    name="open_record",
    number="04.4",
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


# --- 05 the Redis tier --------------------------------------------------------------------------
def usable_until(expires: list[int]) -> list[int]:
    """Until when each block of a chain can be used: not longer than any block before it."""
    until: list[int] = []
    for when in expires:
        until.append(min(when, until[-1]) if until else when)
    return until


def _each_for_itself(expires: list[int]) -> list[int]:
    return expires


def _chain_dies_at_once(expires: list[int]) -> list[int]:
    return [min(expires)] * len(expires) if expires else []


def _from_the_end(expires: list[int]) -> list[int]:
    return usable_until(expires[::-1])[::-1]


def fetched_prefix(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    """The blocks that can be used: `values` up to the first that did not come, whatever EXISTS said before."""
    prefix: list[bytes] = []
    for value in values:
        if value is None:
            break
        prefix.append(value)
    return prefix


def _trusts_exists(existed: list[bool], values: list[bytes | None]) -> list[bytes | None]:
    count = existed.index(False) if False in existed else len(existed)
    return values[:count]


def _closes_the_gap(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return [value for value in values if value is not None]


def _asks_both(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return fetched_prefix(existed, [v if e else None for e, v in zip(existed, values, strict=True)])


def let_through(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    """Which calls a breaker lets through: `calls` has each one's time and whether the server would answer it."""
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
            if in_a_row >= failures:
                open_until = now + cooldown_s
    return made


def _never_tries_again(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    return let_through(calls, failures, math.inf)


def _any_faults_count(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    faults, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1] and not answers:
            faults += 1
            if faults >= failures:
                open_until = now + cooldown_s
    return made


def _forgets_when_cool(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
            if in_a_row >= failures:
                in_a_row, open_until = 0, now + cooldown_s
    return made


def _tries_too_late(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now > open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
            if in_a_row >= failures:
                open_until = now + cooldown_s
    return made


def pack_set(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    """SET key value PX ttl_ms in the Redis protocol; the pieces of the value stay the objects that they are."""
    size = sum(len(piece) for piece in pieces)
    ttl = b"%d" % ttl_ms
    head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, size)
    tail = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)
    return [head, *pieces, tail]


def _one_string(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    return [b"".join(pack_set(key, pieces, ttl_ms))]


def _pieces_as_arguments(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    arguments = [b"SET", key, *pieces, b"PX", b"%d" % ttl_ms]
    packed = [b"*%d\r\n" % len(arguments)]
    return packed + [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]


def _value_without_its_end(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    head, *middle, tail = pack_set(key, pieces, ttl_ms)
    return [head, *middle, tail.removeprefix(b"\r\n")]


def _ttl_without_its_length(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    head, *middle, _ = pack_set(key, pieces, ttl_ms)
    return [head, *middle, b"\r\n$2\r\nPX\r\n:%d\r\n" % ttl_ms]


USABLE_UNTIL = Exercise(
    name="usable_until",
    number="05.1",
    reference=usable_until,
    cases=(([50, 80, 30, 90],), ([10, 20, 30],), ([30, 20, 10],), ([7],), ([],)),
    wrong=(
        Wrong(_each_for_itself, "a block whose parent is gone is never asked for: look at all blocks before it"),
        Wrong(_chain_dies_at_once, "the blocks before the one that expires go on: each depends on those before it"),
        Wrong(_from_the_end, "the other way round: a block needs its ancestors, not its descendants"),
    ),
    hint="go from the front and keep the smallest expiry seen so far",
)

FETCHED_PREFIX = Exercise(
    name="fetched_prefix",
    number="05.2",
    reference=fetched_prefix,
    cases=(
        ([True, True, True, False], [b"a", b"b", b"c", None]),
        ([True, True, True, True], [b"a", None, b"c", b"d"]),
        ([True, False, False], [b"a", b"b", None]),
        ([False, False], [None, None]),
        ([True, True], [None, b"b"]),
    ),
    wrong=(
        Wrong(_trusts_exists, "EXISTS spoke of a moment that is over: a key may be gone when GET comes, so stop there"),
        Wrong(_closes_the_gap, "without its gap the list says that block 2 is block 1: stop at the first None"),
        Wrong(_asks_both, "a block that another worker saved meanwhile is as good as any: only GET decides"),
    ),
    hint="forget what existed; take values from the front until one is None",
)

LET_THROUGH = Exercise(
    name="let_through",
    number="05.3",
    reference=let_through,
    cases=(
        ([(0, True), (1, False), (2, True), (3, False), (4, True), (5, False), (6, True)], 3, 10),
        ([(0, False), (1, False), (2, False), (3, True), (11, True), (12, True), (13, False)], 3, 10),
        ([(0, False), (1, False), (2, False), (13, False), (14, True), (22, True), (23, True)], 3, 10),
        ([(0, False), (0.5, True), (2, False), (2.5, True), (3, True)], 1, 1),
    ),
    wrong=(
        Wrong(_never_tries_again, "open is not for ever: `cooldown_s` after the last fault a call may try again"),
        Wrong(_any_faults_count, "faults must come in a row: an answer between them sets the count back to 0"),
        Wrong(_forgets_when_cool, "after the cool-down one fault is enough to open it again: keep the count"),
        Wrong(_tries_too_late, "at exactly `cooldown_s` after the last fault a call may try: >= and not >"),
    ),
    hint="a call is made unless the breaker is open; `failures` faults in a row open it until now + cooldown_s",
)

PACK_SET = Exercise(
    name="pack_set",
    number="05.4",
    reference=pack_set,
    cases=(
        (b"kv:a", [b"header", b"payload"], 5000),
        (b"kv:\r\n\x00", [b"one piece"], 86_400_000),
        (b"k", [b"", b"x" * 300, b"\r\n"], 1),
    ),
    wrong=(
        Wrong(_one_string, "joining copies every byte of the value: return head, pieces and tail apart"),
        Wrong(_pieces_as_arguments, "the pieces are one argument: one length, their sum, before the first of them"),
        Wrong(_value_without_its_end, "every argument ends with \\r\\n, the value too: begin the tail with it"),
        Wrong(_ttl_without_its_length, "a command has only strings: the number as digits, with its length before it"),
    ),
    hint="[head, *pieces, tail]: the head ends after the value's length, the tail begins with the value's \\r\\n",
)


# --- 07 sharding --------------------------------------------------------------------------------
def ring_owner(points: list[int], owners: list[str], at: int) -> str:
    """The node of a key at `at`: the owner of the first point at or after it; after the last point comes the first."""
    return owners[bisect.bisect_left(points, at) % len(points)]


def _point_before(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_right(points, at) - 1]


def _one_step_short(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_left(points, at) - 1]


def _place_itself(points: list[int], owners: list[str], at: int) -> int:
    return bisect.bisect_left(points, at) % len(points)


def _point_itself(points: list[int], owners: list[str], at: int) -> int:
    return points[bisect.bisect_left(points, at) % len(points)]


def _no_way_around(points: list[int], owners: list[str], at: int) -> str:
    return owners[min(bisect.bisect_left(points, at), len(points) - 1)]


def _falls_off_the_end(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_left(points, at)]


def _nearest_point(points: list[int], owners: list[str], at: int) -> str:
    return owners[min(range(len(points)), key=lambda i: abs(points[i] - at))]


def _strictly_after(points: list[int], owners: list[str], at: int) -> str:
    return owners[bisect.bisect_right(points, at) % len(points)]


def weighted_owner(draws: dict[str, float], weights: dict[str, float]) -> str:
    """The node with the highest score -weight / ln(draw); `draws` has each node's number for this key, in (0, 1)."""
    return max(draws, key=lambda node: -weights[node] / math.log(draws[node]))


def _draw_times_weight(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: draws[node] * weights[node])


def _sign_lost(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: weights[node] / math.log(draws[node]))


def _weights_unused(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: draws[node])


def _times_the_logarithm(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(draws, key=lambda node: -weights[node] * math.log(draws[node]))


def _score_itself(draws: dict[str, float], weights: dict[str, float]) -> float:
    return max(-weights[node] / math.log(draws[node]) for node in draws)


def _heaviest(draws: dict[str, float], weights: dict[str, float]) -> str:
    return max(weights, key=lambda node: weights[node])


def hash_tag(key: bytes) -> bytes:
    """The part of a key that its slot is computed from: what stands in its first {…}, else the whole key."""
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _to_the_last_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.rfind(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _empty_tag(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end else key


def _braces_kept(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin : end + 1] if -1 < begin < end - 1 else key


def _any_first_pair(key: bytes) -> bytes:
    found = re.search(rb"\{(.*?)\}", key)
    return found[1] if found else key


def _first_closing_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.find(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _last_opening_brace(key: bytes) -> bytes:
    begin = key.rfind(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _one_byte_or_more(key: bytes) -> bytes:
    found = re.search(rb"\{(.+?)\}", key)
    return found[1] if found else key


def _next_pair(key: bytes) -> bytes:
    found = re.search(rb"\{([^}]+)\}", key, re.DOTALL)
    return found[1] if found else key


def in_order(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    """The replies in the order of the keys; `owners` has each key's node. None for keys of a node without replies."""
    queues = {node: iter(answers) for node, answers in replies.items()}
    return [next(queues[node]) if node in queues else None for node in owners]


def _node_after_node(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [answer for answers in replies.values() for answer in answers]


def _silent_node_skipped(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return in_order([node for node in owners if node in replies], replies)


def _counted_in_the_batch(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [replies[node][i] if node in replies else None for i, node in enumerate(owners)]


def _silent_node_looked_up(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    queues = {node: iter(answers) for node, answers in replies.items()}
    return [next(queues[node]) for node in owners]


def _one_reply_for_all(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return [replies[node][0] if node in replies else None for node in owners]


def _from_the_back(owners: list[str], replies: dict[str, list[bytes | None]]) -> list[bytes | None]:
    return in_order(owners, {node: answers[::-1] for node, answers in replies.items()})


RING_OWNER = Exercise(
    name="ring_owner",
    number="07.1",
    reference=ring_owner,
    cases=(
        ([10, 40, 70], ["B", "A", "B"], 25),
        ([10, 40, 70], ["B", "A", "C"], 95),
        ([10, 40, 70], ["B", "A", "C"], 40),
        ([10, 40, 70], ["B", "A", "C"], 3),
        ([5], ["A"], 6),
    ),
    wrong=(
        Wrong(_point_before, "a key goes clockwise: to the next point at or after it, not to the one before"),
        Wrong(_one_step_short, "bisect_left already gives the first point at or after the key: do not go one back"),
        Wrong(_place_itself, "that is the place in the lists: return the owner that stands there, owners[…]"),
        Wrong(_point_itself, "that is the point: return its owner, the name at the same place in `owners`"),
        Wrong(_no_way_around, "after the last point the ring begins anew: the first point has those keys"),
        Wrong(_falls_off_the_end, "beyond the last point comes the first again: take the index % len(points)"),
        Wrong(_nearest_point, "not the nearest point: the next one, however far it is"),
        Wrong(_strictly_after, "a key exactly on a point is that point's: bisect_left, not bisect"),
    ),
    hint="find the first point that is >= at; if there is none, take the first of all",
)

WEIGHTED_OWNER = Exercise(
    name="weighted_owner",
    number="07.2",
    reference=weighted_owner,
    cases=(
        ({"A": 0.9, "B": 0.5}, {"A": 1, "B": 3}),
        ({"A": 0.9, "B": 0.85}, {"A": 1, "B": 3}),
        ({"A": 0.4, "B": 0.2, "C": 0.6}, {"A": 1, "B": 1, "C": 1}),
        ({"A": 0.7, "B": 0.1, "C": 0.65}, {"A": 1, "B": 8, "C": 2}),
    ),
    wrong=(
        Wrong(_draw_times_weight, "draw x weight gives no fair shares: a node of weight 3 must win 3 of 4 against 1"),
        Wrong(_sign_lost, "ln of a number below 1 is negative: without the minus the lowest score wins"),
        Wrong(_times_the_logarithm, "divide -weight by ln(draw), do not multiply: a draw close to 1 must score high"),
        Wrong(_score_itself, "that is the highest score; return the name of the node that has it: max(draws, key=…)"),
        Wrong(_weights_unused, "a node with twice the memory should win twice as often: use `weights`"),
        Wrong(_heaviest, "the heaviest node must not get every key: the draws decide, the weights only lean on them"),
    ),
    hint="the score of a node is -weights[node] / math.log(draws[node]); take the node with the highest",
)

HASH_TAG = Exercise(
    name="hash_tag",
    number="07.3",
    reference=hash_tag,
    cases=(
        (b"{user1000}.following",),
        (b"no tag",),
        (b"foo{}{bar}",),
        (b"foo{{bar}}zap",),
        (b"foo{bar}{zap}",),
        (b"a}b{c}d",),
        (b"{never closed",),
        (b"kv:\x00{\xff\n}\x01",),
    ),
    wrong=(
        Wrong(_to_the_last_brace, "the tag ends at the FIRST } after the {, even if more follow"),
        Wrong(_empty_tag, "with nothing between { and } the whole key counts, or all such keys would share one slot"),
        Wrong(_any_first_pair, "for an empty {} return the whole key; and `.` in a pattern does not match a newline"),
        Wrong(_braces_kept, "what counts stands between the braces: return it without them"),
        Wrong(_first_closing_brace, "a } before the { means nothing: look for one behind it"),
        Wrong(_last_opening_brace, "the tag begins at the FIRST {: in foo{{bar}}zap it is {bar"),
        Wrong(_one_byte_or_more, "`.+?` wants a byte, so in {}{bar} it takes the }: an empty first pair means no tag"),
        Wrong(_next_pair, "after an empty {} no other pair is looked for: then the whole key counts"),
    ),
    hint="the first {, then the first } behind it; if either is missing or nothing stands between, the whole key",
)

IN_ORDER = Exercise(
    name="in_order",
    number="07.4",
    reference=in_order,
    cases=(
        (["A", "A"], {"A": [b"0", b"1"]}),
        (["A", "B", "A", "C"], {"A": [b"0", b"2"], "B": [b"1"], "C": [b"3"]}),
        (["C", "A", "C", "A"], {"A": [b"1", None], "C": [b"0", b"2"]}),
        (["A", "B", "A", "B"], {"A": [b"0", b"2"]}),
        ([], {}),
    ),
    wrong=(
        Wrong(_node_after_node, "these are the replies node after node: block 2 would stand at the place of block 1"),
        Wrong(_silent_node_skipped, "a node that did not answer leaves gaps: put None there, or later ones move up"),
        Wrong(_counted_in_the_batch, "i is the key's place in the batch; a node's replies count only its own keys"),
        Wrong(_silent_node_looked_up, "a node that did not answer is not in `replies`: ask first whether it is"),
        Wrong(_one_reply_for_all, "each reply is for one key: the second key of a node gets its second reply"),
        Wrong(_from_the_back, "a node answers in the order in which it was asked: take its replies from the front"),
    ),
    hint="walk through `owners`; take the next reply of that node, or None if the node sent none",
)


ALL = (
    CACHEABLE_PREFIX,
    HIT_RATE,
    CAUSAL_ATTENTION,
    KV_BYTES_PER_TOKEN,
    SUFFIX_POSITIONS,
    BREAK_EVEN_BANDWIDTH,
    BLOCK_KEYS,
    USABLE_PREFIX,
    ROOT_KEY,
    BEST_LAYOUT,
    SHUFFLE,
    QUANTISE,
    PACK_NIBBLES,
    OPEN_RECORD,
    USABLE_UNTIL,
    FETCHED_PREFIX,
    LET_THROUGH,
    PACK_SET,
    RING_OWNER,
    WEIGHTED_OWNER,
    HASH_TAG,
    IN_ORDER,
)
