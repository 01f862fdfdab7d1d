"""The exercises of notebook 05, the Redis tier: TTLs of a chain, the fetched prefix, a breaker, SET on the wire."""

from __future__ import annotations

import math

from kvlab.course.exercises.engine import Exercise, Wrong


def usable_until(expires: list[int]) -> list[int]:
    """Until when each block of a chain can be used: not longer than any block before it."""
    until: list[int] = []
    for when in expires:
        until.append(min(when, until[-1]) if until else when)
    return until


def _each_for_itself(expires: list[int]) -> list[int]:
    return expires


def _chain_dies_at_once(expires: list[int]) -> list[int]:
    return [min(expires)] * len(expires) if expires else []


def _from_the_end(expires: list[int]) -> list[int]:
    return usable_until(expires[::-1])[::-1]


USABLE_UNTIL = Exercise(
    name="usable_until",
    number="05.1",
    difficulty=2,
    reference=usable_until,
    cases=(([50, 80, 30, 90],), ([10, 20, 30],), ([30, 20, 10],), ([7],), ([],)),
    wrong=(
        Wrong(_each_for_itself, "a block whose parent is gone is never asked for: look at all blocks before it"),
        Wrong(_chain_dies_at_once, "the blocks before the one that expires go on: each depends on those before it"),
        Wrong(_from_the_end, "the other way round: a block needs its ancestors, not its descendants"),
    ),
    hint="go from the front and keep the smallest expiry seen so far",
)


def fetched_prefix(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    """The blocks that can be used: `values` up to the first that did not come, whatever EXISTS said before."""
    prefix: list[bytes] = []
    for value in values:
        if value is None:
            break
        prefix.append(value)
    return prefix


def _trusts_exists(existed: list[bool], values: list[bytes | None]) -> list[bytes | None]:
    count = existed.index(False) if False in existed else len(existed)
    return values[:count]


def _closes_the_gap(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return [value for value in values if value is not None]


def _asks_both(existed: list[bool], values: list[bytes | None]) -> list[bytes]:
    return fetched_prefix(existed, [v if e else None for e, v in zip(existed, values, strict=True)])


FETCHED_PREFIX = Exercise(
    name="fetched_prefix",
    number="05.2",
    difficulty=3,
    reference=fetched_prefix,
    cases=(
        ([True, True, True, False], [b"a", b"b", b"c", None]),
        ([True, True, True, True], [b"a", None, b"c", b"d"]),
        ([True, False, False], [b"a", b"b", None]),
        ([False, False], [None, None]),
        ([True, True], [None, b"b"]),
    ),
    wrong=(
        Wrong(_trusts_exists, "EXISTS spoke of a moment that is over: a key may be gone when GET comes, so stop there"),
        Wrong(_closes_the_gap, "without its gap the list says that block 2 is block 1: stop at the first None"),
        Wrong(_asks_both, "a block that another worker saved meanwhile is as good as any: only GET decides"),
    ),
    hint="forget what existed; take values from the front until one is None",
)


def let_through(calls: list[tuple[float, bool]], failures: int, cooldown_s: float) -> list[bool]:
    """Which calls a breaker lets through: `calls` has each one's time and whether the server would answer it."""
    in_a_row, open_until, made = 0, float("-inf"), []
    for now, answers in calls:
        made.append(now >= open_until)
        if made[-1]:
            in_a_row = 0 if answers else in_a_row + 1
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


LET_THROUGH = Exercise(
    name="let_through",
    number="05.3",
    difficulty=4,
    reference=let_through,
    cases=(
        ([(0, True), (1, False), (2, True), (3, False), (4, True), (5, False), (6, True)], 3, 10),
        ([(0, False), (1, False), (2, False), (3, True), (11, True), (12, True), (13, False)], 3, 10),
        ([(0, False), (1, False), (2, False), (13, False), (14, True), (22, True), (23, True)], 3, 10),
        ([(0, False), (0.5, True), (2, False), (2.5, True), (3, True)], 1, 1),
    ),
    wrong=(
        Wrong(_never_tries_again, "open is not for ever: `cooldown_s` after the last fault a call may try again"),
        Wrong(_any_faults_count, "faults must come in a row: an answer between them sets the count back to 0"),
        Wrong(_forgets_when_cool, "after the cool-down one fault is enough to open it again: keep the count"),
        Wrong(_tries_too_late, "at exactly `cooldown_s` after the last fault a call may try: >= and not >"),
    ),
    hint="a call is made unless the breaker is open; `failures` faults in a row open it until now + cooldown_s",
)


def pack_set(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    """SET key value PX ttl_ms in the Redis protocol; the pieces of the value stay the objects that they are."""
    size = sum(len(piece) for piece in pieces)
    ttl = b"%d" % ttl_ms
    head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, size)
    tail = b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)
    return [head, *pieces, tail]


def _one_string(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    return [b"".join(pack_set(key, pieces, ttl_ms))]


def _pieces_as_arguments(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    arguments = [b"SET", key, *pieces, b"PX", b"%d" % ttl_ms]
    packed = [b"*%d\r\n" % len(arguments)]
    return packed + [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]


def _value_without_its_end(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    head, *middle, tail = pack_set(key, pieces, ttl_ms)
    return [head, *middle, tail.removeprefix(b"\r\n")]


def _ttl_without_its_length(key: bytes, pieces: list[bytes], ttl_ms: int) -> list[bytes]:
    head, *middle, _ = pack_set(key, pieces, ttl_ms)
    return [head, *middle, b"\r\n$2\r\nPX\r\n:%d\r\n" % ttl_ms]


PACK_SET = Exercise(
    name="pack_set",
    number="05.4",
    difficulty=3,
    reference=pack_set,
    cases=(
        (b"kv:a", [b"header", b"payload"], 5000),
        (b"kv:\r\n\x00", [b"one piece"], 86_400_000),
        (b"k", [b"", b"x" * 300, b"\r\n"], 1),
    ),
    wrong=(
        Wrong(_one_string, "joining copies every byte of the value: return head, pieces and tail apart"),
        Wrong(_pieces_as_arguments, "the pieces are one argument: one length, their sum, before the first of them"),
        Wrong(_value_without_its_end, "every argument ends with \\r\\n, the value too: begin the tail with it"),
        Wrong(_ttl_without_its_length, "a command has only strings: the number as digits, with its length before it"),
    ),
    hint="[head, *pieces, tail]: the head ends after the value's length, the tail begins with the value's \\r\\n",
)
