"""The main claims of the source document, which the course tests. Notebook 10 compares them with measurements.

The source document is an engineering write-up of a distributed KV cache for LLM serving. The course
is based on this document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from IPython.display import Markdown


@dataclass(frozen=True)
class Claim:
    """One claim: its name, its question, the source document's number, the unit, and the notebook that measures it.

    Attributes:
        less: whether a smaller number is a better one.
    """

    name: str
    question: str
    source: float
    unit: str
    lesson: str
    less: bool = False


CLAIMS = (
    Claim("latency", "How much sooner does the first token come when the prefix is cached?", 11, "times", "00"),
    Claim("throughput", "How many times the throughput does the full system give?", 15, "times", "10"),
    Claim("hit_rate", "What share of blocks does a real chat trace find in the cache?", 65, "percent", "10"),
    Claim("compression", "How much smaller is KV as float16 + gzip than as float32?", 83, "percent saved", "04"),
    Claim("hashing", "How long does hashing a 1,000-token prefix take?", 10, "microseconds", "03", less=True),
    Claim("cost", "How much cheaper does a token get?", 95, "percent saved", "10"),
)


def table() -> Markdown:
    """Each claim's question, the number that the source document gives, and the notebook that measures it."""
    rows = [f"| {claim.question} | {claim.source:g} {claim.unit} | {claim.lesson} |" for claim in CLAIMS]
    head = ["| question | the source document says | notebook |", "|---|---|---|"]
    return Markdown("\n".join([*head, *rows]))  # type: ignore[no-untyped-call]


def verdicts(came_out: Mapping[str, float], guessed: Mapping[str, float]) -> Markdown:
    """The claims that have come out: question, the reader's guess, the source's number, what came out, the verdict.

    Args:
        came_out, guessed: by the names of the claims.
    """
    head = ["| question | you guessed | the source document says | came out | verdict |", "|---|---|---|---|---|"]
    rows = [
        f"| {claim.question} | {_number(guessed.get(claim.name))} | {claim.source:g} | "
        f"{_number(came_out[claim.name])} {claim.unit} | {verdict(claim, came_out[claim.name])} |"
        for claim in CLAIMS
        if claim.name in came_out
    ]
    return Markdown("\n".join([*head, *rows]))  # type: ignore[no-untyped-call]


def verdict(claim: Claim, came_out: float) -> str:
    """Whether at least as much came out as is claimed, and by which factor not.

    >>> verdict(CLAIMS[1], 16), verdict(CLAIMS[1], 5)
    ('holds', 'does not hold: 3.0 times too much')
    """
    said, found = as_factor(claim.unit, claim.source), as_factor(claim.unit, came_out)
    better, worse = (found, said) if claim.less else (said, found)
    if better <= worse:
        return "holds"
    return f"does not hold: {better / worse:.1f} times too {'little' if claim.less else 'much'}"


def as_factor(unit: str, value: float) -> float:
    """A number of this unit as one that can be divided by another: of percents saved how many times less is left.

    >>> as_factor("percent saved", 95), as_factor("times", 15)
    (20.0, 15)
    """
    if unit != "percent saved":
        return value
    return 100 / (100 - value) if value < 100 else math.inf


def _number(value: float | None) -> str:
    return "no guess" if value is None else f"{value:.3g}"
