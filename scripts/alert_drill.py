"""Inject each fault into a real system, and write down which alerts fire: docs/results/alerts.json.

    python scripts/alert_drill.py                    all faults; about twelve minutes
    python scripts/alert_drill.py "store killed"     some of them; the rows of the others stay as they are

Each fault has a system of its own: a redis-server behind a proxy, two worker processes with a load, a Prometheus with
the rules of docs/monitoring/alerts.yml, and redis_exporter if it is installed. The expressions and the thresholds are
the rules' own; windows and waiting times are shortened (`SHORTER`), as nobody waits a day for a drill. An alert counts
as fired if it fires at any time once all targets have been scraped, before the fault too.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvlab.engine import WorkerGroup, WorkerSettings
from kvlab.engine.workers import Answer
from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.testbed.prometheus import Prometheus
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import HOST, RedisServer, free_port

ROOT: Final = Path(__file__).parents[1]
RULES: Final = ROOT / "docs" / "monitoring" / "alerts.yml"
RESULTS: Final = ROOT / "docs" / "results" / "alerts.json"
EXPORTERS: Final = ("redis_exporter", "prometheus-redis-exporter")
SHORTER: Final = {
    "[2m]": "[10s]",
    "[5m]": "[10s]",
    "[10m]": "[10s]",
    "[1h]": "[12s]",
    "offset 1d": "offset 25s",
    "for: 1m": "for: 12s",
    "for: 2m": "for: 2s",
    "for: 5m": "for: 3s",
    "for: 10m": "for: 3s",
    "for: 15m": "for: 3s",
    "for: 30m": "for: 4s",
}
WARM_S: Final = 10.0
GIVE_UP_S: Final = 45.0
AFTER_S: Final = 15.0
"""How long the alerts are watched further, once the right one fires: longer than any of them waits."""
GROUPS, PREFIX, OWN, NEW = 4, 512, 80, 4
PER_SECOND: Final = 4.0


def shorter(rules: str) -> str:
    """The rules with the times of a drill."""
    times = "|".join(re.escape(time) for time in SHORTER)
    short = re.sub(times, lambda found: SHORTER[found[0]], rules)
    if left := re.findall(r"(?:for: |offset |\[)\d+[mhdw]\]?", short):
        raise KVLabError(f"expected a shorter time for {', '.join(left)} in SHORTER")
    return short


class Load:
    """Requests of some groups, each with a begin in common and a part of its own, at random times, in a thread.

    Attributes:
        prefix: tokens of the begin; 0 makes every prompt another one from its first token on.
        new: tokens to generate.
        per_second: requests.
    """

    def __init__(self, group: WorkerGroup, vocabulary: int = 4000, seed: int = 0) -> None:
        self.prefix, self.new, self.per_second = PREFIX, NEW, PER_SECOND
        self._group, self._vocabulary, self._random = group, vocabulary, random.Random(seed)
        self._begins = [self._tokens(PREFIX) for _ in range(GROUPS)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(10, self._vocabulary) for _ in range(count)]

    def _run(self) -> None:
        answers: list[Answer] = []
        while not self._stop.wait(self._random.expovariate(self.per_second)):
            prompt = self._random.choice(self._begins)[: self.prefix] + self._tokens(PREFIX + OWN - self.prefix)
            with suppress(KVLabError):  # too many: those of a worker that hangs
                answers.append(self._group.submit(prompt, self.new, stop_at_eos=False))
        for answer in answers:
            answer.cancel()


@dataclass
class System:
    """What a fault is injected into."""

    server: RedisServer
    proxy: FaultProxy
    group: WorkerGroup
    prometheus: Prometheus
    load: Load
    stack: ExitStack
    fired: dict[str, float] = field(default_factory=dict)

    def watch(self, until: Callable[[], bool], most_s: float) -> None:
        """Write down which alerts fire, until something holds, or for so long."""
        end = time.monotonic() + most_s
        while time.monotonic() < end and not until():
            for name in self.prometheus.firing():
                self.fired.setdefault(name, time.monotonic())
            time.sleep(0.25)

    def repeat(self, every_s: float, act: Callable[[], object]) -> None:
        """Do something again and again, in a thread, until the system ends."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(every_s):
                act()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(stop.set)


@dataclass(frozen=True)
class Fault:
    """A fault, and the one alert that is to fire; "" for none.

    Attributes:
        settings: of the workers, that differ.
        warm_s: how long the load runs before.
        exporter: whether it can only be seen with redis_exporter.
    """

    name: str
    injected: str
    alert: str
    inject: Callable[[System], object]
    settings: dict[str, Any] = field(default_factory=dict)
    warm_s: float = WARM_S
    exporter: bool = False


# --- the system ---------------------------------------------------------------------------------
@contextmanager
def exporter(server: RedisServer) -> Iterator[list[str]]:
    """Run redis_exporter beside a server, if it is installed; its targets."""
    program = next(filter(None, map(shutil.which, EXPORTERS)), None)
    if program is None:
        yield []
        return
    target = f"{HOST}:{free_port()}"
    command = [program, f"-redis.addr={server.url}", f"-web.listen-address={target}"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        try:
            yield [target]
        finally:
            run.kill()


@contextmanager
def system(**settings: Any) -> Iterator[System]:
    """Two workers over a Redis, under load, and a Prometheus that watches them."""
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        proxy = stack.enter_context(FaultProxy(server.port, seed=1))
        first = free_port(3)
        # Few pages and no host memory, so that the store is asked.
        few: dict[str, Any] = {"store": proxy.url, "pages": 96, "host_bytes": 0} | settings
        made = WorkerSettings(**few)
        group = stack.enter_context(WorkerGroup(2, made, router="round_robin", silent_s=600, metrics_port=first))
        redis = stack.enter_context(exporter(server))
        jobs = {"kvlab": [f"{HOST}:{first + i}" for i in range(3)], "redis": redis}
        prometheus = stack.enter_context(Prometheus(jobs, shorter(RULES.read_text("utf-8"))))
        load = stack.enter_context(Load(group))
        settle(prometheus, sum(map(len, jobs.values())))
        yield System(server, proxy, group, prometheus, load, stack)


def settle(prometheus: Prometheus, targets: int) -> None:
    """Wait until all targets are scraped and nothing fires: it takes Prometheus some seconds to find its targets.

    Raises:
        KVLabError: that is not so after a while.
    """
    end = time.monotonic() + GIVE_UP_S
    while time.monotonic() < end:
        if len(prometheus.query("up == 1")) == targets and not prometheus.firing():
            return
        time.sleep(0.25)
    raise KVLabError(f"before any fault: {prometheus.query('up')}, and {prometheus.firing()} fire")


def drill(fault: Fault, after_s: float = AFTER_S) -> dict[str, Any]:
    """Inject a fault; say what fired until `after_s` seconds after the right alert."""
    with system(**fault.settings) as made:
        made.watch(lambda: False, fault.warm_s)
        begin = time.monotonic()
        fault.inject(made)
        made.watch(lambda: fault.alert in made.fired, GIVE_UP_S if fault.alert else after_s)
        made.watch(lambda: False, after_s)
        fired = made.fired
    seconds = round(fired[fault.alert] - begin, 1) if fault.alert in fired else None
    row = {"fault": fault.name, "injected": fault.injected, "expected": fault.alert, "fired": sorted(fired)}
    return row | {"after_s": seconds, "ok": sorted(fired) == ([fault.alert] if fault.alert else [])}


# --- the faults ---------------------------------------------------------------------------------
def _deny(made: System) -> None:
    made.server.client().acl_setuser("default", enabled=True, commands=["-get"])


def _change_password(made: System) -> None:
    made.server.client().config_set("requirepass", "another")
    made.proxy.drop()


def _fill(made: System, policy: str) -> None:
    client = made.server.client()
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", client.info("memory")["used_memory"])


def _damage(made: System) -> None:
    client = made.server.client()
    for key in client.keys("kv:*"):
        client.setrange(key, 2000, b"damaged")


def _kill_worker(made: System) -> None:
    os.kill(min(made.group.pids.values()), signal.SIGKILL)


def _hang_worker(made: System) -> None:
    pid = min(made.group.pids.values())
    made.stack.callback(os.kill, pid, signal.SIGCONT)
    os.kill(pid, signal.SIGSTOP)


def _ask_for_long_answers(made: System) -> None:
    made.load.new, made.load.per_second = 80, 12.0


ALWAYS: Final = {"tiers": {"planner": False}, "max_batch": 1}
"""Fetches whatever there is, one request at a time: a planner would turn to computing by itself."""
FAULTS: Final = (
    Fault("none", "nothing", "", lambda made: None),
    Fault("store killed", "kill -9 of redis-server", "KVLabStoreUnavailable", lambda made: made.server.kill()),
    Fault("store hangs", "SIGSTOP of redis-server", "KVLabStoreUnavailable", lambda made: made.server.stop()),
    Fault(
        "connections break",
        "every 0.3 s one connection is reset in an answer",
        "KVLabStoreErrors",
        lambda made: made.repeat(0.3, lambda: made.proxy.truncate(100_000, reset=True)),
        {"max_batch": 1},
    ),
    Fault(
        "slow link",
        "answers at 4 MB/s",
        "KVLabDeadlineExceeded",
        lambda made: setattr(made.proxy, "bandwidth", 4_000_000),
        ALWAYS,
    ),
    Fault("right revoked", "ACL SETUSER default -get", "KVLabLoginRefused", _deny),
    Fault("password changed", "CONFIG SET requirepass, connections closed", "KVLabLoginRefused", _change_password),
    Fault("memory full", "maxmemory reached, noeviction", "KVLabWritesDropped", lambda made: _fill(made, "noeviction")),
    Fault("records damaged", "SETRANGE over seven bytes of every record", "KVLabBadRecords", _damage),
    Fault(
        "store too small",
        "maxmemory reached, allkeys-lru",
        "KVLabStoreTooSmall",
        lambda made: _fill(made, "allkeys-lru"),
        exporter=True,
    ),
    Fault(
        "prompts of a new kind",
        "no prompt begins like another one any more",
        "KVLabHitRateFell",
        lambda made: setattr(made.load, "prefix", 0),
        warm_s=40.0,
    ),
    Fault(
        "loads that save nothing",
        "0.18 s latency, planner off",
        "KVLabSavesNothing",
        lambda made: setattr(made.proxy, "latency_s", 0.18),
        ALWAYS,
    ),
    Fault(
        "pool too small",
        "answers of 80 tokens instead of 4, 12 a second, room for two prompts",
        "KVLabPreemptionStorm",
        _ask_for_long_answers,
        {"pages": 80},
    ),
    Fault("worker killed", "kill -9 of a worker", "KVLabWorkerDied", _kill_worker),
    Fault("worker hangs", "SIGSTOP of a worker", "KVLabTargetDown", _hang_worker),
    Fault(
        "no targets",
        "the job has no targets any more",
        "KVLabMetricsAbsent",
        lambda made: made.prometheus.retarget("kvlab", []),
    ),
)


def run(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Drill all faults, or those with these names.

    Raises:
        KVLabError: there is no such fault, or a program is missing.
    """
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        raise KVLabError(f"expected names of {', '.join(f.name for f in FAULTS)}; got {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if fault.name in names or not names]
    if any(fault.exporter for fault in chosen) and not any(map(shutil.which, EXPORTERS)):
        raise KVLabError("redis_exporter is not installed: sudo apt-get install prometheus-redis-exporter")
    rows = []
    for fault in chosen:
        rows.append(drill(fault))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def record(new: Sequence[dict[str, Any]]) -> None:
    """Put rows in the place of older ones of the same fault."""
    old = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []
    rows = {row["fault"]: row for row in (*old, *new)}
    program = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    found = versions() | {"prometheus": (program.stdout + program.stderr).split()[2]}
    kept = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    content = {"rows": kept, "shorter": SHORTER, "machine": describe_machine(), "versions": found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main(names: Sequence[str]) -> int:
    """Run the drill."""
    if {"-h", "--help"} & {*names}:
        print(__doc__)
        return 0
    try:
        rows = run(names)
    except KVLabError as error:
        print(f"alert_drill: {error}", file=sys.stderr)
        return 1
    record(rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
