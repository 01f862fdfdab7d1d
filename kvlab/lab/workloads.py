"""Workloads made from a seed: agents with tools, chats, structured generation, unique prompts.

The text is real: parts of the held-out text, by the shipped tokenizer. Lengths and times are drawn around means that
others have published; each parameter names its source, or says "assumed". `scale` multiplies all lengths. With its
default a mean session fits the 2,048 tokens of the shipped model; `scale=1.0` and a larger `context` give real sizes.
Blocks do not shrink with the lengths, so hit rates by blocks are lower at a small scale.

Arrivals are open-loop: sessions begin in a Poisson process, and a turn comes some time after the turn before it has
come, whether or not that one is answered by then. A slow system does not get an easier load.

The same numbers are drawn under every layout, scale and share of retokenised answers. So two settings have the same
times and the same conversations, as far as the context has room for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final

from kvlab.errors import InputError
from kvlab.lab.conversations import RETOKENISED, Reply, Talk, Text, Turn, drawn, in_time
from kvlab.lab.replay import replay
from kvlab.lab.trace_ids import trace_ids
from kvlab.lab.traces import Request, from_blocks

CONTEXT: Final = 2048
TOOLS: Final = 16
BEGIN: Final = datetime(2026, 1, 5, 9)
LAYOUTS: Final = {
    "agentic": ("stable", "timestamp", "request_id", "tools", "cleared"),
    "chat": ("stable", "timestamp", "request_id", "personal"),
    "structured": ("stable", "timestamp", "request_id", "fields_first"),
    "unique": ("stable", "timestamp", "request_id"),
}
"""How prompts are laid out.

    stable        what requests share comes first, and nothing of it changes
    timestamp     the time comes first, to the second: only requests of one second begin alike
    request_id    a random number of the request comes first
    tools         the tool definitions are in another order in each request
    cleared       of tool results that are four steps old (assumed) only a note is left
    personal      a text about the user comes before the system prompt
    fields_first  the fields of a request come before its template
"""


def agentic(
    sessions: int = 8,
    seed: int = 0,
    *,
    layout: str = "stable",
    scale: float = 1 / 48,
    context: int = CONTEXT,
    kinds: int = 2,
    system: float = 2926,
    tools: float = 11899,
    task: float = 5335,
    steps: float = 33,
    result: float = 1181,
    answer: float = 523,
    step_s: float = 13.4,
    per_second: float = 0.02,
    retokenised: float = RETOKENISED,
    reply: Reply | None = None,
) -> list[Turn]:
    """Agents with tool loops: each step appends an answer and the result of a tool.

    Args:
        context: tokens of a prompt with its answer. Where they exceed it, the oldest messages go until half of the
            room is free (assumed; agents rather write a summary: in TraceLab in 4.5 and 18 % of the sessions).
        kinds: of agents (assumed). Sessions of a kind share its system prompt and its tools.
        system, tools: tokens of the system prompt and of 16 tool definitions. Source: Claude Code in kv-cache-tester.
        task: tokens of the first message: kv-cache-tester's median first prompt, 20,160, without system and tools.
        steps: their mean. Source: 610 runs of Codex by Inferact; 33, median 30, a tenth above 57.
        result, answer: mean tokens. Source: TraceLab, arXiv 2606.30560; 1,704 new tokens a step, 523 of them answer.
        step_s: mean seconds between steps; the median is 6.5, a tenth is above 30. Source: TraceLab, medians of 4.9 s
            of generation and 0.1 s of tools, a tenth above 20 and 10; its few tools of minutes are left out.
        per_second: new sessions (assumed).
        retokenised: see `RETOKENISED`.
        reply: a model that gives the answers.

    Raises:
        InputError: the layout is unknown, or the context has no room for more than what prompts begin with.
    """
    text = _text("agentic", layout, seed)
    cleared = layout == "cleared"
    talk = Talk(text, context, task * scale, answer * scale, result * scale, step_s, 1.2, retokenised, cleared, reply)

    def session(number: int, at_s: float, rng: random.Random) -> Iterator[Turn]:
        kind = rng.randrange(kinds)
        first = text.part(f"system {kind}", system * scale)
        own = [text.part(f"tool {kind} {i}", tools * scale / TOOLS) for i in range(TOOLS)]
        order = text.rng(f"order {number}")

        def opening(at_s: float) -> list[int]:
            if layout == "tools":
                order.shuffle(own)
            return [*_stamp(text, layout, at_s), *first, *(token for one in own for token in one)]

        return talk.turns(number, at_s, rng, max(1, round(drawn(rng, steps, 0.5))), opening)

    return in_time(session, sessions, per_second, text)


def chat(
    sessions: int = 64,
    seed: int = 0,
    *,
    layout: str = "stable",
    scale: float = 1.0,
    context: int = CONTEXT,
    system: float = 500,
    personal: float = 100,
    turns: float = 3.5,
    message: float = 69.5,
    answer: float = 214.5,
    think_s: float = 100.0,
    per_second: float = 0.2,
    retokenised: float = RETOKENISED,
    reply: Reply | None = None,
) -> list[Turn]:
    """Chats: each turn appends an answer and a message of the user.

    Args:
        context: as of `agentic`. After a cut the prompt begins differently from all before it.
        system: tokens that all chats begin with. Source: the example of vLLM's multi-turn benchmark.
        personal: tokens about the user, if the layout has them (assumed).
        turns: mean of a geometric distribution. Source: ServeGen, arXiv 2505.09999; 3.5. ShareGPT has 3.5, WildChat
            2.5, LMSYS-Chat-1M 2.0; BurstGPT a median of 2.
        message, answer: mean tokens. Source: LMSYS-Chat-1M, arXiv 2309.11998, table 1.
        think_s: mean seconds between turns. Source: ServeGen, about 100.
        per_second: new chats (assumed).
        retokenised: see `RETOKENISED`.
        reply: a model that gives the answers.

    Raises:
        InputError: as of `agentic`.
    """
    text = _text("chat", layout, seed)
    size, replies = message * scale, answer * scale
    talk = Talk(text, context, size, replies, size, think_s, retokenised=retokenised, reply=reply)
    shared = text.part("system", system * scale)

    def session(number: int, at_s: float, rng: random.Random) -> Iterator[Turn]:
        user = text.part(f"user {number}", personal * scale) if layout == "personal" else []
        count = 1
        while rng.random() > 1 / turns:
            count += 1
        return talk.turns(number, at_s, rng, count, lambda now: _stamp(text, layout, now) + user + shared)

    return in_time(session, sessions, per_second, text)


def structured(
    requests: int = 256,
    seed: int = 0,
    *,
    layout: str = "stable",
    scale: float = 0.75,
    context: int = CONTEXT,
    templates: int = 16,
    template: float = 2048,
    fields: float = 128,
    answer: float = 256,
    per_second: float = 1.0,
) -> list[Turn]:
    """Requests that fill one of a few templates, such as a schema with instructions, with fields of their own.

    Args:
        requests, templates: 16 requests a template, as in the shared-prefix workload of SGLang's `bench_serving`.
        template, fields, answer: tokens, of the last two the mean. Source: the same; 2,048, 128 and 256.
        per_second: requests (assumed).

    Raises:
        InputError: as of `agentic`.
    """
    text = _text("structured", layout, seed)
    talk = Talk(text, context, fields * scale, answer * scale)

    def session(number: int, at_s: float, rng: random.Random) -> Iterator[Turn]:
        shared = text.part(f"template {rng.randrange(templates)}", template * scale)
        for turn in talk.turns(number, at_s, rng, 1, lambda now: _stamp(text, layout, now) + shared):
            if layout == "fields_first":
                yield Turn(at_s, turn.tokens[len(shared) :] + shared, turn.answer, number, 0)
            else:
                yield turn

    return in_time(session, requests, per_second, text)


def unique(
    requests: int = 256,
    seed: int = 0,
    *,
    layout: str = "stable",
    scale: float = 0.5,
    context: int = CONTEXT,
    shared: float = 0,
    prompt: float = 915,
    answer: float = 92,
    per_second: float = 1.0,
) -> list[Turn]:
    """Requests that share nothing, or only a short system prompt.

    Args:
        shared: tokens that all requests begin with (assumed).
        prompt, answer: mean tokens. Source: trace B of Qwen-Bailian (API calls, nearly all of one turn), ATC'25.
        per_second: requests (assumed).

    Raises:
        InputError: as of `agentic`.
    """
    text = _text("unique", layout, seed)
    talk = Talk(text, context, prompt * scale, answer * scale)
    first = text.part("system", shared * scale)

    def session(number: int, at_s: float, rng: random.Random) -> Iterator[Turn]:
        return talk.turns(number, at_s, rng, 1, lambda now: _stamp(text, layout, now) + first)

    return in_time(session, requests, per_second, text)


def _text(kind: str, layout: str, seed: int) -> Text:
    if layout not in LAYOUTS[kind]:
        raise InputError(f"expected one of the layouts {', '.join(LAYOUTS[kind])}, got {layout!r}")
    return Text(f"{kind} {seed}")


def _stamp(text: Text, layout: str, at_s: float) -> list[int]:
    """What changes from prompt to prompt, at their begin."""
    if layout == "timestamp":
        return text.encode(f"It is {BEGIN + timedelta(seconds=int(at_s))}.")
    if layout == "request_id":
        return text.encode(f"Request {text.rng(at_s).getrandbits(64):016x}.")
    return []


# --- traces and hit rates -----------------------------------------------------------------------
def as_trace(turns: Iterable[Turn], block_tokens: int, salt: bytes = b"", answers: bool = True) -> list[Request]:
    """Return the requests of a trace. Their `kept` blocks are full ones, and those of an answer are as sampled.

    Args:
        answers: whether the blocks of answers are kept, as engines do. Stores beside an engine may save prompts only.
    """
    requests = []
    for turn in turns:
        blocks, kept = trace_ids(turn.tokens, block_tokens, salt, turn.answer if answers else ())
        extra = {"session": turn.session, "turn": turn.turn}
        requests.append(Request(turn.at_s, len(turn.tokens), len(turn.answer), blocks, kept, extra))
    return requests


WORKLOADS: Final[dict[str, Callable[..., list[Turn]]]] = {
    "agentic": agentic,
    "chat": chat,
    "structured": structured,
    "unique": unique,
}
RANGES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "agentic": {
        "request id first": {"layout": "request_id"},
        "timestamp first": {"layout": "timestamp"},
        "tools in any order": {"layout": "tools"},
        "old results cleared": {"layout": "cleared"},
        "5 steps": {"steps": 5},
        "answers not kept": {"answers": False},
        "retokenised often": {"retokenised": 0.8},
        "default": {},
        "84 steps": {"steps": 84},  # the mean of TraceLab
    },
    "chat": {
        "request id first": {"layout": "request_id"},
        "timestamp first": {"layout": "timestamp"},
        "2 turns, no system prompt": {"turns": 2.0, "system": 0},
        "no system prompt": {"system": 0},
        "user before system prompt": {"layout": "personal"},
        "answers not kept": {"answers": False},
        "retokenised often": {"retokenised": 0.8},
        "default": {},
        "15 turns": {"turns": 15},  # vLLM's multi-turn benchmark has 12 to 18
    },
    "structured": {
        "request id first": {"layout": "request_id"},
        "timestamp first": {"layout": "timestamp"},
        "fields first": {"layout": "fields_first"},
        "4 requests a template": {"templates": 64},
        "default": {},
        "64 requests a template": {"templates": 4},
    },
    "unique": {"default": {}, "system prompt of 100": {"shared": 100}, "system prompt of 500": {"shared": 500}},
}
"""Settings of each workload between which its hit rate varies; "answers" is one of `as_trace`."""


def hit_range(kind: str, block_tokens: int = 16, seed: int = 0, **common: Any) -> dict[str, dict[str, float]]:
    """Return the hit rates of a workload under each of its `RANGES`, with a cache that never evicts.

    The rates have the four names of `kvlab.lab.replay`. Each request finds all that requests before it have left, so
    they are upper bounds: a real cache is smaller, and has not got what is still being computed.

    Args:
        kind: one of `WORKLOADS`.
        common: arguments for all settings, for example `scale=1.0, context=200_000`.

    Raises:
        InputError: the kind is unknown.
    """
    if kind not in WORKLOADS:
        raise InputError(f"expected one of {', '.join(WORKLOADS)}, got {kind!r}")
    rates = {}
    for name, setting in RANGES[kind].items():
        own = {"answers": True, **common, **setting}
        answers = own.pop("answers")
        trace = as_trace(WORKLOADS[kind](seed=seed, **own), block_tokens, answers=answers)
        rates[name] = replay(trace, block_tokens).hits.rates()
    return rates


def groups(
    requests: int, groups: int = 16, shared: int = 8, own: int = 1, common: int = 1, skew: float = 1.0, seed: int = 0
) -> list[Request]:
    """Requests of groups, as block ids only: `common` blocks that all begin with, `shared` of the group, `own` ones.

    Args:
        skew: the k-th group has a share of 1 / k to this power.
    """
    rng = random.Random(seed)
    shares = [1 / (1 + group) ** skew for group in range(groups)]
    first_own = common + groups * shared
    return from_blocks(
        [
            *range(common),
            *range(common + group * shared, common + (group + 1) * shared),
            *range(first_own + number * own, first_own + (number + 1) * own),
        ]
        for number, group in enumerate(rng.choices(range(groups), shares, k=requests))
    )
