"""The whole system in one run: a trained model answers a prompt without the cache, then with it.

All printed numbers are measured in this run. The run fails if the text round trip fails, the tokens
differ, or the hit rate over full blocks is below 100 %.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlab.cache import DistributedKVCache, KVCache
from kvlab.engine import generate
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.reachable import open_reachable
from kvlab.lab.timing import NOISY_BEYOND, Timings, time_rounds
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of

PREFIXES = (128, 256, 512, 1024, 2048)
SUFFIX = 16
NEW_TOKENS = 32
TTL_S = 600  # of the keys that the demo writes
Say = Callable[[str], None]


def hit_rate(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    """Share of a prompt's FULL blocks that came from the cache; 0 for a prompt without full blocks."""
    full = prompt_tokens // block_tokens
    return cached_tokens // block_tokens / full if full else 0.0


HEADER = f"{'prefix':>8} {'cold':>9} {'warm':>9} {'faster':>8} {'record bytes':>13} {'zstd warm':>10} {'faster':>8}"


@dataclass(frozen=True)
class Row:
    """One prefix length: time to first token without a cache (cold) and with the prefix in the store (warm)."""

    prefix_tokens: int
    cold_ms: float
    warm_ms: float
    speedup: float
    bytes: int
    zstd_ms: float
    zstd_speedup: float
    zstd_bytes: int
    hit_rate: float
    tokens_equal: bool
    aa_ratio: float


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        text_cached, text_retrieved: whether KV by text was stored and came back.
        answer_equal: whether the answer that is shown has the same tokens with and without the cache.
        from_an_earlier_run: tokens of its prompt that the store had before this run, of 512.
    """

    text_cached: bool
    text_retrieved: bool
    answer_equal: bool
    from_an_earlier_run: int
    rows: Sequence[Row]
    noisy: bool

    @property
    def tokens_equal(self) -> bool:
        """Whether every warm answer has the same tokens as the cold answer."""
        return self.answer_equal and all(row.tokens_equal for row in self.rows)

    @property
    def hit_rate_full_blocks(self) -> float:
        """The lowest hit rate over full blocks among all warm requests."""
        return min(row.hit_rate for row in self.rows)

    @property
    def ok(self) -> bool:
        """Whether all checks of the demo succeeded."""
        return self.text_cached and self.text_retrieved and self.tokens_equal and self.hit_rate_full_blocks == 1.0

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "ok": self.ok,
            "tokens_equal": self.tokens_equal,
            "hit_rate_full_blocks": self.hit_rate_full_blocks,
            "from_an_earlier_run": self.from_an_earlier_run,
            "rows": [vars(row) for row in self.rows],
            "precision": "fp32",
            "threads": torch.get_num_threads(),
            "machine": describe_machine(),
            "versions": versions(),
            "noisy": self.noisy,
        }


def run(store: str = "fakeredis://", say: Say = print, prefixes: Sequence[int] = PREFIXES) -> DemoResult:
    """Run the demo against the store with this URL. Each line of output is passed to `say`.

    Raises:
        ConfigError: the URL is not a store URL.
        KVLabError: the store does not answer or cannot be used.
    """
    model, tokenizer = load_model(), Tokenizer()
    sample = held_out_tokens(tokenizer)
    say(f"machine: {describe_machine()}, {torch.get_num_threads()} threads")
    with _Caches(store, model) as caches:
        say(f"store:   {caches.raw.health().detail}")
        cached, retrieved = _text_round_trip(caches.raw)
        say(f"Cached KV tensors: {cached}")
        say(f"Retrieved from cache: {retrieved}")
        equal, left = _show_answer(model, tokenizer, sample, caches.kept, say)
        say(HEADER)
        rows = []
        for n in prefixes:
            rows.append(_measure(model, sample[: n + SUFFIX], caches))
            say(_line(rows[-1]))
    result = DemoResult(cached, retrieved, equal, left, rows, any(abs(r.aa_ratio - 1) > NOISY_BEYOND for r in rows))
    if result.noisy:
        say("This machine was busy: two measurements of the same work differ by more than 10 %.")
    say(f"Same tokens cold and warm: {result.tokens_equal}")
    say(f"Cache hit rate: {result.hit_rate_full_blocks:.0%}")
    say(f"Checked: KV by text, and {len(rows)} prompts by tokens, cold, warm and warm with zstd")
    say("All tests completed!" if result.ok else "FAILED: see the lines above")
    return result


class _Caches:
    """Caches over one store: with raw records, with zstd, and one whose blocks a later run finds.

    The salts of the first two are random, so that no hit comes from an earlier run.
    """

    def __init__(self, url: str, model: Llama) -> None:
        spec = spec_of(model)
        random = os.urandom(16)

        def make(compress: bool, salt: bytes) -> DistributedKVCache:
            return DistributedKVCache(
                store=open_reachable(url, ttl_s=TTL_S),
                model=spec,
                precision="fp32",
                compress=compress,
                salt=salt,
                describe=False,  # a salt for this run alone says nothing to others
            )

        self.raw, self.zstd = make(False, random + b"raw"), make(True, random + b"zstd")
        self.kept = make(False, b"demo")

    def __enter__(self) -> _Caches:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()
        self.zstd.close()
        self.kept.close()


def _text_round_trip(cache: DistributedKVCache) -> tuple[bool, bool]:
    """Store and load one layer's tensors by text. Returns whether each call succeeded."""
    k, v = torch.randn(2, 1, 2, 16, 64, generator=torch.Generator().manual_seed(0))
    cached = cache.cache_kv("def main():", layer=0, k_tensor=k, v_tensor=v)
    got = cache.get_cached_kv("def main():", layer=0)
    return cached, got is not None and torch.equal(got[0], k) and torch.equal(got[1], v)


def _show_answer(model: Llama, tokenizer: Tokenizer, sample: list[int], cache: KVCache, say: Say) -> tuple[bool, int]:
    """Show an answer without the cache and with it. Returns whether they are equal, and what the cache had before."""
    prompt = sample[: 512 + SUFFIX]
    cold = generate(model, prompt, NEW_TOKENS)
    first = generate(model, prompt, NEW_TOKENS, cache)  # fills the cache
    warm = generate(model, prompt, NEW_TOKENS, cache)
    say(f"prompt:  … {_in_one_line(tokenizer.decode(prompt[-12:]))} ({len(prompt)} tokens; ↵ is a new line)")
    say(f"cold:    {_in_one_line(tokenizer.decode(cold.tokens))} ({cold.cached_tokens} tokens from the cache)")
    say(f"warm:    {_in_one_line(tokenizer.decode(warm.tokens))} ({warm.cached_tokens} tokens from the cache)")
    if first.cached_tokens:
        say(f"         {first.cached_tokens} of these tokens were in the store before: an earlier run has left them")
    return cold.tokens == first.tokens == warm.tokens, first.cached_tokens


def _in_one_line(text: str) -> str:
    """Text with a sign in place of new lines and spaces around them, and unprintable characters escaped."""
    joined = " ↵ ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in joined)


def _measure(model: Llama, prompt: list[int], caches: _Caches) -> Row:
    cold = generate(model, prompt, NEW_TOKENS)
    answers, rates, sizes = [], [], []
    for cache in (caches.raw, caches.zstd):
        generate(model, prompt, NEW_TOKENS, cache)  # fills the cache
        before = cache.stats().bytes_read
        warm = generate(model, prompt, NEW_TOKENS, cache)
        answers.append(warm.tokens)
        rates.append(hit_rate(len(prompt), warm.cached_tokens, cache.block_tokens))
        sizes.append(cache.stats().bytes_read - before)
    times = _time_first_token(model, prompt, caches)
    return Row(
        prefix_tokens=len(prompt) - SUFFIX,
        cold_ms=times.median_ms("cold"),
        warm_ms=times.median_ms("raw"),
        speedup=times.ratio("cold", "raw"),
        bytes=sizes[0],
        zstd_ms=times.median_ms("zstd"),
        zstd_speedup=times.ratio("cold", "zstd"),
        zstd_bytes=sizes[1],
        hit_rate=min(rates),
        tokens_equal=all(tokens == cold.tokens for tokens in answers),
        aa_ratio=times.aa_ratio,
    )


def _time_first_token(model: Llama, prompt: list[int], caches: _Caches) -> Timings:
    """Time to first token without a cache and with each cache. Only the prefill differs, as one token is generated."""
    return time_rounds(
        {
            "cold": lambda: generate(model, prompt, 1),
            "raw": lambda: generate(model, prompt, 1, caches.raw),
            "zstd": lambda: generate(model, prompt, 1, caches.zstd),
        }
    )


def _line(r: Row) -> str:
    return (
        f"{r.prefix_tokens:>8} {r.cold_ms:>6.1f} ms {r.warm_ms:>6.1f} ms {r.speedup:>7.1f}x "
        f"{r.bytes:>13,} {r.zstd_ms:>7.1f} ms {r.zstd_speedup:>7.1f}x"
    )
