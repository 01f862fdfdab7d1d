"""Cost of block keys in nanoseconds per token, compared with their SHA-256 alone.

python -m kvlab bench hash --json
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from kvlab.core.keys import Namespace
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds

BLOCKS = (16, 64, 256)
PREFIXES = (64, 256, 1024, 4096, 32768)
ABOUT = (
    "rows: nanoseconds per token and microseconds per block for chained keys, compared with SHA-256 alone over as many "
    "messages of the same length (ratio_to_floor: time of the keys divided by time of SHA-256); by_prefix: "
    "microseconds for all keys of a prefix at 64 tokens per block"
)
MESSAGE_BYTES = 57  # the bytes that the chain adds to a block's tokens: domain, parent's key, and lengths


def run(tokens: int = 32768, rounds: int = 15) -> dict[str, Any]:
    """Hash one prompt of `tokens` tokens (Python ints, as from a tokenizer) for each block size.

    Returns:
        `rows`: by block size, ns per token and us per block of `Namespace.keys`, and ns per token
        of SHA-256 alone over as many messages of the same length. `by_prefix`: microseconds for
        all keys of a prefix at 64 tokens per block.
    """
    rng = random.Random(0)
    prompt = [rng.randrange(128_000) for _ in range(tokens)]
    times = time_rounds({name: work for B in BLOCKS for name, work in _contenders(prompt, B).items()}, rounds)
    names = {n: Namespace(bytes(32), "fp32", b"", 64) for n in PREFIXES}
    prefixes = time_rounds({str(n): _repeat(names[n], prompt[:n]) for n in PREFIXES}, rounds)
    return {
        "about": ABOUT,
        "tokens": tokens,
        "rows": [_row(times, B, tokens) for B in BLOCKS],
        "by_prefix": [{"prefix_tokens": n, "us": 1000 * prefixes.median_ms(str(n)) / _times(n)} for n in PREFIXES],
        "aa_ratio": times.aa_ratio,
        "noisy": times.noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def _contenders(prompt: list[int], B: int) -> dict[str, Callable[[], object]]:
    namespace, messages = Namespace(bytes(32), "fp32", b"", B), len(prompt) // B
    message = bytes(MESSAGE_BYTES + 4 * B)

    def floor() -> None:
        for _ in range(messages):
            hashlib.sha256(message).digest()

    return {f"keys {B}": lambda: namespace.keys(prompt), f"floor {B}": floor}


def _row(times: Timings, B: int, tokens: int) -> dict[str, float]:
    ns = 1e6 * times.median_ms(f"keys {B}") / tokens
    return {
        "block_tokens": B,
        "ns_per_token": ns,
        "us_per_block": ns * B / 1000,
        "sha256_floor_ns_per_token": 1e6 * times.median_ms(f"floor {B}") / tokens,
        "ratio_to_floor": times.ratio(f"keys {B}", f"floor {B}"),
    }


def _times(prefix: int) -> int:
    """How many times a prefix is hashed per measurement: short prefixes more often."""
    return max(1, 4096 // prefix)


def _repeat(namespace: Namespace, tokens: list[int]) -> Callable[[], object]:
    return lambda: [namespace.keys(tokens) for _ in range(_times(len(tokens)))]
