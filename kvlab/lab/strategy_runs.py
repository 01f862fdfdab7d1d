"""Runs of the strategies of `kvlab.lab.strategies`, and tables of what came of them.

python -m kvlab strategies --json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvlab.engine.workers import WorkerGroup
from kvlab.errors import InputError, KVLabError
from kvlab.lab.intervals import interval
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.prices import VM, Interval
from kvlab.lab.replay import SOURCES, Hits
from kvlab.lab.serving import Served, offer, percentile, tokens_per_second
from kvlab.lab.strategies import (
    CONVERSATIONS,
    MADE,
    PAIRS,
    STRATEGIES,
    WORKERS,
    Load,
    Pace,
    Strategy,
    computed,
    make_load,
    maxmemory,
    predict,
    rates,
    usd_per_mtok,
)
from kvlab.lab.timing import NOISY_BEYOND
from kvlab.lab.traces import Request
from kvlab.model import load_model
from kvlab.testbed.server import RedisServer

ABOUT: Final = (
    "five strategies on the same two workers with the same requests. Of the working set, which is all distinct full "
    "blocks of a workload, each worker's pages hold a tenth (at least the longest request), its host memory three "
    "tenths, Redis all; router and full have the cost router, the others send in turn. Percentiles: over all rounds; "
    "requests, bytes and time_saved_s are summed. Light load: open-loop at half of the expected capacity without a "
    "cache; ttft, latency (to the last token): milliseconds from the intended arrival; hit_rate: by the four names of "
    "a replay, and the share of blocks by tier; time_saved_s: sum over all requests of the TTFT without a cache minus "
    "this one; bytes: to and from Redis. Burst: all requests at once; tok_per_s: generated tokens of all workers a "
    "second, median of the rounds. interval: 95 %, bootstrap over conversations, within these runs; of tok_per_s "
    "smallest and largest round. usd_per_mtok: dollars for a million generated tokens, if the machine, 2 rented vCPUs, "
    "never rests, with the RAM of Redis. noisy: a fixed piece of work beside this cell took 10 % more or less than "
    "usual. order: how many times better the second strategy is, paired by request or by round. predicted: simulated "
    "before; within: tok_per_s and ttft_p50 within a fifth; slower: how many times as long the fixed work took as "
    "when the costs were measured (null: not known). computed: two nodes with one H100 each and Llama 3.1 8B, "
    "from data sheets; nothing of it is measured"
)
ENOUGH_FOR_P99: Final = 1000
WITHIN: Final = 0.2
SETTLE_S: Final = 1.0
"""After this, what was to be saved is saved."""


@dataclass
class Cell:
    """What came of one strategy and one workload, over all rounds so far.

    Attributes:
        served: requests of the light load, with the group of each: requests of one conversation, in one round.
        bursts: generated tokens a second, by round.
        other_answers: of conversations, answers that are not those with which the next prompts were made.
        moved: bytes read from Redis and written there, in the light loads.
        paces: seconds of a fixed piece of work, before and after each run.
        usd: dollars for a million generated tokens in the bursts: low, mid, high.
    """

    strategy: Strategy
    kind: str
    block_tokens: int
    served: list[Served] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    other_answers: int = 0
    moved: dict[str, int] = field(default_factory=lambda: {"read": 0, "written": 0})
    paces: list[float] = field(default_factory=list)
    usd: list[Interval] = field(default_factory=list)

    @property
    def ttft_ms(self) -> list[float]:
        """Milliseconds from the intended arrival to the first token."""
        return [one.ttft_ms for one in self.served]

    @property
    def latency_ms(self) -> list[float]:
        """Milliseconds from the intended arrival to the last token."""
        return [1000 * (one.token_at[-1] - one.arrived_at) for one in self.served]

    @property
    def hits(self) -> Hits:
        """What the requests of the light loads found, in blocks."""
        hits = Hits(self.block_tokens)
        for one in self.served:
            assert one.record is not None, "checked when it was served"
            found = [-(-one.record.sources[source] // self.block_tokens) for source in SOURCES]
            tokens = len(one.arrival.tokens)
            hits.add(Request(one.arrival.at_s, tokens, 1, range(-(-tokens // self.block_tokens))), found)
        return hits


def run(
    predicted: str | None = None, rounds: int = 3, kinds: Sequence[str] = tuple(MADE), **made: Any
) -> dict[str, Any]:
    """Measure all strategies on all workloads, and set what was predicted beside it. A round takes 45 minutes.

    Args:
        predicted: a file with the result of `predict`; without one it is predicted first.
        rounds, kinds, made: as of `predict`; a file has its own rounds and kinds.

    Raises:
        InputError: the file cannot be read, or its loads are others.
        KVLabError: workers or a `redis-server` do not start, or a request failed.
    """
    expected = _read(predicted) if predicted else predict(rounds, kinds, **made)
    model, pace, at_scale = load_model(), Pace(), computed()
    cells: dict[tuple[str, str], Cell] = {}
    kinds = [*dict.fromkeys(told["workload"] for told in expected["loads"])]
    for told in expected["loads"]:
        load = make_load(told["workload"], told["seed"], model, **made)
        if load.working_set != told["working_set"]:
            raise InputError(f"expected the loads that were predicted, got another one of {load.kind}, {load.seed}")
        for place in range(len(STRATEGIES)):
            strategy = STRATEGIES[(place + 2 * told["seed"] + kinds.index(load.kind)) % len(STRATEGIES)]
            cell = cells.setdefault((load.kind, strategy.name), Cell(strategy, load.kind, load.block_tokens))
            _measure(cell, load, told["speed"], pace)
    ordered = [cells[kind, s.name] for kind in dict.fromkeys(kind for kind, _ in cells) for s in STRATEGIES]
    usual = statistics.median(seconds for cell in ordered for seconds in cell.paces)
    rows = [_row(cell, cells[cell.kind, STRATEGIES[0].name], usual) for cell in ordered]
    return {
        "about": ABOUT,
        "rows": rows,
        "noisy": any(row["noisy"] for row in rows),
        "order": [row for kind in dict.fromkeys(c.kind for c in ordered) for row in _order(kind, cells)],
        "predicted": [
            _compared(row, cells[row["workload"], row["strategy"]], expected.get("pace_ms")) for row in expected["rows"]
        ],
        "computed": at_scale,
        "loads": expected["loads"],
        "pace_ms": 1000 * usual,
        "machine": describe_machine(),
        "predicted_on": expected["machine"],
        "versions": versions(),
    }


def _measure(cell: Cell, load: Load, speed: float, pace: Pace) -> None:
    """Serve the light load and the burst, each with new workers and an empty Redis."""
    for one_speed in (speed, float("inf")):
        with _serving(cell.strategy, load) as group:
            cell.paces.append(pace.seconds())
            served = offer(group, load.arrivals(one_speed))
            if any(one.record is None for one in served):
                raise KVLabError(f"a worker died while it served {load.kind} with {cell.strategy.name}")
            time.sleep(SETTLE_S)
            cell.paces.append(pace.seconds())
            if one_speed != speed:
                cell.bursts.append(tokens_per_second(served))
                cell.usd.append(usd_per_mtok(cell.bursts[-1], cell.strategy, load, VM))
                return
            cell.served += served
            cell.groups += [(load.seed, one.arrival.group) for one in served]
            if load.kind in CONVERSATIONS:
                pairs = zip(served, load.turns, strict=True)
                cell.other_answers += sum(one.tokens != turn.answer for one, turn in pairs)
            for stats in group.stats().values():
                cell.moved["read"] += stats["cache"]["bytes_read"]
                cell.moved["written"] += stats["cache"]["bytes_written"]


@contextmanager
def _serving(strategy: Strategy, load: Load) -> Iterator[WorkerGroup]:
    """New workers, with a new Redis if the strategy has one."""
    with ExitStack() as stack:
        url = None
        if strategy.redis:
            arguments = ("--maxmemory", str(maxmemory(load)), "--maxmemory-policy", "allkeys-lru")
            url = stack.enter_context(RedisServer(*arguments)).url
        settings = strategy.settings(load, url)
        yield stack.enter_context(WorkerGroup(WORKERS, settings, router=strategy.router, max_requests=1 << 20))


def _read(file: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
        names = {(told["workload"], strategy.name) for told in content["loads"] for strategy in STRATEGIES}
        if not names or {(row["workload"], row["strategy"]) for row in content["rows"]} != names:
            raise ValueError("its rows are not those of its loads")
        content["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"expected a file with predictions, got {file}: {error}") from error
    return content


# --- tables -------------------------------------------------------------------------------------
def _row(cell: Cell, bare: Cell, usual: float) -> dict[str, Any]:
    """One cell, as JSON has it; `bare` is the same workload without a cache."""
    ttft, latency = cell.ttft_ms, cell.latency_ms
    usd = [statistics.median(part) for part in zip(*cell.usd, strict=True)]
    row: dict[str, Any] = {
        "strategy": cell.strategy.name,
        "workload": cell.kind,
        "requests": len(ttft),
        "tok_per_s": statistics.median(cell.bursts),
        "tok_per_s_interval": [min(cell.bursts), max(cell.bursts)],
    }
    for name, values in (("ttft", ttft), ("latency", latency)):
        for percent in (50, 95, 99):
            enough = percent < 99 or len(values) >= ENOUGH_FOR_P99
            row[f"{name}_p{percent}_ms"] = percentile(values, percent) if enough else None
        for percent in (50, 95):
            low_high = interval(partial(np.percentile, q=percent), values, groups=cell.groups)
            row[f"{name}_p{percent}_ms_interval"] = [*low_high]
    return row | {
        "hit_rate": rates(cell.hits),
        "usd_per_mtok": usd[1],
        "usd_per_mtok_band": [usd[0], usd[2]],
        "time_saved_s": sum(a - b for a, b in zip(bare.ttft_ms, ttft, strict=True)) / 1000,
        "bytes": cell.moved,
        "ttft_ms_by_percent": [percentile(ttft, percent) for percent in range(5, 100, 5)],
        "other_answers": cell.other_answers,
        "noisy": any(abs(seconds / usual - 1) > NOISY_BEYOND for seconds in cell.paces),
    }


def _order(kind: str, cells: dict[tuple[str, str], Cell]) -> Iterator[dict[str, Any]]:
    """How the strategies of `PAIRS` compare."""
    for poor, rich in PAIRS:
        a, b = cells[kind, poor], cells[kind, rich]
        by_round = [y / x for x, y in zip(a.bursts, b.bursts, strict=True)]
        yield _comparison(kind, poor, rich, "tok_per_s", statistics.median(by_round), min(by_round), max(by_round))
        for percent in (50, 95):

            def ratio(x: Any, y: Any, percent: int = percent) -> float:
                return float(np.percentile(x, percent) / np.percentile(y, percent))

            low, high = interval(ratio, a.ttft_ms, b.ttft_ms, groups=a.groups)
            middle = ratio(a.ttft_ms, b.ttft_ms)
            yield _comparison(kind, poor, rich, f"ttft_p{percent}_ms", middle, low, high)


def _comparison(kind: str, poor: str, rich: str, metric: str, times: float, low: float, high: float) -> dict[str, Any]:
    said = "better" if low > 1 else "worse" if high < 1 else "no difference shown"
    return {
        "workload": kind,
        "from": poor,
        "to": rich,
        "metric": metric,
        "times_better": times,
        "low": low,
        "high": high,
        "ends": "rounds" if metric == "tok_per_s" else "95 %",
        "said": said,
    }


def _compared(row: dict[str, Any], cell: Cell, pace_ms: float | None = None) -> dict[str, Any]:
    """A prediction beside what was measured; `pace_ms`: of the fixed piece of work when the costs were measured."""
    measured = {
        "tok_per_s": statistics.median(cell.bursts),
        **{f"ttft_p{p}_ms": percentile(cell.ttft_ms, p) for p in (50, 95)},
        "hit_rate": cell.hits.rates()["tokens"],
    }
    told = {**row, "hit_rate": row["hit_rate"]["tokens"]}
    pairs = {name: {"predicted": told[name], "measured": value} for name, value in measured.items()}
    for name in ("tok_per_s", "ttft_p50_ms", "ttft_p95_ms"):
        pairs[name]["ratio"] = pairs[name]["predicted"] / pairs[name]["measured"]
    within = all(abs(pairs[name]["ratio"] - 1) <= WITHIN for name in ("tok_per_s", "ttft_p50_ms"))
    slower = None if pace_ms is None else 1000 * statistics.median(cell.paces) / pace_ms
    return {"strategy": row["strategy"], "workload": row["workload"], "within": within, "slower": slower, **pairs}
