"""The scheduler's half: what is asked for, loaded, saved and counted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace as Fake

import pytest

from kvlab.stores import MemoryStore

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.connectors.shadow import Shadow
from kvlab.connectors.vllm import Adapters
from kvlab.connectors.vllm.protocol import Failures
from kvlab.connectors.vllm.scheduler import ANSWER_S, LOOK_AGAIN_S, SAVED_S, Gate, SchedulerSide
from tests.engines.sides import (
    SPACE,
    B,
    hashes,
    put,
    request,
    scheduler,
    step,
    wait_until,
)

pytestmark = pytest.mark.engines


def test_one_token_is_left_to_compute() -> None:
    store = MemoryStore()
    put(store, range(10))
    for tokens, matched in ((3, 0), (4, 0), (5, 4), (12, 8), (13, 12), (40, 36), (43, 40)):
        assert scheduler(store).matched(request("a", tokens), 0) == matched, tokens
    assert scheduler(store).matched(request("a", 43), 20) == 20, "beyond what the device has"
    assert scheduler(store).matched(request("a", 43), 40) == 0


def test_a_gap_ends_a_match() -> None:
    store = MemoryStore()
    put(store, [0, 1, 3, 4])
    assert scheduler(store).matched(request("a", 30), 0) == 8
    assert scheduler(store).matched(request("a", 30), 12) == 8, "the gap is on the device"


def test_a_block_counts_only_if_all_ranks_have_it() -> None:
    store = MemoryStore()
    put(store, range(5), 0)
    put(store, range(3), 1)
    assert scheduler(store, ranks=1).matched(request("a", 41), 0) == 20
    assert scheduler(store, ranks=2).matched(request("a", 41), 0) == 12
    assert scheduler(store, ranks=3).matched(request("a", 41), 0) == 0


def test_what_is_saved() -> None:
    store = MemoryStore()
    put(store, [0, 1])
    side, r = scheduler(store), request("a", 22)
    assert side.matched(r, 0) == 8
    side.admitted(r, range(100, 150), 8)
    work = step(side)
    assert [(b.hashes, b.ids) for b in work.loads] == [(hashes(2), [100, 101])] and not work.saves
    side.finished_loads(["a"], None)
    assert step(side, ("a", 8, 7)).saves[0].ids == [102], "the block that the step fills, not the partial one"
    assert step(side, ("a", 15, 1)).saves[0].ids == [103]
    assert not step(side, ("a", 16, 3)).saves
    assert step(side, ("a", 19, 3)).saves[0].ids == [104], "blocks without a hash are not saved"
    assert not step(side, ("a", 22, 4)).saves
    r.block_hashes = hashes(6)  # the sampled tokens arrived later: asynchronous scheduling
    assert step(side, ("a", 26, 1)).saves[0].ids == [105]
    side.forget(r)
    assert not step(side, ("a", 27, 9)).saves


def test_blocks_of_the_device_that_the_store_lost_are_saved_again() -> None:
    store = MemoryStore()
    put(store, [1, 2])
    side, r = scheduler(store), request("a", 30)
    assert side.matched(r, 16) == 0
    side.admitted(r, range(100, 150), 0)
    assert step(side, ("a", 16, 14)).saves[0].ids == [100, 103, 104, 105, 106], "without the first no other is reached"


def test_two_requests_save_a_block_once_and_again_later() -> None:
    now = [0.0]
    side = scheduler(MemoryStore(), clock=lambda: now[0])
    for name in "abc":
        r = request(name, 9)
        side.matched(r, 0)
        side.admitted(r, range(100, 150), 0)
    assert len(step(side, ("a", 0, 9), ("b", 0, 9)).saves) == 1
    now[0] = SAVED_S + 1
    assert len(step(side, ("c", 0, 9)).saves) == 1


def test_a_failed_load_is_repaired_and_not_tried_again() -> None:
    store = MemoryStore()
    put(store, range(5))
    side, r = scheduler(store), request("a", 21)
    assert side.matched(r, 0) == 20
    side.admitted(r, range(100, 150), 20)
    step(side)
    side.finished_loads(["a"], Failures({"a": {hashes(5)[2]: "checksum"}}))
    assert side.gate.open and side.matched(r, 0) == 0
    assert step(side, ("a", 8, 13)).saves[0].ids == [102]
    counted = side.counters.take()
    assert counted is not None and counted.data["requests:partial"] == 1 and counted.data["hit_tokens"] == 8


@pytest.mark.parametrize(
    ("reason", "outcome", "is_open"),
    [("forged", "refused", True), ("absent", "absent", True), ("timeout", "failed", False)],
)
def test_the_outcome_of_a_load_that_failed_at_once(reason: str, outcome: str, is_open: bool) -> None:
    store = MemoryStore()
    put(store, range(5))
    side, r = scheduler(store), request("a", 21)
    side.matched(r, 0)
    side.admitted(r, range(100, 150), 20)
    side.finished_loads(["a"], Failures({"a": dict.fromkeys(hashes(5), reason)}))
    counted = side.counters.take()
    assert counted is not None and counted.data[f"requests:{outcome}"] == 1 and counted.data["hit_tokens"] == 0
    assert side.gate.open == is_open
    side.close()


def test_a_request_that_waits_for_room_is_looked_up_once_a_second() -> None:
    store, now = MemoryStore(), [0.0]
    asked: list[int] = []
    original = store.touch_many
    store.touch_many = lambda keys: (asked.append(len(keys)), original(keys))[1]  # type: ignore[method-assign]
    side, r = scheduler(store, clock=lambda: now[0]), request("a", 21)
    for _ in range(100):
        assert side.matched(r, 0) == 0
    assert asked == [5]
    put(store, range(5))
    now[0] = LOOK_AGAIN_S + 0.1
    assert side.matched(r, 0) == 20 and asked == [5, 5]


def test_preempted_requests_are_not_counted_again() -> None:
    store = MemoryStore()
    put(store, range(5))
    side, r = scheduler(store), request("a", 21)
    for preemptions in (0, 1, 2):
        r.num_preemptions = preemptions
        side.matched(r, 0)
        side.admitted(r, range(100, 150), 20)
        side.finished_loads(["a"], None)
    other = request("b", 21, num_preemptions=1)
    side.matched(other, 0)
    side.admitted(other, range(100, 150), 20)
    side.finished_loads(["b"], None)
    counted = side.counters.take()
    assert counted is not None and counted.data["requests:hit"] == 1 and counted.data["hit_tokens"] == 20


def test_outcomes_without_a_load() -> None:
    store = MemoryStore()
    put(store, range(2))
    side = scheduler(store)
    for name, tokens, computed in (("short", 4, 0), ("local", 9, 8), ("absent", 30, 8)):
        r = request(name, tokens)
        assert side.matched(r, computed) == 0
        side.admitted(r, range(100, 150), 0)
        side.admitted(r, range(100, 150), 0)
        counted = side.counters.take()
        assert counted is not None and counted.data[f"requests:{name}"] == 1, counted


def test_an_epoch_forgets_and_does_not_save_what_is_older() -> None:
    side, r = scheduler(MemoryStore()), request("a", 30)
    side.matched(r, 0)
    side.admitted(r, range(100, 150), 0)
    assert step(side, ("a", 0, 8)).saves
    side.enter(b"t" * 32, 1)
    assert not step(side, ("a", 8, 8)).saves, "its KV is of the epoch before"
    side.matched(r, 0)  # it starts anew
    work = step(side, ("a", 0, 16))
    assert work.space == b"t" * 32 and work.saves[0].ids == [100, 101, 102, 103]


def test_a_gate_opens_when_the_store_works() -> None:
    works = threading.Event()
    gate = Gate(works.is_set, every_s=0.01)
    gate.close()
    gate.close()
    assert threading.active_count() < 50 and not gate.open
    time.sleep(0.05)
    assert not gate.open
    works.set()
    wait_until(lambda: gate.open)
    works.clear()
    gate.close()
    gate.end()
    time.sleep(0.05)
    works.set()
    time.sleep(0.05)
    assert not gate.open, "an ended gate asks nothing"


def test_shadow_takes_what_is_there_and_saves_the_rest() -> None:
    store = MemoryStore()
    put(store, range(2))
    side, r = scheduler(store, share=1.0), request("a", 21)
    assert side.matched(r, 0) == 0 == side.matched(r, 0)
    side.admitted(r, range(100, 150), 0)
    work = step(side, ("a", 0, 21))
    assert work.checks[0].ids == [100, 101] and work.saves[0].ids == [102, 103, 104]
    counted = side.counters.take()
    assert counted is not None and counted.data["requests:shadow"] == 1


def test_a_slow_store_delays_its_own_requests_and_not_the_engine() -> None:
    store = MemoryStore()
    put(store, range(10))
    answers, original = threading.Event(), store.touch_many
    store.touch_many = lambda keys: (answers.wait(20), original(keys))[1]  # type: ignore[method-assign]
    side = SchedulerSide(store, B, Shadow(0.0, "fp32"), lambda _: b"", wait_s=0.2)
    side.enter(SPACE, 1)
    waiting = [request(str(i), 41) for i in range(20)]
    assert [side.matched(r, 0) for r in waiting] == [None] * 20
    step(side)
    assert side.matched(waiting[0], 0) is None
    counted = side.counters.take()
    assert counted is not None and counted.data["held_seconds"] < 2.0, "20 look-ups of a step share 0.2 s"
    answers.set()
    wait_until(lambda: (step(side), [side.matched(r, 0) for r in waiting] == [40] * 20)[1])
    assert side.gate.open


def test_a_look_up_of_the_epoch_before_is_not_believed() -> None:
    store = MemoryStore()
    put(store, range(5))
    answers, original = threading.Event(), store.touch_many
    store.touch_many = lambda keys: (answers.wait(20), original(keys))[1]  # type: ignore[method-assign]
    side = SchedulerSide(store, B, Shadow(0.0, "fp32"), lambda _: b"", wait_s=0.01)
    side.enter(SPACE, 1)
    r = request("a", 21)
    assert side.matched(r, 0) is None
    side.enter(b"t" * 32, 1)
    answers.set()
    wait_until(lambda: (step(side), side.matched(r, 0) is not None)[1])
    assert side.matched(r, 0) == 0


def test_what_was_found_before_a_fault_is_not_promised_after_it() -> None:
    store, now = MemoryStore(), [0.0]
    put(store, range(5))
    side, r = scheduler(store, clock=lambda: now[0]), request("a", 21)
    assert side.matched(r, 0) == 20
    side.gate.close()
    now[0] = LOOK_AGAIN_S + 0.1
    assert side.matched(r, 0) == 0
    side.close()


@pytest.mark.parametrize("reasons", [["absent", "checksum"], ["forged", "version"], ["absent"]])
def test_bad_records_do_not_close_the_gate(reasons: list[str]) -> None:
    store = MemoryStore()
    put(store, range(5))
    side, r = scheduler(store), request("a", 21)
    side.matched(r, 0)
    side.admitted(r, range(100, 150), 20)
    side.finished_loads(["a"], Failures({"a": dict(zip(hashes(5), reasons, strict=False))}))
    assert side.gate.open
    side.finished_loads([], Failures({"a": {hashes(1)[0]: "checksum", hashes(2)[1]: "conn"}}))
    assert not side.gate.open
    side.close()


def test_a_prompt_that_the_device_has_is_looked_up_and_not_saved_again() -> None:
    store, now = MemoryStore(), [0.0]
    put(store, range(5))
    side = scheduler(store, clock=lambda: now[0])
    for i in range(3):
        now[0] += 2 * SAVED_S
        r = request(str(i), 21)
        assert side.matched(r, 20) == 0
        side.admitted(r, range(100, 150), 0)
        assert not step(side, (str(i), 20, 1)).saves


def test_blocks_of_answers_are_saved_once_in_ten_minutes() -> None:
    now = [0.0]
    side, saves = scheduler(MemoryStore(), clock=lambda: now[0]), []
    for i, at in enumerate((0.0, 60.0, ANSWER_S + 61.0)):
        now[0] = at
        r = request(str(i), 4)
        side.matched(r, 0)
        side.admitted(r, range(100, 150), 0)
        step(side, (str(i), 0, 4))
        r.block_hashes = hashes(2)
        saves.append(len(step(side, (str(i), 4, 4)).saves))
    assert saves == [1, 0, 1]


def test_requests_for_which_nothing_is_read_saved_or_known() -> None:
    store = MemoryStore()
    put(store, range(5))
    side = scheduler(store)
    skipping = request("skipped", 21, skip_reading_prefix_cache=True)
    assert side.matched(skipping, 0) == 0
    side.admitted(skipping, range(100, 150), 0)
    side._adapter_digest = lambda _: None
    excluded = request("excluded", 21)
    assert side.matched(excluded, 0) == 0
    side.admitted(excluded, range(100, 150), 0)
    assert not step(side, ("excluded", 0, 21)).saves
    side._adapter_digest = lambda _: b""
    aborted = request("aborted", 21)
    assert side.matched(aborted, 0) == 20
    side.admitted(aborted, range(100, 150), 20)
    side.forget(aborted)
    counted = side.counters.take()
    assert counted is not None
    assert [counted.data[f"requests:{name}"] for name in ("skipped", "excluded", "aborted")] == [1, 1, 1]


def test_an_adapter_is_what_its_files_were_when_it_was_first_used(tmp_path: Path) -> None:
    def use(number: int) -> bytes | None:
        return adapters.digest(Fake(lora_request=Fake(lora_int_id=number, lora_path=str(tmp_path))))  # type: ignore[arg-type]

    adapters, weights = Adapters(), tmp_path / "adapter_model.safetensors"
    assert adapters.digest(Fake(lora_request=None)) == b""  # type: ignore[arg-type]
    weights.write_bytes(b"one")
    first = use(1)
    assert first is not None and use(1) == first == Adapters().digest(
        Fake(lora_request=Fake(lora_int_id=9, lora_path=str(tmp_path)))  # type: ignore[arg-type]
    )
    weights.write_bytes(b"other")
    assert use(1) is None, "nobody knows which of the two the engine has"
    assert use(2) not in (None, first), "an adapter that was loaded later"
    weights.unlink()
    tmp_path.rmdir()
    assert use(1) is None and use(3) is None
