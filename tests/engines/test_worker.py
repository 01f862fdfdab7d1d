"""The worker's half: blocks come back where they belong, and bad ones do not."""

from __future__ import annotations

from types import SimpleNamespace as Fake

import pytest
import torch

from kvlab.stores import MemoryStore

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.connectors.vllm.namespace import block_key
from kvlab.connectors.vllm.protocol import Blocks, Failures, Work
from kvlab.connectors.vllm.stats import Counters
from tests.engines.sides import BLOCKS, SPACE, B, hashes, load, put, wait_until, worker

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("window", [1, 2, 100])
def test_blocks_come_back_where_they_belong(window: int) -> None:
    store = MemoryStore()
    first, second = worker(store), worker(store)
    first._window = second._window = window
    for layer, tensor in enumerate(first._tensors):
        tensor.copy_(torch.randn(BLOCKS, 2, B, 5) + layer)
    first.save(Work(SPACE, saves=[Blocks("a", b"", hashes(4), [7, 3, 9, 0])]))
    assert load(second, [2, 0, 3, 1], [5, 6, 11, 12]) == {"a"}
    for one, other in zip(first._tensors, second._tensors, strict=True):
        assert torch.equal(other[[5, 6, 11, 12]], one[[9, 7, 0, 3]])
        assert other.abs().sum(dim=(1, 2, 3)).count_nonzero() == 4, "no other block was touched"
    assert second.take_failures() is None and second.take_bad_ids() == set()
    counted = second.take_counters()
    assert counted is not None and counted.data["loaded_blocks"] == 4


def test_ranks_do_not_share() -> None:
    store = MemoryStore()
    put(store, [0], rank=0)
    put(store, [0], rank=1)
    sides = [worker(store, rank) for rank in (0, 1, 2)]
    for side in sides:
        load(side, [0], [4])
    assert [float(side._tensors[0][4].max()) for side in sides] == pytest.approx([0.0, 0.1, 0.0])
    failures = sides[2].take_failures()
    assert failures is not None and failures.blocks == {"a": {hashes(1)[0]: "absent"}}
    assert sides[2].take_bad_ids() == {4} and sides[2].take_bad_ids() == set()


def test_damaged_records_are_removed_and_foreign_ones_stay() -> None:
    store = MemoryStore()
    put(store, range(4))
    keys = [block_key(SPACE, h, b"", 0) for h in hashes(4)]
    values = [bytes(v) for v in store.get_many(keys) if v is not None]
    store.put_many(keys[1:3], [values[1][:-1] + bytes([values[1][-1] ^ 1]), b"KVL1\x09" + values[2][5:]])
    side = worker(store)
    load(side, [0, 1, 2, 3], [0, 1, 2, 3])
    failures = side.take_failures()
    assert failures is not None
    assert failures.blocks == {"a": {hashes(3)[1]: "checksum", hashes(3)[2]: "version"}}
    assert side.take_bad_ids() == {1, 2} and store.touch_many(keys) == [True, False, True, True]


def test_an_exception_in_a_thread_fails_the_load_and_nothing_hangs() -> None:
    store = MemoryStore()
    side = worker(store)
    side.store = Fake(get_many=lambda *_: 1 / 0)  # type: ignore[assignment]
    for name in ("a", "b"):
        assert load(side, [0], [3], name) == {name}
    failures = side.take_failures()
    assert failures is not None and failures.blocks["a"] == {hashes(1)[0]: "error"}


def test_failures_of_two_ranks_are_joined() -> None:
    one, other = Failures({"a": {b"x": "absent"}}), Failures({"a": {b"y": "timeout"}, "b": {b"z": "magic"}})
    assert one.aggregate(other).blocks == {"a": {b"x": "absent", b"y": "timeout"}, "b": {b"z": "magic"}}


def test_comparing_touches_nothing_and_counts() -> None:
    store = MemoryStore()
    put(store, range(3))
    side = worker(store, share=1.0)
    for i in range(3):
        for tensor in side._tensors:
            tensor[i] = float(i)
    side._tensors[1][1, 0, 2, 3] = 1.5
    before = [tensor.clone() for tensor in side._tensors]
    side.save(Work(SPACE, checks=[Blocks("a", b"", hashes(3), [0, 1, 2])]))
    counted: dict[str, float] = {}
    wait_until(
        lambda: (
            side.finished() or counted.update((side.take_counters() or Counters()).data) or "shadow_blocks" in counted
        )
    )
    assert (counted["shadow_blocks"], counted["shadow_different"]) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, side._tensors, strict=True))


def test_what_shadow_mode_does_not_find_is_counted_and_saved() -> None:
    store = MemoryStore()
    put(store, [0, 1])
    keys = [block_key(SPACE, h, b"", 0) for h in hashes(3)]
    (value,) = store.get_many(keys[1:2])
    assert value is not None
    store.put_many(keys[1:2], [bytes(value)[:-1] + bytes([value[-1] ^ 1])])
    side = worker(store, share=1.0)
    for i in range(3):
        for tensor in side._tensors:
            tensor[i] = float(i)
    side.save(Work(SPACE, checks=[Blocks("a", b"", hashes(3), [0, 1, 2])]))
    counted: dict[str, float] = {}
    wait_until(
        lambda: (
            side.finished() or counted.update((side.take_counters() or Counters()).data) or "shadow_blocks" in counted
        )
    )
    assert (counted["shadow_blocks"], counted["shadow_different"]) == (1, 0)
    assert counted["failed_blocks:checksum"] == counted["failed_blocks:absent"] == 1
    assert store.touch_many(keys) == [True] * 3
