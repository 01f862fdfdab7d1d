"""Replay of a trace without time: which blocks would have been found, where, under which policy.

A request finds the leading blocks that are there; behind the first missing block nothing can be used, because KV
depends on all tokens before it. Then all its blocks are used, and stored if they are new. Requests come one after
another: each finds what all requests before it have left. What waiting and transfers cost is in `simulate`.

A hit rate has one of four names, because published ones differ in their denominators:

    blocks       found blocks / all blocks, a shorter last one counts like the others
    tokens       tokens in found blocks / all prompt tokens
    full_blocks  found full blocks / all full blocks: engines share only full ones
    requests     the share of its blocks that a request finds, mean over the requests
"""

from __future__ import annotations

import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvlab.core.policies import POLICIES, Policy
from kvlab.engine.router import Balance
from kvlab.errors import InputError
from kvlab.lab.belady import Belady
from kvlab.lab.routers import ROUTERS, Holders, Router, Running, seen
from kvlab.lab.traces import Request

SOURCES: Final = ("device", "host", "store")
ENDLESS: Final = sys.maxsize
MOST_NODES: Final = 10_000
ABOUT: Final = (
    "a request finds the leading blocks that are there. hit_rate: found / all, by blocks, by tokens, by full blocks, "
    "and the mean of the shares of all requests; hits_by_source: blocks found by tier; imbalance: blocks that the "
    "busiest node computes, divided by the mean, 1 is even; span_s: from the first request to the last; "
    "accesses_per_s: blocks replayed a second, without reading the file"
)
POLICY_NAMES: Final = (*POLICIES, "belady")
MODES: Final = ("inclusive", "exclusive")


class Node:
    """The tiers of one machine, in blocks.

    Args:
        device, host: policies; without a host tier None.
        exclusive: host memory has only what has left the device.
        ttl_s: blocks that no request has used for so long are gone.
        use_below: whether a device hit is a use of an inclusive host's copy.
    """

    def __init__(
        self,
        device: Policy[int],
        host: Policy[int] | None = None,
        exclusive: bool = False,
        ttl_s: float | None = None,
        use_below: bool = True,
    ) -> None:
        self.device, self.host, self.exclusive, self.ttl_s, self.use_below = device, host, exclusive, ttl_s, use_below
        self._used_at: OrderedDict[int, float] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self.device or (self.host is not None and key in self.host)

    def serve(self, request: Request, gone: list[int] | None = None) -> tuple[int, int]:
        """Use the blocks of a request. Return how many of its leading blocks the device and the host had.

        Args:
            gone: a list for the blocks that have left a tier; some of them may be in the other one, or back.
        """
        if self.ttl_s is not None:
            self._expire(request.at_s, gone)
        if self.host is None and request.kept is None and self.ttl_s is None:
            return self._serve_one_tier(request.blocks, gone), 0
        found = self._find(request.blocks)
        for key in request.used:
            self._use(key, gone)
        if self.ttl_s is not None:
            for key in request.used:
                self._used_at[key] = request.at_s
                self._used_at.move_to_end(key)
        return found

    def leading(self, keys: Sequence[int]) -> int:
        """Return how many leading blocks are there, without using them."""
        return next((i for i, key in enumerate(keys) if key not in self), len(keys))

    def _serve_one_tier(self, keys: Sequence[int], gone: list[int] | None) -> int:
        """The same in one pass. It may look and use at once, because a hit evicts nothing."""
        access, found, keys_left = self.device.access, 0, iter(keys)
        for key in keys_left:
            if not access(key, 1, gone):
                break
            found += 1
        for key in keys_left:
            access(key, 1, gone)
        return found

    def _find(self, keys: Sequence[int]) -> tuple[int, int]:
        on_device = on_host = 0
        for key in keys:
            if key in self.device:
                on_device += 1
            elif self.host is not None and key in self.host:
                on_host += 1
            else:
                break
        return on_device, on_host

    def _use(self, key: int, gone: list[int] | None) -> None:
        if self.host is None:
            self.device.access(key, 1, gone)
        elif self.exclusive:
            self.host.remove(key)
            for evicted in self.device.admit(key):
                self.host.access(evicted, 1, gone)
        elif not self.device.access(key, 1, gone) or self.use_below:
            self.host.access(key, 1, gone)

    def _expire(self, now: float, gone: list[int] | None) -> None:
        assert self.ttl_s is not None
        while self._used_at and next(iter(self._used_at.values())) < now - self.ttl_s:
            key, _ = self._used_at.popitem(False)
            for tier in (self.device, self.host):
                if tier is not None:
                    tier.remove(key)
            if gone is not None:
                gone.append(key)


@dataclass
class Hits:
    """Counts of found and of all blocks and tokens.

    >>> hits = Hits(block_tokens=512)
    >>> hits.add(Request(0.0, 700, 1, [0, 1]), (1, 0, 0))
    >>> {name: round(rate, 2) for name, rate in hits.rates().items()}
    {'blocks': 0.5, 'tokens': 0.73, 'full_blocks': 1.0, 'requests': 0.5}
    """

    block_tokens: int
    requests: int = 0
    blocks: int = 0
    tokens: int = 0
    full_blocks: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    found_tokens: int = 0
    found_full_blocks: int = 0
    shares: float = 0.0
    begin_s: float = 0.0
    end_s: float = 0.0

    def add(self, request: Request, found: Sequence[int]) -> None:
        """Count a request that found so many blocks, by source."""
        total, size, full = sum(found), len(request.blocks), request.tokens // self.block_tokens
        if not self.requests:
            self.begin_s = request.at_s
        self.end_s = request.at_s
        self.requests += 1
        self.blocks += size
        self.tokens += request.tokens
        self.full_blocks += full
        self.found_tokens += min(total * self.block_tokens, request.tokens)
        self.found_full_blocks += min(total, full)
        self.shares += total / size
        for source, count in zip(SOURCES, found, strict=False):
            if count:
                self.by_source[source] += count

    def rates(self) -> dict[str, float]:
        """Return the hit rate under each of its names. Where there is nothing to find, it is 0."""
        found = {"blocks": self.by_source.total(), "tokens": self.found_tokens, "full_blocks": self.found_full_blocks}
        rates = {name: count / max(1, getattr(self, name)) for name, count in found.items()}
        return {**rates, "requests": self.shares / max(1, self.requests)}


@dataclass(frozen=True)
class Replayed:
    """What a replay gave.

    Attributes:
        hits: what was found.
        computed: blocks that each node did not find: its work.
        requests: of each node.
        seconds: of the replay; reading the trace is not in it.
    """

    hits: Hits
    computed: list[int]
    requests: list[int]
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Found blocks / all blocks."""
        return self.hits.rates()["blocks"]

    @property
    def imbalance(self) -> float:
        """The work of the busiest node divided by the mean: 1 is best, the number of nodes the worst."""
        return max(self.computed) * len(self.computed) / sum(self.computed) if any(self.computed) else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the result with names that do not change."""
        hits = self.hits
        return {
            "about": ABOUT,
            "hit_rate": hits.rates(),
            "hits_by_source": {source: hits.by_source[source] for source in SOURCES},
            "imbalance": self.imbalance,
            "accesses_per_s": hits.blocks / self.seconds if self.seconds else None,
            "span_s": hits.end_s - hits.begin_s,
            "requests": hits.requests,
            "blocks": hits.blocks,
            "tokens": hits.tokens,
            "full_blocks": hits.full_blocks,
            "block_tokens": hits.block_tokens,
        }


@dataclass(frozen=True)
class Setup:
    """What is replayed on.

    Attributes:
        policy: of all tiers, one of `POLICY_NAMES`.
        device, host: blocks of each node; None: endless, and for the host: no such tier.
        mode: "inclusive" or "exclusive".
        store: blocks of a store that all nodes share; None: no such tier.
        nodes, router: how many, and which of them gets a request: a router, or the name of one of `ROUTERS`.
        ttl_s: blocks that no request has used for so long are gone.

    Raises:
        InputError: a name is unknown, a number is too small, or two settings do not go together.
    """

    policy: str = "lru"
    device: int | None = None
    host: int | None = None
    mode: str = "inclusive"
    store: int | None = None
    nodes: int = 1
    router: str | Router = "round_robin"
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name, names in (("policy", POLICY_NAMES), ("mode", MODES), ("router", tuple(ROUTERS))):
            if getattr(self, name) not in names and not callable(getattr(self, name)):
                raise InputError(f"expected one of {', '.join(names)} as the {name}, got {getattr(self, name)!r}")
        if self.nodes > MOST_NODES:
            raise InputError(f"expected at most {MOST_NODES:,} nodes, got {self.nodes:,}")
        if self.nodes < 1 or any((size or 0) < 0 for size in (self.device, self.host, self.store)):
            raise InputError(f"expected at least one node and capacities of 0 or more, got {self}")
        if self.ttl_s is not None and not self.ttl_s >= 0:
            raise InputError(f"expected a TTL of 0 or more seconds, got {self.ttl_s}")
        if self.mode == "exclusive" and self.host is None:
            raise InputError("expected a host tier with exclusive tiers, got none")
        if self.policy == "belady" and (self.nodes > 1 or {self.host, self.store, self.ttl_s} != {None}):
            raise InputError("expected one node with one tier and no TTL for belady: it is a bound for one cache")
        if self.policy == "belady" and self.device is None:
            raise InputError("expected a capacity for belady: without one nothing is evicted")

    def choose(self) -> Router:
        """Return the router."""
        return ROUTERS[self.router] if isinstance(self.router, str) else self.router

    def node(self) -> Node:
        """Return an empty node."""
        host = None if self.host is None else POLICIES[self.policy](self.host)
        device = POLICIES[self.policy](ENDLESS if self.device is None else self.device)
        return Node(device, host, self.mode == "exclusive", self.ttl_s)

    def shared(self) -> Node | None:
        """Return the empty store that all nodes share."""
        return None if self.store is None else Node(POLICIES[self.policy](self.store), ttl_s=self.ttl_s)


def replay(requests: Iterable[Request], block_tokens: int, setup: Setup = Setup()) -> Replayed:
    """Replay requests in their order.

    Args:
        requests: a `Trace` or a list. With belady they are read twice.
        block_tokens: tokens in a block, for the hit rates by tokens and by full blocks.
    """
    hits = Hits(block_tokens)
    seconds = [0.0]
    if setup.nodes > 1 or setup.store is not None:
        return _replay_nodes(requests, setup, hits, seconds)
    if setup.policy == "belady":
        assert setup.device is not None
        cache: Belady | Node = Belady(setup.device, [request.blocks for request in requests])
    else:
        cache = setup.node()
    for request in _timed(requests, seconds):
        hits.add(request, cache.serve(request))
    return Replayed(hits, [hits.blocks - hits.by_source.total()], [hits.requests], seconds[0])


def _replay_nodes(requests: Iterable[Request], setup: Setup, hits: Hits, seconds: list[float]) -> Replayed:
    nodes = [setup.node() for _ in range(setup.nodes)]
    shared, router = setup.shared(), setup.choose()
    holders, balance = Holders(), Balance(range(setup.nodes))
    computed, count, idle = [0] * setup.nodes, [0] * setup.nodes, [Running()] * setup.nodes
    room = float("inf") if setup.device is None else float(setup.device)
    for number, request in enumerate(_timed(requests, seconds)):
        workers = seen(balance, holders.matched(request.blocks), idle, room)
        chosen = router(len(request.blocks), workers, number)
        gone: list[int] = []
        near = nodes[chosen].serve(request, gone)
        holders.note(chosen, nodes[chosen], request.used, gone)
        found = (*near, _beyond(shared, request, sum(near)))
        missing = len(request.blocks) - sum(found)
        computed[chosen] += missing
        count[chosen] += 1
        balance.give(chosen, number, missing)
        balance.report(number, 0)
        hits.add(request, found)
    return Replayed(hits, computed, count, seconds[0])


def _beyond(store: Node | None, request: Request, near: int) -> int:
    """Use a request's blocks in the store. Return how many it has behind the `near` ones that the node has."""
    if store is None:
        return 0
    there = store.leading(request.blocks[near:])
    store.serve(request)
    return there


def _timed(requests: Iterable[Request], seconds: list[float]) -> Iterator[Request]:
    """Pass requests on, and add up the time that they are used for: reading them is not counted."""
    for request in requests:
        begin = time.perf_counter()
        yield request
        seconds[0] += time.perf_counter() - begin


# --- all capacities at once ---------------------------------------------------------------------
def lru_needs(requests: Iterable[Request]) -> Iterator[list[int]]:
    """Return for each request the capacity in blocks that each of its leading blocks needs to be found by LRU.

    The stack distance of a block is how many other blocks were used since its last use, plus one: LRU has it if the
    capacity is at least that. In a request a block counts only if all blocks before it are there, so its distance is
    the largest one up to it. A list ends before the first block that no capacity has.
    Source: Mattson et al., 1970, "Evaluation techniques for storage hierarchies".
    """
    stack = _Stack()
    for request in requests:
        needs: list[int] = []
        for key in request.blocks:
            distance = stack.distance(key)
            if distance is None:
                break
            needs.append(max(distance, needs[-1] if needs else 0))
        for key in request.used:
            stack.use(key)
        yield needs


def lru_curve(requests: Iterable[Request]) -> list[int]:
    """Return the found blocks of an LRU cache for every capacity: entry c is that of a capacity of c blocks."""
    needed = Counter(need for needs in lru_needs(requests) for need in needs)
    curve, total = [], 0
    for capacity in range(max(needed, default=0) + 1):
        total += needed[capacity]
        curve.append(total)
    return curve


def curve_table(requests: Iterable[Request], points: int = 24) -> dict[str, Any]:
    """Return the curve as rows: the hit rate by blocks at capacities that grow by a constant factor."""
    blocks = 0

    def counted() -> Iterator[Request]:
        nonlocal blocks
        for request in requests:
            blocks += len(request.blocks)
            yield request

    curve = lru_curve(counted())
    last = len(curve) - 1
    capacities = sorted({round(last ** (i / (points - 1))) for i in range(points)})
    return {
        "about": "hit_rate: found / all blocks of an LRU cache of so many blocks; the last one equals an endless one",
        "blocks": blocks,
        "rows": [{"capacity": c, "hit_rate": curve[c] / blocks if blocks else 0.0} for c in capacities],
    }


class _Stack:
    """Keys by their last use, with a Fenwick tree that counts the later ones. It grows with the number of keys."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # in the order of their last use
        self._tree = [0] * 1025
        self._next = 1

    def distance(self, key: int) -> int | None:
        """How many keys were used at or after the last use of this one; None if it never was."""
        place = self._places.get(key)
        if place is None:
            return None
        before, tree, place = 0, self._tree, place - 1
        while place:
            before += tree[place]
            place &= place - 1
        return len(self._places) - before

    def use(self, key: int) -> None:
        """Make a key the one that was used last."""
        if self._next == len(self._tree):
            self._renumber()
        old = self._places.pop(key, None)
        if old is not None:
            self._add(old, -1)
        self._places[key] = self._next
        self._add(self._next, 1)
        self._next += 1

    def _add(self, place: int, count: int) -> None:
        tree, size = self._tree, len(self._tree)
        while place < size:
            tree[place] += count
            place += place & -place

    def _renumber(self) -> None:
        """Number the keys 1, 2, 3, … again, and double the room."""
        count = len(self._places)
        self._places = dict(zip(self._places, range(1, count + 1), strict=True))
        # An entry counts the keys of the places that its lowest set bit spans, here of 1 … count.
        self._tree = [max(0, min(i, count) - (i & (i - 1))) for i in range(2 * count + 1025)]
        self._next = count + 1
