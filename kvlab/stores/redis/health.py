"""Whether a server can do what the store asks of it: every command tried, and what is wrong in one line."""

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
from kvlab.stores.redis.node import Batch, Node, says_no
from kvlab.stores.redis.pool import FakePool
from kvlab.stores.redis.reasons import in_words, reason_of

_READS: Final = 2  # the first commands tried
_QUESTIONS: Final[tuple[Command, ...]] = ((b"INFO", b"memory"), (b"INFO", b"server"))  # the last; may be refused
_SAMPLE: Final = 256  # names, in as many slots, that tell whether a server has all keys


@dataclass(frozen=True)
class Finding:
    """What was found about one server: what is wrong with it, "" for nothing, and what its operator should know."""

    wrong: str = ""
    note: str = ""


def trials(node: Node, name: bytes, touch: Sequence[bytes], more: Sequence[Command]) -> list[Command]:
    """Every command that the store uses on one server, and questions about it.

    Args:
        name: of a key that the server has, and that expires at once.
        touch: how the store tells that a key was used: verb and arguments.
        more: commands of the topology.
    """
    tried: list[Command] = [(b"GET", name), (b"EXISTS", name), (b"SET", name, b"", b"PX", b"1000")]
    tried += [(touch[0], name, *touch[1:]), (b"DEL", name), *more]
    return tried if isinstance(node.pool, FakePool) else [*tried, *_QUESTIONS]


def finding(node: Node, tried: Sequence[Command], replies: Sequence[Reply], alone: bool, deadline: Deadline) -> Finding:
    """What the replies to `trials` say of a server. `alone`: the store knows of no other."""
    infos = replies[-len(_QUESTIONS) :] if tried[-1] in _QUESTIONS else []
    answers = replies[: len(replies) - len(infos)]
    refused = next((reply for reply in infos if isinstance(reply, Exception)), None)
    fault = next((reply for reply in answers if isinstance(reply, Exception)), None)
    if fault is None and refused is not None and not says_no(refused):
        fault = refused
    mode = _mode(infos[-1]) if infos else ""
    if fault is None and mode == "cluster" and alone:
        fault = _elsewhere(node, deadline)
    if fault is None:
        return Finding(note=f"; it does not tell its memory: {_words(node, refused)}" if refused else "")
    if mode == "cluster" and alone and reason_of(fault) in (Reason.MOVED, Reason.DOWN):
        return Finding("moved: this is a node of a Redis Cluster, which redis-cluster:// speaks to")
    if mode == "sentinel":
        return Finding(f"{_words(node, fault)}: this is a sentinel, which redis-sentinel://…/NAME speaks to")
    reads = "" if any(isinstance(answer, Exception) for answer in answers[:_READS]) else "reads work, but "
    return Finding(f"{reads}{_words(node, fault)}{_missing(tried, answers)}")


def health_name() -> bytes:
    """A key of the store that no block has."""
    return b"kv:health:" + os.urandom(8).hex().encode()


def _words(node: Node, error: Exception) -> str:
    return in_words(error, node.pool.secrets)


def _mode(info: Reply) -> str:
    """What a server says that it is: standalone, sentinel, cluster; "" if it does not say."""
    found = re.search(rb"^(?:redis|server)_mode:(\w+)", info, re.MULTILINE) if isinstance(info, bytes) else None
    return found[1].decode() if found else ""


def _elsewhere(node: Node, deadline: Deadline) -> Exception | None:
    """That a node of a cluster does not have all keys: what it says of one that it has not."""
    sample: list[Command] = [(b"EXISTS", health_name()) for _ in range(_SAMPLE)]
    answer = node.ask(Batch("ask", (), sample, always=True), range(_SAMPLE), deadline)
    return next((reply for reply in answer.replies if isinstance(reply, Exception)), None)


def _missing(tried: Sequence[Command], answers: Sequence[Reply]) -> str:
    """Which commands the server does not know, if it knows others."""
    unknown = [
        str(command[0], "ascii")  # type: ignore[arg-type]  # a command's name is bytes
        for command, answer in zip(tried, answers, strict=False)
        if isinstance(answer, redis.ResponseError) and "unknown command" in str(answer).lower()
    ]
    if not unknown:
        return ""
    if len(unknown) == len(answers):
        return ": it knows none of the commands of a Redis that keeps data"
    return f": the store needs {', '.join(unknown)}; was it renamed or switched off?"
