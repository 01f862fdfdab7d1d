"""Blocks in Redis: one key a block, batched, with a TTL, and every fault a counted miss.

What this store decides is what a cache in front of a model needs, and a database client would not do:
each call has one deadline, nothing is retried (the fallback is to recompute, which must not wait), and
a server that does not answer is left alone for a while.

A call is split among the servers that have its keys (`topology`), each server does its whole share
(`node`), and the shares are joined here: this is where hits, misses and faults are counted.

fakeredis, a Redis inside this process, is the same store over another pool: `fakeredis://`.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from kvlab.errors import ConfigError
from kvlab.stores.base import (
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_clock,
    check_keys,
    check_number,
    check_ttl,
    check_values,
    pieces,
)
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.redis.address import topology_of
from kvlab.stores.redis.connection import Reply
from kvlab.stores.redis.discovery import SLOTS
from kvlab.stores.redis.health import Finding, finding, health_name, trials
from kvlab.stores.redis.node import Answer, Batch, Job, Node, says_no
from kvlab.stores.redis.reasons import NO_FAULT, Refused, in_words, is_ok, is_value, reason_of
from kvlab.stores.redis.topology import Shard, SubBatch
from kvlab.stores.url import shown

KEY_PREFIX: Final = b"kv:"
COMMANDS: Final = ("GET", "SET", "DEL", "EXISTS", "PEXPIRE", "TOUCH", "INFO")
"""All that the store ever asks of a server that is alone: the rights that its ACL user needs. PEXPIRE is for
a store with a TTL, TOUCH for one without; INFO may be refused."""
CLUSTER_COMMANDS: Final = ("CLUSTER|SLOTS", "ASKING", "READONLY")
"""What it asks of a cluster besides; READONLY only to read from replicas."""
MAX_REDIRECTS: Final = 3
MAX_DEADLINE_S: Final = 3600
MAX_CONNECTIONS: Final = 1 << 16

_HEALTH_DRAWS: Final = (1, 1 << 10, 1 << 14, 1 << 17)  # random names, until each master has one of them
_TOLD: Final = 3  # sick servers that a line of health names


class RedisStore(Store):
    """Values in a Redis that `url` names.

    Args:
        url: where it is.

            - redis://host:port/db: one server; rediss:// for TLS.
            - unix:///path/to.sock: the same on this machine.
            - redis-cluster://host:port,host:port: some nodes of a Redis Cluster; rediss-cluster://.
            - redis-sentinel://host:port,host:port/NAME: sentinels, and what they call the master;
              rediss-sentinel://. A number behind it, /NAME/1, is the database, else 0.
            - fakeredis://: one in this process; fakeredis://NAME is shared by all stores of the
              process that use that name.

            All but the last take user:password@ before the first host: for every server, but not for
            sentinels, whose login is ?sentinel_username=…&sentinel_password=…. A private CA is
            named by ?ssl_ca_certs=FILE.
        ttl_s: how long a value lives after it was last written or read; None keeps it until
            the server evicts it, and is the choice for a user who may only read.
        deadline_s: for a whole call: finding the servers, connecting, waiting, sending, receiving.
            Large calls get one second more for each 50 MB, because no slower wire is worth asking.
            Answers that came while this process itself stood still are taken, in 0.05 s at most.
        max_connections: the bound of each server's pool; further threads wait, in order, for at most
            half their deadline.
        read_replicas: read from replicas, of a cluster or of Sentinel's master, while they work. What
            a replica lacks is a miss; a wrong value it cannot have, because a key names what is in
            the value. A read then takes a second round trip: only masters expire and evict, so they
            are told what was used.
        clock: what the breakers go by; tests bring their own.

    Nothing is connected until the first call: an unreachable server shows in `health()` and
    in the counters, not as an error. After three faults in a row a server is left alone for
    a second (`Breaker`); after three refused writes, writes are. Each server has breakers of
    its own, and the servers of a batch are asked at the same time: one that hangs costs a
    deadline, and no keys but its own.

    Raises:
        ConfigError: a URL of another form, or a setting of another type or outside its bounds.
    """

    def __init__(
        self,
        url: str = "fakeredis://",
        ttl_s: float | None = None,
        deadline_s: float = 0.25,
        max_connections: int = 16,
        read_replicas: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_ttl(ttl_s)
        check_number("deadline_s", deadline_s, 0, MAX_DEADLINE_S, "seconds")
        check_number("max_connections", max_connections, 0, MAX_CONNECTIONS, whole=True)
        check_clock(clock)
        if not isinstance(read_replicas, bool):
            raise ConfigError(f"expected read_replicas as True or False, got {type(read_replicas).__name__}")
        self._topology = topology_of(url, max_connections, read_replicas, clock)
        self.url = url
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        # Tells a server that a key was used, for its TTL or for its eviction; the reply is 1 if it is there.
        self._touch = (b"TOUCH",) if self._ttl_ms is None else (b"PEXPIRE", b"%d" % self._ttl_ms)
        self._deadline_s = deadline_s
        self._read_replicas = read_replicas
        # A server that is alone cannot send its keys elsewhere: MOVED is a fault of its URL.
        self._no_fault = NO_FAULT if self._topology.multi_node else NO_FAULT - {Reason.MOVED}
        self._stats = StoreStats()
        self._closed = False
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"RedisStore({shown(self.url)!r})"

    @property
    def nodes(self) -> list[Node]:
        """The servers that are known now, masters first; before the first call, none of a cluster's."""
        shards = self._topology.shards()
        return [shard.master for shard in shards] + [replica for shard in shards for replica in shard.replicas]

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. Hits live as long again, in the same round trip.

        One round trip to each server for each 16 MiB: of buffers, or of values as large as those seen lately.
        """
        check_buffers(keys, out)
        deadline = Deadline(self._deadline_s)
        refreshed = None if self._read_replicas else self._ttl_ms
        batch = Batch("get", [KEY_PREFIX + key for key in keys], out=out, ttl_ms=refreshed)
        replies = self._answer(batch, deadline, reading=True)
        if self._read_replicas:
            self._refresh_on_masters(batch.names, replies, deadline)
        got: list[bytes | memoryview | None] = []
        why: list[str] = []
        for reply in replies:
            there = is_value(reply)
            got.append(reply if there else None)  # type: ignore[arg-type]
            why.append("" if there else Reason.ABSENT if reply is None else reason_of(reply))
        hits = why.count("")
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += hits
            self._stats.bytes_out += sum([len(value) for value in got if value is not None])
            if hits < len(keys):
                self._stats.misses.update(filter(None, why))
        if reasons is not None:
            reasons += why
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`. A value too large for its server is dropped before a byte of it is sent."""
        check_values(keys, values)
        sizes = [_nbytes(value) for value in values]
        batch = Batch("put", [KEY_PREFIX + key for key in keys], values=values, sizes=sizes, ttl_ms=self._ttl_ms)
        replies = self._answer(batch, Deadline(self._deadline_s))
        why = ["" if is_ok(reply) else reason_of(reply) for reply in replies]
        stored = why.count("")
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += sum([size for size, reason in zip(sizes, why, strict=True) if not reason])
            if stored < len(keys):
                self._stats.drops.update(filter(None, why))
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`. Keys of a server that does not answer are not there."""
        replies = self._ask(_names(keys), b"EXISTS", reading=True)
        return next((i for i, there in enumerate(replies) if there != 1), len(keys))

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Store.touch_many`. False for keys of a server that does not answer."""
        names = _names(keys)
        replies = self._ask(names, *self._touch)
        if self._ttl_ms is None and any(isinstance(reply, Exception) and says_no(reply) for reply in replies):
            replies = self._ask(names, b"EXISTS")  # a user who may only read: what is used goes unnoticed
        return [reply == 1 for reply in replies]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. Those of a server that does not answer are not counted."""
        return sum(reply == 1 for reply in self._ask(_names(keys), b"DEL"))

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            stats = copy.deepcopy(self._stats)
        stats.faults += Counter(self._topology.faults)  # a copy: a thread that asks for the map may add to it now
        return stats

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True
        self._topology.close()

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()  # guards the counters

    # --- split, do, join ------------------------------------------------------------------------
    def _answer(self, batch: Batch, deadline: Deadline, reading: bool = False) -> list[Reply]:
        """One reply for each name. Every server does its share; where keys have moved, their new servers are asked."""
        if self._closed:
            return [Refused(Reason.CLOSED)] * len(batch.names)
        if not batch.names:
            return []
        parts, unserved = self._topology.split(batch.names, deadline, reading)
        if unserved is not None:
            self._count_faults({unserved})
        replies: list[Reply] = [Refused(unserved) if unserved else None] * len(batch.names)
        for follow in range(MAX_REDIRECTS, -1, -1):
            moved: list[SubBatch] = []
            for part, answer in zip(parts, _answers(batch, parts, deadline), strict=True):
                for i, reply in zip(part.indices, answer.replies, strict=True):
                    replies[i] = reply
                for faults in answer.faults:
                    self._count_faults(faults)
                moved += self._topology.redirect(part, answer.replies)
            if not moved:
                break
            with self._lock:
                self._stats.redirects += sum([len(part.indices) for part in moved]) if follow else 0
                self._stats.faults.update([] if follow else [Reason.MOVED])
            parts = moved
        return replies

    def _ask(self, names: Sequence[bytes], verb: bytes, *arguments: bytes, reading: bool = False) -> list[Reply]:
        """The replies to one small command a name. Counts as no request."""
        batch = Batch("ask", names, [(verb, name, *arguments) for name in names])
        return self._answer(batch, Deadline(self._deadline_s), reading)

    def _refresh_on_masters(self, names: Sequence[bytes], replies: list[Reply], deadline: Deadline) -> None:
        """Tell masters what replicas have given: it was used."""
        verb, *arguments = self._touch
        hits = [i for i, reply in enumerate(replies) if is_value(reply)]
        batch = Batch("ask", [names[i] for i in hits], [(verb, names[i], *arguments) for i in hits])
        for i, reply in zip(hits, self._answer(batch, deadline), strict=True):
            if self._ttl_ms and isinstance(reply, Exception) and says_no(reply):  # as in `Node.get`
                replies[i] = Refused(reason_of(reply))

    def _count_faults(self, reasons: set[Reason]) -> None:
        """Count a round trip that failed, and take it as a hint that keys may have moved."""
        self._topology.hint(reasons)
        if counted := reasons - self._no_fault:
            with self._lock:
                self._stats.faults[min(counted)] += 1

    # --- health ---------------------------------------------------------------------------------
    def health(self) -> Health:
        """See `Store.health`. Tries every command that the store uses, on keys of its own that expire at once.

        A worker that may only read is not healthy by this measure; its line says "reads work".
        """
        where = shown(self.url)
        if self._closed:
            return Health(False, f"{where}: closed")
        deadline = Deadline(self._deadline_s)
        try:
            shards = self._topology.ask(deadline)
        except Exception as error:
            return Health(False, f"{where}: {in_words(error, self._topology.secrets)}{self._known_before()}")
        if self._topology.unserved():
            return Health(False, f"{where}: no server has {self._topology.unserved()} of {SLOTS} slots")
        found = self._examined(shards, deadline)
        sick = [finding.wrong for finding in found if finding.wrong]
        if sick:
            which = f"{len(sick)} of {len(shards)} masters fail: " if len(shards) > 1 else ""
            return Health(False, f"{where}: {which}{'; '.join(sick[:_TOLD])}{'; …' * (len(sick) > _TOLD)}")
        if len(shards) > 1:
            return Health(True, f"{where}: {len(shards)} masters answer")
        name = f"{shards[0].master.name} " if self._topology.multi_node else ""
        return Health(True, f"{where}: {name}answers{found[0].note if found else ''}")

    def _known_before(self) -> str:
        """How the masters are that are known, when no server tells which there are now."""
        shards = self._topology.shards()
        if not shards:
            return ""
        sick = [finding for finding in self._examined(shards, Deadline(self._deadline_s)) if finding.wrong]
        names = ", ".join(shard.master.name for shard in shards[:_TOLD]) + ", …" * (len(shards) > _TOLD)
        return f"; known from before{f', {len(sick)} of them sick' if sick else ' and well'}: {names}"

    def _examined(self, shards: Sequence[Shard], deadline: Deadline) -> list[Finding]:
        """What each master is like, all asked at the same time."""
        masters = {shard.master for shard in shards}
        name_of: dict[Node, bytes] = {}
        for draws in _HEALTH_DRAWS:  # a master may have a single slot
            names = [health_name() for _ in range(draws)]
            name_of |= {part.node: names[part.indices[0]] for part in self._topology.split(names, deadline)[0]}
            if name_of.keys() >= masters:
                break
        alone, more = not self._topology.multi_node, self._topology.health_commands
        jobs = []
        for node in [shard.master for shard in shards if shard.master in name_of]:
            tried = trials(node, name_of[node], self._touch, more)
            batch = Batch("ask", (), tried, always=True)
            jobs.append((node, tried, Job(node, batch, range(len(tried)), deadline.copy())))
            node.start(jobs[-1][2])
        findings = []
        for node, tried, job in jobs:
            found = finding(node, tried, job.result().replies, alone, deadline)
            which = "" if alone or not found.wrong else f"{node.name}: "
            findings.append(Finding(f"{which}{found.wrong}", found.note))
        return findings


def _answers(batch: Batch, parts: Sequence[SubBatch], deadline: Deadline) -> list[Answer]:
    """The shares of all servers at the same time: the first in this thread, each other in one of its server's."""
    if deadline.passed:  # others took all of the time: not these servers' fault
        return [Answer([Refused(Reason.TIMEOUT)] * len(part.indices)) for part in parts]
    if len(parts) == 1:  # no other server to wait for
        return [getattr(parts[0].node, batch.call)(batch, parts[0].indices, deadline, parts[0].asking)]
    ends = [deadline.copy() for _ in parts]
    jobs = [Job(part.node, batch, part.indices, end, part.asking) for part, end in zip(parts, ends, strict=True)][1:]
    answers: list[Answer] = []
    try:
        for part, job in zip(parts[1:], jobs, strict=True):
            part.node.start(job)
        if parts:
            answers.append(getattr(parts[0].node, batch.call)(batch, parts[0].indices, ends[0], parts[0].asking))
        answers += [job.result() for job in jobs]
    finally:
        if len(answers) < len(parts):  # a signal's handler raised: nothing may write into the caller's buffers now
            for job in jobs:
                job.deadline.abandon()
            for job in jobs:
                job.abandon()
        deadline.cover(ends)
    return answers


def _names(keys: Sequence[bytes]) -> list[bytes]:
    check_keys(keys)
    return [KEY_PREFIX + key for key in keys]


def _nbytes(value: Value) -> int:
    return sum([part.nbytes if type(part) is memoryview else len(part) for part in pieces(value)])
