"""Ids of the blocks of a prompt, for traces: salted hashes of everything up to the end of the block.

    root = SHA256( field("kvlab/1/trace") field(salt) field(B as u32) )
    key  = as in `kvlab.core.keys`, from this root; the last part of a prompt, shorter than a block, has one too
    id   = the first 8 bytes of the key as a little-endian number, without its lowest bit: 63 bits

Two blocks have the same id where all tokens up to their end are the same, and the salt, and the block size. Without
the salt nobody can tell which tokens an id stands for. The root is not that of a cache, so a trace holds no part of
a cache's keys, even where both have the same salt.

An id fits an i64 and a u64. A reader that has only floating-point numbers, such as JavaScript, rounds it to 53 bits:
equal ids stay equal, and among a million different ones two become equal with a probability below 1 in 10,000.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from kvlab.core.keys import block_keys, digest
from kvlab.errors import InputError

LONGEST_BLOCK: Final = 1 << 20


def trace_ids(
    tokens: Sequence[int], block_tokens: int, salt: bytes = b"", answer: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt's blocks, and those of the blocks that are cached when its answer has ended.

    The first list has one for a shorter last part too. The second has only full blocks, because engines share no
    others. It goes on into the answer, without the answer's last token: its KV would be computed with the next one.

    Raises:
        InputError: a token is not an integer in 0 … 2**32 - 1, or the block size not one in 1 … 2**20.

    >>> blocks, cached = trace_ids([1, 2, 3, 4, 5], 2, answer=[6, 7])
    >>> len(blocks), len(cached), blocks[:2] == cached[:2], blocks[2] == cached[2]
    (3, 3, True, False)
    """
    if not 1 <= block_tokens <= LONGEST_BLOCK:
        raise InputError(f"expected a block size of 1 … {LONGEST_BLOCK:,} tokens, got {block_tokens:,}")
    root = digest("kvlab/1/trace", salt, struct.pack("<I", block_tokens))
    keys = block_keys(root, block_tokens, [*tokens, *answer[:-1]])
    full, rest = divmod(len(tokens), block_tokens)
    last = block_keys(keys[full - 1] if full else root, rest, tokens[-rest:]) if rest else []
    return [_number(key) for key in keys[:full] + last], [_number(key) for key in keys]


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little") >> 1
