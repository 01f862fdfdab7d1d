"""The exercises of notebook 03, prefix hashing: block keys, the usable prefix, the root key, the layout of a prompt."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import block_keys, root_key

Parts = list[tuple[str, int, float]]


def _hashed(parts: Sequence[bytes], lengths: str = "<I") -> bytes:
    """SHA-256 of parts, each after its length in this format; no format, no lengths."""
    return hashlib.sha256(b"".join((struct.pack(lengths, len(p)) if lengths else b"") + p for p in parts)).digest()


# --- 03.1 ---------------------------------------------------------------------------------------
def _chain(
    tokens: list[int],
    root: bytes,
    block_tokens: int,
    chained: bool = True,
    number: str = "<{}I",
    lengths: str = "<I",
    partial: bool = False,
    domain: tuple[bytes, ...] = (b"kvlab/1/block",),
) -> list[bytes]:
    keys, parent = [], root
    stop = len(tokens) if partial else len(tokens) - block_tokens + 1
    for i in range(0, stop, block_tokens):
        block = tokens[i : i + block_tokens]
        keys.append(_hashed((*domain, parent, struct.pack(number.format(len(block)), *block)), lengths))
        parent = keys[-1] if chained else root
    return keys


def _without_parent(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, chained=False)


def _big_endian(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, number=">{}I")


def _eight_bytes(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, number="<{}Q")


def _no_lengths(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, lengths="")


def _without_domain(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, domain=())


def _key_for_a_partial_block(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, partial=True)


def _misses_the_last_block(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens[:-1], root, block_tokens)


def _as_text(tokens: list[int], root: bytes, block_tokens: int) -> list[str]:
    return [key.hex() for key in _chain(tokens, root, block_tokens)]


def _text_as_parent(tokens: list[int], root: bytes, block_tokens: int) -> list[str]:
    keys, parent = [], root
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = struct.pack(f"<{block_tokens}I", *tokens[i : i + block_tokens])
        parts = (b"kvlab/1/block", parent, block)
        keys.append(hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).hexdigest())
        parent = keys[-1]  # type: ignore[assignment]  # this is the mistake
    return keys


def _length_in_tokens(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    keys, parent = [], root
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = struct.pack(f"<{block_tokens}I", *tokens[i : i + block_tokens])
        parts = [struct.pack("<I", len(p)) + p for p in (b"kvlab/1/block", parent)]
        parent = hashlib.sha256(b"".join([*parts, struct.pack("<I", block_tokens), block])).digest()
        keys.append(parent)
    return keys


def _big_endian_block_lengths(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, lengths=">I")


def _all_big_endian(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    return _chain(tokens, root, block_tokens, number=">{}I", lengths=">I")


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
        ([5, 70000, 9], bytes(32), 1),
    ),
    wrong=(
        Wrong(_without_parent, "the parent of a block is the key of the block before it; root only begins the chain"),
        Wrong(_big_endian, "tokens are packed little-endian: '<' in struct.pack, whatever the machine"),
        Wrong(_eight_bytes, "a token takes four bytes, the letter I in struct.pack; Q takes eight"),
        Wrong(_no_lengths, "write each part's length, as u32, in front of the part"),
        Wrong(_without_domain, "three fields, not two: b'kvlab/1/block' comes first, with its own length"),
        Wrong(_key_for_a_partial_block, "only full blocks have a key; leave a rest of fewer tokens out"),
        Wrong(
            _misses_the_last_block,
            "the last block is full too if the prompt ends where it ends: where does range stop?",
        ),
        Wrong(_as_text, "a key is the 32 bytes of .digest(), not the text of .hexdigest()"),
        Wrong(
            _text_as_parent, "did text meet bytes? .digest() gives bytes, .hexdigest() a text, which cannot be joined"
        ),
        Wrong(_length_in_tokens, "the length of the third field counts its bytes, not its tokens; a token takes four"),
        Wrong(_big_endian_block_lengths, "the lengths are little-endian too: '<I' in front of each field"),
        Wrong(_all_big_endian, "tokens and lengths are both little-endian: '<', where '>' stands now"),
    ),
    hint="three length-prefixed parts for each full block: b'kvlab/1/block', the parent key, the tokens as u32",
    after="vLLM names the blocks of its prefix cache in the same way, from the parent's hash and the block's tokens.",
)


# --- 03.2 ---------------------------------------------------------------------------------------
def usable_prefix(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    """How many leading tokens need no computing; `present`: which blocks are stored."""
    blocks = 0
    for there in present:
        if not there:
            break
        blocks += 1
    return min(blocks * block_tokens, prompt_tokens - 1)


def _blocks(present: list[bool]) -> int:
    return [*present, False].index(False)


def _jumps_the_gap(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min(sum(present) * block_tokens, prompt_tokens - 1)


def _sum(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return sum(present) * block_tokens


def _nothing_left(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return _blocks(present) * block_tokens


def _gives_up_a_block(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min(_blocks(present), (prompt_tokens - 1) // block_tokens) * block_tokens


def _always_one_less(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return max(_blocks(present) * block_tokens - 1, 0)


def _in_blocks(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return _blocks(present)


USABLE_PREFIX = Exercise(
    name="usable_prefix",
    number="03.2",
    difficulty=2,
    reference=usable_prefix,
    cases=(
        ([True, True, False, False], 270, 64),
        ([True, False, True, True], 270, 64),
        ([True, True, True, True], 256, 64),
        ([False, True], 128, 64),
        ([], 30, 64),
        ([], 0, 64),
    ),
    wrong=(
        Wrong(
            _jumps_the_gap,
            "our cache loads one stretch from the front, so a block after a gap goes unused: stop at the first gap",
        ),
        Wrong(
            _sum,
            "two things: the sum also counts blocks behind a gap, and where all is stored, one token must be left",
        ),
        Wrong(_nothing_left, "the answer starts from the last token's logits, and no cache holds those: leave one"),
        Wrong(_gives_up_a_block, "only the last token must be computed; the rest of its block can still be loaded"),
        Wrong(_always_one_less, "leave one token only where the stored blocks reach the prompt's end: a minimum"),
        Wrong(_in_blocks, "the answer is a number of tokens, and a block holds block_tokens of them"),
    ),
    hint="count blocks up to the first missing one, turn them into tokens, and leave at least one token to compute",
    after="kvlab.generate does the same: it loads up to the first gap and leaves the last token to compute.",
)


# --- 03.3 ---------------------------------------------------------------------------------------
def faulty_root_key(
    fingerprint: bytes,
    precision: str,
    salt: bytes,
    block_tokens: int,
) -> bytes:
    """The parent of every first block: all that a key depends on, but the tokens."""
    layout = "<12s32s4s16sI"  # places for 12, 32, 4 and 16 bytes, and a u32
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, block_tokens)
    return hashlib.sha256(struct.pack(layout, *parts)).digest()


def _wider(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, block_tokens)
    return hashlib.sha256(struct.pack("<12s32s4s64sI", *parts)).digest()


def _root_parts(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> tuple[bytes, ...]:
    return b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens)


def _concatenated(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    return _hashed(_root_parts(fingerprint, precision, salt, block_tokens), lengths="")


def _only_the_salt_with_its_length(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    domain, *before, tenant, size = _root_parts(fingerprint, precision, salt, block_tokens)
    return _hashed((domain, *before, struct.pack("<I", len(tenant)), tenant, size), lengths="")


def _domain_without_its_length(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    domain, *others = _root_parts(fingerprint, precision, salt, block_tokens)
    return _hashed((domain, *(struct.pack("<I", len(p)) + p for p in others)), lengths="")


def _lengths_as_text(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    parts = _root_parts(fingerprint, precision, salt, block_tokens)
    return hashlib.sha256(b"".join(str(len(p)).encode() + p for p in parts)).digest()


def _big_endian_lengths(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    return _hashed(_root_parts(fingerprint, precision, salt, block_tokens), lengths=">I")


def _number_as_text(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    return _hashed((*_root_parts(fingerprint, precision, salt, block_tokens)[:4], str(block_tokens).encode()))


def _empty_salt_left_out(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    return _hashed([p for p in _root_parts(fingerprint, precision, salt, block_tokens) if p])


def _salt_before_precision(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    domain, model, bits, tenant, size = _root_parts(fingerprint, precision, salt, block_tokens)
    return _hashed((domain, model, tenant, bits, size))


def _size_before_salt(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    domain, model, bits, tenant, size = _root_parts(fingerprint, precision, salt, block_tokens)
    return _hashed((domain, model, bits, size, tenant))


def _size_without_its_length(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    *before, size = _root_parts(fingerprint, precision, salt, block_tokens)
    return _hashed((*(struct.pack("<I", len(p)) + p for p in before), size), lengths="")


ROOT_KEY = Exercise(
    name="root_key",
    number="03.3",
    difficulty=2,
    reference=root_key,
    given=faulty_root_key,
    cases=(
        (bytes(range(32)), "fp16", b"tenant", 64),
        (bytes(32), "fp32", b"", 64),
        (bytes(32), "int8", b"a tenant with a long name, number 1", 16),
        (bytes(32), "int8", b"a tenant with a long name, number 2", 16),
    ),
    wrong=(
        Wrong(
            _wider, "a wider place only cuts later, and zeros still fill the rest: give each part its length instead"
        ),
        Wrong(_concatenated, "glued together, 'ab' + 'c' equals 'a' + 'bc': put each part's length before it"),
        Wrong(_only_the_salt_with_its_length, "the salt is safe now; in kvlab's recipe every part follows its length"),
        Wrong(_domain_without_its_length, "b'kvlab/1/root' is a part like the others, with its length before it"),
        Wrong(
            _lengths_as_text,
            "a length is a u32, four bytes; a length as text runs into a part that begins with a digit",
        ),
        Wrong(_big_endian_lengths, "lengths are little-endian as well: '<I'"),
        Wrong(_number_as_text, "the block size goes in as u32 little-endian, four bytes, not as text"),
        Wrong(_size_without_its_length, "the block size is a field like the others: its length, 4, comes before it"),
        Wrong(_empty_salt_left_out, "an empty salt is a part too: its length, 0, must be there"),
        Wrong(_salt_before_precision, "precision and salt have changed places: the order is part of the recipe"),
        Wrong(_size_before_salt, "the block size comes last: the order is part of the recipe"),
    ),
    hint="five length-prefixed parts: b'kvlab/1/root', fingerprint, precision as text, salt, block size as u32",
    after="The fault: `16s` cuts a salt after 16 bytes. vLLM puts a tenant's salt (cache_salt) at the same place, into "
    "the hash of the first block.",
)


# --- 03.4 ---------------------------------------------------------------------------------------
def best_layout(parts: list[tuple[str, int, float]]) -> list[str]:
    """Names of the parts (name, tokens, chance), in the order that keeps most."""
    from itertools import permutations

    def kept(order: tuple[tuple[str, int, float], ...]) -> float:
        total, unchanged = 0.0, 1.0
        for _, tokens, chance in order:
            unchanged *= 1 - chance
            total += unchanged * tokens
        return total

    return [name for name, _, _ in max(permutations(parts), key=kept)]


def _steady_first(parts: Parts) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: part[2])]


def _long_first(parts: Parts) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: -part[1])]


def _by_its_own_loss(parts: Parts) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: part[1] * part[2])]


def _by_what_it_keeps_itself(parts: Parts) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: -part[1] * (1 - part[2]))]


def _changing_first(parts: Parts) -> list[str]:
    return best_layout(parts)[::-1]


def _as_a_tuple(parts: Parts) -> tuple[str, ...]:
    return tuple(best_layout(parts))


def _whole_parts(parts: Parts) -> Parts:
    by_name = {part[0]: part for part in parts}
    return [by_name[name] for name in best_layout(parts)]


def _whole_parts_as_a_tuple(parts: Parts) -> tuple[tuple[str, int, float], ...]:
    return tuple(_whole_parts(parts))


def _without_its_own_change(parts: Parts) -> list[str]:
    return [name for name, _, _ in sorted(parts, key=lambda part: -part[1] / part[2])]


BEST_LAYOUT = Exercise(
    name="best_layout",
    number="03.4",
    difficulty=4,
    reference=best_layout,
    cases=(
        ([("time", 20, 0.9), ("system", 400, 0.01), ("history", 900, 0.5), ("tools", 600, 0.05)],),
        ([("note", 10, 0.05), ("manual", 2000, 0.1)],),
        ([("a", 100, 0.2), ("b", 300, 0.3), ("c", 50, 0.06), ("d", 800, 0.6)],),
    ),
    wrong=(
        Wrong(_steady_first, "the chance of a change is half of it: a long part may go before a steadier short one"),
        Wrong(_long_first, "length is half of it: a long part that often changes spoils all that follows"),
        Wrong(_by_its_own_loss, "a change costs more than the part itself: it also costs every part behind it"),
        Wrong(
            _by_what_it_keeps_itself,
            "that counts a part as if it stood first: all parts before it must be unchanged too",
        ),
        Wrong(_as_a_tuple, "the order is right; return it as a list, not as a tuple"),
        Wrong(_whole_parts, "the order is right; return the names only, not the whole parts"),
        Wrong(_whole_parts_as_a_tuple, "the order is right; return a list, and only the names of the parts"),
        Wrong(_without_its_own_change, "a part's own change counts too: it is lost when it changes itself"),
        Wrong(
            _changing_first, "the other way round: what changes spoils everything after it, so it belongs at the end"
        ),
    ),
    hint="a part is kept if it and all parts before it are unchanged: try every order, or compare two neighbours",
    after="For many parts, sort by tokens * (1 - chance) / chance, the largest first: it gives the same order.",
)
