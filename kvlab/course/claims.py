"""The main claims of the source document, which the course tests. Notebook 10 compares them with measurements.

The source document is an engineering write-up of a distributed KV cache for LLM serving. The course
is based on this document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from IPython.display import Markdown


@dataclass(frozen=True)
class Claim:
    """One claim: its name, its question, the source document's number, the unit, and the notebook that measures it."""

    name: str
    question: str
    source: float
    unit: str
    lesson: str


CLAIMS = (
    Claim("latency", "How much sooner does the first token come when the prefix is cached?", 11, "times", "00"),
    Claim("throughput", "How many times the throughput does the full system give?", 15, "times", "10"),
    Claim("hit_rate", "What share of blocks does a real chat trace find in the cache?", 65, "percent", "10"),
    Claim("compression", "How much smaller is KV as float16 + gzip than as float32?", 83, "percent saved", "04"),
    Claim("hashing", "How long does hashing a 1,000-token prefix take?", 10, "microseconds", "03"),
    Claim("cost", "How much cheaper does a token get?", 95, "percent saved", "10"),
)


def table() -> Markdown:
    """Each claim's question, the number that the source document gives, and the notebook that measures it."""
    rows = [f"| {claim.question} | {claim.source:g} {claim.unit} | {claim.lesson} |" for claim in CLAIMS]
    head = ["| question | the source document says | notebook |", "|---|---|---|"]
    return Markdown("\n".join([*head, *rows]))  # type: ignore[no-untyped-call]


def verdicts(came_out: Mapping[str, float], guessed: Mapping[str, float]) -> Markdown:
    """The claims that have come out: each one's question, the reader's guess, the source's number, and what came out.

    Args:
        came_out, guessed: by the names of the claims.
    """
    head = ["| question | you guessed | the source document says | came out |", "|---|---|---|---|"]
    rows = [
        f"| {claim.question} | {_number(guessed.get(claim.name))} | {claim.source:g} | "
        f"{_number(came_out[claim.name])} {claim.unit} |"
        for claim in CLAIMS
        if claim.name in came_out
    ]
    return Markdown("\n".join([*head, *rows]))  # type: ignore[no-untyped-call]


def _number(value: float | None) -> str:
    return "no guess" if value is None else f"{value:.3g}"
