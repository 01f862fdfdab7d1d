"""The Redis that exercises are checked with: what it counts, and what it refuses."""

import copy
from typing import Any

import pytest
import redis

from kvlab.course.exercises.counting import Content, CountingRedis

FULL = frozenset([b"b"])


def client(refuses: frozenset[bytes] = frozenset()) -> Any:
    return copy.deepcopy(Content({"a": (b"one", 5)}, refuses))


def test_each_call_and_each_execution_of_a_pipeline_is_a_round_trip() -> None:
    one = client()
    assert isinstance(one, CountingRedis)
    assert one.round_trips == 0
    one.get("a")
    one.mget(["a", "b"])
    assert one.round_trips == 2
    with one.pipeline(transaction=False) as pipe:
        pipe.get("a")
        pipe.get("b")
        assert one.round_trips == 2
        assert pipe.execute() == [b"one", None]
    assert one.round_trips == 3
    assert one.pipeline().execute() == []
    assert one.round_trips == 3


def test_the_content_is_shown_without_being_counted() -> None:
    one = client()
    one.set("for ever", "two")
    assert one.content() == ["a = b'one', for 5 s", "for ever = b'two', for ever"]
    assert one.round_trips == 1


def test_copies_share_nothing() -> None:
    content: Any = Content({"a": (b"one", 5)})
    first, second = copy.deepcopy(content), copy.deepcopy(content)
    first.delete("a")
    assert second.get("a") == b"one"


def test_a_full_server_refuses_single_commands() -> None:
    one = client(FULL)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        one.set(b"b", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        one.mset({b"b": 1, b"c": 1})
    assert one.set(b"c", 1)


def test_a_pipeline_shows_each_refusal_or_raises_the_first_and_stores_the_rest() -> None:
    for raise_on_error in (False, True):
        one = client(FULL)
        pipe = one.pipeline(transaction=False)
        for name in (b"x", b"b", b"y"):
            pipe.set(name, 1)
        if raise_on_error:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                pipe.execute()
        else:
            first, refusal, last = pipe.execute(raise_on_error=False)
            assert (first, last) == (True, True)
            assert isinstance(refusal, redis.exceptions.OutOfMemoryError)
        assert one.mget([b"x", b"b", b"y"]) == [b"1", None, b"1"]


def test_a_transaction_with_a_refusal_stores_nothing() -> None:
    one = client(FULL)
    pipe = one.pipeline()
    pipe.set(b"x", 1)
    pipe.set(b"b", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        pipe.execute(raise_on_error=False)
    assert one.get(b"x") is None


def test_a_content_says_what_it_holds() -> None:
    assert repr(Content({})) == "<Redis with nothing>"
    assert repr(Content({"a": (b"one", 5)}, FULL)) == "<Redis with a for 5 s, no room for b>"
