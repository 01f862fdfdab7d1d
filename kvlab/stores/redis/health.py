"""The health check of one server: every command is tried, and the result is one line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import redis

from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.connection import Command, Reply
from kvlab.stores.redis.node import Batch, Node, is_refusal
from kvlab.stores.redis.pool import FakePool
from kvlab.stores.redis.reasons import in_words, reason_of

_READS: Final = 2  # the first commands only read
_TOUCH: Final = 3  # and this one records the use of a key
_INFO_COMMANDS: Final[tuple[Command, ...]] = ((b"INFO", b"memory"), (b"INFO", b"server"))  # tried last
_SAMPLE: Final = 256  # random keys that show whether a server has all slots


@dataclass(frozen=True)
class Finding:
    """The result for one server: its fault, or "", and a note for its operator."""

    wrong: str = ""
    note: str = ""


def commands_to_try(node: Node, name: bytes, touch: Sequence[bytes], more: Sequence[Command]) -> list[Command]:
    """Return every command that the store uses on one server, and the INFO commands.

    Args:
        name: a health key in a slot of the server. SET gives it one second, PEXPIRE `ttl_s`; DEL deletes it.
        touch: the command that records the use of a key, without the key.
        more: the commands of the topology.
    """
    commands: list[Command] = [(b"GET", name), (b"EXISTS", name), (b"SET", name, b"", b"PX", b"1000")]
    commands += [(touch[0], name, *touch[1:]), (b"DEL", name), *more]
    return commands if isinstance(node.pool, FakePool) else [*commands, *_INFO_COMMANDS]


def evaluate(node: Node, sent: Sequence[Command], replies: Sequence[Reply], alone: bool, deadline: Deadline) -> Finding:
    """Evaluate the replies to `commands_to_try`. INFO may be refused. `alone`: the store knows no other server."""
    secrets = node.pool.secrets
    infos = replies[-len(_INFO_COMMANDS) :] if sent[-1] in _INFO_COMMANDS else []
    answers = replies[: len(replies) - len(infos)]
    refused = next((reply for reply in infos if isinstance(reply, Exception)), None)
    fault = next((reply for reply in answers if isinstance(reply, Exception)), None)
    if fault is None and refused is not None and not is_refusal(refused):
        fault = refused
    mode = _mode(infos[-1]) if infos else ""
    if fault is None and mode == "cluster" and alone:
        fault = _first_redirect(node, deadline)
    if fault is None:
        return Finding(note=f"; it refuses INFO: {in_words(refused, secrets)}" if refused else "")
    if mode == "cluster" and alone and reason_of(fault) in (Reason.MOVED, Reason.DOWN):
        return Finding("moved: this is a node of a Redis Cluster; use redis-cluster://")
    if mode == "sentinel":
        return Finding(f"{in_words(fault, secrets)}: this is a sentinel; use redis-sentinel://…/NAME")
    reads = "" if _reads_fail(sent, answers) else "reads work, but "
    return Finding(f"{reads}{in_words(fault, secrets)}{_missing(sent, answers)}")


def _reads_fail(sent: Sequence[Command], answers: Sequence[Reply]) -> bool:
    """Return whether loads are misses. Where there is a TTL, a load whose PEXPIRE is refused is one, too."""
    touch, touched = sent[_TOUCH], answers[_TOUCH]
    refused = touch[0] == b"PEXPIRE" and isinstance(touched, Exception) and is_refusal(touched)
    return refused or any(isinstance(answer, Exception) for answer in answers[:_READS])


def health_name() -> bytes:
    """Return a random key of the store that no block has."""
    return b"kv:health:" + os.urandom(8).hex().encode()


def _mode(info: Reply) -> str:
    """Return the mode that INFO reports: standalone, sentinel or cluster; "" if it reports none."""
    found = re.search(rb"^(?:redis|server)_mode:(\w+)", info, re.MULTILINE) if isinstance(info, bytes) else None
    return found[1].decode() if found else ""


def _first_redirect(node: Node, deadline: Deadline) -> Exception | None:
    """Return the first error for random keys, if any: a cluster node redirects keys that it does not have."""
    sample: list[Command] = [(b"EXISTS", health_name()) for _ in range(_SAMPLE)]
    answer = node.send(Batch("send", (), sample, always=True), range(_SAMPLE), deadline)
    return next((reply for reply in answer.replies if isinstance(reply, Exception)), None)


def _missing(sent: Sequence[Command], answers: Sequence[Reply]) -> str:
    """Return the end of a line that names the commands which the server does not know."""
    unknown = [
        str(command[0], "ascii")  # type: ignore[arg-type]  # a command's name is bytes
        for command, answer in zip(sent, answers, strict=False)
        if isinstance(answer, redis.ResponseError) and "unknown command" in str(answer).lower()
    ]
    if not unknown:
        return ""
    if len(unknown) == len(answers):
        return ": it knows none of the commands that the store needs"
    return f": the store needs {', '.join(unknown)}; was it renamed or switched off?"
