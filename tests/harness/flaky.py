"""A store in the same process with random faults, which follow from a seed.

    store = FlakyStore(RedisStore(server.url), seed=1, p=0.1)
    cache = DistributedKVCache(store=store, …)
    store.did        # Counter(lost=12, flip=3, cut=5, …)
    store.p = 0      # no further faults

The store never raises and never waits; the fault proxy and stopped servers test these cases. Equal seeds and
equal calls give equal faults. With several threads the faults depend on the order of the calls.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Sequence

from kvlab.stores import Health, Store, StoreStats, Value
from kvlab.stores.base import check_buffers, check_pairs, joined

DAMAGES = ("flip", "cut", "swap", "foreign")
REMEMBERED = 64  # number of values that are kept for swaps


class FlakyStore(Store):
    """Forwards calls to another store; each value, key or answer has a fault with probability `p`.

    Faults:
        lost: a stored value is a miss ("lost").
        dropped: a put is not executed ("dropped"). The previous value stays.
        flip, cut, swap, foreign: a returned value has a flipped bit, is shortened, is the value of another key,
            or is not a record. put_flip, put_cut, …: the same fault in a value that is put and then stored.
        probe, touch: a wrong number of keys, or a wrong answer for one key.
        undeleted: a delete is not executed.

    Args:
        inner: the other store, which `close` closes.
        seed: seed of the faults.
        p: probability of a fault; 0: no faults.

    Attributes:
        did: number of faults by kind.
    """

    def __init__(self, inner: Store, seed: int = 0, p: float = 0.1) -> None:
        self.inner, self.p = inner, p
        self.did: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._seen: dict[bytes, bytes] = {}  # values by key, oldest first
        self._stats = StoreStats()
        self._lock = threading.RLock()

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`."""
        check_buffers(keys, out)
        found: list[str] = []
        got = self.inner.get_many(keys, out, found)
        with self._lock:
            for i, value in enumerate(got):
                if value is not None:
                    got[i], found[i] = self._faulty_answer(keys[i], value, None if out is None else out[i])
            misses = Counter(filter(None, found))
            self._stats.requested += len(keys)
            self._stats.misses += misses
            self._stats.hits += len(keys) - misses.total()
            self._stats.bytes_out += sum(len(value) for value in got if value is not None)
        if reasons is not None:
            reasons += found
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`."""
        check_pairs(keys, values, "value")
        sent: dict[bytes, bytes] = {}  # if a key is put twice, the last value counts, as in any store
        with self._lock:
            dropped = 0
            for key, value in zip(keys, values, strict=True):
                if self._fails("dropped"):
                    dropped += 1
                    continue
                sent[key] = self._damaged(key, joined(value), "put_") if self._fails() else joined(value)
                self._remember(key, joined(value))
        before = self.inner.stats().drops
        stored = self.inner.put_many(list(sent), list(sent.values()))
        with self._lock:
            twice = len(keys) - dropped - len(sent)
            drops = self.inner.stats().drops - before  # reasons are exact with one writer, the sum always is
            if stored + drops.total() != len(sent):
                drops = Counter(inner=len(sent) - stored)
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += sum(map(len, sent.values())) if stored == len(sent) else 0
            self._stats.drops += drops + Counter(dropped=dropped, collapsed=twice)
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        answer = self.inner.probe(keys)
        with self._lock:
            return self._random.randint(0, len(keys)) if self._fails("probe") else answer

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Store.touch_many`."""
        answers = self.inner.touch_many(keys)
        with self._lock:
            return [answer != self._fails("touch") for answer in answers]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`."""
        with self._lock:
            kept = [key for key in keys if not self._fails("undeleted")]
        return self.inner.delete_many(kept)

    def health(self) -> Health:
        """See `Store.health`: the health of the inner store."""
        return self.inner.health()

    def stats(self) -> StoreStats:
        """See `Store.stats`: the counts include the faults of this class; `faults` comes from the inner store."""
        with self._lock:
            made = copy.deepcopy(self._stats)
        made.faults = self.inner.stats().faults
        return made

    def close(self) -> None:
        """See `Store.close`."""
        self.inner.close()

    def _fails(self, what: str = "") -> bool:
        """Whether a fault occurs here. A number is also drawn if `p` is 0, so that the sequence stays the same."""
        wrong = self._random.random() < self.p
        if wrong and what:
            self.did[what] += 1
        return wrong

    def _faulty_answer(
        self, key: bytes, value: bytes | memoryview, out: memoryview | None
    ) -> tuple[bytes | memoryview | None, str]:
        whole = bytes(value)
        self._remember(key, whole)
        if self._fails("lost"):
            return None, "lost"
        if not self._fails():
            return value, ""
        whole = self._damaged(key, whole, "")
        if out is None:
            return whole, ""
        room = out.cast("B")
        if len(whole) > len(room):
            return None, "too_big"
        room[: len(whole)] = whole
        return room[: len(whole)], ""

    def _damaged(self, key: bytes, value: bytes, when: str) -> bytes:
        """A damaged value, which differs from the original."""
        how = self._random.choice(DAMAGES)
        others = [other for other, its in self._seen.items() if other != key and its != value]
        if (how == "swap" and not others) or (how in ("flip", "cut") and not value):
            how = "foreign"
        self.did[when + how] += 1
        if how == "flip":
            at = self._random.randrange(len(value))
            return value[:at] + bytes([value[at] ^ (1 << self._random.randrange(8))]) + value[at + 1 :]
        if how == "cut":
            return value[: self._random.randrange(len(value))]
        if how == "swap":
            return self._seen[self._random.choice(others)]
        length = self._random.choice((1, 100, 128, len(value), len(value) + 1, 10_000))
        return b"foreign " + self._random.randbytes(length)

    def _remember(self, key: bytes, value: bytes) -> None:
        self._seen.pop(key, None)
        self._seen[key] = value
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
