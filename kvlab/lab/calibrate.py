"""What work costs in worker processes of this machine: the terms of `Costs`, measured before there is a load.

Requests of chosen lengths go to all workers at the same time, so that each worker has the company that it has later;
only what comes from the store is fetched by one worker after the other.

    idle       one request each, after a pause
    streaming  many requests each at once; what counts is the time from one first token to the next

A worker that has paused takes some milliseconds longer, and in a stream several short prompts share a step. So a light
load is predicted from the first kind, and a load that never lets a worker rest from the second one.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from kvlab.engine.pages import PAGE_TOKENS
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import Answer, WorkerGroup
from kvlab.errors import KVLabError
from kvlab.lab.costs import Costs, Link
from kvlab.model import Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of

COLD: Final = ((16, 0), (64, 0), (128, 0), (256, 0), (512, 0), (1024, 0), (1536, 0))
WARM: Final = ((16, 256), (64, 256), (16, 1024), (64, 1024), (256, 1024), (16, 1600))
"""Prefills that are timed: tokens to compute, and tokens before them that are on the device; whole blocks of them."""
CONTEXTS: Final = (64, 512, 1024)
FETCHED: Final = (64, 256, 512, 1024, 1536)
"""Tokens that are fetched."""
OWN: Final = 16
PAUSE_S: Final = 0.05
SAVED_S: Final = 0.3
"""So long after a request everything is saved."""
STREAM: Final = 8
STEPS: Final = 24
ROOMY: Final = 1024
TIGHT: Final = 160
"""Pages, with which a worker keeps all that is asked here, and with which two long requests displace all."""
HOST_BYTES: Final = 256 << 20
LONG: Final = 1400


@dataclass(frozen=True)
class Calibrated:
    """Costs of workers that rest before each request, and of workers that never do."""

    idle: Costs
    streaming: Costs


def calibrate(settings: WorkerSettings, workers: int = 2, rounds: int = 5) -> Calibrated:
    """Measure prefills, decode steps, and fetches from host memory and from the store, if there is one.

    Args:
        settings: of the workers; how many pages and how much host memory they have does not count.

    Raises:
        KVLabError: workers do not start, or a request did not find what it should have found.
    """
    idle, streaming = _compute(settings, workers, rounds)
    host = store = Link()
    if settings.store:
        host, store = (_link(settings, workers, rounds, idle.kv_bytes, tier) for tier in ("host", "store"))
    return Calibrated(replace(idle, host=host, store=store), replace(streaming, host=host, store=store))


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of 0 or more, by least squares of relative errors."""
    weights = 1 / np.asarray(seconds)
    matrix = np.asarray(terms, float) * weights[:, None]
    chosen = list(range(matrix.shape[1]))
    while True:
        solved = np.linalg.lstsq(matrix[:, chosen], np.ones(len(weights)), rcond=None)[0]
        if (solved >= 0).all():
            fitted = dict(zip(chosen, solved.tolist(), strict=True))
            return [fitted.get(i, 0.0) for i in range(matrix.shape[1])]
        chosen.pop(int(solved.argmin()))


def fitted(
    kv_bytes: int,
    lengths: Sequence[tuple[int, int]],
    prefills: Sequence[float],
    steps: Sequence[tuple[int, int, float]],
    chunk: int,
    batch: int,
) -> Costs:
    """Return the costs that come closest to what was measured.

    Args:
        lengths, prefills: tokens computed and tokens before them, and the seconds of each.
        steps: requests of a decode step, tokens that they attend to, and its seconds.
        chunk, batch: see `Costs`.
    """
    prefill = fit([(1, n, past, n * past + n * (n + 1) / 2) for n, past in lengths], prefills)
    step = fit([(1, requests, tokens) for requests, tokens, _ in steps], [seconds for *_, seconds in steps])
    return Costs(
        kv_bytes=kv_bytes,
        prefill_s=prefill[0],
        prefill_token_s=prefill[1],
        prefill_past_s=prefill[2],
        prefill_pair_s=prefill[3],
        step_s=step[0],
        step_request_s=step[1],
        step_token_s=step[2],
        chunk=chunk,
        batch=batch,
        source="measured on this machine",
    )


# --- requests -----------------------------------------------------------------------------------
class _Asker:
    """Asks all workers of a group, each time with texts that none has seen."""

    def __init__(self, group: WorkerGroup, workers: int) -> None:
        self._group, self.workers = group, workers
        self._text = held_out_tokens(Tokenizer())
        self._at = 0

    def text(self, length: int) -> list[int]:
        """Return tokens from another place than before."""
        self._at = (self._at + 1013) % (len(self._text) - 2048)
        return self._text[self._at : self._at + length]

    def ask(self, prompts: Sequence[list[int]], new: int = 1) -> list[Answer]:
        """Send prompts to the workers in turn, and wait for all answers."""
        answers = [self._group.submit(prompt, new, stop_at_eos=False) for prompt in prompts]
        for answer in answers:
            answer.result()
        return answers

    def ask_all(self, prompt: list[int]) -> list[Answer]:
        """Send the same prompt to each worker."""
        return self.ask([prompt] * self.workers)

    def ask_in_turn(self, prompt: list[int]) -> list[Answer]:
        """The same, one worker after the other."""
        return [answer for _ in range(self.workers) for answer in self.ask([prompt])]


def _found(answer: Answer, tier: str, tokens: int) -> None:
    record = answer.record
    if record is None or record.sources[tier] != tokens:
        found = None if record is None else dict(record.sources)
        raise KVLabError(f"a calibration was to find {tokens} tokens of {tier}, and found {found}")


# --- computing ----------------------------------------------------------------------------------
def _compute(settings: WorkerSettings, workers: int, rounds: int) -> tuple[Costs, Costs]:
    """Measure prefills, of workers that rest and of those that do not, and decode steps."""
    plain = replace(settings, pages=ROOMY, prefix_caching=True)
    lengths = (*COLD, *WARM)
    with WorkerGroup(workers, plain, router="round_robin") as group:
        asker = _Asker(group, workers)
        prefills = [
            [statistics.median(_prefills(asker, n, past, rounds, count)) for n, past in lengths]
            for count in (1, STREAM)
        ]
        batches = sorted({1, 2, settings.max_batch})
        steps = [(b, b * c, statistics.median(_steps(asker, b, c))) for b in batches for c in CONTEXTS]
    kv_bytes = spec_of(load_model(settings.model) if settings.model else load_model()).kv_bytes_per_token()

    idle, streaming = (
        fitted(kv_bytes, lengths, seconds, steps, chunk=settings.max_step_tokens, batch=settings.max_batch)
        for seconds in prefills
    )
    return idle, streaming


def _prefills(asker: _Asker, length: int, past: int, rounds: int, count: int) -> Iterator[float]:
    for number in range(rounds + 1):
        before = asker.text(past)
        if past:
            asker.ask_all(before)
        time.sleep(PAUSE_S)
        answers = asker.ask([before + asker.text(length) for _ in range(count * asker.workers)])
        for answer in answers:
            _found(answer, "device", past)
        if number:  # the first one warms up
            yield from _service(answers) if count > 1 else (answer.ttft_s for answer in answers)


def _service(answers: Sequence[Answer]) -> Iterator[float]:
    """Seconds that each worker takes for a request, from the end of its first step on."""
    for worker in {answer.workers[-1] for answer in answers}:
        ends = sorted(answer.token_at[0] for answer in answers if answer.workers[-1] == worker)
        later = [end for end in ends if end > ends[0] + 1e-3]  # those of one step come at about the same time
        if later:
            yield (later[-1] - ends[0]) / len(later)


def _steps(asker: _Asker, batch: int, context: int) -> Iterator[float]:
    """Seconds between two tokens, while a batch of each worker decodes around this context."""
    length = context - STEPS // 2
    answers = asker.ask([asker.text(length) for _ in range(batch * asker.workers)], STEPS + 2 * batch)
    for worker in {answer.workers[-1] for answer in answers}:
        own = [answer for answer in answers if answer.workers[-1] == worker]
        begin, end = max(a.token_at[0] for a in own), min(a.token_at[-1] for a in own)
        together = [t for t in own[0].token_at if begin < t <= end]
        yield from (b - a for a, b in itertools.pairwise(together))


# --- fetching -----------------------------------------------------------------------------------
def _link(settings: WorkerSettings, workers: int, rounds: int, kv_bytes: int, tier: str) -> Link:
    """Measure what a fetch adds to the time to first token: the same prefix is asked for again, from the device."""
    in_host = tier == "host"
    tight = replace(
        settings,
        pages=TIGHT,
        host_bytes=HOST_BYTES if in_host else 0,
        tiers={**settings.tiers, "planner": False},
    )
    added = []
    with ExitStack() as stack:
        group = stack.enter_context(WorkerGroup(workers, tight, router="round_robin"))
        asker = _Asker(group, workers)
        for tokens in FETCHED:
            seconds = list[float]()
            for number in range(rounds + 1):
                before = asker.text(tokens)
                asker.ask_all(before)
                time.sleep(SAVED_S)  # a save that has not begun is given up when others need its pages
                for _ in range(3):  # two of them are longer than the pool
                    asker.ask_all(asker.text(LONG))
                time.sleep(SAVED_S)
                ask = asker.ask_all if in_host else asker.ask_in_turn  # they share the way to the store
                fetched = ask(before + asker.text(OWN))
                time.sleep(PAUSE_S)
                there = ask(before + asker.text(OWN))
                for one, again in zip(fetched, there, strict=True):
                    _found(one, tier, tokens)
                    _found(again, "device", tokens)
                if number:
                    seconds += [one.ttft_s - again.ttft_s for one, again in zip(fetched, there, strict=True)]
            added.append(statistics.median(seconds))
    latency, per_byte = fit([(1, tokens * kv_bytes) for tokens in FETCHED], [max(s, 1e-4) for s in added])
    return Link(latency, 1 / per_byte if per_byte else float("inf"))


assert 2 * LONG > TIGHT * PAGE_TOKENS > LONG + OWN
