"""Conversations: real text, prompts that encode to themselves, answers split as models split them, cut histories."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.errors import InputError
from kvlab.lab.conversations import END, WINDOW, Talk, Text, Turn, drawn, in_time
from kvlab.model import Tokenizer, held_out

TOKENIZER = Tokenizer()
TEXT = Text("a test")


def text_of(tokens: list[int]) -> str:
    """The text of a prompt, with its end-of-text marks."""
    parts, start = [], 0
    for i, token in enumerate(tokens):
        if token == END:
            parts.append(TOKENIZER.decode(tokens[start:i]) + "<|eof|>")
            start = i + 1
    return "".join(parts) + TOKENIZER.decode(tokens[start:])


def turns_of(talk: Talk, count: int, opening: int = 0, seed: int = 0) -> list[Turn]:
    begin = TEXT.part("opening", opening)
    return list(talk.turns(0, 0.0, random.Random(seed), count, lambda _: begin))


def alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- messages -----------------------------------------------------------------------------------
def test_messages_are_parts_of_the_held_out_text() -> None:
    whole = "".join(held_out().values())
    for number in range(50):
        message = TEXT.message(number, 60)
        assert message[-1] == END and END not in message[:-1]
        text = TOKENIZER.decode(message)
        assert all(line in whole for line in text.split("\n")[1:-1]) and len(text) > 80


def test_no_two_messages_begin_alike_as_long_as_the_text_lasts() -> None:
    begins = {tuple(TEXT.message(number, 64)[:64]) for number in range(2000)}
    assert len(begins) == 2000


def test_a_part_is_always_the_same_and_others_are_other_ones() -> None:
    assert TEXT.part("a", 40) == Text("a test").part("a", 40) != TEXT.part("b", 40)
    assert Text("another").part("a", 40) != TEXT.part("a", 40)
    assert TEXT.part("a", 0) == TEXT.part("a", 0.4) == []


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    rng = random.Random(0)
    for mean, spread in ((70.0, 1.0), (13.4, 1.2)):
        values = [drawn(rng, mean, spread) for _ in range(20_000)]
        assert sum(values) / len(values) == pytest.approx(mean, rel=0.06)
    assert drawn(rng, 0.0) == 0.0


# --- answers as models sample them --------------------------------------------------------------
@given(st.integers(0, 10_000), st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_sampled_answer_has_the_same_text(number: int, length: int, share: float, seed: int) -> None:
    message = TEXT.message(number, length)
    sampled = TEXT.sampled(message, random.Random(seed), share)
    assert TOKENIZER.decode(sampled) == TOKENIZER.decode(message)
    assert sampled[-1] == END
    again = [*TOKENIZER.encode(TOKENIZER.decode(sampled)), END]
    assert again == message, "the history has the tokenizer's tokens"


@pytest.mark.parametrize("share", [0.05, 0.29, 0.8])
def test_windows_are_split_at_the_rate_that_was_asked_for(share: float) -> None:
    rng, count = random.Random(7), 1500
    windows = (TEXT.message(rng.getrandbits(30), WINDOW)[:WINDOW] for _ in range(count))
    split = sum(TEXT.sampled(window, rng, share) != window for window in windows)
    assert split / count == pytest.approx(share, abs=3.5 * (share * (1 - share) / count) ** 0.5)


def test_a_share_of_nothing_splits_nothing_and_one_of_all_splits_all_that_can_be() -> None:
    message = TEXT.message(0, 300)
    assert TEXT.sampled(message, random.Random(0), 0.0) == message
    assert len(TEXT.sampled(message, random.Random(0), 1.0)) > 1.5 * len(message)


# --- turns --------------------------------------------------------------------------------------
def test_a_turn_has_all_before_it_and_the_answers_as_their_text_encodes() -> None:
    turns = turns_of(Talk(TEXT, 100_000, 50, 80, 30, 10.0, retokenised=0.9), 12, opening=40)
    assert [turn.turn for turn in turns] == list(range(12))
    split = 0
    for before, after in pairwise(turns):
        assert after.at_s > before.at_s
        kept = len(before.tokens)
        assert after.tokens[:kept] == before.tokens
        answer = after.tokens[kept : after.tokens.index(END, kept) + 1]
        assert TOKENIZER.decode(answer) == TOKENIZER.decode(before.answer)
        split += answer != before.answer
    assert split >= 3


def test_a_prompt_is_what_its_text_encodes_to() -> None:
    for turn in turns_of(Talk(TEXT, 2048, 90, 120, 60, 10.0), 10, opening=100):
        assert TOKENIZER.encode(text_of(turn.tokens)) == turn.tokens


@given(st.integers(80, 3000), st.floats(5, 900), st.floats(5, 900), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_prompt_exceeds_the_context_with_its_answer(context: int, first: float, message: float, seed: int) -> None:
    for turn in turns_of(Talk(TEXT, context, first, 80, message, 1.0, retokenised=0.5), 8, seed=seed):
        assert len(turn.tokens) + len(turn.answer) <= context and turn.tokens[-1] == END


def test_a_cut_history_begins_differently_and_then_grows_again() -> None:
    turns = turns_of(Talk(TEXT, 1000, 60, 60, 60, 1.0), 40, opening=100)
    begin = len(TEXT.part("opening", 100))
    grows = [after.tokens[: len(before.tokens)] == before.tokens for before, after in pairwise(turns)]
    cuts = [pair for pair, grew in zip(pairwise(turns), grows, strict=True) if not grew]
    assert 2 <= len(cuts) <= len(turns) // 3, "a cut makes room for some turns"
    for before, after in cuts:
        assert begin <= alike(before.tokens, after.tokens) < begin + 30, "the opening stays, what follows does not"
        assert len(after.tokens) < 0.75 * len(before.tokens)


def test_old_messages_are_cleared_and_the_newest_are_not() -> None:
    plain, cleared = (turns_of(Talk(TEXT, 100_000, 50, 20, 40, 1.0, cleared=on), 9) for on in (False, True))
    note = TEXT.encode("[cleared]")
    counts = [str(turn.tokens).count(str(note)[1:-1]) for turn in cleared]
    assert counts == [0, 0, 0, 0, 0, 1, 2, 3, 4], "one more in each turn, never the first message"
    for one, other in zip(plain, cleared, strict=True):
        assert one.answer == other.answer and one.at_s == other.at_s
        assert one.tokens[-60:] == other.tokens[-60:]


def test_an_opening_without_room_behind_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"room for more than what prompts begin with, \d+ tokens, got 200"):
        turns_of(Talk(TEXT, 200, 10, 10), 1, opening=180)


# --- time ---------------------------------------------------------------------------------------
def test_sessions_begin_in_a_poisson_process_and_turns_are_sorted() -> None:
    def session(number: int, at_s: float, rng: random.Random) -> object:
        return Talk(TEXT, 500, 5, 5, 5, 20.0).turns(number, at_s, rng, 3, lambda _: [])

    turns = in_time(session, 400, 0.5, TEXT)  # type: ignore[arg-type]
    assert [turn.at_s for turn in turns] == sorted(turn.at_s for turn in turns)
    begins = [turn.at_s for turn in turns if turn.turn == 0]
    gaps = [b - a for a, b in pairwise(begins)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(2.0, rel=0.15) and deviation == pytest.approx(mean, rel=0.2)
    assert {turn.session for turn in turns} == set(range(400)) and len(turns) == 1200
