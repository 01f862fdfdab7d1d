"""What notebook 07 measures with: a store that is watched while a server is lost, and servers that are far away."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.stores import Store
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer

BEFORE_S, PAUSE_S, GIVE_UP_S = 0.5, 0.04, 20.0


@dataclass(frozen=True)
class Round:
    """One read of all keys: when it began, how long it took, by key why it was missed ("": found), wrong values."""

    at_s: float
    took_s: float
    reasons: Mapping[bytes, str]
    wrong: int


def watch(
    store: Store, values: Mapping[bytes, bytes], lost: Collection[bytes], hurt: Callable[[], object]
) -> dict[str, Any]:
    """Read all keys again and again, hurt a server after half a second, and go on until all keys are found again.

    Args:
        values: what the store holds, by key.
        lost: the keys of the server that `hurt` hurts.

    Returns:
        `quarters`: for the lost keys, by quarters of a second (0 is the moment of `hurt`), how often each reason.
        `before`, `after`: the share of the lost keys that was found before, and from 0.25 s to 1 s after that moment.
        `first`: why the first key was missed after that moment, "" if none was.
        `others`: the share of the other keys that was found in rounds which asked the lost server in vain.
        `back_s`: after how many seconds all keys were found again. `longest_s`: the longest round. `wrong`: the
        number of wrong values.
    """
    rounds, began = list[Round](), time.perf_counter() + BEFORE_S
    while time.perf_counter() < began:
        rounds.append(_read(store, values, began))
    hurt()
    missed = back = False
    while not (missed and back) and time.perf_counter() < began + GIVE_UP_S:
        rounds.append(_read(store, values, began))
        back = not any(rounds[-1].reasons.values())
        missed = missed or not back
    failed = [r for r in rounds if {"conn", "timeout"} & set(r.reasons.values())]
    return {
        "quarters": _by_quarter(rounds, lost),
        "before": _found(r.reasons[key] for r in rounds if r.at_s < 0 for key in lost),
        "after": _found(r.reasons[key] for r in rounds if 0.25 <= r.at_s < 1 for key in lost),
        "first": next((reason for r in rounds if r.at_s >= 0 for reason in r.reasons.values() if reason), ""),
        "others": _found(reason for r in failed for key, reason in r.reasons.items() if key not in lost),
        "back_s": rounds[-1].at_s,
        "longest_s": max(r.took_s for r in rounds),
        "wrong": sum(r.wrong for r in rounds),
    }


def _read(store: Store, values: Mapping[bytes, bytes], began: float) -> Round:
    reasons: list[str] = []
    start = time.perf_counter()
    got = store.get_many(list(values), reasons=reasons)
    took_s = time.perf_counter() - start
    time.sleep(PAUSE_S)
    wrong = sum(value not in (None, right) for value, right in zip(got, values.values(), strict=True))
    by_key = {key: str(reason) for key, reason in zip(values, reasons, strict=True)}
    return Round(start - began, took_s, by_key, wrong)


def _by_quarter(rounds: Collection[Round], lost: Collection[bytes]) -> dict[str, dict[str, int]]:
    quarters: dict[str, Counter[str]] = defaultdict(Counter)
    for r in rounds:
        quarters[f"{4 * r.at_s // 1 / 4:.2f}"].update(r.reasons[key] for key in lost)
    return {quarter: dict(counts) for quarter, counts in quarters.items()}


def _found(reasons: Iterator[str]) -> float:
    """The share of reasons that say "found"; not a number if there are none."""
    counts = Counter(reasons)
    return counts[""] / counts.total() if counts else float("nan")


@dataclass(frozen=True)
class FarAway:
    """Clients of some servers, by name, and the proxies between them."""

    clients: Mapping[str, redis.Redis]
    proxies: Collection[FaultProxy]

    def round_trips(self) -> int:
        """How many round trips all clients have waited for."""
        return sum(proxy.exchanges() for proxy in self.proxies)


@contextlib.contextmanager
def far_away(servers: Mapping[str, RedisServer], seconds: float) -> Iterator[FarAway]:
    """Clients of servers, each behind a proxy that delays the answers by so many seconds."""
    with contextlib.ExitStack() as stack:
        clients, proxies = dict[str, redis.Redis](), list[FaultProxy]()
        for name, server in servers.items():
            proxy = stack.enter_context(FaultProxy(server.port))
            clients[name] = redis.Redis(port=proxy.port, retry=Retry(NoBackoff(), 0))
            clients[name].ping()  # connects
            proxy.latency_s = seconds
            proxies.append(proxy)
        yield FarAway(clients, proxies)
