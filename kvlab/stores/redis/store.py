"""Blocks in Redis: one key a block, batched, with a TTL, and every fault a counted miss.

What this module decides is what a cache in front of a model needs, and a database client would
not do: each call has one deadline, nothing is retried (the fallback is to recompute, which must
not wait), and a server that does not answer is left alone for a while. How the bytes move is in
`wire`, what is known of each server in `node`, which server has a key in `topology`.

fakeredis, a Redis inside this process, is the same store over another link: `fakeredis://`.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import redis

from kvlab.errors import ConfigError
from kvlab.stores.base import (
    ABSENT,
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_pairs,
    check_ttl,
    pieces,
    renew_in_children,
)
from kvlab.stores.redis.address import topology_of, without_password
from kvlab.stores.redis.connection import Command, Deadline, Link, Reply
from kvlab.stores.redis.node import NO_FAULT, OF_ONE_KEY, Node, Refused, reason_of, verdict_of
from kvlab.stores.redis.topology import SLOTS, Part, Shard

KEY_PREFIX: Final = b"kv:"
COMMANDS: Final = ("GET", "SET", "DEL", "EXISTS", "PEXPIRE", "INFO")
"""All that the store ever asks of a server that is alone: the rights that its ACL user needs."""
CLUSTER_COMMANDS: Final = ("CLUSTER|SLOTS", "ASKING", "READONLY")
"""What it asks of a cluster besides; READONLY only to read from replicas."""
WINDOW_BYTES: Final = 16 << 20  # more replies at once fall out of the server's cache: measured, docs/02
WINDOW_KEYS: Final = 1024
MAX_REDIRECTS: Final = 3
MAX_DEADLINE_S: Final = 3600

_HEALTH_DRAWS: Final = (1, 1 << 10, 1 << 14, 1 << 17)  # random names, until each master has one of them
_TOLD: Final = 3  # sick servers that a line of health names
_WRITE_FAULTS: Final = {"oom", "readonly", "misconf", "auth"}

Work = Callable[[Node, Sequence[int], Deadline, bool], list[Reply]]
"""What one node does for its share of a batch: one reply for each index. The last argument is `asking`."""


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
            the value. With a TTL a read takes a second round trip: only masters renew.
        clock: what the breakers go by; tests bring their own.

    Nothing is connected until the first call: an unreachable server shows in `health()` and
    in the counters, not as an error. After three faults in a row a server is left alone for
    a second (`Breaker`); after three refused writes, writes are. Each server has breakers of
    its own, and the servers of a batch are asked at the same time: one that hangs costs a
    deadline, and no keys but its own.

    Raises:
        ConfigError: an unknown scheme, or a TTL, deadline or bound that is not positive.
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
        if not 0 < deadline_s <= MAX_DEADLINE_S:
            raise ConfigError(f"expected a positive deadline of at most {MAX_DEADLINE_S} seconds, got {deadline_s}")
        if not max_connections >= 1:
            raise ConfigError(f"expected at least one connection, got {max_connections}")
        self.url = url
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._deadline_s = deadline_s
        self._read_replicas = read_replicas
        self._topology = topology_of(url, max_connections, read_replicas, clock)
        self._no_fault = NO_FAULT if self._topology.many else NO_FAULT - {"moved"}  # who is alone cannot follow
        self._stats = StoreStats()
        self._lock = threading.Lock()  # guards the counters
        self._value_bytes = 1 << 20  # what values were like lately: how many fit a window
        self._closed = False
        renew_in_children(self)

    @property
    def nodes(self) -> list[Node]:
        """The servers that are known now, masters first; before the first call, none of a cluster's."""
        shards = self._topology.shards()
        return [shard.master for shard in shards] + [replica for shard in shards for replica in shard.replicas]

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, why: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. Hits renew their TTL, in the same round trip.

        One round trip to each server for each 16 MiB: of buffers, or of values as large as those seen lately.
        """
        check_buffers(keys, out)
        names = [KEY_PREFIX + key for key in keys]
        deadline = Deadline(self._deadline_s)

        def read(node: Node, indices: Sequence[int], deadline: Deadline, asking: bool) -> list[Reply]:
            buffers = None if out is None else [out[i] for i in indices]
            return self._read(node, [names[i] for i in indices], buffers, deadline, asking)

        replies = self._spread(names, read, deadline, reading=True)
        if self._read_replicas and self._ttl_ms is not None:
            self._renew(names, replies, deadline)
        got: list[bytes | memoryview | None] = []
        reasons: list[str] = []
        for reply in replies:
            there = type(reply) is memoryview or type(reply) is bytes
            reasons.append("" if there else ABSENT if reply is None else reason_of(reply))
            got.append(reply if there else None)  # type: ignore[arg-type]
        hits = reasons.count("")
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += hits
            self._stats.bytes_out += sum([len(value) for value in got if value is not None])
            if hits < len(keys):
                self._stats.misses.update(filter(None, reasons))
        if why is not None:
            why += reasons
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`. A value too large for its server is dropped before a byte of it is sent."""
        check_pairs(keys, values, "value")
        names = [KEY_PREFIX + key for key in keys]
        sizes = [_nbytes(value) for value in values]

        def write(node: Node, indices: Sequence[int], deadline: Deadline, asking: bool) -> list[Reply]:
            its = [(names[i], values[i]) for i in indices]
            return self._write(node, its, [sizes[i] for i in indices], deadline, asking)

        replies = self._spread(names, write, Deadline(self._deadline_s))
        reasons = ["" if _is_ok(reply) else reason_of(reply) for reply in replies]
        stored = reasons.count("")
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += sum([size for size, reason in zip(sizes, reasons, strict=True) if not reason])
            if stored < len(keys):
                self._stats.drops.update(filter(None, reasons))
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`. Keys of a server that does not answer are not there."""
        answers = self._each(keys, lambda name: (b"EXISTS", name), reading=True)
        return next((i for i, there in enumerate(answers) if there != 1), len(keys))

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Store.touch_many`. False for keys of a server that does not answer."""
        return [answer == 1 for answer in self._each(keys, self._touch)]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. Those of a server that does not answer are not counted."""
        return sum(answer == 1 for answer in self._each(keys, lambda name: (b"DEL", name)))

    def health(self) -> Health:
        """See `Store.health`. Tries every command that the store uses, on keys of its own that expire at once.

        A worker that may only read is not healthy by this measure; its line says "reads work".
        """
        where = without_password(self.url)
        if self._closed:
            return Health(False, f"{where}: closed")
        deadline = Deadline(self._deadline_s)
        try:
            shards = self._topology.ask(deadline)
        except Exception as error:
            return Health(False, f"{where}: {_in_words(error)}{self._known_before()}")
        if self._topology.unserved():
            return Health(False, f"{where}: nobody serves {self._topology.unserved()} of {SLOTS} slots")
        sick = [line for line in self._examined(shards, deadline) if line]
        if sick:
            which = f"{len(sick)} of {len(shards)} masters fail: " if len(shards) > 1 else ""
            return Health(False, f"{where}: {which}{'; '.join(sick[:_TOLD])}{'; …' * (len(sick) > _TOLD)}")
        if len(shards) > 1:
            return Health(True, f"{where}: {len(shards)} masters answer")
        return Health(True, f"{where}: {shards[0].master.name + ' ' if self._topology.many else ''}answers")

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

    def renew_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()
        self._topology.renew()

    # --- all servers of a batch -----------------------------------------------------------------
    def _spread(self, names: Sequence[bytes], work: Work, deadline: Deadline, reading: bool = False) -> list[Reply]:
        """Have each name's server do its part, all servers at once; where they say that keys have moved, follow."""
        if self._closed:
            return [Refused("closed")] * len(names)
        parts, why = self._topology.split(names, deadline, reading) if names else ([], "")
        if why:
            self._note({why})
        replies: list[Reply] = [Refused(why)] * len(names)
        for follow in range(MAX_REDIRECTS, -1, -1):
            moved: list[Part] = []
            for part, answers in zip(parts, self._at_once(parts, work, deadline), strict=True):
                for i, answer in zip(part.indices, answers, strict=True):
                    replies[i] = answer
                moved += self._topology.redirect(part, answers)
            if not moved:
                break
            with self._lock:
                if follow:
                    self._stats.redirects += sum([len(part.indices) for part in moved])
                else:
                    self._stats.faults["moved"] += 1
            parts = moved
        return replies

    def _at_once(self, parts: Sequence[Part], work: Work, deadline: Deadline) -> list[list[Reply]]:
        """Do all parts: the first in this thread, each other in one of its server's."""
        if deadline.passed:  # others took all of the time: not these servers' fault
            return [[Refused("timeout")] * len(part.indices) for part in parts]
        if len(parts) == 1:  # nobody to wait for
            return [work(parts[0].node, parts[0].indices, deadline, parts[0].asking)]
        ends = [deadline.copy() for _ in parts]
        claims = [threading.Lock() for _ in parts]  # each held by who may write into the caller's buffers

        def do(at: int) -> list[Reply]:
            part = parts[at]
            if not claims[at].acquire(blocking=False):  # the call is over
                return [Refused("timeout")] * len(part.indices)
            try:
                return work(part.node, part.indices, ends[at], part.asking)
            finally:
                claims[at].release()

        done = False
        try:
            others = [parts[at].node.start(partial(do, at)) for at in range(1, len(parts))]
            answers = [do(0)] if parts else []
            answers += [other.result() for other in others]
            done = True
        finally:
            if not done:  # a signal's handler raised: after this nobody may write into the caller's buffers
                for end in ends:
                    end.abandon()
                for claim in claims[1:]:
                    claim.acquire()
            deadline.wait_for(ends)
        return answers

    def _each(self, keys: Sequence[bytes], command: Callable[[bytes], Command], reading: bool = False) -> list[Reply]:
        """The replies to one small command a key. Counts as no request."""
        names = [KEY_PREFIX + key for key in keys]

        def ask(node: Node, indices: Sequence[int], deadline: Deadline, asking: bool) -> list[Reply]:
            return self._exchange(node, [command(names[i]) for i in indices], deadline, asking=asking)

        return self._spread(names, ask, Deadline(self._deadline_s), reading)

    def _renew(self, names: Sequence[bytes], replies: list[Reply], deadline: Deadline) -> None:
        """Have masters renew what replicas have given."""
        hits = [i for i, reply in enumerate(replies) if type(reply) is memoryview or type(reply) is bytes]

        def touch(node: Node, indices: Sequence[int], deadline: Deadline, asking: bool) -> list[Reply]:
            return self._exchange(node, [self._touch(names[hits[i]]) for i in indices], deadline, asking=asking)

        for i, answer in zip(hits, self._spread([names[i] for i in hits], touch, deadline), strict=True):
            if isinstance(answer, redis.exceptions.NoPermissionError):  # as in `_get`
                replies[i] = Refused("auth")

    # --- one server -----------------------------------------------------------------------------
    def _read(
        self,
        node: Node,
        names: Sequence[bytes],
        out: Sequence[memoryview] | None,
        deadline: Deadline,
        asking: bool,
    ) -> list[Reply]:
        """A server's values, window by window."""
        replies: list[Reply] = []
        while len(replies) < len(names):
            at = len(replies)
            window = self._read_window(at, len(names), out)
            replies += self._get(
                node, names[at : at + window], out[at : at + window] if out else None, deadline, asking
            )
            fault = _fault_of(replies[at:])
            if fault:  # nor would the server answer now
                replies += [Refused(fault)] * (len(names) - len(replies))
        return replies

    def _get(
        self,
        node: Node,
        names: Sequence[bytes],
        out: Sequence[memoryview] | None,
        deadline: Deadline,
        asking: bool,
    ) -> Sequence[Reply]:
        """One round trip: each name's value, None where there is none, or why it is not known."""
        commands: list[Command] = [(b"GET", name) for name in names]
        if self._ttl_ms is not None and not self._read_replicas:
            commands += map(self._touch, names)
        replies = self._exchange(node, commands, deadline, out, asking)
        if any(isinstance(r, redis.exceptions.NoPermissionError) for r in replies[len(names) :]):
            # Chains would die of age with nobody noticing: such a user needs ttl_s=None.
            return [Refused("auth")] * len(names)
        values = replies[: len(names)]
        if out is None:
            self._value_bytes = max([len(v) for v in values if isinstance(v, bytes)], default=self._value_bytes)
        return values

    def _write(
        self,
        node: Node,
        pairs: Sequence[tuple[bytes, Value]],
        sizes: Sequence[int],
        deadline: Deadline,
        asking: bool,
    ) -> list[Reply]:
        """Store a server's values, window by window."""
        limit = node.value_limit(deadline)
        if not isinstance(limit, int):
            self._note({reason_of(limit)})
            return [limit] * len(pairs)
        replies: list[Reply] = [Refused("too_big")] * len(pairs)  # of those that no window takes
        for window in _windows(sizes, limit):
            deadline.extend(sum([sizes[i] for i in window]))
            answers = self._set(node, [pairs[i] for i in window], deadline, asking)
            for i, answer in zip(window, answers, strict=True):
                replies[i] = answer
        return replies

    def _set(self, node: Node, pairs: Sequence[tuple[bytes, Value]], deadline: Deadline, asking: bool) -> list[Reply]:
        """One round trip, if the server takes writes."""
        if not node.write_breaker.allow():
            return [Refused("breaker")] * len(pairs)
        expiry = () if self._ttl_ms is None else (b"PX", b"%d" % self._ttl_ms)
        verdict: bool | None = None
        try:
            commands: list[Command] = [(b"SET", name, value, *expiry) for name, value in pairs]
            replies = self._exchange(node, commands, deadline, asking=asking)
            refused = any(not _is_ok(reply) and reason_of(reply) in _WRITE_FAULTS for reply in replies)
            verdict = True if any(map(_is_ok, replies)) else False if refused else None
        finally:
            node.write_breaker.record(verdict)
        return replies

    def _exchange(
        self,
        node: Node,
        commands: list[Command],
        deadline: Deadline,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
    ) -> list[Reply]:
        """One round trip. Its faults are counted, and may mean that keys have moved."""
        replies = node.exchange(commands, deadline, out, asking)
        faults = [reply for reply in replies if isinstance(reply, Exception)]
        if faults and not deadline.abandoned:
            self._note({reason_of(fault) for fault in faults})
        return replies

    def _note(self, reasons: set[str]) -> None:
        self._topology.hint(reasons)
        reasons = reasons - self._no_fault
        if reasons:
            with self._lock:
                self._stats.faults[min(reasons)] += 1

    def _known_before(self) -> str:
        """How the masters are that are known, when nobody tells which there are now."""
        shards = self._topology.shards()
        if not shards:
            return ""
        sick = [line for line in self._examined(shards, Deadline(self._deadline_s)) if line]
        names = ", ".join(shard.master.name for shard in shards[:_TOLD]) + ", …" * (len(shards) > _TOLD)
        return f"; known from before{f', {len(sick)} of them sick' if sick else ' and well'}: {names}"

    def _examined(self, shards: Sequence[Shard], deadline: Deadline) -> list[str]:
        """What is wrong with each master, "" where nothing is."""
        masters = [shard.master for shard in shards]
        name_of: dict[Node, bytes] = {}
        for draws in _HEALTH_DRAWS:  # a master may have a single slot
            names = [KEY_PREFIX + b"health:" + os.urandom(8).hex().encode() for _ in range(draws)]
            name_of |= {part.node: names[part.indices[0]] for part in self._topology.split(names, deadline)[0]}
            if name_of.keys() >= set(masters):
                break
        masters = [master for master in masters if master in name_of]
        started = [node.start(partial(self._examine, node, name_of[node], deadline.copy())) for node in masters]
        lines = []
        for node, answers in zip(masters, [job.result() for job in started], strict=True):
            which = f"{node.name}: " if self._topology.many else ""
            reads = "" if any(isinstance(answer, Exception) for answer in answers[:2]) else "reads work, but "
            fault = next((answer for answer in answers if isinstance(answer, Exception)), None)
            if not self._topology.many and isinstance(answers[-1], bytes) and b"cluster_enabled:1" in answers[-1]:
                lines.append("moved: this is a node of a Redis Cluster, which redis-cluster:// speaks to")
            elif fault and not self._topology.many and "unknown command" in str(fault):
                lines.append(f"{_in_words(fault)}: no Redis that keeps data; sentinels are redis-sentinel://…/NAME")
            else:
                lines.append(f"{which}{reads}{_in_words(fault)}" if fault else "")
        return lines

    def _examine(self, node: Node, name: bytes, deadline: Deadline) -> list[Reply]:
        """Every command of the store, whatever the breaker says; that learns from it."""
        trials: list[Command] = [(b"GET", name), (b"EXISTS", name), (b"SET", name, b"", b"PX", b"1000")]
        trials += [(b"PEXPIRE", name, b"1000"), (b"DEL", name)]
        if isinstance(node.link, Link):
            trials += [(b"INFO", b"memory"), *self._topology.trials]
        answers = node.link.exchange(trials, deadline)
        node.breaker.record(verdict_of([answer for answer in answers if isinstance(answer, Exception)]))
        return answers

    def _touch(self, name: bytes) -> Command:
        """Renews a TTL where there is one; the answer is 1 if the key is there."""
        if self._ttl_ms is None:
            return (b"EXISTS", name)
        return (b"PEXPIRE", name, b"%d" % self._ttl_ms)

    def _read_window(self, start: int, stop: int, out: Sequence[memoryview] | None) -> int:
        """How many keys to ask for at once."""
        count, size = 0, 0
        while start + count < stop and count < WINDOW_KEYS:
            size += self._value_bytes if out is None else out[start + count].nbytes
            if count and size > WINDOW_BYTES:
                break
            count += 1
        return count


def _is_ok(reply: Reply) -> bool:
    return reply is True or (type(reply) is bytes and reply == b"OK")


def _fault_of(replies: Sequence[Reply]) -> str:
    """What keeps a server from answering further commands, "" if nothing does."""
    reasons = [reason_of(reply) for reply in replies if isinstance(reply, Exception)]
    return next((reason for reason in reasons if reason not in OF_ONE_KEY), "")


def _in_words(error: Exception) -> str:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{reason_of(error)}: {' '.join(str(error).split())}{notes}"


def _nbytes(value: Value) -> int:
    return sum([part.nbytes if type(part) is memoryview else len(part) for part in pieces(value)])


def _windows(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Numbers of the values that fit `limit`, at most `WINDOW_BYTES` and `WINDOW_KEYS` together; one may be larger."""
    window: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if size > limit:
            continue
        if window and (len(window) == WINDOW_KEYS or total + size > WINDOW_BYTES):
            yield window
            window, total = [], 0
        window.append(i)
        total += size
    if window:
        yield window
