"""Starts a real Prometheus on loopback, which scrapes and evaluates every second, for a `with` block."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvlab.errors import KVLabError
from kvlab.testbed.server import HOST, LIBC, POLL_S, READY_S, free_port, kill_with_parent

INSTALL = "sudo apt-get install prometheus (Debian, Ubuntu) or brew install prometheus (macOS)"


class Prometheus:
    """A Prometheus with a free port and a temporary folder of its own.

        with Prometheus({"kvlab": ["127.0.0.1:9401", "127.0.0.1:9402"]}, rules) as prometheus:
            prometheus.query("sum(kvlab_lookup_tokens_total)")   # [({}, 1200.0)]
            prometheus.firing()                                  # {"KVLabTargetDown"}
            prometheus.retarget("kvlab", [])

    Args:
        jobs: the targets of each job, as host:port.
        rules: the text of a rule file.
        every_s: seconds between two scrapes, and between two evaluations.

    On Linux the kernel also kills it when the thread that started it ends.
    """

    def __init__(self, jobs: Mapping[str, Sequence[str]], rules: str = "", every_s: int = 1) -> None:
        self._jobs, self._rules, self._every = dict(jobs), rules, f"{every_s}s"
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="kvlab-prometheus-"))
        self.port = free_port()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression now; return the labels and the value of each series.

        Raises:
            KVLabError: it does not answer, or the expression is wrong.
        """
        found = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        alerts = self._get("/api/v1/alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def retarget(self, job: str, targets: Sequence[str]) -> None:
        """Scrape other targets from now on. It takes Prometheus a moment to notice."""
        new = self.folder / "new"
        new.write_text(json.dumps([{"targets": list(targets)}]), "utf-8")
        new.replace(self.folder / f"{job}.json")

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._kill_and_remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._kill_and_remove()

    def _start(self) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise KVLabError(f"prometheus is not installed: {INSTALL}")
        self._configure()
        options = [f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        command = [program, *options, f"--web.listen-address={HOST}:{self.port}", "--log.level=warn"]
        before = kill_with_parent if LIBC else None
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, preexec_fn=before
            )
        self._wait_until_ready()

    def _configure(self) -> None:
        (self.folder / "rules.yml").write_text(self._rules or "groups: []\n", "utf-8")
        for job, targets in self._jobs.items():
            self.retarget(job, targets)
        content = {
            "global": dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), self._every),
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": job, "file_sd_configs": [{"files": [f"{job}.json"]}]} for job in self._jobs
            ],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps(content), "utf-8")  # JSON is YAML

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + READY_S
        while time.monotonic() < give_up:
            if self._process is not None and self._process.poll() is not None:
                log = (self.folder / "log").read_text("utf-8", "replace")
                raise KVLabError(f"prometheus exited at once: {log[-800:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=READY_S):
                return
            time.sleep(POLL_S)
        raise KVLabError(f"prometheus was not ready within {READY_S:.0f} s")

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.url + path, timeout=READY_S) as answer:
                return json.load(answer)["data"]
        except OSError as error:
            told = error.read().decode("utf-8", "replace") if hasattr(error, "read") else error
            raise KVLabError(f"prometheus does not answer {path}: {told}") from error

    def _kill_and_remove(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
