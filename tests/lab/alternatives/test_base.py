"""What the adapters share: a failed call is a reason for each key, and a description that raises is bad health."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvlab.lab.alternatives.base import Adapter, Failed, Got, given
from kvlab.stores import Health
from kvlab.stores.base import MAX_VALUE_BYTES
from kvlab.stores.faults import Reason


class Dictionary(Adapter):
    """A store that can be told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[bytes, bytes] = {}
        self.fails: Reason | None = None

    def _check(self) -> None:
        if self.fails:
            raise Failed(self.fails)

    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        self._check()
        return [given(self.values[k], out, i) if k in self.values else Reason.ABSENT for i, k in enumerate(keys)]

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        self._check()
        self.values |= dict(zip(keys, values, strict=True))
        return [None] * len(keys)

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        self._check()
        return [key in self.values for key in keys]

    def _remove(self, keys: Sequence[bytes]) -> int:
        self._check()
        return sum(self.values.pop(key, None) is not None for key in keys)

    def _describe(self) -> str:
        self._check()
        return f"{len(self.values)} values"

    def _end(self) -> None:
        self.values.clear()


def test_a_failed_call_is_a_reason_for_each_key() -> None:
    with Dictionary() as store:
        store.put_many([b"a"], [b"one"])
        store.fails = Reason.CONN
        assert store.get_many([b"a", b"b"]) == [None, None]
        assert store.put_many([b"c"], [(b"th", b"ree")]) == 0
        assert (store.probe([b"a"]), store.touch_many([b"a"]), store.delete_many([b"a"])) == (0, [False], 0)
        assert not store.health().ok
        stats = store.stats()
        assert stats.misses == Counter(conn=2) and stats.drops == Counter(conn=1) and stats.faults == Counter(conn=3)
        store.fails = None
        assert store.get_many([b"a"]) == [b"one"] and store.health() == Health(True, "1 values")
        store.stats().check()


def test_a_value_that_is_too_large_is_not_offered() -> None:
    with Dictionary() as store:
        assert store.put_many([b"a", b"b"], [bytes(MAX_VALUE_BYTES + 1), b"two"]) == 1
        assert store.stats().drops == Counter(too_big=1) and [*store.values] == [b"b"]


def test_after_close_everything_is_closed() -> None:
    store = Dictionary()
    store.put_many([b"a"], [b"one"])
    store.close()
    store.close()
    assert store.get_many([b"a"]) == [None] and store.put_many([b"a"], [b"one"]) == 0
    assert (store.probe([b"a"]), store.touch_many([b"a"]), store.delete_many([b"a"])) == (0, [False], 0)
    assert store.stats().misses == store.stats().drops == Counter(closed=1)
    assert store.stats().faults == Counter() and not store.health().ok
