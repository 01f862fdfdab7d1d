"""Fault 40: random steps, ten thousand and more a seed, against a dict that says what must be there.

Two caches share a Redis, each with its own idea of what it saw damaged. Around them blocks are saved and
loaded, damaged, expired, evicted, flushed; connections are closed, the server is killed and restarted, the
breakers' clocks jump. After each step: what came back is what was stored, exactly the blocks that the dict
says (I1, I6), and all sums are right. In a second part a `FlakyStore` lies to the cache; then what comes
back may be less, never more or other.

`KVLAB_SEED=7 pytest tests/faults/test_schedule.py` runs that seed alone. A failure names its seed and step.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.keys import KVSpec, Namespace, text_key
from kvlab.core.record import Format
from kvlab.stores import RedisStore, Store
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.harness.flaky import FlakyStore
from tests.harness.helpers import blank, exact_kv, flipped, joined

SEEDS = [int(os.environ["KVLAB_SEED"])] if "KVLAB_SEED" in os.environ else [1, 2, 3]
STEPS = {"plain": 10_000, "injector": 4_000}  # of each seed

SPEC = KVSpec(layers=1, heads=1, head_dim=4, dtype=torch.float32, fingerprint=bytes(32))
B, DEPTH = 4, 5  # a block is 128 bytes and its header; two ways to go on after each: 62 blocks
NAMESPACE = Namespace(SPEC.fingerprint, "fp32", b"", B)
Way = tuple[int, ...]
T = TypeVar("T")


def _tokens(path: Way) -> list[int]:
    return [100 * depth + 10 * way + i for depth, way in enumerate(path) for i in range(B)]


def _all_paths(depth: int) -> list[Way]:
    return [tuple(number >> i & 1 for i in range(depth)) for number in range(2**depth)]


PATHS = _all_paths(DEPTH)
TOKENS = {path: _tokens(path) for path in PATHS}
CHAINS = {path: NAMESPACE.keys(TOKENS[path]) for path in PATHS}
_NUMBER = {prefix: 1 + i for i, prefix in enumerate(p for depth in range(1, DEPTH + 1) for p in _all_paths(depth))}
KV = {
    path: torch.cat([exact_kv(SPEC, B, _NUMBER[path[: i + 1]]) for i in range(DEPTH)], dim=3) for path in PATHS
}  # of one path from its first token on: what lies behind a fork differs
BLOCK_RECORDS = {
    key: joined(record.encode(KV[path][:, :, :, i * B : (i + 1) * B], key, Format()))
    for path in PATHS
    for i, key in enumerate(CHAINS[path])
}
TEXTS = [(f"text {i}", layer) for i in range(4) for layer in range(2)]
VERSIONS = [tuple(exact_kv(SPEC, 3, 1000 + i)[0]) for i in range(16)]  # what is kept under a text changes


def _key_of(text: tuple[str, int]) -> bytes:
    return text_key(*text, "fp32", b"", SPEC.fingerprint)


def _text_record(text: tuple[str, int], version: int) -> bytes:
    both = torch.stack(VERSIONS[version])
    return joined(record.encode(both, _key_of(text), Format(), record.KIND_TEXT))


DAMAGE = {"flip": "checksum", "cut": "length", "swap": "key", "foreign": "magic", "long": "too_big", "list": "response"}
"""What is done to a stored value, and the reason that a cache must give."""
TEXT_REASONS = {**DAMAGE, "long": "magic", "swap": "kind"}  # texts have no buffer to be too big for
LINK_REASONS = {"conn", "breaker", "timeout"}  # the server was asked in vain, or not at all
CHANCES = {
    **{"save": 200, "load": 300, "match": 80, "keep_text": 80, "get_text": 120, "damage": 90, "expire": 15},
    **{"evict": 4, "flush": 3, "restart": 2, "down": 2, "close": 10, "clock": 40, "delete": 10, "health": 4},
}


class Schedule:
    """One run: the caches, the server, and the dict.

    Attributes:
        there: what the server holds, by key: a block is "good"; a text is the number of its version; a damaged
            value of either is the name of its damage.
        seen: by cache, keys that it must write again although they are there.
        log: the last steps, for the message of a failure.
    """

    def __init__(self, seed: int, server: RedisServer, flaky: bool) -> None:
        self.random = random.Random(f"{seed} {flaky}")
        self.server, self.flaky, self.up = server, flaky, True
        self.raw = server.client()
        self.raw.flushall()
        self.now = [0.0, 0.0]
        self.redis = [
            RedisStore(server.url, ttl, deadline_s=30, max_connections=2, clock=lambda i=i: self.now[i])
            for i, ttl in enumerate((None, 1000.0))
        ]
        self.injectors = [FlakyStore(store, seed * 10 + i, 0.05) for i, store in enumerate(self.redis)] if flaky else []
        stores: list[Store] = [*self.injectors] or [*self.redis]
        self.caches = [
            DistributedKVCache(precision="fp32", compress=False, store=store, model=SPEC, block_tokens=B)
            for store in stores
        ]
        self.there: dict[bytes, str | int] = {}
        self.seen: list[set[bytes]] = [set(), set()]
        self.offered = [0, 0]
        self.reasons: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=12)
        self.call_ms = 0.0

    # --- running ------------------------------------------------------------------------------------
    def run(self, steps: int) -> None:
        names, weights = list(CHANCES), list(CHANCES.values())
        for n in range(steps):
            name = self.random.choices(names, weights)[0]
            if not self.up and (self.random.random() < 0.1 or name in ("damage", "expire", "evict", "flush", "close")):
                name = "restart"  # what the raw client does needs a server
            elif self.flaky and n % 500 == 499:
                name = "calm"
            self.log.append(f"{n} {name}")
            getattr(self, name)()
            self.done[name] += 1
            self.check_sums()
        self.calm()
        self.check_sums()

    def note(self, *details: object) -> None:
        self.log[-1] += f" {details}"

    def check_sums(self) -> None:
        for cache, offered in zip(self.caches, self.offered, strict=True):
            stats = cache.stats()
            stats.check()
            cache.store.stats().check()
            assert stats.stored + stats.kept + stats.drops.total() == offered, stats

    def pick(self) -> tuple[int, DistributedKVCache, Way]:
        number = self.random.randrange(2)
        path = self.random.choice(PATHS)
        self.note(number, path)
        return number, self.caches[number], path

    def sound(self, number: int) -> bool:
        """Whether a call must succeed. If not it may: an open breaker lets one call try."""
        return self.up and self.redis[number].nodes[0].breaker.state == "closed"

    def text_reason(self, value: str | int | None) -> str:
        return "absent" if value is None else "" if isinstance(value, int) else TEXT_REASONS[value]

    # --- calls of the cache ---------------------------------------------------------------------------
    def save(self) -> None:
        number, cache, path = self.pick()
        length, start = self.random.randint(0, DEPTH * B), self.random.choice((0, 0, 0, B, 2 * B - 1))
        self.check_save(number, cache, path, length, start)

    def check_save(self, number: int, cache: DistributedKVCache, path: Way, length: int, start: int) -> None:
        chain = CHAINS[path][: length // B][-(-start // B) :]
        sound, offered = self.sound(number), len(chain)
        took = self.timed(lambda: cache.save(TOKENS[path][:length], KV[path][:, :, :, :length], start))
        self.note(length, start, took)
        self.offered[number] += offered
        if self.flaky:
            assert 0 <= took <= offered
            self.there.update(dict.fromkeys(chain, "good"))  # at best
            return
        assert took == offered or (took == 0 and not sound)
        if took:
            rewritten = [key for key in chain if key not in self.there or key in self.seen[number]]
            self.there.update(dict.fromkeys(rewritten, "good"))
            self.seen[number].difference_update(rewritten)

    def load(self) -> None:
        number, cache, path = self.pick()
        start, stop = sorted(self.random.choices(range(DEPTH + 1), k=2))
        self.check_load(number, cache, path, 0 if self.random.random() < 0.7 else start, stop)

    def check_load(self, number: int, cache: DistributedKVCache, path: Way, start: int, stop: int) -> int:
        keys, sound, before = CHAINS[path][start:stop], self.sound(number), cache.stats().misses
        good = next((i for i, key in enumerate(keys) if self.there.get(key) != "good"), len(keys))
        out = blank(SPEC, (stop - start) * B)
        end = self.timed(lambda: cache.load(TOKENS[path], start * B, stop * B, out))
        self.note(start, stop, end)
        assert end % B == 0 and start * B <= end <= stop * B
        size = end - start * B
        assert torch.equal(out[:, :, :, :size], KV[path][:, :, :, start * B : end])
        got, new = size // B, cache.stats().misses - before
        why = "".join(new - Counter(gap=new["gap"]))
        self.reasons[why or "hit"] += 1
        assert new == (Counter({why: 1, "gap": len(keys) - got - 1}) if why else Counter()) and bool(why) == (
            got < len(keys)
        )
        assert got <= good
        if self.flaky:
            return got
        if why in LINK_REASONS:
            assert got == 0 and not sound
            return got
        state = self.there.get(keys[good]) if good < len(keys) else None
        assert (got, why) == (good, "" if good == len(keys) else "absent" if state is None else DAMAGE[str(state)])
        if state is not None:
            self.seen[number].update(keys[good:])
            if DAMAGE[str(state)] == "checksum":
                del self.there[keys[good]]
        return got

    def match(self) -> None:
        number, cache, path = self.pick()
        sound = self.sound(number)
        got = self.timed(lambda: cache.match(TOKENS[path]))
        self.note(got)
        present = next((i for i, key in enumerate(CHAINS[path]) if key not in self.there), DEPTH)
        assert 0 <= got <= DEPTH * B and got % B == 0
        assert self.flaky or got == present * B or (got == 0 and not sound)

    def keep_text(self) -> None:
        number, cache, _ = self.pick()
        text, version = self.random.choice(TEXTS), self.random.randrange(len(VERSIONS))
        sound = self.sound(number)
        took = self.timed(lambda: cache.cache_kv(*text, *VERSIONS[version]))
        self.note(text, version, took)
        self.offered[number] += 1
        assert took or self.flaky or not sound
        if took:
            self.there[_key_of(text)] = version

    def get_text(self) -> None:
        number, cache, _ = self.pick()
        text = self.random.choice(TEXTS)
        state, sound, before = self.there.get(_key_of(text)), self.sound(number), cache.stats().misses
        got = self.timed(lambda: cache.get_cached_kv(*text))
        why = "".join(cache.stats().misses - before)
        self.note(text, state, why)
        self.reasons[why or "hit"] += 1
        assert (got is None) == bool(why)
        if got is not None:
            assert isinstance(state, int) and all(map(torch.equal, got, VERSIONS[state]))
        elif why in LINK_REASONS:
            assert not sound
        elif not self.flaky:
            assert why == self.text_reason(state)
            if why == "checksum":
                del self.there[_key_of(text)]

    def delete(self) -> None:
        number, cache, path = self.pick()
        keys = self.random.sample(CHAINS[path], 2)
        sound = self.sound(number)
        gone = self.timed(lambda: cache.store.delete_many(keys))
        if self.flaky:
            return
        held = sum(key in self.there for key in keys)
        assert gone == held or (gone == 0 and not sound)
        if gone:
            for key in keys:
                self.there.pop(key, None)

    def health(self) -> None:
        cache = self.pick()[1]
        assert self.timed(cache.health).ok == self.up

    def timed(self, call: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return call()
        finally:
            self.call_ms += 1000 * (time.perf_counter() - begin)

    # --- what happens around it -----------------------------------------------------------------------
    def damage(self) -> None:
        """Overwrite a value in the server. Half of the time a block, there or not."""
        how, text = self.random.choice(list(DAMAGE)), self.random.choice(TEXTS)
        key = self.random.choice(self.random.choice(list(CHAINS.values())))
        whole = BLOCK_RECORDS[key]
        if self.random.random() < 0.5:
            key, whole = _key_of(text), _text_record(text, self.random.randrange(len(VERSIONS)))
        self.note(how, key.hex()[:8])
        other = self.random.choice([block for block in BLOCK_RECORDS if block != key])
        at = self.random.randrange(128, len(whole))
        name = b"kv:" + key
        if how == "list":
            self.raw.delete(name)
            self.raw.rpush(name, whole)
        else:
            spoilt = {
                "flip": flipped(whole, at, 1 << self.random.randrange(8)),
                "cut": whole[: self.random.randrange(len(whole))],
                "swap": BLOCK_RECORDS[other],
                "foreign": b"<html>" + self.random.randbytes(200),
                "long": b"<html>" + self.random.randbytes(10_000),
            }
            self.raw.set(name, spoilt[how])
        self.there[key] = how

    def expire(self) -> None:
        if self.there:
            key = self.random.choice(sorted(self.there))
            self.raw.pexpire(b"kv:" + key, 1)
            while self.raw.exists(b"kv:" + key):
                time.sleep(0.001)
            del self.there[key]

    def evict(self) -> None:
        """Less memory than there is in use, for a moment: the server chooses what goes, and the dict follows."""
        self.raw.config_set("maxmemory-policy", "allkeys-random")
        used = self.raw.info("memory")["used_memory"]
        self.raw.config_set("maxmemory", max(1, used - 8000))
        self.raw.ping()
        self.raw.config_set("maxmemory", 0)
        keys = list(self.there)
        pipe = self.raw.pipeline(transaction=False)
        for key in keys:
            pipe.exists(b"kv:" + key)
        held = pipe.execute()
        self.there = {key: self.there[key] for key, is_held in zip(keys, held, strict=True) if is_held}
        self.done["evicted keys"] += len(keys) - len(self.there)

    def flush(self) -> None:
        self.raw.flushall()
        self.there.clear()

    def restart(self) -> None:
        self.server.kill()
        self.server.start()
        self.up, self.raw = True, self.server.client()
        self.there.clear()

    def down(self) -> None:
        """Gone for some steps; `run` starts it again."""
        self.server.kill()
        self.up = False
        self.there.clear()

    def close(self) -> None:
        """Close all connections but that of the raw client."""
        self.raw.client_kill_filter(_type="normal", skipme=True)

    def clock(self) -> None:
        """Time passes for one of the breakers: none, too little, enough, years."""
        number = self.random.randrange(2)
        self.now[number] += self.random.choice((0.0, 0.3, 1.5, 1e8))

    def calm(self) -> None:
        """All faults are gone: loads find what is bad, saves repair it, and everything is there."""
        if not self.up:
            self.restart()
        for injector in self.injectors:
            injector.p = 0.0
        for number, cache in enumerate(self.caches):
            path = self.random.choice(PATHS)
            self.now[number] += 2.0
            cache.match(TOKENS[path])  # an open breaker tries again
            for _ in range(2):  # damage behind a block that is missing is seen once that is there again
                self.check_load(number, cache, path, 0, DEPTH)
                assert self.sound(number)
                self.check_save(number, cache, path, DEPTH * B, 0)
            assert self.check_load(number, cache, path, 0, DEPTH) == DEPTH
        for injector in self.injectors:
            injector.p = 0.05


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server that a schedule may kill."""
    with RedisServer() as made:
        yield made


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.fault(number=40)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_schedule_agrees_with_a_dict(seed: int, server: RedisServer, book: Book) -> None:
    injected = "save, load, match, texts, damage, expiry, eviction, flush, restart, closed connections, clock jumps"
    with book(f"random schedule, seed {seed}", injected=injected, expected="as the dict says, all sums") as row:
        seen, row.added_ms = {}, 0.0
        for part, steps in STEPS.items():
            schedule = Schedule(seed, server, flaky=part == "injector")
            try:
                schedule.run(steps)
            except Exception as error:
                last = "\n".join(schedule.log)
                pytest.fail(f"KVLAB_SEED={seed} shows it again: {part} part, step {last}\n{error!r}", pytrace=True)
            for cache in schedule.caches:
                cache.close()
            row.added_ms += schedule.call_ms
            seen[part] = {"steps": dict(schedule.done), "answers": dict(schedule.reasons)}
            for injector in schedule.injectors:
                seen[part].setdefault("injected", Counter()).update(injector.did)
            every = {"hit", "absent", "conn", "breaker", "kind", *DAMAGE.values()}
            assert every <= schedule.reasons.keys(), schedule.reasons
        assert seen["injector"]["injected"].keys() >= {"lost", "dropped", "flip", "put_swap", "probe", "touch"}
        row.seen = seen


# --- it must be able to fail, or it proves nothing ---------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize("flaky", [False, True])
def test_a_schedule_finds_a_reader_that_does_not_compare_keys(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, flaky: bool
) -> None:
    real = record.decode

    def careless(value: Any, key: bytes, *rest: Any, **options: Any) -> Tensor:
        return real(value, bytes(value[64:96]), *rest, **options)

    monkeypatch.setattr(record, "decode", careless)
    with pytest.raises(AssertionError):
        Schedule(1, server, flaky).run(3000)


@pytest.mark.redis
def test_a_schedule_finds_a_save_that_repairs_nothing(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedKVCache, "_suspect", lambda self, keys: None)
    with pytest.raises(AssertionError):
        Schedule(1, server, flaky=False).run(3000)
