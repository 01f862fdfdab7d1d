"""The exercises of notebook 05, the Redis tier: writing and reading a batch, the fetched prefix, a circuit breaker."""

from __future__ import annotations

import math
from typing import Any

import redis

from kvlab.course.exercises.counting import Content
from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import read_values, write_values


def _effect(result: Any, args: tuple[Any, ...]) -> list[str]:
    """What an answer returned, how often it sent, and what the server holds then."""
    client = args[0]
    return [f"returned {result!r}", f"round trips: {client.round_trips}", *client.content()]


# --- write_values -------------------------------------------------------------------------------
def _sets_one_by_one(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    return sum(bool(client.set(name, value, px=ttl_ms)) for name, value in zip(names, values, strict=True))


def _mset(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    if names:
        client.mset(dict(zip(names, values, strict=True)))
    return len(names)


def _without_ttl(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    pipe = client.pipeline(transaction=False)
    for name, value in zip(names, values, strict=True):
        pipe.set(name, value)
    return sum(reply is True for reply in pipe.execute(raise_on_error=False))


def _ttl_in_seconds(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    pipe = client.pipeline(transaction=False)
    for name, value in zip(names, values, strict=True):
        pipe.set(name, value, ex=ttl_ms)
    return sum(reply is True for reply in pipe.execute(raise_on_error=False))


def _counts_what_was_sent(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    write_values(client, names, values, ttl_ms)
    return len(names)


def _raises_if_one_is_refused(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    pipe = client.pipeline(transaction=False)
    for name, value in zip(names, values, strict=True):
        pipe.set(name, value, px=ttl_ms)
    return len(pipe.execute())


WRITE_VALUES = Exercise(
    name="write_values",
    number="05.1",
    difficulty=3,
    reference=write_values,
    cases=(
        (Content({}), [b"kv:a", b"kv:b"], [b"one", b"two"], 60_000),
        (Content({"kv:a": (b"old", 5)}), [b"kv:a"], [b"new"], 3_600_000),
        (
            Content({}, refuses=frozenset([b"kv:b"])),
            [b"kv:a", b"kv:b", b"kv:c"],
            [b"one", b"two", b"three"],
            60_000,
        ),
        (Content({}), [], [], 60_000),
    ),
    wrong=(
        Wrong(_sets_one_by_one, "each call of `client` is a round trip: collect the SETs in a pipeline, execute once"),
        Wrong(_mset, "MSET takes no TTL, so its blocks stay for ever: a SET with `px=` for each name"),
        Wrong(_without_ttl, "each value lives for `ttl_ms`: SET takes it along as `px=`"),
        Wrong(_ttl_in_seconds, "`ex=` counts seconds, `px=` milliseconds"),
        Wrong(_counts_what_was_sent, "a refusal is a reply too, an exception in the list: count the replies `is True`"),
        Wrong(
            _raises_if_one_is_refused,
            "one refused value must not hide the others: no transaction, and `execute(raise_on_error=False)`",
        ),
    ),
    hint="one pipeline without transaction, a SET with `px=` for each name, then count the replies that are True",
    after="kvlab does the same, sends at most 16 MiB in one go, and gives the whole call a deadline.",
    observe=_effect,
)


# --- read_values --------------------------------------------------------------------------------
def _gets_one_by_one(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    values: list[Any] = []
    for name in names:
        values.append(client.get(name))
        client.pexpire(name, ttl_ms)
    return values


def _mget(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    values: Any = client.mget(names)
    return list(values)


def _refreshes_nothing(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
    return list(pipe.execute())


def _two_round_trips(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    values = _refreshes_nothing(client, names, ttl_ms)
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.pexpire(name, ttl_ms)
    pipe.execute()
    return values


def _all_replies(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
    for name in names:
        pipe.pexpire(name, ttl_ms)
    return list(pipe.execute())


def _replies_in_pairs(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
        pipe.pexpire(name, ttl_ms)
    return list(pipe.execute()[: len(names)])


def _expires_first(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.pexpire(name, ttl_ms)
    for name in names:
        pipe.get(name)
    return list(pipe.execute()[: len(names)])


def _refreshes_in_seconds(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    return read_values(client, names, 1000 * ttl_ms)


READ_VALUES = Exercise(
    name="read_values",
    number="05.2",
    difficulty=3,
    reference=read_values,
    cases=(
        (Content({"kv:a": (b"one", 5), "kv:b": (b"two", 5)}), [b"kv:a", b"kv:b"], 60_000),
        (Content({"kv:a": (b"one", 5), "kv:c": (b"three", 90)}), [b"kv:a", b"kv:b", b"kv:c"], 60_000),
        (Content({"kv:a": (b"one", 5), "kv:b": (b"two", 5)}), [b"kv:b"], 3_600_000),
        (Content({"kv:a": (b"one", 5)}), [], 60_000),
    ),
    wrong=(
        Wrong(_gets_one_by_one, "each call of `client` is a round trip: collect all commands in one pipeline"),
        Wrong(_mget, "MGET is one round trip, but it refreshes no TTL: GET and PEXPIRE in one pipeline do both"),
        Wrong(_refreshes_nothing, "the values are right, but their TTLs go on falling: add a PEXPIRE for each name"),
        Wrong(_two_round_trips, "PEXPIRE need not wait for the values: for a name that is not there it does nothing"),
        Wrong(_all_replies, "the pipeline also returns the replies to PEXPIRE: the values are only a part of the list"),
        Wrong(_replies_in_pairs, "replies come in the order of the commands: here a value and a PEXPIRE in turn"),
        Wrong(_expires_first, "replies come in the order of the commands: here the values are the second half"),
        Wrong(_refreshes_in_seconds, "EXPIRE counts seconds, PEXPIRE milliseconds"),
    ),
    hint="one pipeline: a GET for each name, then a PEXPIRE for each name; return the replies to the GETs",
    after="Since Redis 6.2 one command, GETEX, can do both.",
    observe=_effect,
)


# --- fetched_prefix -----------------------------------------------------------------------------
def fetched_prefix(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    """The usable blocks: block i at place i, up to the first that is missing."""
    prefix: list[bytes] = []
    for value in values:
        if value is None:
            break
        prefix.append(value)
    return prefix


def _all_that_came(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    """The usable blocks: block i at place i, up to the first that is missing."""
    usable = []
    for there, value in zip(existed, values):
        if there and value is not None:
            usable.append(value)
    return usable


def _trusts_exists(existed: list[bool], values: list[bytes | None]) -> list[bytes | None]:
    count = existed.index(False) if False in existed else len(existed)
    return values[:count]


def _closes_the_gap(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return [value for value in values if value is not None]


def _asks_both(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return fetched_prefix(existed, [v if e else None for e, v in zip(existed, values, strict=True)])


def _expects_a_gap(existed: list[bool], values: list[bytes | None]) -> list[bytes | None]:
    return values[: values.index(None)]


FETCHED_PREFIX = Exercise(
    name="fetched_prefix",
    number="05.3",
    difficulty=3,
    reference=fetched_prefix,
    given=_all_that_came,
    cases=(
        ([True, True, True, False], [b"a", b"b", b"c", None]),
        ([True, True, True, True], [b"a", None, b"c", b"d"]),
        ([True, False, False], [b"a", b"b", None]),
        ([False, False], [None, None]),
        ([True, True], [None, b"b"]),
        ([True, True], [b"a", b"b"]),
    ),
    wrong=(
        Wrong(_trusts_exists, "EXISTS spoke of a moment that is over: a key may be gone when GET comes, so stop there"),
        Wrong(_closes_the_gap, "without its gap the list says that block 2 is block 1: stop at the first None"),
        Wrong(_asks_both, "a block that another worker saved meanwhile is as good as any: only GET decides"),
        Wrong(_expects_a_gap, "when nothing is missing there is no None to look for: return all values"),
    ),
    hint="forget what existed; take values from the front until one is None",
    after="The argument `existed` is not needed. kvlab's load never sees what its probe said.",
)


# --- let_through --------------------------------------------------------------------------------
def let_through(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    """Which calls a breaker lets through. A call: its time, would the server answer?"""
    made, in_a_row, open_until = [], 0, float("-inf")
    for now, answers in calls:
        allowed = now >= open_until
        made.append(allowed)
        if allowed and answers:
            in_a_row = 0
        elif allowed:
            in_a_row += 1
            if in_a_row >= failures:
                open_until = now + cooldown_s
    return made


def _never_tries_again(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    return let_through(calls, failures, math.inf)


def _any_faults_count(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    faults, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1] and not answers:
            faults += 1
            if faults >= failures:
                open_until = now + cooldown_s
    return made


def _forgets_when_cool(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
            if in_a_row >= failures:
                in_a_row, open_until = 0, now + cooldown_s
    return made


def _tries_too_late(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now > open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
            if in_a_row >= failures:
                open_until = now + cooldown_s
    return made


def _counts_refused_calls(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        in_a_row = 0 if answers else in_a_row + 1
        if in_a_row >= failures:
            open_until = now + cooldown_s
    return made


LET_THROUGH = Exercise(
    name="let_through",
    number="05.4",
    difficulty=4,
    reference=let_through,
    cases=(
        ([(0, True), (1, False), (2, True), (3, False), (4, True), (5, False), (6, True)], 3, 10),
        ([(0, False), (1, False), (2, False), (3, True), (11, True), (12, True), (13, False)], 3, 10),
        ([(0, False), (1, False), (2, False), (13, False), (14, True), (22, True), (23, True)], 3, 10),
        ([(0, False), (0.5, True), (2, False), (2.5, True), (3, True)], 1, 1),
        ([(0, False), (1, False), (9, False), (12, True)], 2, 10),
    ),
    wrong=(
        Wrong(_never_tries_again, "open is not for ever: `cooldown_s` after the last fault a call may try again"),
        Wrong(_any_faults_count, "faults must come in a row: an answer between them sets the count back to 0"),
        Wrong(_forgets_when_cool, "after the cool-down one fault is enough to open it again: keep the count"),
        Wrong(_tries_too_late, "at exactly `cooldown_s` after the last fault a call may try: >= and not >"),
        Wrong(_counts_refused_calls, "a refused call never met the server: it neither counts nor moves the time"),
    ),
    hint="a call is made unless the breaker is open; `failures` faults in a row open it until now + cooldown_s",
    after="kvlab's breaker also lets only one thread try at a time.",
)
