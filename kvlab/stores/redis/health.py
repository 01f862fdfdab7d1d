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
from kvlab.stores.redis.node import Node, says_no
from kvlab.stores.redis.pool import FakePool
from kvlab.stores.redis.reasons import in_words, reason_of

_READS: Final = 2  # the first commands tried
_SAMPLE: Final = 256  # names, in as many slots, that tell whether a server has all keys


@dataclass(frozen=True)
class Finding:
    """What was found about one server: what is wrong with it, "" for nothing, and what its operator should know."""

    wrong: str = ""
    note: str = ""


def examine(node: Node, name: bytes, deadline: Deadline, refresh: Command, more: Sequence[Command]) -> Finding:
    """Try every command of the store on one key, whatever the breaker says; that learns from it.

    Args:
        name: of a key that the server has, and that expires at once.
        refresh: the command by which the store makes that key live longer.
        more: commands of the topology.
    """
    tried: list[Command] = [(b"GET", name), (b"EXISTS", name), (b"SET", name, b"", b"PX", b"1000")]
    tried += [refresh, (b"DEL", name), *more]
    asked: list[Command] = [] if isinstance(node.pool, FakePool) else [(b"INFO", b"memory"), (b"INFO", b"server")]
    replies = node.try_all([*tried, *asked], deadline)
    answers, infos = replies[: len(tried)], replies[len(tried) :]
    fault = next((reply for reply in answers if isinstance(reply, Exception)), None)
    refused = next((reply for reply in infos if isinstance(reply, Exception)), None)
    if fault is None and refused is not None and not says_no(refused):
        fault = refused
    mode = _mode(infos[-1]) if infos else ""
    if fault is None and mode == "cluster" and (elsewhere := _elsewhere(node, deadline)):
        fault = elsewhere
    if fault is None:
        return Finding(note=f"; it does not tell its memory: {_words(node, refused)}" if refused else "")
    if mode == "cluster" and not more and reason_of(fault) in (Reason.MOVED, Reason.DOWN):
        return Finding("moved: this is a node of a Redis Cluster, which redis-cluster:// speaks to")
    if mode == "sentinel":
        return Finding(f"{_words(node, fault)}: this is a sentinel, which redis-sentinel://…/NAME speaks to")
    works = any(isinstance(answer, Exception) for answer in answers[:_READS])
    return Finding(f"{'' if works else 'reads work, but '}{_words(node, fault)}{_missing(tried, answers)}")


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
    replies = node.try_all([(b"EXISTS", health_name()) for _ in range(_SAMPLE)], deadline)
    return next((reply for reply in replies if isinstance(reply, Exception)), None)


def _missing(tried: Sequence[Command], answers: Sequence[Reply]) -> str:
    """Which commands the server does not know, if it knows others."""
    unknown = [
        str(command[0], "ascii")  # type: ignore[arg-type]  # a command's name is bytes
        for command, answer in zip(tried, answers, strict=True)
        if isinstance(answer, redis.ResponseError) and "unknown command" in str(answer).lower()
    ]
    if not unknown:
        return ""
    if len(unknown) == len(tried):
        return ": it knows none of the commands of a Redis that keeps data"
    return f": the store needs {', '.join(unknown)}; was it renamed or switched off?"
