"""Fetch or compute? For one request, the fastest way to have the KV of its prompt, judged by what was measured.

Two curves are fitted while requests run, and nothing is configured:

    fetch n blocks from a tier        a + b n
    compute the tokens s … t - 1      e + c (t - s) + d (t² - s²)

`a` and `e` are what a call costs, `b` a block's way, `c` the work for a token, and `d` its attention to all tokens
before it. Older observations count less than newer ones of about their size. If three in a row are far off on the
same side, the wire or the machine has changed, and everything before them is forgotten.

A plan has a front that is computed while the blocks behind it are fetched (Cake, arXiv 2410.03065), gaps of lost
blocks that are computed after that, and a tail. Each of these may be empty.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import InputError

WINDOW: Final = 16
"""The most observations of about one size that a curve is fitted to. A size that is seldom seen is not forgotten."""
HALF_LIFE: Final = 6
"""After so many newer observations of about its size, one counts half."""
CHANGED: Final = 1.5
CONFIRMED: Final = 3
"""So many observations in a row that are off by the factor CHANGED, on the same side, are a change. They are compared
with sizes that were seen before; until then the curve stays as it was."""
TERM: Final = 0.002
"""The mean square of relative errors by which a further term must improve a fit."""
SHORTEST_S, LONGEST_S = 1e-9, 1e6
LEARN: Final = 0.2
FADE: Final = 0.98
"""The share of a plan's error that the next plan of its kind takes over, and what the other kinds keep of theirs."""
CAREFUL: Final = 2.0
"""By so much at most a single slow observation makes the next prediction of its size worse."""
EXPLORE: Final = 16
"""After so many plans without a fetch from a tier that had blocks, one is fetched only to learn how long it takes."""
FRONTS: Final = 32
"""The most lengths of a front that are tried at first; then those around the best one."""


Observation = tuple[Sequence[float], float]
"""The terms, the second of them a size, and the seconds that it took."""


@dataclass(frozen=True)
class _Fit:
    """A sum of terms, and by size how far observations are from it, where no such sum fits all sizes."""

    coefficients: NDArray[np.float64]
    off: dict[int, float] = field(default_factory=dict)

    def value(self, terms: Sequence[float]) -> float:
        return self.sum(terms) * self._correction(terms[1]) if self.off else self.sum(terms)

    def sum(self, terms: Sequence[float]) -> float:
        return float(self.coefficients @ np.asarray(terms))

    def _correction(self, size: float) -> float:
        """Interpolated between the two sizes beside this one."""
        at = math.log2(max(size, 1))
        below = max((s for s in self.off if s <= at), default=min(self.off))
        above = min((s for s in self.off if s >= at), default=max(self.off))
        share = (at - below) / (above - below) if above > below else 0.0
        return (1 - share) * self.off[below] + share * self.off[above]


class Curve:
    """A sum of terms with coefficients of 0 or more, fitted to noisy observations by their relative errors.

    >>> curve = Curve(2)
    >>> for n in (1, 2, 4, 8, 16):
    ...     curve.observe((1, n), 0.001 + 0.0005 * n)
    >>> round(curve.predict((1, 32)), 4)
    0.017
    """

    def __init__(self, terms: int) -> None:
        self._seen: dict[int, deque[Observation]] = {}  # by size, each twice the one before
        self._doubtful: list[Observation] = []  # the last ones, if they are off, all on the same side
        self._side = 0
        self._subsets = [s for size in range(1, terms + 1) for s in itertools.combinations(range(terms), size)]
        self._terms = terms
        self._fit: _Fit | None = None
        self._basis: _Fit | None = None  # the fit before the doubtful ones, with which the next ones are compared

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """Take one measurement into account. One that no step can have is a clock's fault: ignored."""
        if not SHORTEST_S <= seconds <= LONGEST_S:
            return
        kept = [(terms, seconds)]
        if self._basis is not None and _size(terms) in self._basis.off:  # a new size says nothing of a change
            expected = self._basis.value(terms)
            side = (seconds > CHANGED * expected) - (seconds < expected / CHANGED)
            self._doubtful = [*(self._doubtful if side == self._side else []), *kept] if side else []
            self._side = side
            if len(self._doubtful) == CONFIRMED:
                kept, self._doubtful = self._doubtful, []
                self._seen.clear()
        for x, took in kept:
            self._seen.setdefault(_size(x), deque(maxlen=WINDOW)).append((x, took))
        self._fit = self._fitted()
        if not self._doubtful:
            self._basis = self._fit

    def predict(self, terms: Sequence[float]) -> float | None:
        """Seconds for these terms; None before the first observation."""
        return None if self._fit is None else self._fit.value(terms)

    def _fitted(self) -> _Fit:
        """Take the terms that explain the observations, as few as do; then how far each size is from them."""
        seen = [observation for same in self._seen.values() for observation in same]
        took = np.array([seconds for _, seconds in seen])
        weight = 0.5 ** (np.concatenate([np.arange(len(same))[::-1] for same in self._seen.values()]) / HALF_LIFE)
        weight = np.sqrt(weight / weight.sum())
        scaled = np.array([x for x, _ in seen], dtype=np.float64) / took[:, None] * weight[:, None]
        best, coefficients = math.inf, np.zeros(self._terms)
        for subset in self._subsets:
            columns = scaled[:, subset]
            size = np.linalg.norm(columns, axis=0)
            if not size.all():
                continue
            found = np.linalg.lstsq(columns / size, weight, rcond=None)[0] / size
            error = float(((columns @ found - weight) ** 2).sum()) + TERM * len(subset)
            if (found >= 0).all() and error < best - 1e-9:
                best, coefficients = error, np.zeros(self._terms)
                coefficients[list(subset)] = found
        fit = _Fit(coefficients)
        off = {n: statistics.median(t / max(fit.sum(x), 1e-12) for x, t in same) for n, same in self._seen.items()}
        for x, t in self._doubtful:  # if it was slow, it may be so again: be careful with this size
            off[_size(x)] *= min(max(1.0, t / max(fit.sum(x) * off[_size(x)], 1e-12)), CAREFUL)
        return _Fit(coefficients, off)


def _size(terms: Sequence[float]) -> int:
    """Observations of about the same size have the same number: the nearest power of two."""
    return round(math.log2(max(terms[1], 1)))


@dataclass(frozen=True)
class Step:
    """Blocks to fetch, or tokens to compute.

    Attributes:
        start, stop: tokens start … stop - 1.
        tier: the tier to fetch from; "" for computing.
    """

    start: int
    stop: int
    tier: str = ""


@dataclass
class Plan:
    """What to do for one request, and why.

    Attributes:
        front: computed while `fetches` run; at most one step.
        fetches: blocks to fetch, in the order of the tokens.
        rest: computed afterwards: gaps, then the tail, which is never empty.
        predicted_s: seconds until the logits of the last token are there; NaN if a curve has no observation yet.
        rejected: predicted seconds of computing everything ("compute"), of fetching all blocks that are there
            ("fetch"), and of the best mixture ("mix"), without the one that was chosen.
        why: the choice in a word.
        probe: a block to fetch in the background, which the request does not wait for: its tier was left out for
            long, and a wire may have become fast.
        took_s: what it really took, once that is known.
    """

    front: tuple[Step, ...]
    fetches: tuple[Step, ...]
    rest: tuple[Step, ...]
    predicted_s: float
    why: str
    rejected: dict[str, float] = field(default_factory=dict)
    probe: Step | None = None
    took_s: float = math.nan

    def report(self) -> str:
        """The choice, the rejected ones with their predicted times, and what it really took."""
        shown = [f"{step.start}-{step.stop} {step.tier or 'computed'}" for step in self.steps]
        others = [f"{name} {1000 * seconds:.1f} ms" for name, seconds in self.rejected.items()]
        took = "" if math.isnan(self.took_s) else f"; took {1000 * self.took_s:.1f} ms"
        predicted = "unknown" if math.isnan(self.predicted_s) else f"{1000 * self.predicted_s:.1f} ms"
        return (
            f"{self.why}: {', '.join(shown)}; predicted {predicted}{took}; rejected: {', '.join(others) or 'nothing'}"
        )

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps: the front and the fetches, which run together, then the rest."""
        return (*self.front, *self.fetches, *self.rest)


class Planner:
    """The curves of one engine, and the choices that follow from them.

    Args:
        block_tokens: tokens in a block.
        overlap: whether the engine can compute while it fetches.
        chooses: False to fetch whatever there is, as a cache without a planner does.
    """

    def __init__(self, block_tokens: int, overlap: bool = True, chooses: bool = True) -> None:
        self.block_tokens, self.overlap, self.chooses = block_tokens, overlap, chooses
        self.prefill = Curve(3)
        self.fetches: dict[str, Curve] = {}
        self._beyond = dict.fromkeys(("compute", "fetch", "mix"), 1.0)  # what plans of a kind took by their steps' sum
        self._unused: dict[str, int] = {}  # plans without a fetch from a tier, though it had blocks

    # --- measurements ---------------------------------------------------------------------------
    def fetched(self, tier: str, blocks: int, seconds: float) -> None:
        """Take note of a fetch of `blocks` from a tier."""
        if blocks > 0:
            self.fetches.setdefault(tier, Curve(2)).observe((1, blocks), seconds)

    def computed(self, start: int, stop: int, seconds: float) -> None:
        """Take note of a prefill of the tokens start … stop - 1."""
        if stop > start:
            self.prefill.observe(self._terms(start, stop), seconds)

    def finished(self, plan: Plan, seconds: float) -> None:
        """Take note of what a plan took in all, with what no step shows: planning, and that overlapping is not free."""
        plan.took_s = seconds
        kind = self._beyond.get(plan.why)
        if kind is None or not plan.predicted_s > 0 or not SHORTEST_S <= seconds <= LONGEST_S:
            return
        for other in self._beyond:  # an opinion that is not tried fades
            self._beyond[other] = 1 + (self._beyond[other] - 1) * FADE
        latest = min(max(seconds / plan.predicted_s, 1 / CHANGED), CHANGED)
        self._beyond[plan.why] = kind * latest**LEARN

    def fetch_s(self, tier: str, blocks: int) -> float:
        """Predicted seconds to fetch `blocks`; NaN if nothing was fetched from this tier yet."""
        if not blocks:
            return 0.0
        predicted = self.fetches[tier].predict((1, blocks)) if tier in self.fetches else None
        return math.nan if predicted is None else predicted

    def compute_s(self, start: int, stop: int) -> float:
        """Predicted seconds to compute the tokens start … stop - 1; NaN if nothing was computed yet."""
        if stop <= start:
            return 0.0
        predicted = self.prefill.predict(self._terms(start, stop))
        return math.nan if predicted is None else predicted

    @staticmethod
    def _terms(start: int, stop: int) -> tuple[float, float, float]:
        return 1.0, stop - start, stop * stop - start * start

    # --- plans ----------------------------------------------------------------------------------
    def plan(self, where: Sequence[str], tokens: int, filled: int = 0) -> Plan:
        """Choose for a prompt of `tokens` tokens.

        Args:
            where: for each of its full blocks, the tier that has it, "" if none has.
            filled: leading tokens whose KV is there already: the blocks that the page pool shares.

        Raises:
            InputError: the numbers do not fit each other.
        """
        B = self.block_tokens
        if not (0 <= filled <= tokens and tokens >= 1 and len(where) * B <= tokens) or filled % B:
            raise InputError(f"expected filled blocks of {B} and {len(where)} full blocks in {tokens} tokens")
        first = filled // B
        last = max((i + 1 for i, tier in enumerate(where) if tier and i >= first), default=first)
        compute = self._timed(where, tokens, first, first, first)
        if last == first:
            compute.predicted_s *= self._beyond["compute"]
            return self._note(where, compute, "compute", {})
        fetch = self._timed(where, tokens, first, first, last)
        if not self.chooses:
            return self._note(where, fetch, "fetch, as told", {})
        if math.isnan(fetch.predicted_s) or math.isnan(compute.predicted_s):
            return self._note(where, fetch, "fetch, to learn its time", {})
        options = {"compute": compute, "fetch": fetch, "mix": self._best_mix(where, tokens, first, last)}
        for name, plan in options.items():
            plan.predicted_s *= self._beyond[name]
        why = min(options, key=lambda name: (options[name].predicted_s, name == "mix"))
        rejected = {name: plan.predicted_s for name, plan in options.items() if name != why}
        return self._note(where, options[why], why, rejected)

    def _best_mix(self, where: Sequence[str], tokens: int, first: int, last: int) -> Plan:
        """The best of all fronts and ends; with many blocks, of a grid and what is around its best."""
        stops = [i for i in range(first + 1, last + 1) if where[i - 1] and (i == last or not where[i])]

        def best_of(fronts: Iterator[int] | range) -> tuple[float, int, int]:
            tried = (
                (self._timed(where, tokens, first, k, m).predicted_s, k, m) for k in fronts for m in stops if k < m
            )
            return min(tried, default=(math.inf, first, last))

        step = -(-(last - first) // FRONTS)
        _, k, m = best_of(range(first, last, step))
        if step > 1:
            _, k, m = best_of(iter({*range(max(first, k - step), min(last, k + step)), k}))
        return self._timed(where, tokens, first, k, m)

    def _timed(self, where: Sequence[str], tokens: int, first: int, front: int, stop: int) -> Plan:
        """Compute blocks first … front - 1, fetch what there is of front … stop - 1, compute the rest."""
        B = self.block_tokens
        ahead = (Step(first * B, front * B),) if front > first else ()
        runs = [(tier, len(list(group))) for tier, group in itertools.groupby(where[front:stop])]
        fetches: list[Step] = []
        gaps: list[Step] = []
        at = front
        for tier, length in runs:
            step = Step(at * B, (at + length) * B, tier)
            (fetches if tier else gaps).append(step)
            at += length
        tail = Step(min(at * B, tokens - 1), tokens)  # the logits of the last token are needed
        rest = (*gaps, tail)
        counts = {tier: sum(n for t, n in runs if t == tier) for tier, _ in runs if tier}
        waiting = sum(self.fetch_s(tier, n) for tier, n in counts.items())
        computing = sum(self.compute_s(step.start, step.stop) for step in ahead)
        begin = max(waiting, computing) if self.overlap else waiting + computing
        begin = math.nan if math.isnan(waiting + computing) else begin
        return Plan(ahead, tuple(fetches), rest, begin + sum(self.compute_s(s.start, s.stop) for s in rest), "")

    def _note(self, where: Sequence[str], plan: Plan, why: str, rejected: dict[str, float]) -> Plan:
        """Complete a plan, and count the tiers that it leaves out."""
        used = {step.tier for step in plan.fetches}
        for tier in sorted({tier for tier in where if tier}):
            self._unused[tier] = 0 if tier in used else self._unused.get(tier, 0) + 1
            if self._unused[tier] == EXPLORE:
                self._unused[tier] = 0
                at = max(i for i, has in enumerate(where) if has == tier)
                plan.probe = Step(at * self.block_tokens, (at + 1) * self.block_tokens, tier)
        plan.why, plan.rejected = why, rejected
        return plan
