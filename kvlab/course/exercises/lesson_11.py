"""The exercises of notebook 11, GPU benchmarks: intensity of a decode step, where fetching begins to win, int8."""

from __future__ import annotations

from kvlab.course.exercises.engine import Exercise, Wrong


# --- 11.1: arithmetic intensity -----------------------------------------------------------------
def decode_intensity(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    """Operations for each byte that one decode step reads; every number has two bytes."""
    past = kv_numbers * context
    operations = batch * (2 * weights + 2 * group * past)
    numbers = weights + batch * past
    return operations / (2 * numbers)


def _weights_for_each(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    past = kv_numbers * context
    return (2 * weights + 2 * group * past) / (2 * (weights + past))


def _one_cache_for_all(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    past = kv_numbers * context
    return batch * (2 * weights + 2 * group * past) / (2 * (weights + past))


def _one_operation(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    return decode_intensity(weights, kv_numbers, context, batch, group) / 2


def _by_number(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    return decode_intensity(weights, kv_numbers, context, batch, group) * 2


def _without_group(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    return decode_intensity(weights, kv_numbers, context, batch, 1)


def _kv_for_each_head(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    past = kv_numbers * context
    return batch * (2 * weights + 2 * group * past) / (2 * (weights + batch * group * past))


def _operations_of_one(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    return decode_intensity(weights, kv_numbers, context, batch, group) / batch


def _weights_used_once(weights: int, kv_numbers: int, context: int, batch: int, group: int) -> float:
    past = kv_numbers * context
    return (2 * weights + 2 * group * batch * past) / (2 * (weights + batch * past))


DECODE_INTENSITY = Exercise(
    name="decode_intensity",
    number="11.1",
    difficulty=3,
    reference=decode_intensity,
    cases=(
        (1000, 10, 0, 1, 4),
        (1000, 10, 0, 8, 4),
        (1000, 10, 50, 1, 4),
        (1000, 10, 50, 8, 4),
        (8_000_000_000, 65_536, 2048, 64, 4),
    ),
    wrong=(
        Wrong(_weights_for_each, "the weights are read once for the whole batch, not once for each request"),
        Wrong(_one_cache_for_all, "each request of the batch has KV of its own, which is read too"),
        Wrong(_one_operation, "a multiply and an add are two operations"),
        Wrong(_by_number, "per byte, please: each number has two bytes"),
        Wrong(_without_group, "`group` query heads use each number of KV: 2 * group operations"),
        Wrong(_kv_for_each_head, "the query heads of a group share the KV: it is read once, and used `group` times"),
        Wrong(_operations_of_one, "each request of the batch has its operations: count them `batch` times"),
        Wrong(
            _weights_used_once,
            "the weights are read once, but used for each request: 2 operations a weight and request",
        ),
    ),
    hint="count apart, for a batch of 8: the operations, and the numbers that are read; each has two bytes",
    after="The package counts the same way: kvlab.lab.gpu_model.decode_work.",
)


# --- 11.2: from how many tokens fetching wins ---------------------------------------------------
def fetch_wins_from(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    """The fewest tokens whose KV is fetched sooner than computed; None if there are none up to `longest`."""
    for n in range(1, longest + 1):
        compute = n * token_s + n * (n + 1) / 2 * pair_s
        fetch = latency_s + n * kv_bytes / bytes_per_s
        if fetch < compute:
            return n
    return None


def _without_latency(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return fetch_wins_from(token_s, pair_s, 0.0, kv_bytes, bytes_per_s, longest)


def _without_pairs(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return fetch_wins_from(token_s, 0.0, latency_s, kv_bytes, bytes_per_s, longest)


def _latency_for_each_token(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return fetch_wins_from(token_s - latency_s, pair_s, 0.0, kv_bytes, bytes_per_s, longest)


def _by_bandwidth_alone(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return 1 if kv_bytes / bytes_per_s < token_s else None


def _stops_early(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    if kv_bytes / bytes_per_s >= token_s:
        return None
    return fetch_wins_from(token_s, pair_s, latency_s, kv_bytes, bytes_per_s, longest)


def _ties_win(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    for n in range(1, longest + 1):
        if latency_s + n * kv_bytes / bytes_per_s <= n * token_s + n * (n + 1) / 2 * pair_s:
            return n
    return None


def _not_the_longest(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return fetch_wins_from(token_s, pair_s, latency_s, kv_bytes, bytes_per_s, longest - 1)


def _squares(
    token_s: float, pair_s: float, latency_s: float, kv_bytes: int, bytes_per_s: float, longest: int
) -> int | None:
    return fetch_wins_from(token_s - pair_s, 2 * pair_s, latency_s, kv_bytes, bytes_per_s, longest)


FETCH_WINS_FROM = Exercise(
    name="fetch_wins_from",
    number="11.2",
    difficulty=3,
    reference=fetch_wins_from,
    cases=(
        (1e-3, 0.0, 0.010, 100_000, 1e9, 100),
        (1e-3, 0.0, 0.010, 1_000_000, 5e8, 1000),
        (1e-3, 1e-6, 0.010, 1_000_000, 5e8, 5000),
        (1e-3, 1e-6, 0.010, 1_000_000, 5e8, 1000),
        (1e-3, 0.0, 0.0, 100_000, 1e9, 10),
        (2.0, 0.0, 1.0, 1, 1.0, 10),
        (2.0, 0.0, 1.0, 1, 1.0, 2),
        (1.0, 1.0, 20.0, 1, 2.0, 50),
    ),
    wrong=(
        Wrong(_without_latency, "the first byte comes after `latency_s`: add it to the fetch, once"),
        Wrong(
            _stops_early, "do not give up early: the pairs grow faster than the bytes, so a long prefix may still win"
        ),
        Wrong(_ties_win, "equally fast is not faster: the fetch has to win"),
        Wrong(_not_the_longest, "`longest` itself counts too: range(1, longest + 1)"),
        Wrong(
            _squares, "n tokens have n * (n + 1) / 2 pairs, not n * n: each token looks at itself and at those before"
        ),
        Wrong(_without_pairs, "n tokens have n * (n + 1) / 2 pairs, and each costs `pair_s`"),
        Wrong(_latency_for_each_token, "`latency_s` is paid once for a fetch, not for each token"),
        Wrong(
            _by_bandwidth_alone, "the bandwidth alone does not say it: compare the times of n tokens, n = 1, 2, 3, …"
        ),
    ),
    hint="print both times for n = 1, 2 and 3, and compare them with a calculation by hand",
    after="kvlab.lab.gpu_model.crossover solves the same equation without a loop.",
)


# --- 11.3: what int8 does to the break-even -----------------------------------------------------
def int8_break_even(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    """Bytes a second of a wire over which int8 KV is there as soon as it is computed; None if no wire is enough."""
    record = numbers + 2 * numbers / scale_every
    unpack_s = (record + 2 * numbers) / unpack_bytes_per_s
    wire_s = 1 / tokens_per_s - unpack_s
    return record / wire_s if wire_s > 0 else None


def _without_unpacking(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    return int8_break_even(tokens_per_s, numbers, scale_every, float("inf"))


def _without_scales(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    wire_s = 1 / tokens_per_s - 3 * numbers / unpack_bytes_per_s
    return numbers / wire_s if wire_s > 0 else None


def _half_of_bf16(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float:
    return numbers * tokens_per_s


def _only_read(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    record = numbers + 2 * numbers / scale_every
    wire_s = 1 / tokens_per_s - record / unpack_bytes_per_s
    return record / wire_s if wire_s > 0 else None


def _negative(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float:
    record = numbers + 2 * numbers / scale_every
    return record / (1 / tokens_per_s - (record + 2 * numbers) / unpack_bytes_per_s)


def _overlapped(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    record = numbers + 2 * numbers / scale_every
    unpack_s = (record + 2 * numbers) / unpack_bytes_per_s
    return record * tokens_per_s if unpack_s < 1 / tokens_per_s else None


def _only_written(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    record = numbers + 2 * numbers / scale_every
    wire_s = 1 / tokens_per_s - 2 * numbers / unpack_bytes_per_s
    return record / wire_s if wire_s > 0 else None


def _scale_of_one_byte(tokens_per_s: float, numbers: int, scale_every: int, unpack_bytes_per_s: float) -> float | None:
    return int8_break_even(tokens_per_s, numbers, 2 * scale_every, unpack_bytes_per_s)


INT8_BREAK_EVEN = Exercise(
    name="int8_break_even",
    number="11.3",
    difficulty=3,
    reference=int8_break_even,
    cases=(
        (1000.0, 10_000, 64, 1e12),
        (1000.0, 10_000, 64, 1e8),
        (30_000.0, 65_536, 128, 2e12),
        (30_000.0, 65_536, 128, 1e9),
    ),
    wrong=(
        Wrong(
            _without_unpacking, "a token's KV is also unpacked, and in that time the wire has nothing to show for it"
        ),
        Wrong(_without_scales, "`scale_every` numbers share a scale of two bytes, which travels too"),
        Wrong(_half_of_bf16, "half of the bytes is a first guess: the scales travel too, and unpacking takes time"),
        Wrong(_only_read, "unpacking reads the record and writes two bytes for each number"),
        Wrong(
            _overlapped, "only one of the two happens at a time: take the time of unpacking away from that of computing"
        ),
        Wrong(_only_written, "unpacking reads the bytes of the record too"),
        Wrong(_scale_of_one_byte, "a scale has two bytes"),
        Wrong(_negative, "if unpacking alone takes longer than computing, no wire is fast enough: None"),
    ),
    hint="print for one token: the bytes of its record, the seconds of unpacking, the seconds that are left",
    after="Unpacking on the device is what kvlab does: int8 crosses the bus as int8 (kvlab.core.precisions.convert).",
)
