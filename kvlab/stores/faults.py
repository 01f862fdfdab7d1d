"""The reasons why a block was not read or not written: one enum for stores, caches and engines.

`StoreStats` and `CacheStats` count misses and dropped writes by reason. Benchmarks, tests and
runbooks use the same words.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a block was not read or not written. Each member equals its text: `Reason.ABSENT == "absent"`."""

    # There is no fault.
    ABSENT = "absent"  # no value is stored under the key
    TOO_BIG = "too_big"  # the value exceeds the buffer, or the largest value of the store or of the server
    CLOSED = "closed"  # the store is closed
    QUEUE_FULL = "queue_full"  # the queue of `WriteBehind` is full
    PRESSURE = "pressure"  # the store writes too slowly for what `WriteBehind` has queued
    COLLAPSED = "collapsed"  # a newer value for the key replaced this one in the queue
    DELETED = "deleted"  # the key was deleted while the value was in the queue

    # The command was not sent.
    BREAKER = "breaker"  # the server failed recently and gets no calls
    POOL = "pool"  # no connection became free, or another thread kept requesting the map

    # The server failed, or did not execute the command.
    TIMEOUT = "timeout"  # the deadline passed
    CONN = "conn"  # the connection could not be opened, or broke
    PROTOCOL = "protocol"  # the reply is not a valid reply to the command
    LOADING = "loading"  # the server is loading its data, or is a replica without a link to its master
    BUSY = "busy"  # a script is blocking the server
    AUTH = "auth"  # the login was refused, or the user lacks a permission (for a command, or for a file)
    DOWN = "down"  # no server serves the slot of the key
    MOVED = "moved"  # another server has the slot of the key
    RESPONSE = "response"  # any other error reply
    ERROR = "error"  # any other exception

    # The disk failed (`kvlab.stores.files`).
    IO = "io"  # the disk reported an error, or a file was cut while it was read
    GONE = "gone"  # the folder is not there any more, or another one is in its place

    # The server refuses writes.
    OOM = "oom"  # its memory is full, and its policy evicts nothing; or the disk is full
    READONLY = "readonly"  # the server is a replica, or the disk cannot be written
    MISCONF = "misconf"  # the server cannot persist its data, and therefore refuses writes
    NOREPLICAS = "noreplicas"  # fewer replicas are in sync than the server requires

    # The bytes are not a valid record of the key (`kvlab.core.record`).
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
    OVERFLOW = "overflow"  # a number exceeds the range of the precision or of the reader

    # Counted by the cache itself.
    GAP = "gap"  # an earlier block is missing, so this block cannot be used, stored or not
    LATE = "late"  # the engine did not wait any longer for the block
    STORE = "store"  # the store dropped the block; the store counts the reason

    def __repr__(self) -> str:
        return repr(self.value)  # so that counters print plain strings
