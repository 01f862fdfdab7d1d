"""What a reply means: the one reason that it is counted under, and what it says of the server.

The error words are those that Redis 8 and Valkey 9 can send to the commands of this store.
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
    """A command that was not sent, and why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


# First match wins: in redis-py an authentication error is a ConnectionError too, MASTERDOWN a CLUSTERDOWN.
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
    (AskError, Reason.MOVED),  # MOVED too
    (TryAgainError, Reason.MOVED),
    (redis.ReadOnlyError, Reason.READONLY),
    (redis.exceptions.OutOfMemoryError, Reason.OOM),
    (redis.exceptions.InvalidResponse, Reason.PROTOCOL),
    (redis.ConnectionError, Reason.CONN),
    (OSError, Reason.CONN),
)
_BY_WORD: Final = {  # the first words of error replies that redis-py has no class for
    "BUSY": Reason.BUSY,
    "MISCONF": Reason.MISCONF,
    "NOREPLICAS": Reason.NOREPLICAS,
    "DENIED": Reason.AUTH,  # protected mode
    "REDIRECT": Reason.READONLY,  # a Valkey replica names its primary
    "NOMASTERLINK": Reason.LOADING,
}
_FULL: Final = "max number of clients"  # with more words behind it in a cluster
_LINK_FAULTS: Final = frozenset(["timeout", "conn", "protocol", "loading", "busy", "error"])
NO_FAULT: Final = frozenset({Reason.ABSENT, Reason.TOO_BIG, Reason.RESPONSE, Reason.MOVED})
"""Reasons that are no failure of a round trip."""
OF_ONE_KEY: Final = NO_FAULT | {Reason.DOWN}
"""Reasons that say nothing about the other keys of the same server."""
HINTS: Final = frozenset(["moved", "down", "readonly", "conn", "timeout", "protocol", "loading", "breaker"])
"""Reasons that may mean that another server has the keys now."""


def reason_of(reply: Reply) -> Reason:
    """Why a reply is not the one hoped for: the counter that it belongs to."""
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


def works(faults: Iterable[Exception]) -> bool | None:
    """Whether the server answers as it should, for its breaker; None when that was not found out."""
    reasons = {reason_of(fault) for fault in faults if not isinstance(fault, redis.exceptions.NoPermissionError)}
    if Reason.POOL in reasons:
        return None
    return not (reasons & _LINK_FAULTS or Reason.AUTH in reasons)


def takes_writes(replies: Sequence[Reply]) -> bool | None:
    """Whether the server takes writes, for its write breaker; None when that was not found out.

    Any refusal counts that is not about one key, in whatever words: a server that refuses all writes is
    not sent every value again and again.
    """
    if any(map(is_ok, replies)):
        return True
    errors = [reply for reply in replies if isinstance(reply, redis.ResponseError)]
    return False if any(not _is_of_one_key(error) for error in errors) else None


def _is_of_one_key(error: redis.ResponseError) -> bool:
    if isinstance(error, ClusterDownError):
        return "slot not served" in str(error)
    return isinstance(error, AskError | TryAgainError | redis.exceptions.ClusterCrossSlotError)


def is_ok(reply: Reply) -> bool:
    """Whether a SET was taken."""
    return reply is True or (type(reply) is bytes and reply == b"OK")


def is_value(reply: Reply) -> bool:
    """Whether a GET brought a value."""
    return type(reply) is memoryview or type(reply) is bytes


def in_words(error: Exception, secrets: Sequence[str] = ()) -> str:
    """A fault as `health` tells it, in one line, without secrets: servers repeat arguments they do not know."""
    said = " ".join(str(error).split())
    said = re.sub(r",? with args beginning with:.*", "", said, flags=re.IGNORECASE)
    for secret in secrets:
        said = said.replace(secret, "***")
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{reason_of(error)}: {said}{notes}"
