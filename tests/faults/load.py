"""A load on a store with several servers: threads that read and write the same keys all the time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvlab.stores import RedisStore
from tests.faults.calls import HANG
from tests.faults.clusters import RECOVERS_S, SIZE, D, port_of, value_of
from tests.faults.kit import wait_for


@dataclass(frozen=True)
class Call:
    """One call: how many keys of each shard it had, and why it had not the others."""

    kind: str
    begin: float
    end: float
    good: Counter[int]
    bad: Counter[tuple[int, str]]


class Load:
    """Threads that read, write, probe and touch the same keys until the block ends, and check every value.

    with Load(store, owner) as load:
        ...                 # do harm
    load.check()            # nothing wrong, nothing raised, nothing hung, every key counted

    Args:
        owner: the shard of each key, by any number.
        writes: whether keys are put too.

    Attributes:
        calls: what was done.
        links, writes: ports of the nodes whose breaker, or breaker for writes, was seen open.
    """

    def __init__(self, store: RedisStore, owner: Mapping[bytes, int], writes: bool = True, threads: int = 3) -> None:
        self.store, self.owner = store, owner
        self.shards = sorted(set(owner.values()))
        self._kinds = ("get", "get", "get out", "probe", "touch", *(("put", "put") if writes else ()))
        self.calls: list[Call] = []
        self.wrong: list[bytes] = []
        self.raised: list[str] = []
        self.links: set[int] = set()
        self.writes: set[int] = set()
        self._before = store.stats()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        try:
            self.wait_until_served()
        except BaseException:
            self._stop.set()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * HANG * D)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a call hangs"

    def check(self) -> None:
        """What must hold whatever happened meanwhile."""
        assert not self.wrong and not self.raised, (self.wrong[:3], self.raised[:3])
        assert max(call.end - call.begin for call in self.calls) < HANG * D
        now = self.store.stats()
        now.check()
        reads = [call for call in self.calls if call.kind.startswith("get")]
        puts = [call for call in self.calls if call.kind == "put"]
        missed = sum((Counter({why: n}) for call in reads for (_, why), n in call.bad.items()), Counter())
        assert now.misses - self._before.misses == missed
        assert now.hits - self._before.hits == sum(call.good.total() for call in reads)
        assert now.stored - self._before.stored == sum(call.good.total() for call in puts)
        assert (now.drops - self._before.drops).total() == sum(call.bad.total() for call in puts)

    def first(self, kind: str, shard: int, since: float) -> float | None:
        """Seconds from a moment to the end of the first such call that began after it and served the shard."""
        ends = [c.end for c in list(self.calls) if c.kind.startswith(kind) and c.begin >= since and c.good[shard]]
        return min(ends) - since if ends else None

    def wait_until_served(self, shards: Iterable[int] | None = None, seconds: float = RECOVERS_S) -> float:
        """Wait until keys of all these shards have been read and written from now on; how long that took, at most."""
        since, kinds = time.monotonic(), {kind.partition(" ")[0] for kind in self._kinds} & {"get", "put"}
        wanted = [(kind, shard) for kind in kinds for shard in (self.shards if shards is None else shards)]
        wait_for(lambda: self.raised or all(self.first(*each, since) is not None for each in wanted), seconds)
        assert not self.raised, self.raised[:3]
        return max((self.first(*each, since) or 0.0 for each in wanted), default=0.0)

    def good(self, kind: str, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> int:
        """Keys of these shards that were served by calls that ran then."""
        calls = [c for c in list(self.calls) if c.kind.startswith(kind) and c.end >= since and c.begin <= until]
        return sum(call.good[shard] for call in calls for shard in shards)

    def bad(self, kind: str, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> dict[str, int]:
        """Keys of these shards that were not, by reason."""
        calls = [c for c in list(self.calls) if c.kind.startswith(kind) and c.end >= since and c.begin <= until]
        wanted = set(shards)
        return dict(
            sum((Counter({why: n}) for c in calls for (at, why), n in c.bad.items() if at in wanted), Counter())
        )

    def slow(self, since: float, until: float) -> dict[str, float]:
        """Calls that took more than half a deadline, and the time they took."""
        took = [c.end - c.begin for c in list(self.calls) if c.end >= since and c.begin <= until]
        long = [t for t in took if t > D / 2]
        return {"calls": len(took), "slow calls": len(long), "their seconds": round(sum(long), 2)}

    def check_undisturbed(self, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> int:
        """These shards missed nothing; how many keys they served.

        A timeout is what a busy machine may cause by itself; one key in a thousand is let pass.
        """
        shards, served = list(shards), 0
        for kind in ("get", "put", "probe", "touch"):
            good, bad = self.good(kind, shards, since, until), self.bad(kind, shards, since, until)
            unknown = {"get": {"timeout"}, "put": {"dropped"}}.get(kind, {"absent"})
            assert set(bad) <= unknown and sum(bad.values()) <= good / 1000, (kind, good, bad)
            served += good
        assert served
        return served

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for node in self.store.nodes:
                self.links |= {port_of(node)} if node.breaker.state != "closed" else set()
                self.writes |= {port_of(node)} if node.write_breaker.state != "closed" else set()

    def _work(self, seed: int) -> None:
        chance, keys = random.Random(seed), list(self.owner)
        of_shard = {shard: [key for key in keys if self.owner[key] == shard] for shard in self.shards}
        while not self._stop.wait(0.004):
            kind = chance.choice(self._kinds)
            # What a put did not store it does not say, so one has keys of one shard only.
            among = of_shard[chance.choice(self.shards)] if kind == "put" else keys
            batch = chance.sample(among, chance.randint(1, min(60, len(among))))
            begin = time.monotonic()
            try:
                good, bad = self._do(kind, batch)
            except BaseException as error:
                self.raised.append(f"{kind}: {error!r}")
                continue
            self.calls.append(Call(kind, begin, time.monotonic(), good, bad))

    def _do(self, kind: str, batch: list[bytes]) -> tuple[Counter[int], Counter[tuple[int, str]]]:
        why: list[str] = []
        if kind.startswith("get"):
            out = [memoryview(bytearray(SIZE + 8)) for _ in batch] if kind == "get out" else None
            got = self.store.get_many(batch, out, why)
            assert len(got) == len(why) == len(batch)
            for key, value, reason in zip(batch, got, why, strict=True):
                if (value is None) != bool(reason) or (value is not None and value != value_of(key)):
                    self.wrong.append(key)
        elif kind == "put":
            stored = self.store.put_many(batch, [value_of(key) for key in batch])
            why = [""] * stored + ["dropped"] * (len(batch) - stored)
        elif kind == "probe":
            there = self.store.probe(batch)
            batch = batch[: there + 1]
            why = [""] * there + ["absent"] * (len(batch) - there)
        else:
            why = ["" if there else "absent" for there in self.store.touch_many(batch)]
        good = Counter(self.owner[key] for key, reason in zip(batch, why, strict=True) if not reason)
        bad = Counter((self.owner[key], reason) for key, reason in zip(batch, why, strict=True) if reason)
        return good, bad


def recovery(load: Load, shard: int, since: float) -> dict[str, float]:
    """Wait until a shard's keys are read and written again; seconds since the fault."""
    kinds = {"first hit after s": "get", "first put after s": "put"}
    wait_for(lambda: all(load.first(kind, shard, since) is not None for kind in kinds.values()), RECOVERS_S)
    return {name: round(load.first(kind, shard, since) or 0.0, 2) for name, kind in kinds.items()}
