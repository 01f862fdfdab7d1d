"""The exercises of notebook 03, prefix hashing: block keys, the usable prefix, the root key, the layout of a prompt."""

from __future__ import annotations

import hashlib
import struct

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import block_keys, root_key


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


BLOCK_KEYS = Exercise(
    name="block_keys",
    number="03.1",
    difficulty=3,
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


USABLE_PREFIX = Exercise(
    name="usable_prefix",
    number="03.2",
    difficulty=3,
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


def _concatenated(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens))
    return hashlib.sha256(b"".join(parts)).digest()


def _number_as_text(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, str(block_tokens).encode())
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def _empty_salt_left_out(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = [b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens)]
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts if p)).digest()


ROOT_KEY = Exercise(
    name="root_key",
    number="03.3",
    difficulty=2,
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


BEST_LAYOUT = Exercise(
    name="best_layout",
    number="03.4",
    difficulty=4,
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
