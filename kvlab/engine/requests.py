"""What a scheduler takes and gives: the record of a request, and the outputs of a step."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from kvlab.errors import KVLabError


class Busy(KVLabError):
    """As many requests as allowed are waiting. To be tried again later, or elsewhere."""


@dataclass
class Record:
    """One request: its answer, and where its time and its prompt's KV came from.

    Points in time are of the scheduler's clock, 0.0 until they come; durations are of `time.perf_counter`.

    Attributes:
        tokens: the answer so far.
        submitted_at, admitted_at, first_token_at, finished_at: points in time.
        probe_s, fetch_s: see `Prefill`. They end at the next step, so they are a little longer than the store took.
        prefill_s, decode_s: of the steps that computed its prompt, and of those that computed its later tokens.
        token_at: when each token was there.
        sources: prompt tokens by where their KV came from: "computed", "device", "host", "store".
        preemptions: how often it had to give its pages back.
        recomputed: tokens whose KV it needed again after that.
        reason: why it ended: "eos", "length", or "cancelled".
    """

    id: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    submitted_at: float = 0.0
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    probe_s: float = 0.0
    fetch_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    token_at: list[float] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    recomputed: int = 0
    reason: str = ""

    @property
    def queue_s(self) -> float:
        """Seconds until it was admitted for the first time; NaN if it never was."""
        return self.admitted_at - self.submitted_at if self.admitted_at else math.nan

    @property
    def ttft_s(self) -> float:
        """Seconds until its first token; NaN if there is none."""
        return self.first_token_at - self.submitted_at if self.tokens else math.nan


TTFT_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds of the buckets that count times to the first token."""


@dataclass
class Histogram:
    """Counts of numbers by range, and their sum.

    Attributes:
        bounds: the upper bound of each range, ascending; the last range has none.
        counts: one more than bounds.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one number."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Totals:
    """What a scheduler has counted over all requests.

    Attributes:
        sources: prompt tokens by where their KV came from, as in `Record.sources`. What a request finds a second time,
            after a preemption, is not among them.
        recomputed: tokens whose KV was needed again after a preemption.
        ended: requests by `Record.reason`.
        ttft: times to the first token in seconds, by whether some KV of the prompt was not computed.
    """

    sources: Counter[str] = field(default_factory=Counter)
    recomputed: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    ttft: dict[bool, Histogram] = field(default_factory=lambda: {hit: Histogram(TTFT_S) for hit in (True, False)})


@dataclass(frozen=True)
class Output:
    """What a step gives out: the next token of a request, or its end.

    Attributes:
        index: the number of the token in the answer, from 0.
        token: None at the end.
        record: at the end.
    """

    id: str
    index: int
    token: int | None
    record: Record | None = None
