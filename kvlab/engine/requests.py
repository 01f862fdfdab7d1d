"""What a scheduler takes and gives: the record of a request, and the outputs of a step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

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
