"""The scheduler's half: looks prompts up, and says which blocks the workers load, save and compare.

A look-up is one round trip in a thread. Its answer is awaited for `wait_s` in all look-ups of a step, because that
holds up the whole engine; vLLM asks again in the next step for what did not come. After a look-up that failed, none is
made until the store answers a thread of its own again (`Gate`).

Loads are asynchronous: a request waits for its blocks while others run, and is only computed from blocks that were
loaded and verified. So nothing is ever computed, and saved, on top of a failed load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvlab.connectors.shadow import Shadow
from kvlab.connectors.vllm.namespace import block_key
from kvlab.connectors.vllm.protocol import Blocks, Failures, Work
from kvlab.connectors.vllm.stats import Counters
from kvlab.stores import Store
from kvlab.stores.faults import Reason
from kvlab.stores.workers import Workers

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

WAIT_S = 0.005  # for the look-ups of a step
LOOK_UPS = 4  # at the same time
LOOK_AGAIN_S = 1.0  # for a request that still waits for room
SAVED_S = 10.0  # in which a block that was handed to the queue is not saved again, although a look-up missed it
ANSWER_S = 600.0  # the same for blocks of answers, for which no look-up asks
MOST_SAVED = 1 << 16  # blocks of which this is remembered
GATE_S = 1.0
REFUSED = frozenset(
    (Reason.MAGIC, Reason.VERSION, Reason.KIND, Reason.LENGTH, Reason.KEY, Reason.KEY_ID, Reason.CHECKSUM,
     Reason.FORGED, Reason.PRECISION, Reason.CODEC, Reason.DIMS, Reason.OVERFLOW, Reason.TOO_BIG)
)  # fmt: skip
"""The reasons that say something about a record, and nothing about the store."""
logger = init_logger("vllm.kvlab.scheduler")  # vLLM shows the loggers below its own


class Gate:
    """Whether the store is asked. Closed by a fault, it opens when `works` says so, asked in a thread of its own."""

    def __init__(self, works: Callable[[], bool], every_s: float = GATE_S) -> None:
        self.open = True
        self._works, self._every_s = works, every_s
        self._ended = threading.Event()

    def close(self) -> None:
        """Ask nothing until the store works again."""
        if self.open:
            self.open = False
            threading.Thread(target=self._wait, name="kvlab-gate", daemon=True).start()

    def end(self) -> None:
        """End the thread."""
        self._ended.set()

    def _wait(self) -> None:
        while not self._ended.wait(self._every_s):
            if self._works():
                self.open = True
                return


@dataclass
class Tracked:
    """What the scheduler's half knows of a request.

    Attributes:
        present: which of its blocks, from the first one, the store had at the last look-up.
        looked_at: when that was.
        failed: the look-up had no answer.
        found: the answer of a look-up, as it arrives from its thread: `present`, `failed`, and its seconds.
        asked: the first block and the number of blocks of the current load.
        shadow: blocks that are compared instead of loaded.
        saved: blocks before this one were saved, or were there.
        no_load: a load failed; the request computes the rest.
        counted: its outcome was counted.
        stale: it was computed in an earlier epoch, and nothing of it is saved until it starts anew.
    """

    request: Request
    adapter: bytes | None
    present: list[bool] = field(default_factory=list)
    looked_at: float = float("-inf")
    failed: bool = False
    found: SimpleQueue[tuple[list[bool], bool, float]] | None = None
    asked: tuple[int, int] = (0, 0)
    shadow: range | None = None
    saved: int = 0
    no_load: bool = False
    counted: bool = False
    stale: bool = False


class SchedulerSide:
    """See the text of this module.

    Args:
        store: for look-ups.
        block_tokens: B.
        shadow: chooses hits to compare.
        adapter_digest: of the LoRA adapter of a request, b"" without one; None if it is not known. Then nothing is
            loaded or saved for the request.
        wait_s: how long the look-ups of a step may hold up the engine.
    """

    def __init__(
        self,
        store: Store,
        block_tokens: int,
        shadow: Shadow,
        adapter_digest: Callable[[Request], bytes | None],
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_S,
    ) -> None:
        self.store, self.block_tokens, self.shadow = store, block_tokens, shadow
        self.space, self.ranks = b"", 0  # set when the workers have said hello
        self.counters = Counters()
        self.gate = Gate(lambda: store.health().ok)
        self._adapter_digest, self._clock = adapter_digest, clock
        self._wait_s = self._left_s = wait_s
        self._threads = Workers(LOOK_UPS, "kvlab-look-up")
        self._tracked: dict[str, Tracked] = {}
        self._loads: list[Blocks] = []
        self._saved_at: dict[tuple[bytes, bytes], float] = {}  # by block hash and adapter; oldest first

    def enter(self, space: bytes, ranks: int) -> None:
        """Use the keys of a namespace, for so many workers. What was computed before is not saved in it."""
        self.space, self.ranks = space, ranks
        self._saved_at.clear()
        for tracked in self._tracked.values():
            tracked.present, tracked.looked_at, tracked.saved, tracked.stale = [], float("-inf"), 0, True
            tracked.found = None  # an answer about the keys of before

    def close(self) -> None:
        """Close the store and end the gate's thread."""
        self.gate.end()
        self.store.close()

    # --- before a request is admitted -------------------------------------------------------------------------------
    def matched(self, request: Request, computed: int) -> int | None:
        """Return how many tokens beyond `computed` the store has, in whole blocks. One token is left to compute.

        Returns:
            None if the answer of the store has not come yet.
        """
        tracked = self._track(request)
        first, last = self._range(request, computed)
        tracked.asked, tracked.stale = (first, 0), False
        if tracked.adapter is None or not request.block_hashes or not self.space:
            return 0
        if not self._look_up(tracked):
            return None
        if last <= first or tracked.no_load or request.skip_reading_prefix_cache:
            return 0
        count = _run(tracked.present, first, last)
        tracked.asked = (first, count)
        if count and tracked.shadow is None:
            tracked.shadow = range(first, first + count) if self.shadow.chooses() else range(0)
        return 0 if tracked.shadow else count * self.block_tokens

    def admitted(self, request: Request, ids: Sequence[int], external_tokens: int) -> None:
        """Plan the load into the blocks `ids` of an admitted request. Called again when the load has ended."""
        tracked = self._track(request)
        first, _ = tracked.asked
        count = external_tokens // self.block_tokens
        if count and tracked.adapter is not None:
            hashes = [bytes(h) for h in request.block_hashes[first : first + count]]
            self._loads.append(Blocks(request.request_id, tracked.adapter, hashes, list(ids[first : first + count])))
        elif not tracked.counted:
            self._count(tracked, self._outcome(tracked), 0)

    # --- each step --------------------------------------------------------------------------------------------------
    def work(self, output: SchedulerOutput) -> Work:
        """Return the work of the step: planned loads, and blocks that are whole when the step ends."""
        work = Work(self.space, self._loads, idle=not output.num_scheduled_tokens)
        self._loads, self._left_s = [], self._wait_s
        if not self.gate.open or not self.space:
            return work  # blocks that are not saved now are saved when the gate opens
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(name)
            if tracked is None or tracked.stale or tracked.adapter is None:
                continue
            whole = min((computed[name] + tokens) // self.block_tokens, len(tracked.request.block_hashes))
            if whole > tracked.saved:
                table = output.kv_connector_block_state.get_block_ids(name)[0]
                self._add_blocks(work, tracked, range(tracked.saved, whole), table)
                tracked.saved = whole
        return work

    def _add_blocks(self, work: Work, tracked: Tracked, blocks: range, table: Sequence[int]) -> None:
        assert tracked.adapter is not None
        shadow = tracked.shadow or range(0)
        new = [i for i in blocks if i not in shadow and self._is_new(tracked, i)]
        for indices, target in ((new, work.saves), ([i for i in blocks if i in shadow], work.checks)):
            if indices:
                hashes = [bytes(tracked.request.block_hashes[i]) for i in indices]
                name = tracked.request.request_id
                target.append(Blocks(name, tracked.adapter, hashes, [table[i] for i in indices]))

    def _is_new(self, tracked: Tracked, i: int) -> bool:
        """Whether a block is to be saved: the store does not have it, and it is not on its way there."""
        looked_up = i < len(tracked.present)
        if looked_up and tracked.present[i]:
            return False
        name, now = (bytes(tracked.request.block_hashes[i]), tracked.adapter or b""), self._clock()
        if now - self._saved_at.get(name, float("-inf")) < (SAVED_S if looked_up else ANSWER_S):
            return False
        self._saved_at.pop(name, None)  # so that the dict stays in the order of time
        self._saved_at[name] = now
        while len(self._saved_at) > MOST_SAVED:
            del self._saved_at[next(iter(self._saved_at))]
        return True

    def finished_loads(self, names: Sequence[str], failures: Failures | None) -> None:
        """Take note of loads that ended, and of the blocks that failed: they are computed and saved again."""
        failed = failures.blocks if failures else {}
        for name, reasons in failed.items():
            if set(reasons.values()) - REFUSED - {Reason.ABSENT}:
                self.gate.close()
            if (tracked := self._tracked.get(name)) is not None:
                tracked.no_load = True
                for i, block_hash in enumerate(tracked.request.block_hashes[: len(tracked.present)]):
                    if bytes(block_hash) in reasons:
                        tracked.present[i] = False
                        self._saved_at.pop((bytes(block_hash), tracked.adapter or b""), None)
        for name in names:
            if (tracked := self._tracked.get(name)) is not None and not tracked.counted:
                self._count_load(tracked, failed.get(name, {}))

    def forget(self, request: Request) -> None:
        """A request has ended."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and not tracked.counted and tracked.asked[1]:
            self._count(tracked, "aborted", 0)

    # --- look-ups ---------------------------------------------------------------------------------------------------
    def _track(self, request: Request) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = Tracked(request, self._adapter_digest(request))
        return tracked

    def _range(self, request: Request, computed: int) -> tuple[int, int]:
        """The blocks to ask for: from the computed ones to the last whole one before the last token."""
        last = min((request.num_tokens - 1) // self.block_tokens, len(request.block_hashes))
        return computed // self.block_tokens, last

    def _look_up(self, tracked: Tracked) -> bool:
        """Ask the store for all blocks of a request, and refresh their TTLs. Return whether the answer is there.

        The blocks that the device has are asked for, too: those that the store lost are saved again, because later
        blocks cannot be reached without them, and the others are not.
        """
        begin = time.monotonic()
        if tracked.found is None:
            if self._clock() - tracked.looked_at < LOOK_AGAIN_S:
                return True
            if not self.gate.open:
                tracked.present, tracked.failed = [], True  # what an earlier look-up found cannot be loaded now
                return True
            tracked.found = SimpleQueue()
            keys = [
                block_key(self.space, block_hash, tracked.adapter or b"", rank)
                for block_hash in tracked.request.block_hashes
                for rank in range(self.ranks)
            ]
            answer = tracked.found  # the thread does not know the request
            self._threads.submit(lambda: answer.put(self._ask(keys)))
        try:
            present, failed, seconds = tracked.found.get(timeout=max(0.0, self._left_s))
        except Empty:
            return False
        finally:
            held = time.monotonic() - begin
            self._left_s -= held
            self.counters.add(held_seconds=held)
        tracked.present, tracked.failed, tracked.found, tracked.looked_at = present, failed, None, self._clock()
        self.counters.add(lookup_seconds=seconds)
        if failed:
            logger.warning("the store does not answer; prompts are computed until it does: %s", self.store)
            self.gate.close()
        return True

    def _ask(self, keys: list[bytes]) -> tuple[list[bool], bool, float]:
        """In a thread: which blocks are there at all ranks, whether the store failed, and the seconds that it took."""
        begin, failed, there = time.monotonic(), True, [False] * len(keys)
        try:
            before = self.store.stats().faults.total()
            there = self.store.touch_many(keys)
            failed = self.store.stats().faults.total() > before
        except Exception:  # a request must not wait for ever because a thread ended
            logger.exception("a look-up failed")
        present = [all(there[i : i + self.ranks]) for i in range(0, len(there), self.ranks)]
        return present, failed, time.monotonic() - begin

    # --- counters ---------------------------------------------------------------------------------------------------
    def _outcome(self, tracked: Tracked) -> str:
        first, _ = tracked.asked
        if tracked.adapter is None:
            return "excluded"
        if not tracked.request.num_tokens > self.block_tokens:
            return "short"
        if self._range(tracked.request, first * self.block_tokens)[1] <= first:
            return "local"
        if tracked.request.skip_reading_prefix_cache:
            return "skipped"
        if tracked.shadow:
            return "shadow"
        return "failed" if tracked.failed else "absent"

    def _count_load(self, tracked: Tracked, failed: dict[bytes, str]) -> None:
        first, count = tracked.asked
        hashes = [bytes(h) for h in tracked.request.block_hashes[first : first + count]]
        loaded = next((i for i, h in enumerate(hashes) if h in failed), count)
        whole = self._range(tracked.request, 0)[1] - first
        if loaded:
            outcome = "hit" if loaded == whole else "partial"
        else:
            reason = failed[hashes[0]] if hashes else Reason.ABSENT
            outcome = "absent" if reason == Reason.ABSENT else "refused" if reason in REFUSED else "failed"
        self._count(tracked, outcome, loaded)

    def _count(self, tracked: Tracked, outcome: str, loaded: int) -> None:
        tracked.counted = True
        if tracked.request.num_preemptions:
            return  # its blocks were computed here before: no hit of a cache
        first, _ = tracked.asked
        self.counters.count("requests", outcome)
        self.counters.add(
            lookup_tokens=tracked.request.num_tokens,
            local_tokens=first * self.block_tokens,
            hit_tokens=loaded * self.block_tokens,
        )
        logger.debug(
            "request %s: %s; %d of %d tokens from the device, %d from the store",
            tracked.request.request_id, outcome, first * self.block_tokens, tracked.request.num_tokens,
            loaded * self.block_tokens,
        )  # fmt: skip


def _run(present: Sequence[bool], first: int, last: int) -> int:
    """Return how many blocks from `first` on are present without a gap."""
    return next(
        (i - first for i in range(first, min(last, len(present))) if not present[i]),
        max(0, min(last, len(present)) - first),
    )
