"""Replay with time: queues, prefills, decode steps and transfers on simulated nodes.

What is modelled. A request comes at its time, whether or not others are done. A router sends it to a node. There it
waits until fewer than `Costs.batch` requests are admitted and there is `Costs.room` for it. Then it is looked up in the
store, and its KV is fetched from the node's host memory and from the store, each over a link that carries one transfer
after the other. Meanwhile those before it are computed. Then its prefill runs, in steps in which the requests that
generate go on too. Its blocks are in the store, and known to the router's index, when the prefill has ended.

What is not. No request is preempted. A node's device has the blocks of a request, those of its answer too, as soon as
it is there, since the requests of a node are computed in order; so where the next turn of a conversation comes before
the last one is answered, too much is found. Writes cost nothing.

With one node and no store, the hits are those of `replay`. The laws that a simulator must keep are in `laws`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

from kvlab.engine.router import Balance
from kvlab.errors import InputError
from kvlab.lab.costs import Costs, Link
from kvlab.lab.indexes import INDEXES, Index
from kvlab.lab.replay import SOURCES, Hits, Setup
from kvlab.lab.routers import Running, seen
from kvlab.lab.serving import percentile
from kvlab.lab.traces import Request

ABOUT: Final = (
    "hit_rate, hits_by_source, imbalance, span_s: as in a replay; ttft: seconds from the arrival of a request to its "
    "first token, at percentiles; end_to_end: to its last one; busy: the share of the time in which nodes compute or "
    "generate"
)
COMPUTED: Final = "computed"
ENDED: Final = "ended"


@dataclass(eq=False)
class Job:
    """A request on its node.

    Attributes:
        number, node: of the request, and where it is.
        found: leading blocks by source: device, host, store; the last one from its admission on.
        missing: blocks that it would compute without the store.
        compute, past: tokens to compute, and tokens whose KV is there or fetched, from its admission on.
        ready_at: when its KV has been fetched.
        added, removed: blocks that its node has when it is computed, and that it then lacks.
        remaining, context: tokens to generate after the first one, and tokens that the next one attends to.
        first_at, end_at: when its first token and its last one were there.
    """

    request: Request
    number: int
    node: int
    found: tuple[int, int, int]
    added: list[int]
    removed: list[int]
    compute: int = 0
    past: int = 0
    ready_at: float = 0.0
    missing: int = field(init=False)
    remaining: int = field(init=False)
    context: int = field(init=False)
    first_at: float = field(init=False)
    end_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.remaining, self.context = max(0, self.request.new - 1), self.request.tokens + 1
        self.missing = len(self.request.blocks) - sum(self.found)

    @property
    def ttft_s(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.first_at - self.request.at_s


class Pipe:
    """A link that carries one transfer after the other."""

    def __init__(self, link: Link) -> None:
        self.link, self.free_at = link, 0.0

    def done_at(self, now: float, size: int) -> float:
        """When a transfer of `size` bytes that is asked for now would have ended."""
        return max(now, self.free_at) + size / self.link.bytes_per_s + self.link.latency_s

    def carry(self, now: float, size: int) -> float:
        """Begin a transfer, and return when it has ended."""
        done = self.done_at(now, size)
        self.free_at = done - self.link.latency_s
        return done


Event = tuple[float, str, Job]
"""When, `COMPUTED` or `ENDED`, and which job."""


class Machine:
    """The queue and the batch of one node. What has begun runs to its end.

    Attributes:
        now: when its last action has ended.
        waiting, admitted: requests to be computed, in the order of their arrival.
        batch: requests that generate.
        ended: those that have ended in its last action.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.now = self.busy_s = 0.0
        self.waiting: deque[Job] = deque()
        self.admitted: deque[Job] = deque()
        self.batch: list[Job] = []
        self.ended: list[Job] = []
        self.host = Pipe(costs.host)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.admitted or self.batch)

    def submit(self, job: Job) -> None:
        """Add a job that comes now to the queue."""
        if self.is_idle:
            self.now = max(self.now, job.request.at_s)
        self.waiting.append(job)

    def has_room(self, job: Job, now: float, block_tokens: int) -> bool:
        """Whether one more request can be admitted. What its last action does may end later than now."""
        active = [*self.admitted, *self.batch, *(other for other in self.ended if other.end_at > now)]
        if len(active) >= self.costs.batch:
            return False
        if self.costs.room is None or not active:
            return True
        blocks = {key for one in (*active, job) for key in one.request.blocks}  # prompts share those they begin with
        generated = sum(one.context - 1 - one.request.tokens for one in active)
        return len(blocks) * block_tokens + generated <= self.costs.room

    def begins_at(self, now: float) -> float:
        """When a job that is admitted now would begin at the earliest, without the requests that generate."""
        return max(self.now, now) + sum(self.costs.prefill(job.compute, job.past) for job in self.admitted)

    def act(self, until: float) -> Iterator[Event]:
        """Do one thing, a prefill or decode steps until something else is to be done, and yield what happens then.

        Args:
            until: when the next request comes, anywhere.
        """
        head = self.admitted[0] if self.admitted else None
        self.ended = []
        if head is not None and head.ready_at <= self.now:
            yield from self._prefill(self.admitted.popleft())
        elif self.batch:
            yield from self._decode(until if head is None else min(until, head.ready_at))
        elif head is not None:
            self.now = head.ready_at

    def _prefill(self, job: Job) -> Iterator[Event]:
        chunks = self.costs.chunks(job.compute)
        beside = self.costs.beside(len(self.batch), sum(other.context for other in self.batch))
        seconds = self.costs.prefill(job.compute, job.past) + chunks * beside
        for other in self.batch:
            if other.remaining <= chunks:
                other.end_at = self.now + seconds * other.remaining / chunks
                self.ended.append(other)
                yield other.end_at, ENDED, other
            other.remaining -= chunks
            other.context += chunks
        self._pass(seconds)
        job.first_at = self.now
        yield self.now, COMPUTED, job
        self.batch = [other for other in self.batch if other.remaining > 0]
        if job.remaining:
            self.batch.append(job)
        else:
            job.end_at = self.now
            self.ended.append(job)
            yield self.now, ENDED, job

    def _decode(self, stop: float) -> Iterator[Event]:
        """Decode to the end of the step that passes `stop`, or until a job ends."""
        step = self.costs.step(len(self.batch), sum(job.context for job in self.batch))
        steps = min(job.remaining for job in self.batch)
        if step and (stop - self.now) / step < steps:
            steps = max(1, ceil((stop - self.now) / step))
        self._pass(steps * step)
        for job in self.batch:
            job.remaining -= steps
            job.context += steps
            if not job.remaining:
                job.end_at = self.now
                self.ended.append(job)
                yield self.now, ENDED, job
        self.batch = [job for job in self.batch if job.remaining]

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s += seconds


@dataclass(frozen=True)
class Simulated:
    """What came of a simulation.

    Attributes:
        jobs: in the order of their arrival.
        hits: what they found.
        busy_s: how long each node worked.
        seconds: from the first arrival to the end of the last request.
    """

    jobs: list[Job]
    hits: Hits
    busy_s: list[float]
    seconds: float

    @property
    def imbalance(self) -> float:
        """The blocks that the busiest node computed divided by the mean: 1 is best, the number of nodes the worst."""
        computed = [0] * len(self.busy_s)
        for job in self.jobs:
            computed[job.node] += len(job.request.blocks) - sum(job.found)
        return max(computed) * len(computed) / sum(computed) if any(computed) else 1.0

    @property
    def ttft_s(self) -> list[float]:
        """Time to first token of each request."""
        return [job.ttft_s for job in self.jobs]

    def as_json(self) -> dict[str, Any]:
        """Return the result with names that do not change."""
        ttft, end_to_end = self.ttft_s, [job.end_at - job.request.at_s for job in self.jobs]
        return {
            "about": ABOUT,
            "hit_rate": self.hits.rates(),
            "hits_by_source": {name: self.hits.by_source[name] for name in SOURCES},
            "imbalance": self.imbalance,
            "span_s": self.hits.end_s - self.hits.begin_s,
            "ttft_mean_s": sum(ttft) / len(ttft),
            **{f"ttft_p{p}_s": percentile(ttft, p) for p in (50, 95, 99)},
            "end_to_end_p95_s": percentile(end_to_end, 95),
            "busy": sum(self.busy_s) / len(self.busy_s) / self.seconds if self.seconds else 0.0,
            "requests_per_s": len(self.jobs) / self.seconds if self.seconds else None,
            "tokens_per_s": sum(job.request.new for job in self.jobs) / self.seconds if self.seconds else None,
        }


def simulate(
    requests: Iterable[Request],
    block_tokens: int,
    setup: Setup,
    costs: Costs,
    index: str | Index = "exact",
    plan: bool = True,
) -> Simulated:
    """Simulate requests in the order of their arrival.

    Args:
        setup: caches, nodes and router.
        index: what the router knows of the caches, one of `INDEXES` or an own one.
        plan: fetch from the store only where that is expected to be sooner than computing.

    Raises:
        InputError: there are no requests, they are not in order, or the setup is only for replays.
    """
    if setup.policy == "belady":
        raise InputError("expected a policy that can run, got belady: it knows the future")
    world = _World(block_tokens, setup, costs, INDEXES[index]() if isinstance(index, str) else index, plan)
    for number, request in enumerate(requests):
        world.arrive(number, request)
    world.run(float("inf"))
    if not world.jobs:
        raise InputError("expected at least one request to simulate, got none")
    assert all(running == Running() for running in world.running), "a node has work after the last request"
    hits = Hits(block_tokens)
    for job in world.jobs:
        hits.add(job.request, job.found)
    seconds = max(job.end_at for job in world.jobs) - world.jobs[0].request.at_s
    return Simulated(world.jobs, hits, [machine.busy_s for machine in world.machines], seconds)


class _World:
    """Nodes, store, router and index. All that happens is done in the order of time."""

    def __init__(self, block_tokens: int, setup: Setup, costs: Costs, index: Index, plan: bool) -> None:
        self.block_tokens, self.costs, self.index, self.plan = block_tokens, costs, index, plan
        self.machines = [Machine(costs) for _ in range(setup.nodes)]
        self.caches = [setup.node() for _ in range(setup.nodes)]
        self.store, self.pipe = setup.shared(), Pipe(costs.store)
        self.router, self.balance = setup.choose(), Balance(range(setup.nodes))
        self.room = float("inf") if setup.device is None else float(setup.device)
        self.running = [Running() for _ in range(setup.nodes)]
        self.jobs: list[Job] = []
        self._working: list[tuple[float, int]] = []  # a heap: when a node that is not idle does the next thing
        self._events: list[tuple[float, str, int]] = []  # a heap: when, what, and of which job

    def arrive(self, number: int, request: Request) -> None:
        """Route a request that comes now, and queue it on its node."""
        now, keys = request.at_s, request.blocks
        if self.jobs and now < self.jobs[-1].request.at_s:
            raise InputError(
                f"expected requests in the order of their arrival, got request {number} before the last one"
            )
        self.run(now)
        matched = self.index.matched(now, keys)
        workers = seen(self.balance, matched, self.running, self.room)
        node = self.router(len(keys), workers, number)
        work = request.tokens - matched[node] * self.block_tokens + request.new
        self.balance.give(node, number, max(0, ceil(work / self.block_tokens)))
        job, machine = self._job(number, request, node), self.machines[node]
        self.jobs.append(job)
        self.running[node].begin(job.missing)
        was_idle = machine.is_idle
        machine.submit(job)
        if was_idle:
            heapq.heappush(self._working, (machine.now, node))
        self._admit(now, node)

    def run(self, until: float) -> None:
        """Let the nodes work until the next request comes."""
        while self._working and self._working[0][0] < until:
            at, node = heapq.heappop(self._working)
            self._settle(at)
            self._admit(at, node)
            machine = self.machines[node]
            for when, what, job in machine.act(until):
                heapq.heappush(self._events, (when, what, job.number))
            if not machine.is_idle:
                heapq.heappush(self._working, (machine.now, node))
        self._settle(until)

    def _settle(self, until: float) -> None:
        """Take note of what has happened by then."""
        while self._events and self._events[0][0] <= until:
            at, what, number = heapq.heappop(self._events)
            job = self.jobs[number]
            running, blocks = self.running[job.node], len(job.request.blocks)
            if what == ENDED:
                running.end(blocks)
                self.balance.report(job.number, 0)
                continue
            running.generate(job.missing, blocks)
            self.index.changed(at, job.node, job.added, job.removed)
            if self.store is not None:
                self.store.serve(job.request)

    def _job(self, number: int, request: Request, node: int) -> Job:
        """Look up a request's blocks in the memory of its node, which has what is before it in the queue."""
        cache, gone = self.caches[node], list[int]()
        device, host = cache.serve(request, gone)
        used = request.used
        self.index.sent(request.at_s, node, used, cache, gone)
        added, removed = [key for key in used if key in cache], [key for key in gone if key not in cache]
        return Job(request, number, node, (device, host, 0), added, removed)

    def _admit(self, now: float, node: int) -> None:
        """Look up requests in the store, and begin to fetch what is not on the device, while there is room for them."""
        machine = self.machines[node]
        while machine.waiting and machine.has_room(machine.waiting[0], now, self.block_tokens):
            job = machine.waiting.popleft()
            request, (device, host, _) = job.request, job.found
            job.ready_at = now
            if host:
                job.ready_at = machine.host.carry(now, self._bytes(request.tokens, device, host))
            near = device + host
            store = 0 if self.store is None else self.store.leading(request.blocks[near:])
            if store and self._is_sooner(now, machine, request, near, store):
                job.ready_at = max(job.ready_at, self.pipe.carry(now, self._bytes(request.tokens, near, store)))
                job.found = device, host, store
            job.past = self._past(request.tokens, sum(job.found))
            job.compute = request.tokens - job.past
            machine.admitted.append(job)

    def _is_sooner(self, now: float, machine: Machine, request: Request, near: int, store: int) -> bool:
        """Whether a request is expected to begin its answer sooner if it fetches blocks of the store."""
        if not self.plan:
            return True
        tokens, begin = request.tokens, machine.begins_at(now)
        fetched = max(begin, self.pipe.done_at(now, self._bytes(tokens, near, store)))
        with_, without = self._past(tokens, near + store), self._past(tokens, near)
        cost = self.costs.prefill
        return fetched + cost(tokens - with_, with_) <= begin + cost(tokens - without, without)

    def _past(self, tokens: int, blocks: int) -> int:
        """Tokens whose KV is there. The last one of a prompt is always computed: its output is the first new token."""
        return min(blocks * self.block_tokens, tokens - 1)

    def _bytes(self, tokens: int, first: int, blocks: int) -> int:
        begin, end = first * self.block_tokens, min((first + blocks) * self.block_tokens, tokens)
        return (end - begin) * self.costs.kv_bytes
