"""The tiers of one engine: what is written and kept where, what is waited for, and what a lost tier changes."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.engine import Generation, generate
from kvlab.engine import fetch as fetch_module
from kvlab.engine.fetch import Fetch
from kvlab.engine.pages import PagePool
from kvlab.engine.planner import EXPLORE
from kvlab.engine.tiers import WRITES, TieredCache
from kvlab.errors import ConfigError, InputError
from kvlab.stores import MemoryStore, Store, WriteBehind
from tests.harness.helpers import attentive_model, blank, exact_kv, small_spec

MODEL = attentive_model()
SPEC = small_spec()
B = 16
WAIT_S = 30.0


def tiered(store: Store | None = None, blocks: int = 64, model: Any = MODEL, **settings: Any) -> TieredCache:
    """Tiers with blocks of 16 tokens in FP32, without a planner unless it is asked for."""
    inner = DistributedKVCache(
        precision="fp32",
        compress=False,
        store=store or MemoryStore(),
        model=model,
        block_tokens=B,
        describe=False,  # tests count what is in the store
    )
    bytes_each = 4 * B * inner.spec.layers * 2 * inner.spec.heads * inner.spec.head_dim
    return TieredCache(inner, blocks * bytes_each, **{"planner": False, "window_bytes": 1, **settings})


def words(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def run(prompt: list[int], cache: TieredCache | None = None, pool: PagePool | None = None, new: int = 4) -> Generation:
    result = generate(MODEL, prompt, new, cache, stop_at_eos=False, pool=pool)
    if cache is not None:
        cache.host.check_integrity()
        cache.stats().check()
    if pool is not None:
        pool.check_integrity()
        assert not pool.tables
    return result


def keys_in(store: MemoryStore) -> set[bytes]:
    return set(store._entries)


class GatedStore(MemoryStore):
    """Each `get_many` waits for its gate, which a test opens. `began` counts the calls that have begun."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.gets = 0

    def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
        self.gets += 1
        self.began.release()
        assert self.gate.acquire(timeout=WAIT_S)
        return super().get_many(keys, out, reasons)


# --- sources ------------------------------------------------------------------------------------
def test_hits_are_counted_by_source() -> None:
    store, prompt = MemoryStore(), words(5 * B + 3)
    plain = run(prompt).tokens
    cache = tiered(store)
    pool = PagePool(MODEL, 20, cache.namespace)
    results = [run(prompt, cache), run(prompt, cache), run(prompt, tiered(store))]
    results += [run(prompt, cache, pool), run(prompt, cache, pool)]
    assert [r.sources for r in results] == [{}, {"host": 80}, {"store": 80}, {"host": 80}, {"device": 80}]
    assert all(r.tokens == plain and r.cached_tokens == sum(r.sources.values()) for r in results)
    assert cache.stats().sources == Counter(host=10)


def test_what_comes_from_the_store_is_promoted() -> None:
    store, prompt = MemoryStore(), words(4 * B + 1)
    run(prompt, tiered(store))
    cache = tiered(store)
    assert [run(prompt, cache).sources for _ in range(2)] == [{"store": 64}, {"host": 64}]


def test_some_blocks_from_each_tier() -> None:
    store, prompt = MemoryStore(), words(6 * B + 5)
    run(prompt, tiered(store))
    cache = tiered(store)
    pool = PagePool(MODEL, 30, cache.namespace)
    run(prompt[: 2 * B + 1], cache, pool)  # on the device, and in host memory
    for key in cache.namespace.keys(prompt)[:2]:
        cache.host.remove(key)
    cache.host.put(cache.namespace.keys(prompt)[3], cache.store.parts_of(kv_of(prompt)[:, :, :, 3 * B : 4 * B]))
    mixed = run(prompt, cache, pool)
    assert mixed.sources == {"device": 32, "host": 16, "store": 48}
    assert mixed.tokens == run(prompt).tokens


def kv_of(prompt: list[int]) -> torch.Tensor:
    """The KV of a plain prefill, [L, P, H, T, D]."""
    kv = MODEL.new_kv(len(prompt))
    with torch.inference_mode():
        MODEL(torch.tensor([prompt]), kv)
    return kv[:, :, 0]


@pytest.mark.parametrize("length", [3 * B - 1, 3 * B, 3 * B + 1])
def test_the_last_token_is_always_computed(length: int) -> None:
    cache, prompt = tiered(), words(length)
    results = [run(prompt, cache) for _ in range(2)]
    assert results[1].cached_tokens == min(length // B * B, length - 1)
    assert results[0].tokens == results[1].tokens


# --- gaps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [(0,), (2,), (1, 3), (4,), (0, 1, 2, 3, 4)])
def test_only_the_lost_blocks_are_computed(lost: tuple[int, ...]) -> None:
    store, prompt = MemoryStore(), words(5 * B + 7)
    plain = run(prompt, tiered(store)).tokens
    cache = tiered(store)
    keys = cache.namespace.keys(prompt)
    store.delete_many([keys[i] for i in lost])
    result = run(prompt, cache)
    assert (result.tokens, result.cached_tokens) == (plain, (5 - len(lost)) * B)
    assert keys_in(store) >= set(keys)  # the gap is closed


@pytest.mark.parametrize("lost", [(0,), (2,), (1, 3)])
def test_blocks_that_vanish_after_the_plan_are_computed(lost: tuple[int, ...]) -> None:
    class Vanishing(MemoryStore):
        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            self.delete_many([key for key in keys if key in vanish])
            return super().get_many(keys, out, reasons)

    vanish: set[bytes] = set()
    store, prompt = Vanishing(), words(5 * B + 7)
    plain = run(prompt, tiered(store)).tokens
    cache = tiered(store)
    vanish |= {cache.namespace.keys(prompt)[i] for i in lost}
    result = run(prompt, cache)
    assert (result.tokens, result.sources) == (plain, {"store": (5 - len(lost)) * B})
    assert cache.stats().misses == Counter(absent=len(lost))


# --- what is written when -----------------------------------------------------------------------
def test_write_through_writes_new_blocks_at_once() -> None:
    store = MemoryStore()
    run(words(4 * B + 1), tiered(store, write="through"))
    assert len(keys_in(store)) == 4


def test_write_back_writes_what_leaves_host_memory_and_the_remainder_at_close() -> None:
    store = MemoryStore()
    cache = tiered(store, blocks=5, write="back")
    first, second = words(4 * B + 1), words(4 * B + 1, seed=1)
    run(first, cache)
    assert not keys_in(store) and len(cache.host) == 4
    run(second, cache)
    assert keys_in(store) == set(cache.namespace.keys(first)[:3]) and len(cache.host) == 5
    assert run(first, cache).cached_tokens == 4 * B
    cache.flush()
    assert keys_in(store) == {*cache.namespace.keys(first), *cache.namespace.keys(second)}
    assert run(first, tiered(store)).sources == {"store": 64}


def test_write_back_without_host_memory_writes_at_once() -> None:
    store = MemoryStore()
    run(words(3 * B + 1), tiered(store, blocks=0, write="back"))
    assert len(keys_in(store)) == 3


def test_closing_writes_back() -> None:
    store, kept = MemoryStore(), set[bytes]()
    cache = tiered(store, write="back")
    run(words(3 * B + 1), cache)
    store.close = lambda: kept.update(keys_in(store))  # type: ignore[method-assign]
    cache.close()
    assert len(kept) == 3


@pytest.mark.parametrize("with_pool", [False, True])
def test_selective_writes_blocks_that_a_second_request_needs(with_pool: bool) -> None:
    store = MemoryStore()
    cache = tiered(store, write="selective")
    pool = PagePool(MODEL, 60, cache.namespace) if with_pool else None
    shared = words(3 * B)
    prompts = [[*shared, *words(2 * B + 1, seed=i)] for i in (1, 2, 3)]
    run(prompts[0], cache, pool)
    assert not keys_in(store)
    run(prompts[1], cache, pool)
    assert keys_in(store) == set(cache.namespace.keys(shared))
    run(prompts[1], cache, pool)
    assert keys_in(store) == set(cache.namespace.keys(prompts[1]))


@pytest.mark.parametrize("chunk", [B, 2 * B, 5 * B])
def test_selective_counts_requests_and_not_the_chunks_of_their_prefill(chunk: int) -> None:
    """SGLang PR #36647: with chunks, either nothing was ever written or all of the first request."""
    store, prompt, kv = MemoryStore(), words(5 * B), exact_kv(SPEC, 5 * B)
    cache = tiered(store, model=SPEC, write="selective")
    for request in range(3):
        cache.locate(cache.namespace.keys(prompt))
        for stop in range(chunk, 5 * B + 1, chunk):
            cache.save(prompt[:stop], kv[:, :, :, :stop], start=stop - chunk)
        last = 5 * B // chunk * chunk
        assert len(keys_in(store)) == (last // B if request else 0)


def test_a_block_seen_twice_is_written_though_host_memory_lost_it() -> None:
    store = MemoryStore()
    cache = tiered(store, blocks=2, write="selective")
    first = words(2 * B + 1)
    for prompt in (first, words(2 * B + 1, seed=1), first):
        run(prompt, cache)
    assert keys_in(store) == set(cache.namespace.keys(first))


def test_a_save_that_the_store_refuses_is_no_hit_elsewhere() -> None:
    class Refuses(MemoryStore):
        def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
            return 0

    store, prompt = Refuses(), words(3 * B + 1)
    cache = tiered(store)
    assert run(prompt, cache).saved_blocks == 3  # in host memory
    assert run(prompt, tiered(store)).cached_tokens == 0
    assert cache.stats().drops == Counter(store=3)


def test_values_that_the_precision_cannot_hold_drop_their_block_and_those_after_it() -> None:
    inner = DistributedKVCache(precision="fp16", store=MemoryStore(), model=SPEC, block_tokens=B)
    cache, kv = TieredCache(inner, 1 << 20, planner=False), exact_kv(SPEC, 4 * B)
    kv[0, 0, 0, 2 * B, 0] = 70000.0
    assert cache.save(words(4 * B), kv) == 2
    assert (cache.match(words(4 * B)), len(cache.host), cache.stats().drops) == (2 * B, 2, Counter(overflow=2))


# --- what is kept where -------------------------------------------------------------------------
def test_exclusive_tiers_keep_each_block_once() -> None:
    cache = tiered(exclusive=True, blocks=64)
    pool = PagePool(MODEL, 8, cache.namespace)
    first, second = words(4 * B + 1), words(5 * B + 1, seed=1)
    run(first, cache, pool)
    assert len(cache.host) == 0
    run(second, cache, pool)  # needs pages: blocks of the first go to host memory
    on_device, on_host = set(pool.index.blocks), set(cache.host._row_of)
    assert on_host and not on_device & on_host
    assert on_device | on_host == {*cache.namespace.keys(first), *cache.namespace.keys(second)}
    again = run(first, cache, pool)
    assert again.sources["host"] == len(on_host) * B and again.tokens == run(first).tokens
    assert not set(pool.index.blocks) & set(cache.host._row_of)


def test_inclusive_tiers_keep_a_copy_and_a_device_hit_is_a_use_of_it() -> None:
    cache = tiered(blocks=4)
    pool = PagePool(MODEL, 60, cache.namespace)
    often, once = words(2 * B + 1), [words(B + 1, seed=i) for i in range(1, 5)]
    for prompt in once:
        run(often, cache, pool)
        run(prompt, cache, pool)
    assert set(cache.namespace.keys(often)) <= set(cache.host._row_of)


def test_exclusive_tiers_need_a_pool_that_remembers() -> None:
    with pytest.raises(InputError, match="pool with a namespace"):
        run(words(B + 1), tiered(exclusive=True))


def test_exclusive_write_back_keeps_what_the_store_lacks() -> None:
    store = MemoryStore()
    cache = tiered(store, exclusive=True, write="back")
    pool = PagePool(MODEL, 10, cache.namespace)
    prompts = [words(4 * B + 1, seed=i) for i in range(4)]
    for prompt in prompts:
        run(prompt, cache, pool)
    cache.flush()
    assert keys_in(store) == {key for prompt in prompts for key in cache.namespace.keys(prompt)}


# --- waiting ------------------------------------------------------------------------------------
def filled_store(prompt: list[int]) -> GatedStore:
    store = GatedStore()
    run(prompt, tiered(store))
    return store


def test_fetch_unpack_and_copy_of_different_windows_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window n is fetched while n - 1 is unpacked and n - 2 copied: each waits until the others have begun.

    If one of them began only after another's end, this test would fail after WAIT_S.
    """
    monkeypatch.setattr(fetch_module, "UNPACKERS", 1)  # with two, windows may overtake each other
    prompt, windows = words(5 * B), 5
    began = {(stage, n): threading.Event() for stage in ("fetch", "unpack", "copy") for n in range(windows)}
    fetches = iter(range(windows))

    def meet(stage: str, n: int, *others: tuple[str, int]) -> None:
        began[stage, n].set()
        for other in others:
            assert other not in began or began[other].wait(WAIT_S), f"{stage} {n} ends before {other} begins"

    class Store(MemoryStore):
        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            n = next(fetches)
            meet("fetch", n, ("unpack", n - 1), ("copy", n - 2))
            return super().get_many(keys, out, reasons)

    store = Store()
    run(prompt, tiered(store))
    cache = tiered(store)
    keys = cache.namespace.keys(prompt)
    unpack, copy = cache.store.unpack, fetch_module.from_parts

    def unpack_and_meet(key: bytes, value: Any, reason: str) -> Any:
        n = keys.index(key)
        meet("unpack", n, ("fetch", n + 1))
        return unpack(key, value, reason)

    def copy_and_meet(parts: Any, precision: str, axis: int, out: torch.Tensor) -> None:
        n = places.index(out.data_ptr())
        meet("copy", n, ("fetch", n + 2))
        copy(parts, precision, axis, out)

    monkeypatch.setattr(cache.store, "unpack", unpack_and_meet)
    monkeypatch.setattr(fetch_module, "from_parts", copy_and_meet)
    kv = blank_kv(windows * B)
    outs = [kv[:, :, :, i * B : (i + 1) * B] for i in range(windows)]
    places = [out.data_ptr() for out in outs]
    fetch = cache.fetch(keys, ["store"] * windows, outs)
    assert fetch.finish() == [True] * windows
    torch.testing.assert_close(kv, kv_of(prompt), rtol=0, atol=1e-4)
    spans = {(span.stage, span.window): span for span in fetch.trace}
    assert len(spans) == 3 * windows
    for n in range(2, windows):
        together = [spans["fetch", n], spans["unpack", n - 1], spans["copy", n - 2]]
        for one, other in itertools.combinations(together, 2):
            if {one.stage, other.stage} != {"unpack", "copy"}:  # these meet the fetch, not each other
                assert max(one.begin, other.begin) < min(one.end, other.end)


def blank_kv(tokens: int) -> torch.Tensor:
    return torch.full_like(MODEL.new_kv(tokens)[:, :, 0], torch.nan)


def start_fetch(cache: TieredCache, prompt: list[int]) -> tuple[Fetch, torch.Tensor]:
    keys = cache.namespace.keys(prompt)
    kv = blank_kv(len(keys) * B)
    return cache.fetch(keys, ["store"] * len(keys), [kv[:, :, :, i * B : (i + 1) * B] for i in range(len(keys))]), kv


def test_who_does_not_wait_takes_what_is_there_and_a_late_block_goes_to_host_memory_only() -> None:
    prompt = words(4 * B)
    store = filled_store(prompt)
    cache = tiered(store)
    store.gate.release(2)
    fetch, kv = start_fetch(cache, prompt)
    for _ in range(3):
        assert store.began.acquire(timeout=WAIT_S)
    while fetch._unpacked.qsize() < 2:
        pass
    assert fetch.finish(0) == [True, True, False, False]
    store.gate.release(2)
    keys = cache.namespace.keys(prompt)
    deadline = threading.Event()
    for _ in range(1000):
        if keys[2] in cache.host:
            break
        deadline.wait(0.01)
    assert keys[2] in cache.host and keys[3] not in cache.host  # a window that has not begun is not fetched
    assert kv[:, :, :, 2 * B :].isnan().all() and not kv[:, :, :, : 2 * B].isnan().any()
    assert store.gets == 3


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_load_of_many_windows_has_one_deadline() -> None:
    """Every window takes a little less than the deadline of a call. The engine waits for one, not for eight."""
    prompt, clock = words(8 * B), Clock()

    class Slow(MemoryStore):
        deadline_s = 1.0

        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            clock.now += 0.9
            return super().get_many(keys, out, reasons)

    store = Slow()
    run(prompt, tiered(store))
    cache = tiered(store, clock=clock)
    fetch, _ = start_fetch(cache, prompt)
    filled = fetch.finish(None)
    assert 1 <= sum(filled) <= 2 and clock.now - 100.0 < 2.0
    cache.count(fetch, filled, range(8))
    assert cache.stats().misses == Counter(late=8 - sum(filled))


@pytest.mark.parametrize("jump", [-1e6, 1e6, float("nan")])
def test_a_clock_that_jumps_costs_at_most_a_miss(jump: float) -> None:
    prompt, clock = words(4 * B + 3), Clock()
    plain = run(prompt).tokens

    class Jumps(MemoryStore):
        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            clock.now += jump
            return super().get_many(keys, out, reasons)

    store = Jumps()
    run(prompt, tiered(store))
    cache = tiered(store, clock=clock, planner=True, blocks=0)
    for _ in range(6):
        assert run(prompt, cache).tokens == plain


def test_a_store_that_raises_is_a_miss_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(MemoryStore):
        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            raise RuntimeError("a bug")

    store, prompt = Raises(), words(3 * B + 1)
    plain = run(prompt, tiered(store)).tokens
    cache = tiered(store)
    for _ in range(3):  # the threads go on
        result = run(prompt, cache)
        assert (result.tokens, result.cached_tokens) == (plain, 0)
        for key in cache.namespace.keys(prompt):
            cache.host.remove(key)
    assert cache.stats().misses == Counter(error=9)
    assert "a fetch failed" in caplog.text


def test_host_memory_that_fails_while_a_block_is_promoted_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    store, prompt = MemoryStore(), words(3 * B + 1)
    plain = run(prompt, tiered(store)).tokens
    cache = tiered(store)

    def put(*_: Any) -> Any:
        raise MemoryError

    real, cache.host.put = cache.host.put, put  # type: ignore[method-assign]
    fetched = [i for i, there in enumerate(start_fetch(cache, prompt[: 3 * B])[0].finish()) if there]
    assert fetched == [0, 1, 2]  # each window was unpacked before host memory failed
    cache.host.put = real  # type: ignore[method-assign]
    assert run(prompt, cache).tokens == plain
    assert "unpacking failed" in caplog.text


def test_a_probe_teaches_the_planner_that_a_slow_wire_has_become_fast() -> None:
    prompt, clock, slow = words(8 * B + 3), Clock(), [1.0]

    class Wire(MemoryStore):
        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            clock.now += slow[0] * len(keys)
            return super().get_many(keys, out, reasons)

    store = Wire()
    run(prompt, tiered(store))
    cache = tiered(store, blocks=0, planner=True, clock=clock)
    predicted = []
    for number in range(10 * EXPLORE):
        slow[0] = 1.0 if number < 2 * EXPLORE else 1e-6
        plan = run(prompt, cache).plan
        predicted.append(plan.predicted_s if plan.why == "fetch" else plan.rejected.get("fetch", 0.0))
        if plan.probe is not None:
            threading.Event().wait(0.02)  # it runs in another thread
    assert min(predicted[2 : 2 * EXPLORE]) > 0.9 and predicted[-1] < 0.1


def test_a_prefetch_of_many_windows_that_nobody_finishes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, store = words(8 * B), MemoryStore()
    run([*prompt, 1], tiered(store))
    monkeypatch.setattr(fetch_module, "AHEAD_BYTES", 1)
    cache = tiered(store)
    keys = cache.namespace.keys(prompt)
    cache.prefetch(keys, ["store"] * len(keys))
    for _ in range(500):
        if len(cache.host) == len(keys):
            break
        threading.Event().wait(0.01)
    assert all(key in cache.host for key in keys)


def test_a_fetch_whose_engine_is_interrupted_keeps_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are readers, each with more windows than are fetched ahead."""
    prompt = words(8 * B)
    store = MemoryStore()
    run(prompt, tiered(store))
    monkeypatch.setattr(fetch_module, "AHEAD_BYTES", 1)
    monkeypatch.setattr(fetch_module, "READERS", 2)
    cache, real = tiered(store, blocks=0), fetch_module.from_parts

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(6):
        monkeypatch.setattr(fetch_module, "from_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.load(prompt, 0, 8 * B, blank_kv(8 * B))
    monkeypatch.setattr(fetch_module, "from_parts", real)
    assert cache.load(prompt, 0, 8 * B, blank_kv(8 * B)) == 8 * B


def test_a_fetch_whose_copy_fails_gives_back_what_it_borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = words(6 * B + 3)
    cache = tiered(blocks=6)
    run(prompt, cache)

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(fetch_module, "from_parts", fails)
    with pytest.raises(MemoryError):
        run(prompt, cache)
    monkeypatch.undo()
    assert cache.host._policy.pinned == 0
    assert run(prompt, cache).sources == {"host": 96}


def test_without_threads_the_store_is_a_miss_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, store = words(4 * B + 1), MemoryStore()
    plain = run(prompt, tiered(store)).tokens
    cache = tiered(store)

    def no_thread(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cache._outer.readers, "submit", no_thread)
    result = run(prompt, cache)
    assert (result.tokens, result.cached_tokens, cache.stats().misses) == (plain, 0, Counter(error=4))


def test_write_back_over_a_small_queue_loses_nothing_at_close() -> None:
    kept = set[bytes]()

    class Keeps(MemoryStore):
        def close(self) -> None:
            kept.update(self._entries)
            super().close()

    cache = tiered(WriteBehind(Keeps(), max_bytes=40_000), write="back")
    prompt = words(14 * B + 1)
    run(prompt, cache)
    cache.close()
    assert kept == set(cache.namespace.keys(prompt))


def test_what_a_flush_could_not_write_is_written_by_a_later_one() -> None:
    class Outage(MemoryStore):
        down = True

        def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
            return 0 if self.down else super().put_many(keys, values)

    store = Outage()
    cache = tiered(store, write="back")
    run(words(6 * B + 1), cache)
    assert not cache.flush()
    store.down = False
    assert cache.flush() and len(keys_in(store)) == 6


def test_a_chain_that_host_memory_serves_does_not_expire_in_the_store() -> None:
    now = [0.0]
    store = MemoryStore(ttl_s=10, clock=lambda: now[0])
    kv, tokens = exact_kv(SPEC, 4 * B), words(4 * B)
    cache = tiered(store, model=SPEC)
    cache.save(tokens, kv)
    for _ in range(5):
        now[0] += 6
        assert cache.load(tokens, 0, 4 * B, blank(SPEC, 4 * B)) == 4 * B
    assert tiered(store, model=SPEC).match(tokens) == 4 * B


@pytest.mark.parametrize("blocks", [0, 2, 64])
def test_save_says_how_many_blocks_are_safe_and_asks_the_store_twice_at_most(blocks: int) -> None:
    class Counts(MemoryStore):
        calls = 0

        def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
            self.calls += 1
            return super().touch_many(keys)

    store = Counts()
    cache = tiered(store, blocks=blocks, model=SPEC, write="back")
    assert cache.save(words(20 * B), exact_kv(SPEC, 20 * B)) == 20
    assert store.calls <= 2


def test_after_close_everything_is_a_miss() -> None:
    cache, kv = tiered(model=SPEC), exact_kv(SPEC, 2 * B)
    cache.save(words(2 * B), kv)
    cache.close()
    assert cache.match(words(2 * B)) == 0
    assert cache.load(words(2 * B), 0, 2 * B, blank(SPEC, 2 * B)) == 0
    assert cache.save(words(2 * B, seed=1), kv) == 0


def test_a_prompt_that_is_wholly_on_the_device_loses_no_block_when_its_last_page_is_copied() -> None:
    cache = tiered(exclusive=True)
    pool = PagePool(MODEL, 6, cache.namespace)
    first, second = words(3 * B), words(2 * B, seed=1)
    for prompt in (second, first, first):
        run(prompt, cache, pool, new=1)
    somewhere = set(pool.index.blocks) | set(cache.host._row_of)
    assert somewhere == {*cache.namespace.keys(first), *cache.namespace.keys(second)}


def test_many_requests_at_once_are_not_late() -> None:
    class Slow(MemoryStore):
        deadline_s = 2.0

        def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
            threading.Event().wait(0.2)
            return super().get_many(keys, out, reasons)

    store, tokens = Slow(), words(2 * B)
    run([*tokens, 1], tiered(store))
    cache, got = tiered(store, blocks=0, window_bytes=1 << 20), list[int]()

    def load() -> None:
        got.append(cache.load(tokens, 0, 2 * B, blank_kv(2 * B)))

    threads = [threading.Thread(target=load) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [2 * B] * 24


def test_what_is_measured_is_bounded() -> None:
    cache, kv = tiered(model=SPEC, write="selective"), exact_kv(SPEC, 2 * B)
    cache.save(words(2 * B), kv)
    for _ in range(2 * fetch_module.MEASURED):
        cache.load(words(2 * B), 0, 2 * B, blank(SPEC, 2 * B))
    assert len(cache._outer.measured) == fetch_module.MEASURED


@pytest.mark.parametrize("end", ["close", "lose"])
def test_a_store_that_vanishes_changes_no_token(end: str) -> None:
    store, prompts = MemoryStore(), [words(4 * B + 5, seed=i) for i in range(3)]
    plain = [run(prompt).tokens for prompt in prompts]
    cache = tiered(store, blocks=6)
    for number, (prompt, expected) in enumerate(zip(prompts * 3, plain * 3, strict=True)):
        if number == 4:
            store.close() if end == "close" else store.delete_many([*keys_in(store)])
        assert run(prompt, cache).tokens == expected


def test_writes_go_through_the_queue_of_write_behind() -> None:
    inner, prompt = MemoryStore(), words(4 * B + 1)
    behind = WriteBehind(inner)
    cache = tiered(behind)
    run(prompt, cache)
    assert behind.flush(WAIT_S)
    assert keys_in(inner) == set(cache.namespace.keys(prompt))
    cache.close()


# --- settings -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"write": "around"}, "through, back, selective, got 'around'"),
        ({"wait_s": -1}, "wait_s"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"policy": "best"}, "policies"),
        ({"clock": 3}, "clock"),
        ({"pinned": True}, "GPU"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiered(**settings)


def test_a_cache_that_is_no_store_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="DistributedKVCache"):
        TieredCache(MemoryStore())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model="):
        TieredCache(DistributedKVCache())


def test_a_pool_of_other_blocks_is_refused() -> None:
    cache = tiered()
    other = DistributedKVCache(precision="fp32", store=MemoryStore(), model=MODEL, block_tokens=32)
    with pytest.raises(InputError, match="same blocks"):
        run(words(40), cache, PagePool(MODEL, 20, other.namespace))


def test_a_pool_of_another_tenant_is_refused() -> None:
    """Its pages would be hits for a request with another salt, which the salt is there to prevent."""
    cache = tiered()
    inner = DistributedKVCache(precision="fp32", store=MemoryStore(), model=MODEL, block_tokens=B, salt="tenant one")
    salted = TieredCache(inner, 1 << 20)
    pool = PagePool(MODEL, 20, cache.namespace)
    with pytest.raises(InputError, match="same model and salt"):
        run(words(40), salted, pool)
    with pytest.raises(InputError, match="same model and salt"):
        generate(MODEL, words(40), 1, inner, pool=pool)
    assert run(words(40), cache, pool).tokens


def test_a_reader_with_another_block_size_finds_nothing_and_is_right() -> None:
    store, prompt = MemoryStore(), words(70)
    run(prompt, tiered(store))
    other = TieredCache(DistributedKVCache(precision="fp32", store=store, model=MODEL, block_tokens=32), planner=False)
    result = run(prompt, other)
    assert (result.tokens, result.cached_tokens) == (run(prompt).tokens, 0)


def test_all_write_policies_are_tested_here() -> None:
    assert WRITES == ("through", "back", "selective")
