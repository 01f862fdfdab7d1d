"""Classify replies: the reason under which a reply is counted, and what it says about the server.

The error words are those that Redis 8 and Valkey 9 can return to the commands of this store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import redis
from redis.exceptions import AskError, ClusterDownError, TryAgainError

from kvlab.stores.faults import Reason
from kvlab.stores.redis.connection import Reply, TooBig
from kvlab.stores.redis.pool import NoConnection


class Refused(Exception):
    """A command without a usable reply, and the reason: it was not sent, or its reply must not be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


# The first match counts: in redis-py, AuthenticationError is a ConnectionError, MasterDownError a ClusterDownError.
_BY_CLASS: Final[tuple[tuple[type[BaseException], Reason], ...]] = (
    (TooBig, Reason.TOO_BIG),
    (NoConnection, Reason.POOL),
    (redis.AuthenticationError, Reason.AUTH),
    (redis.exceptions.AuthenticationWrongNumberOfArgsError, Reason.AUTH),
    (redis.exceptions.NoPermissionError, Reason.AUTH),
    (redis.TimeoutError, Reason.TIMEOUT),
    (TimeoutError, Reason.TIMEOUT),
    (redis.BusyLoadingError, Reason.LOADING),
    (redis.exceptions.MasterDownError, Reason.LOADING),
    (ClusterDownError, Reason.DOWN),
    (AskError, Reason.MOVED),  # MovedError is an AskError
    (TryAgainError, Reason.MOVED),
    (redis.ReadOnlyError, Reason.READONLY),
    (redis.exceptions.OutOfMemoryError, Reason.OOM),
    (redis.exceptions.InvalidResponse, Reason.PROTOCOL),
    (redis.ConnectionError, Reason.CONN),
    (OSError, Reason.CONN),
)
_BY_WORD: Final = {  # the first word of error replies for which redis-py has no class; any other word is RESPONSE
    "BUSY": Reason.BUSY,
    "MISCONF": Reason.MISCONF,
    "NOREPLICAS": Reason.NOREPLICAS,
    "DENIED": Reason.AUTH,  # protected mode
    "REDIRECT": Reason.READONLY,  # a Valkey replica names its primary
    "NOMASTERLINK": Reason.LOADING,
}
_FULL: Final = "max number of clients"  # more words follow in a cluster
_OPENS_BREAKER: Final = frozenset(["timeout", "conn", "protocol", "loading", "busy", "error"])
NO_FAULT: Final = frozenset({Reason.ABSENT, Reason.TOO_BIG, Reason.RESPONSE, Reason.MOVED})
"""Reasons that are not faults of a round trip."""
OF_ONE_KEY: Final = NO_FAULT | {Reason.DOWN}
"""Reasons that say nothing about other keys of the same server."""
HINTS: Final = frozenset(["moved", "down", "readonly", "conn", "timeout", "protocol", "loading", "breaker"])
"""Reasons that suggest that another server has the keys now."""


def reason_of(reply: Reply) -> Reason:
    """Return the reason under which an unsuccessful reply is counted."""
    if isinstance(reply, Refused):
        return reply.reason
    if not isinstance(reply, BaseException):
        return Reason.PROTOCOL
    for kind, reason in _BY_CLASS:
        if isinstance(reply, kind):
            return reason
    if not isinstance(reply, redis.ResponseError):
        return Reason.ERROR
    if str(reply).startswith(_FULL):
        return Reason.CONN
    return _BY_WORD.get(str(reply).partition(" ")[0], Reason.RESPONSE)


def server_works(faults: Iterable[Exception]) -> bool | None:
    """Return whether the server works, for its breaker; None if the faults do not show it."""
    reasons = {reason_of(fault) for fault in faults if not isinstance(fault, redis.exceptions.NoPermissionError)}
    if Reason.POOL in reasons:
        return None
    return not (reasons & _OPENS_BREAKER or Reason.AUTH in reasons)


def takes_writes(replies: Sequence[Reply]) -> bool | None:
    """Return whether the server accepts writes, for its write breaker; None if the replies do not show it.

    Every error reply counts unless it concerns one key, whatever its words: otherwise a server that refuses
    all writes would be sent every value again and again.
    """
    if any(map(is_ok, replies)):
        return True
    errors = [reply for reply in replies if isinstance(reply, redis.ResponseError)]
    return False if any(not _concerns_one_key(error) for error in errors) else None


def _concerns_one_key(error: redis.ResponseError) -> bool:
    if isinstance(error, ClusterDownError):
        return "slot not served" in str(error)
    return isinstance(error, AskError | TryAgainError | redis.exceptions.ClusterCrossSlotError)


def is_ok(reply: Reply) -> bool:
    """Return whether a SET succeeded."""
    return reply is True or (type(reply) is bytes and reply == b"OK")


def is_value(reply: Reply) -> bool:
    """Return whether a GET returned a value."""
    return type(reply) is memoryview or type(reply) is bytes


def in_words(error: Exception, secrets: Sequence[str] = ()) -> str:
    """Return a fault in one line, for `health`, without secrets: servers repeat unknown arguments."""
    text = " ".join(str(error).split())
    text = re.sub(r",? with args beginning with:.*", "", text, flags=re.IGNORECASE)
    for secret in secrets:
        text = text.replace(secret, "***")
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{reason_of(error)}: {text}{notes}"
