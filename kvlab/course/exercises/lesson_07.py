"""The exercises of notebook 07, sharding: what modulo moves, copies on the ring, hash tags, a batch from many nodes."""

from __future__ import annotations

import bisect
import contextlib
import re
from typing import Any

import redis

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import read_values

Clients = dict[str, redis.Redis]
Values = list[bytes | None]


# --- 07.1 ---------------------------------------------------------------------------------------
def share_moved(before: int, after: int) -> float:
    """The share of keys that modulo moves, from `before` to `after` nodes: 0 to 1."""
    numbers = range(before * after)  # then both remainders begin again
    moved = [n for n in numbers if n % before != n % after]
    return len(moved) / len(numbers)


def _only_the_fair_share(before: int, after: int) -> float:
    return abs(after - before) / max(before, after)


def _as_for_one_node_more(before: int, after: int) -> float:
    return before / (before + 1)


def _as_if_drawn_by_lot(before: int, after: int) -> float:
    return 1 - 1 / max(before, after)


def _share_that_stays(before: int, after: int) -> float:
    return 1 - share_moved(before, after)


def _percent(before: int, after: int) -> float:
    return 100 * share_moved(before, after)


def _number_of_keys(before: int, after: int) -> int:
    return round(before * after * share_moved(before, after))


def _first_twelve(before: int, after: int) -> float:
    return sum(n % before != n % after for n in range(12)) / 12


def _first_thousand(before: int, after: int) -> float:
    return sum(n % before != n % after for n in range(1000)) / 1000


SHARE_MOVED = Exercise(
    name="share_moved",
    number="07.1",
    difficulty=2,
    reference=share_moved,
    cases=((3, 4), (5, 6), (4, 8), (6, 9), (5, 4), (3, 3)),
    wrong=(
        Wrong(_only_the_fair_share, "that is what has to move; modulo moves more: count the numbers that change"),
        Wrong(_as_for_one_node_more, "that fits one node more; from 4 to 8 nodes many numbers keep their remainder"),
        Wrong(_as_if_drawn_by_lot, "the new remainder depends on the old one: a number below both keeps its node"),
        Wrong(_share_that_stays, "that is the share that stays where it is"),
        Wrong(_percent, "a share is between 0 and 1, not a percentage"),
        Wrong(_number_of_keys, "that is how many numbers move; divide by how many you looked at"),
        Wrong(_first_thousand, "close: the pairs of remainders repeat, so count over whole repetitions of them"),
        Wrong(_first_twelve, "twelve numbers were enough for 3 and 4 nodes; others need more to begin again"),
    ),
    hint="count, over enough numbers in a row, those with n % before != n % after",
    after="That is why systems that place by modulo double the number of nodes when they grow.",
)


# --- 07.2 ---------------------------------------------------------------------------------------
def ring_nodes(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    """The first `count` different nodes from `at` on: the owner, then the next ones."""
    begin = bisect.bisect_left(points, at)
    clockwise = owners[begin:] + owners[:begin]
    return list(dict.fromkeys(clockwise))[:count]  # dict.fromkeys drops repetitions and keeps the order


def _same_node_twice(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    begin = bisect.bisect_left(points, at)
    return (owners[begin:] + owners[:begin])[:count]


def _no_neighbours_twice(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    begin, found = bisect.bisect_left(points, at), list[str]()
    for node in owners[begin:] + owners[:begin]:
        if not found or node != found[-1]:
            found.append(node)
    return found[:count]


def _stops_at_the_end(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    return list(dict.fromkeys(owners[bisect.bisect_left(points, at) :]))[:count]


def _falls_off_the_end(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    i, found = bisect.bisect_left(points, at), list[str]()
    while len(found) < min(count, len(set(owners))):
        if owners[i] not in found:
            found.append(owners[i])
        i += 1
    return found


def _strictly_after(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    begin = bisect.bisect_right(points, at)
    return list(dict.fromkeys(owners[begin:] + owners[:begin]))[:count]


def _against_the_clock(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    begin = bisect.bisect_right(points, at)
    return list(dict.fromkeys((owners[begin:] + owners[:begin])[::-1]))[:count]


def _sorted_by_name(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
    return sorted(ring_nodes(points, owners, at, count))


def _only_the_owner(points: list[int], owners: list[str], at: int, count: int) -> str:
    return ring_nodes(points, owners, at, 1)[0]


RING_NODES = Exercise(
    name="ring_nodes",
    number="07.2",
    difficulty=3,
    reference=ring_nodes,
    cases=(
        ([10, 40, 70], ["B", "A", "C"], 25, 2),
        ([10, 40, 70], ["B", "A", "C"], 40, 2),
        ([10, 40, 70], ["B", "A", "C"], 41, 3),
        ([10, 40, 70], ["B", "A", "C"], 95, 1),
        ([10, 20, 30, 60, 80], ["C", "C", "A", "A", "B"], 15, 3),
        ([10, 20, 30, 60, 80], ["A", "B", "A", "B", "C"], 5, 3),
        ([10, 40], ["A", "B"], 12, 3),
    ),
    wrong=(
        Wrong(_same_node_twice, "a node has several points: a copy on the same node is lost together with the first"),
        Wrong(_no_neighbours_twice, "a node can come again after another one: compare with all that you have found"),
        Wrong(_stops_at_the_end, "after the last point comes the first again: owners[begin:] + owners[:begin]"),
        Wrong(_falls_off_the_end, "beyond the last point comes the first again: take the index % len(points)"),
        Wrong(_strictly_after, "a key exactly on a point belongs to that point: bisect_left, not bisect"),
        Wrong(_against_the_clock, "a key goes clockwise: to the next point at or after it, not to the one before"),
        Wrong(_sorted_by_name, "keep the order of the ring: the first one is the owner"),
        Wrong(_only_the_owner, "return a list of `count` nodes, also when `count` is 1"),
    ),
    hint="begin at the first point >= at, go once around the ring, and take each node when it comes first",
    after="Cassandra and DynamoDB place their copies this way. You will see below what the second node is good for.",
)


# --- 07.3 ---------------------------------------------------------------------------------------
def hash_tag(name: bytes) -> bytes:
    """The part of a name that its slot is computed from: a hash tag, or all of it."""
    begin = name.find(b"{")
    end = name.find(b"}", begin + 1)
    return name[begin + 1 : end] if -1 < begin < end - 1 else name


def first_hash_tag(name: bytes) -> bytes:
    """The part of a name that its slot is computed from: a hash tag, or all of it."""
    begin, end = name.find(b"{"), name.find(b"}")
    if begin == -1 or end == -1:
        return name
    return name[begin + 1 : end]


def _to_the_last_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.rfind(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _empty_tag(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end else key


def _braces_kept(key: bytes) -> bytes:
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin : end + 1] if -1 < begin < end - 1 else key


def _any_first_pair(key: bytes) -> bytes:
    found = re.search(rb"\{(.*?)\}", key)
    return found[1] if found else key


def _first_closing_brace(key: bytes) -> bytes:
    begin, end = key.find(b"{"), key.find(b"}")
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _last_opening_brace(key: bytes) -> bytes:
    begin = key.rfind(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if -1 < begin < end - 1 else key


def _one_byte_or_more(key: bytes) -> bytes:
    found = re.search(rb"\{(.+?)\}", key)
    return found[1] if found else key


def _next_pair(key: bytes) -> bytes:
    found = re.search(rb"\{([^}]+)\}", key, re.DOTALL)
    return found[1] if found else key


HASH_TAG = Exercise(
    name="hash_tag",
    number="07.3",
    difficulty=3,
    reference=hash_tag,
    given=first_hash_tag,
    cases=(
        (b"{user1000}.following",),
        (b"no tag",),
        (b"foo{}{bar}",),
        (b"foo{{bar}}zap",),
        (b"foo{bar}{zap}",),
        (b"a}b{c}d",),
        (b"a}b{c",),
        (b"{never closed",),
        (b"kv:\x00{\xff\n}\x01",),
    ),
    wrong=(
        Wrong(_to_the_last_brace, "the tag ends at the FIRST } after the {, even if more follow"),
        Wrong(_empty_tag, "with nothing between { and } the whole name counts, or all such names would share one slot"),
        Wrong(_any_first_pair, "for an empty {} return the whole name; and `.` in a pattern does not match a newline"),
        Wrong(_braces_kept, "what counts stands between the braces: return it without them"),
        Wrong(_first_closing_brace, "a } before the { means nothing: look for one behind it"),
        Wrong(_last_opening_brace, "the tag begins at the FIRST {: in foo{{bar}}zap it is {bar"),
        Wrong(_one_byte_or_more, "`.+?` wants a byte, so in {}{bar} it takes the }: an empty first pair means no tag"),
        Wrong(_next_pair, "after an empty {} no other pair is looked for: then the whole name counts"),
    ),
    hint="the first {, then the first } behind it; if either is missing or nothing stands between, the whole name",
    after="Redis answers a client with the wrong slot with MOVED and the right node, so only a round trip is lost.",
)


# --- 07.4 ---------------------------------------------------------------------------------------
def read_batch(
    clients: dict[str, redis.Redis], names: list[bytes], owners: list[str], ttl_ms: int
) -> list[bytes | None]:
    """One value for each name, in order; None if it is missing or its node fails."""
    found: dict[bytes, bytes | None] = {}
    for node in set(owners):
        wanted = [name for name, owner in zip(names, owners) if owner == node]
        try:
            values = read_values(clients[node], wanted, ttl_ms)
        except redis.RedisError:  # refused, or no answer in time
            continue
        found.update(zip(wanted, values))
    return [found.get(name) for name in names]


class _Node:
    """In place of a node's client: answers for its own names, fails if it has a fault, and counts round trips."""

    def __init__(self, node: str, has: dict[bytes, bytes | None], fault: type[redis.RedisError] | None = None) -> None:
        self.node, self.has, self.fault, self.trips = node, has, fault, 0

    def __repr__(self) -> str:
        return f"<node {self.node}{' fails' if self.fault else ''}>"

    def pipeline(self, *_: Any, **__: Any) -> _Pipeline:
        return _Pipeline(self)

    def answer(self, commands: list[tuple[str, bytes]]) -> list[Any]:
        self.trips += 1
        if self.fault:
            raise self.fault(f"node {self.node} does not answer")
        for _, name in commands:
            if name not in self.has:
                raise redis.exceptions.MovedError("9021 127.0.0.1:7002")
        return [self.has[name] if verb == "get" else self.has[name] is not None for verb, name in commands]

    def get(self, name: bytes) -> Any:
        return self.answer([("get", name)])[0]

    def getex(self, name: bytes, *_: Any, **__: Any) -> Any:
        return self.get(name)

    def pexpire(self, name: bytes, *_: Any) -> Any:
        return self.answer([("pexpire", name)])[0]

    def mget(self, *_: Any) -> Any:
        raise redis.ResponseError("CROSSSLOT Keys in request don't hash to the same slot")


class _Pipeline:
    """Collects commands for one round trip to a `_Node`."""

    def __init__(self, node: _Node) -> None:
        self.node, self.commands = node, list[tuple[str, bytes]]()

    def get(self, name: bytes) -> _Pipeline:
        self.commands.append(("get", name))
        return self

    def getex(self, name: bytes, *_: Any, **__: Any) -> _Pipeline:
        return self.get(name)

    def pexpire(self, name: bytes, *_: Any) -> _Pipeline:
        self.commands.append(("pexpire", name))
        return self

    def execute(self, *_: Any, **__: Any) -> list[Any]:
        return self.node.answer(self.commands)


def _batch(owners: str, absent: bytes = b"", **faults: type[redis.RedisError]) -> tuple[Any, ...]:
    """A case: one name for each letter of `owners`, which says the node that has it."""
    names = [b"kv:%d" % i for i in range(len(owners))]
    clients = {}
    for node in sorted(set(owners)):
        own = [name for name, owner in zip(names, owners) if owner == node]
        has = {name: None if name == absent else b"value of " + name for name in own}
        clients[node] = _Node(node, has, faults.get(node))
    return clients, names, list(owners), 60_000


def _with_round_trips(result: Any, args: tuple[Any, ...]) -> Any:
    """The values, and how often each node was asked."""
    trips = [f"{node}: {client.trips} round trips" for node, client in args[0].items()]
    return [*result, *trips] if isinstance(result, list) else result


def _one_by_one(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    got: Values = []
    for name, owner in zip(names, owners):
        try:
            got += read_values(clients[owner], [name], ttl_ms)
        except redis.RedisError:
            got.append(None)
    return got


def _one_by_one_unguarded(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    return [read_values(clients[owner], [name], ttl_ms)[0] for name, owner in zip(names, owners)]


def _node_after_node(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    values = read_batch(clients, names, owners, ttl_ms)
    return [value for node in dict.fromkeys(owners) for value, owner in zip(values, owners) if owner == node]


def _lost_node_skipped(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    values = read_batch(clients, names, owners, ttl_ms)
    return [value for value, owner in zip(values, owners) if not getattr(clients[owner], "fault", None)]


def _any_none_skipped(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    return [value for value in read_batch(clients, names, owners, ttl_ms) if value is not None]


def _faults_raised(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    found: dict[bytes, bytes | None] = {}
    for node in dict.fromkeys(owners):
        wanted = [name for name, owner in zip(names, owners) if owner == node]
        found.update(zip(wanted, read_values(clients[node], wanted, ttl_ms)))
    return [found[name] for name in names]


def _only_refused(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    found: dict[bytes, bytes | None] = {}
    for node in dict.fromkeys(owners):
        wanted = [name for name, owner in zip(names, owners) if owner == node]
        with contextlib.suppress(redis.ConnectionError):
            found.update(zip(wanted, read_values(clients[node], wanted, ttl_ms)))
    return [found.get(name) for name in names]


def _looks_for_what_failed(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    found: dict[bytes, bytes | None] = {}
    for node in dict.fromkeys(owners):
        wanted = [name for name, owner in zip(names, owners) if owner == node]
        with contextlib.suppress(redis.RedisError):
            found.update(zip(wanted, read_values(clients[node], wanted, ttl_ms)))
    return [found[name] for name in names]


def _all_or_nothing(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    try:
        return _faults_raised(clients, names, owners, ttl_ms)
    except redis.RedisError:
        return [None] * len(names)


def _all_names_from_each(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    got: Values = [None] * len(names)
    for client in clients.values():
        values = read_values(client, names, ttl_ms)
        got = [value or old for value, old in zip(values, got)]
    return got


def _all_names_guarded(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    got: Values = [None] * len(names)
    for client in clients.values():
        try:
            values = read_values(client, names, ttl_ms)
        except redis.RedisError:
            continue
        got = [value or old for value, old in zip(values, got)]
    return got


def _with_mget(clients: Clients, names: list[bytes], owners: list[str], ttl_ms: int) -> Values:
    found: dict[bytes, bytes | None] = {}
    for node in dict.fromkeys(owners):
        wanted = [name for name, owner in zip(names, owners) if owner == node]
        found.update(zip(wanted, clients[node].mget(wanted)))  # type: ignore[arg-type]
    return [found[name] for name in names]


READ_BATCH = Exercise(
    name="read_batch",
    number="07.4",
    difficulty=4,
    reference=read_batch,
    cases=(
        _batch("AA"),
        _batch("ABAC"),
        _batch("CACAB", absent=b"kv:2"),
        _batch("ABABA", B=redis.ConnectionError),
        _batch("CBBAC", C=redis.TimeoutError),
        _batch(""),
    ),
    observe=_with_round_trips,
    wrong=(
        Wrong(_one_by_one, "one round trip for each name: collect the names of a node, then ask that node once"),
        Wrong(_one_by_one_unguarded, "ask each node once, for all of its names, and mind that a node can fail"),
        Wrong(_node_after_node, "these values stand node after node: block 2 would be read as block 1"),
        Wrong(_any_none_skipped, "a missing value leaves a gap: put None there, or all later values move up"),
        Wrong(_lost_node_skipped, "a node that fails leaves gaps: put None there, or all later values move up"),
        Wrong(_faults_raised, "a node that fails gives misses, not an error: catch redis.RedisError"),
        Wrong(_only_refused, "a frozen node raises redis.TimeoutError: catch redis.RedisError, which covers both"),
        Wrong(_looks_for_what_failed, "the names of a failed node have no value: found.get(name) gives None"),
        Wrong(_all_or_nothing, "one failing node must not cost the values of the others: guard each round trip"),
        Wrong(_all_names_from_each, "a node refuses a batch with names of other nodes (MOVED): ask for its own only"),
        Wrong(_all_names_guarded, "MOVED is an error too: a node that is asked for names of other nodes gives nothing"),
        Wrong(_with_mget, "MGET works only within one slot (CROSSSLOT): read_values sends one GET for each name"),
    ),
    hint="for each node: its names, one read_values, guarded; then one value per name, None where there is none",
    after="kvlab's RedisStore does the same, asks all nodes at the same time, and gives each a breaker of its own.",
)
