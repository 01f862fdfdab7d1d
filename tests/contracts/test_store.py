"""The conformance suite of the `Store` contract: every store, a learner's own included, passes all of it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence

import pytest

from kvlab.errors import InputError
from kvlab.stores import Store
from kvlab.testbed.server import RedisServer
from tests.contracts.conftest import StoreKind

AWKWARD_KEYS = [
    b"",
    b"\0",
    b"\r\n",
    b"*3\r\n$3\r\nSET\r\n",
    b"\xff" * 32,
    bytes(range(256)),
    b"key with spaces",
    b"a*?[x]",
]
EXPIRY_BOUND_S = 60.0


def named(count: int, prefix: str = "k") -> tuple[list[bytes], list[bytes]]:
    """`count` keys, each with a value of its own."""
    keys = [f"{prefix}{i}".encode() for i in range(count)]
    return keys, [b"value of " + key for key in keys]


def buffers(*sizes: int) -> list[memoryview]:
    """Writable buffers full of 0xAA, so that what was not written shows."""
    return [memoryview(bytearray(b"\xaa" * size)) for size in sizes]


def holds(view: bytes | memoryview | None, value: bytes) -> bool:
    return view is not None and bytes(view) == value


# --- values -------------------------------------------------------------------------------------
def test_what_was_put_comes_back_as_bytes(store: Store) -> None:
    assert store.put_many([b"a", b"b"], [b"one", b"two"]) == 2
    got = store.get_many([b"a", b"b"])
    assert got == [b"one", b"two"]
    assert all(type(value) is bytes for value in got)


def test_values_come_in_the_order_of_the_keys_asked_for(store: Store) -> None:
    keys, values = named(10)
    store.put_many(keys, values)
    order = random.Random(1).sample(range(10), 10)
    assert store.get_many([keys[i] for i in order]) == [values[i] for i in order]


def test_missing_keys_are_none_in_their_places(store: Store) -> None:
    keys, values = named(4)
    store.put_many(keys[1:3], values[1:3])
    assert store.get_many(keys) == [None, values[1], values[2], None]


def test_batches_larger_than_any_window_keep_their_order(store: Store) -> None:
    keys, values = named(300)
    assert store.put_many(keys[::2], values[::2]) == 150
    assert store.get_many(keys) == [v if i % 2 == 0 else None for i, v in enumerate(values)]


def test_pieces_are_stored_as_their_concatenation(store: Store) -> None:
    parts = (b"head", memoryview(b"-middle-"), memoryview(bytearray(b"end")), b"")
    store.put_many([b"pieces", b"whole", b"view"], [parts, b"head-middle-end", memoryview(b"one view")])
    assert store.get_many([b"pieces", b"whole", b"view"]) == [b"head-middle-end", b"head-middle-end", b"one view"]


def test_values_may_be_changed_after_they_were_put(store: Store) -> None:
    alone, piece = bytearray(b"first"), bytearray(b"second")
    store.put_many([b"alone", b"piece"], [memoryview(alone), (b"the ", memoryview(piece))])
    alone[:], piece[:] = b"XXXXX", b"YYYYYY"
    assert store.get_many([b"alone", b"piece"]) == [b"first", b"the second"]


def test_a_second_put_replaces_the_value(store: Store) -> None:
    store.put_many([b"a"], [b"a long first value"])
    assert store.put_many([b"a"], [b"short"]) == 1
    assert store.get_many([b"a"]) == [b"short"]


def test_empty_batches_do_nothing(store: Store) -> None:
    before = store.stats()
    assert (store.put_many([], []), store.get_many([]), store.get_many([], out=[])) == (0, [], [])
    assert (store.probe([]), store.delete_many([])) == (0, 0)
    assert store.stats() == before


def test_a_key_asked_for_twice_is_answered_twice(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    assert store.get_many([b"a", b"x", b"a"]) == [b"one", None, b"one"]


def test_of_a_key_put_twice_the_last_value_stays(store: Store) -> None:
    assert store.put_many([b"a", b"b", b"a"], [b"1", b"2", b"3"]) == 3
    assert store.get_many([b"a", b"b"]) == [b"3", b"2"]


def test_an_empty_value_is_a_value(store: Store) -> None:
    store.put_many([b"bytes", b"pieces"], [b"", (b"", b"")])
    assert store.get_many([b"bytes", b"pieces", b"absent"]) == [b"", b"", None]
    assert store.probe([b"bytes", b"pieces"]) == 2


def test_a_value_of_three_mib_comes_back_whole(store: Store) -> None:
    big = random.Random(3).randbytes(3 << 20)
    store.put_many([b"big"], [(big[:128], memoryview(big)[128:])])
    assert store.get_many([b"big"]) == [big]


def test_keys_are_any_bytes(store: Store) -> None:
    values = [b"value %d" % i for i in range(len(AWKWARD_KEYS))]
    assert store.put_many(AWKWARD_KEYS, values) == len(values)
    assert store.get_many(AWKWARD_KEYS) == values
    assert store.probe(AWKWARD_KEYS) == len(values)
    assert store.delete_many(AWKWARD_KEYS) == len(values)


# --- the caller's buffers -----------------------------------------------------------------------
def test_a_value_is_written_to_the_start_of_its_buffer(store: Store) -> None:
    store.put_many([b"a", b"b"], [b"one", b"three"])
    out = buffers(8, 5)
    got = store.get_many([b"a", b"b"], out)
    assert holds(got[0], b"one") and holds(got[1], b"three")
    assert bytes(out[0]) == b"one" + b"\xaa" * 5
    assert bytes(out[1]) == b"three"


def test_the_returned_view_is_the_callers_buffer(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    (out,) = buffers(8)
    (view,) = store.get_many([b"a"], [out])
    out[:3] = b"new"
    assert holds(view, b"new")


def test_a_value_that_does_not_fit_is_a_miss(store: Store) -> None:
    store.put_many([b"a", b"b"], [b"four", b"fits"])
    got = store.get_many([b"a", b"b"], buffers(3, 4))
    assert got[0] is None and holds(got[1], b"fits")
    assert store.stats().misses == Counter(too_big=1)


def test_an_empty_value_needs_no_room(store: Store) -> None:
    store.put_many([b"a"], [b""])
    (view,) = store.get_many([b"a"], buffers(0))
    assert holds(view, b"")


def test_a_miss_leaves_its_buffer_alone(store: Store) -> None:
    store.put_many([b"b"], [b"two"])
    out = buffers(3, 3, 3)
    got = store.get_many([b"a", b"b", b"c"], out)
    assert got[0] is None and holds(got[1], b"two") and got[2] is None
    assert [bytes(buffer) for buffer in out] == [b"\xaa" * 3, b"two", b"\xaa" * 3]


def test_later_calls_do_not_touch_earlier_buffers(store: Store) -> None:
    keys, values = named(6)
    store.put_many(keys, values)
    first = buffers(16, 16, 16)
    views = store.get_many(keys[:3], first)
    before = [bytes(buffer) for buffer in first]
    store.get_many(keys[3:], buffers(16, 16, 16))
    store.put_many(keys, [b"other"] * 6)
    store.get_many(keys)
    store.delete_many(keys)
    store.close()
    assert [bytes(buffer) for buffer in first] == before
    assert [holds(view, value) for view, value in zip(views, values[:3], strict=True)] == [True] * 3


def test_buffers_of_other_element_types_are_filled_by_bytes(store: Store) -> None:
    store.put_many([b"a"], [b"\x01\x02\x03\x04\x05\x06"])
    words = memoryview(bytearray(8)).cast("I")
    assert holds(store.get_many([b"a"], [words])[0], b"\x01\x02\x03\x04\x05\x06")
    assert words.tobytes() == b"\x01\x02\x03\x04\x05\x06\0\0"


def test_a_buffer_that_cannot_be_written_is_a_clear_error(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    with pytest.raises(InputError, match="writable"):
        store.get_many([b"a"], [memoryview(b"read only")])


# --- probe and delete ---------------------------------------------------------------------------
@pytest.mark.parametrize(("present", "longest"), [("", 0), ("0", 1), ("012", 3), ("013", 2), ("123", 0), ("01234", 5)])
def test_probe_is_the_longest_present_prefix(store: Store, present: str, longest: int) -> None:
    keys, values = named(5)
    kept = [int(i) for i in present]
    store.put_many([keys[i] for i in kept], [values[i] for i in kept])
    assert store.probe(keys) == longest


def test_probe_sees_far_holes(store: Store) -> None:
    keys, values = named(200)
    store.put_many(keys, values)
    assert store.probe(keys) == 200
    store.delete_many([keys[150]])
    assert store.probe(keys) == 150


def test_probe_counts_as_no_request(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    before = store.stats()
    store.probe([b"a", b"b"])
    assert store.stats() == before


def test_delete_counts_what_was_there(store: Store) -> None:
    keys, values = named(4)
    store.put_many(keys[:3], values[:3])
    assert store.delete_many([keys[0], keys[3], keys[0]]) == 1
    assert store.get_many(keys) == [None, values[1], values[2], None]
    assert store.delete_many(keys) == 2
    assert store.delete_many(keys) == 0


def test_touch_says_what_is_there(store: Store) -> None:
    keys, values = named(4)
    store.put_many(keys[1:3], values[1:3])
    before = store.stats()
    assert store.touch_many([keys[2], keys[0], keys[1], keys[2]]) == [True, False, True, True]
    assert store.touch_many([]) == []
    assert store.stats() == before


# --- counters -----------------------------------------------------------------------------------
def test_every_request_and_offer_is_counted_once(store: Store) -> None:
    store.put_many([b"a", b"b"], [b"one", (b"th", b"ree")])
    store.get_many([b"a", b"x", b"b", b"a"])
    store.get_many([b"a", b"b", b"x"], buffers(3, 4, 9))
    stats = store.stats()
    assert (stats.requested, stats.hits, stats.misses) == (7, 4, Counter(absent=2, too_big=1))
    assert (stats.offered, stats.stored, stats.drops) == (2, 2, Counter())
    assert (stats.bytes_in, stats.bytes_out) == (8, 14)


def test_each_miss_says_why(store: Store) -> None:
    store.put_many([b"a", b"b"], [b"one", b"three"])
    why = ["before"]
    store.get_many([b"a", b"x"], reasons=why)
    store.get_many([b"b", b"a", b"x"], buffers(3, 3, 3), why)
    assert why == ["before", "", "absent", "too_big", "", "absent"]
    store.close()
    store.get_many([b"a"], reasons=why)
    assert why[-1] == "closed"


def test_stats_are_a_copy(store: Store) -> None:
    store.get_many([b"absent"])
    stats = store.stats()
    stats.requested, stats.misses["absent"] = 99, 99
    store.put_many([b"a"], [b"one"])
    assert stats.stored == 0
    assert store.stats().requested == 1 and store.stats().misses == Counter(absent=1)


def test_keys_that_are_no_bytes_are_a_clear_error(store: Store) -> None:
    before = store.stats()
    with pytest.raises(InputError, match="keys as bytes, got str"):
        store.put_many(["text"], [b"one"])
    with pytest.raises(InputError, match="keys as bytes, got int"):
        store.get_many([b"a", 5])
    assert store.stats() == before


def test_batches_of_unequal_length_are_refused_and_change_nothing(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    before = store.stats()
    with pytest.raises(InputError, match="2 keys"):
        store.put_many([b"a", b"b"], [b"two"])
    with pytest.raises(InputError, match="1 keys"):
        store.get_many([b"a"], buffers(3, 3))
    with pytest.raises(InputError, match="1 keys"):
        store.get_many([b"a"], [])
    assert store.stats() == before
    assert store.get_many([b"a", b"b"]) == [b"one", None]


# --- closing ------------------------------------------------------------------------------------
def test_a_closed_store_misses_and_drops_and_says_so(store: Store) -> None:
    store.put_many([b"a"], [b"one"])
    store.close()
    assert store.get_many([b"a", b"b"]) == [None, None]
    assert store.get_many([b"a"], buffers(9)) == [None]
    assert store.put_many([b"a", b"b"], [b"1", b"2"]) == 0
    assert (store.probe([b"a"]), store.delete_many([b"a"])) == (0, 0)
    stats = store.stats()
    assert (stats.misses, stats.drops) == (Counter(closed=3), Counter(closed=2))
    assert not store.health().ok and "closed" in store.health().detail


def test_closing_twice_is_fine(store: Store) -> None:
    store.close()
    store.close()
    assert not store.health().ok


def test_leaving_a_with_block_closes(store: Store) -> None:
    with store as same:
        assert same is store
        assert same.health().ok
        assert "\n" not in same.health().detail
    assert not store.health().ok


# --- a server that is gone ----------------------------------------------------------------------
def test_a_server_that_is_gone_gives_misses_and_drops_and_no_exception(served_store_kind: StoreKind) -> None:
    with RedisServer() as server, served_store_kind.make(url=server.url) as store:
        assert store.put_many([b"a", b"b"], [b"one", b"two"]) == 2
        server.kill()
        assert store.get_many([b"a", b"b"]) == [None, None]
        assert store.get_many([b"a"], buffers(9)) == [None]
        assert store.put_many([b"a"], [b"three"]) == 0
        assert (store.probe([b"a"]), store.delete_many([b"a"]), store.touch_many([b"a"])) == (0, 0, [False])
        assert not store.health().ok
        stats = store.stats()
        stats.check()
        assert (stats.hits, stats.misses.total(), stats.drops.total()) == (0, 3, 1)


# --- threads ------------------------------------------------------------------------------------
SHARED = [b"shared %d" % i for i in range(20)]


def shared_value(key: bytes) -> bytes:
    """The only value that any thread ever stores under a shared key."""
    return key * (5 + key[-1] % 7)


def work(store: Store, seed: int) -> None:
    """A mix of all calls on shared keys, and on keys that no other thread uses."""
    rng = random.Random(seed)
    mine, values = named(5, f"thread {seed} ")
    store.put_many(mine, values)
    for _ in range(40):
        keys = rng.sample(SHARED, 4)
        call = rng.randrange(4)
        if call == 0:
            assert store.put_many(keys, [(shared_value(k),) for k in keys]) == 4
        elif call == 1:
            store.delete_many(keys[:1])
        elif call == 2:
            check_shared(keys, store.get_many(keys, buffers(*[200] * 4)))
        else:
            assert 0 <= store.probe(keys) <= 4
            check_shared(keys, store.get_many(keys))
        assert store.get_many(mine) == values


def check_shared(keys: Sequence[bytes], got: Sequence[bytes | memoryview | None]) -> None:
    for key, value in zip(keys, got, strict=True):
        assert value is None or bytes(value) == shared_value(key)


def test_eight_threads_see_only_right_values(store: Store, store_kind: StoreKind) -> None:
    faults: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            work(store, seed)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    stats = store.stats()
    stats.check()
    assert set(stats.misses) <= {"absent"} and set(stats.drops) <= store_kind.yields
    assert stats.requested >= 8 * 40 * 5
