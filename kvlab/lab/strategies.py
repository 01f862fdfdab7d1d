"""Strategies on the same workers, with the same requests: what each more tier gives, and where it gives nothing.

    no cache      each prompt is computed
    local pages   each worker finds prefixes in the pages of its own pool
    router        the same, and the cost router sends a request where its prefix is; else requests go in turn
    redis         local pages, and a Redis server that the workers share
    full          redis, with host memory before it, and the cost router

`router` has what is free, so it shows what of the gain of `full` is not that of a shared tier.

Two loads of the same requests. In the first they come open-loop at half of what the workers are expected to serve
without a cache: it gives latencies, counted from the intended arrival. In the second all come at once, so that no
worker rests: it gives the throughput. Every run begins with new processes and an empty Redis.

The simulator predicts both loads from costs that are measured before (`calibrate`). Predictions can be kept in a file,
so that they exist before there is anything to compare them with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any, Final

from kvlab.core.keys import Namespace
from kvlab.engine import generate
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.worker import WorkerSettings
from kvlab.errors import InputError
from kvlab.lab import cost
from kvlab.lab.calibrate import Calibrated, calibrate
from kvlab.lab.conversations import Turn
from kvlab.lab.costs import COSTS, Costs
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.prices import GPU, HOURS, RAM, Interval, Price, interval
from kvlab.lab.replay import SOURCES, Hits, Setup
from kvlab.lab.serving import Arrival, percentile
from kvlab.lab.simulate import Simulated, simulate
from kvlab.lab.traces import Request
from kvlab.lab.workloads import CONTEXT, WORKLOADS, as_trace
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of
from kvlab.testbed.server import RedisServer

WORKERS: Final = 2
BATCH: Final = 4
LIGHT: Final = 0.5
PACE_TOKENS: Final = 256
POOL, HOST, STORE = 0.1, 0.3, 1.0
"""Capacities by the working set, which is all distinct full blocks of a workload: of each worker, and of Redis."""
MADE: Final[dict[str, dict[str, Any]]] = {
    "agentic": {"sessions": 16},
    "chat": {"sessions": 64, "scale": 0.5},
    "structured": {"requests": 120, "scale": 0.5},
    "unique": {"requests": 120},
}
AT_SCALE: Final[dict[str, dict[str, Any]]] = {
    "agentic": {"sessions": 16, "scale": 1.0},
    "chat": {"sessions": 128, "scale": 1.0},
    "structured": {"requests": 240, "scale": 1.0},
    "unique": {"requests": 240, "scale": 1.0},
}
"""The same with the lengths of their sources, for a model of a usual size."""
SCALE_CONTEXT: Final = 131_072
SCALE_BLOCK: Final = 16
SCALE_ROOM: Final = 56 * 10**9 // 131_072
"""Tokens whose KV fits beside 16 GB of weights and 8 GB of other things (assumed) on 80 GB."""
REDIS_RECORD: Final = 7 / 6
"""Memory that Redis takes by the bytes of a block of 384 KiB: with its header it needs jemalloc's next size, 448."""
REDIS_BASE: Final = 8 << 20
CONVERSATIONS: Final = ("agentic", "chat")
"""Workloads whose prompts contain earlier answers."""


@dataclass(frozen=True)
class Strategy:
    """What a worker has, and how requests are routed."""

    name: str
    pages: bool = True
    redis: bool = False
    host: bool = False
    router: str = "round_robin"

    def settings(self, load: Load, url: str | None = None) -> WorkerSettings:
        """Return the settings of its workers; `url` is that of Redis, if it has one."""
        return WorkerSettings(
            store=url if self.redis else None,
            pages=load.pool_blocks * load.block_tokens // PAGE_TOKENS,
            host_bytes=load.host_blocks * load.block_bytes if self.host else 0,
            prefix_caching=self.pages,
            max_batch=BATCH,
        )

    def setup(self, load: Load, nodes: int = WORKERS) -> Setup:
        """Return the same for the simulator."""
        return Setup(
            device=load.pool_blocks if self.pages else 0,
            host=load.host_blocks if self.host else None,
            store=load.store_blocks if self.redis else None,
            nodes=nodes,
            router=self.router,
        )


STRATEGIES: Final = (
    Strategy("no cache", pages=False),
    Strategy("local pages"),
    Strategy("router", router="cost"),
    Strategy("redis", redis=True),
    Strategy("full", redis=True, host=True, router="cost"),
)
PAIRS: Final = (
    ("no cache", "local pages"),
    ("local pages", "router"),
    ("local pages", "redis"),
    ("redis", "full"),
    ("router", "full"),
    ("no cache", "full"),
)
"""Strategies that are compared: the poorer one, and the one with more."""


# --- loads --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Load:
    """The requests of a workload, and how much memory goes with them.

    Attributes:
        kind, seed: of the workload.
        turns: the requests, in the order of their times.
        block_tokens, token_bytes: of a block, and of the KV of a token.
        pool: blocks that the pool of a worker has room for; None: the share `POOL`.
        trace: the blocks of the requests.
        working_set: distinct full blocks of all prompts and answers.
    """

    kind: str
    seed: int
    turns: list[Turn]
    block_tokens: int
    token_bytes: int
    pool: int | None = None
    trace: list[Request] = field(init=False, repr=False)
    working_set: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.turns:
            raise InputError(f"expected a workload with requests, got none of {self.kind}")
        object.__setattr__(self, "trace", as_trace(self.turns, self.block_tokens))
        blocks = {block for request in self.trace for block in request.used}
        object.__setattr__(self, "working_set", len(blocks))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's KV."""
        return self.block_tokens * self.token_bytes

    @property
    def pool_blocks(self) -> int:
        """Blocks that the pool of a worker has room for: its share, and at least the longest request there may be."""
        if self.pool is not None:
            return self.pool
        longest = max(len(turn.tokens) + len(turn.answer) for turn in self.turns)
        return max(int(POOL * self.working_set), -(-max(CONTEXT, longest) // self.block_tokens) + 1)

    @property
    def host_blocks(self) -> int:
        """Blocks that the host memory of a worker has room for."""
        return int(HOST * self.working_set)

    @property
    def store_blocks(self) -> int:
        """Blocks that Redis has room for."""
        return int(STORE * self.working_set)

    @property
    def span_s(self) -> float:
        """Seconds between the first request and the last one, as they were made."""
        return self.turns[-1].at_s - self.turns[0].at_s

    def arrivals(self, speed: float) -> list[Arrival]:
        """Return what to send: so many times as fast as it was made; with `inf` all at once."""
        return [
            Arrival((turn.at_s - self.turns[0].at_s) / speed, turn.tokens, len(turn.answer), turn.session)
            for turn in self.turns
        ]

    def requests(self, speed: float) -> list[Request]:
        """Return the same for the simulator."""
        times = [arrival.at_s for arrival in self.arrivals(speed)]
        return [replace(request, at_s=at_s) for request, at_s in zip(self.trace, times, strict=True)]


def make_load(kind: str, seed: int, model: Llama, **settings: Any) -> Load:
    """Make the requests of a workload, with the answers that the model will give.

    Raises:
        InputError: the workload is unknown.
    """
    if kind not in MADE:
        raise InputError(f"expected one of the workloads {', '.join(MADE)}, got {kind!r}")
    settings = {**MADE[kind], **settings}
    if kind in CONVERSATIONS:
        settings["reply"] = _reply(model)
    spec = spec_of(model)
    turns = WORKLOADS[kind](seed=seed, **settings)
    return Load(kind, seed, turns, spec.block_tokens(), spec.kv_bytes_per_token())


def _reply(model: Llama) -> Callable[[list[int], int], list[int]]:
    """Greedy answers. Conversations go on, so what they begin with stays in a pool."""
    spec = spec_of(model)
    names = Namespace(spec.fingerprint, "fp32", b"", spec.block_tokens())
    pool = PagePool(model, 4096, names)
    return lambda prompt, length: generate(model, prompt, length, pool=pool, stop_at_eos=False).tokens


class Pace:
    """A fixed piece of work, which shows how fast the machine is now."""

    def __init__(self) -> None:
        self._model = load_model()
        self._prompt = held_out_tokens(Tokenizer())[:PACE_TOKENS]
        self.seconds()

    def seconds(self, repeats: int = 5) -> float:
        """Return the median of some repeats."""
        return statistics.median(generate(self._model, self._prompt, 1).ttft_s for _ in range(repeats))


# --- predictions --------------------------------------------------------------------------------
def predict(rounds: int = 3, kinds: Sequence[str] = tuple(MADE), **made: Any) -> dict[str, Any]:
    """Measure what work costs, and simulate all that `run` measures. Takes minutes; nothing of a load is served.

    Args:
        rounds: seeds of each workload.
        made: further settings of the workloads.

    Raises:
        KVLabError: workers or a `redis-server` do not start.
    """
    model = load_model()
    loads = [make_load(kind, seed, model, **made) for kind in kinds for seed in range(rounds)]
    pace = Pace()
    paces = [pace.seconds()]
    with RedisServer() as server:
        shared = calibrate(STRATEGIES[-1].settings(loads[0], server.url), WORKERS)
    own = calibrate(STRATEGIES[0].settings(loads[0]), WORKERS)
    paces += [pace.seconds()]
    costs = {strategy.name: shared if strategy.redis else own for strategy in STRATEGIES}
    speeds = [light_speed(load, own) for load in loads]
    rows = []
    for kind in kinds:
        for strategy in STRATEGIES:
            chosen = [(load, speed) for load, speed in zip(loads, speeds, strict=True) if load.kind == kind]
            rows.append(predicted_row(strategy, chosen, costs[strategy.name]))
    return {
        "about": "what the simulator expects of each strategy, before it is measured; costs in seconds; pace_ms: a "
        "fixed piece of work before and after the costs were measured",
        "loads": [
            {"workload": load.kind, "seed": load.seed, "speed": speed, "requests": len(load.turns)}
            | {"per_second": len(load.turns) * speed / load.span_s, "working_set": load.working_set}
            for load, speed in zip(loads, speeds, strict=True)
        ],
        "rows": rows,
        "costs": {"without a store": _as_json(own), "with a store": _as_json(shared)},
        "pace_ms": 1000 * statistics.mean(paces),
        "machine": describe_machine(),
        "versions": versions(),
    }


def light_speed(load: Load, costs: Calibrated, share: float = LIGHT) -> float:
    """Return the speed at which a load is so much of what the workers are expected to serve without a cache.

    Its rate is that of the middle 80 % of its requests: conversations that go on long after the others count little.
    """
    burst = simulated(load, STRATEGIES[0], costs.streaming, float("inf"))
    middle = [request.at_s for request in load.trace][len(load.trace) // 10 : -(len(load.trace) // 10) or None]
    span_s = (middle[-1] - middle[0]) * len(load.trace) / max(1, len(middle) - 1)
    return share * span_s / burst.seconds


def simulated(load: Load, strategy: Strategy, costs: Costs, speed: float, nodes: int = WORKERS) -> Simulated:
    """Simulate a load under a strategy."""
    costs = replace(costs, room=load.pool_blocks * load.block_tokens)
    return simulate(load.requests(speed), load.block_tokens, strategy.setup(load, nodes), costs)


def predicted_row(strategy: Strategy, loads: Sequence[tuple[Load, float]], costs: Calibrated) -> dict[str, Any]:
    """Return what a strategy is expected to give, over all rounds of a workload with their speeds."""
    lights = [simulated(load, strategy, costs.idle, speed) for load, speed in loads]
    bursts = [simulated(load, strategy, costs.streaming, float("inf")) for load, _ in loads]
    ttft = [1000 * job.ttft_s for light in lights for job in light.jobs]
    latency = [1000 * (job.end_at - job.request.at_s) for light in lights for job in light.jobs]
    hits = Hits(loads[0][0].block_tokens)
    for light in lights:
        for job in light.jobs:
            hits.add(job.request, job.found)
    return {
        "strategy": strategy.name,
        "workload": loads[0][0].kind,
        "tok_per_s": statistics.median(_tokens_per_s(burst) for burst in bursts),
        **{f"ttft_p{p}_ms": percentile(ttft, p) for p in (50, 95)},
        **{f"latency_p{p}_ms": percentile(latency, p) for p in (50, 95)},
        "hit_rate": rates(hits),
    }


def computed(name: str = "llama8b_h100", seed: int = 0, kinds: Sequence[str] = tuple(AT_SCALE)) -> list[dict[str, Any]]:
    """Return rows like those of a prediction for a model and a device that are not here. Nothing of them is measured.

    Args:
        name: of `kvlab.lab.costs.COSTS`. Each worker is one of these nodes.
    """
    costs, rows = COSTS[name], list[dict[str, Any]]()
    both = Calibrated(costs, costs)
    for kind in kinds:
        turns = WORKLOADS[kind](seed=seed, context=SCALE_CONTEXT, **AT_SCALE[kind])
        load = Load(kind, seed, turns, SCALE_BLOCK, costs.kv_bytes, pool=SCALE_ROOM // SCALE_BLOCK)
        speed = light_speed(load, both)
        for strategy in STRATEGIES:
            row = predicted_row(strategy, [(load, speed)], both)
            usd = usd_per_mtok(row["tok_per_s"], strategy, load, GPU.times(WORKERS))
            rows.append({**row, "usd_per_mtok": usd[1], "usd_per_mtok_band": [usd[0], usd[2]]})
    return rows


def usd_per_mtok(tok_per_s: float, strategy: Strategy, load: Load, machine: Price) -> Interval:
    """Return dollars for a million generated tokens, if the workers never rest: their machine, and the RAM of Redis.

    Args:
        machine: price of an hour of what all workers run on.
    """
    gib = maxmemory(load) / 2**30 if strategy.redis else 0.0
    return interval(lambda hour, month: cost.usd_per_mtok(tok_per_s, hour + gib * month / HOURS), machine, RAM)


def maxmemory(load: Load) -> int:
    """Return the bytes that a Redis may use that is to have room for a load's `store_blocks`."""
    return int(load.store_blocks * load.block_bytes * REDIS_RECORD) + REDIS_BASE


def _tokens_per_s(burst: Simulated) -> float:
    return sum(job.request.new for job in burst.jobs) / burst.seconds


def rates(hits: Hits) -> dict[str, float]:
    """Return the hit rates by their four names, and the share of all blocks by tier."""
    blocks = max(1, hits.blocks)
    return {**hits.rates(), **{source: hits.by_source[source] / blocks for source in SOURCES}}


def _as_json(calibrated: Calibrated) -> dict[str, Any]:
    """Return costs as JSON has them: a bandwidth without a limit is None."""
    told = {name: asdict(costs) for name, costs in vars(calibrated).items()}
    for costs in told.values():
        for link in (costs["host"], costs["store"]):
            link["bytes_per_s"] = None if link["bytes_per_s"] == inf else link["bytes_per_s"]
    return told
