"""The main claims of the source document, which the course tests. Notebook 10 compares them with measurements.

The source document is an engineering write-up of a distributed KV cache for LLM serving. The course
is based on this document.
"""

from __future__ import annotations

from dataclasses import dataclass

from IPython.display import Markdown


@dataclass(frozen=True)
class Claim:
    """One claim: its name, its question, the source document's number, and the unit."""

    name: str
    question: str
    source: float
    unit: str


CLAIMS = (
    Claim("latency", "How much sooner does the first token come when the prefix is cached?", 11, "times"),
    Claim("throughput", "How many times the throughput does the full system give?", 15, "times"),
    Claim("hit_rate", "What share of blocks does a real chat trace find in the cache?", 65, "percent"),
    Claim("compression", "How much smaller is KV as float16 + gzip than as float32?", 83, "percent saved"),
    Claim("hashing", "How long does hashing a 1,000-token prefix take?", 10, "microseconds"),
    Claim("cost", "How much cheaper does a token get?", 95, "percent saved"),
)


def table() -> Markdown:
    """Each claim's question, and the number that the source document gives."""
    rows = [f"| {claim.question} | {claim.source:g} {claim.unit} |" for claim in CLAIMS]
    return Markdown("\n".join(["| question | the source document says |", "|---|---|", *rows]))  # type: ignore[no-untyped-call]
