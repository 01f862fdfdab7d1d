"""A decision as one page of plain text, for whoever must decide: at most 80 columns and some 40 lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from math import isinf
from typing import Final

from kvlab.lab.decide import Decision, Question, Row
from kvlab.lab.decide_inputs import FALLING, USED
from kvlab.lab.prices import HOURS, Price
from kvlab.lab.tables import number, usd

WIDTH: Final = 80
DAY_S: Final = 86_400
_LABEL: Final = 11


def page(decision: Decision, name: str) -> str:
    """Return the page. `name` is that of the trace."""
    d = decision
    lines = [*_said(f"{d.verdict.upper()}:", f"a shared KV tier for {name}")]
    for title, texts in (("because", d.reasons), ("to change", d.changes)):
        for place, text in enumerate(texts):
            lines += _said("and" if place else title, text)
    for question in d.measure:
        lines += _asked(d, question)
    if d.measure:
        lines += _said("then", "run this again; if the money still spans 0, do not run a store")
    return "\n".join([*lines, "", *_inputs(d), "", *_table(d), "", *_prices(d)])


def _said(title: str, text: str) -> list[str]:
    indent = " " * _LABEL
    first = f"{title:<{_LABEL - 1}} "
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False
    )


def _asked(d: Decision, question: Question) -> Iterator[str]:
    name, price = question.name, d.inputs[question.name]
    told = f"{name}, {_band(price)}: {'; '.join(_turns(d, name)) or 'it does not decide alone'}"
    yield from _said("measure", told)
    yield from _said("  how", question.command)


def _turns(d: Decision, name: str) -> Iterator[str]:
    flips, falls = d.flips[name], name in FALLING
    if flips.yes is not None and flips.yes != flips.no:
        yield f"yes {'below' if falls else 'above'} {number(flips.yes)} whatever the rest"
    if flips.mid is not None:
        yield f"with the rest in the middle it pays {'below' if falls else 'above'} {number(flips.mid)}"
    if flips.no is not None:
        yield f"no {'from' if falls else 'up to'} {number(flips.no)}{' on' if falls else ''} whatever the rest"


def _band(price: Price) -> str:
    if price.low == price.high:
        return number(price.value)
    return f"{number(price.value)} ({number(price.low)} to {number(price.high)})"


def _known(d: Decision, name: str) -> str:
    return f"{_band(d.inputs[name])}, {'assumed' if name in d.assumed else 'given'}"


def _inputs(d: Decision) -> Iterator[str]:
    short = "" if d.span_s >= DAY_S else "; take a full day before you decide"
    if d.span_s < 60:
        short += f". It takes {d.span_s:g} s: check the unit of its times (docs/traces.md)"
    if d.inputs["requests"].value * d.span_s > 1.01 * d.requests * HOURS * 3600:
        short += "; more requests than it has need more memory for the same hit rates"
    mean = d.tokens / d.requests
    yield from _said(
        "trace",
        f"{d.requests:,} requests in {d.span_s / 3600:.3g} h, {d.inputs['requests'].value:,.0f} a month, "
        f"{mean:,.0f} tokens each{short}",
    )
    yield from _said("model", f"{d.shape}, {d.precision}: {d.kv_bytes:,} bytes of KV a token")
    yield from _said("prefill", f"{_known(d, 'prefill')}; tokens/s of an engine, its GPUs: {d.gpus_per_engine}")
    side = "above" if d.above_break_even else "NOT above"
    yield from _said("wire", f"{number(d.inputs['wire'].value)} GB/s, {side} the break-even of {d.break_even_gbps:.3g}")
    wins = "is never faster than computing"
    if not isinf(d.crossover):
        wins = (
            f"is faster from {d.crossover:,.0f} tokens on; so long are the prefixes of {d.long_share:.0%} of hit tokens"
        )
    yield from _said("fetching", wins)
    few = "" if d.busy_gpus <= d.gpus else ": more than there are"
    yield from _said("engines", f"{d.gpus:,} GPUs; computing all prompts keeps {d.busy_gpus:,.3g} busy{few}")
    yield from _said("they find", f"{_known(d, 'own')}, with a router that sends requests to their blocks")


def _table(d: Decision) -> Iterator[str]:
    yield from textwrap.wrap(
        f"Hit rate: found full blocks / all full blocks, {d.block_tokens} tokens each, LRU; endless cache "
        f"{d.hit_rate:.3f}. Added: to the engines' own. Money: USD a month.",
        WIDTH,
    )
    yield "    GiB servers  hit rate  added  GPU-hours   tier  net: low       mid      high"
    for row in d.rows:
        yield ("*" if row is d.best else " ") + _line(row)
    best = d.best
    yield from textwrap.wrap(f"* best in the middle: {usd(best.net_usd[1])} a month; set-up {_paid(best)}.", WIDTH)
    if best.load > 1:
        yield f"  Its fetches and saves are {best.load:.1f} times what its servers carry."


def _line(row: Row) -> str:
    money = "".join(f" {value:>9,.0f}" for value in row.net_usd)
    tier = f"{row.tier_usd[1]:>6,.0f}"
    return (
        f"{row.gib:>6,g} {row.servers:>7,} {row.hit_rate:>9.3f} {row.added:>6.3f} {row.gpu_hours:>10,.0f} {tier}{money}"
    )


def _paid(row: Row) -> str:
    ends = [f"{months:.1f}" for months in row.payback_months if not isinf(months)]
    if not ends:
        return "is never paid back"
    if len(ends) == 3:
        return f"is paid back after {ends[1]} months ({ends[0]} to {ends[2]})"
    return f"is paid back after {ends[0]} months at best, at worst never"


def _prices(d: Decision) -> Iterator[str]:
    told = ", ".join(f"{name} {_band(d.inputs[name])}{'' if name in d.assumed else '!'}" for name in USED)
    yield from _said("prices", f"{told}; ! given, else of kvlab.lab.prices")
