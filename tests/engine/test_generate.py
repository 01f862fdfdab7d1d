"""The oracle: in FP32 over lossless storage, no state of the cache changes a token. And what one request reports."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec, Namespace
from kvlab.engine import Generation, generate
from kvlab.engine.pages import PagePool, PoolExhausted
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama
from kvlab.stores import MemoryStore
from tests.harness.helpers import FakeClock, attentive_model, flipped, small_spec

LENGTHS = (1, 7, 16, 63, 64, 65, 100, 127, 128, 129, 150, 192, 193, 256, 300, 31)
SMALL_BLOCK = 16
Prompts = list[list[int]]


def prompts_from(sample: Sequence[int], count: int) -> Prompts:
    """Pieces of the held-out text from all over it, of all lengths that are special."""
    step = (len(sample) - max(LENGTHS)) // count
    return [list(sample[i * step : i * step + LENGTHS[i % len(LENGTHS)]]) for i in range(count)]


def words(count: int, seed: int = 0) -> list[int]:
    """A prompt for the small models."""
    return random.Random(seed).choices(range(97), k=count)


def tokens_of(model: Llama, prompts: Prompts, new: int, cache: DistributedKVCache | None = None) -> list[list[int]]:
    return [run(model, prompt, new, cache).tokens for prompt in prompts]


def run(model: Llama, prompt: list[int], new: int, cache: DistributedKVCache | None = None) -> Generation:
    return generate(model, prompt, new, cache, stop_at_eos=False)


def full_blocks(prompt: list[int], B: int) -> int:
    """How many of a prompt's tokens a full cache gives: whole blocks, but never the last token."""
    return min(len(prompt) // B * B, len(prompt) - 1)


def check_empty(model: Llama, prompts: Prompts, plain: list[list[int]], cache: DistributedKVCache) -> None:
    """A cache that has nothing changes no token."""
    for prompt, expected in zip(prompts, plain, strict=True):
        cold = run(model, prompt, len(expected), cache)
        assert (cold.tokens, cold.cached_tokens) == (expected, 0)


def check_full(model: Llama, prompts: Prompts, plain: list[list[int]], cache: DistributedKVCache) -> None:
    """A cache that has everything gives every whole block and changes no token."""
    for prompt, expected in zip(prompts, plain, strict=True):
        warm = run(model, prompt, len(expected), cache)
        assert (warm.tokens, warm.cached_tokens) == (expected, full_blocks(prompt, cache.block_tokens))
    assert cache.stats().hit_rate == 1.0


def check_torn(model: Llama, prompts: Prompts, plain: list[list[int]], cache: DistributedKVCache) -> None:
    """A cache that lost any one block of each prompt gives what is before it and changes no token."""
    rng = random.Random(0)
    for prompt, expected in zip(prompts, plain, strict=True):
        keys = cache._namespace.keys(prompt)
        lost = rng.randrange(len(keys)) if keys else 0
        cache.store.delete_many(keys[lost : lost + 1])
        torn = run(model, prompt, len(expected), cache)
        assert (torn.tokens, torn.cached_tokens) == (expected, lost * cache.block_tokens)
    cache.stats().check()


# --- the oracle, fast ---------------------------------------------------------------------------
NEW = 48


@pytest.fixture(scope="module")
def prompts(sample: list[int]) -> Prompts:
    return prompts_from(sample, 40)


@pytest.fixture(scope="module")
def plain(model: Llama, prompts: Prompts) -> list[list[int]]:
    """What the model says without any cache."""
    return tokens_of(model, prompts, NEW)


@pytest.mark.slow
def test_no_state_of_a_packed_cache_changes_a_token(
    model: Llama, spec: KVSpec, prompts: Prompts, plain: list[list[int]]
) -> None:
    cache = DistributedKVCache(precision="fp32", compress=True, model=spec)
    check_empty(model, prompts, [tokens[:1] for tokens in plain], cache)
    check_full(model, prompts, plain, cache)
    check_torn(model, prompts[::2], plain[::2], cache)


def test_the_oracle_can_fail(model: Llama, spec: KVSpec, prompts: Prompts, plain: list[list[int]]) -> None:
    """KV of other tokens under a prompt's keys, well sealed, does change what comes out."""
    cache = DistributedKVCache(precision="fp32", model=spec)
    i = LENGTHS.index(256)
    other, kv = prompts[i + len(LENGTHS)], model.new_kv(256)
    with torch.inference_mode():
        model(torch.tensor([other]), kv)
    cache.save(prompts[i], kv[:, :, 0])
    assert run(model, prompts[i], NEW, cache).tokens != plain[i]


class DownStore(MemoryStore):
    """Says that everything is there, gives nothing, takes nothing."""

    def probe(self, keys: Sequence[bytes]) -> int:
        return len(keys)

    def get_many(self, keys: Sequence[bytes], out: Any = None, why: Any = None) -> list[Any]:
        if why is not None:
            why += ["absent"] * len(keys)
        return [None] * len(keys)

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
        return 0


class LyingStore(MemoryStore):
    """Loses, damages, cuts, mixes up and repeats what it holds, and guesses what is there. Seeded."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.lies: set[str] = set()
        self.last = b""

    def probe(self, keys: Sequence[bytes]) -> int:
        return self.rng.choice([super().probe(keys), len(keys), self.rng.randint(0, len(keys))])

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
        kept = [i for i in range(len(keys)) if self.rng.random() > 0.1]
        super().put_many([keys[i] for i in kept], [values[i] for i in kept])
        return self.rng.randint(0, len(keys))

    def get_many(self, keys: Sequence[bytes], out: Any = None, why: Any = None) -> list[Any]:
        reasons: list[str] = []
        told = [self.told(value) for value in super().get_many(keys, None, reasons)]
        if why is not None:
            why += [
                "absent" if value is None and not reason else reason
                for value, reason in zip(told, reasons, strict=True)
            ]
        return told

    def told(self, value: Any) -> Any:
        if value is None or self.rng.random() < 0.8:
            return value
        before, self.last = self.last, value
        lie = self.rng.choice(["lost", "flipped", "cut", "another", "empty", "noise"])
        self.lies.add(lie)
        return {
            "lost": None,
            "flipped": flipped(value, self.rng.randrange(len(value)), 1 << self.rng.randrange(8)),
            "cut": value[: self.rng.randrange(len(value))],
            "another": before,
            "empty": b"",
            "noise": self.rng.randbytes(len(value)),
        }[lie]


def test_a_store_that_is_down_changes_no_token(
    model: Llama, spec: KVSpec, prompts: Prompts, plain: list[list[int]]
) -> None:
    cache = DistributedKVCache(precision="fp32", store=DownStore(), model=spec)
    some = slice(2, None, 4)
    assert tokens_of(model, prompts[some], NEW, cache) == plain[some]
    assert cache.stats().hits == 0 and cache.stats().drops.total() > 0
    cache.stats().check()


def check_lies(model: Llama, owner: KVSpec | Llama, prompts: Prompts, plain: list[list[int]], rounds: int) -> None:
    """Whatever the store says, tokens stay, and every lie is a miss with a reason."""
    store = LyingStore(seed=rounds + 1)
    cache = DistributedKVCache(precision="fp32", compress=False, store=store, model=owner, block_tokens=SMALL_BLOCK)
    for _ in range(rounds):
        assert tokens_of(model, prompts, len(plain[0]), cache) == plain
    stats = cache.stats()
    stats.check()
    assert stats.hits > 10 and stats.misses.keys() >= {"absent", "gap", "length"} and len(store.lies) >= 4


def test_a_store_that_lies_changes_no_token(
    model: Llama, spec: KVSpec, prompts: Prompts, plain: list[list[int]]
) -> None:
    check_lies(model, spec, prompts[3::5], plain[3::5], rounds=2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_store_that_lies_often_changes_no_token_of_small_models(kv_heads: int) -> None:
    small = attentive_model(kv_heads=kv_heads)
    prompts = [words(20 + 13 * i, seed=i) for i in range(12)]
    check_lies(small, small, prompts, tokens_of(small, prompts, 20), rounds=8)


# --- the oracle, at length ----------------------------------------------------------------------
@pytest.mark.slow
def test_no_state_of_the_cache_changes_a_token_of_200_longer_answers(
    model: Llama, spec: KVSpec, sample: list[int]
) -> None:
    prompts = prompts_from(sample, 200)
    plain = tokens_of(model, prompts, 64)
    first = [tokens[:1] for tokens in plain]
    for compress, length in ((False, 64), (True, 8)):  # what zstd gives back are the same bytes
        answers = [tokens[:length] for tokens in plain]
        cache = DistributedKVCache(precision="fp32", compress=compress, model=spec)
        check_empty(model, prompts, first, cache)
        check_full(model, prompts, answers, cache)
        check_torn(model, prompts[::4], answers[::4], cache)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Sums are taken in another order than in all other tests."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_no_state_of_the_cache_changes_a_token_where_two_threads_share_the_sums(
    model: Llama, spec: KVSpec, sample: list[int]
) -> None:
    prompts = prompts_from(sample, 16)
    plain = tokens_of(model, prompts, 16)
    cache = DistributedKVCache(precision="fp32", compress=False, model=spec)
    for check in (check_empty, check_full, check_torn):
        check(model, prompts, plain, cache)


# --- one request --------------------------------------------------------------------------------
def fresh(owner: Llama | KVSpec, **settings: Any) -> DistributedKVCache:
    """A lossless cache of 16-token blocks."""
    defaults = {"precision": "fp32", "compress": False, "store": MemoryStore(), "block_tokens": SMALL_BLOCK}
    return DistributedKVCache(**{**defaults, "model": owner, **settings})


SMALL = attentive_model()


def test_answers_of_the_small_model_depend_on_all_of_the_prompt() -> None:
    """Else no test of its tokens could fail."""
    prompts = [[*words(60, seed=i), 5, 7] for i in range(8)]
    assert len({tuple(run(SMALL, prompt, 3).tokens) for prompt in prompts}) == len(prompts)


def test_a_prompt_of_whole_blocks_is_a_full_hit_and_its_last_token_is_computed_again() -> None:
    cache, prompt = fresh(SMALL), words(4 * SMALL_BLOCK)
    first, second = run(SMALL, prompt, 5, cache), run(SMALL, prompt, 5, cache)
    assert (first.cached_tokens, second.cached_tokens) == (0, 4 * SMALL_BLOCK - 1)
    assert first.tokens == second.tokens
    assert (cache.stats().hits, cache.stats().hit_rate) == (4, 1.0)
    assert second.saved_blocks == 0


@pytest.mark.parametrize(
    ("length", "new", "saved"), [(1, 1, 0), (15, 1, 0), (16, 1, 1), (10, 6, 0), (10, 7, 1), (33, 40, 4)]
)
def test_blocks_are_saved_for_every_token_that_was_fed(length: int, new: int, saved: int) -> None:
    """The last new token was never fed to the model: its KV does not exist."""
    cache = fresh(SMALL)
    result = run(SMALL, words(length), new, cache)
    assert result.saved_blocks == saved == cache.stats().stored
    assert (result.prompt_tokens, len(result.tokens)) == (length, new)
    known = [*words(length), *result.tokens]
    assert cache.match(known) == saved * SMALL_BLOCK


def test_what_is_saved_is_the_kv_of_a_plain_prefill() -> None:
    """Answers included, whatever part of it came from the cache."""
    cache = fresh(SMALL)
    known = words(50)
    for _ in range(3):
        result = run(SMALL, known, 30, cache)
        known = [*known, *result.tokens]
    stop = cache.match(known)
    assert stop == (len(known) - 1) // SMALL_BLOCK * SMALL_BLOCK
    got, want = SMALL.new_kv(stop), SMALL.new_kv(stop)
    assert cache.load(known, 0, stop, got[:, :, 0]) == stop
    SMALL(torch.tensor([known[:stop]]), want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_the_next_turn_of_a_chat_finds_the_answer_before() -> None:
    cache, chat = fresh(SMALL), words(40)
    chat += run(SMALL, chat, 24, cache).tokens
    chat += words(10, seed=1)
    turn = run(SMALL, chat, 8, cache)
    assert turn.cached_tokens == 48  # 63 tokens are known after the first turn: three blocks
    assert turn.tokens == run(SMALL, chat, 8).tokens


def test_prompts_with_one_beginning_share_it() -> None:
    cache, system = fresh(SMALL), words(48)
    for i in range(4):
        prompt = [*system, *words(20, seed=i + 1)]
        shared = run(SMALL, prompt, 4, cache)
        assert shared.cached_tokens == (48 if i else 0)
        assert shared.tokens == run(SMALL, prompt, 4).tokens


def test_caches_in_two_places_share_through_the_store() -> None:
    store, prompt = MemoryStore(), words(60)
    run(SMALL, prompt, 4, fresh(SMALL, store=store))
    assert run(SMALL, prompt, 4, fresh(attentive_model(), store=store)).cached_tokens == 48
    assert run(SMALL, prompt, 4, fresh(attentive_model(seed=1), store=store)).cached_tokens == 0


def test_generation_stops_at_the_end_of_text() -> None:
    answer = run(SMALL, words(20), 12).tokens
    stop = answer[5]
    model = attentive_model(eos_token_ids=(96, stop))
    cut = answer[: answer.index(stop) + 1]
    assert generate(model, words(20), 12).tokens == cut
    assert generate(model, words(20), 12, stop_at_eos=False).tokens == answer
    cache = fresh(model)
    assert generate(model, words(20), 12, cache).tokens == generate(model, words(20), 12, cache).tokens == cut


def test_without_a_cache_nothing_is_reported_of_one() -> None:
    result = run(SMALL, words(40), 3)
    assert (result.prompt_tokens, result.cached_tokens, result.saved_blocks) == (40, 0, 0)
    assert dataclasses.asdict(result).keys() >= {"ttft_s", "total_s"}


def test_a_prompt_may_be_any_sequence() -> None:
    prompt = words(40)
    expected = run(SMALL, prompt, 4).tokens
    for same in (tuple(prompt), torch.tensor(prompt)):
        cache = fresh(SMALL)
        for _ in range(2):
            assert generate(SMALL, same, 4, cache, stop_at_eos=False).tokens == expected
        assert cache.stats().hits == 2


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    cache, prompt = fresh(SMALL), words(32)
    kv = SMALL.new_kv(32)
    SMALL(torch.tensor([prompt]), kv)
    cache.save(prompt, kv[:, :, 0])
    for asked, cached in ((prompt, 31), ([*prompt, 1], 32), (words(5, seed=9), 0)):
        assert run(SMALL, asked, 4, cache).cached_tokens == cached


# --- lossy storage ------------------------------------------------------------------------------
def test_fp16_storage_changes_few_tokens(model: Llama, spec: KVSpec, prompts: Prompts, plain: list[list[int]]) -> None:
    """A statistic, not an identity: most answers begin as before."""
    cache = DistributedKVCache(precision="fp16", store=MemoryStore(), model=spec, block_tokens=SMALL_BLOCK)
    long = [(p, t) for p, t in zip(prompts, plain, strict=True) if len(p) > 3 * SMALL_BLOCK]
    same = 0
    for prompt, expected in long:
        run(model, prompt, 1, cache)
        warm = run(model, prompt, 4, cache)
        assert warm.cached_tokens == full_blocks(prompt, SMALL_BLOCK)
        same += warm.tokens == expected[:4]
    assert same >= 0.8 * len(long)


# --- wrong calls --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        ([], 4, "at least one token"),
        ([97], 4, "0 … 96, got 97"),
        ([0.5], 4, "integer tokens"),
        ([1] * 250, 7, "context is 256 tokens"),
        ([1], 0, "whole number of at least 1, got 0"),
        ([1], -1, "whole number of at least 1"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_a_request_that_cannot_be_served_is_refused_before_the_cache_is_asked(
    prompt: list[Any], new: int, said: str
) -> None:
    cache = fresh(SMALL)
    before = cache.stats()
    with pytest.raises(InputError, match=said):
        generate(SMALL, prompt, new, cache)
    assert cache.stats() == before


def test_a_prompt_that_just_fits_is_served() -> None:
    assert len(run(SMALL, [1] * 250, 6).tokens) == 6


def test_a_cache_for_another_shape_is_refused() -> None:
    cache = fresh(small_spec())
    with pytest.raises(InputError, match="expected KV of shape"):
        generate(SMALL, words(40), 4, cache)


def test_keys_of_the_cache_are_those_of_its_model(spec: KVSpec) -> None:
    cache = fresh(spec, salt="tenant")
    assert cache._namespace == Namespace(spec.fingerprint, "fp32", b"tenant", SMALL_BLOCK)


# --- pages that requests share ------------------------------------------------------------------
def shared_prefixes(sample: Sequence[int], count: int) -> Prompts:
    """Prompts that begin like earlier ones: whole, cut anywhere, or changed at one token."""
    rng = random.Random(0)
    prompts = [list(sample[:256])]
    while len(prompts) < count:
        prompt, more = rng.choice(prompts[-5:]), rng.randint(0, 200)
        at = rng.randrange(len(sample) - more)
        prompts.append([*prompt[: rng.randint(1, len(prompt))], *sample[at : at + more]][:300])
    return prompts


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_no_state_of_the_pool_changes_a_token(model: Llama, sample: list[int], policy: str) -> None:
    """200 prompts with common prefixes over a pool that holds a few of them, with and without a cache behind."""
    prompts = shared_prefixes(sample, 200)
    cache = DistributedKVCache(store=MemoryStore(), model=model, precision="fp32", compress=False)
    pool = PagePool(model, 60, cache.namespace, policy=policy)
    for i, prompt in enumerate(prompts):
        plain = generate(model, prompt, 12, stop_at_eos=False)
        paged = generate(model, prompt, 12, cache if i % 2 else None, stop_at_eos=False, pool=pool)
        assert paged.tokens == plain.tokens, f"prompt {i}, {paged.shared_tokens} shared of {len(prompt)}"
        pool.check_integrity()
    assert pool.index.evicted > 50 and pool.counts["hits"] > 50 and not pool.tables


def test_a_second_request_takes_its_prefix_from_the_pool_and_the_rest_from_the_cache() -> None:
    prompt = words(80)
    cache = fresh(SMALL)
    pool = PagePool(SMALL, 20, cache.namespace)
    first = generate(SMALL, prompt[:40], 4, cache, pool=pool)
    assert (first.cached_tokens, first.shared_tokens) == (0, 0)
    run(SMALL, prompt, 4, cache)  # another worker saves the rest
    second = generate(SMALL, prompt, 4, cache, pool=pool)
    assert (second.cached_tokens, second.shared_tokens) == (79, 32)
    assert second.tokens == generate(SMALL, prompt, 4).tokens
    third = generate(SMALL, prompt, 4, pool=pool)
    assert (third.cached_tokens, third.shared_tokens) == (79, 79)


def test_blocks_of_a_pool_go_back_into_a_cache_that_lost_them() -> None:
    prompt, cache = words(48), fresh(SMALL)
    pool = PagePool(SMALL, 20, cache.namespace)
    generate(SMALL, prompt, 2, cache, pool=pool)
    cache.store.delete_many(cache.namespace.keys(prompt))
    assert generate(SMALL, prompt, 2, cache, pool=pool).saved_blocks == 3
    assert cache.match(prompt) == 48


def test_a_pool_that_is_too_small_is_an_error_and_loses_nothing() -> None:
    pool = PagePool(SMALL, 2, Namespace(bytes(32), "fp32", b"", SMALL_BLOCK))
    for prompt, new in ((words(40), 1), (words(32), 2)):  # at once, and while decoding
        with pytest.raises(PoolExhausted, match="wait for a request to end, or use a pool of more than 2 pages"):
            generate(SMALL, prompt, new, stop_at_eos=False, pool=pool)
        pool.check_integrity()
        assert not pool.tables
    assert len(generate(SMALL, words(30), 2, stop_at_eos=False, pool=pool).tokens) == 2


def test_a_pool_and_a_cache_of_other_blocks_are_refused() -> None:
    cache = fresh(SMALL)
    for names in (Namespace(bytes(32), "fp32", b"", 64), Namespace(bytes(32), "int8", b"", SMALL_BLOCK)):
        with pytest.raises(InputError, match=r"give the pool cache\.namespace"):
            generate(SMALL, words(9), 1, cache, pool=PagePool(SMALL, 8, names))


# --- how long blocks are kept -------------------------------------------------------------------
@pytest.mark.parametrize("tiers", [False, True])
def test_a_request_says_how_long_its_blocks_are_kept(tiers: bool) -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=100, clock=clock)
    inner = DistributedKVCache(store=store, model=SMALL, precision="fp32", block_tokens=16, describe=False)
    prompts = {ttl_s: words(48, seed=int(ttl_s or 0)) for ttl_s in (20, 500, None)}
    with TieredCache(inner, 1 << 20) if tiers else inner as cache:
        for ttl_s, prompt in prompts.items():
            generate(SMALL, prompt, 2, cache, ttl_s=ttl_s)
        for age, alive in ((0, [3, 3, 3]), (21, [0, 3, 3]), (80, [0, 3, 0]), (400, [0, 0, 0])):
            clock.now += age
            assert [store.probe(cache.namespace.keys(prompt)) for prompt in prompts.values()] == alive


def test_a_ttl_that_nobody_can_keep_is_refused_before_anything_is_computed() -> None:
    with DistributedKVCache(store=MemoryStore(), model=SMALL) as endless:
        for cache, ttl_s, said in (
            (None, 60, "got NoneType"),
            (endless, 60, "a store with a TTL of its own"),
            (endless, -1, "a TTL"),
        ):
            with pytest.raises(ConfigError, match=said):
                generate(SMALL, words(9), 1, cache, ttl_s=ttl_s)
        assert endless.store.stats().offered == 0
