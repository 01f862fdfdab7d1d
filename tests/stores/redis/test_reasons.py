"""What each reply means: the reason that it is counted under, and what it says of the server."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from kvlab.stores.redis.connection import TooBig
from kvlab.stores.redis.pool import NoConnection
from kvlab.stores.redis.reasons import Refused, reason_of, works


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Refused("breaker"), "breaker"),
        (TooBig(), "too_big"),
        (NoConnection(), "pool"),
        (redis.AuthenticationError("x"), "auth"),
        (redis.exceptions.NoPermissionError("x"), "auth"),
        (redis.TimeoutError("x"), "timeout"),
        (TimeoutError("x"), "timeout"),
        (redis.BusyLoadingError("x"), "loading"),
        (redis.exceptions.MasterDownError("x"), "loading"),
        (redis.exceptions.ClusterDownError("x"), "down"),
        (redis.exceptions.MovedError("1 h:1"), "moved"),
        (redis.exceptions.AskError("1 h:1"), "moved"),
        (redis.exceptions.TryAgainError("x"), "moved"),
        (redis.ReadOnlyError("x"), "readonly"),
        (redis.exceptions.OutOfMemoryError("x"), "oom"),
        (redis.InvalidResponse("x"), "protocol"),
        (redis.ConnectionError("x"), "conn"),
        (OSError("x"), "conn"),
        (redis.ResponseError("BUSY x"), "busy"),
        (redis.ResponseError("MISCONF x"), "misconf"),
        (redis.ResponseError("ERR x"), "response"),
        (KeyError("x"), "error"),
        (7, "protocol"),
        (b"x", "protocol"),
        (None, "protocol"),
    ],
)
def test_each_reply_has_one_reason(reply: Any, reason: str) -> None:
    assert reason_of(reply) == reason


@pytest.mark.parametrize(
    ("faults", "verdict"),
    [
        ([], True),
        ([redis.exceptions.MovedError("1 h:1"), redis.ReadOnlyError("x")], True),
        ([redis.exceptions.ClusterDownError("x"), redis.exceptions.NoPermissionError("x")], True),
        ([TooBig(), redis.ResponseError("ERR x")], True),
        ([redis.ReadOnlyError("x"), redis.ConnectionError("x")], False),
        ([redis.AuthenticationError("x")], False),
        ([redis.BusyLoadingError("x")], False),
        ([KeyError("x")], False),
        ([NoConnection(), redis.ConnectionError("x")], None),
    ],
)
def test_what_faults_say_of_the_link(faults: list[Exception], verdict: bool | None) -> None:
    assert works(faults) is verdict
