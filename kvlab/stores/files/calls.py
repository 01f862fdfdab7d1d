"""Calls that may block for ever, with a deadline: a thread makes the call, and the caller stops waiting for it.

A system call to a disk cannot be interrupted. A thread that hangs in one is abandoned, until the disk answers. There
are at most THREADS threads. While all of them hang, a call waits for its deadline and is a fault; after three faults
the breaker refuses calls at once, except for one a second.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, TypeVar

from kvlab.errors import ConfigError
from kvlab.stores.breaker import Breaker
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.files.folder import Gone, Stopped
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Latch
from kvlab.stores.workers import Workers

THREADS: Final = 4
_BY_ERRNO: Final = {
    errno.ENOSPC: Reason.OOM,
    errno.EDQUOT: Reason.OOM,
    errno.EROFS: Reason.READONLY,
    errno.EACCES: Reason.AUTH,
    errno.EPERM: Reason.AUTH,
    errno.EIO: Reason.IO,
    errno.ESTALE: Reason.IO,
}
_OPENS_BREAKER: Final = frozenset({Reason.TIMEOUT, Reason.IO})
"""The other faults cost no time."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Failed(Exception):
    """A call without a result, and the reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def reason_of(error: BaseException) -> Reason:
    """Return the reason under which an error is counted."""
    if isinstance(error, Failed):
        return error.reason
    if isinstance(error, Gone | ConfigError):
        return Reason.GONE
    if isinstance(error, Stopped):
        return Reason.TIMEOUT
    return _BY_ERRNO.get(error.errno or 0, Reason.ERROR) if isinstance(error, OSError) else Reason.ERROR


class Call(Generic[T]):
    """One call. The thread that makes it asks `abandoned` before it changes anything that others see."""

    def __init__(self, work: Callable[[Call[T]], T], dispose: Callable[[T], object]) -> None:
        self._work: Callable[[Call[T]], T] | None = work
        self._dispose = dispose
        self._results: list[T] = []  # popped once, by the caller or for `dispose`
        self.error: BaseException | None = None
        self.done = Latch()
        self.started = self.abandoned = False

    def run(self) -> None:
        """Make the call, in a thread."""
        work, self._work, self.started = self._work, None, True
        if work is not None and not self.abandoned:
            try:
                self._results.append(work(self))
            except BaseException as error:
                self.error = error
        self.done.set()
        if self.abandoned:
            self._dispose_of_result()

    def abandon(self) -> None:
        """Say that nobody waits any more. Does nothing to a call whose result was taken."""
        self._work = None  # what it would write, for example
        self.abandoned = True
        if self.done.is_set:
            self._dispose_of_result()

    def result(self) -> T:
        """Return the result of a call that is done.

        Raises:
            BaseException: what the call raised.
        """
        if self.error is not None:
            raise self.error
        return self._results.pop()

    def _dispose_of_result(self) -> None:
        with contextlib.suppress(IndexError):  # taken by the caller, or disposed of
            self._dispose(self._results.pop())


class Calls:
    """Makes calls. Thread-safe. `breaker` opens if the disk does not answer."""

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.reset_after_fork()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._threads = Workers(THREADS, "kvlab-files")

    def run(
        self,
        deadline: Deadline,
        work: Callable[[Call[T]], T],
        dispose: Callable[[T], object] = lambda result: None,
        always: bool = False,
    ) -> T:
        """Make a call, and wait for its result until the deadline, which the call may extend.

        Args:
            dispose: gets the result if nobody waits for it any more.
            always: also if the breaker is open.

        Raises:
            Failed: there is no result.
            ConfigError: the call has raised it.
        """
        call = Call(work, lambda result: self.start(partial(dispose, result)))
        refused = False
        works: bool | None = None
        try:
            refused = not self.breaker.allow() and not always
            if refused:
                raise Failed(Reason.BREAKER)
            self._threads.submit(call.run)
            while not call.done.wait(deadline.remaining):
                if deadline.passed:
                    works = False
                    raise Failed(Reason.TIMEOUT if call.started else Reason.POOL)
            result = call.result()
            works = True
            return result
        except (Failed, ConfigError):
            raise
        except Exception as error:
            reason = reason_of(error)
            works = reason not in _OPENS_BREAKER
            if reason == Reason.ERROR:
                logger.debug("a call to a disk failed", exc_info=True)
            raise Failed(reason) from error
        finally:
            call.abandon()
            if not refused:
                self.breaker.record(works)

    def start(self, work: Callable[[], object]) -> None:
        """Make a call that nobody waits for and that raises nothing, such as closing a file."""
        try:
            self._threads.submit(work)
        except RuntimeError:  # the interpreter is ending
            work()
