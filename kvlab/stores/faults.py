"""Why a block was not read or not written: one enum, one spelling, for stores, caches and engines.

A reason is a counter's name. `StoreStats` and `CacheStats` count misses and drops under them, and each
benchmark, test and runbook uses these words.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why. Each member is its own text: `Reason.ABSENT == "absent"`."""

    # The store works.
    ABSENT = "absent"  # nothing is stored under this key
    TOO_BIG = "too_big"  # the value does not fit the buffer, the server's share of memory or the store
    CLOSED = "closed"  # the store was closed
    QUEUE_FULL = "queue_full"  # write-behind has no room
    COLLAPSED = "collapsed"  # a newer value for the key took its place in the queue
    DELETED = "deleted"  # deleted while it waited in the queue

    # The call never left this process.
    BREAKER = "breaker"  # the server failed a moment ago and is left alone
    POOL = "pool"  # every connection stayed in use

    # The server does not answer as it should.
    TIMEOUT = "timeout"  # the deadline passed
    CONN = "conn"  # the connection could not be made, or broke
    PROTOCOL = "protocol"  # the answer is none that this command has
    LOADING = "loading"  # the server reads its data, or is a replica without its master
    BUSY = "busy"  # a script blocks the server
    AUTH = "auth"  # the login is refused, or the user lacks a right
    DOWN = "down"  # nobody serves the key's slot
    MOVED = "moved"  # another server has the key's slot
    RESPONSE = "response"  # any other error reply
    ERROR = "error"  # anything else that was raised

    # The server takes no writes.
    OOM = "oom"  # its memory is full and its policy evicts nothing
    READONLY = "readonly"  # it is a replica
    MISCONF = "misconf"  # it cannot persist, and therefore refuses
    NOREPLICAS = "noreplicas"  # fewer replicas are in sync than it demands

    # The bytes are no record of this key (`kvlab.core.record`).
    MAGIC = "magic"
    VERSION = "version"
    KIND = "kind"
    LENGTH = "length"
    KEY = "key"
    KEY_ID = "key_id"
    CHECKSUM = "checksum"
    FORGED = "forged"
    PRECISION = "precision"
    CODEC = "codec"
    DIMS = "dims"
    OVERFLOW = "overflow"  # a number is beyond what the precision or the reader holds

    # The cache's own.
    GAP = "gap"  # stored or not, a block after a missing one cannot be used
    STORE = "store"  # the store dropped it; its own counters say why

    def __repr__(self) -> str:
        return repr(self.value)  # counters print as they would with plain text
