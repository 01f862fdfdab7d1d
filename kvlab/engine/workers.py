"""Worker processes of this machine, behind one face: requests are routed, streamed, and survive their worker.

    submit -> router -> pipe -> worker process (`kvlab.engine.worker`) -> pipe -> Answer

Which worker gets a request is decided by a router (`kvlab.engine.router`), from what the workers report of their
blocks. A worker that dies is started again, and its requests go on elsewhere, from the prompt plus the tokens that
were given out: decoding is greedy, so the rest of the answer is what the first worker would have said. A worker that
says nothing for `silent_s` is killed, and then the same happens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import operator
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from kvlab.core.keys import Namespace
from kvlab.engine.pages import PoolExhausted
from kvlab.engine.requests import Busy, Record
from kvlab.engine.router import ROUTERS, Balance, BlockIndex, Router
from kvlab.engine.worker import KEY_BYTES, Message, WorkerSettings
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.stores.base import check_number, check_ttl
from kvlab.stores.latch import Latch

if TYPE_CHECKING:
    from kvlab.engine.metrics import MetricsServer

COMMAND: Final = [sys.executable, "-P", "-c", "from kvlab.engine.worker import main; main()"]
START_S: Final = 120.0
TRIES: Final = 5
"""So many workers in a row may die before they give out a token of a request; then it fails. It may be what kills
them, or be unlucky beside one that does."""
STARTS: Final = 3
"""After so many processes in a row that ended before they were ready, no more are started in that place."""
REFUSALS: Final = 10
"""After so many starts in a row that the system refused, one a second, no more are tried in that place."""
ERRORS: Final = {error.__name__: error for error in (Busy, ConfigError, InputError, PoolExhausted)}
logger = logging.getLogger(__name__)


class WorkerError(KVLabError):
    """A request cannot be served, because workers died or cannot be started."""


@dataclass(eq=False)
class Answer:
    """One request, as its caller sees it. Iterating over it gives the tokens as they come, once.

    Attributes:
        tokens, token_at: the tokens that have come so far, and when (`time.perf_counter`).
        workers: the numbers of the workers that had it, more than one if some died.
        record: what the last worker says, once the answer has ended. Its times are of that worker's clock, and tokens
            that another worker had given out count to its prompt. None if the answer was cancelled before a worker
            had it, or its worker died between the last token and the record.
        error: why there is no more to come, if it failed.
    """

    id: str
    prompt: list[int] = field(repr=False)
    limit: int
    stop_at_eos: bool
    submitted_at: float
    ttl_s: float | None = None
    tokens: list[int] = field(default_factory=list, repr=False)
    token_at: list[float] = field(default_factory=list, repr=False)
    workers: list[int] = field(default_factory=list)
    record: Record | None = field(default=None, repr=False)
    error: KVLabError | None = None
    _cancel: Callable[[Answer], None] = field(default=lambda answer: None, repr=False)
    _is_cancelled: bool = field(default=False, repr=False)
    _deaths: int = field(default=0, repr=False)  # in a row, before a token came
    _news: SimpleQueue[int | None] = field(default_factory=SimpleQueue, repr=False)
    _done: Latch = field(default_factory=Latch, repr=False)

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended, well or not."""
        return self._done.is_set

    @property
    def ttft_s(self) -> float:
        """Seconds from `submit` to the first token."""
        return self.token_at[0] - self.submitted_at

    def __iter__(self) -> Iterator[int]:
        """Raises the error that ended the answer, after the tokens that came before it."""
        while (token := self._news.get()) is not None:
            yield token
        self._news.put(None)  # for who iterates once more, or in another thread
        if self.error is not None:
            raise self.error

    def result(self, timeout_s: float | None = None) -> list[int]:
        """Wait for the end, and return all tokens.

        Raises:
            WorkerError: it did not end in time; it goes on. Or workers died.
            Busy, InputError, PoolExhausted: the worker refused it.
        """
        if not self._done.wait(timeout_s):
            raise WorkerError(f"the answer has not ended after {timeout_s} s; it has {len(self.tokens)} tokens so far")
        self._done.set()  # wakes the next thread that waits
        if self.error is not None:
            raise self.error
        return self.tokens

    def cancel(self) -> None:
        """Give up the rest. What was computed until then stays in the cache, if it fills blocks."""
        self._cancel(self)

    def _add(self, index: int, token: int) -> None:
        if index == len(self.tokens):  # a repeat has a smaller one
            self.tokens.append(token)
            self.token_at.append(time.perf_counter())
            self._news.put(token)

    def _end(self, record: Record | None = None, error: KVLabError | None = None) -> None:
        if not self._done.is_set:
            self.record, self.error = record, error
            self._done.set()
            self._news.put(None)


@dataclass(eq=False)
class _Process:
    """One process, from its start to its end. One that is started in its place has another number."""

    number: int
    place: int
    popen: subprocess.Popen[bytes]
    outbox: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)
    ready: bool = False
    failure: str = ""
    heard_at: float = field(default_factory=time.monotonic)
    answers: dict[str, tuple[Answer, int]] = field(default_factory=dict)  # and how many tokens it had before
    asked_for_snapshot: bool = False


class WorkerGroup:
    """Several workers with the same settings. Thread-safe. A context manager that ends them on exit.

    Args:
        workers: how many processes.
        settings: of each.
        router: a name in `kvlab.engine.router.ROUTERS`, or a function like those there. If it raises, or names no
            worker, the request goes to the workers in turn.
        max_requests: requests that have not ended; one more is refused.
        silent_s: a worker that says nothing for so long is taken for dead.
        restart: whether a worker that dies is started again.
        metrics_port: where this process answers Prometheus (`kvlab.engine.metrics`). Each worker has the next port, in
            the order of their places; one that is started again has that of the one before it.
        metrics_address: where all of them listen.

    Raises:
        ConfigError: a setting is invalid, or the port of this process is taken.
        WorkerError: a worker did not start; the message says why.
    """

    def __init__(
        self,
        workers: int = 2,
        settings: WorkerSettings | None = None,
        *,
        router: str | Router = "cost",
        max_requests: int = 1024,
        silent_s: float = 30.0,
        restart: bool = True,
        metrics_port: int | None = None,
        metrics_address: str = "127.0.0.1",
    ) -> None:
        for name, size in (("workers", workers), ("max_requests", max_requests)):
            if type(size) is not int or size < 1:
                raise ConfigError(f"expected {name} as a whole number of at least 1, got {size!r}")
        if not callable(router) and router not in ROUTERS:
            raise ConfigError(f"expected a router of {', '.join(ROUTERS)}, or a function, got {router!r}")
        if not silent_s >= 1:  # an idle worker says something every TICK_S
            raise ConfigError(f"expected silent_s of at least 1 second, got {silent_s!r}")
        if metrics_port is not None:
            check_number("metrics_port", metrics_port, 0, 65535 - workers, whole=True)
        self._metrics = (metrics_port, metrics_address)
        self.settings = settings or WorkerSettings()
        try:
            self._first = json.dumps({"settings": self.settings.to_message(), "max_waiting": max_requests})
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"expected settings of plain values, which JSON can carry: {error}") from error
        self.router = router
        self._route: Router = router if callable(router) else ROUTERS[router]
        self._in_turn = ROUTERS["round_robin"]
        self._max_requests, self._silent_s, self._restart = max_requests, silent_s, restart
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._ids = itertools.count()
        self._routed = 0
        self._processes: dict[int, _Process] = {}
        self._parked: list[Answer] = []  # for the next worker that is ready
        self._failed_starts = dict.fromkeys(range(workers), 0)
        self._refused_starts = Counter[int]()  # by the system, in a row
        self._index, self._balance = BlockIndex(), Balance(())
        self._names: Namespace | None = None
        self._eos: list[int] = []
        self._asked: dict[int, SimpleQueue[tuple[int, Message]]] = {}  # by the number of a question
        self._deaths = 0
        self._metrics_server: MetricsServer | None = None
        self._closing = Latch()
        self._changed = threading.Event()  # a worker is ready, or will never be
        try:
            self._start_metrics()
            for place in range(workers):
                self._start_first(place)
            threading.Thread(target=self._watch, name="kvlab-watch", daemon=True).start()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of the workers that are ready, by number."""
        with self._lock:
            return {p.number: p.popen.pid for p in self._processes.values() if p.ready}

    # --- requests -------------------------------------------------------------------------------
    def submit(
        self,
        tokens: Sequence[int],
        max_new_tokens: int = 32,
        stop_at_eos: bool = True,
        ttl_s: float | None = None,
    ) -> Answer:
        """Send a request to a worker. What the worker refuses is raised by the answer.

        Args:
            ttl_s: see `Scheduler.submit`.

        Raises:
            Busy: `max_requests` have not ended.
            ConfigError: `ttl_s` is no TTL.
            InputError: no list of token numbers, `max_new_tokens` is no whole number of at least 1, or the group was
                closed.
            WorkerError: there is no worker, and none will be started.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"expected max_new_tokens as a whole number of at least 1, got {max_new_tokens!r}")
        check_ttl(ttl_s)
        try:
            prompt = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise InputError(f"expected a sequence of tokens as whole numbers: {error}") from error
        with self._lock:
            if self._closing.is_set:
                raise InputError("expected an open group of workers; it was closed")
            if sum(len(p.answers) for p in self._processes.values()) + len(self._parked) >= self._max_requests:
                raise Busy(f"{self._max_requests} requests have not ended, as many as allowed; try again later")
            assert self._names is not None, "no worker was ready yet"
            self._names.keys(prompt)  # raises now, not in a worker
            answer = Answer(
                f"r{next(self._ids)}",
                prompt,
                max_new_tokens,
                bool(stop_at_eos),  # not NumPy's, which JSON does not know
                time.perf_counter(),
                ttl_s,
                _cancel=self._give_up,
            )
            self._send(answer)
            if isinstance(answer.error, WorkerError):
                raise answer.error
            return answer

    def _send(self, answer: Answer) -> None:
        """Route a request, or what remains of it."""
        known = [*answer.prompt, *answer.tokens]
        remaining = answer.limit - len(answer.tokens)
        if answer.tokens and (remaining == 0 or (answer.stop_at_eos and answer.tokens[-1] in self._eos)):
            return answer._end()  # only the news of its end was lost
        if answer._is_cancelled:
            return answer._end()
        if answer._deaths >= TRIES:
            return answer._end(error=WorkerError(f"{TRIES} workers in a row ended while they had this request"))
        ready = [p for p in self._processes.values() if p.ready]
        if not ready:
            if self._processes or self._missing():
                self._parked.append(answer)
            else:
                answer._end(error=WorkerError("no worker is left, and none can be started"))
            return
        assert self._names is not None
        keys = [key[:KEY_BYTES] for key in self._names.keys(known)]
        matched = self._index.matched(keys)
        process = self._processes[self._choose(len(keys), matched)]
        work = len(known) - matched[process.number] * self._names.block_tokens + max(remaining, 0)
        self._routed += 1
        self._balance.give(process.number, answer.id, -(-work // self._names.block_tokens))
        self._index.expect(process.number, keys)
        process.answers[answer.id] = answer, len(answer.tokens)
        answer.workers.append(process.number)
        request: dict[str, Any] = {"tokens": known, "max_new_tokens": remaining, "stop_at_eos": answer.stop_at_eos}
        request |= {} if answer.ttl_s is None else {"ttl_s": answer.ttl_s}
        self._tell(process, "submit", id=answer.id, **request)

    def _choose(self, blocks: int, matched: Mapping[int, int]) -> int:
        candidates = [c for c in self._balance.candidates(matched) if self._processes[c.worker].ready]
        try:
            chosen = self._route(blocks, candidates, self._routed)
            if any(c.worker == chosen for c in candidates):
                return chosen
            logger.error("the router named %r, which is no worker that is ready", chosen)
        except Exception:  # a request must not hang or fail because of advice
            logger.exception("the router failed")
        return self._in_turn(blocks, candidates, self._routed)

    def _give_up(self, answer: Answer) -> None:
        with self._lock:
            answer._is_cancelled = True  # it does not go on elsewhere if its worker dies
            if answer in self._parked:
                self._parked.remove(answer)
                answer._end()
            for process in self._processes.values():
                if answer.id in process.answers:
                    self._tell(process, "cancel", id=answer.id)

    # --- what the workers say -------------------------------------------------------------------
    def _read(self, process: _Process) -> None:
        """In a thread: take in what a worker says, until it ends."""
        assert process.popen.stdout is not None
        with process.popen.stdout as pipe:
            for line in pipe:
                try:
                    message = json.loads(line)
                    handle = getattr(self, "_on_" + message.pop("is"))
                except (ValueError, AttributeError, TypeError, KeyError):  # the last line of one that was killed
                    continue
                try:
                    with self._lock:
                        process.heard_at = time.monotonic()
                        handle(process, **message)
                except Exception:  # if this thread ended here, the worker's requests would never end
                    logger.exception("what worker %d said cannot be used", process.number)
                    process.popen.kill()
        process.popen.wait()
        process.outbox.put(None)
        with self._lock:
            self._bury(process)

    def _on_ready(self, process: _Process, fingerprint: str, block_tokens: int, eos: list[int]) -> None:
        names = Namespace(
            bytes.fromhex(fingerprint), self.settings.precision, self.settings.salt.encode(), block_tokens
        )
        if self._names is not None and (self._names, self._eos) != (names, eos):  # an answer may have begun elsewhere
            what = "model is" if self._names != names else "eos_token_id is"
            process.failure = f"its {what} another than that of the other workers"
            return process.popen.kill()
        self._names, self._eos = names, eos
        process.ready = True
        self._failed_starts[process.place] = 0
        self._balance.add(process.number)
        self._changed.set()
        self._send_parked()

    def _on_failed(self, process: _Process, message: str) -> None:
        process.failure = message
        self._failed_starts[process.place] = STARTS  # another process would fail in the same way

    def _on_outputs(self, process: _Process, outputs: list[Message]) -> None:
        for output in outputs:
            if (entry := process.answers.get(output["id"])) is None:
                continue
            answer, before = entry
            if output["token"] is not None:
                answer._add(before + output["index"], output["token"])
            else:
                record = _to_record(output["record"])
                del process.answers[answer.id]
                self._balance.report(answer.id, 0)
                answer._end(record)

    def _on_refused(self, process: _Process, id: str, error: str, message: str) -> None:
        reason = ERRORS[error](message)
        if id in process.answers:
            answer, _ = process.answers.pop(id)
            self._balance.report(id, 0)
            answer._end(error=reason)

    def _on_blocks(self, process: _Process, seq: int, added: list[str], removed: list[str]) -> None:
        complete = self._index.apply(process.number, seq, _from_hex(added), _from_hex(removed))
        if not complete and not process.asked_for_snapshot:
            process.asked_for_snapshot = True
            self._tell(process, "snapshot")

    def _on_snapshot(self, process: _Process, seq: int, keys: list[str]) -> None:
        process.asked_for_snapshot = False
        self._index.reset(process.number, seq, _from_hex(keys))

    def _on_alive(self, process: _Process, load: int) -> None:
        pass  # it was heard

    def _on_stats(self, process: _Process, number: int, stats: Message) -> None:
        if (asked := self._asked.get(number)) is not None:
            asked.put((process.number, stats))

    def stats(self, timeout_s: float = 10.0) -> dict[int, Message]:
        """What each worker that is ready has counted, by its number; those that do not answer in time are left out."""
        number = next(self._ids)
        with self._lock:
            answers = self._asked[number] = SimpleQueue()
            asked = [p for p in self._processes.values() if p.ready]
            for process in asked:
                self._tell(process, "stats", number=number)
        found: dict[int, Message] = {}
        end = time.monotonic() + timeout_s
        try:
            while len(found) < len(asked):
                found |= [answers.get(timeout=max(0.0, end - time.monotonic()))]
        except Empty:
            pass
        finally:
            del self._asked[number]
        return found

    def counts(self) -> Counter[str]:
        """The workers that are "ready" and "starting", "deaths" of workers, and "requests" that have not ended."""
        with self._lock:
            found = Counter("ready" if p.ready else "starting" for p in self._processes.values())
            unfinished = sum(len(p.answers) for p in self._processes.values()) + len(self._parked)
            return found + Counter(deaths=self._deaths, requests=unfinished)

    # --- processes ------------------------------------------------------------------------------
    def _start(self, place: int) -> None:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.settings.threads),
        }
        popen = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        process = _Process(next(self._numbers), place, popen)
        self._processes[process.number] = process
        process.outbox.put(json.dumps(json.loads(self._first) | self._metrics_of(process)).encode() + b"\n")
        try:  # `_read` last: it is the one that buries the process
            for job in (self._write, self._read):
                thread = threading.Thread(
                    target=job, args=(process,), name=f"kvlab-worker-{process.number}", daemon=True
                )
                thread.start()
        except RuntimeError:  # the system gives no thread
            del self._processes[process.number]
            process.outbox.put(None)
            popen.kill()
            popen.wait()
            raise

    def _start_first(self, place: int) -> None:
        try:
            self._start(place)
        except (OSError, RuntimeError) as error:
            raise WorkerError(f"a worker cannot be started: {error}") from error

    def _try_start(self, place: int) -> None:
        """Start a process again. If the system has no room for one, `_watch` tries again, and gives up in the end."""
        try:
            self._start(place)
            self._refused_starts[place] = 0
        except (OSError, RuntimeError) as error:
            self._refused_starts[place] += 1
            logger.warning("no worker can be started in place %d now: %s", place, error)
            if place not in self._missing():
                logger.error("place %d of the group is given up: the system starts no process (%s)", place, error)

    def _missing(self) -> list[int]:
        """The places that have no process now and are to have one."""
        taken = {process.place for process in self._processes.values()}
        return [
            place
            for place, failed in self._failed_starts.items()
            if self._restart and place not in taken and failed < STARTS and self._refused_starts[place] < REFUSALS
        ]

    def _send_parked(self) -> None:
        """Send the requests that waited for a worker, or fail them if there will be none."""
        parked, self._parked = self._parked, []
        for answer in parked:
            self._send(answer)

    def _start_metrics(self) -> None:
        port, address = self._metrics
        if port is not None:
            from kvlab.engine.metrics import start_metrics  # it needs prometheus_client, and this module

            self._metrics_server = start_metrics(self, port, address)

    def _metrics_of(self, process: _Process) -> Message:
        """What a worker is told of its metrics. The first workers must have some: a taken port is said at once."""
        port, address = self._metrics
        if port is None:
            return {}
        required = process.number < len(self._failed_starts)
        return {"metrics": {"port": port + 1 + process.place, "address": address, "required": required}}

    def _tell(self, process: _Process, command: str, **content: Any) -> None:
        process.outbox.put(json.dumps({"do": command, **content}).encode() + b"\n")

    def _write(self, process: _Process) -> None:
        """In a thread of its own, because a worker that hangs does not read."""
        pipe = process.popen.stdin
        assert pipe is not None
        with contextlib.suppress(OSError), pipe:  # an error: it is dead, and `_read` deals with that
            while (line := process.outbox.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _bury(self, process: _Process) -> None:
        """A process has ended: start another one, and its requests go on elsewhere."""
        del self._processes[process.number]
        self._index.forget(process.number)
        self._balance.remove(process.number)
        self._deaths += not self._closing.is_set
        if self._closing.is_set:
            for answer, _ in process.answers.values():
                answer._end(error=_closed(answer))
            return
        why = process.failure or f"status {process.popen.returncode}"
        logger.warning("worker %d has ended (%s); its %d requests go on", process.number, why, len(process.answers))
        if not process.ready:
            self._failed_starts[process.place] += 1
        if self._restart and self._failed_starts[process.place] >= STARTS:
            logger.error("place %d of the group is given up: no worker gets ready there (%s)", process.place, why)
        elif self._restart:
            self._try_start(process.place)
        self._changed.set()
        for answer, before in process.answers.values():
            answer._deaths = answer._deaths + 1 if len(answer.tokens) == before else 0
            self._send(answer)
        if not self._processes:
            self._send_parked()
        self._last_failure = process.failure or f"it ended with status {process.popen.returncode}"

    def _wait_until_ready(self) -> None:
        """Wait until all workers are ready.

        Raises:
            WorkerError: one of them will not be.
        """
        end = time.monotonic() + START_S
        while True:
            self._changed.clear()
            with self._lock:
                ready = sum(p.ready for p in self._processes.values())
                if ready == len(self._failed_starts):
                    return
                if len(self._processes) < len(self._failed_starts):
                    raise WorkerError(f"a worker cannot be started: {self._last_failure}")
            if not self._changed.wait(max(0.0, end - time.monotonic())):
                raise WorkerError(f"only {ready} of {len(self._failed_starts)} workers were ready after {START_S} s")

    def _watch(self) -> None:
        """In a thread: kill workers that hang, so that `_read` deals with them, and start those that could not be."""
        every_s = min(1.0, self._silent_s / 4)
        looked_at = time.monotonic()
        while not self._closing.wait(every_s):
            with self._lock:
                if self._closing.is_set:
                    return
                for place in self._missing():
                    self._try_start(place)
                if not self._processes:
                    self._send_parked()
                now = time.monotonic()
                late_s, looked_at = max(0.0, now - looked_at - every_s), now
                for process in self._processes.values():
                    # nobody listened while this process was stopped (Ctrl-Z)
                    process.heard_at = min(process.heard_at + late_s, now)
                    silent_s = now - process.heard_at
                    if silent_s > (self._silent_s if process.ready else START_S):
                        process.failure = f"it said nothing for {silent_s:.0f} s"
                        process.popen.kill()

    def close(self, timeout_s: float = 10.0) -> None:
        """End all workers. Requests that have not ended fail. Workers that do not end in time are killed."""
        if self._metrics_server is not None:
            self._metrics_server.close()
        with self._lock:
            self._closing.set()
            processes = list(self._processes.values())
            for answer in self._parked:
                answer._end(error=_closed(answer))
            self._parked.clear()
        for process in processes:
            process.outbox.put(None)  # the end of its input is the end of a worker
        end = time.monotonic() + timeout_s
        for process in processes:
            try:
                process.popen.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
        for process in processes:  # the threads see the end
            for answer, _ in list(process.answers.values()):
                answer._end(error=_closed(answer))


def _closed(answer: Answer) -> WorkerError | None:
    """Why an answer ends that the group did not wait for."""
    return None if answer._is_cancelled else WorkerError("the group was closed before this answer had ended")


def _to_record(values: Message) -> Record:
    return Record(**{**values, "sources": Counter(values["sources"])})


def _from_hex(keys: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]
