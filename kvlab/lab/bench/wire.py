"""Cost of moving a block to Redis and back, compared with a bare socket and with redis-py.

python -m kvlab bench wire --json

"raw" is one blocking socket: one `sendmsg` per SET, `recv_into` a reused buffer per GET. This is
the limit for a client in Python. "redis_py" is redis-py with hiredis and default settings:
`set(key, bytes)`, `get(key)`.
"""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis

from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.reachable import open_reachable
from kvlab.lab.timing import Timings, time_rounds
from kvlab.stores import RedisStore
from kvlab.stores.redis.store import KEY_PREFIX
from kvlab.stores.url import shown
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer

SIZES = (64 << 10, 192 << 10, 1 << 20, 4 << 20)
BYTES_A_ROW = 64 << 20  # moved by each contender in all rounds of a row; four times as many for existing keys
BATCH = 64
LOOKUP_KEYS = 1024
TRANSPORTS = {"redis": "tcp", "rediss": "tls", "unix": "unix"}
TTL_S = 600  # of the keys, which an interrupted benchmark does not delete
ABOUT = (
    "put_ratio, get_ratio: speed of kvlab's store divided by the speed of the bare socket; …_vs_redis_py: divided by "
    "the speed of redis-py; new_keys: each put creates a key, for which the server allocates memory; aa_ratio: the "
    "same work compared with itself; wire: one value of 1 MiB per call, with existing keys, for a comparison with your "
    "break-even bandwidth"
)
DEADLINE_S = 10.0  # long enough for every value, also on a busy machine


def run(store: str | None = None, scale: float = 1.0) -> dict[str, Any]:
    """Measure the transfer to the server with this URL, or start a server and measure TCP and a unix socket.

    The benchmark deletes its keys.

    Args:
        scale: factor for the number of rounds.

    Returns:
        `rows`: by value size, transport and `new_keys`, GB/s for one value per call, and ratios,
        computed per round. `batch`: 64 values in one call, compared with one call per value.
        `lookup`: `probe`, compared with one EXISTS per key. `round_trips`: how often a call waits
        for the server (not for TLS and unix sockets).

    Raises:
        ConfigError: the URL is not a store URL.
        KVLabError: the server does not answer, or did not accept or return a value.
    """
    try:
        return _run(store, scale)
    except (OSError, redis.RedisError) as error:
        server = "the server of this benchmark" if store is None else shown(store)
        raise KVLabError(f"cannot measure {server}: {error}") from error


def _run(url: str | None, scale: float) -> dict[str, Any]:
    with ExitStack() as stack:
        if url is None:
            server = stack.enter_context(RedisServer())
            urls = [server.url, server.unix_url]
        else:
            stack.enter_context(open_reachable(url))
            if urlsplit(url).scheme not in TRANSPORTS:
                raise KVLabError(f"expected redis://, rediss:// or unix:// to measure, got {shown(url)!r}")
            urls = [url]
        first = TRANSPORTS[urlsplit(urls[0]).scheme]
        timings: list[Timings] = []
        rows = [_row(u, size, new, scale, timings) for u in urls for size in SIZES for new in (False, True)]
        batch = [_batch(urls[0], size, scale) for size in (1 << 20, 192 << 10)]
        lookup = _lookup(urls[0], scale)
        trips = _round_trips(urls[0]) if urls[0].startswith("redis://") else {}
    (mine,) = (row for row in rows if (row["value_kib"], row["new_keys"], row["transport"]) == (1024, False, first))
    return {
        "rows": rows,
        "about": ABOUT,
        "batch": batch[0],
        "batch_192_kib": batch[1],
        "lookup": lookup,
        "round_trips": trips,
        "wire": {f"{name}_gbps": mine[f"store_{name}_gbps"] for name in ("get", "put")},
        "aa_ratio": statistics.median(t.aa_ratio for t in timings),
        "noisy": any(t.noisy for t in timings),
        "machine": describe_machine(),
        "versions": versions(),
    }


class Raw:
    """One blocking socket to a Redis server, for values of one size."""

    def __init__(self, url: str, size: int) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(parts.path)
        else:
            self.sock = socket.create_connection((parts.hostname or "localhost", parts.port or 6379))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tls = parts.scheme == "rediss"
        if self.tls:
            ca = parse_qs(parts.query).get("ssl_ca_certs", [None])[0]
            self.sock = ssl.create_default_context(cafile=ca).wrap_socket(self.sock, server_hostname=parts.hostname)
        if parts.password:
            login = [x.encode() for x in (unquote(parts.username or "default"), unquote(parts.password))]
            self._line(self._command(b"AUTH", *login))
        self.buffer = memoryview(bytearray(size))
        self._reply = memoryview(bytearray(len(b"$%d\r\n" % size) + size + 2))  # head, value, line end

    def put(self, key: bytes, value: memoryview) -> None:
        """SET with one `sendmsg`; over TLS, with one `sendall` per piece."""
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
        pieces: list[bytes | memoryview] = [head, value, b"\r\n$2\r\nPX\r\n$6\r\n%d\r\n" % (1000 * TTL_S)]
        if self.tls:
            for piece in pieces:
                self.sock.sendall(piece)
        else:
            sent = self.sock.sendmsg(pieces)
            rest = sum(map(len, pieces)) - sent
            if rest:  # the tail did not fit the socket's buffer
                self.sock.sendall(b"".join(pieces)[-rest:])
        if self.sock.recv(64) != b"+OK\r\n":
            raise KVLabError("the server did not accept a value")

    def get(self, key: bytes) -> memoryview:
        """GET into a reused buffer; the result is a view of this buffer."""
        self.sock.sendall(self._command(b"GET", key))
        got = 0
        while got < len(self._reply):
            new = self.sock.recv_into(self._reply[got:])
            got += new
            if not new or bytes(self._reply[:2]) == b"$-":
                raise KVLabError("a value is gone: the server may have evicted it; give the server more memory")
        if bytes(self._reply[:1]) != b"$" or bytes(self._reply[-2:]) != b"\r\n":
            raise KVLabError("the server did not return a value")
        return self._reply[-2 - len(self.buffer) : -2]

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def _command(self, *arguments: bytes) -> bytes:
        return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in arguments)

    def _line(self, command: bytes) -> None:
        self.sock.sendall(command)
        answer = self.sock.recv(1024)
        if not answer.startswith(b"+"):
            raise KVLabError(f"the server refused: {answer[:80]!r}")


class Bench:
    """Three clients of one server (kvlab's store, a bare socket, redis-py), and keys that no other client uses."""

    def __init__(self, url: str, size: int) -> None:
        self.store = RedisStore(url, deadline_s=DEADLINE_S)
        self.writer = RedisStore(url, ttl_s=TTL_S, deadline_s=DEADLINE_S)
        self.raw = Raw(url, size)
        self.redis = redis.Redis.from_url(url)
        self.value = os.urandom(size)
        self.out = memoryview(bytearray(size))
        self._name = b"bench:" + os.urandom(6).hex().encode() + b":"
        self._made: list[bytes] = []

    def keys(self, count: int) -> list[bytes]:
        """New keys, which `close` deletes."""
        new = [self._name + b"%08d" % (len(self._made) + i) for i in range(count)]
        self._made += new
        return new

    def put(self, key: bytes) -> None:
        """Put the value through the store."""
        if self.writer.put_many([key], [memoryview(self.value)]) != 1:
            raise KVLabError(f"the store did not accept a value: {dict(self.writer.stats().drops)}")

    def get(self, keys: Sequence[bytes], out: Sequence[memoryview]) -> None:
        """Get values through the store, into `out`."""
        if None in self.store.get_many(keys, out):
            raise KVLabError(f"the store did not return a value: {dict(self.store.stats().misses)}")

    def close(self) -> None:
        """Delete the keys and close the connections."""
        for at in range(0, len(self._made), 1000):
            self.store.delete_many(self._made[at : at + 1000])
        self.store.close()
        self.writer.close()
        self.raw.close()
        self.redis.close()


@contextmanager
def _bench(url: str, size: int) -> Iterator[Bench]:
    bench = Bench(url, size)
    try:
        yield bench
    finally:
        bench.close()


def _row(url: str, size: int, new: bool, scale: float, timings: list[Timings]) -> dict[str, Any]:
    rounds = max(5, int(scale * min(200, BYTES_A_ROW * (1 if new else 4) // size)))
    with _bench(url, size) as b:

        def key_source() -> Callable[[], bytes]:
            """A function that returns a new key per call, or always the same existing key."""
            if new:
                return lambda: b.keys(1)[0]
            (same,) = b.keys(1)
            b.put(same)
            return lambda: same

        stored = b.keys(rounds + 1 if new else 1)
        for key in stored:
            b.put(key)
        cycles = [itertools.cycle(stored) for _ in range(4)]
        sources = [key_source() for _ in range(4)]
        view = memoryview(b.value)
        times = time_rounds(
            {
                "raw_put": lambda: b.raw.put(KEY_PREFIX + sources[0](), view),
                "store_put": lambda: b.put(sources[1]()),
                "redis_py_put": lambda: b.redis.set(KEY_PREFIX + sources[2](), b.value, ex=TTL_S),
                "raw_get": lambda: b.raw.get(KEY_PREFIX + next(cycles[0])),
                "store_get": lambda: b.get([next(cycles[1])], [b.out]),
                "redis_py_get": lambda: b.redis.get(KEY_PREFIX + next(cycles[2])),
            },
            rounds,
        )
        if not (b.raw.get(KEY_PREFIX + stored[0]) == b.out == b.value):
            raise KVLabError("the server returned a changed value")
    timings.append(times)
    gbps = {name: size / times.median_ms(name) / 1e6 for name in times.seconds}
    return {
        "value_kib": size >> 10,
        "transport": TRANSPORTS[urlsplit(url).scheme],
        "new_keys": new,
        **{f"{who}_{way}_gbps": gbps[f"{who}_{way}"] for who in ("store", "raw", "redis_py") for way in ("put", "get")},
        "put_ratio": times.ratio("raw_put", "store_put"),
        "get_ratio": times.ratio("raw_get", "store_get"),
        "put_vs_redis_py": times.ratio("redis_py_put", "store_put"),
        "get_vs_redis_py": times.ratio("redis_py_get", "store_get"),
        "aa_ratio": times.aa_ratio,
    }


def _batch(url: str, size: int, scale: float) -> dict[str, Any]:
    with _bench(url, size) as b:
        keys = b.keys(BATCH)
        for key in keys:
            b.put(key)
        whole = memoryview(bytearray(BATCH * size))
        out = [whole[i * size : (i + 1) * size] for i in range(BATCH)]
        names = [KEY_PREFIX + key for key in keys]

        def one_by_one() -> None:
            for i in range(BATCH):
                b.get(keys[i : i + 1], out[i : i + 1])

        work: dict[str, Callable[[], object]] = {"single": one_by_one, "batch": lambda: b.get(keys, out)}
        if _may_mget(b.redis):
            work["redis_py_single"] = lambda: [b.redis.get(name) for name in names]
            work["redis_py_mget"] = lambda: b.redis.mget(names)
        times = time_rounds(work, max(3, int(scale * 7)))
    return {
        "records": BATCH,
        "value_kib": size >> 10,
        "gbps": BATCH * size / times.median_ms("batch") / 1e6,
        "ratio_to_single": times.ratio("single", "batch"),
        "redis_py_mget_ratio_to_single": times.ratio("redis_py_single", "redis_py_mget") if len(work) > 2 else None,
    }


def _may_mget(client: redis.Redis) -> bool:
    """Whether the user may call MGET, a right that the store does not need."""
    try:
        client.mget([KEY_PREFIX + b"bench"])
    except redis.exceptions.NoPermissionError:
        return False
    return True


def _lookup(url: str, scale: float) -> dict[str, Any]:
    with _bench(url, 16) as b:
        keys = b.keys(LOOKUP_KEYS)
        b.writer.put_many(keys, [b.value] * LOOKUP_KEYS)

        def probe() -> None:
            if b.store.probe(keys) != LOOKUP_KEYS:
                raise KVLabError("the store does not find the stored keys")

        one_at_a_time = [KEY_PREFIX + key for key in keys]
        times = time_rounds(
            {"probe": probe, "exists": lambda: [b.redis.exists(name) for name in one_at_a_time]},
            max(3, int(scale * 9)),
        )
    return {"keys": LOOKUP_KEYS, "probe_ms": times.median_ms("probe"), "ratio": times.ratio("exists", "probe")}


def _round_trips(url: str) -> dict[str, int]:
    """How often the client sends while no reply is outstanding: for a probe, and for two loads."""
    parts = urlsplit(url)
    with FaultProxy(parts.port or 6379, host=parts.hostname or "localhost") as proxy:
        there = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}".lstrip("@")).geturl()
        with _bench(url, 1 << 20) as big, _bench(url, 192 << 10) as small, RedisStore(there, deadline_s=60) as store:
            batches = []
            for bench in (big, small):
                keys = bench.keys(BATCH)
                for key in keys:
                    bench.put(key)
                batches.append((keys, [memoryview(bytearray(len(bench.value))) for _ in keys]))
            store.probe(batches[0][0])  # connects and logs in
            proxy.reset_counts()
            store.probe(batches[0][0])
            counts = [proxy.exchanges()]
            for keys, out in batches:
                proxy.reset_counts()
                store.get_many(keys, out)
                counts.append(proxy.exchanges())
    return dict(zip(("probe", "load_64_mib", "load_64_records_of_192_kib"), counts, strict=True))
