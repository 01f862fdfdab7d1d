"""The two halves of the connector, without an engine: ranks, windows, gates, failures, and what is refused."""

from __future__ import annotations

import copy
import threading
import time
from types import SimpleNamespace as Fake
from typing import Any

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.stores import MemoryStore

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.connectors.shadow import Shadow
from kvlab.connectors.vllm import namespace
from kvlab.connectors.vllm.namespace import Layout, block_key, blocks_of, layout_digest
from kvlab.connectors.vllm.protocol import Blocks, Failures, Work
from kvlab.connectors.vllm.scheduler import LOOK_AGAIN_S, SAVED_S, Gate, SchedulerSide
from kvlab.connectors.vllm.settings import Settings
from kvlab.connectors.vllm.stats import Counters
from kvlab.connectors.vllm.worker import WorkerSide
from kvlab.core import record
from kvlab.core.record import Format

pytestmark = pytest.mark.engines

B, L, BLOCKS, SPACE = 4, 3, 20, b"s" * 32
FMT = Format("opaque")
LAYOUT = Layout("vllm 0.32.0", "cpu", "vec", "CPU_ATTN", "float32", B, "sha256", ((2, B, 5),) * L)


def hashes(count: int, name: str = "h") -> list[bytes]:
    return [f"{name}{i}".encode().ljust(32, b".") for i in range(count)]


def request(name: str, tokens: int, **members: Any) -> Any:
    defaults = {"num_preemptions": 0, "lora_request": None, "skip_reading_prefix_cache": False}
    return Fake(request_id=name, num_tokens=tokens, block_hashes=hashes(tokens // B), **{**defaults, **members})


def scheduler(store: Any, ranks: int = 1, share: float = 0.0, clock: Any = time.monotonic) -> SchedulerSide:
    side = SchedulerSide(store, B, Shadow(share, "fp32"), lambda _: b"", clock, wait_s=20.0)
    side.enter(SPACE, ranks)
    return side


def step(side: SchedulerSide, *scheduled: tuple[str, int, int]) -> Work:
    """A step of the engine with requests of (name, computed tokens, scheduled tokens); block i is at 100 + i."""
    table = Fake(get_block_ids=lambda name: ([100 + i for i in range(50)],))
    cached = Fake(req_ids=[name for name, _, _ in scheduled], num_computed_tokens=[c for _, c, _ in scheduled])
    tokens = {name: n for name, _, n in scheduled}
    return side.work(
        Fake(
            scheduled_cached_reqs=cached,
            scheduled_new_reqs=[],
            num_scheduled_tokens=tokens,
            kv_connector_block_state=table,
        )
    )


def put(store: MemoryStore, indices: Any, rank: int = 0) -> None:
    for i in indices:
        key = block_key(SPACE, hashes(50)[i], b"", rank)
        value = record.encode_opaque(torch.full((L, 40), i + rank / 10).view(torch.int32).numpy().view("<u4"), key, FMT)
        store.put_many([key], [value])


# --- the scheduler's half -------------------------------------------------------------------------
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


# --- the worker's half ------------------------------------------------------------------------------
def worker(store: MemoryStore, rank: int = 0, share: float = 0.0, fmt: Format = FMT) -> WorkerSide:
    tensors = [torch.zeros(BLOCKS, 2, B, 5) for _ in range(L)]
    return WorkerSide(store, store, fmt, LAYOUT, tensors, rank, Shadow(share, "fp32"))


def load(side: WorkerSide, indices: list[int], ids: list[int], name: str = "a") -> set[str]:
    done: set[str] = set()
    side.start_loads(Work(SPACE, loads=[Blocks(name, b"", [hashes(50)[i] for i in indices], ids)]))
    wait_until(lambda: done.update(side.finished()) or name in done)
    return done


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


# --- layouts and what is refused ----------------------------------------------------------------------
def test_kernels_may_divide_blocks() -> None:
    tensor = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(blocks_of(tensor, 6)[1], tensor[2:4]) and blocks_of(tensor, 12) is tensor
    blocks_of(tensor, 6)[1] = 7.0
    assert tensor[2:4].eq(7).all(), "it is a view"
    with pytest.raises(ConfigError, match="first axis"):
        blocks_of(tensor, 5)


def test_every_member_of_a_layout_is_in_the_namespace() -> None:
    spaces = {namespace.namespace([LAYOUT], b"f" * 32, b"")}
    for name, value in vars(LAYOUT).items():
        changed = copy.copy(LAYOUT)
        object.__setattr__(changed, name, value + 1 if isinstance(value, int) else value + value[:1])
        spaces.add(namespace.namespace([changed], b"f" * 32, b""))
    spaces |= {
        namespace.namespace([LAYOUT, LAYOUT], b"f" * 32, b""),
        namespace.namespace([LAYOUT], b"g" * 32, b""),
        namespace.namespace([LAYOUT], b"f" * 32, b"salt"),
        namespace.namespace([LAYOUT], b"f" * 32, b"", b"epoch"),
    }
    assert len(spaces) == 1 + len(vars(LAYOUT)) + 4 and len(layout_digest([LAYOUT])) == 32


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.3"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.32 or 0\.33"):
        namespace.check_version(version)
    for good in ("0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.0.dev5+g1234"):
        namespace.check_version(good)


def config(**changes: Any) -> Any:
    """A config that is accepted, with one member changed."""
    parts: dict[str, Any] = {
        "kv_transfer_config": Fake(kv_role="kv_both", kv_load_failure_policy="recompute"),
        "parallel_config": Fake(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "cache_config": Fake(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
        "load_config": Fake(load_format="auto"),
        "model_config": Fake(
            is_hybrid=False, use_mla=False, get_sliding_window=lambda: None, is_encoder_decoder=False,
            hf_config=Fake(model_type="llama", to_dict=dict),
        ),
        "speculative_config": None,
    }  # fmt: skip
    for name, value in changes.items():
        part, _, member = name.partition("__")
        if member:
            setattr(parts[part], member, value)
        else:
            parts[part] = value
    return Fake(**parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_both"),
        ({"kv_transfer_config__kv_load_failure_policy": "fail"}, "recompute"),
        ({"speculative_config": object()}, "speculative"),
        ({"cache_config__prefix_caching_hash_algo": "xxhash"}, "sha256"),
        ({"cache_config__cache_dtype": "fp8"}, "kv-cache-dtype auto"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size 1"),
        ({"load_config__load_format": "dummy"}, "fingerprint"),
        (
            {
                "model_config__hf_config": Fake(
                    model_type="phi3", to_dict=lambda: {"rope_scaling": {"type": "longrope"}}
                )
            },
            "RoPE",
        ),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__get_sliding_window": lambda: 4096}, "sliding"),
    ],
)
def test_set_ups_that_are_refused(change: dict[str, Any], says: str) -> None:
    namespace.check_config(config())
    with pytest.raises(ConfigError, match=says):
        namespace.check_config(config(**change))


def test_caches_that_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)
    namespace.check_cache(Fake(kv_cache_groups=[Fake(kv_cache_spec=full)]))
    for groups in (
        [],
        [full, full],
        [SlidingWindowSpec(**shape, sliding_window=128)],
        [FullAttentionSpec(**shape, sliding_window=128)],
        [FullAttentionSpec(**shape, non_causal=True)],
    ):
        with pytest.raises(ConfigError):
            namespace.check_cache(Fake(kv_cache_groups=[Fake(kv_cache_spec=spec) for spec in groups]))


# --- settings -------------------------------------------------------------------------------------------
URL = "redis://127.0.0.1:6379"


def test_settings() -> None:
    settings = Settings.of({"store": URL, "shadow": 0.01}, {"KVLAB_SALT": "geheim", "KVLAB_KEYS": "1:" + "ab" * 32})
    assert settings.salt == b"geheim" and settings.keys == {1: b"\xab" * 32} and settings.shadow == 0.01
    assert "geheim" not in repr(settings) and "ab" * 8 not in repr(settings)
    assert Settings.of({}, {"KVLAB_STORE": URL}).store == URL
    assert Settings.of({"store": URL, "compress": True}, {}).format.codec == "zstd"


@pytest.mark.parametrize(
    ("extra", "environment", "says"),
    [
        ({}, {}, "KVLAB_STORE"),
        ({"store": "fakeredis://"}, {}, "scheduler and workers share"),
        ({"store": "memory://"}, {}, "scheduler and workers share"),
        ({"store": 5}, {}, "URL"),
        ({"store": "http://x"}, {}, "scheme|expected"),
        ({"store": URL, "ttl": 5}, {}, "got ttl"),
        ({"store": URL, "salt": "x"}, {}, "KVLAB_SALT"),
        ({"store": URL, "ttl_seconds": -1}, {}, "TTL"),
        ({"store": URL, "shadow": 2}, {}, "shadow"),
        ({"store": URL, "shadow": "all"}, {}, "shadow"),
        ({"store": URL, "compress": "gzip"}, {}, "compress"),
        ({"store": URL, "queue_bytes": 0}, {}, "queue_bytes"),
        ({"store": URL, "deadline_s": 0}, {}, "deadline_s"),
        ({"store": URL}, {"KVLAB_KEYS": "1:zz"}, "hexadecimal"),
        ({"store": URL}, {"KVLAB_KEYS": "1:ab"}, "32"),
    ],
)
def test_settings_that_are_refused(extra: dict[str, Any], environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings.of(extra, environment)


def wait_until(holds: Any, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
