"""The faults of `FlakyStore` follow from its seed, every documented fault occurs, and p = 0 gives no faults."""

from __future__ import annotations

from kvlab.stores import MemoryStore, Store
from tests.harness.flaky import FlakyStore


def _drive(store: Store) -> list[object]:
    keys = [bytes([i]) * 32 for i in range(20)]
    answers: list[object] = []
    for turn in range(20):
        why: list[str] = []
        answers += [store.put_many(keys, [bytes([turn, i]) * 50 for i in range(20)]), store.probe(keys)]
        out = [memoryview(bytearray(200)) for _ in keys] if turn % 2 else None
        answers += [[value if value is None else bytes(value) for value in store.get_many(keys, out, why)], why]
        answers += [store.touch_many(keys), store.delete_many(keys[turn % 5 :: 5])]
        store.stats().check()
    return answers


def test_the_injector_does_the_same_for_the_same_seed() -> None:
    one, same, other = (FlakyStore(MemoryStore(), seed, 0.3) for seed in (5, 5, 6))
    first = _drive(one)
    assert first == _drive(same) and one.did == same.did and one.stats() == same.stats()
    assert first != _drive(other)
    every = {"lost", "dropped", "probe", "touch", "undeleted"} | {"flip", "cut", "swap", "foreign"}
    assert every | {"put_flip", "put_cut", "put_swap", "put_foreign"} == one.did.keys()


def test_an_injector_that_does_nothing_is_the_store_behind_it() -> None:
    assert _drive(FlakyStore(MemoryStore(), 5, 0.0)) == _drive(MemoryStore())
