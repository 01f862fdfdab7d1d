"""Conversations from real text, turn by turn: what `kvlab.lab.workloads` is made of.

A message ends with the end-of-text token, as in chat templates. So no token spans two messages, and a prompt is what
its text encodes to.

An answer is what the model samples, and this may be another split of its text into tokens than the tokenizer's. The
next prompt has the text of the answer, encoded anew, so from there on the blocks of such an answer are not found.
Answers are parts of the text too, unless a model gives them (`Reply`): then a real engine computes the same ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from kvlab.errors import InputError
from kvlab.model import Tokenizer, held_out_tokens

END: Final = 0
"""Ends each message: <|eof|> of the shipped tokenizer."""
WINDOW: Final = 200
RETOKENISED: Final = 0.05
"""Share of answers of 200 tokens whose text encodes to other tokens: assumed for a large model.

Measured with the shipped model, which is small and often unsure: 0.80 at temperature 1 (412 of 512 answers), 0.29 at
0.7 (37 of 128), 0.14 at 0.7 with top-p 0.9 (18 of 128), 0.05 greedily (6 of 128), after 128 or 256 held-out tokens.
At temperature 1 it grows with the length as for differences that are independent of each other: 0.09 of answers of
10 tokens, 0.23 of 25, 0.39 of 50, 0.59 of 100. So each token gets its own chance here.
"""
SPREAD: Final = 1.0
"""Sigma of lognormal lengths, assumed: between answers in ServeGen (exponential: 0.8) and TraceLab (1.3)."""
CLEARED_AFTER: Final = 4
SMALLEST_ROOM: Final = 64
Reply = Callable[[list[int], int], list[int]]
"""Returns so many tokens that a model samples after a prompt."""
MARGIN: Final = 8
"""A message may encode to some tokens more than it was cut to, and an answer be sampled with some more."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        at_s: when it comes, in seconds.
        tokens: the prompt, with all of the conversation so far.
        answer: the tokens as the model samples them, `END` at last unless a `Reply` gave them.
        session, turn: numbers from 0. A session is the same whatever the number of sessions.
    """

    at_s: float
    tokens: list[int]
    answer: list[int]
    session: int
    turn: int


class Text:
    """Messages from the held-out text, each encoded for itself.

    Args:
        name: other messages under another name.
    """

    def __init__(self, name: str) -> None:
        self._name, self._tokenizer = name, Tokenizer()
        tokens = [token for token in held_out_tokens(self._tokenizer) if token != END]
        self._tokens = tokens + tokens  # a message may go on at the begin
        self._starts = list(range(len(tokens)))
        self.rng("starts").shuffle(self._starts)
        self._parts: dict[tuple[str, int], list[int]] = {}
        self._splits = _splits(self._tokenizer)

    def rng(self, purpose: object) -> random.Random:
        """Return random numbers that are the same whatever else was drawn."""
        return random.Random(f"{self._name} {purpose}")

    def encode(self, text: str) -> list[int]:
        """Return a message with this text."""
        return [*self._tokenizer.encode(text), END]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without the ends of messages in it."""
        return self._tokenizer.decode([token for token in tokens if token != END])

    def message(self, number: int, length: int) -> list[int]:
        """Return a message of about `length` tokens. Different numbers begin at different places of the text."""
        start = self._starts[number % len(self._starts)]
        return self.encode(self._tokenizer.decode(self._tokens[start : start + length]))

    def part(self, name: str, length: float) -> list[int]:
        """Return the message of a name, always the same, or nothing for a length of 0."""
        key = name, round(length)
        if key not in self._parts:
            number = self.rng(name).randrange(len(self._starts))
            self._parts[key] = self.message(number, key[1]) if key[1] else []
        return self._parts[key]

    def sampled(self, message: list[int], rng: random.Random, share: float) -> list[int]:
        """Return a message with some tokens split in two: the same text, and not the tokenizer's tokens.

        Args:
            share: of messages of `WINDOW` tokens that have such a place.
        """
        chance = 1 - (1 - share) ** (1 / WINDOW)
        tokens: list[int] = []
        due = False  # a token that cannot be split passes it on
        for token in message:
            due = due or rng.random() < chance
            pair = self._splits.get(token) if due else None
            tokens += pair or (token,)
            due = due and pair is None
        return tokens


def _splits(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """For each token that can be split in two, a way to do it."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    tokens = {text: token for token, text in enumerate(texts) if text and "\ufffd" not in text}
    return {
        token: (tokens[text[:i]], tokens[text[i:]])
        for text, token in tokens.items()
        for i in range(1, len(text))
        if text[:i] in tokens and text[i:] in tokens
    }


def drawn(rng: random.Random, mean: float, spread: float = SPREAD) -> float:
    """Draw from a lognormal distribution."""
    return rng.lognormvariate(math.log(mean) - spread**2 / 2, spread) if mean else 0.0


@dataclass(frozen=True)
class Talk:
    """How the conversations of one kind go.

    Attributes:
        first, message, answer: mean tokens of the first message, of each later one, and of an answer. None is longer
            than half of the room that the opening leaves.
        context: tokens of a prompt with its answer. Where they would exceed it, the oldest messages and their answers
            go until half of the room is free, so that it lasts for some turns.
        gap_s, gap_spread: seconds between two turns: their mean, and their sigma.
        retokenised: see `RETOKENISED`.
        cleared: of messages that are `CLEARED_AFTER` turns old only a note is left.
        reply: gives the answers; without one they are parts of the text, and `retokenised` counts.
    """

    text: Text
    context: int
    first: float
    answer: float
    message: float = 0.0
    gap_s: float = 0.0
    gap_spread: float = SPREAD
    retokenised: float = 0.0
    cleared: bool = False
    reply: Reply | None = None

    def turns(
        self, session: int, at_s: float, rng: random.Random, count: int, opening: Callable[[float], list[int]]
    ) -> Iterator[Turn]:
        """Yield the turns of one session.

        Args:
            count: of turns.
            opening: what the prompt of a time begins with.

        Raises:
            InputError: the opening leaves no room.
        """
        messages: list[list[int]] = []
        for turn in range(count):
            begin = opening(at_s)
            room = self.context - len(begin)
            if room < SMALLEST_ROOM:
                raise InputError(
                    f"expected a context with room for more than what prompts begin with, {len(begin)} tokens, "
                    f"got {self.context}; use a smaller scale"
                )
            mean = self.message if turn else self.first
            messages.append(self._message(rng, mean, room, rng.getrandbits(30) if turn else session))
            answer = self._message(rng, self.answer, room, rng.getrandbits(30))
            own = random.Random(rng.getrandbits(64))  # so that no share changes what is drawn after it
            sampled = self.text.sampled(answer, own, self.retokenised)
            if sum(map(len, messages)) > room - len(sampled):
                while len(messages) > 1 and sum(map(len, messages)) > room // 2:
                    del messages[:2]
            prompt = begin + [token for one in self._shown(messages) for token in one]
            if self.reply is not None:
                sampled = self.reply(prompt, len(answer))
                answer = self.text.encode(self.text.decode(sampled))
            yield Turn(at_s, prompt, sampled, session, turn)
            messages.append(answer)
            at_s += drawn(rng, self.gap_s, self.gap_spread)

    def _message(self, rng: random.Random, mean: float, room: int, number: int) -> list[int]:
        length = min(round(drawn(rng, mean)), room // 2 - MARGIN)
        return self.text.message(number, max(1, length))

    def _shown(self, messages: list[list[int]]) -> list[list[int]]:
        if not self.cleared:
            return messages
        note, old = self.text.encode("[cleared]"), len(messages) - 2 * CLEARED_AFTER
        return [note if 0 < i < old and i % 2 == 0 else one for i, one in enumerate(messages)]


def in_time(
    session: Callable[[int, float, random.Random], Iterator[Turn]], count: int, per_second: float, text: Text
) -> list[Turn]:
    """Return the turns of `count` sessions that begin in a Poisson process, sorted by time.

    Args:
        session: yields the turns of one session, by its number, its begin, and numbers of its own.
    """
    arrivals, at_s = text.rng("arrivals"), 0.0
    turns: list[Turn] = []
    for number in range(count):
        at_s += arrivals.expovariate(per_second)
        turns += session(number, at_s, text.rng(number))
    return sorted(turns, key=lambda turn: (turn.at_s, turn.session, turn.turn))
