"""Blocks in Redis: one key per block, in batches, with a TTL. Each fault is a counted miss or dropped write.

The store serves a cache in front of a model, so it differs from a database client: each call has one deadline,
nothing is retried (the fallback is to recompute, which must not wait), and a failing server gets no calls for a
while.

`topology` divides a call among the servers that have its keys. `node` executes the sub-batch of each server. This
module joins the answers and counts hits, misses, dropped writes and faults. `fakeredis://`, a Redis inside this
process, differs only in its pool.
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
    check_own_ttl,
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
from kvlab.stores.redis.health import Finding, commands_to_try, evaluate, health_name
from kvlab.stores.redis.node import Answer, Batch, Job, Node, is_refusal
from kvlab.stores.redis.reasons import NO_FAULT, Refused, in_words, is_ok, is_value, reason_of
from kvlab.stores.redis.topology import Shard, SubBatch
from kvlab.stores.url import shown

KEY_PREFIX: Final = b"kv:"
COMMANDS: Final = ("GET", "SET", "DEL", "EXISTS", "PEXPIRE", "TOUCH", "INFO")
"""All commands that the store sends to a single server, and so the permissions that its ACL user needs. PEXPIRE is
for a store with a TTL, TOUCH for a store without one. INFO may be refused."""
CLUSTER_COMMANDS: Final = ("CLUSTER|SLOTS", "ASKING", "READONLY")
"""Additional commands for a cluster. READONLY is sent only to read from replicas."""
MAX_REDIRECTS: Final = 3
MAX_DEADLINE_S: Final = 3600
MAX_CONNECTIONS: Final = 1 << 16

_NAME_COUNTS: Final = (1, 1 << 10, 1 << 14, 1 << 17)  # random keys to draw, until each master has one
_MAX_NAMED: Final = 3  # failing servers that a line of health names


class RedisStore(Store):
    """Values in the Redis that `url` names.

    Args:
        url: the address.

            - redis://host:port/db: one server; rediss:// for TLS.
            - unix:///path/to.sock: one server on this machine.
            - redis-cluster://host:port,host:port: some nodes of a Redis Cluster; rediss-cluster://.
            - redis-sentinel://host:port,host:port/NAME: sentinels, and the name of the master in Sentinel;
              rediss-sentinel://. /NAME/1 selects database 1; the default is 0.
            - fakeredis://: a server in this process. Stores with the same fakeredis://NAME share it.

            All but the last accept user:password@ before the first host. This login is for every server except
            sentinels, whose login is ?sentinel_username=…&sentinel_password=…. ?ssl_ca_certs=FILE is a private CA.
        ttl_s: how long a value lives after its last write or read. None keeps it until the server evicts it, and is
            required for a user who may only read.
        deadline_s: the limit for a whole call: finding the servers, connecting, waiting, sending, receiving. Every
            50 MB of values add one second; over a slower network, loading does not pay. Replies that arrived
            while this process was paused are still read, for at most 0.05 s.
        max_connections: the limit per server. Further threads wait in order, for at most half of their remaining time.
        read_replicas: read from replicas, of a cluster or of Sentinel's master, while they work. A value that a
            replica lacks is a miss. A replica cannot have a wrong value, because a key identifies the content of its
            value. A read then takes a second round trip: only masters expire and evict, so they must learn which
            keys were used.
        clock: the clock of the breakers; tests pass their own.

    No connection is opened before the first call: an unreachable server shows in `health()` and in the counters,
    not as an error. After three consecutive faults, a server gets no calls for a second (`Breaker`); after three
    refused writes, it gets no writes. Each server has its own breakers, and the servers of a batch work at the same
    time: a hung server costs one deadline, and only its own keys are missed.

    Raises:
        ConfigError: the URL is invalid, or a setting has another type or is out of range.
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
        self.ttl_s = ttl_s
        self._ttl_ms = None if ttl_s is None else _ms(ttl_s)
        # Records the use of a key, for its TTL or for eviction. GT: others may have given it a longer life.
        self._touch = (b"TOUCH",) if self._ttl_ms is None else (b"PEXPIRE", b"%d" % self._ttl_ms, b"GT")
        self.deadline_s = deadline_s
        self._read_replicas = read_replicas
        # A single server must have all keys: MOVED is a fault, because the URL names a cluster node.
        self._no_fault = NO_FAULT if self._topology.multi_node else NO_FAULT - {Reason.MOVED}
        self._stats = StoreStats()
        self._closed = False
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"RedisStore({shown(self.url)!r})"

    @property
    def nodes(self) -> list[Node]:
        """All known servers, masters first. Before the first call, no server of a cluster is known."""
        shards = self._topology.shards()
        return [shard.master for shard in shards] + [replica for shard in shards for replica in shard.replicas]

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. Restarts the TTL of each hit, in the same round trip unless replicas are read.

        Each server gets one round trip per 16 MiB of buffers. Without buffers, the size of recent values is assumed.
        """
        check_buffers(keys, out)
        deadline = Deadline(self.deadline_s)
        refreshed = None if self._read_replicas else self._ttl_ms
        batch = Batch("get", [KEY_PREFIX + key for key in keys], out=out, ttl_ms=refreshed)
        replies = self._answer(batch, deadline, reading=True)
        if self._read_replicas:
            self._refresh_on_masters(batch.names, replies, deadline)
        got: list[bytes | memoryview | None] = []
        key_reasons: list[str] = []
        for reply in replies:
            there = is_value(reply)
            got.append(reply if there else None)  # type: ignore[arg-type]
            key_reasons.append("" if there else Reason.ABSENT if reply is None else reason_of(reply))
        hits = key_reasons.count("")
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += hits
            self._stats.bytes_out += sum([len(value) for value in got if value is not None])
            if hits < len(keys):
                self._stats.misses.update(filter(None, key_reasons))
        if reasons is not None:
            reasons += key_reasons
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """See `Store.put_many`. A value above the limit of its server is dropped and not sent."""
        check_values(keys, values)
        check_own_ttl(ttl_s, self.ttl_s)
        ttl_ms = self._ttl_ms if ttl_s is None else _ms(ttl_s)
        sizes = [_nbytes(value) for value in values]
        batch = Batch("put", [KEY_PREFIX + key for key in keys], values=values, sizes=sizes, ttl_ms=ttl_ms)
        replies = self._answer(batch, Deadline(self.deadline_s))
        key_reasons = ["" if is_ok(reply) else reason_of(reply) for reply in replies]
        stored = key_reasons.count("")
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += sum([size for size, reason in zip(sizes, key_reasons, strict=True) if not reason])
            if stored < len(keys):
                self._stats.drops.update(filter(None, key_reasons))
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`. Keys of a server that does not answer count as absent."""
        replies = self._send_each(keys, b"EXISTS", reading=True)
        return next((i for i, there in enumerate(replies) if there != 1), len(keys))

    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """See `Store.touch_many`. False for keys of a server that does not answer."""
        check_ttl(ttl_s)
        if self._ttl_ms is not None:
            return self._extend(keys, self._touch if ttl_s is None else (b"PEXPIRE", b"%d" % _ms(ttl_s), b"GT"))
        replies = self._send_each(keys, *self._touch)
        if any(isinstance(reply, Exception) and is_refusal(reply) for reply in replies):
            replies = self._send_each(keys, b"EXISTS")  # the user may only read: the use is not recorded
        return [reply == 1 for reply in replies]

    def _extend(self, keys: Sequence[bytes], touch: Sequence[bytes]) -> list[bool]:
        """Extend lives that end too soon; return which keys are present. PEXPIRE GT says 0 for a longer life, too."""
        check_keys(keys)
        names = [KEY_PREFIX + key for key in keys]
        commands = [(touch[0], name, *touch[1:]) for name in names] + [(b"EXISTS", name) for name in names]
        replies = self._answer(Batch("send", names * 2, commands), Deadline(self.deadline_s))
        pairs = zip(replies, replies[len(names) :], strict=False)
        return [not isinstance(extended, Exception) and there == 1 for extended, there in pairs]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. Keys of a server that does not answer are not counted."""
        return sum(reply == 1 for reply in self._send_each(keys, b"DEL"))

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            stats = copy.deepcopy(self._stats)
        stats.faults += Counter(self._topology.faults)  # a copy, because the thread that requests the map may add to it
        return stats

    def breakers(self) -> dict[tuple[str, str], str]:
        """See `Store.breakers`. Of all known servers, by host:port or path, without a login."""
        nodes = [(node.name.rpartition("://")[2].rpartition("@")[2], node) for node in self.nodes]
        calls = {(name, "calls"): node.breaker.state for name, node in nodes}
        return calls | {(name, "writes"): node.write_breaker.state for name, node in nodes}

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True
        self._topology.close()

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()  # guards the counters

    # --- split, execute, join -------------------------------------------------------------------
    def _answer(self, batch: Batch, deadline: Deadline, reading: bool = False) -> list[Reply]:
        """Return one reply per name. Each server executes its sub-batch; redirected keys go to their new servers."""
        if self._closed:
            return [Refused(Reason.CLOSED)] * len(batch.names)
        if not batch.names:
            return []
        sub_batches, unserved = self._topology.split(batch.names, deadline, reading)
        if unserved is not None:
            self._count_faults({unserved})
        replies: list[Reply] = [Refused(unserved) if unserved else None] * len(batch.names)
        for follow in range(MAX_REDIRECTS, -1, -1):
            moved: list[SubBatch] = []
            for sub, answer in zip(sub_batches, _answers(batch, sub_batches, deadline), strict=True):
                for i, reply in zip(sub.indices, answer.replies, strict=True):
                    replies[i] = reply
                for faults in answer.faults:
                    self._count_faults(faults)
                moved += self._topology.redirect(sub, answer.replies)
            if not moved:
                break
            with self._lock:
                self._stats.redirects += sum([len(sub.indices) for sub in moved]) if follow else 0
                self._stats.faults.update([] if follow else [Reason.MOVED])
            sub_batches = moved
        return replies

    def _send_each(self, keys: Sequence[bytes], verb: bytes, *arguments: bytes, reading: bool = False) -> list[Reply]:
        """Send one small command per key and return the replies. These are not requests."""
        check_keys(keys)
        names = [KEY_PREFIX + key for key in keys]
        batch = Batch("send", names, [(verb, name, *arguments) for name in names])
        return self._answer(batch, Deadline(self.deadline_s), reading)

    def _refresh_on_masters(self, names: Sequence[bytes], replies: list[Reply], deadline: Deadline) -> None:
        """Record on the masters which values were read from replicas."""
        verb, *arguments = self._touch
        hits = [i for i, reply in enumerate(replies) if is_value(reply)]
        batch = Batch("send", [names[i] for i in hits], [(verb, names[i], *arguments) for i in hits])
        for i, reply in zip(hits, self._answer(batch, deadline), strict=True):
            if self._ttl_ms and isinstance(reply, Exception) and is_refusal(reply):  # as in `Node.get`
                replies[i] = Refused(reason_of(reply))

    def _count_faults(self, reasons: set[Reason]) -> None:
        """Count a failed round trip, and pass its reasons to the topology as a hint."""
        self._topology.hint(reasons)
        if counted := reasons - self._no_fault:
            with self._lock:
                self._stats.faults[min(counted)] += 1

    # --- health ---------------------------------------------------------------------------------
    def health(self) -> Health:
        """See `Store.health`. Tries every command that the store uses, on keys of its own, which it then deletes.

        If DEL is refused, a key expires after `ttl_s`, or after one second without a TTL. If its user may only read,
        a store is not healthy by this measure; `detail` then contains "reads work".
        """
        where = shown(self.url)
        if self._closed:
            return Health(False, f"{where}: closed")
        deadline = Deadline(self.deadline_s)
        try:
            shards = self._topology.refresh(deadline)
        except Exception as error:
            return Health(False, f"{where}: {in_words(error, self._topology.secrets)}{self._last_known()}")
        if self._topology.unserved():
            return Health(False, f"{where}: {self._topology.unserved()} of {SLOTS} slots have no server")
        findings = self._check_masters(shards, deadline)
        failing = [finding.wrong for finding in findings if finding.wrong]
        if failing:
            which = f"{len(failing)} of {len(shards)} masters fail: " if len(shards) > 1 else ""
            more = "; …" * (len(failing) > _MAX_NAMED)
            return Health(False, f"{where}: {which}{'; '.join(failing[:_MAX_NAMED])}{more}")
        if len(shards) > 1:
            return Health(True, f"{where}: {len(shards)} masters answer")
        name = f"{shards[0].master.name} " if self._topology.multi_node else ""
        return Health(True, f"{where}: {name}answers{findings[0].note if findings else ''}")

    def _last_known(self) -> str:
        """Describe the last known masters, for when no server returns a map."""
        shards = self._topology.shards()
        if not shards:
            return ""
        failing = sum(bool(finding.wrong) for finding in self._check_masters(shards, Deadline(self.deadline_s)))
        state = f"{failing} of {len(shards)} failing" if failing else "all healthy"
        names = ", ".join(shard.master.name for shard in shards[:_MAX_NAMED]) + ", …" * (len(shards) > _MAX_NAMED)
        return f"; last known masters: {state} ({names})"

    def _check_masters(self, shards: Sequence[Shard], deadline: Deadline) -> list[Finding]:
        """Check all masters at the same time; return one finding per master."""
        masters = {shard.master for shard in shards}
        name_of: dict[Node, bytes] = {}
        for count in _NAME_COUNTS:  # a master may have only one slot
            names = [health_name() for _ in range(count)]
            name_of |= {sub.node: names[sub.indices[0]] for sub in self._topology.split(names, deadline)[0]}
            if name_of.keys() >= masters:
                break
        alone, more = not self._topology.multi_node, self._topology.health_commands
        jobs = []
        for node in [shard.master for shard in shards if shard.master in name_of]:
            tried = commands_to_try(node, name_of[node], self._touch, more)
            batch = Batch("send", (), tried, always=True)
            jobs.append((node, tried, Job(node, batch, range(len(tried)), deadline.copy())))
            node.start(jobs[-1][2])
        findings = []
        for node, tried, job in jobs:
            finding = evaluate(node, tried, job.result().replies, alone, deadline)
            which = "" if alone or not finding.wrong else f"{node.name}: "
            findings.append(Finding(f"{which}{finding.wrong}", finding.note))
        return findings


def _answers(batch: Batch, sub_batches: Sequence[SubBatch], deadline: Deadline) -> list[Answer]:
    """Execute all sub-batches at the same time: the first in this thread, each other in a thread of its node."""
    if deadline.passed:  # earlier work used all of the time: these servers are not at fault
        return [Answer([Refused(Reason.TIMEOUT)] * len(sub.indices)) for sub in sub_batches]
    if len(sub_batches) == 1:  # there is no other server to wait for
        (sub,) = sub_batches
        return [getattr(sub.node, batch.call)(batch, sub.indices, deadline, sub.asking)]
    ends = [deadline.copy() for _ in sub_batches]
    jobs = [Job(sub.node, batch, sub.indices, end, sub.asking) for sub, end in zip(sub_batches, ends, strict=True)][1:]
    answers: list[Answer] = []
    try:
        for sub, job in zip(sub_batches[1:], jobs, strict=True):
            sub.node.start(job)
        if sub_batches:
            sub = sub_batches[0]
            answers.append(getattr(sub.node, batch.call)(batch, sub.indices, ends[0], sub.asking))
        answers += [job.result() for job in jobs]
    finally:
        if len(answers) < len(sub_batches):  # a signal handler raised: nothing may write into the buffers now
            for job in jobs:
                job.deadline.abandon()
            for job in jobs:
                job.abandon()
        deadline.extend_to(ends)
    return answers


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _nbytes(value: Value) -> int:
    return sum([piece.nbytes if type(piece) is memoryview else len(piece) for piece in pieces(value)])
