"""kvlab's routers inside Ray Serve: which replica gets a request, by what each has and what each does.

One router lives in each process that sends requests. It knows what it sent itself, and what the replicas report about
their blocks. This module needs Ray when it is imported; Ray Serve imports it.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from kvlab.core.keys import block_keys
from kvlab.engine.router import ROUTERS, Balance, BlockIndex
from kvlab.engine.worker import KEY_BYTES
from kvlab.errors import InputError

logger = logging.getLogger(__name__)


def _logged(hook: Callable[..., None]) -> Callable[..., None]:
    """What a hook raises would end in Ray Serve's own loops, and requests would hang."""

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:
            logger.exception("%s failed; requests are routed all the same", hook.__name__)

    return guarded


class KVLabRouter(RequestRouter):  # type: ignore[misc]
    """Asks a router of `kvlab.engine.router`; if that raises, the replicas get their requests in turn."""

    def initialize_state(self, router: str = "cost") -> None:
        """Take the settings, `request_router_kwargs`."""
        self._route = ROUTERS[router]
        self._index, self._balance = BlockIndex(), Balance(())
        self._number: dict[ReplicaID, int] = {}  # of each replica; never used for another one
        self._failed: set[int] = set()  # they answer every request with an error, until they are replaced
        self._taken: dict[str, int] = {}  # by request: the replica whose load it counts as
        self._numbers, self._turns, self._routed = itertools.count(), itertools.count(), 0

    # --- the choice -----------------------------------------------------------------------------
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which they are asked; a full one passes the request on to the next."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # or Serve asks again at once, as long as all are full
        if pending_request.metadata.call_method != "generate":
            return [[replica] for replica in self._in_turn(candidate_replicas)]
        try:
            ranked = self.rank(candidate_replicas, pending_request)
            self._take(pending_request, ranked[0])
        except Exception:
            logger.exception("the router failed; this request goes to the next replica in turn")
            ranked = self._in_turn(candidate_replicas)
        return [[replica] for replica in ranked]

    def _in_turn(self, replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
        start = next(self._turns) % max(len(replicas), 1)
        return [*replicas[start:], *replicas[:start]]

    def rank(self, replicas: Sequence[RunningReplica], request: PendingRequest) -> list[RunningReplica]:
        """The best replica first."""
        by_number = {self._number[r.replica_id]: r for r in replicas if r.replica_id in self._number}
        blocks, matched = 0, Counter[int]()
        for number, replica in by_number.items():
            keys = self._keys(replica, request)
            blocks, matched[number] = len(keys), self._index.matched(keys)[number]
        remaining = [c for c in self._balance.candidates(matched) if c.worker in by_number]
        ranked: list[int] = []
        while remaining:
            ranked.append(self._route(blocks, remaining, self._routed))
            remaining = [c for c in remaining if c.worker != ranked[-1]]
        ranked.sort(key=self._failed.__contains__)
        return [*map(by_number.__getitem__, ranked), *(r for r in replicas if r.replica_id not in self._number)]

    def _take(self, request: PendingRequest, replica: RunningReplica) -> None:
        """Count a request where it will go: the next one may come before the replica has said that it takes this."""
        id, number = request.metadata.internal_request_id, self._number[replica.replica_id]
        if self._taken.get(id) == number:
            return
        keys, B = self._keys(replica, request), replica.replica_metadata["block_tokens"]
        prompt, new, *_ = request.args
        work = len(prompt) - self._index.matched(keys)[number] * B + (new if type(new) is int else 0)
        self._drop(id)
        self._balance.give(number, id, -(-work // B))
        self._index.expect(number, keys)
        self._taken[id] = number
        request.future.add_done_callback(lambda future: self._drop(id) if future.cancelled() else None)

    def _drop(self, id: str) -> None:
        self._taken.pop(id, None)
        self._balance.report(id, 0)

    def _keys(self, replica: RunningReplica, request: PendingRequest) -> list[bytes]:
        """The shortened keys of a prompt's blocks. Replicas of two models have different ones."""
        family = replica.replica_metadata
        try:
            keys = block_keys(bytes.fromhex(family["root"]), family["block_tokens"], request.args[0])
        except InputError:
            return []  # the replica says what is wrong with it
        return [key[:KEY_BYTES] for key in keys]

    # --- what happened --------------------------------------------------------------------------
    @_logged
    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica took the request, perhaps not the first that was asked."""
        if pending_request.metadata.call_method == "generate" and replica_id in self._number:
            self._routed += 1
            self._take(pending_request, self.curr_replicas[replica_id])

    @_logged
    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It ended, well or not; or the replica did not take it."""
        self._drop(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Who is there now, and what they report."""
        self._note_replicas(replicas)
        super().update_replicas(replicas)

    @_logged
    def _note_replicas(self, replicas: list[RunningReplica]) -> None:
        for gone in self._number.keys() - {replica.replica_id for replica in replicas}:
            self._forget(gone)
        for replica in replicas:
            if replica.replica_id not in self._number:
                self._number[replica.replica_id] = next(self._numbers)
                self._balance.add(self._number[replica.replica_id])
            number, report = self._number[replica.replica_id], replica.routing_stats
            if report.get("failed"):
                self._failed.add(number)
            elif report:
                self._index.reset(number, report["seq"], map(bytes.fromhex, report["keys"]))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget it now; the list without it comes later."""
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)

    @_logged
    def _forget(self, replica_id: ReplicaID) -> None:
        number = self._number.pop(replica_id, None)
        if number is not None:
            self._index.forget(number)
            self._balance.remove(number)
            self._failed.discard(number)
