"""Workloads: the same from the same seed, shared where they say, and hit rates over a range of their parameters."""

from __future__ import annotations

import functools
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import InputError
from kvlab.lab.conversations import END, Turn
from kvlab.lab.replay import Setup, replay
from kvlab.lab.traces import Trace, write
from kvlab.lab.workloads import (
    LAYOUTS,
    RANGES,
    WORKLOADS,
    agentic,
    as_trace,
    chat,
    groups,
    hit_range,
    structured,
    unique,
)
from kvlab.model import Tokenizer

KINDS = tuple(WORKLOADS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def small(kind: str, count: int = 6, **settings: Any) -> list[Turn]:
    return WORKLOADS[kind](count, **settings)


def alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def firsts(turns: list[Turn]) -> list[Turn]:
    return sorted((turn for turn in turns if turn.turn == 0), key=lambda turn: turn.session)


# --- what is the same and what is not -----------------------------------------------------------
@every_kind
def test_a_seed_gives_one_workload_and_another_one_another(kind: str) -> None:
    assert small(kind, seed=3) == small(kind, seed=3)
    mine, others = small(kind, seed=3), small(kind, seed=4)
    assert all(a.tokens != b.tokens and a.at_s != b.at_s for a, b in zip(mine, others, strict=False))


@every_kind
def test_more_sessions_leave_the_first_ones_as_they_are(kind: str) -> None:
    few, many = small(kind, 3), small(kind, 9)
    assert [turn for turn in many if turn.session < 3] == few
    assert len(many) > len(few)


@every_kind
def test_turns_come_in_the_order_of_time_and_fit_the_shipped_model(kind: str) -> None:
    turns = small(kind, 12)
    assert [turn.at_s for turn in turns] == sorted(turn.at_s for turn in turns)
    assert all(len(turn.tokens) + len(turn.answer) <= 2048 for turn in turns)
    vocabulary = Tokenizer().vocab_size
    for turn in turns:
        assert set(map(type, turn.tokens)) == {int} and max(turn.tokens) < vocabulary
        assert turn.tokens[-1] == turn.answer[-1] == END
    for session in range(12):
        own = [turn.turn for turn in turns if turn.session == session]
        assert own == list(range(len(own))) and own


@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind in KINDS for layout in LAYOUTS[kind]])
def test_layouts_change_prompts_but_neither_times_nor_answers(kind: str, layout: str) -> None:
    plain, other = small(kind, 5, context=9000), small(kind, 5, context=9000, layout=layout)
    assert [(turn.at_s, turn.answer, turn.session) for turn in plain] == [
        (turn.at_s, turn.answer, turn.session) for turn in other
    ]
    assert (plain == other) == (layout == "stable")


@every_kind
def test_times_do_not_depend_on_lengths(kind: str) -> None:
    plain, longer = small(kind, context=100_000), small(kind, context=100_000, scale=1.0)
    assert [turn.at_s for turn in plain] == [turn.at_s for turn in longer]
    assert sum(len(turn.tokens) for turn in longer) >= sum(len(turn.tokens) for turn in plain)


@every_kind
def test_every_parameter_is_explained_with_a_source(kind: str) -> None:
    explained = inspect.getdoc(WORKLOADS[kind]) or ""
    shared = {"seed", "layout", "scale", "context", "sessions"}  # the docstring of the module and of the first
    missing = [name for name in inspect.signature(WORKLOADS[kind]).parameters if name not in explained]
    assert set(missing) <= shared
    assert "Source: " in explained and "assumed" in explained


# --- what is shared -----------------------------------------------------------------------------
def test_agents_of_a_kind_share_system_prompt_and_tools() -> None:
    begins = {tuple(turn.tokens[:300]) for turn in firsts(agentic(12))}
    assert len(begins) == 2
    a, b = next((a, b) for a in firsts(agentic(12)) for b in firsts(agentic(12)) if a.tokens[0] != b.tokens[0])
    assert alike(a.tokens, b.tokens) == 0


def test_agents_make_many_short_steps() -> None:
    turns = agentic(12, scale=1.0, context=400_000)
    steps = [sum(turn.session == session for turn in turns) for session in range(12)]
    assert 15 < sum(steps) / 12 < 60
    prompts, answers = sum(len(turn.tokens) for turn in turns), sum(len(turn.answer) for turn in turns)
    assert 50 < prompts / answers < 250  # Inferact: 131 to 1


def test_tools_in_another_order_share_only_the_system_prompt() -> None:
    turns = [turn for turn in agentic(1, layout="tools") if turn.session == 0]
    system = turns[0].tokens.index(END) + 1
    shared = [alike(a.tokens, b.tokens) for a, b in pairwise(turns)]
    assert min(shared) >= system and sorted(shared)[len(shared) // 2] < system + 30


def test_chats_share_the_system_prompt_and_a_user_before_it_ends_that() -> None:
    for layout, alike_at_least in (("stable", 480), ("personal", 0)):
        turns = firsts(chat(6, layout=layout))
        shared = [alike(a.tokens, b.tokens) for a in turns for b in turns if a.session < b.session]
        assert min(shared) >= alike_at_least and (layout == "stable") == (max(shared) >= 480)


def test_chats_have_as_many_turns_as_was_asked_for() -> None:
    for mean in (1.0, 3.5):
        assert len(chat(400, turns=mean, system=0, message=5, answer=5)) / 400 == pytest.approx(mean, rel=0.15)


@pytest.mark.parametrize(("layout", "least", "most"), [("stable", 1500, 1600), ("fields_first", 0, 16)])
def test_requests_of_a_template_share_it_where_it_comes_first(layout: str, least: int, most: int) -> None:
    turns = structured(40, templates=1, layout=layout)
    shared = [alike(turns[0].tokens, turn.tokens) for turn in turns[1:]]
    assert least <= max(shared) <= most
    assert len({tuple(turn.tokens) for turn in turns}) == 40
    assert {turn.tokens[-60:] == turns[0].tokens[-60:] for turn in turns[1:]} == {layout == "fields_first"}


def test_unique_prompts_share_nothing_but_a_system_prompt() -> None:
    for shared, most in ((0, 15), (100, 75)):
        turns = unique(60, shared=shared)
        assert max(alike(a.tokens, b.tokens) for a in turns for b in turns if a.session < b.session) <= most


def test_a_time_is_shared_within_its_second_and_a_request_id_never() -> None:
    for layout, most in (("timestamp", 30), ("request_id", 15)):
        turns = chat(200, per_second=10.0, turns=1.0, layout=layout)
        for a, b in pairwise(turns):
            same = int(a.at_s) == int(b.at_s) and layout == "timestamp"
            assert (alike(a.tokens, b.tokens) > most) == same


@every_kind
def test_a_layout_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="expected one of the layouts stable, timestamp"):
        WORKLOADS[kind](layout="upside_down")


def test_lengths_that_leave_no_room_are_refused() -> None:
    with pytest.raises(InputError, match="use a smaller scale"):
        agentic(1, scale=1.0)


# --- traces -------------------------------------------------------------------------------------
@every_kind
def test_a_trace_is_written_and_read_and_gives_the_same_hits(kind: str, tmp_path: Path) -> None:
    requests = as_trace(small(kind, 8), 16, b"salt")
    write(requests, tmp_path / "t.jsonl", 16)
    trace = Trace(tmp_path / "t.jsonl")
    for a, b in zip(trace, requests, strict=True):
        assert (a.tokens, a.new, a.blocks, a.kept, a.extra) == (b.tokens, b.new, b.blocks, b.kept, b.extra)
        assert a.at_s == pytest.approx(b.at_s, abs=1e-6)
    assert replay(trace, 16).hits.rates() == replay(requests, 16).hits.rates()


def test_a_retokenised_answer_is_found_up_to_the_split_only() -> None:
    turns = sorted(chat(30, retokenised=0.7, context=50_000, turns=4.0), key=lambda turn: (turn.session, turn.turn))
    split = 0
    for (before, kept), (after, asked) in pairwise(zip(turns, as_trace(turns, 16), strict=True)):
        if before.session != after.session:
            continue
        known = [*before.tokens, *before.answer[:-1]]
        found = alike(list(kept.kept or ()), list(asked.blocks))
        assert found == alike(known, after.tokens) // 16
        split += found < len(known) // 16
    assert split > 20


def test_answers_are_kept_or_not() -> None:
    turns = chat(10)
    with_answers, without = as_trace(turns, 16), as_trace(turns, 16, answers=False)
    for turn, a, b in zip(turns, with_answers, without, strict=True):
        assert len(a.kept or ()) == (len(turn.tokens) + len(turn.answer) - 1) // 16
        assert len(b.kept or ()) == len(turn.tokens) // 16
        assert (a.blocks, a.new) == (b.blocks, b.new) and a.new == len(turn.answer)


# --- hit rates ----------------------------------------------------------------------------------
BOUNDS = {  # (lowest, default, highest) hit rate by blocks of 16, each within 0.03
    "agentic": (0.00, 0.95, 0.95),
    "chat": (0.00, 0.87, 0.87),
    "structured": (0.00, 0.89, 0.93),
    "unique": (0.00, 0.00, 0.38),
}


@functools.cache
def block_rates(kind: str, size: int = 16) -> dict[str, float]:
    return {name: rates["blocks"] for name, rates in hit_range(kind, size).items()}


@every_kind
def test_the_hit_rate_is_a_range(kind: str) -> None:
    rates = block_rates(kind)
    assert list(rates) == list(RANGES[kind])
    got = min(rates.values()), rates["default"], max(rates.values())
    assert got == pytest.approx(BOUNDS[kind], abs=0.03)
    coarse = block_rates(kind, 64)
    assert all(coarse[name] <= rates[name] for name in rates), "larger blocks find less"


def test_what_kills_hits_and_what_does_not() -> None:
    agents, chats, forms = map(block_rates, ("agentic", "chat", "structured"))
    assert agents["request id first"] == chats["request id first"] == forms["fields first"] == 0.0
    assert max(agents["timestamp first"], agents["tools in any order"]) < 0.1
    assert 0.7 < agents["old results cleared"] < agents["default"] - 0.1
    assert agents["5 steps"] < agents["default"]
    assert 0 < agents["default"] - agents["retokenised often"] < 0.01, "answers are short, and repaired a turn later"
    assert chats["2 turns, no system prompt"] < chats["no system prompt"] < chats["default"]
    assert chats["answers not kept"] < chats["retokenised often"] < chats["default"] - 0.03
    assert chats["15 turns"] < chats["default"], "in a short context histories are cut"
    assert forms["4 requests a template"] < forms["default"] < forms["64 requests a template"]


def test_at_real_sizes_agents_hit_as_in_published_traces() -> None:
    rates = replay(as_trace(agentic(3, scale=1.0, context=200_000), 16), 16).hits.rates()
    assert 0.94 < rates["tokens"] < 0.985  # TraceLab .957, Inferact .942, kv-cache-tester .963


def test_common_arguments_reach_every_setting() -> None:
    few = hit_range("structured", requests=16)
    assert few["default"]["blocks"] < 0.6 < block_rates("structured")["default"]


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of agentic, chat, structured, unique, got 'x'"):
        hit_range("x")


@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_groups_are_the_same_each_time_and_as_skewed_as_asked(skew: float) -> None:
    stream = groups(300, shared=2, own=1, common=1, skew=skew)
    assert stream == groups(300, shared=2, own=1, common=1, skew=skew) != groups(300, skew=skew, seed=1)
    chains = [request.blocks for request in stream]
    assert all(len(chain) == 4 and chain[0] == 0 and chain[1] + 1 == chain[2] for chain in chains)
    first = sum(chain[1] == 1 for chain in chains) / 300
    assert first == pytest.approx(1 / sum((1 + g) ** -skew for g in range(16)), abs=0.08)
    assert len({chain[3] for chain in chains} | {chain[1] for chain in chains}) > 300, "own blocks are in no other"
    assert max(chain[1] for chain in chains) < 1 + 16 * 2 <= min(chain[3] for chain in chains)


def test_with_a_common_first_block_the_longest_prefix_sends_all_to_one_node() -> None:
    stream = groups(400, common=1)
    longest, cost = (replay(stream, 1, Setup(device=80, nodes=2, router=name)) for name in ("longest_prefix", "cost"))
    assert longest.requests == [400, 0] and longest.imbalance == 2.0
    assert cost.imbalance < 1.05 and cost.hit_rate > longest.hit_rate + 0.15
    assert cost.hit_rate > 0.95 * replay(stream, 1, Setup(device=160)).hit_rate


# --- answers of a model -------------------------------------------------------------------------
def test_a_model_that_gives_the_answers_is_asked_with_each_prompt_and_answered_in_the_next() -> None:
    asked: list[tuple[list[int], int]] = []
    spoken = Tokenizer().encode("the same words again and again, in every answer of it")

    def reply(prompt: list[int], length: int) -> list[int]:
        asked.append((prompt, length))
        return (spoken * length)[:length]

    turns = [turn for turn in chat(9, reply=reply) if turn.session == 8] or pytest.fail("there is no such session")
    assert all((turn.tokens, len(turn.answer)) in asked for turn in turns)
    text = Tokenizer().decode
    for turn, following in pairwise(turns):
        grown = text(turn.tokens + turn.answer + [END])
        assert text(following.tokens).startswith(grown) or len(following.tokens) < len(turn.tokens)
    assert [len(turn.answer) for turn in chat(9, reply=reply)] == [len(turn.answer) for turn in chat(9, retokenised=0)]
