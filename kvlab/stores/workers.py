"""Threads that run jobs, and stay usable when a signal handler raises while a job is handed over.

`concurrent.futures.ThreadPoolExecutor` counts its idle threads in a `threading.Semaphore`, which is Python code
around a lock (see `latch`): a handler that raises inside `submit` leaves the lock acquired, and every later
`submit` hangs. Here the caller only makes single calls of C code, and all counts are kept by the threads
themselves, in which no signal handler runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


class _Crew:
    """What the threads of one `Workers` share. They do not refer to the `Workers`, so that it can be collected."""

    def __init__(self, most: int, name: str) -> None:
        self.name = name
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.most = most
        self.count = 0
        self.idle = 0
        self.lock = threading.Lock()

    def start_if_needed(self) -> None:
        """Start a thread if more jobs wait than threads are idle.

        Raises:
            RuntimeError: it cannot be started, and there is no other.
        """
        if self.jobs.qsize() > self.idle and self.count < self.most:
            try:
                threading.Thread(target=self.work, name=self.name, daemon=True).start()
            except RuntimeError:
                if not self.count:
                    raise

    def work(self) -> None:
        """Run jobs until None comes. A thread too many ends at once."""
        with self.lock:
            if self.count >= self.most:
                return
            self.count += 1
        while True:
            with self.lock:
                self.idle += 1
            job = self.jobs.get()
            with self.lock:
                self.idle -= 1
            if job is None:
                self.jobs.put(None)  # for the next thread
                return
            self.start_if_needed()  # for a job whose caller still saw this thread idle
            job()
            del job


class Workers:
    """At most `most` threads, which are started when jobs come and end when nobody refers to this object.

    A job handles its own exceptions. The threads do not keep the interpreter from ending.
    """

    def __init__(self, most: int, name: str) -> None:
        self._crew = _Crew(most, name)

    def submit(self, job: Job) -> None:
        """Run `job` in a thread as soon as one is free.

        Raises:
            RuntimeError: no thread can be started, and none of the earlier ones is there. The job may run later.
        """
        if sys.is_finalizing():
            raise RuntimeError("the interpreter is ending: its threads run no more jobs")
        self._crew.jobs.put(job)
        self._crew.start_if_needed()

    def __del__(self) -> None:
        self._crew.jobs.put(None)
