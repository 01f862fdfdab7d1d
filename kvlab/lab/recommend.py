"""A deployment derived from a decision and five facts about who runs it: what to run, and why each part.

`kvlab.lab.decide` says whether a tier pays. This module says what follows from that: where blocks are kept, on how many
servers, which router, which precision, and what protects tenants. Each choice is a rule of docs/04, applied to the
reader's numbers; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isinf
from typing import Final

from kvlab.errors import InputError
from kvlab.lab.decide import SERVER_GIB, Decision
from kvlab.stores.base import check_number

MASTERS: Final = 3
"""A cluster needs so many masters, or nobody can vote."""
MOST: Final = 10**9
SPARE: Final = 1
"""Servers more than the load needs, so that one can be lost."""


@dataclass(frozen=True)
class Site:
    """Facts that no trace knows.

    Attributes:
        machines: on which engines run.
        tenants: who must not learn of each other's prompts.
        trusted: whether only your own workers can write to the store.
        outlive: whether the hit rate must outlive the loss of a server.
        host_gib: host memory of each machine that is free for KV.

    Raises:
        ConfigError: a number below 1, or negative memory.
    """

    machines: int = 1
    tenants: int = 1
    trusted: bool = True
    outlive: bool = False
    host_gib: float = 64.0

    def __post_init__(self) -> None:
        check_number("machines", self.machines, 0, MOST, whole=True)
        check_number("tenants", self.tenants, 0, MOST, whole=True)
        if self.host_gib != 0:
            check_number("host_gib", self.host_gib, 0, MOST, "GiB")


@dataclass(frozen=True)
class Choice:
    """One part of a deployment: what it is about, what to take, and why."""

    part: str
    take: str
    why: str


def recommend(decision: Decision, site: Site) -> list[Choice]:
    """Return what to run, the most important first.

    Raises:
        InputError: the decision has no rows.
    """
    if not decision.rows:
        raise InputError("expected a decision with capacities, got one without")
    return [*_first(decision), *_memory(decision, site), *_tier(decision, site), *_safety(decision, site)]


def _first(d: Decision) -> Iterator[Choice]:
    yield Choice("verdict", d.verdict, d.reasons[0])
    for question in d.measure[:1]:
        yield Choice("measure first", question.name, question.command)


def _memory(d: Decision, site: Site) -> Iterator[Choice]:
    """Device and host: what every engine has without a server."""
    engines = d.gpus / d.gpus_per_engine
    if engines > 1:
        known = d.inputs["own"].value
        yield Choice("router", "by cost, or by prefix", f"the engines' own caches then find up to {known:.2f}")
    blocks = site.host_gib * 2**30 * site.machines / (d.kv_bytes * d.block_tokens)
    if site.host_gib:
        yield Choice(
            "host memory",
            f"{site.host_gib:g} GiB on each machine",
            f"room for {blocks:,.0f} more blocks without a server and without a wire",
        )


def _tier(d: Decision, site: Site) -> Iterator[Choice]:
    if d.verdict == "no":
        yield Choice("shared store", "none", d.changes[0])
        return
    row = d.best
    if d.verdict == "yes":  # what pays for certain, and can carry its load
        row = max((r for r in d.rows if r.net_usd[0] > 0 and r.load <= 1), key=lambda r: r.net_usd[1])
    servers = max(row.servers, ceil(row.servers * row.load))
    yield Choice("shared store", *_store(servers, row.gib, site))
    if not d.above_break_even and d.precision not in ("int8", "int4"):
        yield Choice(
            "precision",
            "int8, after a look at its quality",
            f"the wire gives {d.inputs['wire'].value:.3g} GB/s and the break-even is {d.break_even_gbps:.3g}",
        )
    faster = "in the middle of the bands computing is always faster"
    if not isinf(d.crossover):
        faster = f"below {ceil(d.crossover):,} tokens computing is faster"
    yield Choice("planner", "on", f"{faster}, and load moves that")


def _store(servers: int, gib: float, site: Site) -> tuple[str, str]:
    """What to run, and why."""
    need = f"{gib:,g} GiB and the traffic need {servers}"
    if site.machines == 1 and servers == 1:
        return "one Redis on this machine, over a Unix socket", f"{need}; nobody else reads it"
    if servers == 1 and site.outlive:
        return "redis-sentinel://: one Redis, two copies, three sentinels", f"{need}; a copy takes over"
    if servers == 1:
        return "redis://: one server", f"{need}; if it is lost, requests are slower and not wrong"
    masters = max(MASTERS, servers + SPARE)
    copies = " and a replica of each" if site.outlive else ""
    return f"redis-cluster://: {masters} masters{copies}", f"{need} servers of {SERVER_GIB:g} GiB, and one may be lost"


def _safety(d: Decision, site: Site) -> Iterator[Choice]:
    if d.verdict == "no":
        return
    if site.tenants > 1:
        yield Choice("salt", "one for each tenant", "without it a tenant can find out by timing what another one asked")
    if not site.trusted or site.tenants > 1:
        yield Choice(
            "encryption_keys", "a master key in each worker", "else who can write to the store can change answers"
        )
    yield Choice("epoch", "a part of the salt from the first day", "the way back that needs no FLUSHALL")
